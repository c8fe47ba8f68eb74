"""What a ledger is made of: runs' money, attempts, asks of others, gauges and buckets, and the lines in which they wait. Pure."""

from __future__ import annotations

import copy
import heapq
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import MAX_MICROS
from tidegate.domain.messages import NOTHING, Amounts, Call, Lease

MAX_SETTLED_MICROS = 2**63 - 1  # what a record can hold; no honest run gets there
MAX_SET_ASIDE: Final = 2**62
MANY_OPEN: Final = MAX_SET_ASIDE // MAX_MICROS  # fewer cannot have set aside more than that
HELD, PAUSED, QUEUED, RESERVED, PLACED = "held", "paused", "queued", "reserved", "placed"
METERS = ("micros", "input_tokens", "output_tokens", "calls", "wall_ms")
_NONE = (0, 0, 0, 0, 0)
# What one level of priority is worth in waiting time: with it, nobody waits for ever behind those of more.
PRIORITY_MS = 10_000
MAX_PRIORITY = 9


class AttemptKey(NamedTuple):
    """Names an attempt."""

    run_id: str
    step_id: str
    attempt: int


class Incarnation(NamedTuple):
    """Names one life of an executor."""

    instance_id: str
    incarnation: int


# Stands for whoever does outside tools: it has no slots, and no life that could end.
OUTSIDE: Final = Incarnation("", -1)
OUTSIDE_LINE: Final = ("", "")


class RunMoney(msgspec.Struct, array_like=True):
    """What a run may spend, has set aside and has spent, in micro-dollars, and which of its steps a human approved.

    open: its attempts that have not ended, as keys. approved: step id -> (arguments, who). parent_run_id, has_children: as
    in RunOpened. Like Attempt, a msgspec struct so that snapshots need no code per field; the order of the fields
    is the format of `SNAPSHOT_FORMAT` in `snapshots.py`.
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
    priority: int = 5
    parent_run_id: str = ""
    has_children: bool = False

    @property
    def is_alone(self) -> bool:
        """Tell whether it does no step of another run, and none of its steps is a run."""
        return not self.parent_run_id and not self.has_children


class Attempt(msgspec.Struct, array_like=True):
    """An attempt whose reservation, wait or approval has not ended. turn: seq of the event that queued or placed it.

    priority, queued_ms: its place in line. leases: what it needs while it waits, what it holds once it is placed.
    limits_version: of the limits that this follows from. asked: partition that it has asked for leases, -1 for none; granted:
    partitions that gave theirs, the latest at granted_ms; until it is placed, pinned names the executor that they are for. needs:
    what of ours it takes together with a slot then; of one that asked its own partition, too, also once it is placed.
    throttled: it was told why it waits.

    buckets, amounts: what is set aside where. exceeds: the buckets that an approval lets it exceed. paused_on: the bucket that
    it waits for. expires_at_ms: when its question lapses, 0 for never. cancelled: its run wants nothing of it any more. The
    others: as in the events of the same names.
    """

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
    priority: int = 5
    queued_ms: int = 0
    leases: tuple[Lease, ...] = ()
    limits_version: int = 0
    asked: int = -1
    granted: tuple[int, ...] = ()
    granted_ms: int = 0
    needs: tuple[Lease, ...] = ()
    pinned: str = ""
    throttled: bool = False
    buckets: tuple[str, ...] = ()
    amounts: Amounts = NOTHING
    basis: str = ""
    exceeds: tuple[str, ...] = ()
    paused_on: str = ""
    expires_at_ms: int = 0
    redact: tuple[str, ...] = ()
    isolation: str = ""
    cancelled: bool = False

    @property
    def rank(self) -> int:
        """Return its place in line among attempts of its account root: less goes first."""
        return self.queued_ms + (MAX_PRIORITY - self.priority) * PRIORITY_MS

    @property
    def line(self) -> tuple[str, str]:
        """Return the queue and function that it waits for."""
        assert self.call is not None  # noqa: S101 - what waits has a call
        return line_of(self.call)

    @property
    def awaited(self) -> tuple[Lease, ...]:
        """Return the leases that it waits for: all of them, or what is left to take here once others have given theirs."""
        return self.needs if self.granted else self.leases


def line_of(call: Call) -> tuple[str, str]:
    """Return the queue and function that a call waits for. What is done outside waits for neither, but perhaps for limits."""
    return OUTSIDE_LINE if call.is_outside else (call.queue, call.function)


class Ask(msgspec.Struct, array_like=True):
    """An attempt, mostly of another partition, that needs leases of ours (all or none), and whether it has them."""

    account: str
    partition: int
    priority: int
    leases: tuple[Lease, ...]
    queued_ms: int
    turn: int
    given: bool = False

    @property
    def rank(self) -> int:
        """Return its place in line: less goes first."""
        return self.queued_ms + (MAX_PRIORITY - self.priority) * PRIORITY_MS


class Gauge(msgspec.Struct, array_like=True):
    """What a limit knows of one value of its key, besides who holds it.

    until_us: when its bucket is full again, as of taken_us, when a token was last taken. failures_ms: failures that its
    breaker counted. open_until_ms: 0 while the breaker is closed; after that time it lets probes through. why: for people.
    """

    until_us: int = 0
    failures_ms: list[int] = []
    open_until_ms: int = 0
    why: str = ""
    taken_us: int = 0


class Bucket(msgspec.Struct, array_like=True):
    """What a budget counted for one account (or run) in one window. reserved, spent: in the order of METERS.

    open: how many reservations have not ended. alerted: meter -> the highest percent that was told.
    """

    account: str
    budget: str
    version: str
    limits: ev.Ceilings
    on_exceed: str
    from_ms: int
    until_ms: int
    run_id: str
    top_ups: tuple[str, ...]
    reserved: tuple[int, ...] = _NONE
    spent: tuple[int, ...] = _NONE
    open: int = 0
    alerted: dict[str, int] = {}

    @classmethod
    def of(cls, event: ev.BudgetSet) -> Bucket:
        """Return a bucket that has counted nothing yet."""
        return cls(
            event.account,
            event.budget,
            event.version,
            event.limits,
            event.on_exceed,
            event.from_ms,
            event.until_ms,
            event.run_id,
            event.top_ups,
        )

    def copy(self) -> Bucket:
        """Return one that may be changed apart from this one."""
        return copy.copy(self)  # all that it holds is replaced when it changes, and not changed itself

    def set(self, event: ev.BudgetSet) -> None:
        """Take other limits, and another end: windows of another length may begin at the same time."""
        self.version, self.limits, self.on_exceed = event.version, event.limits, event.on_exceed
        self.until_ms, self.top_ups = event.until_ms, event.top_ups

    def lacking(self, amounts: tuple[int, ...]) -> int | None:
        """Return the first meter that has no room for `amounts`, as its place in METERS; None if all have."""
        reserved, spent = self.reserved, self.spent
        for at, limit in tight(self.limits):
            # Also where nothing is needed: a budget that was overshot is closed, whatever the next attempt says it needs.
            if reserved[at] + spent[at] + amounts[at] > limit:
                return at
        # So that what is given back is what was set aside, no sum may come to its end, not even one that nothing limits.
        if self.open >= MANY_OPEN and (most := max(reserved)) > MAX_SET_ASIDE:
            return reserved.index(most)
        return None

    def reserve(self, amounts: Amounts) -> None:
        """Set aside."""
        self.reserved = _plus(self.reserved, amounts.micros, amounts)
        self.open += 1

    def settle(self, reserved: Amounts, used_micros: int, used: Amounts) -> None:
        """End a reservation, if there was one: who never reserved settles against nothing. The money of `used` does not count."""
        self.release(reserved)
        self.spent = _plus(self.spent, used_micros, used)

    def release(self, reserved: Amounts) -> None:
        """End a reservation that nothing was used of."""
        if reserved.calls:
            self.open -= 1
        micros, input_tokens, output_tokens, calls, wall_ms = self.reserved
        self.reserved = (
            micros - reserved.micros,
            input_tokens - reserved.input_tokens,
            output_tokens - reserved.output_tokens,
            calls - reserved.calls,
            wall_ms - reserved.wall_ms,
        )

    def alert(self, event: ev.BudgetAlerted) -> None:
        """Note that a threshold was told."""
        self.alerted = {**self.alerted, event.meter: max(self.alerted.get(event.meter, 0), event.percent)}


class Learned(msgspec.Struct, array_like=True, frozen=True):
    """What `count` attempts of a function used on average, in the order of METERS."""

    count: int
    mean: tuple[int, ...]


class Carried(msgspec.Struct, array_like=True, frozen=True):
    """When, at which seq and by which document's wish the balances were carried forward for the last time."""

    at_ms: int
    seq: int
    policy: str


@lru_cache(maxsize=4096)
def tight(limits: ev.Ceilings) -> tuple[tuple[int, int], ...]:
    """Return the limits that there are, each with its place in METERS."""
    found = (limits.micros, limits.input_tokens, limits.output_tokens, limits.calls, limits.wall_ms)
    return tuple((at, limit) for at, limit in enumerate(found) if limit is not None)


def _plus(values: tuple[int, ...], more_micros: int, more: Amounts) -> tuple[int, ...]:
    micros, input_tokens, output_tokens, calls, wall_ms = values
    most = MAX_SETTLED_MICROS
    # Without `min`: this is the busiest function of a fold.
    return (
        sum_ if (sum_ := micros + more_micros) < most else most,
        sum_ if (sum_ := input_tokens + more.input_tokens) < most else most,
        sum_ if (sum_ := output_tokens + more.output_tokens) < most else most,
        sum_ if (sum_ := calls + more.calls) < most else most,
        sum_ if (sum_ := wall_ms + more.wall_ms) < most else most,
    )


def meters_of(amounts: Amounts) -> tuple[int, ...]:
    """Return amounts in the order of METERS."""
    return (amounts.micros, amounts.input_tokens, amounts.output_tokens, amounts.calls, amounts.wall_ms)


class Line:
    """Attempts that wait for the same: for each account root and rank of priority a queue, in order of turn. Leaving is O(1)."""

    __slots__ = ("_queues", "_unsorted")

    def __init__(self) -> None:
        self._queues: dict[str, dict[int, OrderedDict[AttemptKey, tuple[int, int, AttemptKey]]]] = {}
        self._unsorted: set[tuple[str, int]] = set()

    def add(self, root: str, key: AttemptKey, turn: int, rank: int = 0, priority: int = 5) -> None:
        """Stand in line. While a log is folded on top of snapshots, who came earlier may be met later: sorted when asked."""
        queues = self._queues.get(root)
        if queues is None:
            queues = self._queues[root] = {}
        place = (rank, turn, key)
        queue = queues.get(priority)
        if queue is None:
            queue = queues[priority] = OrderedDict()
        elif queue[next(reversed(queue))] > place:
            self._unsorted.add((root, priority))
        queue[key] = place

    def remove(self, root: str, key: AttemptKey, priority: int = 5) -> None:
        """Leave, from wherever it stands. Raises KeyError."""
        queues = self._queues[root]
        queue = queues[priority]
        del queue[key]
        if not queue:
            self._unsorted.discard((root, priority))
            del queues[priority]
            if not queues:
                del self._queues[root]

    def roots(self) -> list[str]:
        """Return the account roots that somebody waits for."""
        return list(self._queues)

    def heads(self) -> Iterator[tuple[str, tuple[int, int, AttemptKey]]]:
        """Return each account root with its first (rank, turn, attempt)."""
        for root, queues in self._queues.items():
            if len(queues) == 1 and not self._unsorted:  # no iterator over a whole queue for its first one
                for queue in queues.values():
                    yield root, next(iter(queue.values()))
            else:
                yield root, next(self.of(root))

    def of(self, root: str) -> Iterator[tuple[int, int, AttemptKey]]:
        """Return (rank, turn, attempt) of an account root, the first one first."""
        queues = self._queues[root]
        if self._unsorted:
            for priority in queues:
                if (root, priority) in self._unsorted:
                    queues[priority] = OrderedDict(sorted(queues[priority].items(), key=lambda item: item[1]))
                    self._unsorted.discard((root, priority))
        parts = [iter(queue.values()) for queue in queues.values()]
        return parts[0] if len(parts) == 1 else heapq.merge(*parts)

    def count(self, root: str) -> int:
        """Return how many of an account root stand here."""
        return sum(len(queue) for queue in self._queues.get(root, {}).values())

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Line):
            return NotImplemented
        ours, theirs = ({root: list(line.of(root)) for root in line.roots()} for line in (self, other))
        return ours == theirs

    __hash__ = None  # type: ignore[assignment] # it changes


Name = tuple[str, str]
Leases = tuple[Lease, ...]


class Below(msgspec.Struct):
    """What all runs below a run come to. children: those directly below it; going: how many of all are not done."""

    children: dict[str, None] = {}
    going: int = 0
    reserved_micros: int = 0
    settled_micros: int = 0
