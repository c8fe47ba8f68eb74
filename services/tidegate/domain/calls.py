"""What a decision hands out: calls of functions, and the step that the decided event has moved."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from tidegate.domain import run_events as ev
from tidegate.domain import waits
from tidegate.domain.messages import Call
from tidegate.domain.workflow import Workflow


class Changed(NamedTuple):
    """The step that the answered event has just moved, with its new status and output."""

    step_id: str
    status: str
    output: str


def wait_of(step_id: str, node_id: str, wave: int, kind: str, value: str, bound: waits.Bound) -> ev.WaitStarted:
    """Return the beginning of a wait. value: what it hands on. Its times are reckoned later: nothing here knows what time it is."""
    settings = msgspec.structs.asdict(bound)
    return ev.WaitStarted(step_id=step_id, node_id=node_id, wave=wave, kind=kind, input=value, **settings)


def call_of(workflow: Workflow, function: str, arguments: str, agent: str = "") -> Call:
    """Return the call of a function with its pinned settings. arguments: canonical JSON. agent: whose turn, or tool, it is."""
    settings = workflow.function(function)
    return Call(
        kind=settings.kind,
        function=function,
        queue="" if settings.outside else settings.queue,
        arguments=arguments,
        timeout_ms=settings.timeout_ms,
        reserve_micros=settings.reserve_micros,
        idempotent=settings.idempotent,
        provider=settings.provider,
        model=settings.model,
        operation=settings.operation,
        prefer=settings.prefer,
        agent=agent,
        max_input_tokens=settings.max_input_tokens,
        max_output_tokens=settings.max_output_tokens,
    )


def as_wished(event: Any, prefer: str) -> Any:
    """Return the event; if it begins a step, with the instance that the run prefers before the one that the function does."""
    if not isinstance(event, ev.StepReady):
        return event
    names = dict.fromkeys([prefer, *event.call.preferred])
    return msgspec.structs.replace(event, call=msgspec.structs.replace(event.call, prefer=",".join(names)))
