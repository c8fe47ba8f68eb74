"""What commands cause: pure functions from (run, command) to events. A wrong command causes a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.domain import canonical, children, progress, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.evolution import Problem
from tidegate.domain.messages import RunCommand
from tidegate.domain.questions import asks_by, question_id
from tidegate.domain.run import RunState, StepState, apply
from tidegate.domain.workflow import FAILURE_MODES, DefinitionError, compile_definition
from tidegate.scheduler import attempts, evolution
from tidegate.scheduler import waits as waiting
from tidegate.scheduler.decide import output_problem

UNKNOWN: Final = "outcome_unknown"
AGAIN, FAIL, DONE = "again", "fail", "done"
MAX_LISTED: Final = 20
MAX_REASON: Final = 4_000

Events = list[Any]


def on_command(run: RunState, command: RunCommand) -> Events:
    """Return what a command causes; a command that was seen before causes nothing, a wrong one a refusal."""
    if command.command_id in run.command_ids and not (run.status == states.ABSENT and command.type == "start"):
        return []  # a start is new as long as there is no run, whatever was sent under its id before
    return _COMMANDS[command.type](run, command) if command.type in _COMMANDS else [_unknown(command)]


def _start(run: RunState, command: RunCommand) -> Events:
    if run.status != states.ABSENT:
        if run.content_hash == command.content_hash:
            return []  # the same request again: it is already being done
        reason = f"run {run.run_id} exists already with other content"
        return [_refused(command, "duplicate_run_id", reason), *_told_parent(command, "duplicate_run_id", reason)]
    try:
        workflow = compile_definition(command.definition)
    except DefinitionError as error:
        return _not_started(command, "invalid_definition", str(error))
    problem = workflow.input_problem(canonical.loads(command.input))
    if problem is not None:
        return _not_started(command, "invalid_input", problem)
    if command.failure_mode not in ("", *FAILURE_MODES):
        return _not_started(command, "invalid", f"there is no failure mode {command.failure_mode!r}")
    started = ev.RunStarted(
        command_id=command.command_id,
        content_hash=command.content_hash,
        source=command.source,
        workflow=command.workflow,
        definition_hash=command.definition_hash,
        definition=command.definition,
        input=command.input,
        budget_micros=command.budget_micros,
        tags=command.tags,
        priority=command.priority,
        failure_mode=command.failure_mode,
        parent_run_id=command.parent_run_id,
        parent_step_id=command.parent_step_id,
        prefer=command.prefer,
    )
    begun = RunState(run.run_id)
    apply(begun, started, 0)
    pause = [_paused(command)] if command.paused else []
    return [started, *pause, *progress.first_steps(begun)]


def _not_started(command: RunCommand, code: str, reason: str) -> Events:
    return [_run_refused(command, code, reason), *_told_parent(command, code, reason)]


def _told_parent(command: RunCommand, code: str, reason: str) -> Events:
    """Return what tells the run that wanted this one that it gets none; nothing if it was not a run that wanted it."""
    if not command.parent_run_id:
        return []
    return [
        ev.EndReported(
            parent_run_id=command.parent_run_id,
            parent_step_id=command.parent_step_id,
            status=states.REFUSED,
            code=code,
            reason=reason[:MAX_REASON],
        )
    ]


def _child_ended(run: RunState, command: RunCommand) -> Events:
    """Go on with the step that another run has done, or failed to do."""
    problem = _not_open(run, command)
    if problem is not None:
        return [problem]
    step = run.steps.get(command.step_id)
    if step is None or step.status != states.IN_CHILD:
        return [_refused(command, "no_such_child", f"no run is awaited for step {command.step_id!r}")]
    if command.status == states.SUCCEEDED:
        problem_of = output_problem(step, command.output)
        if problem_of is not None:
            return [_ended_child(step, command, "bad_output", problem_of), *progress.broken(run, step, problem_of)]
        ended = _ended_child(step, command, states.SUCCEEDED, "")
        return [ended, *progress.after_success(run, step, command.output)]
    reason = f"run {step.child_run_id} ended as {command.status}: {command.reason or command.code}"
    ended = _ended_child(step, command, command.status, reason)
    return [ended, *progress.after_failure(run, step, f"child_{command.status}", reason)]


def _ended_child(step: StepState, command: RunCommand, status: str, reason: str) -> ev.ChildEnded:
    return ev.ChildEnded(
        command_id=command.command_id,
        step_id=step.step_id,
        child_run_id=step.child_run_id,
        status=status,
        output=command.output if status == states.SUCCEEDED else "",
        code=command.code,
        reason=reason,
    )


def _refuse(run: RunState, command: RunCommand) -> Events:
    """Note a start that admission refused, if its id is new; its dead letter exists already."""
    if run.status != states.ABSENT:
        return [] if run.content_hash == command.content_hash else [_refused(command, command.code, command.reason)]
    return [_run_refused(command, command.code, command.reason)]


def _cancel(run: RunState, command: RunCommand) -> Events:
    problem = _not_open(run, command)
    if problem is not None:
        return [problem]
    requested = ev.RunCancelRequested(command_id=command.command_id, by=command.by, reason=command.reason)
    return [requested, *progress.cancelled(run, command.reason or f"cancelled by {command.by or 'a command'}")]


def _approve(run: RunState, command: RunCommand) -> Events:
    return _answer(run, command, approved=True)


def _reject(run: RunState, command: RunCommand) -> Events:
    return _answer(run, command, approved=False)


def _answer(run: RunState, command: RunCommand, *, approved: bool) -> Events:
    outside = [] if approved else [step for step in run.open_waits() if step.wait and step.wait.kind == waits.OUTSIDE]
    open_ = sorted([*run.open_approvals(), *outside], key=lambda step: step.step_id)
    step = _asked(run, command, open_, "approval")
    if isinstance(step, ev.CommandRefused):
        return [step]
    if step.wait is not None:
        return waiting.rejected(run, step, command.command_id, command.by, command.reason)
    asked = step.approval
    assert asked is not None  # noqa: S101 - an open approval is one
    answer = "" if asked.why != UNKNOWN else AGAIN if approved else FAIL
    return _resolved(run, step, command, answer, approved=approved)


def _resolved(run: RunState, step: StepState, command: RunCommand, answer: str, *, approved: bool) -> Events:
    """Return what a good answer to an open approval causes, but for the output that `done` gives."""
    asked = step.approval
    assert asked is not None  # noqa: S101 - the caller has looked
    if approved and asked.why == "policy" and run.paused is not None:
        # The gate would place it at once, and what the gate was told cannot be taken back.
        reason = f"run {run.run_id} is paused: resume it before you approve; the question stays open"
        return [_refused(command, "run_is_paused", reason)]
    resolved = attempts.resolved(
        step,
        asked,
        approved=approved,
        by=command.by,
        reason=command.reason,
        command_id=command.command_id,
        answer=answer,
    )
    if not approved:
        reason = f"rejected by {command.by or 'a human'}" + (f": {command.reason}" if command.reason else "")
        if asked.why == evolution.CHANGE:
            return [resolved, *evolution.declined(run, step, Problem("rejected", reason))]
        return [resolved, *progress.failed(run, step, "rejected", reason)]
    if asked.why == evolution.CHANGE:
        return [resolved, *evolution.approved(run, step)]
    if asked.why == "policy" or answer == DONE:
        return [resolved]
    return [resolved, attempts.next_attempt(step)]


def _asked(run: RunState, command: RunCommand, open_: list[StepState], what: str) -> StepState | ev.CommandRefused:
    """Return the step whose question a command answers, or why there is none."""
    problem = _not_open(run, command)
    if problem is not None:
        return problem
    names = ", ".join(step.step_id for step in open_[:MAX_LISTED]) or "none"
    names += f" and {len(open_) - MAX_LISTED} more" if len(open_) > MAX_LISTED else ""
    step = next((step for step in open_ if step.step_id == command.step_id), None)
    if not command.step_id and len(open_) == 1:
        step = open_[0]
    if step is None:
        known = run.steps.get(command.step_id)
        if known is not None and known.status in states.STEP_TERMINAL:
            reason = f"{command.step_id} is over ({known.status}) and waits for nothing any more; open: {names}"
            return _refused(command, f"no_such_{what}", reason)
        named = f" {command.step_id!r}" if command.step_id else " that is meant for certain" if open_ else ""
        return _refused(command, f"no_such_{what}", f"no open {what}{named}; open: {names}")
    asked = step.approval
    if asked is None:
        if command.attempt not in (0, step.attempt) or command.why or command.question:
            about = f"attempt {step.attempt}" if step.attempt else "no attempt"
            return _refused(
                command, "other_question", f"the question of {step.step_id} is about {about} and has no `why`"
            )
        return step
    question = question_id(asked)
    is_other = command.attempt not in (0, asked.attempt) or command.why not in ("", asked.why)
    if is_other or command.question not in ("", question):
        by = asks_by(asked.rule, asked.policy, asked.why)
        reason = (
            f"{step.step_id} asks about attempt {asked.attempt} ({asked.why}), by {by}, question {question}: that is not what "
            "was answered; look again"
        )
        return _refused(command, "other_question", reason)
    return step


# --- waits ---------------------------------------------------------------


def _respond(run: RunState, command: RunCommand) -> Events:
    step = _asked(run, command, _answerable(run), "wait")
    if isinstance(step, ev.CommandRefused):
        policy = any(other.step_id == command.step_id for other in run.open_approvals())
        if step.code == "no_such_wait" and policy:
            return [_refused(command, step.code, f"{command.step_id} waits for an approval: approve or reject it")]
        return [step]
    if step.approval is not None:
        return _outcome_known(run, step, command)
    wait = step.wait
    assert wait is not None  # noqa: S101 - it is no approval
    problem = _answer_problem(wait, canonical.loads(command.value))
    if problem is not None:
        return [_refused(command, "invalid_answer", f"{step.step_id}: {problem}; the question stays open")]
    return waiting.answered(run, step, command.value, command.command_id, command.by, command.reason)


def _answer_problem(wait: ev.WaitStarted, value: Any) -> str | None:
    if wait.kind == waits.ASK:
        return waits.answer_problem(value, wait.choices, wait.free_text, wait.schema)
    return waits.output_problem(value, wait.schema) if wait.kind == waits.OUTSIDE else None


def _answerable(run: RunState) -> list[StepState]:
    """Return the steps that `respond` can answer, in order of step id. Times cannot be answered, only waited for."""
    unknown = [step for step in run.open_approvals() if step.approval is not None and step.approval.why == UNKNOWN]
    waits_open = [step for step in run.open_waits() if step.wait is not None and step.wait.kind not in waits.TIMES]
    return sorted([*unknown, *waits_open], key=lambda step: step.step_id)


def _outcome_known(run: RunState, step: StepState, command: RunCommand) -> Events:
    """A human says what became of an attempt whose outcome nobody knew: `again`, `fail`, or what it gave."""
    value = canonical.loads(command.value)
    if value in (AGAIN, FAIL):
        return _resolved(run, step, command, value, approved=value == AGAIN)
    if not isinstance(value, dict) or list(value) != [DONE]:
        reason = f'{step.step_id}: the answer is "again", "fail" or {{"done": its result}}; the question stays open'
        return [_refused(command, "invalid_answer", reason)]
    output = canonical.dumps(value[DONE])
    problem = output_problem(step, output)
    if problem is not None:
        return [_refused(command, "invalid_answer", f"{step.step_id}: {problem}; the question stays open")]
    return [
        *_resolved(run, step, command, DONE, approved=True),
        attempts.output_given(step, output, command.by or "a human"),
        *progress.after_success(run, step, output),
    ]


def _signal(run: RunState, command: RunCommand) -> Events:
    problem = _not_open(run, command)
    if problem is not None:
        return [problem]
    found = waiting.waiting_for(run, command.event, command.key)
    keys = {step.wait.key for step in found if step.wait is not None}
    if command.key is None and len(keys) > 1:
        listed = ", ".join(f"{step.step_id} (key {step.wait.key!r})" for step in found[:MAX_LISTED] if step.wait)
        reason = f"several waits for {command.event!r} are open, say by its key which is meant: {listed}"
        return [_refused(command, "ambiguous_signal", reason)]
    if not found and (why := waiting.no_room_for(run, command.value)) is not None:
        return [_refused(command, "too_many_signals", why)]
    received = ev.SignalReceived(
        command_id=command.command_id,
        event=command.event,
        key=command.key,
        payload=command.value,
        by=command.by,
        step_id=found[0].step_id if found else "",
    )
    return [received, *waiting.signalled(run, found[0], command.value)] if found else [received]


# --- pause and resume ---------------------------------------------------------------


def _pause(run: RunState, command: RunCommand) -> Events:
    problem = _not_open(run, command)
    if problem is not None:
        return [problem]
    if run.paused is not None:
        return [_refused(command, "already_paused", f"run {run.run_id} is paused already")]
    return [_paused(command), *children.paused(run, is_paused=True)]


def _paused(command: RunCommand) -> ev.RunPaused:
    return ev.RunPaused(command_id=command.command_id, by=command.by, reason=command.reason)


def _resume(run: RunState, command: RunCommand) -> Events:
    """What was held is asked for right after this, as everything is that was held for any reason: see `holding.released`."""
    problem = _not_open(run, command)
    if problem is not None:
        return [problem]
    if run.paused is None:
        return [_refused(command, "not_paused", f"run {run.run_id} is not paused")]
    resumed = ev.RunResumed(command_id=command.command_id, by=command.by, reason=command.reason)
    return [resumed, *children.paused(run, is_paused=False)]


# --- all of them ---------------------------------------------------------------


_COMMANDS: Final[dict[str, Callable[[RunState, RunCommand], Events]]] = {
    "start": _start,
    "refuse": _refuse,
    "cancel": _cancel,
    "approve": _approve,
    "reject": _reject,
    "respond": _respond,
    "signal": _signal,
    "pause": _pause,
    "resume": _resume,
    "child_ended": _child_ended,
}


def on_error(run: RunState, command: RunCommand, reason: str) -> Events:
    """Return the answer to a command that could not be decided on because of a defect of ours."""
    if run.status == states.ABSENT and command.type == "start":
        return _not_started(command, "internal_error", reason)
    step = run.steps.get(command.step_id)
    if command.type == "child_ended" and not run.is_over and step is not None and step.status == states.IN_CHILD:
        return [_ended_child(step, command, "internal_error", reason), *progress.broken(run, step, reason)]
    return [_refused(command, "internal_error", reason)]


def _not_open(run: RunState, command: RunCommand) -> ev.CommandRefused | None:
    if run.status == states.ABSENT:
        return _refused(command, "unknown_run", f"there is no run {run.run_id}")
    if run.is_over:
        return _refused(command, "run_is_over", f"run {run.run_id} is over: {run.status}")
    return None


def _unknown(command: RunCommand) -> ev.CommandRefused:
    return _refused(command, "unknown_command", f"there is no command {command.type!r}")


def _refused(command: RunCommand, code: str, reason: str) -> ev.CommandRefused:
    return ev.CommandRefused(
        command_id=command.command_id,
        type=command.type,
        source=command.source,
        code=code,
        reason=reason,
        original=command.original,
    )


def _run_refused(command: RunCommand, code: str, reason: str) -> ev.RunRefused:
    return ev.RunRefused(
        command_id=command.command_id,
        content_hash=command.content_hash,
        source=command.source,
        code=code,
        reason=reason,
        original=b"" if command.type == "refuse" else command.original,
    )
