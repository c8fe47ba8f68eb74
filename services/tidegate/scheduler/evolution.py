"""What becomes of the changes that steps propose: from a result, an answer or a time to events. Pure.

A change is decided on in the entry that holds the result which proposes it, before the step's success, so that what follows
from the success sees the changed graph. Where a person decides, the attempt ends at once (it is paid and its slot is free) and
the step's success waits for the answer.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from tidegate.domain import canonical, evolution, progress
from tidegate.domain import run_events as ev
from tidegate.domain.evolution import Problem, Verdict
from tidegate.domain.graph_changes import GRAPH, REQUIRED, AcceptedChange, OpenProposal
from tidegate.domain.messages import StepResult
from tidegate.domain.run import RunState, StepState, take_change
from tidegate.scheduler import attempts

PROPOSED: Final = "proposed"  # how an attempt ends that did what it should, and whose step has not succeeded by that
CHANGE: Final = "change"  # why a person is asked
REJECTED: Final = "change_rejected"  # why a step failed
EXPIRED: Final = "approval_expired"

Events = list[Any]


def proposed(run: RunState, step: StepState, result: StepResult, now_ms: int) -> Events:
    """Return what a good result causes that proposes a change."""
    workflow = run.workflow
    assert workflow is not None  # noqa: S101 - a run that has steps has a workflow
    verdict = evolution.judge(workflow, run.changes, step.node_id, result.change)
    if verdict.problem is not None:
        return [_proposal(step, result, verdict), *_rejected(run, step, result, verdict.problem)]
    if workflow.document.evolution.approval:
        return [_proposal(step, result, verdict, held=True), *_asked(run, step, result, verdict, now_ms)]
    accepted, after = _accepted(run, step, verdict)
    succeeded = attempts.succeeded(step, result)
    return [
        _proposal(step, result, verdict),
        accepted,
        succeeded,
        *progress.after_success(after, step, result.output, result.goto),
    ]


def _proposal(step: StepState, result: StepResult, verdict: Verdict, *, held: bool = False) -> ev.GraphChangeProposed:
    return ev.GraphChangeProposed(
        step_id=step.step_id,
        node_id=step.node_id,
        attempt=result.attempt,
        kind=GRAPH,
        nodes=verdict.nodes,
        change=verdict.change,
        held=held,
        output=result.output if held else "",
        goto=result.goto if held else "",
    )


def _accepted(run: RunState, step: StepState, verdict: Verdict) -> tuple[ev.GraphChangeAccepted, RunState]:
    """Return the acceptance, and the run as it is with it."""
    after = copy.copy(run)
    take_change(after, AcceptedChange(step.step_id, verdict.change))
    assert after.workflow is not None  # noqa: S101 - it was there before
    accepted = ev.GraphChangeAccepted(
        step_id=step.step_id, kind=GRAPH, nodes=verdict.nodes, graph_hash=after.workflow.graph_hash
    )
    return accepted, after


def _rejection(step: StepState, problem: Problem) -> ev.GraphChangeRejected:
    return ev.GraphChangeRejected(
        step_id=step.step_id,
        kind=GRAPH,
        code=problem.code,
        reason=problem.reason[: progress.MAX_REASON],
        conflicts_with=problem.conflicts_with,
    )


def _must_be_accepted(run: RunState) -> bool:
    return run.workflow is not None and run.workflow.document.evolution.mode == REQUIRED


def _rejected(run: RunState, step: StepState, result: StepResult, problem: Problem) -> Events:
    """Return what a rejection causes whose step has just ended: its output counts, unless the change was required."""
    rejection = _rejection(step, problem)
    if not _must_be_accepted(run):
        succeeded = attempts.succeeded(step, result)
        return [rejection, succeeded, *progress.after_success(run, step, result.output, result.goto)]
    ended = attempts.ended(step, result.attempt, PROPOSED, "ChangeRejected", rejection.reason, result)
    return [rejection, ended, *progress.failed(run, step, REJECTED, rejection.reason)]


# --- where a person decides ---------------------------------------------------------------


def _asked(run: RunState, step: StepState, result: StepResult, verdict: Verdict, now_ms: int) -> Events:
    expires_s = run.workflow.document.evolution.expires_s  # type: ignore[union-attr] # `proposed` has looked
    nodes = ", ".join(verdict.nodes) or "no node"
    because = canonical.loads(verdict.change)["because"]
    return [
        attempts.ended(step, result.attempt, PROPOSED, "", "", result),
        ev.ApprovalRequested(
            step_id=step.step_id,
            attempt=result.attempt,
            why=CHANGE,
            rule="",
            policy="",
            reason=f"{step.step_id} wants to add {nodes}" + (f": {because}" if because else ""),
            arguments_hash=canonical.digest(verdict.change),
            expires_at_ms=0 if expires_s is None else now_ms + int(expires_s * 1000),
        ),
    ]


def approved(run: RunState, step: StepState) -> Events:
    """Return what follows from a person's yes: the change is judged again, against the graph as it is now."""
    held = _held(step)
    workflow = run.workflow
    assert workflow is not None  # noqa: S101 - a run that has steps has a workflow
    verdict = evolution.judge(workflow, run.changes, step.node_id, held.change)
    if verdict.problem is not None:
        return declined(run, step, verdict.problem)
    accepted, after = _accepted(run, step, verdict._replace(change=held.change))
    return [accepted, *_given(after, step, held)]


def declined(run: RunState, step: StepState, problem: Problem, code: str = REJECTED) -> Events:
    """Return what follows if a held change is not made: from a person's no, from time, or because it fits no more."""
    rejection = _rejection(step, problem)
    if _must_be_accepted(run):
        return [rejection, *progress.failed(run, step, code, rejection.reason)]
    return [rejection, *_given(run, step, _held(step))]


def expired(run: RunState, step: StepState) -> Events:
    """Return what follows if nobody has decided in time."""
    asked = step.approval
    assert asked is not None  # noqa: S101 - the caller has looked
    reason = "nobody decided on the change in time"
    lapsed = ev.ApprovalExpired(step_id=step.step_id, attempt=asked.attempt, rule="", policy="", reason=reason)
    return [lapsed, *declined(run, step, Problem("expired", reason), EXPIRED)]


def _given(run: RunState, step: StepState, held: OpenProposal) -> Events:
    succeeded = attempts.output_given(step, held.output, goto=held.goto)
    return [succeeded, *progress.after_success(run, step, held.output, held.goto)]


def _held(step: StepState) -> OpenProposal:
    assert step.proposal is not None  # noqa: S101 - it is asked about
    return step.proposal
