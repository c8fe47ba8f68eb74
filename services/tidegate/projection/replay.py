"""Rebuilding the tables from the log beside the running projection, and putting them in place without a gap.

1. prepare   a database of its own, the shadow, gets the same tables by the same migrations
2. fill      a reader of its own makes rows of the log, from the chosen place up to its end, again until little is left
3. compare   checksums, table by table, over the runs that are over
4. exchange  `EXCHANGE TABLES`, table by table: the new ones are in place, the projection goes on writing to them
5. catch up  what was written since the end of step 2 is read once more, into the tables in place: nothing is missing
6. clean     the shadow, which holds the old tables now, is dropped

Each step can be done again. How far we are is a row of the table `replays`, written after each step and while filling, so a
process that dies goes on where it was. Rows are idempotent: reading some of the log twice changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from tidegate import metrics
from tidegate.eventlog.interface import Broker, EventLogError, Message, TopicPartition
from tidegate.eventlog.kafka.subscription import AssignmentChange
from tidegate.failpoints import failpoint
from tidegate.projection import rows, shadow
from tidegate.projection.inserter import Inserter
from tidegate.projection.service import DEAD_LETTERS, GATE_LEDGER, INSTANCES, RUN_EVENTS, Limits, Projection
from tidegate.projection.store import Store, StoreError

PREPARE, FILL, COMPARE, EXCHANGE, CATCH_UP, CLEAN = "prepare", "fill", "compare", "exchange", "catch up", "clean"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
PLANNED: Final = "planned"
EARLIEST: Final = "earliest"
OVER: Final = frozenset({DONE, FAILED, CANCELLED})
# Until this step nothing that people look at has changed, and a replay can be given up.
BEFORE_EXCHANGE: Final = frozenset({PREPARE, FILL, COMPARE})

TOPIC_OF: Final = {
    rows.EVENTS: RUN_EVENTS,
    rows.LEDGER: GATE_LEDGER,
    rows.INSTANCES: INSTANCES,
    rows.DEAD_LETTERS: DEAD_LETTERS,
}
LITTLE_LEFT: Final = 2_000
MAX_PASSES: Final = 5
SAVE_EVERY_S: Final = 1.0
AGAIN_AFTER_S: Final = 2.0
IDLE_S: Final = 0.02
COMPARE_TIMES: Final = 3

_log = structlog.get_logger()


class ReplayError(RuntimeError):
    """A replay cannot be done, for good; the message says why and what can be done."""


class ReplayRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody asks for.

    start: `earliest`, `time:MS` (Unix milliseconds) or `offset:N` (in every partition of the logs). tables: those to be
    replaced, all if empty. check: only compare, and leave the tables in place. forget_retired: leave out runs that the log
    holds no more; else their rows are taken from the tables in place. dry_run: only say what would be done. by: who asked.
    """

    start: str = "earliest"
    tables: tuple[str, ...] = ()
    check: bool = False
    forget_retired: bool = False
    dry_run: bool = False
    by: str = ""


class Comparison(msgspec.Struct, kw_only=True):
    """What the tables in place and the rebuilt ones hold of the runs that are over, and whether that is the same."""

    table: str
    rows_in_place: int
    rows_rebuilt: int
    equal: bool


class Progress(msgspec.Struct, kw_only=True):
    """A replay as it stands: the row of `replays`. positions: next offset by `topic:partition`, of what is inserted."""

    replay_id: str
    instance_id: str
    request: ReplayRequest
    phase: str = PREPARE
    tables: list[str] = []
    starts: dict[str, int] = {}  # where reading began, if all tables are replaced
    positions: dict[str, int] = {}
    ends: dict[str, int] = {}
    in_place: dict[str, str] = {}  # table -> UUID that it had before the exchange
    rebuilt: dict[str, str] = {}  # table -> UUID of what is filled to take its place; empty if an earlier version began
    comparisons: list[Comparison] = []
    records_done: int = 0
    records_left: int = 0
    reason: str = ""
    started_ms: int = 0
    updated_ms: int = 0
    filling_since_ms: int = 0
    saved: int = 0

    @property
    def is_over(self) -> bool:
        """Tell whether nothing further will happen."""
        return self.phase in OVER


class Parts(NamedTuple):
    """What a replay works with. open_store: a connection to the tables of a database, made if they are not there."""

    broker: Broker
    open_store: Callable[[str], Store]
    database: str
    offset_at: Callable[[TopicPartition, int], int]
    limits: Limits


class GivenUp(Exception):  # noqa: N818 - no error: somebody asked for it
    """The process ends, or somebody cancelled the replay."""


class Replay:
    """One replay, in one thread. `run` returns when it is over, or raises GivenUp when `stop` is set or it is not `ours` any more:
    it can go on later, or elsewhere. Who goes on knows by the tables' UUIDs what whoever had it before has done, or still does."""

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        stop: threading.Event,
        clock_ms: Callable[[], int] | None = None,
        ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.progress = progress
        self.cancel_wanted = False
        self._parts = parts
        self._stop = stop
        self._ours = ours
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._shadow = shadow.name_of(parts.database)
        self._store: Store | None = None

    def run(self) -> None:
        """Do what is left of it. Kafka or ClickHouse away: waits and goes on from what was saved."""
        if self.progress.phase in BEFORE_EXCHANGE and not self.progress.rebuilt:
            self.progress.phase = PREPARE  # an earlier version began it, and did not note what it filled
        try:
            while not self.progress.is_over:
                self._try_step()
        finally:
            metrics.projection_replay.set(-1)
            self._close_store()

    def _try_step(self) -> None:
        try:
            self._step()
        except GivenUp:
            if self._is_leaving:
                raise
        except (EventLogError, StoreError) as error:
            _log.warning("replay: trying again", step=self.progress.phase, error=str(error))
            self._close_store()
            if self._stop.wait(AGAIN_AFTER_S):
                raise GivenUp from error
        except ReplayError as error:
            self._end(FAILED, str(error))

    @property
    def _is_leaving(self) -> bool:
        return self._stop.is_set() or not self._ours()

    def _step(self) -> None:
        if self._is_leaving:
            raise GivenUp
        if self.cancel_wanted and self.progress.phase in BEFORE_EXCHANGE:
            self._drop_shadow()
            self._end(CANCELLED, "somebody asked for it")
            return
        {
            PREPARE: self._prepare,
            FILL: self._fill,
            COMPARE: self._compare,
            EXCHANGE: self._exchange,
            CATCH_UP: self._catch_up,
            CLEAN: self._clean,
        }[self.progress.phase]()

    # -- 1. prepare ---------------------------------------------------------------

    def _prepare(self) -> None:
        """Make an empty shadow, and find out what is to be replaced, and where to read."""
        store, progress, database = self._live(), self.progress, self._parts.database
        self._drop_shadow()
        self._parts.open_store(self._shadow).close()
        sources = self._choose(shadow.lineage(store, self._shadow))
        there = shadow.uuids(store, database)
        made = shadow.uuids(store, self._shadow)
        progress.in_place = {table: there[table] for table in progress.tables}
        progress.rebuilt = {table: made[table] for table in progress.tables}
        if progress.request.start != EARLIEST:
            for source in sorted(sources & {rows.EVENTS, rows.LEDGER}):
                shadow.seed(store, database, self._shadow, source, self._log_positions(TOPIC_OF[source]))
            shadow.copy(store, database, self._shadow, rows.UNREADABLE)
        progress.records_done = 0
        progress.filling_since_ms = self._clock_ms()
        self._go_on(FILL)

    def plan(self) -> Progress:
        """Return what would be read and replaced, and do nothing. Raises ReplayError, StoreError, EventLogError."""
        try:
            self._choose(shadow.lineage(self._live(), self._parts.database))
        finally:
            self._close_store()
        self.progress.phase = PLANNED
        self.progress.ends = {_name(at): end for at, end in self._ends().items()}
        self.progress.records_left = sum(self.progress.ends.values()) - sum(self.progress.positions.values())
        return self.progress

    def _choose(self, lineage: dict[str, set[str]]) -> set[str]:
        """Note which tables are to be replaced and where to begin; returns the fact tables that have to be filled."""
        wanted = sorted(set(self.progress.request.tables)) or sorted(lineage)
        unknown = sorted(set(wanted) - lineage.keys())
        if unknown:
            raise ReplayError(f"no such tables: {', '.join(unknown)}; there are {', '.join(sorted(lineage))}")
        sources = {source for table in wanted for source in lineage[table]}
        if rows.UNREADABLE in sources:
            # Any topic can hold what cannot be read: this table is whole only if all of them are read.
            sources = set(TOPIC_OF)
        self.progress.tables = wanted
        self.progress.positions = self._starts({TOPIC_OF[source] for source in sources})
        self.progress.starts = dict(self.progress.positions) if set(wanted) == lineage.keys() else {}
        return sources

    def _starts(self, topics: set[str]) -> dict[str, int]:
        found = {}
        for topic, described in self._parts.broker.describe(sorted(topics)).items():
            for partition in range(described.partition_count):
                at = TopicPartition(topic, partition)
                there = self._parts.broker.offsets(topic, partition)
                # What is a table in Kafka is small, and its rows do not say which offsets came before.
                start = self._start_of(at) if topic in (RUN_EVENTS, GATE_LEDGER) else there.start
                found[_name(at)] = min(max(start, there.start), there.end)
        return found

    def _start_of(self, at: TopicPartition) -> int:
        kind, _, number = self.progress.request.start.partition(":")
        if kind == "time":
            return self._parts.offset_at(at, int(number))
        return int(number) if kind == "offset" else 0

    def _log_positions(self, topic: str) -> dict[int, int]:
        return {at.partition: offset for at, offset in self._positions().items() if at.topic == topic}

    # -- 2. fill ---------------------------------------------------------------

    def _fill(self) -> None:
        """Read up to the end, and again, until little has been written meanwhile; then take over what the log lacks."""
        for _ in range(MAX_PASSES):
            self._read_to_end(self._shadow)
            if self._left() <= LITTLE_LEFT:
                break
        if not self.progress.request.forget_retired:
            for source in (rows.EVENTS, rows.LEDGER):
                if TOPIC_OF[source] in {at.topic for at in self._positions()}:
                    shadow.carry_over(self._live(), self._parts.database, self._shadow, source)
        self._go_on(COMPARE)

    def _read_to_end(self, database: str) -> None:
        """Make rows of everything up to the present ends of the partitions."""
        self.progress.ends = {_name(at): end for at, end in self._ends().items()}
        reader = _LogReader(self._parts.broker, self._positions(), self._ends())
        inserter = Inserter(lambda: self._parts.open_store(database))
        inserter.start()
        projection = Projection(reader, self._parts.broker, inserter, self._parts.limits, is_shadow=True)
        try:
            while not inserter.wait_opened(IDLE_S):
                self._look_up()
            due_s = 0.0
            while not reader.is_done or projection.has_pending:
                self._look_up()
                projection.run_once()
                if time.monotonic() >= due_s:
                    self._note(reader)
                    due_s = time.monotonic() + SAVE_EVERY_S
                    failpoint("replay.saved")
            reader.committed_all()
            self._note(reader)
        finally:
            projection.close()

    def _look_up(self) -> None:
        if self._is_leaving or (self.cancel_wanted and self.progress.phase in BEFORE_EXCHANGE):
            raise GivenUp

    def _note(self, reader: _LogReader) -> None:
        before = sum(self.progress.positions.values())
        self.progress.positions.update({_name(at): offset for at, offset in reader.committed().items()})
        self.progress.records_done += sum(self.progress.positions.values()) - before
        self.progress.records_left = sum(
            max(0, end - self.progress.positions[name]) for name, end in self.progress.ends.items()
        )
        total = self.progress.records_done + self.progress.records_left
        metrics.projection_replay.set(self.progress.records_done / total if total else 1.0)
        self._save()

    def _ends(self) -> dict[TopicPartition, int]:
        return {at: self._parts.broker.offsets(at.topic, at.partition).end for at in self._positions()}

    def _left(self) -> int:
        return sum(end - self.progress.positions[_name(at)] for at, end in self._ends().items())

    def _positions(self) -> dict[TopicPartition, int]:
        found = {}
        for name, offset in self.progress.positions.items():
            topic, _, partition = name.rpartition(":")
            found[TopicPartition(topic, int(partition))] = offset
        return found

    # -- 3. compare ---------------------------------------------------------------

    def _compare(self) -> None:
        """Compare, a few times if something differs: the tables in place may be a moment behind."""
        failpoint("replay.compare")
        for attempt in range(COMPARE_TIMES):
            if attempt and self._stop.wait(AGAIN_AFTER_S):
                raise GivenUp
            found = shadow.compare(self._live(), self._parts.database, self._shadow, self.progress.tables)
            self.progress.comparisons = [
                Comparison(table=table, rows_in_place=old, rows_rebuilt=new, equal=equal)
                for table, old, new, equal in found
            ]
            if all(one.equal for one in self.progress.comparisons):
                break
        for one in self.progress.comparisons:
            level = _log.info if one.equal else _log.warning
            level("replay: compared", table=one.table, equal=one.equal, old=one.rows_in_place, new=one.rows_rebuilt)
        self._go_on(CLEAN if self.progress.request.check else EXCHANGE)

    # -- 4. exchange, 5. catch up, 6. clean ---------------------------------------------------------------

    def _exchange(self) -> None:
        """Exchange the tables that still have the UUID which they had before, for those that were filled to replace them."""
        store, database, progress = self._live(), self._parts.database, self.progress
        for table in progress.tables:
            self._look_up()
            if shadow.uuids(store, database)[table] == progress.in_place[table]:
                made = shadow.uuids(store, self._shadow).get(table)
                if progress.rebuilt and made != progress.rebuilt[table]:
                    _log.warning("replay: the shadow is another one than was filled, beginning again", table=table)
                    self._go_on(PREPARE)
                    return
                shadow.exchange(store, database, self._shadow, table)
                failpoint("replay.between-exchanges")
        self._go_on(CATCH_UP)

    def _catch_up(self) -> None:
        """Read what was written since: before the exchange its rows went to the old tables."""
        failpoint("replay.catch-up")
        self._read_to_end(self._parts.database)
        self._note_whole()
        self._go_on(CLEAN)

    def _note_whole(self) -> None:
        """Write down what the tables lack no more: all that was read, where nothing was missing before it."""
        store, found = self._live(), {}
        known = store.whole_to()
        for at, offset in self._positions().items():
            start = self.progress.starts.get(_name(at))
            if start is not None:
                reach = rows.Reach(start, self._parts.broker.offsets(at.topic, at.partition).start)
                found[at] = reach.whole_to(known.get(at, 0), offset)
        store.note_whole(found)

    def _clean(self) -> None:
        """Drop the shadow, once it holds no table that belongs into place: somebody may have exchanged one back."""
        if not self.progress.request.check:
            there = shadow.uuids(self._live(), self._parts.database)
            if any(there[table] == uuid for table, uuid in self.progress.in_place.items()):
                self._go_on(EXCHANGE)
                return
        self._drop_shadow()
        self._end(DONE, "")

    def _drop_shadow(self) -> None:
        shadow.drop(self._live(), self._shadow)

    # -- keeping track ---------------------------------------------------------------

    def _live(self) -> Store:
        if self._store is None:
            self._store = self._parts.open_store(self._parts.database)
        return self._store

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _go_on(self, phase: str) -> None:
        self.progress.phase = phase
        _log.info("replay", step=phase, replay_id=self.progress.replay_id, records=self.progress.records_done)
        self._save()

    def _end(self, phase: str, reason: str) -> None:
        self.progress.reason = reason
        self._go_on(phase)

    def fail(self, reason: str) -> None:
        """End it, and write that down if that is still possible. Blocks while ClickHouse is asked. Does not raise."""
        try:
            self._end(FAILED, reason)
        except StoreError as error:
            _log.warning("replay: how it ended is not written down", error=str(error))
        self._close_store()

    def _save(self) -> None:
        self.progress.updated_ms = self._clock_ms()
        self.progress.saved += 1
        save(self._live(), self.progress)


class _LogReader:
    """The log from given positions to given ends, partition by partition, as the projection's subscription."""

    def __init__(self, broker: Broker, positions: dict[TopicPartition, int], ends: dict[TopicPartition, int]) -> None:
        self._broker = broker
        self._positions = dict(positions)
        self._ends = ends
        self._waiting = [at for at, offset in sorted(positions.items()) if offset < ends[at]]
        self._reading: Iterator[Message] | None = None
        self._is_new = True

    @property
    def is_done(self) -> bool:
        """Tell whether everything was handed over."""
        return not self._waiting and self._reading is None

    @property
    def assigned(self) -> frozenset[TopicPartition]:
        return frozenset(self._positions)

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return the next records. Blocks while the broker is asked, and for a moment when there is nothing left."""
        while self._reading is not None or self._waiting:
            if self._reading is None:
                at = self._waiting.pop(0)
                self._reading = self._broker.read(at.topic, at.partition, self._positions[at], self._ends[at])
            messages = list(islice(self._reading, max_messages))
            if len(messages) < max_messages:
                self._reading = None
            if messages:
                return messages
        time.sleep(min(timeout_s, IDLE_S))
        return []

    def committed_all(self) -> None:
        """Everything up to the ends is inserted, though compaction may have left no record right before them."""
        self._positions.update(self._ends)

    @property
    def has_share(self) -> bool:
        """There is no group."""
        return True

    def take_changes(self) -> AssignmentChange:
        gained, self._is_new = (dict(self._positions) if self._is_new else {}), False
        return AssignmentChange(gained, frozenset())

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        self._positions.update(positions)

    def committed(self) -> dict[TopicPartition, int]:
        return dict(self._positions)

    def ends(self) -> dict[TopicPartition, int]:
        return self._ends

    def pause(self) -> None:
        """Nothing is read ahead."""

    def resume(self) -> None:
        """Nothing was."""

    def close(self) -> None:
        self._reading, self._waiting = None, []


def save(store: Store, progress: Progress) -> None:
    """Write how a replay stands. Raises StoreError."""
    body = msgspec.json.encode(progress).decode()
    store.insert_one(
        shadow.REPLAYS,
        ("replay_id", "saved", "at_ms", "instance_id", "phase", "body"),
        (progress.replay_id, progress.saved, progress.updated_ms, progress.instance_id, progress.phase, body),
    )


def load_all(store: Store) -> list[Progress]:
    """Return every replay that was ever asked for, the latest last. Raises StoreError."""
    if not store.rows(f"EXISTS TABLE {shadow.REPLAYS}")[0][0]:
        return []
    found: list[Any] = store.rows(f"SELECT body FROM {shadow.REPLAYS} FINAL")  # noqa: S608 - a name of ours
    return sorted((msgspec.json.decode(row[0], type=Progress) for row in found), key=lambda one: one.started_ms)


def _name(at: TopicPartition) -> str:
    return f"{at.topic}:{at.partition}"
