"""Log, then tell: the one protocol of the scheduler and the gate.

`OwnerLoop.run_once` is the protocol; its steps are numbered there and in `docs/architecture.md`. What a service decides is in
its `Machine`; how state survives is here, once for both.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import structlog

from tidegate import codec
from tidegate.domain.entry import MAX_TELLS_PER_ENTRY, Entry, OwnerAnnounced, Position
from tidegate.domain.identity import entry_key
from tidegate.eventlog.interface import (
    Broker,
    EventLogError,
    Headers,
    Inbox,
    Message,
    OffsetOutOfRangeError,
    Record,
    TopicDescription,
    TopicPartition,
    Writer,
)
from tidegate.eventlog.letters import dead_letter
from tidegate.eventlog.schemas import load_schemas
from tidegate.eventlog.tables import Tables
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER, EpochTracker
from tidegate.failpoints import failpoint

_log = structlog.get_logger()

DEAD_LETTERS: Final = "dead-letters"
MAX_BATCH: Final = 500
MAX_DUE_PER_TURN: Final = 500
ANNOUNCE_EVERY_ENTRIES: Final = 1000
COMMIT_EVERY_S: Final = 1.0
RECORD_POSITIONS_EVERY_S: Final = 600.0
WRITE_DEADLINE_S: Final = 30.0
MAX_ENTRY_BYTES: Final = 15 * 1024 * 1024  # of 16 MiB that a record may have with all that is around it
MANY_EVENTS: Final = 1_000  # an event has a few tells at the most
RESTORE_PROGRESS_EVERY: Final = 50_000


class Decision(NamedTuple):
    """What a machine decided on one input: events of one subject, which go into one entry."""

    subject: str
    account: str
    events: Sequence[Any]


class Tell(NamedTuple):
    """A message that follows from an entry; `position` numbering is the order of the list it stands in."""

    topic: str
    partition: int
    key: str
    record: Any


class Machine(Protocol):
    """A service's own part. `decide` and `due` look at the state and mutate nothing; `apply` alone changes it."""

    @property
    def service(self) -> str:
        """Return the service's name."""

    @property
    def entry_kind(self) -> str:
        """Return the schema of the log's entries: `RunEntry` or `LedgerEntry`."""

    @property
    def log_topic(self) -> str:
        """Return the topic of the log."""

    @property
    def lead_topic(self) -> str:
        """Return the input topic by whose partitions ownership is given."""

    @property
    def other_topics(self) -> tuple[str, ...]:
        """Return the input topics that are read along with the lead topic, by the same partition numbers."""

    @property
    def table_topics(self) -> tuple[str, ...]:
        """Return the global tables that decisions look at."""

    @property
    def marked_topics(self) -> dict[str, str]:
        """Return input topic -> the log whose tells it carries: those are deduplicated by position (rule 7)."""

    def new_state(self, partition: int) -> Any:
        """Return the state of a log partition that holds nothing yet."""

    def decide(self, state: Any, record: Any, message: Message, now_ms: int, tables: Tables) -> Decision | None:
        """Return the events that an input causes; None if it changes nothing."""

    def due(self, state: Any, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return what time or a changed table causes now, with its cause; None if nothing does. Called until it is None."""

    def dropped(self, partition: int) -> None:
        """Hear that the state of a partition was thrown away."""

    def next_due_ms(self, state: Any) -> int | None:
        """Return when `due` is to be asked again at the latest, Unix milliseconds; None for no time."""

    def apply(self, state: Any, subject: str, account: str, event: Any, now_ms: int) -> None:
        """Change the state by one event."""

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry; `at(index)` is the position of the index-th of them."""

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """Hear of a changed row of a global table (None: removed)."""

    def tables_loaded(self) -> None:
        """Hear that all rows which were there at the start were told; what is heard from here on is news."""


class CorruptLogError(EventLogError):
    """The log contradicts itself (a broken chain, a gap in seq): people must look before anything goes on."""


class RefusedToStartError(EventLogError):
    """The log or its inputs are not what they were (rule 10). The message says what happened and what can be done."""


class EntryRefusedError(ValueError):
    """A decision cannot become an entry. `decide` bounds what it returns, so this is a defect that must not spread."""


class _Told:
    """Which entries' tells are all acknowledged: `told` is the own offset up to which that is so."""

    __slots__ = ("_waiting", "told")

    def __init__(self, told: int) -> None:
        self.told = told
        self._waiting: deque[list[int]] = deque()

    def expect(self, offset: int, count: int) -> list[int]:
        slot = [offset, count]
        self._waiting.append(slot)
        if not count:
            self.advance()
        return slot

    def advance(self) -> None:
        while self._waiting and self._waiting[0][1] == 0:
            self.told = self._waiting.popleft()[0]


class OwnedPartition:
    """A log partition that this process owns: its state, positions, heads and epoch. Thrown away on any doubt."""

    def __init__(self, machine: Machine, partition: int) -> None:
        self.machine = machine
        self.partition = partition
        self.state: Any = machine.new_state(partition)
        self.epoch = NO_EPOCH
        self.now_ms = 0
        self._base_ms = 0  # see `set_time`
        self._base_s = 0.0
        self.inputs: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.changed_marks: dict[str, int] = {}
        self.heads: dict[str, tuple[int, bytes]] = {}
        self.next_offset = 0
        self.doubt = ""
        self.told = _Told(-1)
        self.since_announcement = 0
        self.recorded_inputs: dict[str, int] = {}
        self.recorded_s = 0.0
        self.repeats = 0
        self.unacknowledged: list[tuple[Entry, list[int]]] = []

    # -- reading the log back ---------------------------------------------------------------

    def fold(self, entry: Entry, value: bytes, offset: int) -> None:
        """Fold a valid entry of the log. Raises CorruptLogError if it does not continue its subject's chain."""
        seq, head = self.heads.get(entry.subject, (0, b""))
        if entry.first_seq != seq + 1 or entry.prev_hash != head:
            raise CorruptLogError(
                f"{self.machine.log_topic}-{self.partition} at offset {offset}: entry of {entry.subject} starts at seq "
                f"{entry.first_seq} after {seq}, and its previous hash {'fits' if entry.prev_hash == head else 'does not fit'}"
            )
        self._take(entry, value)
        self.inputs.update(entry.inputs)
        self.marks.update(entry.marks)
        self.told.told = max(self.told.told, entry.told)

    def _take(self, entry: Entry, value: bytes) -> None:
        self.heads[entry.subject] = (entry.first_seq + len(entry.events) - 1, hashlib.sha256(value).digest())
        self.now_ms = entry.now_ms
        for event in entry.events:
            self.machine.apply(self.state, entry.subject, entry.account, event, entry.now_ms)

    # -- deciding ---------------------------------------------------------------

    def set_time(self, now_ms: int, monotonic_s: float) -> None:
        """Remember a time, and when it was by a clock that never jumps: from there it runs on."""
        self._base_ms, self._base_s = now_ms, monotonic_s

    def time_ms(self, clock_ms: int, monotonic_s: float) -> int:
        """Return the time for a decision. It never goes back, but goes on while the clock is behind what the log has seen:
        a clock that was ahead for a moment, here or at the owner before, must not stop the back-offs of now."""
        running_ms = self._base_ms + int((monotonic_s - self._base_s) * 1000)
        if clock_ms >= running_ms:
            self.set_time(clock_ms, monotonic_s)
        return max(self.now_ms, clock_ms, running_ms)

    def is_stale(self, topic: str, record: Any) -> bool:
        """Tell whether a told message is not above the mark of its source (rule 7); notes its position if it is."""
        source_log = self.machine.marked_topics.get(topic)
        if source_log is None:
            return False
        position: Position = record.source
        name, rank = f"{source_log}-{position.partition}", position.rank()
        if rank <= self.marks.get(name, -1):
            return True
        self.marks[name] = self.changed_marks[name] = rank
        return False

    def make_entry(self, decision: Decision, cause: str, versions: dict[str, int]) -> tuple[Entry, bytes]:
        """Turn a decision into the next entry of its subject, apply it, and return it with its bytes.

        Raises EntryRefusedError, with nothing changed, if it cannot be written or its tells would be too many: once in the
        log, it would stop every owner for good.
        """
        seq, head = self.heads.get(decision.subject, (0, b""))
        entry = Entry(
            subject=decision.subject,
            account=decision.account,
            first_seq=seq + 1,
            epoch=self.epoch,
            now_ms=self.now_ms,
            prev_hash=head,
            inputs=dict(self.inputs),
            marks=self.changed_marks,
            told=self.told.told,
            tables=versions,
            cause=cause,
            events=tuple(decision.events),
        )
        try:
            value = codec.encode_entry(self.machine.entry_kind, entry)
        except ValueError as error:
            raise EntryRefusedError(f"an entry of {decision.subject}: {error}") from error
        if len(value) > MAX_ENTRY_BYTES:
            raise EntryRefusedError(f"an entry of {decision.subject} would have {len(value)} bytes")
        if len(entry.events) >= MANY_EVENTS and len(self.machine.tells(entry, self.position(0))) > MAX_TELLS_PER_ENTRY:
            raise EntryRefusedError(f"an entry of {decision.subject} would have more than {MAX_TELLS_PER_ENTRY} tells")
        self.changed_marks = {}
        self._take(entry, value)
        return entry, value

    def acknowledged(self, slot: list[int], offset: int) -> None:
        """Check rule 3: an offset that is not our last one + 1 means that somebody else wrote."""
        if offset != self.next_offset and not self.doubt:
            self.doubt = (
                f"own record acknowledged at {offset} where {self.next_offset} was expected: another owner wrote"
            )
        self.next_offset = offset + 1
        slot.append(offset)

    def position(self, offset: int) -> Callable[[int], Position]:
        """Return the function that numbers the tells of the entry at `offset`."""
        return lambda index: Position(self.partition, offset, index)


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
    ) -> None:
        self._broker = broker
        self.machine = machine
        self._instance_id = instance_id
        self._clock_ms = clock_ms
        self._monotonic_s = monotonic_s
        self._log_writer: Writer = broker.writer()
        self._tell_writer: Writer = broker.writer()
        self._inbox: Inbox = broker.inbox(f"tidegate-{machine.service}", instance_id, machine.lead_topic)
        self.tables = Tables(machine.table_topics)
        self.owned: dict[int, OwnedPartition] = {}
        self._to_take: set[int] = set()
        self._input_topics = (machine.lead_topic, *machine.other_topics)
        self._last_commit_s = 0.0
        self._log_identity: TopicDescription | None = None
        self.turns = 0
        self._schemas_sought: set[str] = set()

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
            self._record_positions(force=True)
            self._log_writer.flush(WRITE_DEADLINE_S)
            self._tell_writer.flush(WRITE_DEADLINE_S)
            self._commit(force=True)
        except EventLogError as error:
            _log.warning("leaving without a clean flush", error=str(error))
        for part in (self._inbox, self._log_writer, self._tell_writer):
            part.close()

    # -- the protocol ---------------------------------------------------------------

    def run_once(self, timeout_s: float = 0.2) -> int:
        """Run one turn; returns how many entries it logged. Blocks up to `timeout_s` when nothing happens.

        1. Poll inputs, learn of gained and lost partitions. 2. Take over what was gained. 3. Decide on each input, in order;
        the events of one input become one entry. 4. Log the entries and wait until all are acknowledged at the offsets that
        follow our last one. 5. Tell. Raises EventLogError on any doubt that concerns more than one partition; the process
        exits then and takes over afresh.
        """
        self.turns += 1
        messages = self._inbox.poll(MAX_BATCH, self._patience_s(timeout_s))
        self._follow_changes()
        self._take_over_gained()
        for message in messages:
            self._handle(message)
        self._ask_what_is_due()
        failpoint("owner.before-log")
        logged = self._log_and_tell()
        self._tell_writer.poll()
        self._commit()
        self._record_positions()
        return logged

    def _patience_s(self, timeout_s: float) -> float:
        if self._to_take:
            return 0.0
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

    def _drop(self, partition: int, reason: str) -> None:
        self._to_take.discard(partition)
        if self.owned.pop(partition, None) is not None:
            self.machine.dropped(partition)
            _log.info("partition dropped", log=self.machine.log_topic, partition=partition, reason=reason)
            self._inbox.remove([TopicPartition(topic, partition) for topic in self._input_topics])

    # -- 3. decide ---------------------------------------------------------------

    def _handle(self, message: Message) -> None:
        if message.topic in self.tables.rows:
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
        part.now_ms = self._now_ms(part)
        part.inputs[message.topic] = message.offset + 1
        if message.value is None:
            return
        try:
            record = self._decoded(message.value)
            if part.is_stale(message.topic, record):
                return
            decision = self.machine.decide(part.state, record, message, part.now_ms, self.tables)
        except codec.DecodeError as error:
            self._bury(message, part.now_ms, "malformed", str(error))
            return
        except Exception as error:
            # decide mutates nothing, so skipping the message leaves the state whole; the message itself is kept for people.
            _log.exception("decision failed", topic=message.topic, partition=message.partition, offset=message.offset)
            self._bury(message, part.now_ms, "internal_error", f"{type(error).__name__}: {error}")
            return
        if decision is None:
            return
        try:
            self._log_entry(part, decision, f"{message.topic}:{message.partition}:{message.offset}")
        except EntryRefusedError as error:
            _log.exception("entry refused", topic=message.topic, partition=message.partition, offset=message.offset)
            self._bury(message, part.now_ms, "internal_error", str(error))

    def _decoded(self, value: bytes) -> Any:
        """Decode an input. A newer version's schema is looked up first: it is published before the first record of it."""
        try:
            return codec.decode(value)
        except codec.UnknownSchemaError as error:
            if error.fingerprint in self._schemas_sought:
                raise
            self._schemas_sought.add(error.fingerprint)
            load_schemas(self._broker)
            return codec.decode(value)

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
                self._log_entry(part, decision, cause)

    def _bury(self, message: Message, now_ms: int, code: str, reason: str) -> None:
        """Write a dead letter and wait for it: the input counts as read only once its letter is durable."""
        _log.warning("dead letter", topic=message.topic, partition=message.partition, offset=message.offset, code=code)
        letter = dead_letter(message, service=self.machine.service, code=code, reason=reason, run_id="", at_ms=now_ms)
        key = f"{message.topic}:{message.partition}:{message.offset}"
        self._tell_writer.send(Record(DEAD_LETTERS, 0, key.encode(), codec.encode(letter), _headers(letter)))
        self._tell_writer.flush(WRITE_DEADLINE_S)

    # -- 4. log, 5. tell ---------------------------------------------------------------

    def _log_entry(self, part: OwnedPartition, decision: Decision, cause: str) -> None:
        entry, value = part.make_entry(decision, cause, dict(self.tables.versions))
        slot: list[int] = []
        part.unacknowledged.append((entry, slot))
        self._log_writer.send(
            Record(
                self.machine.log_topic,
                part.partition,
                entry_key(entry.subject, entry.first_seq, entry.epoch).encode(),
                value,
                ((TYPE_HEADER, self.machine.entry_kind.encode()), (EPOCH_HEADER, b"%d" % entry.epoch)),
            ),
            lambda offset: part.acknowledged(slot, offset),
        )
        part.since_announcement += 1
        if part.since_announcement >= ANNOUNCE_EVERY_ENTRIES:
            self._announce_again(part)

    def _log_and_tell(self) -> int:
        """Wait for the acknowledgements, drop partitions in doubt before anything of theirs is told, tell the others."""
        busy = [part for part in self.owned.values() if part.unacknowledged or part.doubt]
        if not busy:
            return 0
        self._log_writer.flush(WRITE_DEADLINE_S)
        failpoint("owner.after-log")
        logged = 0
        for part in busy:
            if part.doubt:
                self._drop(part.partition, part.doubt)
                self._to_take.add(part.partition)
                continue
            batch, part.unacknowledged = part.unacknowledged, []
            logged += len(batch)
            for entry, slot in batch:
                self._tell(part, entry, slot[0])
            failpoint("owner.after-tell")
        return logged

    def _tell(self, part: OwnedPartition, entry: Entry, offset: int) -> None:
        tells = self.machine.tells(entry, part.position(offset))
        if len(tells) > MAX_TELLS_PER_ENTRY:
            raise EventLogError(f"an entry of {entry.subject} has {len(tells)} tells, more than {MAX_TELLS_PER_ENTRY}")
        slot = part.told.expect(offset, len(tells))

        def acked(_: int) -> None:
            slot[1] -= 1
            if not slot[1]:
                part.told.advance()

        for tell in tells:
            self._tell_writer.send(
                Record(tell.topic, tell.partition, tell.key.encode(), codec.encode(tell.record), _headers(tell.record)),
                acked,
            )

    # -- 2. take over ---------------------------------------------------------------

    def _take_over_gained(self) -> None:
        if not self._to_take:
            return
        partition = min(self._to_take)  # one a turn, so that the others are not kept waiting
        self._to_take.discard(partition)
        self.owned[partition] = self._take_over(partition)

    def _take_over(self, partition: int) -> OwnedPartition:
        """Announce, fold the log up to the announcement, tell again what may be untold, and read on from what it records."""
        began = self._monotonic_s()
        identity = self._identity()
        part = OwnedPartition(self.machine, partition)
        start = self._broker.offsets(self.machine.log_topic, partition).start
        part.epoch = self._announce(part, identity, NO_EPOCH)
        part.next_offset = part.epoch + 1
        failpoint("owner.after-announce")
        untold = self._restore(part, identity, start, part.epoch)
        part.set_time(part.now_ms, self._monotonic_s())
        part.recorded_inputs, part.recorded_s = dict(part.inputs), self._monotonic_s()
        positions = self._checked_positions(part)
        for offset, entry in untold:
            if offset > part.told.told:
                self._tell(part, entry, offset)
        self._inbox.add(positions)
        _log.info(
            "partition taken over",
            log=self.machine.log_topic,
            partition=partition,
            epoch=part.epoch,
            told_again=len(untold),
            seconds=round(self._monotonic_s() - began, 3),
        )
        return part

    def _restore(
        self, part: OwnedPartition, identity: TopicDescription, start: int, stop: int
    ) -> list[tuple[int, Entry]]:
        """Fold the valid entries in start..stop; returns those whose tells may not have been sent, oldest first."""
        tracker = EpochTracker()
        untold: deque[tuple[int, Entry]] = deque()
        for count, message in enumerate(self._broker.read(self.machine.log_topic, part.partition, start, stop), 1):
            if count % RESTORE_PROGRESS_EVERY == 0:
                _log.info("restoring", log=self.machine.log_topic, partition=part.partition, at=message.offset, of=stop)
            if message.value is None:
                continue
            record = codec.decode(message.value)
            if isinstance(record, OwnerAnnounced):
                self._check_announcement(record, identity)
                tracker.announced(message.offset, record.epoch)
                if tracker.is_valid(record.epoch):
                    part.inputs.update(record.inputs)
                    part.marks.update(record.marks)
            elif tracker.is_valid(record.epoch):
                part.fold(record, message.value, message.offset)
                untold.append((message.offset, record))
                while untold and untold[0][0] <= part.told.told:
                    untold.popleft()
        return [item for item in untold if item[0] > part.told.told]

    def _check_announcement(self, record: OwnerAnnounced, identity: TopicDescription) -> None:
        if record.partition_count != identity.partition_count:
            raise RefusedToStartError(
                f"{record.log} had {record.partition_count} partitions when it was written and has {identity.partition_count} "
                "now. Runs would be looked for in the wrong partition. Restore the topic with its old partition count."
            )
        if record.topic_id != identity.topic_id:
            raise RefusedToStartError(
                f"{record.log} was written under topic id {record.topic_id} and is {identity.topic_id} now: it was deleted and "
                "made again, and its recorded offsets mean nothing. Restore it from a backup under a new installation."
            )

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
                    f"{recorded}: messages were deleted unread. Restore the topic, or raise its retention and accept the loss "
                    "by hand."
                )
            elif recorded > end:
                raise RefusedToStartError(
                    f"{topic}-{part.partition} ends at offset {end}, but {self.machine.log_topic} has consumed it up to "
                    f"{recorded}: the topic was made again or lost records. Restore it from a backup."
                )
            part.inputs[topic] = recorded
            positions[TopicPartition(topic, part.partition)] = recorded
        return positions

    def _identity(self) -> TopicDescription:
        if self._log_identity is None:
            found = self._broker.describe([self.machine.log_topic]).get(self.machine.log_topic)
            if found is None:
                raise RefusedToStartError(f"topic {self.machine.log_topic} does not exist: run `tidegate topics apply`")
            self._log_identity = found
        return self._log_identity

    def _announcement(self, part: OwnedPartition, identity: TopicDescription, epoch: int, repeat: int) -> Record:
        record = OwnerAnnounced(
            log=self.machine.log_topic,
            partition=part.partition,
            epoch=epoch,
            repeat=repeat,
            topic_id=identity.topic_id,
            partition_count=identity.partition_count,
            instance_id=self._instance_id,
            at_ms=self._clock_ms(),
            inputs=dict(part.inputs) if repeat else {},
            marks=dict(part.marks) if repeat else {},
        )
        # A first announcement cannot name its epoch, so its key is made unique by who announced and when.
        name = f"{epoch}:{repeat}" if repeat else f"{self._instance_id}:{time.time_ns()}"
        headers = ((TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()), (EPOCH_HEADER, b"%d" % epoch))
        return Record(self.machine.log_topic, part.partition, f"owner:{name}".encode(), codec.encode(record), headers)

    def _announce(self, part: OwnedPartition, identity: TopicDescription, epoch: int) -> int:
        offsets: list[int] = []
        self._log_writer.send(self._announcement(part, identity, epoch, 0), offsets.append)
        self._log_writer.flush(WRITE_DEADLINE_S)
        return offsets[0]

    def _announce_again(self, part: OwnedPartition) -> None:
        part.since_announcement = 0
        part.recorded_inputs, part.recorded_s = dict(part.inputs), self._monotonic_s()
        part.repeats += 1
        record = self._announcement(part, self._identity(), part.epoch, part.repeats)
        self._log_writer.send(record, lambda offset: part.acknowledged([], offset))

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
            self._inbox.commit({p: part.inputs[lead] for p, part in self.owned.items() if lead in part.inputs})


def _headers(record: Any) -> Headers:
    return ((TYPE_HEADER, type(record).__name__.encode()),)


__all__ = [
    "CorruptLogError",
    "Decision",
    "Machine",
    "OffsetOutOfRangeError",
    "OwnedPartition",
    "OwnerLoop",
    "RefusedToStartError",
    "Tell",
]
