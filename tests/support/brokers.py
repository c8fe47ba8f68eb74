"""Talking to a broker from a test, in few words and with bounded waits."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tidegate.topics.access import used_by
from tidegate.topics.declaration import load_topics, read_topic_files

WAIT_S = 90.0


class Broker(Protocol):
    """What tests may know of the session's broker."""

    @property
    def bootstrap(self) -> str: ...


@dataclass(frozen=True)
class ExistingBroker:
    """A broker that somebody else runs."""

    bootstrap: str


def create_topic(bootstrap: str, name: str, *, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
    """Create a topic and wait until the broker says that it is there."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    new = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
    admin.create_topics([new])[name].result(WAIT_S)


def create_topics_of(
    service: str,
    bootstrap: str,
    prefix: str,
    *,
    partitions: Mapping[str, int] | None = None,
    config: Mapping[str, str] | None = None,
) -> None:
    """Create all topics that a service asks for at its start, as declared but for the counts (1) and the config that is given."""
    counts = partitions or {}
    used = used_by(service, read_topic_files(), "default" if service == "executor" else None)
    for topic in load_topics(["default"]):
        if topic.name in used:
            changed = {**topic.config, **(config or {})}
            create_topic(bootstrap, prefix + topic.name, partitions=counts.get(topic.name, 1), config=changed)


def produce(bootstrap: str, topic: str, records: Iterable[tuple[str, bytes | None]], *, partition: int = 0) -> None:
    """Produce records and wait for all acknowledgements."""
    failures: list[KafkaError] = []

    def delivered(error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            failures.append(error)

    producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "linger.ms": 0})
    # An idempotent producer that is not connected yet looks for its id again only after 500 ms.
    producer.list_topics(topic, timeout=WAIT_S)
    for key, value in records:
        producer.produce(topic, key=key, value=value, partition=partition, on_delivery=delivered)
    unsent = producer.flush(WAIT_S)
    assert not unsent, f"{unsent} records are not acknowledged"
    assert not failures, failures


def read_all(bootstrap: str, topic: str, *, partition: int = 0) -> list[Message]:
    """Read a partition from its start to its present end."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "unused", "enable.auto.commit": False})
    try:
        target = TopicPartition(topic, partition)
        start, end = consumer.get_watermark_offsets(target, timeout=WAIT_S)
        consumer.assign([TopicPartition(topic, partition, start)])
        messages: list[Message] = []
        deadline = time.monotonic() + WAIT_S
        # The position, not the count: compaction leaves holes.
        while consumer.position([target])[0].offset < end and start < end:
            assert time.monotonic() < deadline, f"{len(messages)} of {topic} read, the end is {end}"
            messages += [m for m in consumer.consume(1000, timeout=0.05) if m.error() is None]
        return messages
    finally:
        consumer.close()
