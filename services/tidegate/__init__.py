"""Tidegate: AI-agent runs on Kafka. What applications import; each name is loaded when it is first used.

from tidegate import App, Plan, ToolCall

app = App("refunds")

@app.tool(cost_micros=2_000)
def lookup_order(order_id: str) -> dict: ...
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tidegate.sdk.app import App, agent, flow, functions_of, step, tool
    from tidegate.sdk.client import Client, Run
    from tidegate.sdk.context import StepContext, context, idempotency_key, report_cost, report_usage
    from tidegate.sdk.errors import (
        AppError,
        CallFailedError,
        FlowChangedError,
        FlowError,
        GraphError,
        NonRetryable,
        NotJsonError,
        OutsideStepError,
        PublishConflictError,
        RunNotFinishedError,
        RunNotFoundError,
    )
    from tidegate.sdk.flow import Result, merge
    from tidegate.sdk.functions import RetryRule
    from tidegate.sdk.graph import Change, Graph
    from tidegate.sdk.loading import load_app
    from tidegate.sdk.model_errors import MODEL_RETRIES, ModelError, model_errors
    from tidegate.sdk.plan import Goto, Observation, Plan, Propose, State, ToolCall, Turn

__all__ = [
    "MODEL_RETRIES",
    "App",
    "AppError",
    "CallFailedError",
    "Change",
    "Client",
    "FlowChangedError",
    "FlowError",
    "Goto",
    "Graph",
    "GraphError",
    "ModelError",
    "NonRetryable",
    "NotJsonError",
    "Observation",
    "OutsideStepError",
    "Plan",
    "Propose",
    "PublishConflictError",
    "Result",
    "RetryRule",
    "Run",
    "RunNotFinishedError",
    "RunNotFoundError",
    "State",
    "StepContext",
    "ToolCall",
    "Turn",
    "agent",
    "context",
    "flow",
    "functions_of",
    "idempotency_key",
    "load_app",
    "merge",
    "model_errors",
    "report_cost",
    "report_usage",
    "step",
    "tool",
]

# Loaded late, so that every service may import `tidegate.domain` without pydantic, and an app without a Kafka client.
_MODULES: Final[dict[str, str]] = {
    **dict.fromkeys(("App", "agent", "flow", "functions_of", "step", "tool"), "app"),
    **dict.fromkeys(("Client", "Run"), "client"),
    **dict.fromkeys(("StepContext", "context", "idempotency_key", "report_cost", "report_usage"), "context"),
    **dict.fromkeys(
        (
            "AppError",
            "CallFailedError",
            "FlowChangedError",
            "FlowError",
            "GraphError",
            "NonRetryable",
            "NotJsonError",
            "OutsideStepError",
            "PublishConflictError",
            "RunNotFinishedError",
            "RunNotFoundError",
        ),
        "errors",
    ),
    **dict.fromkeys(("Change", "Graph"), "graph"),
    **dict.fromkeys(("Result", "merge"), "flow"),
    **dict.fromkeys(("RetryRule",), "functions"),
    **dict.fromkeys(("load_app",), "loading"),
    **dict.fromkeys(("MODEL_RETRIES", "ModelError", "model_errors"), "model_errors"),
    **dict.fromkeys(("Goto", "Observation", "Plan", "Propose", "State", "ToolCall", "Turn"), "plan"),
}


# As a library should: say nothing unless the application configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tidegate.sdk.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
