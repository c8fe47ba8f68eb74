"""The projection: poll, decode, rows, insert, commit. It writes nothing but rows, and can be done again from any offset."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import structlog

from tidegate import codec, metrics
from tidegate.eventlog.epochs import epoch_before
from tidegate.eventlog.interface import NO_SHARE, Broker, EventLogError, Message, TopicPartition
from tidegate.eventlog.kafka.subscription import AssignmentChange
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.validity import NO_EPOCH, EpochTracker
from tidegate.failpoints import failpoint
from tidegate.projection import rows
from tidegate.projection.inserter import Batch, Inserter

RUN_EVENTS: Final = "run-events"
GATE_LEDGER: Final = "gate-ledger"
INSTANCES: Final = "instances"
DEAD_LETTERS: Final = "dead-letters"
TOPICS: Final = (RUN_EVENTS, GATE_LEDGER, INSTANCES, DEAD_LETTERS)
# What has one place among the members of the group (migrations, replays) is done by the member that has this partition.
FIRST: Final = TopicPartition(RUN_EVENTS, 0)
SCHEMAS: Final = "schemas"
FILL_UP: Final = "tidegate replay projection --from earliest"

MAX_POLL: Final = 5_000
IDLE_POLL_S: Final = 0.25
# A poll that brought fewer than this is followed by a nap: messages wait for their batch anyway, and each turn costs.
WORTH_A_TURN: Final = 1_000
NAP_S: Final = 0.05
# After an insert ClickHouse rests for so many times as long as it took: most of what an insert costs does not depend on its
# rows, so a machine that is busy with other things gets fewer and larger ones.
REST_PER_INSERT: Final = 5.0
LONGEST_REST_S: Final = 1.0
# Who inserts so many rows at once is under load: two seconds' worth of them cost a fifth less each than one second's.
MANY_ROWS: Final = 10_000
LONGEST_REST_UNDER_LOAD_S: Final = 2.0
# Heartbeats of instances alone are in no hurry: every insert leaves parts that ClickHouse has to merge.
HEARTBEATS_WAIT_S: Final = 1.0
FRESHNESS_EVERY_S: Final = 10.0
PROGRESS_EVERY_S: Final = 10.0
MEASURE_EVERY_S: Final = 2.0
# A full batch waits so long for the one before it; then reading is paused, and the group hears from us so often.
PATIENCE_S: Final = 1.0
PAUSED_POLL_S: Final = 0.5
STOP_TIMEOUT_S: Final = 15.0

_log = structlog.get_logger()


class Subscription(Protocol):
    """What the service needs of `KafkaSubscription`."""

    @property
    def assigned(self) -> frozenset[TopicPartition]: ...

    @property
    def has_share(self) -> bool: ...

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]: ...

    def take_changes(self) -> AssignmentChange: ...

    def commit(self, positions: Mapping[TopicPartition, int]) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def ends(self) -> dict[TopicPartition, int]: ...

    def close(self) -> None: ...


class CompanyError(EventLogError):
    """Another projection shares our group, and the tables of neither would be whole."""


class Limits(NamedTuple):
    """When a batch is inserted: after so long, or sooner when it has so many rows or bytes."""

    flush_s: float
    batch_rows: int
    batch_bytes: int


class Counters:
    """What happened since the start."""

    __slots__ = ("events", "messages", "rows", "unreadable", "void")

    def __init__(self) -> None:
        self.messages = 0
        self.rows = 0
        self.events = 0
        self.void = 0
        self.unreadable = 0


class _Place:
    """Where we are in a partition of a log: the epoch in force after `offset`."""

    __slots__ = ("offset", "tracker")

    def __init__(self, offset: int, epoch: int) -> None:
        self.offset = offset
        self.tracker = EpochTracker(epoch)


class Projection:
    """Reads the topics and has their rows inserted. One thread; `inserter` is another.

    At most two batches are in memory: the one being inserted and the one being filled. When both are full, reading pauses.
    """

    def __init__(
        self,
        subscription: Subscription,
        broker: Broker,
        inserter: Inserter,
        limits: Limits,
        *,
        is_shadow: bool = False,
        alone: bool = False,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """is_shadow: it fills tables beside another one, which alone writes `freshness` and is measured.

        alone: nobody else can write to its tables, so it must have all partitions of its topics; see `run_once`.
        """
        self._is_shadow = is_shadow
        self._alone = alone
        self._was_whole = False  # we had all partitions once
        self._counts: dict[str, int] = {}  # of partitions, by topic
        self._subscription = subscription
        self._broker = broker
        self._inserter = inserter
        self._limits = limits
        self._clock_ms = clock_ms
        self._monotonic_s = monotonic_s
        self._sleep = sleep
        self._batch = Batch(monotonic_s())
        self._submitted = self._batch
        self._submitted_s = self._rested_s = monotonic_s()
        self._places: dict[TopicPartition, _Place] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._last_event_ms: dict[TopicPartition, int] = {}
        self._paused = False
        self._decoded = looking_up(broker, codec.decode_facts)
        self._freshness_due_s = float("inf") if is_shadow else monotonic_s() + FRESHNESS_EVERY_S
        self._progress_s = monotonic_s()
        self._progress_events = 0
        self.counters = Counters()
        self.turns = 0
        self._inserted: dict[TopicPartition, int] = {}  # and committed
        self._reach: dict[TopicPartition, rows.Reach] = {}
        self._missing: dict[TopicPartition, int] = {}
        self._counted = copy.copy(self.counters)
        self._measure_due_s = monotonic_s()

    # -- the loop ---------------------------------------------------------------

    def run_once(self) -> None:
        """Run one turn. Blocks up to IDLE_POLL_S when nothing happens. Raises EventLogError, MigrationError.

        Raises CompanyError if it must be alone and joins a group that others are in already, before it has read anything.

        1. Commit what was inserted since. 2. Poll, unless two batches are full. 3. Turn messages into rows. 4. Hand the
        batch over if it is due.
        """
        self.turns += 1
        self._commit_done()
        began_s = self._monotonic_s()
        if self._is_full():
            self._wait_for_inserter()
        else:
            self._go_on()
            messages = self._subscription.poll(MAX_POLL, self._patience_s())
            failpoint("projection.after-poll")
            self._take_all(messages)
            if messages and not self._is_shadow:
                metrics.turn_seconds.observe(self._monotonic_s() - began_s)
                metrics.turn_messages.observe(len(messages))
            if 0 < len(messages) < WORTH_A_TURN:
                self._sleep(min(NAP_S, max(0.0, self._due_s() - self._monotonic_s())))
        self._submit_if_due()
        self._tell_progress()
        self._measure()

    def close(self) -> None:
        """Insert and commit what was read, if ClickHouse is there to take it; then leave the group."""
        deadline_s = self._monotonic_s() + STOP_TIMEOUT_S
        try:
            self._inserter.wait(STOP_TIMEOUT_S)
            self._commit_done()
            if self._batch.positions and self._inserter.is_idle:
                self._submit()
            finished = self._inserter.stop(max(0.0, deadline_s - self._monotonic_s()))
            failpoint("projection.before-last-commit")
            self._commit_done()
            if not finished:
                _log.warning("leaving rows behind, uncommitted: they will be read again", why=self._inserter.failing)
        except Exception as error:
            _log.warning("leaving without a clean end: what is not committed will be read again", error=str(error))
        finally:
            self._subscription.close()

    def _patience_s(self) -> float:
        if not self._batch.positions:
            return IDLE_POLL_S
        if not self._inserter.is_idle:
            return 0.02  # the inserter does not wake us: look again soon
        return min(IDLE_POLL_S, max(0.0, self._due_s() - self._monotonic_s()))

    def _due_s(self) -> float:
        wait_s = self._limits.flush_s if self._batch.urgent else max(self._limits.flush_s, HEARTBEATS_WAIT_S)
        return max(self._batch.began_s + wait_s, self._rested_s)

    def _is_full(self) -> bool:
        batch, limits = self._batch, self._limits
        return batch.row_count >= limits.batch_rows or batch.byte_count >= limits.batch_bytes

    # -- 1. commit ---------------------------------------------------------------

    def _commit_done(self) -> None:
        done = self._inserter.take_done()
        if done is None:
            return
        now_s = self._monotonic_s()
        longest_s = LONGEST_REST_UNDER_LOAD_S if done.row_count >= MANY_ROWS else LONGEST_REST_S
        self._rested_s = now_s + min(longest_s, REST_PER_INSERT * (now_s - self._submitted_s))
        failpoint("projection.before-commit")
        self._subscription.commit(done.positions)
        self._inserted.update(done.positions)
        self._note_missing(done)
        if not self._is_shadow:
            metrics.projection_insert_seconds.observe(now_s - self._submitted_s)
        failpoint("projection.after-commit")

    def _note_missing(self, done: Batch) -> None:
        """Say it, once, if the tables lack records that the group has passed: nothing will bring them by itself."""
        for row in done.tables.get(rows.FRESHNESS, ()):
            at, next_offset = TopicPartition(row[0], row[1]), row[2]
            if at not in done.positions:
                continue  # it was lost meanwhile: whoever has it says what is missing of it
            missing = max(0, next_offset - done.whole_to.get(at, next_offset))
            if missing and not self._missing.get(at):
                _log.error(
                    "the tables lack records that the group has passed: another database, or one that was emptied or restored",
                    topic=at.topic,
                    partition=at.partition,
                    missing=missing,
                    what_to_do=FILL_UP,
                )
            self._missing[at] = missing

    # -- 2. poll, or wait ---------------------------------------------------------------

    def _wait_for_inserter(self) -> None:
        """Wait for the batch before ours. If that takes long, pause, and go on polling for the group's sake."""
        if self._inserter.is_idle:
            return
        if not self._paused:
            if self._inserter.wait(PATIENCE_S):
                return
            _log.warning("ClickHouse is slower than the log: reading pauses", why=self._inserter.failing or "slow")
            self._paused = True
        self._subscription.pause()
        # What a rebalance brought is not paused yet: few messages, once.
        self._take_all(self._subscription.poll(MAX_POLL, PAUSED_POLL_S))

    def _go_on(self) -> None:
        if self._paused:
            self._paused = False
            self._subscription.resume()
            _log.info("reading goes on")

    # -- 3. rows ---------------------------------------------------------------

    def _take_all(self, messages: list[Message]) -> None:
        changes = self._subscription.take_changes()
        is_new = bool(changes.gained or changes.lost)
        if self._alone and self._subscription.has_share and (is_new or not self._was_whole):
            self._look_for_company()
        if is_new:
            self._follow(changes)
        if not messages:
            return
        batch = self._batch
        if not batch.positions:
            batch.began_s = self._monotonic_s()
        for message in messages:
            self._take(batch, message)
        self.counters.messages += len(messages)

    def _follow(self, changes: AssignmentChange) -> None:
        """Forget where we were: after a rebalance reading goes on at what was committed, by whomever."""
        self._places.clear()
        for at in changes.lost:
            # What was read before is inserted, which is harmless, but not committed: another member may be further.
            self._batch.positions.pop(at, None)
            self._submitted.positions.pop(at, None)
            self._positions.pop(at, None)
            self._last_event_ms.pop(at, None)
            if self._inserted.pop(at, None) is not None:
                metrics.projection_lag.remove(at.topic, str(at.partition))
            if self._missing.pop(at, None) is not None:
                metrics.projection_missing.remove(at.topic, str(at.partition))
            self._reach.pop(at, None)
        if not self._is_shadow:
            self._reach |= {at: self._reach_of(at, offset) for at, offset in changes.gained.items()}
        committed = {at: offset for at, offset in changes.gained.items() if offset is not None}
        self._positions |= committed
        self._inserted |= committed
        _log.info(
            "partitions assigned",
            partitions=[f"{at.topic}-{at.partition}" for at in sorted(self._subscription.assigned)],
        )

    def _look_for_company(self) -> None:
        """Refuse to share the group. Who came first goes on, loudly: the other one ends, and its partitions come back."""
        mine = self._subscription.assigned
        if len(self._counts) < len(TOPICS):  # they never change
            self._counts = {name: found.partition_count for name, found in self._broker.describe(TOPICS).items()}
        every = {TopicPartition(topic, number) for topic, count in self._counts.items() for number in range(count)}
        # A whole topic that is missing is one that the group has not heard of yet: who shares has some of each, or none at all.
        topics = {at.topic for at in mine} or set(self._counts)
        others = sorted(f"{at.topic}-{at.partition}" for at in every - mine if at.topic in topics)
        if not others:
            self._was_whole = True
        elif self._was_whole:
            _log.error("another projection has joined the group: these tables miss what it reads", partitions=others)
        else:
            raise CompanyError(
                f"another projection is in the group and has {', '.join(others)}: an embedded ClickHouse belongs to one process, "
                "so the tables of both would have gaps. Stop one of them, give this one a group of its own "
                "(TIDEGATE_PROJECTION_GROUP), or use a ClickHouse server (TIDEGATE_CLICKHOUSE_URL), which several may fill"
            )

    def _reach_of(self, at: TopicPartition, committed: int | None) -> rows.Reach:
        """Return from where on we read a partition: where the group says, else where its log begins."""
        start = self._broker.offsets(at.topic, at.partition).start
        return rows.Reach(start if committed is None else committed, start)

    def _take(self, batch: Batch, message: Message) -> None:
        topic, partition, offset = message.topic, message.partition, message.offset
        at = TopicPartition(topic, partition)
        value = message.value
        if value is None:
            self._take_tombstone(batch, message)
        else:
            batch.byte_count += len(value)
            try:
                name, fields = self._decoded(value)
                handle = _HANDLERS[topic].get(name)
                if handle is None:
                    self._unreadable(batch, message, f"a {name} has no business in {topic}")
                else:
                    handle(self, batch, message, fields)
            except EventLogError:
                raise
            except Exception as error:  # whatever a foreign record makes the rows stumble over
                self._unreadable(batch, message, f"{type(error).__name__}: {error}")
        batch.positions[at] = offset + 1

    def _place(self, message: Message) -> _Place:
        """Return where we are in the message's log partition; looks back in the log when that is not known."""
        at = TopicPartition(message.topic, message.partition)
        place = self._places.get(at)
        if place is None or message.offset <= place.offset:
            epoch = epoch_before(self._broker, message.topic, message.partition, message.offset)
            place = self._places[at] = _Place(message.offset, epoch)
            _log.info("reading", topic=at.topic, partition=at.partition, offset=message.offset, epoch=epoch)
        place.offset = message.offset
        return place

    def _unreadable(self, batch: Batch, message: Message, reason: str) -> None:
        """Note a record of our own topics that gives no rows, loudly, and go on."""
        self.counters.unreadable += 1
        _log.error(
            "record skipped", topic=message.topic, partition=message.partition, offset=message.offset, reason=reason
        )
        batch.table(rows.UNREADABLE).append(rows.unreadable_row(message, reason))
        self._added(batch, 1, urgent=True)

    def _added(self, batch: Batch, count: int, *, urgent: bool) -> None:
        batch.row_count += count
        batch.urgent |= urgent
        self.counters.rows += count

    def _take_run_entry(self, batch: Batch, message: Message, entry: dict[str, Any]) -> None:
        self._take_entry(batch, message, entry, rows.EVENTS, rows.add_run_events)

    def _take_ledger_entry(self, batch: Batch, message: Message, entry: dict[str, Any]) -> None:
        self._take_entry(batch, message, entry, rows.LEDGER, rows.add_ledger_events)

    def _take_entry(
        self,
        batch: Batch,
        message: Message,
        entry: dict[str, Any],
        table: str,
        add: Callable[[list[rows.Row], dict[str, Any], int, int], None],
    ) -> None:
        if not self._place(message).tracker.is_valid(entry["epoch"]):
            self.counters.void += 1
            return
        table_rows = batch.table(table)
        before = len(table_rows)
        try:
            add(table_rows, entry, message.partition, message.offset)
        except Exception:
            del table_rows[before:]  # an entry stands or falls as a whole
            raise
        count = len(table_rows) - before
        self.counters.events += count
        self._added(batch, count, urgent=True)
        batch.last_event_ms[TopicPartition(message.topic, message.partition)] = entry["now_ms"]

    def _take_announcement(self, batch: Batch, message: Message, fields: dict[str, Any]) -> None:
        self._place(message).tracker.announced(message.offset, fields["epoch"])

    def _take_instance(self, batch: Batch, message: Message, fields: dict[str, Any]) -> None:
        batch.table(rows.INSTANCES).append(rows.instance_row(fields, message.offset))
        self._added(batch, 1, urgent=fields["incarnation"] == NO_EPOCH)
        batch.last_event_ms[TopicPartition(message.topic, message.partition)] = fields["at_ms"]

    def _take_dead_letter(self, batch: Batch, message: Message, fields: dict[str, Any]) -> None:
        batch.table(rows.DEAD_LETTERS).append(rows.dead_letter_row(fields, message.offset))
        self._added(batch, 1, urgent=True)
        batch.last_event_ms[TopicPartition(message.topic, message.partition)] = fields["at_ms"]

    def _take_tombstone(self, batch: Batch, message: Message) -> None:
        """In the tables a tombstone removes a row. In the logs it is retention's: rows of removed runs stay."""
        row: rows.Row | None = None
        if message.topic == INSTANCES:
            row = rows.removed_instance_row(message.key or b"", message.offset)
            table = rows.INSTANCES
        elif message.topic == DEAD_LETTERS:
            row = rows.removed_dead_letter_row(message.key or b"", message.offset)
            table = rows.DEAD_LETTERS
        if row is not None:
            batch.table(table).append(row)
            self._added(batch, 1, urgent=False)

    # -- 4. insert ---------------------------------------------------------------

    def _submit_if_due(self) -> None:
        if not self._inserter.is_idle:
            return
        now_s = self._monotonic_s()
        batch = self._batch
        if now_s >= self._freshness_due_s or (batch.positions and (self._is_full() or now_s >= self._due_s())):
            self._submit()

    def _submit(self) -> None:
        batch, self._batch = self._batch, Batch(self._monotonic_s())
        self._positions.update(batch.positions)
        self._last_event_ms.update(batch.last_event_ms)
        every = self._monotonic_s() >= self._freshness_due_s
        if every:
            self._freshness_due_s = self._monotonic_s() + FRESHNESS_EVERY_S
            # A commit that the broker did not hear is made good, also where nothing new comes.
            batch.positions.update(self._positions)
        if not self._is_shadow:
            self._add_freshness(batch, self._positions if every else batch.positions)
        self._submitted, self._submitted_s = batch, self._monotonic_s()
        self._inserter.submit(batch)

    def _add_freshness(self, batch: Batch, positions: Mapping[TopicPartition, int]) -> None:
        ends, now_ms = self._subscription.ends(), self._clock_ms()
        batch.tables[rows.FRESHNESS] = [
            (at.topic, at.partition, offset, ends.get(at, offset), self._last_event_ms.get(at), now_ms, 0)
            for at, offset in positions.items()
        ]
        batch.reach = {at: self._reach[at] for at in positions if at in self._reach}

    def why_not_ready(self) -> str:
        """Return what is missing until records become rows; empty if nothing is. Any thread may ask."""
        return "" if self._subscription.has_share else NO_SHARE.format("the projection")

    @property
    def has_pending(self) -> bool:
        """Tell whether rows were made that are not inserted and committed yet."""
        return bool(self._batch.positions) or not self._inserter.is_idle

    def _measure(self) -> None:
        """Hand over what was counted, once in a while."""
        now_s = self._monotonic_s()
        if now_s < self._measure_due_s or self._is_shadow:
            return
        self._measure_due_s = now_s + MEASURE_EVERY_S
        counters, seen = self.counters, self._counted
        metrics.projection_messages.inc(counters.messages - seen.messages)
        metrics.projection_events.inc(counters.events - seen.events)
        metrics.projection_rows.inc(counters.rows - seen.rows)
        metrics.projection_void.inc(counters.void - seen.void)
        metrics.projection_unreadable.inc(counters.unreadable - seen.unreadable)
        self._counted = copy.copy(counters)
        metrics.projection_paused.set(self._paused)
        metrics.projection_failing.set(bool(self._inserter.failing))
        for at, end in self._subscription.ends().items():
            position = self._inserted.get(at)
            if position is not None:
                metrics.projection_lag.labels(at.topic, at.partition).set(max(0, end - position))
        for at, missing in self._missing.items():
            metrics.projection_missing.labels(at.topic, at.partition).set(missing)
        latest: dict[str, int] = {}
        for at, event_ms in self._last_event_ms.items():
            latest[at.topic] = max(event_ms, latest.get(at.topic, 0))
        for topic, event_ms in latest.items():
            metrics.projection_age.labels(topic).set(event_ms / 1000)

    def _tell_progress(self) -> None:
        now_s = self._monotonic_s()
        elapsed_s = now_s - self._progress_s
        if elapsed_s < PROGRESS_EVERY_S:
            return
        count = self.counters.events - self._progress_events
        self._progress_s, self._progress_events = now_s, self.counters.events
        if count > 1000 * elapsed_s:
            ends = self._subscription.ends()
            lag = sum(max(0, end - self._positions.get(at, 0)) for at, end in ends.items())
            _log.info("projecting", events_per_s=round(count / elapsed_s), lag=lag, void=self.counters.void)


_Handler = Callable[[Projection, Batch, Message, dict[str, Any]], None]
_HANDLERS: Final[dict[str, dict[str, _Handler]]] = {
    RUN_EVENTS: {"RunEntry": Projection._take_run_entry, "OwnerAnnounced": Projection._take_announcement},
    GATE_LEDGER: {"LedgerEntry": Projection._take_ledger_entry, "OwnerAnnounced": Projection._take_announcement},
    INSTANCES: {"Instance": Projection._take_instance},
    DEAD_LETTERS: {"DeadLetter": Projection._take_dead_letter},
}
