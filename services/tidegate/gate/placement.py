"""Executors as the gate sees them: who is alive, who is proven or presumed dead, who has a free slot."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Final

import structlog

from tidegate.domain.messages import Instance
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import OUTSIDE, OUTSIDE_LINE, Incarnation

EXECUTOR: Final = "executor"
MAX_SLOTS: Final = 1_000  # more than that an executor of ours does not offer
MAX_ENDED: Final = 64  # as many as a registration of ours proves dead
MAX_EVIDENCE: Final = 500  # it is repeated with every attempt that is lost by it

_log = structlog.get_logger()


class Executor:
    """The latest life of an executor, as it last reported."""

    __slots__ = ("functions", "is_heard", "life", "lines", "queue", "row", "running", "slots")

    def __init__(self, row: Instance, life: Incarnation, *, is_heard: bool) -> None:
        self.row = row
        self.is_heard = is_heard  # by this gate, since it began to listen
        self.life = life
        self.queue = row.queue
        self.slots = min(max(row.slots, 0), MAX_SLOTS)
        self.functions = frozenset(row.functions)
        self.lines = frozenset((row.queue, name.partition(":")[2]) for name in row.functions)
        # How many attempts it runs, by the ledger partition that placed them.
        self.running = Counter(item.ledger_partition for item in row.running)

    def offers(self, kind: str, function: str) -> bool:
        """Tell whether it registered the function."""
        return f"{kind}:{function}" in self.functions


class Executors:
    """All executors, with leases counted from our own reading of their heartbeats.

    monotonic_ms: a clock that never goes back. table_end: returns the present end offset of `instances` (a round trip; asked
    only when a lease seems to have run out, because a gate that lags must not take its own lag for their silence).
    task_partitions: returns how many partitions the topic of a queue's tasks has, 0 if there is none.
    """

    def __init__(
        self,
        lease_ms: int,
        monotonic_ms: Callable[[], int],
        table_end: Callable[[], int],
        wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        task_partitions: Callable[[str], int] = lambda _: 1_000,
    ) -> None:
        self._task_partitions = task_partitions
        self._lease_ms = lease_ms
        self._wall_ms = wall_ms
        self._is_listening = False
        self._monotonic_ms = monotonic_ms
        self._table_end = table_end
        self.by_id: dict[str, Executor] = {}
        self._heard_ms: dict[Incarnation, int] = {}
        self._suspects: dict[Incarnation, int] = {}
        self._unread = 0
        self.ended: dict[Incarnation, str] = {}
        self._ready: dict[str, list[Executor]] = {}
        self._offers: set[tuple[str, str]] = set()  # by executors of paused queues too
        self._by_life: dict[Incarnation, Executor] = {}
        self._is_paused: Callable[[str], bool] = lambda queue: False

    def pause(self, is_paused: Callable[[str], bool]) -> None:
        """Give nothing new to executors of queues that are paused now, and again to those that are not."""
        self._is_paused = is_paused
        self._sort()

    def take(self, instance_id: str, row: Instance | None, offset: int) -> None:
        """Note a record of `instances`."""
        if row is None or row.service != EXECUTOR:
            # Nobody's death is proven by it: it holds its lease, and if it beats on, it is back.
            if self.by_id.pop(instance_id, None) is not None:
                self._sort()
            return
        if not 0 <= row.task_partition < self._task_partitions(row.queue):
            # A task that cannot be written would stop every gate that finds its placement in the ledger, for good.
            _log.error("executor ignored: its tasks have no place", executor=instance_id, queue=row.queue[:100])
            return
        life = Incarnation(instance_id, offset if row.incarnation < 0 else row.incarnation)
        for older in row.ended[:MAX_ENDED]:
            self._end(Incarnation(instance_id, older.incarnation), older.evidence[:MAX_EVIDENCE])
        if row.state == "gone":
            self._end(life, "it said farewell")
        if life not in self.ended:
            self._heard_ms[life] = self._monotonic_ms()
            self._suspects.pop(life, None)
        current = self.by_id.get(instance_id)
        if current is None or current.life.incarnation <= life.incarnation:
            # An older life may go on beating under the same name: it keeps its lease, but it is given nothing new.
            if life in self.ended:
                self.by_id.pop(instance_id, None)
            else:
                is_heard = self._is_listening or self._is_recent(row)
                self.by_id[instance_id] = Executor(row, life, is_heard=is_heard)
        self._sort()

    def _is_recent(self, row: Instance) -> bool:
        """Tell whether a line that was there before us is no older than a lease, by the clocks of both machines."""
        return abs(self._wall_ms() - row.at_ms) <= self._lease_ms

    def listen(self) -> None:
        """From now on every record is news: what was taken so far is only what the table held.

        An executor that died without a farewell leaves its last line there for ever. It has a full lease to be heard of
        before what it holds is given up; but new work goes only to who was heard, or whose line is fresh.
        """
        self._is_listening = True

    def _end(self, life: Incarnation, reason: str) -> None:
        if life == OUTSIDE:
            return  # a record of `instances` that says so is none of ours
        self.ended.setdefault(life, reason)
        self._heard_ms.pop(life, None)
        self._suspects.pop(life, None)

    def _sort(self) -> None:
        ready = [
            executor
            for executor in self.by_id.values()
            if executor.row.state == "ready" and executor.is_heard and not self._is_paused(executor.queue)
        ]
        self._by_life = {executor.life: executor for executor in ready}
        self._ready = {}
        for executor in ready:
            self._ready.setdefault(executor.queue, []).append(executor)
        self._offers = {
            (executor.queue, name)
            for executor in self.by_id.values()
            if executor.row.state == "ready" and executor.is_heard
            for name in executor.functions
        }

    def watch(self, lives: Iterable[Incarnation]) -> None:
        """Begin a full lease for lives that hold attempts but were never heard of here (after a take-over)."""
        now_ms = self._monotonic_ms()
        for life in lives:
            if life not in self.ended and life != OUTSIDE:
                self._heard_ms.setdefault(life, now_ms)

    def expire(self, table_version: int, unread: int = 0) -> None:
        """End the lives whose lease ran out, once everything that they may have written before was read.

        unread: up to where records of the table may have been compacted away that this gate has not read. Then nobody was
        silent for certain: of two lives under one instance id compaction keeps the last beat of one alone. So every lease
        begins anew, as after a take-over.
        """
        now_ms = self._monotonic_ms()
        if unread > self._unread:
            self._unread = unread
            self._heard_ms = dict.fromkeys(self._heard_ms, now_ms)
            self._suspects.clear()
        for life, heard_ms in list(self._heard_ms.items()):
            if now_ms - heard_ms <= self._lease_ms:
                continue
            if life not in self._suspects:
                self._suspects[life] = self._table_end()
            if table_version >= self._suspects[life]:
                self._end(life, f"no heartbeat for {self._lease_ms} ms")
                current = self.by_id.get(life.instance_id)
                if current is not None and current.life == life:
                    del self.by_id[life.instance_id]
                    self._sort()

    def ready_by_queue(self) -> dict[str, int]:
        """Return how many executors may be given work, by queue."""
        return {queue: len(executors) for queue, executors in self._ready.items()}

    def free_slots(self, ledgers: Mapping[int, Ledger]) -> FreeSlots:
        """Return the free slots of everybody who is ready: slots, less what our ledgers placed there, less what others did."""
        return FreeSlots(self._ready, self._by_life, ledgers, self._offers, self._is_paused)


class FreeSlots:
    """Free slots, counted down while one decision places several attempts."""

    __slots__ = ("_by_life", "_free", "_ledgers", "_offers", "_ready", "is_paused")

    def __init__(
        self,
        ready: Mapping[str, list[Executor]],
        by_life: Mapping[Incarnation, Executor],
        ledgers: Mapping[int, Ledger],
        offers: Set[tuple[str, str]] = frozenset(),
        is_paused: Callable[[str], bool] = lambda queue: False,
    ) -> None:
        self.is_paused = is_paused
        self._offers = offers
        self._ready = ready
        self._by_life = by_life
        self._ledgers = ledgers
        self._free: dict[Incarnation, int] = {}

    def _of(self, executor: Executor) -> int:
        free = self._free.get(executor.life)
        if free is None:
            free, life = executor.slots, executor.life
            for ledger in self._ledgers.values():
                held = ledger.held_by.get(life)
                if held is not None:
                    free -= len(held)
            for partition, count in executor.running.items():
                if partition not in self._ledgers:
                    free -= count
            self._free[executor.life] = free
        return free

    def give_back(self, life: Incarnation) -> None:
        """Count a slot that an attempt ended in this decision leaves."""
        executor = self._by_life.get(life)
        if executor is not None:
            self._free[life] = self._of(executor) + 1

    def by_queue(self) -> dict[str, int]:
        """Return how many slots are free, by queue."""
        return {queue: sum(max(0, self._of(one)) for one in ready) for queue, ready in self._ready.items()}

    def has_room(self) -> bool:
        """Tell whether any executor has a free slot."""
        return any(self._of(executor) > 0 for executor in self._by_life.values())

    def lines_with_room(self, lines: Mapping[tuple[str, str], object]) -> set[tuple[str, str]]:
        """Return those of the lines (queue, function) that an executor with a free slot works off, or that need none."""
        found: set[tuple[str, str]] = set()
        if OUTSIDE_LINE in lines and not self.is_paused(OUTSIDE_LINE[0]):
            found.add(OUTSIDE_LINE)
        for executor in self._by_life.values():
            if self._of(executor) > 0:
                few, many = (executor.lines, lines) if len(executor.lines) < len(lines) else (lines, executor.lines)
                found.update(name for name in few if name in many)
        return found

    def left(self, queue: str, kind: str, function: str) -> int:
        """Return how many slots are free for a function."""
        return sum(
            max(0, self._of(executor)) for executor in self._ready.get(queue, ()) if executor.offers(kind, function)
        )

    def offered(self, queue: str, kind: str, function: str) -> bool:
        """Tell whether any executor offers the function, be it full or its queue paused."""
        return (queue, f"{kind}:{function}") in self._offers

    def slots_of(self, queue: str) -> int:
        """Return how many slots, free or not, the executors of a queue have."""
        return sum(executor.slots for executor in self._ready.get(queue, ()))

    def take(
        self,
        queue: str,
        kind: str,
        function: str,
        *,
        prefer: Sequence[str] = (),
        only: str = "",
        accepts: Callable[[str], bool] | None = None,
    ) -> Executor | None:
        """Return an executor with a free slot that offers the function, and take the slot; None if there is none.

        The first of the preferred instances that can, else the one with the most free slots. only: no other instance will do.
        accepts: asked for each that could, with its id.
        """
        best: Executor | None = None
        best_wish = 0
        for executor in self._ready.get(queue, ()):
            instance_id = executor.life.instance_id
            free = self._of(executor)
            if free <= 0 or not executor.offers(kind, function) or (only and instance_id != only):
                continue
            if accepts is not None and not accepts(instance_id):
                continue
            wish = -prefer.index(instance_id) if instance_id in prefer else -len(prefer)
            if best is None or (wish, free, best.life.instance_id) > (best_wish, self._of(best), instance_id):
                best, best_wish = executor, wish
        if best is not None:
            self._free[best.life] -= 1
        return best
