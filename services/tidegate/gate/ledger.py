"""The folded ledger of one partition: runs' money, attempts and where they are. Changed by `apply` alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root
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


class RunMoney(msgspec.Struct, array_like=True):
    """What a run may spend, has set aside and has spent, in micro-dollars, and which of its steps a human approved.

    open: its attempts that have not ended, as keys. approved: step id -> (arguments, who). Like Attempt, a msgspec struct so
    that snapshots need no code per field; the order of the fields is the format of `SNAPSHOT_FORMAT` in `snapshots.py`.
    """

    account: str
    budget_micros: int | None
    workflow: str
    tags: dict[str, str]
    reserved_micros: int = 0
    settled_micros: int = 0
    closed: bool = False
    open: dict[AttemptKey, None] = {}
    approved: dict[str, tuple[str, str]] = {}


class Attempt(msgspec.Struct, array_like=True):
    """An attempt whose reservation, wait or approval has not ended. turn: seq of the event that queued or placed it."""

    account: str
    call: Call | None
    status: str
    reserved_micros: int = 0
    rule: str = ""
    policy: str = ""
    incarnation: Incarnation | None = None
    task_partition: int = 0
    lost: bool = False
    turn: int = 0


class Line:
    """Attempts that wait for the same function: a queue for each account root, in order of turn. Leaving it is O(1)."""

    __slots__ = ("_queues", "_unsorted")

    def __init__(self) -> None:
        self._queues: dict[str, OrderedDict[AttemptKey, int]] = {}
        self._unsorted: set[str] = set()

    def add(self, root: str, key: AttemptKey, turn: int) -> None:
        """Stand in line. While a log is folded on top of snapshots, who came earlier may be met later: sorted when asked."""
        queue = self._queues.setdefault(root, OrderedDict())
        if queue and queue[next(reversed(queue))] > turn:
            self._unsorted.add(root)
        queue[key] = turn

    def remove(self, root: str, key: AttemptKey) -> None:
        """Leave, from wherever it stands. Raises KeyError."""
        queue = self._queues[root]
        del queue[key]
        if not queue:
            del self._queues[root]
            self._unsorted.discard(root)

    def roots(self) -> list[str]:
        """Return the account roots that somebody waits for."""
        return list(self._queues)

    def of(self, root: str) -> Iterator[tuple[int, AttemptKey]]:
        """Return (turn, attempt) of an account root, the first one first."""
        if root in self._unsorted:
            self._queues[root] = OrderedDict(sorted(self._queues[root].items(), key=lambda item: item[1]))
            self._unsorted.discard(root)
        return ((turn, key) for key, turn in self._queues[root].items())

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Line):
            return NotImplemented
        ours, theirs = ({root: list(line.of(root)) for root in line.roots()} for line in (self, other))
        return ours == theirs

    __hash__ = None  # type: ignore[assignment] # it changes


class Ledger:
    """The state of one ledger partition. `waiting` holds queued attempts by (queue, function).

    busy: how many attempts of an account root hold a slot. seq, head: the end of the partition's hash chain.
    """

    __slots__ = ("attempts", "busy", "head", "held_by", "partition", "runs", "seq", "waiting", "waiting_count")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.seq = 0
        self.head = b""
        self.runs: dict[str, RunMoney] = {}
        self.attempts: dict[AttemptKey, Attempt] = {}
        self.held_by: dict[Incarnation, dict[AttemptKey, None]] = {}
        self.busy: dict[str, int] = {}
        self.waiting: dict[tuple[str, str], Line] = {}
        self.waiting_count = 0

    @property
    def subject(self) -> str:
        """Return what the ledger's hash chain and seqs are counted by."""
        return f"ledger-{self.partition}"


def apply(ledger: Ledger, event: Any, seq: int) -> None:
    """Change the ledger by its `seq`-th event. Raises KeyError on an event that its state does not allow."""
    ledger.seq = seq
    _HANDLERS[type(event)](ledger, event)


def derive(ledger: Ledger) -> None:
    """Make what follows from runs and attempts, which were put in by themselves: who waits, and who holds what."""
    for key, attempt in sorted(ledger.attempts.items(), key=lambda item: item[1].turn):
        if attempt.status == QUEUED:
            _join_queue(ledger, key, attempt)
        elif attempt.incarnation is not None and not attempt.lost:
            _hold(ledger, attempt.incarnation, key, attempt)


def _hold(ledger: Ledger, life: Incarnation, key: AttemptKey, attempt: Attempt) -> None:
    ledger.held_by.setdefault(life, {})[key] = None
    root = account_root(attempt.account)
    ledger.busy[root] = ledger.busy.get(root, 0) + 1


def _let_go(ledger: Ledger, life: Incarnation, key: AttemptKey, attempt: Attempt) -> None:
    """The attempt holds a slot no more, if it did."""
    held = ledger.held_by.get(life, {})
    if key not in held:
        return
    del held[key]
    if not held:
        del ledger.held_by[life]
    root = account_root(attempt.account)
    ledger.busy[root] -= 1
    if not ledger.busy[root]:
        del ledger.busy[root]


def _key(event: Any) -> AttemptKey:
    return AttemptKey(event.run_id, event.step_id, event.attempt)


def _run_opened(ledger: Ledger, event: ev.RunOpened) -> None:
    ledger.runs[event.run_id] = RunMoney(event.account, event.budget_micros, event.workflow, event.tags)


def _new_attempt(ledger: Ledger, key: AttemptKey, account: str, call: Call | None, status: str) -> Attempt:
    attempt = ledger.attempts[key] = Attempt(account, call, status)
    ledger.runs[key.run_id].open[key] = None
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
    attempt.turn = ledger.seq
    _join_queue(ledger, _key(event), attempt)


def _join_queue(ledger: Ledger, key: AttemptKey, attempt: Attempt) -> None:
    assert attempt.call is not None  # noqa: S101 - what waits has a call
    ledger.waiting_count += 1
    ledger.waiting.setdefault((attempt.call.queue, attempt.call.function), Line()).add(
        account_root(attempt.account), key, attempt.turn
    )


def _placed(ledger: Ledger, event: ev.AttemptPlaced) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    if attempt.status == QUEUED:
        _leave_queue(ledger, key, attempt, event.call)
    attempt.status = PLACED
    attempt.call = event.call
    attempt.incarnation = Incarnation(event.instance_id, event.incarnation)
    attempt.task_partition = event.task_partition
    attempt.turn = ledger.seq
    _hold(ledger, attempt.incarnation, key, attempt)


def _leave_queue(ledger: Ledger, key: AttemptKey, attempt: Attempt, call: Call) -> None:
    name = (call.queue, call.function)
    line = ledger.waiting[name]
    line.remove(account_root(attempt.account), key)
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
        _leave_queue(ledger, key, attempt, attempt.call)
    if attempt.incarnation is not None:
        _let_go(ledger, attempt.incarnation, key, attempt)
    run = ledger.runs[key.run_id]
    run.reserved_micros -= attempt.reserved_micros
    del run.open[key]
    _forget_if_done(ledger, key.run_id)


def _cancel_told(ledger: Ledger, event: ev.AttemptCancelTold) -> None:
    """The executor was told; its answer, or its loss, ends the attempt. Until then nothing changes."""


def _lost(ledger: Ledger, event: ev.PlacementLost) -> None:
    attempt = ledger.attempts[_key(event)]
    attempt.lost = True
    if attempt.incarnation is not None:
        _let_go(ledger, attempt.incarnation, _key(event), attempt)


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
