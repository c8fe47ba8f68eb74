"""The two implementations of the log, each with what a test needs to do to it from outside."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from confluent_kafka import ConsumerGroupTopicPartitions, Producer
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.cimpl import NewTopic

from tidegate.eventlog.interface import Broker, Inbox, Message, Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.settings import KafkaSettings

PATIENCE_S = 40.0
LARGEST_BYTES = 16 * 1024 * 1024
FILLER = b"filler"
# The shortest that a broker allows unless it is configured otherwise.
SESSION_TIMEOUT_MS = 6_000
SEGMENT_MS = 200
# A topic on Kafka that is compacted as soon as there is something to compact.
EAGERLY_COMPACTED = {
    "cleanup.policy": "compact",
    "segment.ms": str(SEGMENT_MS),
    "min.cleanable.dirty.ratio": "0",
    "delete.retention.ms": "0",
    "min.compaction.lag.ms": "0",
}


class World(Protocol):
    """A broker, and the hand of fate."""

    @property
    def broker(self) -> Broker: ...

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Make a topic and wait until it is there."""

    def delete_topic(self, name: str) -> None:
        """Remove a topic and wait until it is gone."""

    def compact(self, name: str) -> None:
        """Have partition 0 compacted, up to a record with the key FILLER which this adds at its end."""

    def purge(self, name: str) -> None:
        """Have partition 0 compacted so long after that its tombstones go too; adds a FILLER as well."""

    def waste_offsets(self, name: str, partition: int) -> None:
        """Use up some offsets at the end for records that nobody sees."""

    def delete_before(self, name: str, partition: int, offset: int) -> None:
        """Take the records below `offset` away."""

    def expire(self, group: str, instance_id: str) -> None:
        """Let the session of a member that is dead come to its end; need not block until then."""

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return what the group has committed."""


class Outage(Protocol):
    """Makes a broker go away and come back with what it had acknowledged."""

    def begin(self) -> None: ...

    def end(self) -> None: ...


class MemoryWorld:
    """The memory log. With a seed, everything that a real broker leaves to chance is left to it."""

    def __init__(self, seed: int | None) -> None:
        rng = None if seed is None else random.Random(seed)
        self.broker = MemoryBroker(clock_ms=lambda: time.time_ns() // 1_000_000, rng=rng)

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        self.broker.create_topic(name, partitions, config)

    def delete_topic(self, name: str) -> None:
        self.broker.delete_topic(name)

    def compact(self, name: str) -> None:
        write(self.broker, [Record(name, 0, FILLER, b"")])
        self.broker.compact(name)

    def purge(self, name: str) -> None:
        write(self.broker, [Record(name, 0, FILLER, b"")])
        self.broker.purge(name)

    def waste_offsets(self, name: str, partition: int) -> None:
        self.broker.waste_offsets(name, partition, 4)

    def delete_before(self, name: str, partition: int, offset: int) -> None:
        self.broker.delete_before(name, partition, offset)

    def expire(self, group: str, instance_id: str) -> None:
        self.broker.expire(group, instance_id)

    def committed(self, group: str, topic: str) -> dict[int, int]:
        return self.broker.committed(group)


class KafkaWorld:
    """The log on a real Kafka."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=prefix, session_timeout_ms=SESSION_TIMEOUT_MS)
        self.broker = KafkaBroker(settings)
        self.settings = settings
        self._admin = self.broker.admin_client()

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        new = NewTopic(self.broker.physical_name(name), partitions, 1, config=dict(config or {}))
        for future in self._admin.create_topics([new]).values():
            future.result()
        eventually(lambda: name in self.broker.describe([name]))

    def delete_topic(self, name: str) -> None:
        for future in self._admin.delete_topics([self.broker.physical_name(name)]).values():
            future.result()
        eventually(lambda: name not in self.broker.describe([name]))

    def compact(self, name: str) -> None:
        end = self._roll(name)
        eventually(lambda: _has_one_record_per_key(self._records(name, end)))

    def purge(self, name: str) -> None:
        end = self._roll(name)
        eventually(lambda: all(message.value is not None for message in self._records(name, end)))

    def waste_offsets(self, name: str, partition: int) -> None:
        before = self.broker.offsets(name, partition).end
        producer = Producer(
            self.settings.client_config()
            | {"transactional.id": f"{self.settings.topic_prefix}waste", "retry.backoff.ms": 5}
        )
        producer.init_transactions(PATIENCE_S)
        producer.begin_transaction()
        producer.produce(self.broker.physical_name(name), b"aborted", b"aborted", partition)
        producer.flush(PATIENCE_S)
        producer.abort_transaction(PATIENCE_S)
        # The record and the marker that it is void, which is written a moment after the transaction has ended.
        eventually(lambda: self.broker.offsets(name, partition).end == before + 2)

    def delete_before(self, name: str, partition: int, offset: int) -> None:
        target = KafkaPartition(self.broker.physical_name(name), partition, offset)
        for future in self._admin.delete_records([target]).values():
            future.result()
        eventually(lambda: self.broker.offsets(name, partition).start == offset)

    def expire(self, group: str, instance_id: str) -> None:
        """Nothing to do but to wait, which those do who wait for what follows from it."""

    def committed(self, group: str, topic: str) -> dict[int, int]:
        name = self.settings.topic_prefix + group
        futures = self._admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(name)])
        partitions = futures[name].result().topic_partitions or []
        return {p.partition: p.offset for p in partitions if p.topic == self.broker.physical_name(topic)}

    def _roll(self, name: str) -> int:
        """Close the active segment, which Kafka never compacts; returns the end of what is closed."""
        time.sleep(SEGMENT_MS / 1000 * 1.5)
        return write(self.broker, [Record(name, 0, FILLER, b"")])[0]

    def _records(self, name: str, end: int) -> list[Message]:
        return list(self.broker.read(name, 0, self.broker.offsets(name, 0).start, end))


def _has_one_record_per_key(messages: Sequence[Message]) -> bool:
    return len({message.key for message in messages}) == len(messages)


def eventually(condition: Callable[[], bool], each_time: Callable[[], object] = lambda: time.sleep(0.05)) -> None:
    """Wait until the condition holds. Fails after PATIENCE_S, which says nothing about how fast it should be."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        each_time()


def write(broker: Broker, records: Sequence[Record]) -> list[int]:
    """Write records with a writer of their own; returns their offsets."""
    writer = broker.writer()
    offsets: dict[int, int] = {}
    for index, record in enumerate(records):
        writer.send(record, lambda offset, index=index: offsets.__setitem__(index, offset))  # type: ignore[misc]  # default argument
    writer.flush(PATIENCE_S)
    writer.close()
    return [offsets[index] for index in range(len(records))]


def numbered(topic: str, count: int, partition: int = 0, first: int = 0) -> list[Record]:
    """Return records with the values b"0", b"1", … under keys of their own."""
    return [Record(topic, partition, b"key-%d" % n, b"%d" % n) for n in range(first, first + count)]


def gather(inbox: Inbox, count: int) -> list[Message]:
    """Poll until so many messages came."""
    messages: list[Message] = []
    eventually(lambda: len(messages) >= count, lambda: messages.extend(inbox.poll(100, 0.1)))
    return messages


def quiet(inbox: Inbox) -> list[Message]:
    """Poll for a while in which nothing should come; returns what came."""
    return [message for _ in range(10) for message in inbox.poll(100, 0.03)]


class Owner:
    """A member of a group that follows what the group tells it, as services do."""

    def __init__(self, broker: Broker, instance_id: str, topic: str = "lead", group: str = "owners") -> None:
        self.instance_id = instance_id
        self.inbox = broker.inbox(group, instance_id, topic)
        self.owned: set[int] = set()
        self.gained: list[frozenset[int]] = []
        self.lost: list[frozenset[int]] = []

    def turn(self, timeout_s: float = 0.02) -> list[Message]:
        messages = self.inbox.poll(100, timeout_s)
        self.follow()
        return messages

    def follow(self) -> None:
        gained, lost = self.inbox.take_changes()
        assert lost <= self.owned, "only what was owned can be lost"
        assert not gained & (self.owned - lost), "only what was not owned can be gained"
        self.owned = (self.owned - lost) | gained
        if gained:
            self.gained.append(gained)
        if lost:
            self.lost.append(lost)


def settle(owners: Sequence[Owner], partition_count: int) -> None:
    """Let the owners take turns until they own all partitions between them, each at least one."""
    eventually(
        lambda: sum(len(owner.owned) for owner in owners) == partition_count and all(owner.owned for owner in owners),
        lambda: [owner.turn() for owner in owners],
    )
    assert set().union(*(owner.owned for owner in owners)) == set(range(partition_count))
