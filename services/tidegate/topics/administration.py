"""Creating and altering topics: what of this room speaks to Kafka's administration."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from confluent_kafka.cimpl import NewTopic

from tidegate.eventlog.interface import Broker, EventLogError
from tidegate.topics.comparison import Difference
from tidegate.topics.declaration import Topic

REQUEST_TIMEOUT_S: Final = 30.0
VISIBLE_TIMEOUT_S: Final = 30.0
VISIBLE_POLL_S: Final = 0.05


class AdministeredBroker(Broker, Protocol):
    """A broker whose topics can be administered: `eventlog.kafka.KafkaBroker`."""

    def admin_client(self) -> AdminClient:
        """Return the client for topic administration. It speaks physical names."""

    def physical_name(self, topic: str) -> str:
        """Return the name that the topic has in Kafka."""


def create(broker: AdministeredBroker, topics: Sequence[Topic], on_progress: Callable[[str], None]) -> list[str]:
    """Create topics and wait until they can be used; return the names of those that were created.

    Kafka is first asked whether it would create all of them, so that a refusal changes nothing. One that somebody else
    creates meanwhile is fine. Blocks up to a minute or so. Raises EventLogError with everything that went wrong.
    """
    if not topics:
        return []
    new = {
        broker.physical_name(topic.name): NewTopic(
            broker.physical_name(topic.name),
            num_partitions=topic.partition_count,
            replication_factor=topic.replication_factor,
            config=dict(topic.config),
        )
        for topic in topics
    }
    admin = broker.admin_client()
    for only_ask in (True, False):
        created = _settled(
            admin.create_topics(
                list(new.values()),
                operation_timeout=REQUEST_TIMEOUT_S,
                request_timeout=REQUEST_TIMEOUT_S,
                validate_only=only_ask,
            ),
            ignore={KafkaError.TOPIC_ALREADY_EXISTS},
        )
    names = [topic.name for topic in topics if broker.physical_name(topic.name) in created]
    _wait_visible(broker, [topic.name for topic in topics])
    for topic in topics:
        if topic.name in names:
            on_progress(f"created {topic.name} (partitions: {topic.partition_count})")
    return names


def alter(broker: AdministeredBroker, differences: Sequence[Difference], on_progress: Callable[[str], None]) -> None:
    """Set the config entries that differ as declared, and nothing else. Blocks. Raises EventLogError."""
    resources: dict[str, Any] = {}
    for difference in differences:
        physical = broker.physical_name(difference.topic)
        resource = resources.setdefault(physical, ConfigResource(ResourceType.TOPIC, physical))
        entry = ConfigEntry(difference.what, difference.declared, incremental_operation=AlterConfigOpType.SET)
        resource.add_incremental_config(entry)
    if not resources:
        return
    admin = broker.admin_client()
    futures = admin.incremental_alter_configs(list(resources.values()), request_timeout=REQUEST_TIMEOUT_S)
    _settled({resource.name: future for resource, future in futures.items()}, ignore=())
    for difference in differences:
        on_progress(f"altered {difference.topic}: {difference.what} from {difference.found} to {difference.declared}")


def _settled(futures: dict[str, Future[Any]], ignore: Collection[int]) -> list[str]:
    """Wait for all; return what succeeded. Raises EventLogError with all failures but those to ignore."""
    done, failures = [], []
    for name, future in futures.items():
        try:
            future.result()
            done.append(name)
        except KafkaException as error:
            cause = error.args[0]
            if cause.code() not in ignore:
                failures.append(f"{name}: {cause.str()} ({cause.name()})")
    if failures:
        raise EventLogError("Kafka refuses: " + "; ".join(failures))
    return done


def _wait_visible(broker: Broker, names: Sequence[str]) -> None:
    """Block until the brokers know topics that the controller has made."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while missing := set(names) - set(broker.describe(names)):
        if time.monotonic() > deadline:
            raise EventLogError(
                f"created, but not usable after {VISIBLE_TIMEOUT_S:.0f} s: {', '.join(sorted(missing))}"
            )
        time.sleep(VISIBLE_POLL_S)
