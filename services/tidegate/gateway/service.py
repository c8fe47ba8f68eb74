"""The live view, kept: consumes `run-events`, folds, writes the changed rows to the changelog, then acknowledges."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Final, cast

import structlog
from faust import Stream
from faust.types import TP, EventT, StreamT

from tidegate import codec, metrics
from tidegate.domain.identity import is_run_id, partition_of
from tidegate.eventlog.epochs import epoch_before
from tidegate.eventlog.interface import Broker, EventLogError, Offsets
from tidegate.eventlog.schemas import looking_up
from tidegate.failpoints import failpoint
from tidegate.gateway.changelog import Changelogs
from tidegate.gateway.faust_app import GATEWAY_RUNS, RUN_EVENTS, TABLES, GatewayApp, ViewTable, ViewTables
from tidegate.gateway.figures import Tally, partition_of_tally
from tidegate.gateway.view import Changed, LiveView, PartitionReader, RunRow

SCHEMAS: Final = "schemas"
MAX_BATCH: Final = 1000
# How long a lone entry may wait for others. Faust looks as often as that whether there is anything.
BATCH_WITHIN_S: Final = 0.1
EVICT_EVERY_S: Final = 60.0
# After so long without a record the view reads by itself what it waits for.
SILENCE_S: Final = 5.0
STANDBY_EVERY_S: Final = 2.0
MAX_WAITERS: Final = 1000

Event = EventT[bytes | None]
Record = Any  # with partition, offset and value: a message of Faust's, or one that we read ourselves
_log = structlog.get_logger()


class Counters:
    """What happened since the start."""

    def __init__(self) -> None:
        self.entries = 0
        self.known = 0
        self.void = 0
        self.unreadable = 0


class Gateway:
    """The view of the partitions that are ours. Everything runs on the event loop; only `broker` calls use threads.

    `view` may be read between any two awaits. Reads of runs in partitions that are not `owned` mean nothing.
    """

    def __init__(
        self,
        app: GatewayApp,
        tables: ViewTables,
        broker: Broker,
        committed: Callable[[], Mapping[int, int]],
        *,
        prefix: str,
        log: str,
        partition_count: int,
        keep_minutes: int,
    ) -> None:
        """Wire the parts into the app; nothing is started. `committed` returns how far our group is, by partition; may block.

        log: the id of the topic `run-events`.
        """
        self.app = app
        self.view = LiveView(log=log, keep_minutes=keep_minutes)
        self.counters = Counters()
        self._counted = Counters()
        self.owned: frozenset[int] = frozenset()
        self.partition_count = partition_count
        self._tables = tables
        self.changelogs = Changelogs(broker, tables)
        self._broker = broker
        self._committed = committed
        self._prefix = prefix
        self._log_id = log
        self._keep_minutes = keep_minutes
        self._readers: dict[int, PartitionReader] = {}
        self._begins: dict[int, int] = {}
        self._targets: dict[int, Offsets] = {}
        self._generation = 0
        self._is_restored = False
        self._has_caught_up = False
        self._unassigned_since_s: float | None = time.monotonic()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._decoded = looking_up(broker, PartitionReader.take)
        self._handling = asyncio.Lock()  # what is folded, and when, is decided by one at a time
        self._still_since_s = time.monotonic()
        topic = app.topic(prefix + RUN_EVENTS, key_serializer="raw", value_serializer="raw", allow_empty=True)
        app.agent(topic, name=RUN_EVENTS, concurrency=1)(self._consume)
        app.on_partitions_revoked.connect(self._revoked, weak=False)
        app.on_partitions_assigned.connect(self._assigned, weak=False)
        tables.runs.on_recover(self._recovered)

    # -- who owns what -------------------------------------------------------------------

    def partition_of(self, run_id: str) -> int:
        """Return the partition of a run."""
        return partition_of(run_id, self.partition_count)

    def peers(self) -> dict[int, str]:
        """Return the address of the gateway that owns each partition, as the group last agreed."""
        changelog = self._prefix + GATEWAY_RUNS
        return {
            partition: str(url)
            for url, topics in self.app.router.table_metadata(GATEWAY_RUNS).items()
            for partition in topics.get(changelog, ())
        }

    async def _revoked(self, *_: Any, **__: Any) -> None:
        """The group gives out its partitions afresh: nothing is ours until `_recovered`."""
        self._generation += 1
        self._is_restored = self._has_caught_up = False
        self._unassigned_since_s = time.monotonic()
        self.owned = frozenset()
        self._readers.clear()

    async def _recovered(self) -> None:
        """The tables hold what the changelogs say of our partitions, gaps of Faust's reading apart: make the view of them."""
        is_current = self._until_given_out_afresh()
        owned = self._assigned_to_us(self.app.assignor.assigned_actives())
        failpoint("gateway.after-restore")
        try:
            mended = await self.changelogs.read_on(owned, is_current)
            begins = await asyncio.to_thread(self._committed)
            targets = await asyncio.to_thread(self._ends, owned)
        except EventLogError as error:
            await self.app.crash(error)
            return
        if not is_current():
            return
        rows = [row for row in self._tables.runs.values() if self.partition_of(row.run_id) in owned]
        tallies = [tally for key, tally in self._tables.figures.items() if partition_of_tally(key) in owned]
        self.view = LiveView(rows, tallies, log=self._log_id, keep_minutes=self._keep_minutes)
        self._begins = {partition: max(there.start, begins.get(partition, 0)) for partition, there in targets.items()}
        self._targets, self.owned, self._is_restored = targets, owned, True
        self._still_since_s = time.monotonic()
        _log.info("restored", partitions=sorted(owned), runs=len(rows), by_faust=self.changelog_records, mended=mended)

    @property
    def changelog_records(self) -> int:
        """How many records of changelogs Faust has read since the start: what was not kept when partitions moved."""
        return sum(table.changelog_records for table in self._tables)

    async def keep_standby_forever(self) -> None:
        """Fill the gaps that Faust leaves in what we have of partitions that we stand by for."""
        while True:
            await asyncio.sleep(STANDBY_EVERY_S)
            if not self._is_restored:
                continue
            try:
                await self.changelogs.read_on(self.standby, self._until_given_out_afresh())
            except EventLogError as error:
                _log.warning("standby: trying again", error=str(error))

    def _until_given_out_afresh(self) -> Callable[[], bool]:
        """Return what tells whether the group has given out no partitions since now."""
        generation = self._generation

        def is_current() -> bool:
            return generation == self._generation

        return is_current

    def _assigned_to_us(self, assigned: Iterable[TP]) -> frozenset[int]:
        """Return the partitions of which both changelogs are among the assigned ones."""
        changelogs = {self._prefix + name for name in TABLES}
        found = {tp for tp in assigned if tp.topic in changelogs}
        return frozenset(tp.partition for tp in found if all(TP(name, tp.partition) in found for name in changelogs))

    @property
    def standby(self) -> frozenset[int]:
        """The partitions of which we keep a copy for another gateway."""
        return self._assigned_to_us(self.app.assignor.assigned_standbys())

    def _ends(self, owned: frozenset[int]) -> dict[int, Offsets]:
        return {partition: self._broker.offsets(RUN_EVENTS, partition) for partition in owned}

    @property
    def is_ready(self) -> bool:
        """Tell whether the view is complete as of the time when the partitions became ours."""
        self._has_caught_up = self._has_caught_up or self.lag() == 0
        return self._has_caught_up

    def why_not_ready(self) -> str:
        """Return what is missing until the view is complete; empty if nothing is. Any thread may ask."""
        if self._has_caught_up:
            return ""
        return "the changelog is being read" if not self._is_restored else "the log is being read up to its end"

    def measure(self) -> None:
        """Set the gauges and hand over what was counted. Belongs to the event loop."""
        counters, seen = self.counters, self._counted
        metrics.gateway_entries.inc(counters.entries - seen.entries)
        metrics.gateway_known.inc(counters.known - seen.known)
        metrics.gateway_void.inc(counters.void - seen.void)
        metrics.gateway_unreadable.inc(counters.unreadable - seen.unreadable)
        self._counted = copy.copy(counters)
        metrics.gateway_runs.set(len(self.view.rows))
        metrics.gateway_tallies.set(len(self.view.tallies.rows))
        metrics.gateway_standby_partitions.set(len(self.standby))
        metrics.gateway_partitions.set(len(self.owned))
        metrics.gateway_restore_lag.set(self.lag() or 0)

    @property
    def unassigned_s(self) -> float | None:
        """Return for how long the group has given us nothing, not even an empty share; None if it has."""
        return None if self._unassigned_since_s is None else time.monotonic() - self._unassigned_since_s

    async def _assigned(self, *_: Any, **__: Any) -> None:
        self._unassigned_since_s = None

    def lag(self) -> int | None:
        """Return how many records are left of those that were there when the table was restored; None before that."""
        if not self._is_restored:
            return None
        return sum(max(0, there.end - self._position(partition)) for partition, there in self._targets.items())

    def _position(self, partition: int) -> int:
        """Return the offset of a partition that comes next: in the beginning, what the group has committed."""
        reader = self._readers.get(partition)
        return self._begins[partition] if reader is None else reader.next_offset

    # -- 1. consume ------------------------------------------------------------------------

    async def _consume(self, stream: StreamT[Any]) -> None:
        """Handle batches until the stream ends. Whatever goes wrong ends the process: state is never repaired."""
        try:
            async for events in _batches(stream):
                async with self._handling:
                    done = await self._handle(events)
                for event in done:
                    await stream.ack(event)
                failpoint("gateway.after-acks")
        except asyncio.CancelledError:
            raise
        except Exception as error:
            await self.app.crash(error)

    async def _handle(self, events: list[Event]) -> list[Event]:
        """Fold a batch; return the events that are done.

        1. Read what Faust passed over, and find out which epoch is in force where a partition begins to be read. 2. Fold,
        without letting anything else run. 3. Send the changed rows. 4. Wait until all of them are acknowledged. Only then are
        the events (by the caller), so that what Faust commits never runs ahead of the changelog.
        """
        events = [event for event in events if event.message.partition in self.owned]
        generation = self._generation
        records = await self._without_gaps([event.message for event in events])
        return events if await self._fold(records, generation) else []

    async def _fold(self, records: list[Record], generation: int) -> bool:
        """Fold records of our partitions, as `_handle` says; False if they are given out afresh, and all is read again."""
        await self._find_epochs(records)
        if generation != self._generation:
            return False
        failpoint("gateway.before-fold")
        self._still_since_s = time.monotonic()
        rows: dict[str, RunRow] = {}
        tallies: dict[str, Tally] = {}
        for record in records:
            changed = self._take(record)
            if changed is not None:
                if changed.row is not None:
                    rows[changed.row.run_id] = changed.row
                tallies |= {tally.key: tally for tally in changed.tallies}
        for run_id, row in rows.items():
            self._tables.runs[run_id] = row
        for key, tally in tallies.items():
            self._tables.figures[key] = tally
        failpoint("gateway.before-changelog-acks")
        await self._acknowledged()
        failpoint("gateway.after-changelog-acks")
        self._wake(rows)
        return True

    async def read_the_rest(self) -> None:
        """Read what is missing until the view is complete, if Faust has not handed anything over for a while.

        It may pass over the last records of a partition, too (see `_without_gaps`): if nothing is written behind them, nothing
        would ever show that they are missing. Raises EventLogError.
        """
        if self.is_ready or not self._is_restored or time.monotonic() - self._still_since_s < SILENCE_S:
            return
        async with self._handling:
            generation = self._generation
            self._still_since_s = time.monotonic()
            for partition, there in self._targets.items():
                begin = self._position(partition)
                if begin < there.end:
                    records = await asyncio.to_thread(self._read, partition, begin, there.end)
                    _log.warning("Faust is silent: read here", partition=partition, begin=begin, records=len(records))
                    if not await self._fold(records, generation):
                        return
                    if partition in self._readers:
                        self._readers[partition].next_offset = there.end  # compaction may have taken what was last
                    else:
                        self._begins[partition] = there.end

    async def _acknowledged(self) -> None:
        """Wait until the changelogs have everything that was sent to them."""
        for table in self._tables:
            sent, table.unacknowledged = table.unacknowledged, []
            await asyncio.gather(*sent)

    async def _without_gaps(self, given: list[Record]) -> list[Record]:
        """Return the records, and those in between that the log has and Faust did not give us.

        When it begins to read a partition, Faust may lose what it has fetched and not handed over, and go on behind that
        without a word. Where offsets are missing for a good reason (compaction), reading finds nothing.
        """
        partitions: dict[int, list[Record]] = {}
        for record in given:
            partitions.setdefault(record.partition, []).append(record)
        for partition, records in partitions.items():
            begin = min(records[0].offset, self._position(partition))
            if _has_gap(begin, records):
                end = max(record.offset for record in records) + 1
                partitions[partition] = await asyncio.to_thread(self._read, partition, begin, end)
                missing = len(partitions[partition]) - len(records)
                if missing:
                    _log.warning(
                        "Faust passed over records", partition=partition, begin=begin, end=end, records=missing
                    )
        return list(itertools.chain.from_iterable(partitions.values()))

    def _read(self, partition: int, begin: int, end: int) -> list[Record]:
        return list(self._broker.read(RUN_EVENTS, partition, begin, end))

    async def _find_epochs(self, records: list[Record]) -> None:
        """Make a reader for each partition that begins here or is read again; looks back in the log for its epoch."""
        first: dict[int, int] = {}
        for record in records:
            first.setdefault(record.partition, record.offset)
        for partition, offset in first.items():
            reader = self._readers.get(partition)
            if reader is not None and offset >= reader.next_offset:
                continue
            epoch = await asyncio.to_thread(epoch_before, self._broker, RUN_EVENTS, partition, offset)
            self._readers[partition] = PartitionReader(offset, epoch)
            _log.info("reading", partition=partition, offset=offset, epoch=epoch)

    # -- 2. fold ---------------------------------------------------------------------------

    def _take(self, message: Record) -> Changed | None:
        """Return what a record changed; None if it is no entry that counts."""
        reader = self._readers[message.partition]
        void_before = reader.void_count
        try:
            entry = self._decoded(reader, message.offset, message.value)
        except codec.DecodeError as error:
            self.counters.unreadable += 1
            _log.error("record skipped", partition=message.partition, offset=message.offset, reason=str(error))
            return None
        if entry is not None and not (
            is_run_id(entry.subject) and self.partition_of(entry.subject) == message.partition
        ):
            self.counters.unreadable += 1
            _log.error("entry skipped: no run of here", partition=message.partition, offset=message.offset)
            return None
        self.counters.void += reader.void_count - void_before
        if entry is None:
            return None
        self.counters.entries += 1
        changed = self.view.take(entry, message.partition, message.offset)
        if changed.row is None and not changed.tallies:
            self.counters.known += 1
        return changed

    # -- waiting for changes, forgetting ---------------------------------------------------------

    async def changed(self, run_id: str, after_seq: int, timeout_s: float) -> None:
        """Return when the run's row is past a seq, or after the time. Returns at once if too many wait already."""
        if sum(map(len, self._waiters.values())) >= MAX_WAITERS:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._is_past(run_id, after_seq):
                    await self._next_change(run_id)

    def _is_past(self, run_id: str, seq: int) -> bool:
        row = self.view.rows.get(run_id)
        return row is not None and row.seq > seq

    async def _next_change(self, run_id: str) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(run_id, set()).add(future)
        try:
            await future
        finally:
            waiters = self._waiters.get(run_id, set())
            waiters.discard(future)
            if not waiters:
                self._waiters.pop(run_id, None)

    def _wake(self, changed: dict[str, RunRow]) -> None:
        for run_id in changed.keys() & self._waiters.keys():
            for future in self._waiters.pop(run_id):
                if not future.done():
                    future.set_result(None)

    async def evict_forever(self) -> None:
        """Forget runs and hours that are over for longer than the view keeps them, here and in the changelogs."""
        while True:
            await asyncio.sleep(EVICT_EVERY_S)
            now_ms = time.time_ns() // 1_000_000
            runs = self._evict(self.view.outdated(now_ms), self.partition_of, self.view.forget, self._tables.runs)
            tallies = self._evict(
                self.view.outdated_tallies(now_ms), partition_of_tally, self.view.tallies.forget, self._tables.figures
            )
            if runs or tallies:
                _log.info("forgotten", runs=runs, tallies=tallies)

    def _evict(
        self,
        outdated: list[str],
        partition_of_key: Callable[[str], int],
        forget: Callable[[str], None],
        table: ViewTable,
    ) -> int:
        """Forget what is ours of the outdated keys; return how many those are."""
        ours = [key for key in outdated if partition_of_key(key) in self.owned]
        for key in ours:
            forget(key)
            table.pop(key, None)
        return len(ours)


def _has_gap(expected: int, records: list[Record]) -> bool:
    """Tell whether offsets are missing from a partition's records, of which the first one should be at `expected`."""
    for record in records:
        if record.offset > expected:
            return True
        expected = record.offset + 1
    return False


async def _batches(stream: StreamT[Any]) -> AsyncIterator[list[Event]]:
    async for events in cast(Stream[Any], stream).noack_take(MAX_BATCH, within=BATCH_WITHIN_S):
        yield list(events)
