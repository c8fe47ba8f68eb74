"""The log on Kafka: the only module that knows confluent-kafka.

Two clients make an `Inbox`. One is the group's member: it learns which partitions of the lead topic are ours, reads
nothing, and commits. The other reads what it is told to and knows no group. So a rebalance, which in the classic
protocol takes everything from everybody for a moment, does not touch what is being read: only a partition that the
group takes from us stops, at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from operator import methodcaller
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AdminClient,
    ConfigResource,
    ResourceType,
)

from tidegate.eventlog.client_lines import Sparing
from tidegate.eventlog.contact import GroupContact
from tidegate.eventlog.interface import (
    EventLogError,
    GroupInUseError,
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
from tidegate.eventlog.renewal import Renewal, RenewingConsumer, RenewingProducer
from tidegate.eventlog.settings import Credentials, KafkaSettings

MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 64 * 1024  # a record of the greatest size and what the protocol puts around it
MAX_PREFETCH_KIB = 32 * 1024
MAX_UNACKED_RECORDS = 50_000
MAX_UNACKED_KIB = 256 * 1024
MAX_FETCH_BATCH = 2_000
IDLE_READERS_KEPT = 4

REQUEST_TIMEOUT_S = 30.0
READ_SILENCE_S = 60.0
ASK_AGAIN_S = 0.05
FULL_BUFFER_POLL_S = 0.1
HURRY_S = 0.02
LEAVE_TIMEOUT_S = 10.0
FIRST_CONTACT_S = 2.0
CONTACT_TIMEOUT_S = 3.0
# While messages are waited for, the group is served so often, which bounds how late a rebalance is answered: more often
# while we wait for our partitions.
SETTLED_SERVE_INTERVAL_S = 0.05
JOINING_SERVE_INTERVAL_S = 0.005

_UNKNOWN_TOPIC = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_ID,
    }
)
_NOT_AUTHORIZED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)
_OUT_OF_RANGE = frozenset(
    {
        KafkaError.OFFSET_OUT_OF_RANGE,
        KafkaError._AUTO_OFFSET_RESET,
        KafkaError._LOG_TRUNCATION,
    }
)
# Trouble that the client mends by itself (it reconnects, finds the new leader or coordinator) and only tells us of.
_PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._DESTROY_BROKER,  # the one that was asked is gone; the next try goes to whom there is
        KafkaError._MAX_POLL_EXCEEDED,  # the loss of the partitions is reported by the group as such
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._WAIT_COORD,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.UNKNOWN_LEADER_EPOCH,
    }
)

# The client joins again by itself; whether a commit was refused for it is of no interest.
_PASSING_IN_GROUP = _PASSING | {
    KafkaError._ASSIGNMENT_LOST,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.MEMBER_ID_REQUIRED,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.UNKNOWN_MEMBER_ID,
}

# A header's name that is not UTF-8 makes the client return a broken list and set an exception at the same time. Called
# as a method, the interpreter may notice only later, with the list in use; called from C it notices at once.
_read_headers = methodcaller("headers")

T = TypeVar("T")

_log = logging.getLogger(__name__)
_client_log = logging.getLogger(f"{__name__}.client")
# Every producer would warn that this option is called experimental. It is wanted; tests/contract shows what it does.
_client_log.addFilter(lambda line: "enable.gapless.guarantee" not in line.getMessage())
_client_log.addFilter(Sparing())


class KafkaBroker:
    """The way to one Kafka cluster; implements `interface.Broker`. Thread-safe. Connects when first needed."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._idle_readers: list[_Reader] = []
        self._admin: AdminClient | None = None
        self._admin_credentials: Credentials | None = None
        self._was_reached = False
        self._trouble = ""  # what the client said last of its tries to connect

    def physical_name(self, topic: str) -> str:
        """Return the name that the topic has in Kafka: with the prefix of the settings."""
        return self._settings.topic_prefix + topic

    def admin_client(self) -> AdminClient:
        """Return the client for topic administration. It speaks physical names. Thread-safe, one per broker and password."""
        with self._lock:
            if self._admin is None or self._admin_credentials != self._settings.credentials():
                config = {**_connection(self._settings), "error_cb": self._note_trouble}
                self._admin = AdminClient(config, logger=_client_log)
                self._admin_credentials = self._settings.credentials()
            return self._admin

    def writer(self, gather_ms: int = 0) -> KafkaWriter:
        """Return a new idempotent producer. gather_ms: how long a record may wait for others; `flush` and `poll` end that."""
        return KafkaWriter(self._settings, gather_ms)

    def inbox(self, group: str, instance_id: str, lead_topic: str) -> KafkaInbox:
        """Return a new member of a group that shares `lead_topic`. `instance_id` is its static membership."""
        member = _Member(self._settings, group, instance_id, lead_topic, self.admin_client)
        return KafkaInbox(_Reader(self._settings), member, lead_topic)

    def plain_inbox(self) -> KafkaInbox:
        """Return an inbox without a group: only `poll`, `read_from`, `add`, `remove` and `close` make sense."""
        return KafkaInbox(_Reader(self._settings), None, "")

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        """Yield the records with start <= offset < stop that compaction has left. Blocks until `stop` is reached.

        Raises OffsetOutOfRangeError if `start` is no longer kept or `stop` is beyond the end, UnknownTopicError, and
        EventLogError if nothing comes for `READ_SILENCE_S`.
        """
        if stop <= start:
            return
        kept = self.offsets(topic, partition)
        if start < kept.start or stop > kept.end:
            raise OffsetOutOfRangeError(
                f"{topic} [{partition}] holds the offsets {kept.start} to {kept.end}, not {start} to {stop}"
            )
        with self._borrowed_reader() as reader:
            reader.read_from({TopicPartition(topic, partition): start})
            yield from reader.until(stop)

    def offsets(self, topic: str, partition: int) -> Offsets:
        """Return the partition's first and next offset. Blocks for a round trip. Raises UnknownTopicError.

        The end is that of readers: while a transaction of somebody else's is open, where it began.
        """
        with self._borrowed_reader() as reader:
            return reader.offsets(topic, partition)

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int:
        """Return the offset of the first record that is not older than a time (Unix milliseconds); the end if none is.

        Blocks for a round trip. Raises EventLogError.
        """
        with self._borrowed_reader() as reader:
            found = reader.offset_at(topic, partition, timestamp_ms)
            return reader.offsets(topic, partition).end if found is None else found

    def describe(self, topics: Sequence[str]) -> dict[str, TopicDescription]:
        """Return the descriptions of those of the topics that exist. Blocks for a round trip or two.

        Raises EventLogError soon, with the reason, as long as no broker has ever answered.
        """
        if not topics:
            return {}
        admin = self.admin_client()
        self._make_contact(admin)
        found = _existing(admin, {self.physical_name(topic): topic for topic in topics})
        try:
            configs = _configs(admin, [self.physical_name(topic) for topic in found])
        except UnknownTopicError:  # one was deleted between the two questions
            found = _existing(admin, {self.physical_name(topic): topic for topic in topics})
            configs = _configs(admin, [self.physical_name(topic) for topic in found])
        admin.poll(0)  # hands the client's log lines to our logger
        return {
            topic: TopicDescription(
                name=topic,
                topic_id=str(description.topic_id),
                partition_count=len(description.partitions),
                replication_factor=min((len(p.replicas) for p in description.partitions), default=0),
                config=configs[self.physical_name(topic)],
            )
            for topic, description in found.items()
        }

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return the next offsets that a group has committed of a topic, by partition. Blocks for some round trips.

        Raises EventLogError. Not asked of the admin client: that ends the process, with a signal, if the group's coordinator is
        not up yet (librdkafka issue 5040).
        """
        config = {
            **_connection(self._settings),
            "group.id": self._settings.topic_prefix + group,
            "enable.auto.commit": False,
        }
        consumer = make_consumer(self._settings, config)
        try:
            with self._borrowed_reader() as reader:
                wanted = [KafkaPartition(self.physical_name(topic), number) for number in reader.partitions(topic)]
            found = _patiently(lambda: consumer.committed(wanted, REQUEST_TIMEOUT_S))
            return {at.partition: at.offset for at in found if at.offset >= 0}
        finally:
            leave(consumer)

    def reset_group(self, group: str, positions: Mapping[TopicPartition, int]) -> None:
        """Have a group read on from other offsets. Blocks for some round trips, or for half a minute if nobody answers.

        Raises GroupInUseError as long as the group has members: Kafka itself refuses it then, so there is no race. EventLogError,
        which says so if the offsets may have been set all the same.
        """
        answers: list[tuple[KafkaError | None, list[KafkaPartition]]] = []
        config = {
            **_connection(self._settings),
            "group.id": self._settings.topic_prefix + group,
            "enable.auto.commit": False,
            "on_commit": lambda error, partitions: answers.append((error, partitions)),
        }
        wanted = [KafkaPartition(self.physical_name(at.topic), at.partition, to) for at, to in positions.items()]
        self._make_contact(self.admin_client())
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        consumer = make_consumer(self._settings, config)
        try:
            while True:
                # Not waited for by the client, which may never return from that (docs/adr/0032-commits-are-not-waited-for.md).
                with _as_log_errors(f"offsets of group {group}: "):
                    consumer.commit(offsets=wanted, asynchronous=True)
                    while not answers and time.monotonic() < deadline:
                        consumer.poll(ASK_AGAIN_S)
                if not answers:
                    raise EventLogError(
                        f"no answer about the offsets of group {group} after {REQUEST_TIMEOUT_S:g} s: whether they were set is "
                        "not known. Ask again; it does no harm twice."
                    )
                error, done = answers.pop()
                refused = error or next((at.error for at in done if at.error is not None), None)
                if refused is None:
                    return
                if refused.code() in _HAS_MEMBERS:
                    raise GroupInUseError(f"group {group} has members, so Kafka refuses to reset it")
                if refused.code() not in _PASSING or time.monotonic() > deadline:
                    raise _log_error(refused, f"offsets of group {group}: ")
                time.sleep(ASK_AGAIN_S)
        finally:
            leave(consumer)

    def close(self) -> None:
        """Free the connections kept for `read` and `offsets`. Writers and inboxes are closed by who asked for them."""
        with self._lock:
            readers, self._idle_readers = self._idle_readers, []
            self._admin = None
        for reader in readers:
            reader.close()

    def _make_contact(self, admin: AdminClient) -> None:
        """Raise EventLogError unless a broker answers shortly, or did before. Requests themselves wait for much longer."""
        if self._was_reached:
            return
        try:
            admin.describe_cluster(request_timeout=CONTACT_TIMEOUT_S).result()
        except KafkaException as error:
            admin.poll(0)
            raise EventLogError(
                f"no broker answers at {self._settings.bootstrap} ({self._trouble or error.args[0].str()}). Is the address "
                "right (TIDEGATE_KAFKA_BOOTSTRAP), does Kafka run, and may this machine reach it?"
            ) from error
        self._was_reached = True

    def _note_trouble(self, error: KafkaError) -> None:
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._trouble = error.str().partition(" (after ")[0]

    @contextmanager
    def _borrowed_reader(self) -> Iterator[_Reader]:
        with self._lock:
            reader = self._idle_readers.pop() if self._idle_readers else None
        if reader is not None and reader.is_outdated:
            reader.close()  # nobody polled it, so it was refused without knowing
            reader = None
        reader = reader or _Reader(self._settings, tell_end=True)
        try:
            yield reader
            reader.read_from({})
        except BaseException:
            # Not worth finding out whether this client is still sound.
            reader.close()
            raise
        with self._lock:
            if len(self._idle_readers) < IDLE_READERS_KEPT:
                self._idle_readers.append(reader)
                return
        reader.close()


def _make_contact(producer: Producer) -> None:
    with suppress(KafkaException):
        producer.list_topics(timeout=FIRST_CONTACT_S)


class KafkaWriter:
    """An idempotent producer; implements `interface.Writer`. Not thread-safe."""

    def __init__(self, settings: KafkaSettings, gather_ms: int = 0) -> None:
        self._prefix = settings.topic_prefix
        self._gathers = gather_ms > 0
        self._failure: WriteFailedError | None = None
        self._producer = _make_producer(settings, _writer_config(settings, gather_ms))
        self._produce = self._producer.produce
        # The client asks for its producer id when metadata comes, but else only every 500 ms, which would make the
        # first write of every process so late. A thread asks, so that a process with several writers does not wait for one
        # after the other. With no broker in reach the client asks later by itself.
        threading.Thread(target=_make_contact, args=(self._producer,), name="first-contact", daemon=True).start()

    def send(self, record: Record, acked: Callable[[int], None] | None = None) -> None:
        """Buffer a record. `acked(offset)` is called in order per partition, from a later call of this thread.

        Blocks only while the local buffer is full, polling. Raises WriteFailedError.
        """
        topic, partition, key, value, headers = record
        while self._failure is None:
            try:
                self._produce(
                    self._prefix + topic,
                    value,
                    key,
                    partition,
                    self._on_delivery if acked is None else partial(self._on_delivery_tell, acked),
                    headers=list(headers),
                )
            except BufferError:
                self._served(self._producer.poll, FULL_BUFFER_POLL_S)
            except KafkaException as error:
                self._fail(error.args[0])
            else:
                return
        raise self._failure

    def poll(self) -> None:
        """Run the callbacks of what was acknowledged. Raises WriteFailedError.

        Does not block, unless records wait here for others: these go out, and they are waited for up to `HURRY_S`.
        """
        if self._failure is None:
            if self._gathers and len(self._producer):
                self._served(self._producer.flush, HURRY_S)  # only a flush ends their waiting
            self._served(self._producer.poll, 0)
        if self._failure is not None:
            raise self._failure

    def flush(self, timeout_s: float) -> None:
        """Block until everything sent is acknowledged. Raises WriteFailedError if not so within `timeout_s`.

        A write that was not acknowledged in time may still happen, or have happened.
        """
        if self._failure is None:
            unacked = self._served(self._producer.flush, timeout_s)
            if unacked and self._failure is None:
                self._fail(f"{unacked} records were not acknowledged within {timeout_s} s")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Give up what is not acknowledged and free the connection. Does not raise. Callbacks run no more."""
        self._fail("the writer is closed")
        with suppress(Exception):
            self._producer.close()

    def _served(self, call: Callable[[float], int], timeout_s: float) -> int:
        """Run a call of the client that runs callbacks. Fatal errors make the writer dead."""
        try:
            return call(timeout_s)
        except KafkaException as error:
            self._fail(error.args[0])
        except SystemError as error:
            # How the client's callbacks fail when a fatal error is on its way to us at the same time.
            self._fail(str(error.__cause__ or error))
        return 0

    def _on_delivery(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._fail(error, message)

    def _on_delivery_tell(self, acked: Callable[[int], None], error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._fail(error, message)
        elif self._failure is None:
            acked(message.offset())

    def _fail(self, reason: KafkaError | str, message: Any = None) -> None:
        """Make the writer dead. Records that are still here are given up, so that none overtakes the failed one."""
        if self._failure is not None:
            return
        where = "" if message is None else f" to {message.topic()} [{message.partition()}]"
        why = reason if isinstance(reason, str) else _said(reason)
        self._failure = WriteFailedError(f"writing{where} failed: {why}")
        with suppress(Exception):
            self._producer.purge(blocking=False)


class KafkaInbox:
    """A consumer with ownership by a group; implements `interface.Inbox`. Not thread-safe."""

    def __init__(self, reader: _Reader, member: _Member | None, lead_topic: str) -> None:
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
    def has_joined(self) -> bool:
        """Tell whether the group has given out its partitions, be it that none is ours."""
        return self._member is None or self._member.is_settled

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


class _Member:
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
        self._is_settled = False
        self._member_id = ""  # by which the group knew us when it last gave us partitions
        self._contact = group_contact(settings, self._topic)
        self._consumer = self._join()

    @property
    def serve_interval_s(self) -> float:
        return SETTLED_SERVE_INTERVAL_S if self._is_settled else JOINING_SERVE_INTERVAL_S

    @property
    def is_settled(self) -> bool:
        return self._is_settled

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
        if error is None or error.code() in _PASSING_IN_GROUP:
            return
        if error.code() in _UNKNOWN_TOPIC:
            raise _log_error(error, f"{self._topic}: ")
        if _is_fatal(error) or not error.retriable():
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
        self._is_settled = True
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
        if _is_fatal(error) and self._member_id and self._place_holder() in {"", self._member_id}:
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
            future = self._admin().describe_consumer_groups([self._group], request_timeout=REQUEST_TIMEOUT_S)[
                self._group
            ]
            members = future.result().members
            return next((m.member_id for m in members if m.group_instance_id == self._instance_id), "")

        return _patiently(ask)

    def _lose_all(self) -> None:
        lost, self._owned = self._owned, frozenset()
        self._lost |= lost
        self._is_settled = False
        self._contact.lost()
        self.on_loss(lost)


class _Reader:
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
        """Whether the password has changed since this client took one up."""
        return isinstance(self._consumer, RenewingConsumer) and self._consumer.renewal.is_outdated()

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        self._check_existence(positions)
        self._reading = set(positions)
        self._failures.clear()
        self._end_seen = -1
        with _as_log_errors():
            self._consumer.assign(self._physical(positions))

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        if not positions:
            return
        self._check_existence(positions)
        self.remove(list(positions))
        self._reading |= set(positions)
        with _as_log_errors():
            self._consumer.incremental_assign(self._physical(positions))

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        ours = {at: 0 for at in partitions if at in self._reading}
        if not ours:
            return
        self._reading.difference_update(ours)
        for at in ours:
            self._failures.pop(at, None)
        with _as_log_errors():
            self._consumer.incremental_unassign(self._physical(ours))

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return what is there, waiting up to `timeout_s` for the first message only."""
        if self._failures:
            # Kept until the position is changed: the client tells of it only once.
            raise next(iter(self._failures.values()))
        with _as_log_errors():
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
        found = {}
        for at in self._reading:
            with suppress(KafkaException):
                physical = KafkaPartition(self._prefix + at.topic, at.partition)
                _, end = self._consumer.get_watermark_offsets(physical, cached=True)
                if end >= 0:
                    found[at] = end
        return found

    def offset_at(self, topic: str, partition: int, timestamp_ms: int) -> int | None:
        self._check_existence([TopicPartition(topic, partition)])
        asked = [KafkaPartition(self._prefix + topic, partition, timestamp_ms)]
        (found,) = _patiently(lambda: self._consumer.offsets_for_times(asked, REQUEST_TIMEOUT_S))
        if found.error is not None:
            raise _log_error(found.error, f"{topic} [{partition}]: ")
        return found.offset if found.offset >= 0 else None

    def offsets(self, topic: str, partition: int) -> Offsets:
        physical = KafkaPartition(self._prefix + topic, partition)

        def ask() -> tuple[int, int]:
            try:
                return self._consumer.get_watermark_offsets(physical, REQUEST_TIMEOUT_S)
            except KafkaException as error:
                # A client whose connection has just broken knows no partitions: only a broker can say that there is none.
                if error.args[0].code() in _UNKNOWN_TOPIC and partition in self.partitions(topic):
                    raise KafkaException(KafkaError(KafkaError.LEADER_NOT_AVAILABLE)) from error
                raise

        return Offsets(*_patiently(ask))

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
            described = self._consumer.list_topics(self._prefix + topic, REQUEST_TIMEOUT_S).topics[self._prefix + topic]
            if described.error is not None:
                raise KafkaException(described.error)
            return list(described.partitions)

        return _patiently(ask)

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
        elif _is_fatal(error):
            self._failures[None] = _log_error(error)
        elif code in _PASSING or error.retriable() or not at.topic:
            # Without a topic it concerns the group that this client has to name and never joins.
            _log.info("passing trouble with Kafka: %s", error)
        elif at in self._reading:
            self._failures[at] = _log_error(error, f"{at.topic} [{at.partition}] at {raw.offset()}: ")


def _connection(settings: KafkaSettings) -> dict[str, Any]:
    """Return what all our clients are configured with. Trouble is short where the client asks again soon."""
    return {
        **settings.client_config(),
        "retry.backoff.ms": 20,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
        "topic.metadata.propagation.max.ms": 10_000,
        "enable.metrics.push": False,
    }


def make_consumer(settings: KafkaSettings, config: Mapping[str, Any]) -> Consumer:
    """Return a consumer that logs as we do and fails when its password was replaced. Raises SecretFileError."""
    if not settings.has_credential_files:
        return Consumer(dict(config), logger=_client_log)
    return RenewingConsumer(dict(config), Renewal(settings, _log_trouble), logger=_client_log)


def group_contact(settings: KafkaSettings, name: str) -> GroupContact:
    """Return the watch over a member of the group that shares `name`."""
    return GroupContact(
        name,
        session_timeout_s=settings.session_timeout_ms / 1000,
        max_poll_interval_s=max(settings.max_poll_interval_ms, settings.session_timeout_ms) / 1000,
        is_answered=partial(_is_answered, settings),
        monotonic_s=time.monotonic,
    )


def _is_answered(settings: KafkaSettings) -> bool:
    """Tell whether the brokers answer a client that has just been made, with the credentials of now. Blocks for seconds."""
    try:
        admin = AdminClient(_connection(settings), logger=_client_log)
        admin.describe_cluster(request_timeout=CONTACT_TIMEOUT_S).result()
    except (KafkaException, EventLogError) as error:
        _log.warning("without the group, and brokers do not answer a new client: %s", error)
        return False
    return True


def leave(consumer: Consumer) -> None:
    """Close a consumer, or leave it to itself if it does not end. Blocks up to LEAVE_TIMEOUT_S. Does not raise.

    The client waits for ever for the answer to a commit that was under way when the brokers began to refuse us. On a thread,
    which also keeps the consumer from being freed by ours: that waits for the same.
    """

    def close() -> None:
        with suppress(KafkaException, RuntimeError):
            consumer.close()

    closing = threading.Thread(target=close, name="leave", daemon=True)
    closing.start()
    closing.join(LEAVE_TIMEOUT_S)
    if closing.is_alive():
        _log.warning("Kafka's client does not end, and is left to itself after %.0f s", LEAVE_TIMEOUT_S)


def _make_producer(settings: KafkaSettings, config: Mapping[str, Any]) -> Producer:
    if not settings.has_credential_files:
        return Producer(dict(config), logger=_client_log)
    return RenewingProducer(dict(config), Renewal(settings, _log_trouble), logger=_client_log)


def _log_trouble(error: KafkaError) -> None:
    _client_log.error("%s: %s", error.name(), error.str())  # as the client does when nobody else wants to know


def _writer_config(settings: KafkaSettings, gather_ms: int) -> dict[str, Any]:
    return {
        **_connection(settings),
        "acks": "all",
        "enable.idempotence": True,
        # A record that cannot be written must stop everything behind it, never be skipped: it does not time out by
        # itself (`flush` has the deadline), and a gap is fatal.
        "enable.gapless.guarantee": True,
        "message.timeout.ms": 0,
        # Under load records gather by themselves while a request is under way, and only then: any wait would cost a lone
        # record over 1 ms. A broker answers the requests of a connection one by one anyhow, so more than one under way
        # only makes them smaller and many (measured: a third less work for the broker, 40 % more steps/s). Who flushes what
        # belongs together has the first record of it wait for the others: it would go out alone, and they after it.
        "linger.ms": gather_ms,
        "max.in.flight": 1,
        "compression.type": settings.compression,
        "message.max.bytes": MAX_REQUEST_BYTES,
        "queue.buffering.max.messages": MAX_UNACKED_RECORDS,
        "queue.buffering.max.kbytes": MAX_UNACKED_KIB,
    }


def _member_config(settings: KafkaSettings, group: str, instance_id: str) -> dict[str, Any]:
    return {
        **_connection(settings),
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
        **_connection(settings),
        # The client insists on a group id. It never joins.
        "group.id": settings.topic_prefix + "tidegate-readers",
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


def headers_of(raw: Any) -> tuple[tuple[str, bytes], ...]:
    """Return the headers of a client's message; none if the client cannot show them. Does not raise."""
    try:
        headers = _read_headers(raw)
    except (SystemError, UnicodeDecodeError):
        return ()  # names that are not UTF-8 and so not readable with this client: none of ours
    if not headers:
        return ()
    for _, value in headers:
        if value is None:
            return tuple((name, value or b"") for name, value in headers)
    return tuple(headers)


def _is_fatal(error: KafkaError) -> bool:
    """Tell whether the client can do no more. A consumer's error says so by its code, without the flag."""
    return error.fatal() or error.code() == KafkaError._FATAL


def _said(error: KafkaError) -> str:
    """Return what an error says, and what it most likely means."""
    text = f"{error.name()}: {error.str()}"
    if error.code() in _UNKNOWN_TOPIC:
        return f"{text}: it does not exist (any more), or this user may not see it"
    if error.code() in _NOT_AUTHORIZED:
        return f"{text}: the brokers' ACLs do not let this user; `tidegate topics acls` lists what each service needs"
    if error.code() in _OUT_OF_RANGE:
        return f"{text}: records were deleted before they were read, or the topic was made again"
    return text


def _log_error(error: KafkaError, where: str = "") -> EventLogError:
    """Return our exception for a client's error."""
    text = f"{where}{_said(error)}"
    if error.code() in _UNKNOWN_TOPIC:
        return UnknownTopicError(text)
    if error.code() in _OUT_OF_RANGE:
        return OffsetOutOfRangeError(text)
    return EventLogError(text)


_HAS_MEMBERS = frozenset(
    {KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS}
)


def _patiently(ask: Callable[[], T]) -> T:
    """Ask until there is an answer: leaders move, and a topic made a moment ago has none yet. Blocks, but not for ever."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in _PASSING or time.monotonic() > deadline:
                raise _log_error(error.args[0]) from error
        time.sleep(ASK_AGAIN_S)


@contextmanager
def _as_log_errors(where: str = "") -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise _log_error(error.args[0], where) from error


def _existing(admin: AdminClient, topics: Mapping[str, str]) -> dict[str, Any]:
    """Return the client's descriptions, by logical name, of those of the physical topics that exist."""
    futures = admin.describe_topics(TopicCollection(list(topics)), request_timeout=REQUEST_TIMEOUT_S)
    found = {}
    for physical, future in futures.items():
        try:
            with _as_log_errors(f"{physical}: "):
                found[topics[physical]] = future.result()
        except UnknownTopicError:
            continue
    return found


def _configs(admin: AdminClient, topics: Sequence[str]) -> dict[str, dict[str, str]]:
    if not topics:
        return {}
    resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    configs = {}
    for resource, future in admin.describe_configs(resources, request_timeout=REQUEST_TIMEOUT_S).items():
        with _as_log_errors(f"{resource.name}: "):
            configs[resource.name] = {
                name: entry.value for name, entry in future.result().items() if entry.value is not None
            }
    return configs
