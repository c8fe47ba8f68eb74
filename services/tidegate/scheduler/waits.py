"""How waits end: an event that comes or was kept, an answer, a time. Pure functions from (run, input, now) to events."""

from __future__ import annotations

from typing import Any, Final

from tidegate.domain import progress, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.run import KeptSignal, RunState, StepState
from tidegate.scheduler import attempts
from tidegate.scheduler.evolution import CHANGE

DUE: Final = "due"
SIGNALLED: Final = "signalled"
ANSWERED: Final = "answered"
TIMED_OUT: Final = "timed_out"
REJECTED: Final = "rejected"

MAX_KEPT_SIGNALS: Final = 100
MAX_KEPT_CHARACTERS: Final = 1024 * 1024

Events = list[Any]


def due_ms(run: RunState, step: StepState) -> int | None:
    """Return when something happens to this step by itself, Unix milliseconds; None for never.

    The end of a back-off, of a wait or of a question about a change; 0 for a wait whose event is there already. Other questions
    lapse by the gate's clock.
    """
    if step.status == states.BACKING_OFF:
        return step.retry_at_ms
    if step.status == states.AWAITING_APPROVAL and step.approval is not None and step.approval.why == CHANGE:
        return step.approval.expires_at_ms or None
    if step.status != states.WAITING or step.wait is None:
        return None
    if kept_for(run, step.wait) is not None:
        return 0
    return min((at for at in (step.wait.due_ms, step.wait.timeout_at_ms) if at is not None), default=None)


def on_due(run: RunState, step: StepState, now_ms: int) -> Events:
    """Return how an open wait ends by itself now, if it does."""
    wait = step.wait
    assert wait is not None  # noqa: S101 - a step that waits has one
    kept = kept_for(run, wait)
    if kept is not None:
        return [
            ev.WaitEnded(step_id=step.step_id, outcome=SIGNALLED, signal_seq=kept.seq),
            *_succeeded(run, step, kept.payload),
        ]
    is_late = wait.timeout_at_ms is not None and wait.timeout_at_ms <= now_ms
    if is_late and (wait.due_ms is None or wait.timeout_at_ms < wait.due_ms):  # type: ignore[operator] # `is_late` says it
        return _timed_out(run, step, wait)
    if wait.due_ms is not None and wait.due_ms <= now_ms:
        return [ev.WaitEnded(step_id=step.step_id, outcome=DUE), *_succeeded(run, step, wait.input)]
    return []


def _timed_out(run: RunState, step: StepState, wait: ev.WaitStarted) -> Events:
    ended: Any = ev.WaitEnded(step_id=step.step_id, outcome=TIMED_OUT)
    if wait.on_timeout == waits.VALUE:
        return [ended, *_succeeded(run, step, wait.timeout_value)]
    reason = f"nothing came within {(wait.timeout_ms or 0) / 1000:g} s: {described(wait)}"
    return [
        ended,
        *_not_done(step, "timed_out", "TimedOut", reason),
        *progress.failed(run, step, "wait_timed_out", reason),
    ]


def answered(run: RunState, step: StepState, value: str, command_id: str, by: str, reason: str) -> Events:
    """Return what follows from a good answer, canonical JSON, to an open wait."""
    ended = ev.WaitEnded(step_id=step.step_id, outcome=ANSWERED, command_id=command_id, by=by, reason=reason)
    return [ended, *_succeeded(run, step, value, by or "a human")]


def rejected(run: RunState, step: StepState, command_id: str, by: str, reason: str) -> Events:
    """Return what follows when whoever was to do an outside tool could not: the agent that called it is told."""
    ended: Any = ev.WaitEnded(step_id=step.step_id, outcome=REJECTED, command_id=command_id, by=by, reason=reason)
    said = f"rejected by {by or 'a human'}" + (f": {reason}" if reason else "")
    return [ended, *_not_done(step, "failed", "Rejected", said), *progress.failed(run, step, "rejected", said)]


def _not_done(step: StepState, outcome: str, error_class: str, reason: str) -> Events:
    """Return the end of the attempt that an outside tool's wait was, if it was one: what the gate set aside is free."""
    return [attempts.ended(step, step.attempt, outcome, error_class, reason)] if step.attempt else []


def signalled(run: RunState, step: StepState, payload: str) -> Events:
    """Return what follows from an event that an open wait waits for."""
    return [ev.WaitEnded(step_id=step.step_id, outcome=SIGNALLED), *_succeeded(run, step, payload)]


def _succeeded(run: RunState, step: StepState, output: str, given_by: str = "") -> Events:
    given = attempts.output_given(step, output, given_by, attempt=step.attempt)
    return [given, *progress.after_success(run, step, output)]


# --- events that come ---------------------------------------------------------------


def kept_for(run: RunState, wait: ev.WaitStarted) -> KeptSignal | None:
    """Return the oldest kept event that a wait waits for."""
    if wait.kind != waits.EVENT:
        return None
    return next((kept for kept in run.signals if _fits(wait, kept.event, kept.key)), None)


def waiting_for(run: RunState, event: str, key: str | None) -> list[StepState]:
    """Return the open waits that an event would end, oldest first. One that a kept event is about to end is none of them."""
    return [
        step
        for step in run.open_waits()
        if step.wait is not None
        and step.wait.kind == waits.EVENT
        and _fits(step.wait, event, key)
        and kept_for(run, step.wait) is None
    ]


def _fits(wait: ev.WaitStarted, event: str, key: str | None) -> bool:
    return wait.event == event and key in (None, wait.key)


def no_room_for(run: RunState, payload: str) -> str | None:
    """Return why another event cannot be kept, or None."""
    if len(run.signals) >= MAX_KEPT_SIGNALS:
        return f"{len(run.signals)} events are kept already that nothing has waited for, at most {MAX_KEPT_SIGNALS} are"
    size = sum(len(kept.payload) for kept in run.signals) + len(payload)
    if run.signals and size > MAX_KEPT_CHARACTERS:
        return f"the events kept would have {size} characters, at most {MAX_KEPT_CHARACTERS} are kept"
    return None


def described(wait: ev.WaitStarted) -> str:
    """Return what is waited for, for people."""
    if wait.kind == waits.EVENT:
        return f"event {wait.event!r}" + (f" with key {wait.key!r}" if wait.key else "")
    if wait.kind == waits.ASK:
        return f"an answer to {wait.prompt[:200]!r}"
    if wait.kind == waits.OUTSIDE:
        return f"an answer to the call of the outside tool {wait.function}"
    return f"until {wait.due_ms} (Unix milliseconds)"
