"""One constructor for each of the events that tell of attempts and of what steps give."""

from __future__ import annotations

from tidegate.domain import run_events as ev
from tidegate.domain.messages import StepResult
from tidegate.domain.run import StepState


def next_attempt(step: StepState) -> ev.AttemptRequested:
    """Return that the attempt after the latest one is asked of the gate."""
    return ev.AttemptRequested(step_id=step.step_id, attempt=step.attempt + 1, call=step.call)


def ended(
    step: StepState,
    attempt: int,
    outcome: str,
    error_class: str,
    message: str,
    result: StepResult | None = None,
    retry_at_ms: int | None = None,
) -> ev.AttemptEnded:
    """Return the end of an attempt without a success; what it cost is what its result says, if there is one."""
    return ev.AttemptEnded(
        step_id=step.step_id,
        attempt=attempt,
        outcome=outcome,
        error_class=error_class,
        error_message=message,
        actual_micros=0 if result is None else result.actual_micros,
        usage={} if result is None else result.usage,
        retry_at_ms=retry_at_ms,
        instance_id="" if result is None else result.instance_id,
        incarnation=-1 if result is None else result.incarnation,
        started_ms=0 if result is None else result.started_ms,
        finished_ms=0 if result is None else result.finished_ms,
        code_version="" if result is None else result.code_version,
    )


def succeeded(step: StepState, result: StepResult) -> ev.StepSucceeded:
    """Return the success that an attempt's result is."""
    return ev.StepSucceeded(
        step_id=step.step_id,
        attempt=result.attempt,
        output=result.output,
        actual_micros=result.actual_micros,
        usage=result.usage,
        instance_id=result.instance_id,
        incarnation=result.incarnation,
        started_ms=result.started_ms,
        finished_ms=result.finished_ms,
        goto=result.goto,
        code_version=result.code_version,
    )


def output_given(
    step: StepState, output: str, given_by: str = "", goto: str = "", *, attempt: int = 0
) -> ev.StepSucceeded:
    """Return the success of a step whose output comes from no executor, or from an attempt whose end is recorded already.

    attempt: the one that the output ends, if it is done outside; it cost what was set aside for it.
    """
    return ev.StepSucceeded(
        step_id=step.step_id,
        attempt=attempt,
        output=output,
        actual_micros=step.call.reserve_micros if attempt else 0,
        usage={},
        instance_id="",
        incarnation=-1,
        started_ms=0,
        finished_ms=0,
        given_by=given_by,
        goto=goto,
    )


def resolved(
    step: StepState,
    asked: ev.ApprovalRequested,
    *,
    approved: bool,
    by: str,
    reason: str,
    command_id: str = "",
    answer: str = "",
) -> ev.ApprovalResolved:
    """Return that the open question of a step is answered. answer: see the event. command_id: empty if the gate answered it."""
    return ev.ApprovalResolved(
        command_id=command_id,
        step_id=step.step_id,
        attempt=asked.attempt,
        why=asked.why,
        approved=approved,
        by=by,
        reason=reason,
        arguments_hash=asked.arguments_hash,
        answer=answer,
    )
