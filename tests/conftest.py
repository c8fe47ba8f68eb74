"""What all tests share: one broker per session, started when the first test asks for it."""

import gc
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from support.brokers import Broker, ExistingBroker
from tidegate.embedded.kafka import EmbeddedKafka

BOOTSTRAP_VARIABLE = "TIDEGATE_TEST_BOOTSTRAP"
KAFKA_FIXTURES = {"kafka", "bootstrap", "own_kafka"}

# A busy machine is no defect: no example has a time limit.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a broker, so that `-m 'not kafka'` runs the rest in seconds."""
    for item in items:
        if KAFKA_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("kafka")


def pytest_runtest_logfinish() -> None:
    """Have the garbage collector on, whatever a test has loaded: services switch it off while they import (`quick_start`).

    Else the help of one of them leaves its worker without, and all that tests make in cycles stays until the end: gigabytes.
    """
    gc.enable()


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The session's broker: embedded, or the one that TIDEGATE_TEST_BOOTSTRAP names. Tests must not stop it."""
    if existing := os.environ.get(BOOTSTRAP_VARIABLE):
        yield ExistingBroker(existing)
        return
    with EmbeddedKafka(tmp_path_factory.mktemp("kafka"), profile="quick") as broker:
        yield broker


@pytest.fixture(scope="session")
def bootstrap(kafka: Broker) -> str:
    """The address of the session's broker."""
    return kafka.bootstrap


@pytest.fixture
def topic_prefix(request: pytest.FixtureRequest) -> str:
    """A prefix for topics, groups and transactional ids that no other test has: they share one broker."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:40].strip("-")
    return f"{name}-{uuid.uuid4().hex[:8]}."


@pytest.fixture
def own_kafka(tmp_path: Path) -> Iterator[Callable[..., EmbeddedKafka]]:
    """Make brokers for this test alone, which it may kill and restart: `own_kafka()` returns a started one.

    Keyword arguments are those of EmbeddedKafka; `data_dir` defaults to a new directory each time.
    """
    brokers: list[EmbeddedKafka] = []

    def start(data_dir: Path | None = None, **options: object) -> EmbeddedKafka:
        directory = data_dir or tmp_path / f"kafka-{len(brokers)}"
        settings = {"profile": "quick", "heap_mb": 256} | options
        brokers.append(EmbeddedKafka(directory, **settings))  # type: ignore[arg-type]
        brokers[-1].start()
        return brokers[-1]

    yield start
    for broker in brokers:
        broker.stop()
