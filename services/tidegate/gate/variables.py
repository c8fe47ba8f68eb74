"""What rules and limits may look at: the variables of a step. The names are documented in docs/policy.md and never change
their meaning."""

from __future__ import annotations

from typing import Any, Protocol

from tidegate.domain import canonical
from tidegate.domain.messages import Call
from tidegate.gate.ledger import AttemptKey


class Money(Protocol):
    """What is needed of a run."""

    budget_micros: int | None
    reserved_micros: int
    settled_micros: int
    workflow: str
    tags: dict[str, str]


def step_variables(key: AttemptKey, account: str, call: Call, run: Money) -> dict[str, Any]:
    """Return the variables of an attempt of a run."""
    workflow, _, version = run.workflow.partition("@")
    return {
        "kind": call.kind,
        "name": call.function,
        "tool": call.function if call.kind == "tool" else "",
        "args": canonical.loads(call.arguments),
        "queue": call.queue,
        "provider": call.provider,
        "model": call.model,
        "operation": call.operation,
        "step": key.step_id,
        "node": key.step_id.partition("/")[0],
        "attempt": key.attempt,
        "reserve_micros": call.reserve_micros,
        "account": account,
        "workflow": workflow,
        "version": version,
        "tags": run.tags,
        "run": {
            "id": key.run_id,
            "settled_micros": run.settled_micros,
            "reserved_micros": run.reserved_micros,
            "budget_micros": -1 if run.budget_micros is None else run.budget_micros,
        },
    }
