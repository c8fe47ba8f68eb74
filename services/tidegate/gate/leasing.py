"""Leases of limits that another ledger partition decides on: asking, giving and giving back. Pure.

A limit that holds across account roots has one owner partition for each value of its key. An attempt elsewhere asks it, one
partition after the other in ascending order, and holds what it has while it asks the next one. Its own partition it asks like
any other, unless that is the last one: then it takes what that decides on together with the slot, as it does what counts within
its account root. So whoever waits holds only what comes before, and no two wait for each other. A message is a tell of a ledger
entry, deduplicated by position: an ask is heard once, and what was given comes back once, whoever crashes.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.domain import ledger_events as ev
from tidegate.domain.messages import (
    GateLeases,
    Lease,
    LeaseAsk,
    LeaseGrant,
    LeaseRefusal,
    LeaseReturn,
    LeaseWait,
)
from tidegate.gate.fold import held_by_itself, leases_of
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import Desk, Obstacle
from tidegate.gate.state import PLACED, QUEUED, Attempt, AttemptKey

LIMIT_RULE: Final = "limit"
LEASE_IDLE_MS: Final = 2_000  # leases of others that find no slot for so long go back, for somebody who has one
MAX_RETURNS_PER_ENTRY: Final = 200


def names(key: AttemptKey, account: str) -> dict[str, Any]:
    """Return the fields by which every ledger event names an attempt."""
    return {"account": account, "run_id": key.run_id, "step_id": key.step_id, "attempt": key.attempt}


def throttled(key: AttemptKey, account: str, obstacle: Obstacle, position: int) -> ev.AttemptThrottled:
    """Return the event that says why an attempt waits."""
    return ev.AttemptThrottled(
        **names(key, account),
        cause=obstacle.cause,
        limit=obstacle.lease.limit,
        key=obstacle.lease.key,
        reason=obstacle.reason,
        position=position,
        retry_at_ms=obstacle.retry_at_ms,
    )


def given_back(desk: Desk, key: AttemptKey, attempt: Attempt, outcome: str, reason: str = "") -> list[Any]:
    """Return what follows for limits when an attempt ends or its executor is lost: leases of others go back, breakers count."""
    if not (attempt.leases or attempt.granted or attempt.asked >= 0):
        return []  # no limit is about it, as about most
    events: list[Any] = []
    partitions: set[int] = set()
    if attempt.status == PLACED and not attempt.lost:
        own = held_by_itself(attempt, desk.ledger.partition)
        desk.free(own)
        events += desk.outcome(own, outcome)
        if not attempt.granted and len(own) == len(attempt.leases):
            return events  # nothing of others'
        partitions = {*attempt.granted, *(lease.partition for lease in attempt.leases if lease not in own)}
    elif attempt.status == QUEUED:
        partitions = {*attempt.granted, attempt.asked}
    return events + [
        ev.LeasesReturned(**names(key, attempt.account), partition=partition, outcome=outcome, reason=reason or "ended")
        for partition in sorted(partitions - {-1})
    ]


def ask(
    desk: Desk, key: AttemptKey, attempt: Attempt, leases: tuple[Lease, ...], pinned: str, held: tuple[int, ...]
) -> ev.LeasesAsked | None:
    """Return the question to the next partition that decides on one of these leases; None if all were given but those that
    are taken with the slot."""
    here = desk.ledger.partition
    local = tuple(lease for lease in leases if lease.partition == here and desk.limits.is_local(lease))
    shared = tuple(lease for lease in leases if lease not in local)
    if shared and shared[-1].partition == here:  # the last of all: they are in order
        local, shared = leases_of(leases, here), tuple(lease for lease in shared if lease.partition != here)
    to_ask = sorted({lease.partition for lease in shared} - {*held})
    if not to_ask:
        return None
    return ev.LeasesAsked(
        **names(key, attempt.account),
        partition=to_ask[0],
        priority=attempt.priority,
        leases=leases_of(shared, to_ask[0]),
        instance_id=pinned,
        local=local,
    )


def on_leases(desk: Desk, message: GateLeases) -> list[Any]:
    """Return the events that a message of another ledger partition causes. Items that no longer apply cause nothing."""
    events: list[Any] = []
    done: set[AttemptKey] = set()
    for item in message.items:
        key = AttemptKey(item.run_id, item.step_id, item.attempt)
        if isinstance(item, LeaseAsk):
            if key not in desk.ledger.asks:
                events.append(_heard(desk, key, item, message.source.partition))
        elif isinstance(item, LeaseReturn):
            events += _ended(desk, key, item)
        elif key not in done:  # what is decided below looks at the attempt as it was
            done.add(key)
            events += _answered(desk, key, item, message.source.partition)
    return events


# --- at the partition that decides ---------------------------------------------------------------


def _heard(desk: Desk, key: AttemptKey, item: LeaseAsk, partition: int) -> Any:
    obstacle = desk.obstacle(item.leases)
    fields = {**names(key, item.account), "partition": partition}
    if obstacle is None:
        return ev.LeaseHeard(**fields, priority=item.priority, leases=item.leases)
    if obstacle.denies:
        return ev.LeaseRefused(
            **fields,
            limit=obstacle.lease.limit,
            key=obstacle.lease.key,
            reason=obstacle.reason,
            retry_after_ms=max(0, obstacle.retry_at_ms - desk.now_ms),
        )
    line = desk.ledger.ask_lines.get(item.leases)
    return ev.LeaseHeard(
        **fields,
        priority=item.priority,
        leases=item.leases,
        cause=obstacle.cause,
        limit=obstacle.lease.limit,
        key=obstacle.lease.key,
        reason=obstacle.reason,
        position=0 if line is None else sum(line.count(root) for root in line.roots()),
        retry_at_ms=obstacle.retry_at_ms,
    )


def _ended(desk: Desk, key: AttemptKey, item: LeaseReturn) -> list[Any]:
    found = desk.ledger.asks.get(key)
    if found is None:
        return []
    events: list[Any] = []
    if found.given:
        events += desk.outcome(found.leases, item.outcome)
        desk.free(found.leases)
    fields = {**names(key, found.account), "partition": found.partition}
    return [*events, ev.LeaseEnded(**fields, outcome=item.outcome)]


# --- at the partition that asked ---------------------------------------------------------------


def _answered(desk: Desk, key: AttemptKey, item: LeaseGrant | LeaseWait | LeaseRefusal, partition: int) -> list[Any]:
    attempt = desk.ledger.attempts.get(key)
    if attempt is None or attempt.status != QUEUED or attempt.asked != partition:
        return []  # it has ended since, and gave back what it had asked for
    fields = names(key, attempt.account)
    if isinstance(item, LeaseGrant):
        granted = ev.LeasesGranted(**fields, partition=partition)
        leases = desk.limits.on_instance(attempt.leases, attempt.pinned, desk.ledger.partition)
        following = ask(desk, key, attempt, leases, attempt.pinned, (*attempt.granted, partition))
        return [granted] if following is None else [granted, following]
    if isinstance(item, LeaseRefusal):
        refused = ev.AttemptRefused(
            **fields, rule=LIMIT_RULE, policy="", reason=item.reason, retry_after_ms=item.retry_after_ms
        )
        return [*given_back(desk, key, attempt, ""), refused]
    if attempt.throttled:
        return []
    obstacle = Obstacle(Lease(partition, item.limit, item.key), item.cause, item.reason, item.retry_at_ms)
    return [throttled(key, attempt.account, obstacle, item.position)]


def orphaned(desk: Desk) -> list[Any]:
    """Return the end of what attempts of our own partition hold here and do not want any more.

    A gate of an earlier version never asked its own partition. If one had the partition for a while (in an upgrade that was turned
    back, say), it ended such attempts without giving that back.
    """
    events: list[Any] = []
    here = desk.ledger.partition
    for key, found in desk.ledger.asks.items():
        attempt = desk.ledger.attempts.get(key) if found.partition == here else None
        if found.partition == here and (attempt is None or (attempt.asked != here and here not in attempt.granted)):
            events += _ended(
                desk, key, LeaseReturn(run_id=key.run_id, step_id=key.step_id, attempt=key.attempt, outcome="")
            )
            if len(events) >= MAX_RETURNS_PER_ENTRY:
                break
    return events


def idle(ledger: Ledger, now_ms: int) -> list[Any]:
    """Return the return of leases that have found no slot for `LEASE_IDLE_MS`. Their attempts ask again when there is one."""
    events: list[Any] = []
    for key, granted_ms in ledger.granted.items():
        if now_ms - granted_ms >= LEASE_IDLE_MS:
            attempt = ledger.attempts[key]
            events += [
                ev.LeasesReturned(**names(key, attempt.account), partition=partition, outcome="", reason="no slot")
                for partition in attempt.granted
            ]
            if len(events) >= MAX_RETURNS_PER_ENTRY:
                break
    return events
