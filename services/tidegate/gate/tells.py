"""What follows from a ledger entry: tasks to executors, decisions to runs. Pure; sending again is the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, get_args

from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Entry, Part, Position
from tidegate.domain.identity import entry_key, idempotency_key, partition_of
from tidegate.domain.messages import (
    Allowed,
    Answered,
    ApprovalRequired,
    BudgetPaused,
    DecisionItem,
    Denied,
    GateDecision,
    GateLeases,
    LeaseAsk,
    LeaseGrant,
    LeaseItem,
    LeaseRefusal,
    LeaseReturn,
    LeaseWait,
    Lost,
    StepTask,
    Throttled,
    Unanswered,
)
from tidegate.eventlog.machine import Tell, tells_of_parts

GATE_DECISIONS: Final = "gate-decisions"
GATE_LEASES: Final = "gate-leases"
STEP_TASKS: Final = "step-tasks"
_PLACED: Final = get_args(ev.Placing)
_TASKS: Final = (*_PLACED, ev.AttemptCancelTold)


def tells(entry: Entry, at: Callable[[int], Position], run_partitions: int) -> list[Tell]:
    """Return the messages that an entry of `gate-ledger` causes: tasks first, because work should not wait for news of it."""
    return tells_of_parts(entry, at, lambda part, at: _tells(part, at, run_partitions))


def _tells(part: Part, at: Callable[[int], Position], run_partitions: int) -> list[Tell]:
    found: list[Tell] = []
    decisions: dict[str, list[DecisionItem]] = {}
    leases: dict[int, list[LeaseItem]] = {}
    for event in part.events:
        kind = type(event)
        if kind not in _TELLING:
            continue
        if kind in _TASKS and not (kind in _PLACED and event.call.is_outside):
            found.append(_task(event, at(len(found)), run_partitions))
        make = _DECISIONS.get(kind)
        if make is not None:
            decisions.setdefault(event.run_id, []).append(make(event))
        make_lease = _LEASES.get(kind)
        if make_lease is not None and (lease := make_lease(event)) is not None:
            leases.setdefault(event.partition, []).append(lease)
    for run_id, items in decisions.items():
        message = GateDecision(run_id=run_id, source=at(len(found)), items=tuple(items))
        key = f"{run_id}:{entry_key(part.subject, part.first_seq, part.epoch)}"
        found.append(Tell(GATE_DECISIONS, partition_of(run_id, run_partitions), key, message))
    for partition, lease_items in leases.items():
        told = GateLeases(source=at(len(found)), items=tuple(lease_items))
        key = f"{partition}:{entry_key(part.subject, part.first_seq, part.epoch)}"
        found.append(Tell(GATE_LEASES, partition, key, told))
    return found


def _task(event: ev.Placing | ev.AttemptCancelTold, position: Position, run_partitions: int) -> Tell:
    allowed: ev.Placing | None = None
    if isinstance(event, ev.AttemptCancelTold):
        kind, queue = "cancel", event.queue
    else:
        kind, queue, allowed = "run", event.call.queue, event
    task = StepTask(
        type=kind,
        run_id=event.run_id,
        step_id=event.step_id,
        attempt=event.attempt,
        account=event.account,
        instance_id=event.instance_id,
        incarnation=event.incarnation,
        source=position,
        result_partition=partition_of(event.run_id, run_partitions),
        idempotency_key=idempotency_key(event.run_id, event.step_id),
        call=None if allowed is None else allowed.call,
        isolation="" if allowed is None else allowed.isolation,
        rule="" if allowed is None else allowed.rule,
        policy="" if allowed is None else allowed.policy,
        reserved_micros=0 if allowed is None else allowed.reserved_micros,
    )
    key = f"{event.run_id}:{event.step_id}:{event.attempt}:{kind}"
    return Tell(f"{STEP_TASKS}.{queue}", event.task_partition, key, task)


def _allowed(event: ev.Placing) -> DecisionItem:
    return Allowed(
        step_id=event.step_id,
        attempt=event.attempt,
        reserved_micros=event.reserved_micros,
        rule=event.rule,
        policy=event.policy,
        instance_id=event.instance_id,
        incarnation=event.incarnation,
        redact=event.redact,
        isolation=event.isolation,
    )


def _denied(event: ev.AttemptRefused) -> DecisionItem:
    return Denied(
        step_id=event.step_id,
        attempt=event.attempt,
        rule=event.rule,
        policy=event.policy,
        reason=event.reason,
        retry_after_ms=event.retry_after_ms,
        values=event.values,
    )


def _approval(event: ev.ApprovalHeld) -> DecisionItem:
    return ApprovalRequired(
        step_id=event.step_id,
        attempt=event.attempt,
        rule=event.rule,
        policy=event.policy,
        reason=event.reason,
        arguments_hash=event.arguments_hash,
        values=event.values,
        expires_at_ms=event.expires_at_ms,
    )


def _unanswered(event: ev.ApprovalLapsed) -> DecisionItem:
    return Unanswered(
        step_id=event.step_id, attempt=event.attempt, rule=event.rule, policy=event.policy, reason=event.reason
    )


def _answered(event: ev.QuestionAnswered) -> DecisionItem:
    return Answered(step_id=event.step_id, attempt=event.attempt, by=event.by, reason=event.reason)


def _budget_paused(event: ev.AttemptPaused) -> DecisionItem:
    return BudgetPaused(
        step_id=event.step_id,
        attempt=event.attempt,
        rule=event.rule,
        policy=event.policy,
        reason=event.reason,
        until_ms=event.until_ms,
    )


def _lost(event: ev.PlacementLost) -> DecisionItem:
    return Lost(
        step_id=event.step_id,
        attempt=event.attempt,
        instance_id=event.instance_id,
        incarnation=event.incarnation,
        reason=event.reason,
    )


def _throttled(event: ev.AttemptThrottled) -> DecisionItem:
    return Throttled(
        step_id=event.step_id,
        attempt=event.attempt,
        cause=event.cause,
        limit=event.limit,
        key=event.key,
        reason=event.reason,
        position=event.position,
        retry_at_ms=event.retry_at_ms,
    )


_DECISIONS: Final[dict[type, Callable[[Any], DecisionItem]]] = {
    **dict.fromkeys(_PLACED, _allowed),
    ev.AttemptRefused: _denied,
    ev.ApprovalHeld: _approval,
    ev.PlacementLost: _lost,
    ev.ApprovalLapsed: _unanswered,
    ev.QuestionAnswered: _answered,
    ev.AttemptPaused: _budget_paused,
    ev.AttemptThrottled: _throttled,
}


def _ask(event: ev.LeasesAsked) -> LeaseItem:
    return LeaseAsk(
        account=event.account,
        run_id=event.run_id,
        step_id=event.step_id,
        attempt=event.attempt,
        priority=event.priority,
        leases=event.leases,
    )


def _return(event: ev.LeasesReturned) -> LeaseItem:
    return LeaseReturn(run_id=event.run_id, step_id=event.step_id, attempt=event.attempt, outcome=event.outcome)


def _grant(event: ev.LeaseGiven) -> LeaseItem:
    return LeaseGrant(run_id=event.run_id, step_id=event.step_id, attempt=event.attempt)


def _wait(event: ev.LeaseHeard) -> LeaseItem | None:
    if not event.cause:
        return None
    return LeaseWait(
        run_id=event.run_id,
        step_id=event.step_id,
        attempt=event.attempt,
        cause=event.cause,
        limit=event.limit,
        key=event.key,
        reason=event.reason,
        position=event.position,
        retry_at_ms=event.retry_at_ms,
    )


def _refuse(event: ev.LeaseRefused) -> LeaseItem:
    return LeaseRefusal(
        run_id=event.run_id,
        step_id=event.step_id,
        attempt=event.attempt,
        limit=event.limit,
        key=event.key,
        reason=event.reason,
        retry_after_ms=event.retry_after_ms,
    )


_LEASES: Final[dict[type, Callable[[Any], LeaseItem | None]]] = {
    ev.LeasesAsked: _ask,
    ev.LeasesReturned: _return,
    ev.LeaseGiven: _grant,
    ev.LeaseHeard: _wait,
    ev.LeaseRefused: _refuse,
}

_TELLING: Final = frozenset((*_TASKS, *_DECISIONS, *_LEASES))
