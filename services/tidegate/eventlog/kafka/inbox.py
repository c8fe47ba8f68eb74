"""Reading from Kafka: as a member of a group, or as told to.

Two clients make an `Inbox`. One is the group's member: it learns which partitions of the lead topic are ours, reads
nothing, and commits. The other reads what it is told to and knows no group. So a rebalance, which in the classic
protocol takes everything from everybody for a moment, does not touch what is being read: only a partition that the
group takes from us stops, at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (
    AdminClient,
)

from tidegate.eventlog.interface import (
    EventLogError,
    Message,
    Offsets,
    OwnershipChange,
    TopicPartition,
    UnknownTopicError,
)
from tidegate.eventlog.kafka import clients
from tidegate.eventlog.kafka.clients import (
    MAX_REQUEST_BYTES,
    PASSING,
    PASSING_IN_GROUP,
    UNKNOWN_TOPIC,
    as_log_error,
    connection,
    group_contact,
    headers_of,
    is_fatal,
    known_ends,
    leave,
    log_errors,
    make_consumer,
    patiently,
)
from tidegate.eventlog.kafka.renewal import RenewingConsumer
from tidegate.eventlog.settings import READERS_GROUP, KafkaSettings

_log = logging.getLogger(__name__)
MAX_PREFETCH_KIB = 32 * 1024
MAX_FETCH_BATCH = 2_000
READ_SILENCE_S = 60.0
# While messages are waited for, the group is served so often, which bounds how late a rebalance is answered: more often
# while we wait for our partitions.
SETTLED_SERVE_INTERVAL_S = 0.05
JOINING_SERVE_INTERVAL_S = 0.005


class KafkaInbox:
    """A consumer with ownership by a group; implements `interface.Inbox`. Not thread-safe."""

    def __init__(self, reader: Reader, member: Member | None, lead_topic: str) -> None:
        self._reader = reader
        self._member = member
        self._lead_topic = lead_topic
        if member is not None:
            member.on_loss = self._drop

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return messages of the partitions in `read_from`, in order per partition; waits for the first one only.

        Blocks up to `timeout_s`, less if the group's ownership changes. Also keeps the group membership alive.
        Raises EventLogError on fatal errors and OffsetOutOfRangeError for a position that is not there.
        """
        if self._member is None:
            return self._reader.poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        messages: list[Message] = []
        while True:
            left_s = max(0.0, deadline - time.monotonic())
            if self._reader.is_reading:
                self._member.serve(0)
                wait_s = 0.0 if self._member.has_changes else min(left_s, self._member.serve_interval_s)
                messages = self._reader.poll(max_messages, wait_s)
            else:
                self._member.serve(left_s)
            if messages or self._member.has_changes or time.monotonic() >= deadline:
                return messages

    def stay(self) -> None:
        """Keep the group membership alive and read nothing. Does not block. Raises EventLogError when shut out."""
        if self._member is not None:
            self._member.serve(0)

    def take_changes(self) -> OwnershipChange:
        """Return what the group changed since the last call. A lost partition is read no more from the moment of loss.

        A partition that was lost and given back is both lost and gained: another may have owned it in between.
        """
        if self._member is None:
            return OwnershipChange(frozenset(), frozenset())
        return self._member.take_changes()

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """Replace what is read by these partitions, at these numeric offsets. Buffered messages of before are dropped.

        Lead partitions that the group has taken since, which `take_changes` will tell, are left out.
        """
        self._reader.read_from(self._permitted(positions))

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too, from these offsets, without disturbing the others.

        Lead partitions that the group has taken since, which `take_changes` will tell, are left out.
        """
        self._reader.add(self._permitted(positions))

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        """Stop reading these partitions; messages of them that are buffered are dropped."""
        self._reader.remove(partitions)

    @property
    def has_share(self) -> bool:
        """Tell whether we have our share of the group's partitions, be it none of them. Any thread may ask."""
        return self._member is None or self._member.has_share

    def ends(self) -> dict[TopicPartition, int]:
        """Return the next offset to be written of each partition being read, as far as it is known. Does not block."""
        return self._reader.ends()

    def commit(self, positions: Mapping[int, int]) -> None:
        """Note next offsets of lead partitions in the group, without waiting. Failure is harmless and silent."""
        if self._member is not None and positions:
            self._member.commit(positions)

    def close(self) -> None:
        """Leave. A static member keeps its place until its session ends, so that a restart finds it again."""
        if self._member is not None:
            self._member.close()
        self._reader.close()

    def _permitted(self, positions: Mapping[TopicPartition, int]) -> Mapping[TopicPartition, int]:
        if self._member is None:
            return positions
        may_read = self._member.is_ours
        return {
            at: offset for at, offset in positions.items() if at.topic != self._lead_topic or may_read(at.partition)
        }

    def _drop(self, lost: frozenset[int]) -> None:
        self._reader.remove([TopicPartition(self._lead_topic, partition) for partition in lost])


class Member:
    """A static member of a classic consumer group. It reads nothing: it knows which partitions are ours."""

    def __init__(
        self, settings: KafkaSettings, group: str, instance_id: str, lead_topic: str, admin: Callable[[], AdminClient]
    ) -> None:
        self.on_loss: Callable[[frozenset[int]], None] = lambda _: None
        self._settings = settings
        self._group = settings.topic_prefix + group
        self._instance_id = instance_id
        self._topic = settings.topic_prefix + lead_topic
        self._admin = admin
        self._owned: frozenset[int] = frozenset()
        self._reported: frozenset[int] = frozenset()  # what the last `take_changes` left its caller with
        self._lost: frozenset[int] = frozenset()  # taken at some moment since
        self._failure: EventLogError | None = None
        self._member_id = ""  # by which the group knew us when it last gave us partitions
        self._contact = group_contact(settings, self._topic)
        self._consumer = self._join()

    @property
    def serve_interval_s(self) -> float:
        return SETTLED_SERVE_INTERVAL_S if self.has_share else JOINING_SERVE_INTERVAL_S

    @property
    def has_share(self) -> bool:
        return self._contact.has_share

    @property
    def has_changes(self) -> bool:
        return bool(self._lost) or self._owned != self._reported

    def is_ours(self, partition: int) -> bool:
        """Tell whether the caller owns the partition and knows it: not so if it was lost and came back since."""
        return partition in self._owned and partition not in self._lost

    def serve(self, timeout_s: float) -> None:
        """Take part in the group. Blocks up to `timeout_s` for the next event. Raises EventLogError when shut out."""
        if self._failure is not None:
            raise self._failure
        self._contact.check()
        try:
            event = self._consumer.poll(timeout_s)
        except KafkaException as failure:
            self._shut_out(failure.args[0])
            return
        error = None if event is None else event.error()
        if error is None or error.code() in PASSING_IN_GROUP:
            return
        if error.code() in UNKNOWN_TOPIC:
            raise as_log_error(error, f"{self._topic}: ")
        if is_fatal(error) or not error.retriable():
            self._shut_out(error)

    def take_changes(self) -> OwnershipChange:
        lost = self._reported & self._lost
        gained = self._owned - (self._reported - lost)
        self._reported, self._lost = self._owned, frozenset()
        return OwnershipChange(gained, lost)

    def commit(self, positions: Mapping[int, int]) -> None:
        offsets = [KafkaPartition(self._topic, partition, offset) for partition, offset in positions.items()]
        with suppress(KafkaException):
            self._consumer.commit(offsets=offsets, asynchronous=True)

    def close(self) -> None:
        leave(self._consumer)

    def _join(self) -> Consumer:
        consumer = make_consumer(self._settings, _member_config(self._settings, self._group, self._instance_id))
        consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)
        return consumer

    def _on_assign(self, consumer: Consumer, partitions: list[KafkaPartition]) -> None:
        # An empty assignment is the answer that the group waits for, and keeps this client from fetching anything.
        consumer.assign([])
        self._contact.gained()
        self._member_id = consumer.memberid() or ""
        self._owned = frozenset(p.partition for p in partitions if p.topic == self._topic)

    def _on_revoke(self, consumer: Consumer, _partitions: list[KafkaPartition]) -> None:
        # First: once the group has its answer, another member may own them.
        self._lose_all()
        consumer.unassign()

    def _shut_out(self, error: KafkaError) -> None:
        """Join afresh if it is sure that nobody else has our place, else raise EventLogError, now and ever after.

        When no broker was in reach for longer than the session, the client forgets its member id, and the broker, which
        does not, takes it for another process with the same instance id: a fatal error, although there is only one.
        Joining again without proof could shut out our successor, and it us, without end.
        """
        self._lose_all()
        if is_fatal(error) and self._member_id and self._place_holder() in {"", self._member_id}:
            _log.warning("joining the group of %s afresh after: %s", self._topic, error)
            self.close()
            self._member_id = ""
            self._consumer = self._join()
            return
        self._failure = EventLogError(f"shut out of the group of {self._topic}: {error}")
        raise self._failure

    def _place_holder(self) -> str:
        """Return the id of the member that the group knows under our instance id, empty if there is none."""

        def ask() -> str:
            future = self._admin().describe_consumer_groups([self._group], request_timeout=clients.REQUEST_TIMEOUT_S)[
                self._group
            ]
            members = future.result().members
            return next((m.member_id for m in members if m.group_instance_id == self._instance_id), "")

        return patiently(ask)

    def _lose_all(self) -> None:
        lost, self._owned = self._owned, frozenset()
        self._lost |= lost
        self._contact.lost()
        self.on_loss(lost)


class Reader:
    """A client that reads the partitions it is told to, from the offsets it is told to, in no group."""

    def __init__(self, settings: KafkaSettings, *, tell_end: bool = False) -> None:
        self._prefix = settings.topic_prefix
        self._logical_names: dict[str | None, str] = {}
        self._existing: set[TopicPartition] = set()
        self._reading: set[TopicPartition] = set()
        self._failures: dict[TopicPartition | None, EventLogError] = {}
        self._end_seen = -1
        self._consumer = make_consumer(settings, _reader_config(settings, tell_end=tell_end))

    @property
    def is_reading(self) -> bool:
        return bool(self._reading)

    @property
    def is_outdated(self) -> bool:
        """Whether the password or a certificate has changed since this client took them up."""
        return isinstance(self._consumer, RenewingConsumer) and self._consumer.renewal.is_outdated()

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        self._check_existence(positions)
        self._reading = set(positions)
        self._failures.clear()
        self._end_seen = -1
        with log_errors():
            self._consumer.assign(self._physical(positions))

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        if not positions:
            return
        self._check_existence(positions)
        self.remove(list(positions))
        self._reading |= set(positions)
        with log_errors():
            self._consumer.incremental_assign(self._physical(positions))

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        ours = {at: 0 for at in partitions if at in self._reading}
        if not ours:
            return
        self._reading.difference_update(ours)
        for at in ours:
            self._failures.pop(at, None)
        with log_errors():
            self._consumer.incremental_unassign(self._physical(ours))

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return what is there, waiting up to `timeout_s` for the first message only."""
        if self._failures:
            # Kept until the position is changed: the client tells of it only once.
            raise next(iter(self._failures.values()))
        with log_errors():
            batch = self._consumer.consume(1, timeout_s)
            if batch and max_messages > 1:
                batch += self._consumer.consume(max_messages - 1, 0)
        messages = self._converted(batch)
        if self._failures and not messages:
            raise next(iter(self._failures.values()))
        return messages

    def until(self, stop: int) -> Iterator[Message]:
        """Yield the messages of the only partition being read up to `stop`, which compaction may have taken."""
        heard_at = time.monotonic()
        while self._end_seen < stop:
            messages = self.poll(MAX_FETCH_BATCH, 1.0)
            for message in messages:
                if message.offset >= stop:
                    return
                yield message
            if messages:
                if messages[-1].offset + 1 >= stop:
                    return
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > READ_SILENCE_S:
                raise EventLogError(f"no answer from Kafka for {READ_SILENCE_S:.0f} s while reading {self._reading}")

    def ends(self) -> dict[TopicPartition, int]:
        """Return what the last answers of the broker told of the ends of what is being read."""
        return known_ends(self._consumer, self._prefix, self._reading)

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int | None:
        self._check_existence([TopicPartition(topic, partition)])
        asked = [KafkaPartition(self._prefix + topic, partition, timestamp_ms)]
        (found,) = patiently(lambda: self._consumer.offsets_for_times(asked, clients.REQUEST_TIMEOUT_S))
        if found.error is not None:
            raise as_log_error(found.error, f"{topic} [{partition}]: ")
        return found.offset if found.offset >= 0 else None

    def offsets(self, topic: str, partition: int) -> Offsets:
        physical = KafkaPartition(self._prefix + topic, partition)

        def ask() -> tuple[int, int]:
            try:
                return self._consumer.get_watermark_offsets(physical, clients.REQUEST_TIMEOUT_S)
            except KafkaException as error:
                # A client whose connection has just broken knows no partitions: only a broker can say that there is none.
                if error.args[0].code() in UNKNOWN_TOPIC and partition in self.partitions(topic):
                    raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE)) from error
                raise

        return Offsets(*patiently(ask))

    def close(self) -> None:
        leave(self._consumer)

    def _check_existence(self, partitions: Iterable[TopicPartition]) -> None:
        """Raise UnknownTopicError, because the client would wait for ever for a topic or partition that is not there."""
        for topic in {at.topic for at in partitions if at not in self._existing}:
            self._existing.update(TopicPartition(topic, partition) for partition in self.partitions(topic))
        for at in partitions:
            if at not in self._existing:
                raise UnknownTopicError(f"{at.topic} has no partition {at.partition}")

    def partitions(self, topic: str) -> list[int]:
        """Return the numbers of the topic's partitions, by a broker's word. Raises UnknownTopicError."""

        def ask() -> list[int]:
            described = self._consumer.list_topics(self._prefix + topic, clients.REQUEST_TIMEOUT_S).topics[
                self._prefix + topic
            ]
            if described.error is not None:
                raise KafkaException(described.error)
            return list(described.partitions)

        return patiently(ask)

    def _physical(self, positions: Mapping[TopicPartition, int]) -> list[KafkaPartition]:
        return [KafkaPartition(self._prefix + at.topic, at.partition, offset) for at, offset in positions.items()]

    def _logical_name(self, physical: str | None) -> str:
        name = self._logical_names[physical] = (physical or "").removeprefix(self._prefix)
        return name

    def _converted(self, batch: list[Any]) -> list[Message]:
        """Make our messages of the client's, in order. Notes errors and the end of the partition."""
        names = self._logical_names
        reading = self._reading
        messages = []
        for raw in batch:
            error = raw.error()
            physical = raw.topic()
            topic = names.get(physical) or self._logical_name(physical)
            at = TopicPartition(topic, raw.partition())
            if error is not None:
                self._note(error, raw, at)
            elif at in reading:
                messages.append(Message(*at, raw.offset(), raw.key(), raw.value(), headers_of(raw), raw.timestamp()[1]))
        return messages

    def _note(self, error: KafkaError, raw: Any, at: TopicPartition) -> None:
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            if at in self._reading:
                self._end_seen = raw.offset() or 0
        elif is_fatal(error):
            self._failures[None] = as_log_error(error)
        elif code in PASSING or error.retriable() or not at.topic:
            # Without a topic it concerns the group that this client has to name and never joins.
            _log.info("passing trouble with Kafka: %s", error)
        elif at in self._reading:
            self._failures[at] = as_log_error(error, f"{at.topic} [{at.partition}] at {raw.offset()}: ")


def _member_config(settings: KafkaSettings, group: str, instance_id: str) -> dict[str, Any]:
    return {
        **connection(settings),
        "group.id": group,
        "group.instance.id": instance_id,
        "group.protocol": "classic",
        "partition.assignment.strategy": "range",
        "session.timeout.ms": settings.session_timeout_ms,
        "heartbeat.interval.ms": settings.heartbeat_interval_ms,
        "max.poll.interval.ms": max(settings.max_poll_interval_ms, settings.session_timeout_ms),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
    }


def _reader_config(settings: KafkaSettings, *, tell_end: bool) -> dict[str, Any]:
    return {
        **connection(settings),
        "group.id": settings.topic_prefix + READERS_GROUP,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "enable.partition.eof": tell_end,
        # A position that is not there is an error of ours to face, not a reason to jump.
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",  # people may write requests in transactions
        "check.crcs": True,
        # The broker answers as soon as there is one byte. Newly added partitions wait for the request that is under way,
        # so it must not be a long one. `read` stops at an end that exists already: it has nothing to wait for.
        "fetch.min.bytes": 1,
        "fetch.wait.max.ms": 1 if tell_end else 50,
        "fetch.error.backoff.ms": 50,
        # Bounded memory; a full queue is looked at again soon, not after the default of a second.
        "queued.max.messages.kbytes": MAX_PREFETCH_KIB,
        "queued.min.messages": 10_000,
        "fetch.queue.backoff.ms": 10,
        "fetch.message.max.bytes": 1024 * 1024,
        "fetch.max.bytes": MAX_REQUEST_BYTES,
        "message.max.bytes": MAX_REQUEST_BYTES,
        # A response may hold one record that is larger than asked for, on top of what was asked for.
        "receive.message.max.bytes": 4 * MAX_REQUEST_BYTES,
    }
