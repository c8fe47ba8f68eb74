"""What becomes of a decision before it is logged: times are reckoned, and what is paused is held back. Pure.

Every decision of the scheduler goes through `finished`, so that no path asks the gate for a step of a run or a queue that is
paused. What was asked before the pause may still run: the gate places nothing of a paused queue, and a paused run only ends
what it has begun.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tidegate.domain import run_events as ev
from tidegate.domain.controls import Controls
from tidegate.domain.run import RunState
from tidegate.domain.stop import MAX_CALLS_BYTES

RUN: Final = "run"
QUEUE: Final = "queue"
MAX_RELEASED: Final = 500
_HERE: Final = frozenset((ev.RunPaused, ev.WaitStarted))  # what is looked at even if nothing is paused

Events = list[Any]


def finished(run: RunState, events: Events, controls: Controls, now_ms: int) -> Events:
    """Return a decision's events as they are logged."""
    is_paused = run.paused is not None
    if not is_paused and not controls and _HERE.isdisjoint(map(type, events)):
        return events  # as nearly all are
    made: Events = []
    for event in events:
        if isinstance(event, (ev.RunPaused, ev.RunResumed)):
            is_paused = isinstance(event, ev.RunPaused)
        if isinstance(event, ev.WaitStarted):
            made.append(_reckoned(event, now_ms))
        elif isinstance(event, ev.ChildStarted) and is_paused:
            made.append(msgspec.structs.replace(event, paused=True))
        elif isinstance(event, (ev.StepReady, ev.AttemptRequested)):
            made.append(_held(event, RUN if is_paused else QUEUE if controls.is_paused(event.call.queue) else ""))
        else:
            made.append(event)
    return made


def _reckoned(event: ev.WaitStarted, now_ms: int) -> ev.WaitStarted:
    due_ms = event.due_ms if event.after_ms is None else now_ms + event.after_ms
    timeout_at_ms = None if event.timeout_ms is None else now_ms + event.timeout_ms
    return msgspec.structs.replace(event, due_ms=due_ms, timeout_at_ms=timeout_at_ms)


def _held(event: ev.StepReady | ev.AttemptRequested, why: str) -> Any:
    if not why:
        return event
    if isinstance(event, ev.StepReady):
        return msgspec.structs.replace(event, held=True)
    return ev.AttemptHeld(step_id=event.step_id, attempt=event.attempt, why=why)


def released(run: RunState, controls: Controls) -> Events:
    """Return the requests for held steps that nothing holds back any more, as many as one entry may ask for."""
    if run.is_over or run.paused is not None:
        return []
    events: Events = []
    size = 0
    for step in run.held_steps():
        if controls.is_paused(step.call.queue):
            continue
        size += len(step.call.arguments.encode())
        if events and (size > MAX_CALLS_BYTES or len(events) >= MAX_RELEASED):
            break
        events.append(ev.AttemptRequested(step_id=step.step_id, attempt=step.attempt + 1, call=step.call))
    return events
