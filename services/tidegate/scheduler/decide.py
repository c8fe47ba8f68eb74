"""What a run does next when the gate, an executor or the clock says something: pure functions to events.

Commands are in `commands.py`, the ends of waits in `waits.py`; `holding.py` has the last word on every decision.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, Final

import msgspec

from tidegate.domain import canonical, flow_turns, progress, retries, states, turns
from tidegate.domain import run_events as ev
from tidegate.domain.identity import MAX_MICROS, MAX_NAME_CHARACTERS
from tidegate.domain.messages import (
    Allowed,
    Answered,
    ApprovalRequired,
    BudgetPaused,
    Denied,
    GateDecision,
    Lost,
    StepResult,
    Throttled,
    Unanswered,
)
from tidegate.domain.node_state import NodeState
from tidegate.domain.questions import is_answered_by_room
from tidegate.domain.retries import OUTCOME_UNKNOWN
from tidegate.domain.retry_documents import NO_DOCUMENTS, Attempted, RetryDocuments
from tidegate.domain.run import RunState, StepState, apply
from tidegate.prices import MAX_TOKENS, price
from tidegate.scheduler import attempts, evolution, waits

MAX_LOSSES: Final = 10  # of what may be repeated without asking
BUSY_RETRY_MS: Final = 25
MAX_PLAN_CALLS: Final = 100
MAX_ERROR_CHARACTERS: Final = 4_000
MAX_USAGE_NAMES: Final = 100
MAX_USAGE_NAME: Final = 100
MAX_CODE_VERSION: Final = 128
MAX_MS: Final = 4_102_444_800_000  # the year 2100: what databases can show
MAX_OUTPUT_BYTES: Final = 9 * 1024 * 1024  # more than executors of ours send, and an entry can still hold it

Events = list[Any]


# --- the gate's decisions ---------------------------------------------------------------


def on_decision(run: RunState, message: GateDecision) -> Events:
    """Return what a message of the gate causes. Items that no longer apply cause nothing."""
    if len(message.items) == 1:
        return _on_item(run, message.items[0])
    # Later items must see what earlier ones did; they are tried on a copy, because deciding changes nothing.
    scratch = _scratch(run)
    events: Events = []
    for item in message.items:
        more = _on_item(scratch, item)
        for event in more:
            apply(scratch, event, 0)
        events += more
    return events


def _on_item(run: RunState, item: Any) -> Events:
    step = run.steps.get(item.step_id)
    if run.is_over or step is None or step.attempt != item.attempt:
        return []
    if isinstance(item, Lost):
        return _on_lost(run, step, item)
    if isinstance(item, Unanswered):
        return _on_unanswered(run, step, item)
    if isinstance(item, Answered):
        return _on_answered(step, item)
    if step.status != states.REQUESTED:
        return []
    if isinstance(item, Allowed):
        return _on_allowed(run, step, item)
    if isinstance(item, BudgetPaused):
        return [
            ev.AttemptAwaitsBudget(
                step_id=step.step_id,
                attempt=item.attempt,
                rule=item.rule,
                policy=item.policy,
                reason=item.reason,
                until_ms=item.until_ms,
            )
        ]
    if isinstance(item, Denied):
        return _on_denied(run, step, item)
    if isinstance(item, Throttled):
        return [
            ev.StepThrottled(
                step_id=step.step_id,
                attempt=item.attempt,
                cause=item.cause,
                limit=item.limit,
                key=item.key,
                reason=item.reason,
                position=item.position,
                retry_at_ms=item.retry_at_ms,
            )
        ]
    assert isinstance(item, ApprovalRequired)  # noqa: S101 - the union has no other member
    return [
        ev.ApprovalRequested(
            step_id=step.step_id,
            attempt=item.attempt,
            why="policy",
            rule=item.rule,
            policy=item.policy,
            reason=item.reason,
            arguments_hash=item.arguments_hash,
            expires_at_ms=item.expires_at_ms,
            values=item.values,
        )
    ]


def _on_allowed(run: RunState, step: StepState, item: Allowed) -> Events:
    dispatched = ev.AttemptDispatched(
        step_id=step.step_id,
        attempt=item.attempt,
        reserved_micros=item.reserved_micros,
        rule=item.rule,
        policy=item.policy,
        instance_id=item.instance_id,
        incarnation=item.incarnation,
        redact=item.redact,
        isolation=item.isolation,
    )
    return [dispatched, turns.outside_wait(run, step)] if step.call.is_outside else [dispatched]


def _on_unanswered(run: RunState, step: StepState, item: Unanswered) -> Events:
    """The gate's question lapsed. An answer that crossed this on its way came too late: the gate holds nothing any more.

    The gate's time alone counts: with one here besides, the two logs could say different things of one question.
    """
    ended: Any
    if step.status == states.AWAITING_APPROVAL and step.approval is not None and step.approval.why == "policy":
        ended = ev.ApprovalExpired(
            step_id=step.step_id, attempt=item.attempt, rule=item.rule, policy=item.policy, reason=item.reason
        )
    elif step.status == states.REQUESTED:
        ended = attempts.ended(step, item.attempt, "expired", "ApprovalExpired", item.reason)
    else:
        return []
    return [ended, *progress.failed(run, step, "approval_expired", item.reason)]


def _on_answered(step: StepState, item: Answered) -> Events:
    """The gate's question needs no answer any more. If there was one that crossed this on its way, that one stands."""
    asked = step.approval
    if step.status != states.AWAITING_APPROVAL or asked is None or asked.why != "policy":
        return []
    return [
        attempts.resolved(step, asked, approved=True, by=item.by, reason=item.reason),
    ]


def _on_denied(run: RunState, step: StepState, item: Denied) -> Events:
    """A denied attempt ends its step. A queue that was full has a code of its own: asking again later may well help."""
    code = "queue_full" if item.rule == "queue_full" else "denied"
    later = f"; try again in {item.retry_after_ms} ms" if item.retry_after_ms else ""
    reason = f"{item.reason}{later}"
    ended = attempts.ended(step, item.attempt, "denied", "QueueFull" if code == "queue_full" else "Denied", reason)
    ended = msgspec.structs.replace(ended, rule=item.rule, policy=item.policy, values=item.values)
    return [ended, *progress.failed(run, step, code, f"denied by {item.rule}: {reason}")]


def _on_lost(run: RunState, step: StepState, item: Lost) -> Events:
    """The executor that held the attempt is gone: repeat it, unless repeating is dangerous or has gone on for too long."""
    if step.status not in (states.REQUESTED, states.DISPATCHED):
        return []
    ended = ev.AttemptEnded(
        step_id=step.step_id,
        attempt=item.attempt,
        outcome="lost",
        error_class="Lost",
        error_message=item.reason,
        actual_micros=0,
        usage={},
        retry_at_ms=None,
        instance_id=item.instance_id,
        incarnation=item.incarnation,
    )
    if not step.call.idempotent:
        return [ended, _what_became_of(step, ended)]
    if step.losses + 1 >= MAX_LOSSES:
        return [ended, *progress.failed(run, step, "attempts_exhausted", f"its executor went away {MAX_LOSSES} times")]
    return [ended, attempts.next_attempt(step)]


def _what_became_of(step: StepState, ended: ev.AttemptEnded) -> ev.ApprovalRequested:
    """Return the question to a human about an attempt that nobody knows the outcome of and that must not be repeated silently."""
    how = f"{ended.error_class}: {ended.error_message}" if ended.error_message else ended.error_class
    return ev.ApprovalRequested(
        step_id=step.step_id,
        attempt=ended.attempt,
        why="outcome_unknown",
        rule="",
        policy="",
        reason=f"{step.call.function} is not idempotent and may already have had its effect: run it again? ({how})",
        arguments_hash=canonical.digest(step.call.arguments),
    )


# --- results ---------------------------------------------------------------


def on_result(run: RunState, result: StepResult, now_ms: int, documents: RetryDocuments = NO_DOCUMENTS) -> Events:
    """Return what an executor's result causes. A doubled one causes nothing, a late one only that its cost is settled."""
    step = run.steps.get(result.step_id)
    if step is None or result.attempt in step.reported or result.attempt > step.attempt or result.attempt < 1:
        return []
    if result.attempt == step.attempt and _is_foreign(step, result):
        return []
    result = _priced(step, _bounded(result), now_ms)
    if run.is_over or result.attempt != step.attempt:
        return [_ignored(run, step, result)]
    overtaken = _overtaken(step)
    if not (overtaken or _still_counts(step, result)):
        return [_ignored(run, step, result)]
    if result.outcome == "succeeded":
        return [*overtaken, *_on_success(run, step, result, now_ms)]
    return [*overtaken, *_on_failure(run, step, result, now_ms, documents)]


def _bounded(result: StepResult) -> StepResult:
    """Cut what an executor says to what entries and sums can hold. Ours keep to it; this trusts nobody."""
    if (
        not result.usage
        and not result.error_message
        and not result.error_class
        and 0 <= result.actual_micros <= MAX_MICROS
        and len(result.code_version) <= MAX_CODE_VERSION
        and 0 <= result.started_ms < MAX_MS
        and 0 <= result.finished_ms < MAX_MS
    ):
        return result  # as nearly all are
    names = [name for name in result.usage if len(name) <= MAX_USAGE_NAME][:MAX_USAGE_NAMES]
    return msgspec.structs.replace(
        result,
        error_class=result.error_class[:MAX_ERROR_CHARACTERS],
        error_message=result.error_message[:MAX_ERROR_CHARACTERS],
        actual_micros=min(max(result.actual_micros, 0), MAX_MICROS),
        usage={name: min(max(result.usage[name], 0), MAX_MICROS) for name in names},
        started_ms=result.started_ms if 0 <= result.started_ms < MAX_MS else 0,
        finished_ms=result.finished_ms if 0 <= result.finished_ms < MAX_MS else 0,
        code_version=result.code_version[:MAX_CODE_VERSION],
    )


def _priced(step: StepState, result: StepResult, now_ms: int) -> StepResult:
    """Add what an attempt cost that reports tokens of a known model, and no amount: both logs are to say the same."""
    if result.actual_micros or not result.usage or not step.call.model:
        return result
    tokens_in, tokens_out = (min(result.usage.get(kind, 0), MAX_TOKENS) for kind in ("input_tokens", "output_tokens"))
    if not (tokens_in or tokens_out):
        return result
    found = price(step.call.provider, step.call.model, tokens_in, tokens_out, now_ms)
    return result if found is None else msgspec.structs.replace(result, actual_micros=found.micros)


def on_error(run: RunState, record: GateDecision | StepResult, error: Exception) -> Events:
    """Return how a run ends because deciding on this input failed: its log says so, and nobody waits for it in vain.

    Nothing if the input concerns no open step: then there is nothing that could wait.
    """
    reason = error_reason(type(record).__name__, error)
    names = [(record.step_id, record.attempt)] if isinstance(record, StepResult) else []
    if isinstance(record, GateDecision):
        names = [(item.step_id, item.attempt) for item in record.items]
    for step_id, attempt in names:
        step = run.steps.get(step_id)
        if not run.is_over and step is not None and step.attempt == attempt and step.status not in states.STEP_TERMINAL:
            result = _bounded(record) if isinstance(record, StepResult) else None
            return [
                attempts.ended(step, attempt, "failed", "InternalError", reason, result),
                ev.StepFailed(step_id=step_id, code="internal_error", reason=reason),
                *progress.broken(run, step, f"step {step_id}: {reason}"),
            ]
    return []


def error_reason(what: str, error: Exception) -> str:
    """Return what a run is told of a defect of ours. what: the kind of input that was decided on."""
    return f"deciding on a {what} failed: {type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]


def _is_foreign(step: StepState, result: StepResult) -> bool:
    """Tell whether this attempt cannot have run there: it was placed elsewhere, no executor does it, or the gate still holds it.

    Such a result is nobody's; if it were noted as the attempt's, the true one would later pass for a doubled one.
    """
    asked = step.approval if step.status == states.AWAITING_APPROVAL else None
    is_held = asked is not None and asked.why == "policy" and not is_answered_by_room(asked)
    if is_held or step.call.is_outside:
        return True
    return step.instance_id not in ("", result.instance_id) or step.incarnation not in (-1, result.incarnation)


def _overtaken(step: StepState) -> Events:
    """Return that the gate has answered its question about room: the result that is here says so before the gate's message."""
    asked = step.approval
    if step.status != states.AWAITING_APPROVAL or asked is None or not is_answered_by_room(asked):
        return []
    return [attempts.resolved(step, asked, approved=True, by=asked.rule, reason="there was room: the attempt has run")]


def _still_counts(step: StepState, result: StepResult) -> bool:
    """A result beats `lost` as long as no successor was asked for; only a success is then worth taking."""
    if step.status in (states.REQUESTED, states.DISPATCHED):
        return True
    unknown = step.status == states.AWAITING_APPROVAL and step.approval is not None
    return unknown and step.approval.why == "outcome_unknown" and result.outcome == "succeeded"  # type: ignore[union-attr] # `unknown` says it


def _ignored(run: RunState, step: StepState, result: StepResult) -> ev.ResultIgnored:
    why = f"the run is {run.status}" if run.is_over else f"attempt {step.attempt} of the step is {step.status}"
    return ev.ResultIgnored(
        step_id=step.step_id,
        attempt=result.attempt,
        outcome=result.outcome,
        actual_micros=result.actual_micros,
        reason=why,
        instance_id=result.instance_id,
        incarnation=result.incarnation,
        usage=result.usage,
        started_ms=result.started_ms,
        finished_ms=result.finished_ms,
    )


def _on_success(run: RunState, step: StepState, result: StepResult, now_ms: int) -> Events:
    problem = _too_long("goto", result.goto) or output_problem(step, result.output)
    if problem is not None:
        ended = attempts.ended(step, result.attempt, "failed", "BadOutput", problem, result)
        return [ended, *progress.failed(run, step, "bad_output", problem)]
    if result.change:
        return evolution.proposed(run, step, result, now_ms)
    return [attempts.succeeded(step, result), *progress.after_success(run, step, result.output, result.goto)]


def output_problem(step: StepState, output: str) -> str | None:
    """Return what is wrong with an output that an executor sent. Its own checks come first; this one trusts nobody."""
    if len(output) * 4 > MAX_OUTPUT_BYTES and len(output.encode()) > MAX_OUTPUT_BYTES:
        return f"output has more than {MAX_OUTPUT_BYTES} bytes"
    try:
        value = canonical.loads(output)
    except canonical.NotJsonError as error:
        return f"output is not JSON: {error}"
    if step.call.kind == "flow":
        return flow_turns.problem(step.call.arguments, value)
    if step.call.kind != "agent":
        return None
    calls = value.get("tool_calls", []) if isinstance(value, dict) else None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return "an agent's output must be a plan: an object whose tool_calls is a list of objects"
    if len(calls) > MAX_PLAN_CALLS:
        return f"a plan may call at most {MAX_PLAN_CALLS} tools at once, this one calls {len(calls)}"
    return _too_long("goto", str(value.get("goto") or ""))


def _too_long(what: str, name: str) -> str | None:
    if len(name) <= MAX_NAME_CHARACTERS:
        return None
    return f"{what} may have at most {MAX_NAME_CHARACTERS} characters, this has {len(name)}"


def _on_failure(run: RunState, step: StepState, result: StepResult, now_ms: int, documents: RetryDocuments) -> Events:
    if result.outcome == "busy":
        again_ms = now_ms + BUSY_RETRY_MS + int(BUSY_RETRY_MS * _jitter(run.run_id, step))
        return [attempts.ended(step, result.attempt, "busy", "Busy", "the executor had no free slot", result, again_ms)]
    if result.outcome == "released":
        return [
            attempts.ended(step, result.attempt, "released", "Released", result.error_message, result),
            attempts.next_attempt(step),
        ]
    outcome = "timed_out" if result.outcome == "timed_out" else "failed"
    if result.outcome in OUTCOME_UNKNOWN and not step.call.idempotent:
        ended = attempts.ended(step, result.attempt, outcome, result.error_class, result.error_message, result)
        return [ended, _what_became_of(step, ended)]
    function = run.workflow.function(step.call.function)  # type: ignore[union-attr] # a run with steps has its workflow
    workflow = run.workflow_label.partition("@")[0]
    settings, document = documents.choose(function, Attempted(step.call.function, run.account, workflow, run.tags))
    failure = retries.Failure(result.error_class, result.retryable, result.retry_after_ms)
    verdict = retries.judge(settings, failure, dict(step.rule_failures), step.failures, _jitter(run.run_id, step))
    due_ms = None if verdict.wait_ms is None else now_ms + verdict.wait_ms
    ended = attempts.ended(step, result.attempt, outcome, result.error_class, result.error_message, result, due_ms)
    if verdict.rule or document:
        ended = msgspec.structs.replace(ended, retry_rule=verdict.rule, retry_document=document)
    if due_ms is not None:
        return [ended]
    reason = f"{result.error_class}: {result.error_message}"
    if verdict.code == retries.EXHAUSTED:
        under = f" under the retry rule {verdict.rule}" if verdict.rule else ""
        under += f" of {document}" if document else ""
        reason = f"{verdict.failures} of {verdict.max_attempts} attempts failed{under}, the last with {reason}"
    return [ended, *progress.failed(run, step, verdict.code, reason)]


# --- timers ---------------------------------------------------------------


def on_timer(run: RunState, step_id: str, attempt: int, now_ms: int) -> Events:
    """Return what time does to this step after `attempt`: a back-off, a wait or a question is over."""
    step = run.steps.get(step_id)
    if step is None or run.is_over or step.attempt != attempt:
        return []
    due_ms = waits.due_ms(run, step)
    if due_ms is None or due_ms > now_ms:
        return []
    if step.status == states.WAITING:
        return waits.on_due(run, step, now_ms)
    if step.status == states.AWAITING_APPROVAL:
        return evolution.expired(run, step)
    return [attempts.next_attempt(step)]


# --- parts ---------------------------------------------------------------


def _jitter(run_id: str, step: StepState) -> float:
    """Return a number in 0..1 that depends on nothing but the attempt, so that a replay backs off alike."""
    digest = hashlib.sha256(f"{run_id}\n{step.step_id}\n{step.attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def _scratch(run: RunState) -> RunState:
    other = copy.copy(run)
    other.steps = {step_id: copy.copy(step) for step_id, step in run.steps.items()}
    other.nodes = {node_id: _copy_of(node) for node_id, node in run.nodes.items()}
    other.failures = dict(run.failures)
    other.command_ids = set(run.command_ids)
    return other


def _copy_of(node: NodeState) -> NodeState:
    other = copy.copy(node)
    if node.map is not None:  # changes in place, as nothing else that a node or a step holds
        other.map = copy.copy(node.map)
        other.map.results = dict(node.map.results)
    return other
