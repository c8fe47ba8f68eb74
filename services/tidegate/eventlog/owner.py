"""Log, then tell: the one protocol of the scheduler and the gate.

`OwnerLoop.run_once` is the protocol; its steps are numbered there and in `docs/architecture.md`. What a service decides is in
its `Machine`; how state survives is here, once for both.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, NamedTuple

import structlog

from tidegate import codec, metrics
from tidegate.domain.entry import MAX_TELLS_PER_ENTRY, Checkpoint, Entry, OwnerAnnounced
from tidegate.domain.identity import entry_key
from tidegate.eventlog.checkpoints import Checkpointer
from tidegate.eventlog.continuity import check_announcement, same_topics
from tidegate.eventlog.intake import check
from tidegate.eventlog.interface import (
    NO_SHARE,
    Broker,
    EventLogError,
    Headers,
    Inbox,
    Message,
    Record,
    TopicDescription,
    TopicPartition,
    Writer,
)
from tidegate.eventlog.letters import dead_letter
from tidegate.eventlog.loop_meter import LoopMeter
from tidegate.eventlog.machine import Decision, EntryRefusedError, Machine, RefusedToStartError
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.patience import MAX_WAITING, PATIENCE_S, Waiting
from tidegate.eventlog.restore import restore
from tidegate.eventlog.retention import Retirer
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.tables import Tables
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER
from tidegate.failpoints import failpoint
from tidegate.health import PULSE

_log = structlog.get_logger()

DEAD_LETTERS: Final = "dead-letters"
MAX_BATCH: Final = 500
MAX_DUE_PER_TURN: Final = 500
MAX_GATHERED_BYTES: Final = 8 * 1024 * 1024
ANNOUNCE_EVERY_ENTRIES: Final = 1000
COMMIT_EVERY_S: Final = 1.0
RECORD_POSITIONS_EVERY_S: Final = 600.0
WRITE_DEADLINE_S: Final = 30.0
# A checkpoint is written in turns, so that inputs need not wait for it; where none come, it must not wait for them.
CHECKPOINT_POLL_S: Final = 0.002
# What Kafka said of the topics counts for so long: restoring a partition may take minutes, and the next one comes after it.
SAME_TOPICS_S: Final = 1.0
NEVER_S: Final = float("-inf")


class OwnerWriters(NamedTuple):
    """What an owner writes its log with, and what it tells with."""

    log: Writer
    tells: Writer


def owner_writers(broker: Broker) -> OwnerWriters:
    """Return new writers for an owner. They connect by themselves: who asks for them first thing need not wait for that later."""
    return OwnerWriters(broker.writer(), broker.writer())


class OwnerLoop:
    """Owns partitions of one log and runs the protocol for them, one turn at a time, in one thread."""

    def __init__(
        self,
        broker: Broker,
        machine: Machine,
        instance_id: str,
        *,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic_s: Callable[[], float] = time.monotonic,
        checkpoints: CheckpointSettings | None = None,
        measure: Callable[[Iterable[Any]], None] | None = None,
        writers: OwnerWriters | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Nothing is read or written yet. measure: sets the service's own gauges from the owned partitions' states.

        writers: made before, and ours from now on. patience_s: how long inputs wait that may; 0 for not at all.
        """
        self._broker = broker
        self.machine = machine
        self._instance_id = instance_id
        self._clock_ms = clock_ms
        self._monotonic_s = monotonic_s
        self._patience_s = patience_s
        self._log_writer, self._tell_writer = writers or owner_writers(broker)
        self._to_log: list[tuple[Record, Callable[[int], None]]] = []
        self._to_tell: list[tuple[Record, Callable[[int], None]]] = []
        self._to_tell_bytes = 0
        self._inbox: Inbox = broker.inbox(f"tidegate-{machine.service}", instance_id, machine.lead_topic)
        self._decoded: Callable[[bytes], Any] = looking_up(broker, codec.decode)
        self.tables = Tables(machine.table_topics, self._decoded)
        self.owned: dict[int, OwnedPartition] = {}
        self._checkpoint_settings = checkpoints or CheckpointSettings()
        self._checkpointers: dict[int, Checkpointer] = {}
        self._retirers: dict[int, Retirer] = {}
        self._to_take: set[int] = set()
        self._input_topics = (machine.lead_topic, *machine.other_topics)
        self._last_commit_s = 0.0
        self._topics: Mapping[str, TopicDescription] = {}  # the log and its inputs, as Kafka described them last
        self._topics_as_of_s = NEVER_S
        self.turns = 0
        self._missing = "the global tables are not read yet"
        self.meter = LoopMeter(measure)

    # -- life ---------------------------------------------------------------

    def start(self) -> None:
        """Read the global tables and begin to take part. Blocks until the tables are read. Raises EventLogError."""
        self.tables.load(self._broker)
        for topic, rows in self.tables.rows.items():
            for key, row in rows.items():
                self.machine.table_changed(topic, key, row, self.tables.offsets[topic][key])
        self.machine.tables_loaded()
        self._inbox.read_from(self.tables.positions())

    def close(self) -> None:
        """Flush what was told, commit and leave. Ownership stays with this instance id until its session ends."""
        try:
            failpoint("owner.before-close")
            self._record_positions(force=True)
            self._write_log()
            self._tell_writer.flush(WRITE_DEADLINE_S)
            failpoint("owner.after-last-flush")
            self._commit(force=True)
        except EventLogError as error:
            _log.warning("leaving without a clean flush", error=str(error))
        for part in (self._inbox, self._log_writer, self._tell_writer):
            part.close()

    def why_not_ready(self) -> str:
        """Return what is missing until every partition that is ours is restored; empty if nothing is. Any thread may ask."""
        return self._missing

    # -- the protocol ---------------------------------------------------------------

    def run_once(self, timeout_s: float = 0.2) -> int:
        """Run one turn; returns how many entries it logged. Blocks up to `timeout_s` when nothing happens.

        1. Poll inputs, learn of gained and lost partitions. 2. Decide on each input, in order; the events of consecutive inputs
        of one subject become one entry. 3. Take over what was gained. 4. Log the entries and wait until all are acknowledged at
        the offsets that follow our last one. 5. Tell. Raises EventLogError on any doubt that concerns more than one partition;
        the process exits then and takes over afresh.
        """
        self.turns += 1
        messages = self._inbox.poll(MAX_BATCH, self._longest_poll_s(timeout_s))
        self.meter.polled(messages)
        failpoint("owner.after-poll")
        self._follow_changes()
        # What was read of a partition that is ours anew was read without the entries that we have dropped: it is passed over, as
        # nobody owns it yet, and read again from where the log says.
        records = self._read(messages)
        for message in messages:
            self._handle(message, records.popleft())
        self._take_late()
        self._take_over_gained()
        self._ask_what_is_due()
        self._seal_drafts()
        failpoint("owner.before-log")
        logged = self._log_and_tell()
        self._tell_writer.poll()
        self._make_checkpoints()
        self._retire()
        self._commit()
        self._record_positions()
        self._send_gathered()
        self.meter.turn_done(self._monotonic_s(), self.owned, self._inbox.ends)
        return logged

    def _longest_poll_s(self, timeout_s: float) -> float:
        if self._to_take:
            return 0.0
        if any(checkpointer.is_busy for checkpointer in self._checkpointers.values()):
            timeout_s = min(timeout_s, CHECKPOINT_POLL_S)
        waiting_since_s = min((part.waiting.since_s() for part in self.owned.values()), default=float("inf"))
        timeout_s = min(timeout_s, max(0.0, waiting_since_s + self._patience_s - self._monotonic_s()))
        soonest = min(
            (
                due - self._now_ms(part)
                for part in self.owned.values()
                if (due := self.machine.next_due_ms(part.state)) is not None
            ),
            default=None,
        )
        return timeout_s if soonest is None else max(0.0, min(timeout_s, soonest / 1000))

    def _follow_changes(self) -> None:
        changes = self._inbox.take_changes()
        for partition in changes.lost:
            self._drop(partition, "the group gave it to another instance")
        self._to_take = (self._to_take - changes.lost) | changes.gained
        if changes.gained:
            self._topics_as_of_s = NEVER_S
        if self._to_take:
            self._missing = f"partitions to be restored: {', '.join(map(str, sorted(self._to_take)))}"
        else:
            self._missing = "" if self._inbox.has_share else NO_SHARE.format(self.machine.lead_topic)

    def _drop(self, partition: int, reason: str) -> None:
        self._to_take.discard(partition)
        part = self.owned.pop(partition, None)
        if part is not None:
            self.machine.dropped(partition)
            del self._checkpointers[partition], self._retirers[partition]
            metrics.partitions_dropped.labels("doubt" if part.doubt else "rebalance").inc()
            part.shelf.close()
            _log.info("partition dropped", log=self.machine.log_topic, partition=partition, reason=reason)
            self._inbox.remove([TopicPartition(topic, partition) for topic in self._input_topics])

    # -- 2. decide ---------------------------------------------------------------

    def _read(self, messages: Sequence[Message]) -> deque[Any]:
        """Return what each message holds, in order: a record, None if there is nothing to decide on, or what is wrong with it.

        All before the first decision: one after the other, reading takes half the time that it takes between decisions, whose
        code and data leave none of its own in the processor's caches.
        """
        records: deque[Any] = deque()
        for message in messages:
            record: Any = None
            is_input = message.topic not in self.tables.rows and message.partition in self.owned
            if is_input and message.value is not None:
                try:
                    record = self._decoded(message.value)
                    check(message.topic, record)
                except EventLogError:
                    raise  # the disk is to blame, or Kafka, and not the message
                except Exception as error:
                    record = error
            records.append(record)
        return records

    def _handle(self, message: Message, record: Any) -> None:
        if message.topic in self.tables.rows:
            self._seal_drafts()  # what was decided was decided with the tables of before
            if self.tables.take(message):
                key = (message.key or b"").decode("utf-8", "replace")
                row = self.tables.rows[message.topic].get(key)
                self.machine.table_changed(message.topic, key, row, message.offset)
            return
        part = self.owned.get(message.partition)
        if part is None or part.doubt:
            return
        if message.offset < part.inputs.get(message.topic, 0):
            return
        self._begin_turn(part)
        if message.topic == self.machine.patient_topic and self._patience_s > 0:
            if self._may_wait(part, record):
                subject = self.machine.subject_of(record)
                part.waiting.add(Waiting(message, record, subject, self._monotonic_s()))
                return
            self._take_waiting(part, len(part.waiting))
        elif part.waiting and _is_read(record):
            subject = self.machine.subject_of(record)
            while part.waiting.is_about(subject):
                self._take_waiting(part, 1)
        self._take(part, message, record)

    def _begin_turn(self, part: OwnedPartition) -> None:
        """Read the clock, once for all inputs of a turn: an entry has one time, however many of them it holds."""
        if part.turn != self.turns:
            part.turn, part.now_ms = self.turns, self._now_ms(part)

    def _may_wait(self, part: OwnedPartition, record: Any) -> bool:
        return _is_read(record) and self.machine.may_wait(part.state, record)

    def _take_waiting(self, part: OwnedPartition, count: int) -> None:
        """Decide on the first so many inputs that wait, or on all of them."""
        for _ in range(min(count, len(part.waiting))):
            message, record, _, _ = part.waiting.next()
            self._take(part, message, record)

    def _take_late(self) -> None:
        """Decide on inputs that have waited long enough, and on those that are too many."""
        late_s = self._monotonic_s() - self._patience_s
        for part in self.owned.values():
            if part.waiting and not part.doubt:
                self._begin_turn(part)
                self._take_waiting(part, len(part.waiting) - MAX_WAITING)
                while part.waiting.since_s() <= late_s:
                    self._take_waiting(part, 1)

    def _take(self, part: OwnedPartition, message: Message, record: Any) -> None:
        """Decide on an input: from here on it counts as read."""
        part.inputs[message.topic] = message.offset + 1
        if message.value is None:
            return
        try:
            if isinstance(record, Exception):
                raise record
            if part.is_stale(message.topic, record):
                return
            decision = self.machine.decide(part.state, record, message, part.now_ms, self.tables)
        except codec.DecodeError as error:
            self._bury(message, part.now_ms, "malformed", str(error))
            return
        except EventLogError:
            raise  # the disk is to blame, or Kafka, and not the message
        except Exception as error:
            # decide mutates nothing, so skipping the message leaves the state whole; the message itself is kept for people.
            _log.exception("decision failed", topic=message.topic, partition=message.partition, offset=message.offset)
            self._bury(message, part.now_ms, "internal_error", f"{type(error).__name__}: {error}")
            return
        if decision is None:
            return
        refusal = self._log_this_or_instead(part, decision, message, record)
        if refusal is not None:
            self._bury(message, part.now_ms, "internal_error", str(refusal))

    def _now_ms(self, part: OwnedPartition) -> int:
        return part.time_ms(self._clock_ms(), self._monotonic_s())

    def _ask_what_is_due(self) -> None:
        for part in self.owned.values():
            for _ in range(MAX_DUE_PER_TURN):
                if part.doubt:
                    break
                now_ms = self._now_ms(part)
                answer = self.machine.due(part.state, now_ms, self.tables)
                if answer is None:
                    break
                part.now_ms = now_ms
                cause, decision = answer
                refusal = self._log_this_or_instead(part, decision, cause, None)
                if refusal is not None:
                    raise refusal

    def _bury(self, message: Message, now_ms: int, code: str, reason: str) -> None:
        """Write a dead letter and wait for it: the input counts as read only once its letter is durable."""
        metrics.dead_letters.labels(message.topic, code).inc()
        _log.warning("dead letter", topic=message.topic, partition=message.partition, offset=message.offset, code=code)
        letter = dead_letter(message, service=self.machine.service, code=code, reason=reason, run_id="", at_ms=now_ms)
        failpoint("owner.before-dead-letter")
        self._tell_writer.send(
            Record(DEAD_LETTERS, 0, _place(message).encode(), codec.encode(letter), _headers(type(letter).__name__))
        )
        self._tell_writer.flush(WRITE_DEADLINE_S)
        failpoint("owner.after-dead-letter")

    # -- 4. log, 5. tell ---------------------------------------------------------------

    def _log_this_or_instead(
        self, part: OwnedPartition, decision: Decision, cause: Message | str, record: Any
    ) -> EntryRefusedError | None:
        """Log a decision, or what the machine puts in its place if it cannot be written; returns the refusal if that is nothing."""
        try:
            self._draft(part, decision, cause)
        except EntryRefusedError as error:
            named = cause if isinstance(cause, str) else _place(cause)
            _log.exception("entry refused", subject=decision.subject, cause=named)
            instead = self.machine.instead(part.state, record, decision, error)
            if instead is None:
                return error
            try:
                self._draft(part, instead, cause)
            except EntryRefusedError as again:
                return again
        return None

    def _draft(self, part: OwnedPartition, decision: Decision, cause: Message | str) -> None:
        failpoint("owner.before-entry")
        sealed = part.add(decision, cause, self.tables.versions)
        if sealed is not None:
            self._log_entry(part, *sealed)

    def _seal_drafts(self) -> None:
        """Make entries of all that was decided, before anything else is written or changes."""
        for part in self.owned.values():
            sealed = part.seal()
            if sealed is not None:
                self._log_entry(part, *sealed)
            if part.since_announcement >= ANNOUNCE_EVERY_ENTRIES:
                self._announce_again(part)

    def _log_entry(self, part: OwnedPartition, entry: Entry, value: bytes) -> None:
        slot: list[int] = []
        part.unacknowledged.append((entry, slot))
        record = Record(
            self.machine.log_topic,
            part.partition,
            entry_key(entry.subject, entry.first_seq, entry.epoch).encode(),
            value,
            ((TYPE_HEADER, self.machine.entry_kind.encode()), (EPOCH_HEADER, b"%d" % entry.epoch)),
        )
        self._to_log.append((record, partial(part.acknowledged, slot)))
        part.since_announcement += 1

    def _log_and_tell(self) -> int:
        """Wait for the acknowledgements, drop partitions in doubt before anything of theirs is told, tell the others."""
        busy = [part for part in self.owned.values() if part.unacknowledged or part.doubt]
        if not busy:
            return 0
        self._write_log()
        failpoint("owner.after-log")
        logged = 0
        for part in busy:
            if part.doubt:
                self._drop(part.partition, part.doubt)
                self._to_take.add(part.partition)
                self._topics_as_of_s = NEVER_S
                continue
            batch, part.unacknowledged = part.unacknowledged, []
            logged += len(batch)
            for entry, slot in batch:
                part.logged(entry, slot[0])
                self.meter.logged(entry, self._tell(part, entry, slot[0]))
        self._send_tells()
        failpoint("owner.after-tell")
        return logged

    def _send_gathered(self) -> None:
        """Send what a turn has for the log, in order. Raises EventLogError.

        All at once: sent one by one while the turn still decides, the first records of every partition would go out in requests
        of their own, and requests are what a broker works for.
        """
        send = self._log_writer.send
        for record, acked in self._to_log:
            send(record, acked)
        self._to_log.clear()

    def _send_tells(self) -> None:
        """Send what a turn has for others, in order, all at once as `_send_gathered` does. Raises EventLogError.

        If it is much, a part of it before the turn's end: the writer waits while it holds too much, and nobody else does.
        """
        send = self._tell_writer.send
        for record, acked in self._to_tell:
            send(record, acked)
            failpoint("owner.between-tells")
        self._to_tell.clear()
        self._to_tell_bytes = 0

    def _write_log(self) -> None:
        """Send what was gathered and wait for all acknowledgements. Raises EventLogError."""
        self._send_gathered()
        self._log_writer.flush(WRITE_DEADLINE_S)

    def _tell(self, part: OwnedPartition, entry: Entry, offset: int) -> int:
        """Gather what follows from an entry for `_send_tells`; returns how many messages that are."""
        tells = self.machine.tells(entry, part.position(offset))
        if len(tells) > MAX_TELLS_PER_ENTRY:
            raise EventLogError(f"an entry of {entry.subject} has {len(tells)} tells, more than {MAX_TELLS_PER_ENTRY}")
        slot = part.told.expect(offset, len(tells))

        def acked(_: int) -> None:
            slot[1] -= 1
            if not slot[1]:
                part.told.advance()

        for tell in tells:
            value, headers = codec.encode(tell.record), _headers(type(tell.record).__name__)
            self._to_tell.append((Record(tell.topic, tell.partition, tell.key.encode(), value, headers), acked))
            self._to_tell_bytes += len(value)
            if self._to_tell_bytes > MAX_GATHERED_BYTES:
                self._send_tells()
        return len(tells)

    # -- 3. take over ---------------------------------------------------------------

    def _take_over_gained(self) -> None:
        if not self._to_take:
            return
        partition = min(self._to_take)  # one a turn, so that the others are not kept waiting
        self.owned[partition] = self._take_over(partition)
        self._to_take.discard(partition)

    def _take_over(self, partition: int) -> OwnedPartition:
        """Announce, fold the log up to the announcement, tell again what may be untold, and read on from what it records."""
        began = self._monotonic_s()
        topics = self._same_topics()
        epoch = self._announce(partition)
        failpoint("owner.after-announce")
        part, untold, stale_keys = restore(
            self._broker,
            self.machine,
            partition,
            epoch,
            lambda record: check_announcement(record, topics),
            self._clock_ms() - int(self._checkpoint_settings.rest_after_s * 1000),
            self._go_on_living,
        )
        failpoint("owner.after-restore")
        part.epoch, part.next_offset = epoch, epoch + 1
        part.set_time(part.now_ms, self._monotonic_s())
        part.recorded_inputs, part.recorded_s = dict(part.inputs), self._monotonic_s()
        self._same_topics()  # they may have been made again while we folded, and these are positions in what was there before
        positions = self._checked_positions(part)
        for offset, entry in untold:
            failpoint("owner.before-telling-again")
            self._tell(part, entry, offset)
            self._send_tells()
            failpoint("owner.after-telling-again")
        self._checkpointers[partition] = Checkpointer(
            part,
            self._checkpoint_settings,
            self._tell_writer.send,
            lambda checkpoint: self._certify(part, checkpoint),
            stale_keys,
            self._monotonic_s(),
        )
        self._retirers[partition] = Retirer(part, self._broker, lambda record: self._send_to_log(part, record))
        self._inbox.add(positions)
        failpoint("owner.after-take-over")
        metrics.takeovers.inc()
        metrics.takeover_seconds.observe(self._monotonic_s() - began)
        metrics.restore_progress.labels(partition).set(1)
        _log.info(
            "partition taken over",
            log=self.machine.log_topic,
            partition=partition,
            epoch=part.epoch,
            told_again=len(untold),
            folded=part.since_checkpoint,
            seconds=round(self._monotonic_s() - began, 3),
        )
        return part

    def _go_on_living(self) -> None:
        """Say that we live while a restore takes long: the group would give the partition away, and others would wait for us."""
        PULSE.beat()
        self._inbox.stay()

    def _checked_positions(self, part: OwnedPartition) -> dict[TopicPartition, int]:
        """Return where to read each input on. Raises RefusedToStartError if that is not there any more (rule 10)."""
        positions = {}
        for topic in self._input_topics:
            start, end = self._broker.offsets(topic, part.partition)
            recorded = part.inputs.get(topic)
            if recorded is None:
                recorded = start
            elif recorded < start:
                raise RefusedToStartError(
                    f"{topic}-{part.partition} begins at offset {start}, but {self.machine.log_topic} has consumed it only up to "
                    f"{recorded}: messages were deleted unread. Restore the topic from a backup, with its offsets, or begin a "
                    "new installation under another TIDEGATE_KAFKA_TOPIC_PREFIX; and give the topic a longer retention."
                )
            elif recorded > end:
                raise RefusedToStartError(
                    f"{topic}-{part.partition} ends at offset {end}, but {self.machine.log_topic} has consumed it up to "
                    f"{recorded}: the topic was made again or lost records. Restore it from a backup."
                )
            part.inputs[topic] = recorded
            positions[TopicPartition(topic, part.partition)] = recorded
        return positions

    def _same_topics(self) -> Mapping[str, TopicDescription]:
        """Return what Kafka says of the log and its inputs: asked once for partitions that come to us together.

        Raises RefusedToStartError if they are not those that they were.
        """
        now_s = self._monotonic_s()
        if now_s - self._topics_as_of_s > SAME_TOPICS_S:
            self._topics = same_topics(self._broker, self.machine.log_topic, self._input_topics, self._topics)
            self._topics_as_of_s = now_s
        return self._topics

    def _announcement(self, partition: int, epoch: int, repeat: int, name: str, **more: Any) -> Record:
        log = self._topics[self.machine.log_topic]
        record = OwnerAnnounced(
            log=self.machine.log_topic,
            partition=partition,
            epoch=epoch,
            repeat=repeat,
            topic_id=log.topic_id,
            partition_count=log.partition_count,
            instance_id=self._instance_id,
            at_ms=self._clock_ms(),
            input_topics={topic: self._topics[topic].topic_id for topic in self._input_topics if topic in self._topics},
            **more,
        )
        headers = ((TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()), (EPOCH_HEADER, b"%d" % epoch))
        return Record(self.machine.log_topic, partition, f"owner:{name}".encode(), codec.encode(record), headers)

    def _announce(self, partition: int) -> int:
        """Announce for the first time and return the epoch. The key is made unique by who announced and when."""
        offsets: list[int] = []
        name = f"{self._instance_id}:{time.time_ns()}"
        self._to_log.append((self._announcement(partition, NO_EPOCH, 0, name), offsets.append))
        self._write_log()
        return offsets[0]

    def _announce_again(self, part: OwnedPartition) -> None:
        part.since_announcement = 0
        part.recorded_inputs, part.recorded_s = dict(part.inputs), self._monotonic_s()
        part.repeats += 1
        record = self._announcement(
            part.partition,
            part.epoch,
            part.repeats,
            f"{part.epoch}:{part.repeats}",
            inputs=dict(part.inputs),
            marks=dict(part.marks),
            checkpoint=part.checkpoint,
        )
        self._send_to_log(part, record)
        failpoint("owner.after-announce-again")

    def _certify(self, part: OwnedPartition, checkpoint: Checkpoint) -> bool:
        """Announce a finished checkpoint and wait for it; tells whether the announcement stands where ours must."""
        part.checkpoint = checkpoint
        self._announce_again(part)
        self._write_log()
        return not part.doubt

    def _make_checkpoints(self) -> None:
        now_s = self._monotonic_s()
        for partition, checkpointer in self._checkpointers.items():
            part = self.owned[partition]
            if not part.doubt and not part.unacknowledged:
                checkpointer.work(now_s, self._now_ms(part))

    def _retire(self) -> None:
        for partition, retirer in self._retirers.items():
            part = self.owned[partition]
            if not part.doubt and not part.unacknowledged:
                retirer.work(self._now_ms(part))

    def _send_to_log(self, part: OwnedPartition, record: Record) -> None:
        self._to_log.append((record, partial(part.acknowledged, [])))

    def _record_positions(self, *, force: bool = False) -> None:
        """Record how far inputs were read that caused no entry, before their retention may remove them.

        Otherwise an owner that starts after that would find its recorded position below their beginning, and refuse.
        """
        now_s = self._monotonic_s()
        for part in self.owned.values():
            is_time = force or now_s - part.recorded_s >= RECORD_POSITIONS_EVERY_S
            if is_time and not part.doubt and part.inputs != part.recorded_inputs:
                self._announce_again(part)

    def _commit(self, *, force: bool = False) -> None:
        now_s = self._monotonic_s()
        if force or now_s - self._last_commit_s >= COMMIT_EVERY_S:
            self._last_commit_s = now_s
            lead = self.machine.lead_topic
            failpoint("owner.before-commit")
            self._inbox.commit({p: part.inputs[lead] for p, part in self.owned.items() if lead in part.inputs})
            failpoint("owner.after-commit")


def _is_read(record: Any) -> bool:
    """Tell whether there is something to decide on: neither a tombstone nor something malformed."""
    return record is not None and not isinstance(record, Exception)


def _place(message: Message) -> str:
    return f"{message.topic}:{message.partition}:{message.offset}"


@cache
def _headers(name: str) -> Headers:
    return ((TYPE_HEADER, name.encode()),)
