"""Every test of this directory that asks for a `world` runs on Kafka, in memory, and in a memory that leaves things to chance."""

import zlib
from collections.abc import Callable, Iterator

import pytest

from contract.worlds import KafkaWorld, MemoryWorld, Outage, World
from tidegate.embedded.kafka import EmbeddedKafka


@pytest.fixture(params=["memory", "unruly-memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A broker without topics."""
    if request.param != "kafka":
        yield _memory(request)
        return
    world = KafkaWorld(request.getfixturevalue("bootstrap"), request.getfixturevalue("topic_prefix"))
    yield world
    world.broker.close()


@pytest.fixture(params=["memory", "unruly-memory", pytest.param("kafka", marks=pytest.mark.kafka)])
def outage(request: pytest.FixtureRequest) -> Iterator[tuple[World, Outage]]:
    """A broker without topics that can go away and come back, with the switch for that."""
    if request.param != "kafka":
        world = _memory(request)
        yield world, MemoryOutage(world)
        return
    start: Callable[[], EmbeddedKafka] = request.getfixturevalue("own_kafka")
    kafka = start()
    kafka_world = KafkaWorld(kafka.bootstrap, "")
    yield kafka_world, KafkaOutage(kafka)
    kafka_world.broker.close()


class MemoryOutage:
    def __init__(self, world: MemoryWorld) -> None:
        self.begin = world.broker.interrupt
        self.end = world.broker.restore


class KafkaOutage:
    def __init__(self, kafka: EmbeddedKafka) -> None:
        self.begin = kafka.kill
        self.end = kafka.start


def _memory(request: pytest.FixtureRequest) -> MemoryWorld:
    """The seed is the test's name: another one for every test, the same at every run."""
    return MemoryWorld(zlib.crc32(request.node.name.encode()) if request.param == "unruly-memory" else None)
