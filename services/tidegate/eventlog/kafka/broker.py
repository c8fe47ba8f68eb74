"""The way to one Kafka cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AdminClient,
    ConfigResource,
    ResourceType,
)

from tidegate.eventlog.interface import (
    EventLogError,
    GroupInUseError,
    Message,
    OffsetOutOfRangeError,
    Offsets,
    TopicDescription,
    TopicPartition,
    UnknownTopicError,
)
from tidegate.eventlog.kafka import clients
from tidegate.eventlog.kafka.clients import (
    ASK_AGAIN_S,
    CONTACT_TIMEOUT_S,
    PASSING,
    as_log_error,
    client_log,
    connection,
    leave,
    log_errors,
    make_consumer,
    patiently,
)
from tidegate.eventlog.kafka.inbox import KafkaInbox, Member, Reader
from tidegate.eventlog.kafka.writer import KafkaWriter
from tidegate.eventlog.settings import KafkaSettings, Proofs

IDLE_READERS_KEPT = 4


class KafkaBroker:
    """The way to one Kafka cluster; implements `interface.Broker`. Thread-safe. Connects when first needed."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._idle_readers: list[Reader] = []
        self._admin: AdminClient | None = None
        self._admin_proofs: Proofs | None = None
        self._was_reached = False
        self._trouble = ""  # what the client said last of its tries to connect

    def physical_name(self, topic: str) -> str:
        """Return the name that the topic has in Kafka: with the prefix of the settings."""
        return self._settings.topic_prefix + topic

    def admin_client(self) -> AdminClient:
        """Return the client for topic administration. It speaks physical names. Thread-safe, one per broker and proofs."""
        with self._lock:
            if self._admin is None or self._admin_proofs != self._settings.proofs():
                config = {**connection(self._settings), "error_cb": self._note_trouble}
                self._admin = AdminClient(config, logger=client_log)
                self._admin_proofs = self._settings.proofs()
            return self._admin

    def writer(self) -> KafkaWriter:
        """Return a new idempotent producer."""
        return KafkaWriter(self._settings)

    def inbox(self, group: str, instance_id: str, lead_topic: str) -> KafkaInbox:
        """Return a new member of a group that shares `lead_topic`. `instance_id` is its static membership."""
        member = Member(self._settings, group, instance_id, lead_topic, self.admin_client)
        return KafkaInbox(Reader(self._settings), member, lead_topic)

    def plain_inbox(self) -> KafkaInbox:
        """Return an inbox without a group: only `poll`, `read_from`, `add`, `remove` and `close` make sense."""
        return KafkaInbox(Reader(self._settings), None, "")

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
        """Return the partition's first and next offset. Blocks for a round trip. Raises UnknownTopicError, and as `describe` does.

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
        self._make_contact()
        admin = self.admin_client()
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
            **connection(self._settings),
            "group.id": self._settings.topic_prefix + group,
            "enable.auto.commit": False,
        }
        consumer = make_consumer(self._settings, config)
        try:
            with self._borrowed_reader() as reader:
                wanted = [KafkaPartition(self.physical_name(topic), number) for number in reader.partitions(topic)]
            found = patiently(lambda: consumer.committed(wanted, clients.REQUEST_TIMEOUT_S))
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
            **connection(self._settings),
            "group.id": self._settings.topic_prefix + group,
            "enable.auto.commit": False,
            "on_commit": lambda error, partitions: answers.append((error, partitions)),
        }
        wanted = [KafkaPartition(self.physical_name(at.topic), at.partition, to) for at, to in positions.items()]
        self._make_contact()
        deadline = time.monotonic() + clients.REQUEST_TIMEOUT_S
        consumer = make_consumer(self._settings, config)
        try:
            while True:
                # Not waited for by the client, which may never return from that (docs/adr/0032-commits-are-not-waited-for.md).
                with log_errors(f"offsets of group {group}: "):
                    consumer.commit(offsets=wanted, asynchronous=True)
                    while not answers and time.monotonic() < deadline:
                        consumer.poll(ASK_AGAIN_S)
                if not answers:
                    raise EventLogError(
                        f"no answer about the offsets of group {group} after {clients.REQUEST_TIMEOUT_S:g} s: whether they were "
                        "set is not known. Ask again; it does no harm twice."
                    )
                error, done = answers.pop()
                refused = error or next((at.error for at in done if at.error is not None), None)
                if refused is None:
                    return
                if refused.code() in _HAS_MEMBERS:
                    raise GroupInUseError(f"group {group} has members, so Kafka refuses to reset it")
                if refused.code() not in PASSING or time.monotonic() > deadline:
                    raise as_log_error(refused, f"offsets of group {group}: ")
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

    def _make_contact(self) -> None:
        """Raise EventLogError unless a broker answers shortly, or did before. Requests themselves wait for much longer."""
        if self._was_reached:
            return
        admin = self.admin_client()
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
    def _borrowed_reader(self) -> Iterator[Reader]:
        self._make_contact()
        with self._lock:
            reader = self._idle_readers.pop() if self._idle_readers else None
        if reader is not None and reader.is_outdated:
            reader.close()  # nobody polled it, so it was refused without knowing
            reader = None
        reader = reader or Reader(self._settings, tell_end=True)
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


_HAS_MEMBERS = frozenset(
    {KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS}
)


def _existing(admin: AdminClient, topics: Mapping[str, str]) -> dict[str, Any]:
    """Return the client's descriptions, by logical name, of those of the physical topics that exist."""
    futures = admin.describe_topics(TopicCollection(list(topics)), request_timeout=clients.REQUEST_TIMEOUT_S)
    found = {}
    for physical, future in futures.items():
        try:
            with log_errors(f"{physical}: "):
                found[topics[physical]] = future.result()
        except UnknownTopicError:
            continue
    return found


def _configs(admin: AdminClient, topics: Sequence[str]) -> dict[str, dict[str, str]]:
    if not topics:
        return {}
    resources = [ConfigResource(ResourceType.TOPIC, topic) for topic in topics]
    configs = {}
    for resource, future in admin.describe_configs(resources, request_timeout=clients.REQUEST_TIMEOUT_S).items():
        with log_errors(f"{resource.name}: "):
            configs[resource.name] = {
                name: entry.value for name, entry in future.result().items() if entry.value is not None
            }
    return configs
