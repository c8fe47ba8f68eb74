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

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return the next offsets that a group has committed of a topic, by partition. Blocks. Raises EventLogError."""


def await_made(broker: AdministeredBroker, topics: Sequence[Topic]) -> list[str]:
    """Return those of the topics that Kafka has after all, once they can be used.

    For topics that `describe` does not know: the controller may have made one a moment ago. It is also asked whether it would
    create the others, so that a refusal comes before anything is changed. Blocks. Raises EventLogError.
    """
    if not topics:
        return []
    creatable = _create(broker, topics, only_ask=True)
    made = [topic.name for topic in topics if topic.name not in creatable]
    _wait_visible(broker, made)
    return made


def create(broker: AdministeredBroker, topics: Sequence[Topic], on_progress: Callable[[str], None]) -> list[str]:
    """Create topics and wait until they can be used; return the names of those that were created.

    One that somebody else creates meanwhile is fine. Blocks up to a minute or so. Raises EventLogError with everything that
    went wrong.
    """
    if not topics:
        return []
    created = _create(broker, topics, only_ask=False)
    _wait_visible(broker, [topic.name for topic in topics])
    for topic in topics:
        if topic.name in created:
            on_progress(f"created {topic.name} (partitions: {topic.partition_count})")
    return created


def _create(broker: AdministeredBroker, topics: Sequence[Topic], *, only_ask: bool) -> list[str]:
    """Return the topics that were created, or would be; those that exist are left out."""
    new = [
        NewTopic(
            broker.physical_name(topic.name),
            num_partitions=topic.partition_count,
            replication_factor=topic.replication_factor,
            config=dict(topic.config),
        )
        for topic in topics
    ]
    futures = broker.admin_client().create_topics(
        new, operation_timeout=REQUEST_TIMEOUT_S, request_timeout=REQUEST_TIMEOUT_S, validate_only=only_ask
    )
    done = _settled(futures, ignore={KafkaError.TOPIC_ALREADY_EXISTS})
    return [topic.name for topic in topics if broker.physical_name(topic.name) in done]


def alter(broker: AdministeredBroker, differences: Sequence[Difference], on_progress: Callable[[str], None]) -> None:
    """Set the config entries that differ as declared, and nothing else; wait until they are in force.

    Blocks up to a minute or so. Raises EventLogError.
    """
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
    _wait(
        lambda: [str(difference) for difference in differences if not _is_in_force(broker, difference)],
        "altered, but not in force",
    )
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


def _is_in_force(broker: Broker, difference: Difference) -> bool:
    found = broker.describe([difference.topic]).get(difference.topic)
    return found is not None and found.config.get(difference.what) == difference.declared


def _wait_visible(broker: Broker, names: Sequence[str]) -> None:
    """Block until the brokers know topics that the controller has made."""
    _wait(lambda: sorted(set(names) - set(broker.describe(names))), "created, but not usable")


def _wait(missing: Callable[[], Sequence[str]], what: str) -> None:
    """Block until nothing is missing: brokers follow the controller with a delay. Raises EventLogError if they do not."""
    deadline = time.monotonic() + VISIBLE_TIMEOUT_S
    while left := missing():
        if time.monotonic() > deadline:
            raise EventLogError(f"{what} after {VISIBLE_TIMEOUT_S:.0f} s: {', '.join(left)}")
        time.sleep(VISIBLE_POLL_S)
