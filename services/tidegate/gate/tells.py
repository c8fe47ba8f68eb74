"""What follows from a ledger entry: tasks to executors, decisions to runs. Pure; sending again is the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Entry, Position
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
from tidegate.eventlog.machine import Tell
from tidegate.gate.state import AttemptKey

GATE_DECISIONS: Final = "gate-decisions"
GATE_LEASES: Final = "gate-leases"
STEP_TASKS: Final = "step-tasks"
_TASKS: Final = (ev.AttemptPlaced, ev.AttemptCancelTold)


def tells(entry: Entry, at: Callable[[int], Position], run_partitions: int) -> list[Tell]:
    """Return the messages that an entry of `gate-ledger` causes: tasks first, because work should not wait for news of it."""
    found: list[Tell] = []
    decisions: dict[str, list[DecisionItem]] = {}
    leases: dict[int, list[dict[AttemptKey, LeaseItem]]] = {}
    for event in entry.events:
        kind = type(event)
        if kind not in _TELLING:
            continue
        if kind in _TASKS and not (kind is ev.AttemptPlaced and event.call.is_outside):
            found.append(_task(event, at(len(found)), run_partitions))
        make = _DECISIONS.get(kind)
        if make is not None:
            decisions.setdefault(event.run_id, []).append(make(event))
        make_lease = _LEASES.get(kind)
        if make_lease is not None and (lease := make_lease(event)) is not None:
            messages = leases.setdefault(event.partition, [{}])
            name = AttemptKey(lease.run_id, lease.step_id, lease.attempt)
            if name in messages[-1]:  # whoever reads a message decides on all of it by what was before it
                messages.append({})
            messages[-1][name] = lease
    for run_id, items in decisions.items():
        message = GateDecision(run_id=run_id, source=at(len(found)), items=tuple(items))
        key = f"{run_id}:{entry_key(entry.subject, entry.first_seq, entry.epoch)}"
        found.append(Tell(GATE_DECISIONS, partition_of(run_id, run_partitions), key, message))
    for partition, messages in leases.items():
        for number, lease_items in enumerate(messages):
            told = GateLeases(source=at(len(found)), items=tuple(lease_items.values()))
            key = f"{partition}:{entry_key(entry.subject, entry.first_seq, entry.epoch)}"
            found.append(Tell(GATE_LEASES, partition, f"{key}:{number}" if number else key, told))
    return found


def _task(event: ev.AttemptPlaced | ev.AttemptCancelTold, position: Position, run_partitions: int) -> Tell:
    placed = isinstance(event, ev.AttemptPlaced)
    kind = "run" if placed else "cancel"
    call = event.call if isinstance(event, ev.AttemptPlaced) else None
    queue = event.queue if isinstance(event, ev.AttemptCancelTold) else event.call.queue
    allowed = event if isinstance(event, ev.AttemptPlaced) else None
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
        call=call,
        isolation="" if allowed is None else allowed.isolation,
        rule="" if allowed is None else allowed.rule,
        policy="" if allowed is None else allowed.policy,
        reserved_micros=0 if allowed is None else allowed.reserved_micros,
    )
    key = f"{event.run_id}:{event.step_id}:{event.attempt}:{kind}"
    return Tell(f"{STEP_TASKS}.{queue}", event.task_partition, key, task)


def _allowed(event: ev.AttemptPlaced) -> DecisionItem:
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
    ev.AttemptPlaced: _allowed,
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
