"""The folded ledger of one partition: runs' money, attempts and where they are. Changed by `apply` alone."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from tidegate.domain import ledger_events as ev
from tidegate.domain.messages import Call

MAX_SETTLED_MICROS = 2**63 - 1  # what a record can hold; no honest run gets there
HELD, QUEUED, RESERVED, PLACED = "held", "queued", "reserved", "placed"


class AttemptKey(NamedTuple):
    """Names an attempt."""

    run_id: str
    step_id: str
    attempt: int


class Incarnation(NamedTuple):
    """Names one life of an executor."""

    instance_id: str
    incarnation: int


class RunMoney:
    """What a run may spend, has set aside and has spent, in micro-dollars, and which of its steps a human approved."""

    __slots__ = (
        "account",
        "approved",
        "budget_micros",
        "closed",
        "open",
        "reserved_micros",
        "settled_micros",
        "tags",
        "workflow",
    )

    def __init__(self, account: str, budget_micros: int | None, workflow: str, tags: dict[str, str]) -> None:
        self.account = account
        self.budget_micros = budget_micros
        self.workflow = workflow
        self.tags = tags
        self.reserved_micros = 0
        self.settled_micros = 0
        self.closed = False
        self.open = 0
        self.approved: dict[str, tuple[str, str]] = {}


class Attempt:
    """An attempt whose reservation, wait or approval has not ended."""

    __slots__ = (
        "account",
        "call",
        "incarnation",
        "lost",
        "policy",
        "reserved_micros",
        "rule",
        "status",
        "task_partition",
    )

    def __init__(self, account: str, call: Call | None, status: str) -> None:
        self.account = account
        self.call = call
        self.status = status
        self.reserved_micros = 0
        self.rule = ""
        self.policy = ""
        self.incarnation: Incarnation | None = None
        self.task_partition = 0
        self.lost = False


class Ledger:
    """The state of one ledger partition. `waiting` holds queued attempts by (queue, function), oldest first."""

    __slots__ = ("attempts", "held_by", "partition", "runs", "ticket", "waiting", "waiting_count")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.runs: dict[str, RunMoney] = {}
        self.attempts: dict[AttemptKey, Attempt] = {}
        self.held_by: dict[Incarnation, dict[AttemptKey, None]] = {}
        self.waiting: dict[tuple[str, str], deque[tuple[int, AttemptKey]]] = {}
        self.waiting_count = 0
        self.ticket = 0

    @property
    def subject(self) -> str:
        """Return what the ledger's hash chain and seqs are counted by."""
        return f"ledger-{self.partition}"


def apply(ledger: Ledger, event: Any) -> None:
    """Change the ledger by one event. Raises KeyError on an event that its state does not allow."""
    _HANDLERS[type(event)](ledger, event)


def _key(event: Any) -> AttemptKey:
    return AttemptKey(event.run_id, event.step_id, event.attempt)


def _run_opened(ledger: Ledger, event: ev.RunOpened) -> None:
    ledger.runs[event.run_id] = RunMoney(event.account, event.budget_micros, event.workflow, event.tags)


def _new_attempt(ledger: Ledger, key: AttemptKey, account: str, call: Call | None, status: str) -> Attempt:
    attempt = ledger.attempts[key] = Attempt(account, call, status)
    ledger.runs[key.run_id].open += 1
    return attempt


def _reserved(ledger: Ledger, event: ev.AttemptReserved) -> None:
    key = _key(event)
    attempt = ledger.attempts.get(key) or _new_attempt(ledger, key, event.account, None, RESERVED)
    attempt.status = RESERVED
    attempt.reserved_micros = event.reserved_micros
    attempt.rule, attempt.policy = event.rule, event.policy
    run = ledger.runs[event.run_id]
    run.reserved_micros += event.reserved_micros
    if event.approved_by and attempt.call is not None:
        run.approved[event.step_id] = (attempt.call.arguments, event.approved_by)


def _refused(ledger: Ledger, event: ev.AttemptRefused) -> None:
    _end(ledger, _key(event))


def _held(ledger: Ledger, event: ev.ApprovalHeld) -> None:
    attempt = _new_attempt(ledger, _key(event), event.account, event.call, HELD)
    attempt.rule, attempt.policy = event.rule, event.policy


def _queued(ledger: Ledger, event: ev.AttemptQueued) -> None:
    attempt = ledger.attempts[_key(event)]
    attempt.status = QUEUED
    attempt.call = event.call
    ledger.ticket += 1
    ledger.waiting_count += 1
    ledger.waiting.setdefault((event.call.queue, event.call.function), deque()).append((ledger.ticket, _key(event)))


def _placed(ledger: Ledger, event: ev.AttemptPlaced) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    if attempt.status == QUEUED:
        _leave_queue(ledger, key, event.call)
    attempt.status = PLACED
    attempt.call = event.call
    attempt.incarnation = Incarnation(event.instance_id, event.incarnation)
    attempt.task_partition = event.task_partition
    ledger.held_by.setdefault(attempt.incarnation, {})[key] = None


def _leave_queue(ledger: Ledger, key: AttemptKey, call: Call) -> None:
    name = (call.queue, call.function)
    line = ledger.waiting[name]
    if line[0][1] == key:
        line.popleft()
    else:  # only a cancelled attempt leaves from the middle
        ledger.waiting[name] = line = deque(item for item in line if item[1] != key)
    ledger.waiting_count -= 1
    if not line:
        del ledger.waiting[name]


def _settled(ledger: Ledger, event: ev.AttemptSettled) -> None:
    run = ledger.runs.get(event.run_id)
    if run is not None:
        run.settled_micros = min(run.settled_micros + event.actual_micros, MAX_SETTLED_MICROS)
    _end(ledger, _key(event))


def _released(ledger: Ledger, event: ev.AttemptReleased) -> None:
    _end(ledger, _key(event))


def _end(ledger: Ledger, key: AttemptKey) -> None:
    """End the attempt, if it is still open: its money is no longer set aside, its slot is free."""
    attempt = ledger.attempts.pop(key, None)
    if attempt is None:
        return
    if attempt.status == QUEUED and attempt.call is not None:
        _leave_queue(ledger, key, attempt.call)
    if attempt.incarnation is not None:
        held = ledger.held_by.get(attempt.incarnation)
        if held is not None:
            held.pop(key, None)
            if not held:
                del ledger.held_by[attempt.incarnation]
    run = ledger.runs[key.run_id]
    run.reserved_micros -= attempt.reserved_micros
    run.open -= 1
    _forget_if_done(ledger, key.run_id)


def _cancel_told(ledger: Ledger, event: ev.AttemptCancelTold) -> None:
    """The executor was told; its answer, or its loss, ends the attempt. Until then nothing changes."""


def _lost(ledger: Ledger, event: ev.PlacementLost) -> None:
    attempt = ledger.attempts[_key(event)]
    attempt.lost = True
    if attempt.incarnation is not None:
        held = ledger.held_by.get(attempt.incarnation, {})
        held.pop(_key(event), None)
        if not held:
            ledger.held_by.pop(attempt.incarnation, None)


def _closed(ledger: Ledger, event: ev.RunClosed) -> None:
    ledger.runs[event.run_id].closed = True
    _forget_if_done(ledger, event.run_id)


def _forget_if_done(ledger: Ledger, run_id: str) -> None:
    run = ledger.runs[run_id]
    if run.closed and not run.open:
        del ledger.runs[run_id]


_HANDLERS: dict[type, Any] = {
    ev.RunOpened: _run_opened,
    ev.AttemptReserved: _reserved,
    ev.AttemptRefused: _refused,
    ev.ApprovalHeld: _held,
    ev.AttemptQueued: _queued,
    ev.AttemptPlaced: _placed,
    ev.AttemptSettled: _settled,
    ev.AttemptReleased: _released,
    ev.AttemptCancelTold: _cancel_told,
    ev.PlacementLost: _lost,
    ev.RunClosed: _closed,
}
