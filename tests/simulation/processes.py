"""The simulated processes that own logs, admit requests and project: the real services, one turn at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from simulation.wires import GroupSubscription, ProcessBroker
from tidegate.eventlog.memory import MemoryWriter
from tidegate.eventlog.owner import OwnerLoop
from tidegate.failpoints import failpoint
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine
from tidegate.projection import rows
from tidegate.projection.inserter import Batch
from tidegate.projection.service import TOPICS as PROJECTED
from tidegate.projection.service import Limits, Projection
from tidegate.scheduler.admission import Admission
from tidegate.scheduler.service import SchedulerMachine
from tidegate.scheduler.settings import SchedulerSettings

if TYPE_CHECKING:
    from simulation.world import World

MAX_REQUEST_BYTES = 4096


class Life:
    """One life of a process: from its start to its end, whatever ends it. What it remembers ends with it.

    frozen_until_ms: stopped (SIGSTOP) until then. suspended_ms: for how long its machine slept, which CLOCK_MONOTONIC does
    not count. wall_offset_ms: how far its wall clock is off.
    """

    service: ClassVar[str]

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.number = world.next_life()
        self.is_dead = False
        self.is_inside = (
            0  # how many of its turns are under way: more than none while it is stopped in the middle of one
        )
        self.is_cut_off = False
        self.frozen_until_ms = 0
        self.suspended_ms = 0
        self.wall_offset_ms = 0
        self.host = f"host-{self.number % 3}"
        self.writers: list[MemoryWriter] = []
        self.memberships: list[tuple[str, str]] = []
        self.broker = ProcessBroker(world.broker, self)

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"

    # -- clocks -------------------------------------------------------------------------

    def wall_ms(self) -> int:
        return self.world.now_ms + self.wall_offset_ms

    def boottime_s(self) -> float:
        return self.world.now_ms / 1000

    def monotonic_s(self) -> float:
        return (self.world.now_ms - self.suspended_ms) / 1000

    # -- wires --------------------------------------------------------------------------

    def edge(self, name: str) -> None:
        self.world.edge(self, name)

    def may_fail(self, writer: MemoryWriter) -> None:
        self.world.may_fail(self, writer)

    def joined(self, group: str, instance_id: str) -> None:
        self.memberships.append((group, instance_id))
        self.world.seen_in_group(group, instance_id)

    # -- work ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start; may raise what a real start raises, and ends the life then."""

    def turn(self) -> None:
        """Do a little of what the process does."""

    def drain(self) -> None:
        """SIGTERM: end in order. The life is over afterwards, or ends itself later."""
        self.world.end(self, "stopped")


class OwnerLife(Life):
    """A scheduler or a gate."""

    loop: OwnerLoop

    def machine(self) -> Any:
        raise AssertionError

    def start(self) -> None:
        self.loop = OwnerLoop(
            self.broker,
            self.machine(),
            self.name,
            clock_ms=self.wall_ms,
            monotonic_s=self.monotonic_s,
            **self.world.owner_options(self),
        )
        self.loop.start()

    def turn(self) -> None:
        self.loop.run_once(0.0)

    def drain(self) -> None:
        self.loop.close()
        super().drain()


class SchedulerLife(OwnerLife):
    service = "scheduler"

    def machine(self) -> SchedulerMachine:
        return SchedulerMachine(self.world.run_partitions, self.world.account_partitions)


class GateLife(OwnerLife):
    service = "gate"

    def machine(self) -> GateMachine:
        executors = Executors(
            self.world.lease_ms,
            lambda: int(self.monotonic_s() * 1000),
            lambda: self.broker.offsets("instances", 0).end,
            wall_ms=self.wall_ms,
            task_partitions=lambda queue: self.world.topics.get(f"step-tasks.{queue}", 0),
        )
        return GateMachine(self.world.run_partitions, self.world.account_partitions, executors)


class AdmissionLife(Life):
    service = "admission"

    def start(self) -> None:
        settings = SchedulerSettings(max_request_bytes=MAX_REQUEST_BYTES)
        self.admission = Admission(self.broker, self, settings, self.world.run_partitions, self.name)  # type: ignore[arg-type] # see `subscription`

    @staticmethod
    def subscription(
        life: AdmissionLife, group: str, topics: list[str], instance_id: str, **_: object
    ) -> GroupSubscription:
        """Stand in for KafkaSubscription, whose first argument is the way to the broker."""
        return GroupSubscription(life.broker, group, topics, instance_id)

    def turn(self) -> None:
        self.admission.run_once()

    def drain(self) -> None:
        self.admission.close()
        super().drain()


KEYS: dict[str, tuple[tuple[int, ...], int]] = {  # table -> (columns that it is ordered by, its version column)
    rows.EVENTS: ((0, 1), 3),
    rows.LEDGER: ((0, 1), 2),
    rows.INSTANCES: ((0,), 1),
    rows.DEAD_LETTERS: ((0, 1, 2), 3),
    rows.UNREADABLE: ((0, 1, 2), 2),
}


class ModelStore:
    """The fact tables as ReplacingMergeTree shows them with FINAL: of rows with one key, the one with the highest version."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[tuple[Any, ...], rows.Row]] = {name: {} for name in KEYS}

    def insert(self, table: str, found: list[rows.Row]) -> None:
        if table == rows.FRESHNESS:
            return
        key_columns, version = KEYS[table]
        for row in found:
            key = tuple(row[column] for column in key_columns)
            known = self.tables[table].get(key)
            if known is None or row[version] >= known[version]:
                self.tables[table][key] = row


class ModelInserter:
    """What `inserter.Inserter` is, without its thread: `work` is a turn of that thread."""

    failing = ""

    def __init__(self, life: ProjectionLife) -> None:
        self._life = life
        self._batch: Batch | None = None
        self._done: Batch | None = None

    @property
    def is_idle(self) -> bool:
        return self._batch is None and self._done is None

    def submit(self, batch: Batch) -> None:
        self._batch = batch

    def take_done(self) -> Batch | None:
        done, self._done = self._done, None
        return done

    def wait(self, _timeout_s: float) -> bool:
        self.work()
        return self._batch is None

    def stop(self, timeout_s: float) -> bool:
        return self.wait(timeout_s)

    def work(self) -> None:
        if self._batch is None:
            return
        failpoint("projection.before-insert")
        for table, found in self._batch.tables.items():
            self._life.world.judge.projected(table, found)
            self._life.store.insert(table, found)
            failpoint("projection.between-tables")
        failpoint("projection.after-insert")
        self._batch, self._done = None, self._batch


class ProjectionLife(Life):
    service = "projection"
    group = "tidegate-projection"

    @property
    def store(self) -> ModelStore:
        return self.world.store

    def start(self) -> None:
        self.inserter = ModelInserter(self)
        self.projection = Projection(
            GroupSubscription(self.broker, self.group, PROJECTED, self.name),
            self.broker,
            self.inserter,  # type: ignore[arg-type] # has what the projection uses of it
            Limits(flush_s=0.2, batch_rows=50, batch_bytes=100_000),
            clock_ms=self.wall_ms,
            monotonic_s=self.monotonic_s,
            sleep=lambda _: None,
        )

    def turn(self) -> None:
        if self.world.rng.random() < 0.5:
            self.inserter.work()
        else:
            self.projection.run_once()

    def is_behind(self) -> bool:
        """Tell whether there is something that it has not inserted and committed."""
        broker = self.world.broker
        return any(
            broker.committed(f"{self.group}:{topic}").get(partition, 0) < broker.offsets(topic, partition).end
            for topic in PROJECTED
            for partition in range(self.world.topics[topic])
        )

    def drain(self) -> None:
        self.projection.close()
        super().drain()


class RebuildLife(ProjectionLife):
    """A projection that begins anew, into tables of its own."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.group = f"rebuild-{self.number}"
        self._store = ModelStore()

    @property
    def store(self) -> ModelStore:
        return self._store
