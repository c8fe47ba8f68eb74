"""What an executor reads of the tasks: those of a newer gate too; and if it reads no more, it says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from support import newer
from tidegate import codec
from tidegate.domain.messages import StepTask
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.memory import MemoryBroker
from tidegate.executor import feed
from tidegate.executor.feed import TaskFeed
from unit.executor.test_taking_tasks import task

WAIT_S = 60.0
TASKS = "step-tasks.default"


@pytest.fixture
def broker() -> MemoryBroker:
    broker = MemoryBroker()
    for name in (TASKS, "step-results", "schemas"):
        broker.create_topic(name, 1)
    return broker


class Following:
    """A feed, and what came of it."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.tasks: list[StepTask] = []
        self.failures: list[str] = []
        self._came = threading.Event()
        self._feed = TaskFeed(broker, (TopicPartition(TASKS, 0), 0), self._deliver, self._fail)
        self._feed.start()

    def _deliver(self, tasks: list[StepTask]) -> None:
        self.tasks += tasks
        self._came.set()

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)
        self._came.set()

    def wait(self) -> None:
        assert self._came.wait(WAIT_S)
        self._feed.stop()


def write(broker: MemoryBroker, value: bytes) -> None:
    writer = broker.writer()
    writer.send(Record(TASKS, 0, b"k", value))
    writer.flush(1)


@pytest.fixture
def _own_schemas() -> Iterator[None]:
    with newer.own_schemas():
        yield


@pytest.mark.usefixtures("_own_schemas")
@pytest.mark.feature("D1")
def test_a_task_of_a_newer_gate_is_read(broker: MemoryBroker) -> None:
    """Skipped, its attempt would wait as long as this executor lives: nobody else is given it, and nobody knows."""
    text, value = newer.of_a_newer_version(task())
    newer.publish(broker, text)
    write(broker, b"\xc3\x01nobody knows this schema")
    write(broker, value)
    following = Following(broker)
    following.wait()
    assert following.tasks == [task()]
    assert following.failures == []


def test_a_feed_that_ends_says_so_whatever_ended_it(broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a mistake of ours")

    monkeypatch.setattr(feed, "check", broken)
    write(broker, codec.encode(task()))
    following = Following(broker)
    following.wait()
    assert following.failures == ["tasks cannot be read: LookupError: a mistake of ours"]
