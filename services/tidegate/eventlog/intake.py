"""What a message must be like before anybody decides on it, whoever wrote it. Pure.

An Avro schema says types, not values. Values beyond these bounds would do harm later, where it can no longer be undone: in an
entry that cannot be written, or in one whose tells cannot be sent, which stops every owner of that partition for good. Our
own services keep to the bounds; a message that does not is a dead letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, Final

from tidegate import codec
from tidegate.domain.entry import MAX_OFFSET, MAX_SOURCE_PARTITIONS, MAX_TELLS_PER_ENTRY, Position
from tidegate.domain.identity import MAX_MICROS, NAME_PATTERN, NOWHERE, is_account, is_run_id, source_of
from tidegate.domain.messages import (
    Allowed,
    Amounts,
    Answered,
    ApprovalRequired,
    Approve,
    Authorise,
    BudgetPaused,
    Call,
    CloseRun,
    Denied,
    GateDecision,
    GateLeases,
    GateRequest,
    LeaseAsk,
    LeaseGrant,
    LeaseRefusal,
    LeaseReturn,
    LeaseWait,
    Lost,
    OpenRun,
    Release,
    RunCommand,
    Settle,
    StepResult,
    StepTask,
    Throttled,
    Unanswered,
    Void,
)
from tidegate.eventlog.letters import MAX_ORIGINAL_BYTES, MAX_REASON_CHARACTERS

MAX_NAME: Final = 512  # of anything that names something: steps, rules, instances, people, commands
MAX_TAGS: Final = 100
MAX_LABEL: Final = 128
MAX_PREFER: Final = 2 * MAX_LABEL  # the run's instance, a comma, and the function's
MAX_PRIORITY: Final = 9
MAX_LEASES: Final = 16  # of one attempt
MAX_REDACTED: Final = 1_000
MAX_ARGUMENTS: Final = 8 * 1024 * 1024
MAX_TIMEOUT_MS: Final = 7 * 24 * 3_600_000
KINDS: Final = frozenset(("step", "agent", "tool", "flow"))

_is_name = re.compile(NAME_PATTERN).fullmatch

_WANTED: Final[dict[str, type]] = {
    "run-commands": RunCommand,
    "gate-requests": GateRequest,
    "gate-leases": GateLeases,
    "gate-decisions": GateDecision,
    "step-results": StepResult,
    "step-tasks": StepTask,
}


@cache
def _wanted_in(topic: str) -> type | None:
    return _WANTED.get(topic.partition(".")[0])


def check(topic: str, record: Any) -> None:
    """Raise DecodeError if the record has no business in that topic, or values that nobody of ours writes."""
    wanted = _wanted_in(topic)
    if wanted is None:
        return
    if type(record) is not wanted:
        raise codec.DecodeError(f"a {type(record).__name__} has no business in {topic}")
    problem = _PROBLEMS[wanted](record)
    if problem:
        raise codec.DecodeError(f"not a good {wanted.__name__}: {problem}")


def _run_command(command: RunCommand) -> str:
    if not is_run_id(command.run_id):
        return "run_id"
    if source_of(command.source) is NOWHERE:
        return "source"
    if command.account and not is_account(command.account):
        return "account"
    names = (command.command_id, command.type, command.content_hash, command.workflow, command.definition_hash)
    more = (command.step_id, command.by, command.code, command.why, command.event, command.key or "", command.prefer)
    if max(map(len, (*names, *more))) > MAX_NAME:
        return "a name of more than 512 characters"
    if len(command.value) > MAX_ARGUMENTS or command.attempt < 0:
        return "value or attempt"
    if not 0 <= command.priority <= MAX_PRIORITY:
        return "priority"
    if len(command.original) > MAX_ORIGINAL_BYTES or len(command.reason) > MAX_REASON_CHARACTERS:
        return "original or reason is too long"
    return _budget(command.budget_micros) or _tags(command.tags)


def _gate_request(request: GateRequest) -> str:
    if not is_run_id(request.run_id):
        return "run_id"
    if not is_account(request.account):
        return "account"
    return _position(request.source) or next((p for item in request.items if (p := _ITEMS[type(item)](item))), "")


def _gate_decision(decision: GateDecision) -> str:
    if not is_run_id(decision.run_id):
        return "run_id"
    return _position(decision.source) or next((p for item in decision.items if (p := _ITEMS[type(item)](item))), "")


def _gate_leases(message: GateLeases) -> str:
    return _position(message.source) or next((p for item in message.items if (p := _ITEMS[type(item)](item))), "")


def _step_result(result: StepResult) -> str:
    if not is_run_id(result.run_id):
        return "run_id"
    if max(len(result.step_id), len(result.instance_id), len(result.outcome)) > MAX_NAME:
        return "a name of more than 512 characters"
    return ""


def _step_task(task: StepTask) -> str:
    if not is_run_id(task.run_id):
        return "run_id"
    if max(map(len, (task.instance_id, task.idempotency_key, task.account))) > MAX_NAME:
        return "a name of more than 512 characters"
    if not 0 <= task.result_partition < MAX_SOURCE_PARTITIONS:
        return "result_partition"
    return _position(task.source) or _attempt(task) or ("" if task.call is None else _call(task.call))


# --- parts ---------------------------------------------------------------


def _position(position: Position) -> str:
    """Return what is wrong with a position. One from the future cannot be told here: see docs/reliability/hostile-input.md."""
    is_possible = (
        0 <= position.partition < MAX_SOURCE_PARTITIONS
        and 0 <= position.offset <= MAX_OFFSET
        and 0 <= position.index < MAX_TELLS_PER_ENTRY
    )
    return "" if is_possible else "source"


def _attempt(item: Any) -> str:
    if not 0 < len(item.step_id) <= MAX_NAME:
        return "step_id"
    return "" if 0 < item.attempt <= MAX_OFFSET else "attempt"


def _money(micros: int) -> str:
    return "" if 0 <= micros <= MAX_MICROS else "an amount of money"


def _budget(micros: int | None) -> str:
    return "" if micros is None else _money(micros)


def _tags(tags: dict[str, str]) -> str:
    return "too many tags" if len(tags) > MAX_TAGS else ""


def _call(call: Call) -> str:
    if call.kind not in KINDS or not _is_name(call.function) or not (call.is_outside or _is_name(call.queue)):
        return "kind, function or queue of the call"
    if max(map(len, (call.provider, call.model, call.operation))) > MAX_LABEL:
        return "provider, model or operation of the call"
    if len(call.prefer) > MAX_PREFER:
        return "prefer of the call"
    if not 0 < call.timeout_ms <= MAX_TIMEOUT_MS:
        return "timeout_ms"
    if len(call.agent) > MAX_NAME:
        return "agent of the call"
    if not (0 <= call.max_input_tokens <= MAX_MICROS and 0 <= call.max_output_tokens <= MAX_MICROS):
        return "a number of tokens"
    return "arguments" if len(call.arguments) > MAX_ARGUMENTS else _money(call.reserve_micros)


def _used(used: Amounts) -> str:
    counts = (used.micros, used.input_tokens, used.output_tokens, used.calls, used.wall_ms)
    return "" if min(counts) >= 0 and max(counts) <= MAX_MICROS else "an amount of what was used"


def _open(item: OpenRun) -> str:
    if len(item.workflow) > MAX_NAME or len(item.request_id) > MAX_NAME:
        return "workflow or request_id"
    if item.parent_run_id and not is_run_id(item.parent_run_id):
        return "parent_run_id"
    if not 0 <= item.priority <= MAX_PRIORITY:
        return "priority"
    return _budget(item.budget_micros) or _tags(item.tags)


def _authorise(item: Authorise) -> str:
    return _attempt(item) or _call(item.call)


def _approve(item: Approve) -> str:
    return _attempt(item) or ("by" if max(len(item.by), len(item.arguments_hash)) > MAX_NAME else "")


def _settle(item: Settle) -> str:
    if len(item.outcome) > MAX_NAME:
        return "outcome"
    return _attempt(item) or _money(item.actual_micros) or _used(item.used)


def _release(item: Release) -> str:
    return _attempt(item) or ("reason" if len(item.reason) > MAX_REASON_CHARACTERS else "")


def _allowed(item: Allowed) -> str:
    if max(len(item.rule), len(item.policy), len(item.instance_id)) > MAX_NAME:
        return "a name of more than 512 characters"
    if len(item.redact) > MAX_REDACTED or any(len(path) > MAX_NAME for path in item.redact):
        return "redact"
    if len(item.isolation) > MAX_NAME:
        return "isolation"
    return _attempt(item) or _money(item.reserved_micros)


def _answer(item: Denied | ApprovalRequired | BudgetPaused | Unanswered) -> str:
    if isinstance(item, ApprovalRequired) and not 0 <= item.expires_at_ms <= MAX_OFFSET:
        return "expires_at_ms"
    if isinstance(item, BudgetPaused) and not 0 <= item.until_ms <= MAX_OFFSET:
        return "until_ms"
    if isinstance(item, Denied | ApprovalRequired) and len(item.values) > MAX_REASON_CHARACTERS:
        return "values"
    if max(len(item.rule), len(item.policy)) > MAX_NAME or len(item.reason) > MAX_REASON_CHARACTERS:
        return "rule, policy or reason is too long"
    return _attempt(item) or _moment(getattr(item, "retry_after_ms", 0))


def _answered(item: Answered) -> str:
    if len(item.by) > MAX_NAME or len(item.reason) > MAX_REASON_CHARACTERS:
        return "by or reason is too long"
    return _attempt(item)


def _lost(item: Lost) -> str:
    if len(item.instance_id) > MAX_NAME or len(item.reason) > MAX_REASON_CHARACTERS:
        return "instance_id or reason is too long"
    return _attempt(item)


def _throttled(item: Throttled | LeaseWait) -> str:
    if max(len(item.cause), len(item.limit), len(item.key)) > MAX_NAME or len(item.reason) > MAX_REASON_CHARACTERS:
        return "cause, limit, key or reason is too long"
    return _attempt(item) or _moment(item.retry_at_ms)


def _moment(at_ms: int) -> str:
    return "" if 0 <= at_ms <= MAX_OFFSET else "a time"


def _lease_ask(item: LeaseAsk) -> str:
    if not is_run_id(item.run_id) or not is_account(item.account):
        return "run_id or account"
    if not 0 <= item.priority <= MAX_PRIORITY or not 0 < len(item.leases) <= MAX_LEASES:
        return "priority or number of leases"
    if any(max(len(lease.limit), len(lease.key)) > MAX_NAME for lease in item.leases):
        return "a lease's name is too long"
    return _attempt(item)


def _lease_answer(item: LeaseGrant | LeaseReturn) -> str:
    if not is_run_id(item.run_id) or len(getattr(item, "outcome", "")) > MAX_NAME:
        return "run_id or outcome"
    return _attempt(item)


def _lease_refusal(item: LeaseRefusal) -> str:
    if max(len(item.limit), len(item.key)) > MAX_NAME or len(item.reason) > MAX_REASON_CHARACTERS:
        return "limit, key or reason is too long"
    return _attempt(item) or _moment(item.retry_after_ms)


def _nothing(_: CloseRun) -> str:
    return ""


_ITEMS: Final[dict[type, Callable[[Any], str]]] = {
    OpenRun: _open,
    Authorise: _authorise,
    Approve: _approve,
    Settle: _settle,
    Release: _release,
    Void: _attempt,
    CloseRun: _nothing,
    Allowed: _allowed,
    Denied: _answer,
    ApprovalRequired: _answer,
    BudgetPaused: _answer,
    Unanswered: _answer,
    Answered: _answered,
    Lost: _lost,
    Throttled: _throttled,
    LeaseAsk: _lease_ask,
    LeaseGrant: _lease_answer,
    LeaseWait: _throttled,
    LeaseRefusal: _lease_refusal,
    LeaseReturn: _lease_answer,
}
_PROBLEMS: Final[dict[type, Callable[[Any], str]]] = {
    RunCommand: _run_command,
    GateRequest: _gate_request,
    GateLeases: _gate_leases,
    GateDecision: _gate_decision,
    StepResult: _step_result,
    StepTask: _step_task,
}
