"""A log in memory that keeps the promises of the real one, for simulation and unit tests.

Single-threaded, never sleeps, and decides nothing by itself: with the same calls and the same seed the same things happen.
It passes the suite that Kafka passes (`tests/contract`). On top of that it can be made to do on demand what Kafka does at
the worst of times: compact, expire a member, lose a process with its records half written, deliver late what a dead
process had sent.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NoReturn

from tidegate.eventlog.interface import (
    EventLogError,
    Message,
    OffsetOutOfRangeError,
    Offsets,
    OwnershipChange,
    Record,
    TopicDescription,
    TopicPartition,
    UnknownTopicError,
    WriteFailedError,
)

DEFAULT_MAX_MESSAGE_BYTES = 1_048_588  # Kafka's
MAX_RECORD_BYTES = 16 * 1024 * 1024
FETCH_RECORDS = 50


class MemoryBroker:
    """Topics, groups and what goes wrong with them; implements `interface.Broker`. Not thread-safe.

    clock_ms: gives the records their timestamps.
    rng: decides everything that a real broker leaves to chance: how much of what was sent has been written or
    acknowledged at a poll, how many messages a poll returns, what becomes of a dead process's records. Without one,
    everything happens at once and what was sent is written.
    """

    def __init__(self, *, clock_ms: Callable[[], int] = lambda: 0, rng: Random | None = None) -> None:
        self._clock_ms = clock_ms
        self._rng = rng
        self._topics: dict[str, _Topic] = {}
        self._groups: dict[str, _Group] = {}
        self._topics_made = 0
        self._reachable = True
        self._stragglers: list[tuple[TopicPartition, deque[_Sent]]] = []
        self._on_written: Callable[[Message], None] | None = None

    # -- interface.Broker -----------------------------------------------------------------------------------------

    def writer(self) -> MemoryWriter:
        """Return a new idempotent producer."""
        return MemoryWriter(self)

    def inbox(self, group: str, instance_id: str, lead_topic: str) -> MemoryInbox:
        """Return a new member of a group that shares `lead_topic`. It joins at its first poll."""
        shared = self._groups.get(group)
        if shared is None:
            shared = self._groups[group] = _Group(lead_topic, lambda: self._topic(lead_topic).partition_count)
        return MemoryInbox(self, shared, instance_id)

    def plain_inbox(self) -> MemoryInbox:
        """Return an inbox without a group: only `poll`, `read_from`, `add`, `remove` and `close` make sense."""
        return MemoryInbox(self, None, "")

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        """Yield the records with start <= offset < stop that compaction has left.

        Raises OffsetOutOfRangeError if `start` is no longer kept or `stop` is beyond the end, UnknownTopicError, and
        EventLogError while the broker is out of reach.
        """
        if stop <= start:
            return
        log = self.log(TopicPartition(topic, partition))
        if start < log.start or stop > log.end:
            raise OffsetOutOfRangeError(
                f"{topic} [{partition}] holds the offsets {log.start} to {log.end}, not {start} to {stop}"
            )
        while found := log.some_from(start, FETCH_RECORDS):
            for message in found:
                if message.offset >= stop:
                    return
                yield message
                self._check_reach()
            start = found[-1].offset + 1

    def offsets(self, topic: str, partition: int) -> Offsets:
        """Return the partition's first and next offset. Raises UnknownTopicError."""
        log = self.log(TopicPartition(topic, partition))
        return Offsets(log.start, log.end)

    def describe(self, topics: Sequence[str]) -> dict[str, TopicDescription]:
        """Return the descriptions of those of the topics that exist."""
        self._check_reach()
        return {
            name: TopicDescription(name, topic.topic_id, topic.partition_count, 1, dict(topic.config))
            for name in topics
            if (topic := self._topics.get(name)) is not None
        }

    # -- topics ---------------------------------------------------------------------------------------------------

    def create_topic(self, name: str, partition_count: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Make a topic, with a topic id that no other ever has. `config` as in Kafka, by the same names."""
        if name in self._topics:
            raise ValueError(f"topic {name} exists")
        self._topics_made += 1
        self._topics[name] = _Topic(name, f"topic-{self._topics_made}", partition_count, dict(config or {}))

    def delete_topic(self, name: str) -> None:
        """Remove a topic with all its records."""
        del self._topics[name]

    def compact(self, name: str, below: Mapping[int, int] | None = None) -> None:
        """Keep only the last record of every key. Offsets stay, with holes; tombstones stay until `purge`.

        below: per partition, the offset from which on records are too young for it (`min.compaction.lag.ms`): they stay, and
        what they repeat stays too. A partition that is not named is compacted as a whole.
        """
        for partition, log in enumerate(self._topic(name).logs):
            log.compact(log.end if below is None else below.get(partition, log.end))

    def purge(self, name: str) -> None:
        """Compact when the tombstones have been kept long enough: they go too."""
        self.compact(name)
        for log in self._topic(name).logs:
            log.keep(lambda message: message.value is not None)

    def delete_before(self, name: str, partition: int, offset: int) -> None:
        """Let retention take the records below `offset`, which becomes the first one kept."""
        log = self.log(TopicPartition(name, partition))
        log.start = max(log.start, min(offset, log.end))
        log.keep(lambda message: message.offset >= log.start)

    def lose(self, name: str, partition: int, offset: int) -> None:
        """Let a record vanish that was acknowledged, as a damaged disk or an unclean election would."""
        self.log(TopicPartition(name, partition)).keep(lambda message: message.offset != offset)

    def waste_offsets(self, name: str, partition: int, count: int) -> None:
        """Use up offsets for records that no reader ever sees, as aborted and committed transactions do."""
        self.log(TopicPartition(name, partition)).end += count

    # -- groups ---------------------------------------------------------------------------------------------------

    def expire(self, group: str, instance_id: str) -> None:
        """Let a member's session end: the others share its partitions. If it still runs, it finds out at its next poll."""
        self._groups[group].expire(instance_id)

    def committed(self, group: str) -> dict[int, int]:
        """Return the offsets that the group's members have committed."""
        return dict(self._groups[group].committed)

    def on_written(self, listener: Callable[[Message], None] | None) -> None:
        """Have every record told to the listener as soon as it is written, in the order of writing."""
        self._on_written = listener

    # -- trouble --------------------------------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Cut everybody off: nothing is written, acknowledged or read until `restore`."""
        self._reachable = False

    def restore(self) -> None:
        """Let everybody reach the broker again."""
        self._reachable = True

    def crash(self, writer: MemoryWriter) -> None:
        """Kill the writer's process. Of what was not written, some is, some will be (`land_stragglers`), some never.

        In each partition these are consecutive: a record is never written without those sent before it.
        """
        for at, unwritten in writer.abandon():
            on_the_wire = deque(list(unwritten)[: self.some(len(unwritten))])
            self._stragglers.append((at, on_the_wire))
            self._land(at, on_the_wire, self.some(len(on_the_wire)))

    def fail(self, writer: MemoryWriter, reason: str = "made to fail") -> None:
        """As `crash`, but the process lives and hears of it: WriteFailedError from every further call."""
        self.crash(writer)
        writer.failure = WriteFailedError(reason)

    def land_stragglers(self) -> int:
        """Write records of dead processes that were still under way, all or some as `rng` says; returns how many."""
        landed = sum(self._land(at, queue, self.some(len(queue))) for at, queue in self._stragglers)
        self._stragglers = [(at, queue) for at, queue in self._stragglers if queue]
        return landed

    def calm_down(self) -> None:
        """Leave nothing to chance any more: from now on everything happens at once, as without `rng`."""
        self._rng = None

    # -- for writers and inboxes of this module -------------------------------------------------------------------

    @property
    def reachable(self) -> bool:
        return self._reachable

    def log(self, at: TopicPartition) -> _Log:
        """Return a partition's log. Raises UnknownTopicError, and EventLogError while out of reach."""
        self._check_reach()
        topic = self._topic(at.topic)
        if not 0 <= at.partition < topic.partition_count:
            raise UnknownTopicError(f"{at.topic} has no partition {at.partition}")
        return topic.logs[at.partition]

    def write(self, at: TopicPartition, sent: _Sent) -> None:
        """Append a record, or raise WriteFailedError for the reasons for which Kafka refuses one."""
        try:
            log = self.log(at)
        except UnknownTopicError as error:
            raise WriteFailedError(str(error)) from error
        config = self._topics[at.topic].config
        size = len(sent.record.key) + len(sent.record.value or b"")
        if size > int(config.get("max.message.bytes", DEFAULT_MAX_MESSAGE_BYTES)):
            raise WriteFailedError(f"{at.topic} [{at.partition}]: a record of {size} bytes is too large")
        message = log.append(sent.record, sent.timestamp_ms)
        sent.offset = message.offset
        if self._on_written is not None:
            self._on_written(message)

    def now_ms(self) -> int:
        return self._clock_ms()

    def some(self, most: int) -> int:
        """Return how many of `most` things happen now."""
        return most if self._rng is None else self._rng.randint(0, most)

    def shuffled(self, partitions: Sequence[TopicPartition]) -> list[TopicPartition]:
        """Return the partitions in the order in which something happens to them."""
        if self._rng is None:
            return list(partitions)
        return self._rng.sample(partitions, len(partitions))

    def _land(self, at: TopicPartition, queue: deque[_Sent], count: int) -> int:
        """Write records of a process that hears of it no more; returns how many."""
        if not self._reachable:
            return 0
        for landed in range(count):
            try:
                self.write(at, queue[0])
            except WriteFailedError:
                queue.clear()  # what was sent after a refused record is refused too
                return landed
            queue.popleft()
        return count

    def _topic(self, name: str) -> _Topic:
        if name not in self._topics:
            raise UnknownTopicError(f"topic {name} does not exist")
        return self._topics[name]

    def _check_reach(self) -> None:
        if not self._reachable:
            raise EventLogError("the broker is out of reach")


class MemoryWriter:
    """An idempotent producer; implements `interface.Writer`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.failure: WriteFailedError | None = None
        self._broker = broker
        self._outbound: dict[TopicPartition, _Outbound] = {}

    def send(self, record: Record, acked: Callable[[int], None] | None = None) -> None:
        """Buffer a record. `acked(offset)` is called in order per partition, from a later `poll` or `flush`."""
        self._check()
        at = TopicPartition(record.topic, record.partition)
        if len(record.value or b"") > MAX_RECORD_BYTES:
            self._die(at, WriteFailedError(f"a record for {record.topic} is larger than {MAX_RECORD_BYTES} bytes"))
        outbound = self._outbound.get(at)
        if outbound is None:
            outbound = self._outbound[at] = _Outbound()
        outbound.unwritten.append(_Sent(record, acked, self._broker.now_ms()))

    def poll(self) -> None:
        """Write some of what was sent and run the callbacks of some of what was written. Raises WriteFailedError."""
        self._check()
        if not self._broker.reachable:
            return
        for at in self._broker.shuffled(list(self._outbound)):
            if (outbound := self._outbound.get(at)) is not None:  # a callback may have ended this writer
                self._write(at, outbound, self._broker.some(len(outbound.unwritten)))
                outbound.acknowledge(self._broker.some(len(outbound.written)))

    def flush(self, timeout_s: float) -> None:
        """Write and acknowledge everything. Raises WriteFailedError at once if the broker is out of reach."""
        self._check()
        while self._has_unacknowledged():  # a callback may send more
            if not self._broker.reachable:
                self._broker.fail(self, f"records were not acknowledged within {timeout_s} s")
                self._check()
            for at in self._broker.shuffled(list(self._outbound)):
                if (outbound := self._outbound.get(at)) is not None:
                    self._write(at, outbound, len(outbound.unwritten))
                    outbound.acknowledge(len(outbound.written))

    def close(self) -> None:
        """Give up what is not acknowledged. Does not raise."""
        if self.failure is None:
            self._broker.crash(self)

    def abandon(self) -> list[tuple[TopicPartition, deque[_Sent]]]:
        """Die, and return what was not written."""
        self.failure = self.failure or WriteFailedError("the writer is closed")
        given_up, self._outbound = self._outbound, {}
        return [(at, outbound.unwritten) for at, outbound in given_up.items() if outbound.unwritten]

    def _has_unacknowledged(self) -> bool:
        return any(outbound.unwritten or outbound.written for outbound in self._outbound.values())

    def _write(self, at: TopicPartition, outbound: _Outbound, count: int) -> None:
        for _ in range(count):
            try:
                self._broker.write(at, outbound.unwritten[0])
            except WriteFailedError as error:
                self._die(at, error)
            outbound.written.append(outbound.unwritten.popleft())

    def _die(self, at: TopicPartition, error: WriteFailedError) -> NoReturn:
        """Nothing sent after the refused record is written to its partition; the others are as after a crash."""
        self.failure = error
        self._outbound.pop(at, None)
        self._broker.crash(self)
        raise error

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure


class MemoryInbox:
    """A consumer with ownership by a group; implements `interface.Inbox`. Its polls never wait."""

    def __init__(self, broker: MemoryBroker, group: _Group | None, instance_id: str) -> None:
        self._broker = broker
        self._group = group
        self._member = _Member(instance_id)
        self._positions: dict[TopicPartition, int] = {}
        self._reported: frozenset[int] = frozenset()
        self._lost: frozenset[int] = frozenset()
        self._closed = False

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """Where each partition is read on."""
        return self._positions

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return messages of the partitions in `read_from`, in order per partition, without waiting for any.

        Raises EventLogError when another process has taken our instance id, and OffsetOutOfRangeError.
        """
        self.stay()
        if not self._broker.reachable:
            return []
        for at in self._positions:
            self._check_position(at)
        messages: list[Message] = []
        for at in self._broker.shuffled(list(self._positions)):
            messages += self._next(at, max_messages - len(messages))
        return messages

    def stay(self) -> None:
        """Take part in the group and read nothing. Raises EventLogError when another process has taken our instance id."""
        if self._closed:
            raise EventLogError("the inbox is closed")
        if self._group is not None and self._broker.reachable:
            self._lose(self._group.serve(self._member))
            if self._member.is_fenced:
                raise EventLogError(f"another process has joined as {self._member.instance_id}")

    def take_changes(self) -> OwnershipChange:
        """Return what the group changed since the last call."""
        lost = self._reported & self._lost
        gained = self._member.owned - (self._reported - lost)
        self._reported, self._lost = self._member.owned, frozenset()
        return OwnershipChange(gained, lost)

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """Replace what is read. Lead partitions that the group has taken since are left out."""
        self._positions = {}
        self.add(positions)

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too. Lead partitions that the group has taken since are left out."""
        for at in positions:
            self._broker.log(at)
        self._positions |= {at: offset for at, offset in positions.items() if self._may_read(at)}

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        """Stop reading these partitions."""
        for at in partitions:
            self._positions.pop(at, None)

    @property
    def has_share(self) -> bool:
        """Tell whether we have our share of the group's partitions, be it none of them."""
        return self._group is None or self._member.has_share

    def ends(self) -> dict[TopicPartition, int]:
        """Return the next offset to be written of each partition being read. Does not block."""
        return {at: self._broker.log(at).end for at in self._positions}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Note next offsets of lead partitions in the group; ignored from a member that the group does not know."""
        if self._group is not None and self._broker.reachable:
            self._group.commit(self._member, positions)

    def close(self) -> None:
        """Leave. The place in the group is kept until `MemoryBroker.expire`, so that a restart finds it again."""
        self._closed = True

    def _may_read(self, at: TopicPartition) -> bool:
        if self._group is None or at.topic != self._group.topic:
            return True
        return at.partition in self._member.owned and at.partition not in self._lost

    def _lose(self, lost: frozenset[int]) -> None:
        self._lost |= lost
        if self._group is not None:
            self.remove([TopicPartition(self._group.topic, partition) for partition in lost])

    def _check_position(self, at: TopicPartition) -> None:
        log, position = self._broker.log(at), self._positions[at]
        if not log.start <= position <= log.end:
            raise OffsetOutOfRangeError(f"{at.topic} [{at.partition}] holds {log.start} to {log.end}, not {position}")

    def _next(self, at: TopicPartition, room: int) -> list[Message]:
        found = self._broker.log(at).some_from(self._positions[at], room)
        found = found[: self._broker.some(len(found))]
        if found:
            self._positions[at] = found[-1].offset + 1
        return found


@dataclass(slots=True, eq=False)
class _Sent:
    """A record on its way. `offset` is set once it is written."""

    record: Record
    acked: Callable[[int], None] | None
    timestamp_ms: int
    offset: int = -1


@dataclass(slots=True, eq=False)
class _Outbound:
    """What a writer has under way to one partition: first not written, then written but not acknowledged."""

    unwritten: deque[_Sent] = field(default_factory=deque)
    written: deque[_Sent] = field(default_factory=deque)

    def acknowledge(self, count: int) -> None:
        for _ in range(min(count, len(self.written))):
            sent = self.written.popleft()
            if sent.acked is not None:
                sent.acked(sent.offset)


class _Log:
    """The records of one partition."""

    def __init__(self, name: str, partition: int) -> None:
        self.start = 0
        self.end = 0
        self.messages: list[Message] = []
        self._name = name
        self._partition = partition

    def append(self, record: Record, timestamp_ms: int) -> Message:
        message = Message(self._name, self._partition, self.end, record.key, record.value, record.headers, timestamp_ms)
        self.end += 1
        self.messages.append(message)
        return message

    def some_from(self, offset: int, count: int) -> list[Message]:
        first = max(0, offset - self.start)
        if len(self.messages) != self.end - self.start:  # there are holes
            first = bisect_left(self.messages, offset, key=lambda message: message.offset)
        return self.messages[first : first + count]

    def compact(self, below: int) -> None:
        last = {message.key: message.offset for message in self.messages if message.offset < below}
        self.keep(lambda message: message.offset >= below or message.offset == last[message.key])

    def keep(self, wanted: Callable[[Message], bool]) -> None:
        self.messages = [message for message in self.messages if wanted(message)]


class _Topic:
    """A topic's identity, configuration and logs."""

    def __init__(self, name: str, topic_id: str, partition_count: int, config: dict[str, str]) -> None:
        self.topic_id = topic_id
        self.partition_count = partition_count
        self.config = config
        self.logs = [_Log(name, partition) for partition in range(partition_count)]


@dataclass(slots=True, eq=False)
class _Member:
    """One process's part in a group: what it has been told, which may be out of date."""

    instance_id: str
    owned: frozenset[int] = frozenset()
    generation: int = -1
    has_joined: bool = False
    has_share: bool = False
    is_fenced: bool = False


@dataclass(slots=True)
class _Group:
    """A classic group with static members and the range assignor: a rebalance revokes everything from everybody.

    `seats` are the instance ids that the group counts on, each with the member that sits there. A rebalance ends when
    every seat has answered, so one that is silent holds it up until it is expired, as in Kafka.
    """

    topic: str
    partition_count: Callable[[], int]
    seats: dict[str, _Member] = field(default_factory=dict)
    shares: dict[str, frozenset[int]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    generation: int = 0
    is_rebalancing: bool = False
    committed: dict[int, int] = field(default_factory=dict)

    def serve(self, member: _Member) -> frozenset[int]:
        """Let a member take part; returns the partitions that it loses. What it gains is in `member.owned`."""
        lost: frozenset[int] = frozenset()
        seated = self.seats.get(member.instance_id)
        if seated is not member:
            lost = self._revoke(member)
            if seated is not None and member.has_joined:
                member.is_fenced = True
                return lost
            self._sit_down(member, replaces=seated)
        if self.is_rebalancing and member.instance_id not in self.answered:
            lost |= self._revoke(member)
            self.answered.add(member.instance_id)
        self._finish_if_all_answered()
        if not self.is_rebalancing and member.generation != self.generation:
            member.generation = self.generation
            member.owned, member.has_share = self.shares[member.instance_id], True
        return lost

    def expire(self, instance_id: str) -> None:
        if self.seats.pop(instance_id, None) is not None:
            self._rebalance()
            self._finish_if_all_answered()

    def commit(self, member: _Member, positions: Mapping[int, int]) -> None:
        if self.seats.get(member.instance_id) is member and member.generation == self.generation:
            self.committed.update(positions)

    def _sit_down(self, member: _Member, replaces: _Member | None) -> None:
        self.seats[member.instance_id] = member
        member.has_joined = True
        if replaces is None:
            self._rebalance()
        else:
            self.answered.discard(member.instance_id)  # if a rebalance is under way, the newcomer answers for itself

    def _rebalance(self) -> None:
        self.is_rebalancing = True
        self.answered.clear()

    def _finish_if_all_answered(self) -> None:
        if not self.is_rebalancing or self.answered != set(self.seats):
            return
        self.is_rebalancing = False
        self.generation += 1
        self.shares = _ranges(sorted(self.seats), self.partition_count())

    def _revoke(self, member: _Member) -> frozenset[int]:
        lost, member.owned, member.has_share = member.owned, frozenset(), False
        return lost


def _ranges(members: Sequence[str], partition_count: int) -> dict[str, frozenset[int]]:
    """Share out consecutive partitions as Kafka's range assignor does: the first members get one more."""
    shares, begin = {}, 0
    for index, member in enumerate(members):
        size = partition_count // len(members) + (index < partition_count % len(members))
        shares[member] = frozenset(range(begin, begin + size))
        begin += size
    return shares
