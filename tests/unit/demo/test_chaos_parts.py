"""The parts of the chaos demo that do things: the outside world, the storm, the people who ask and answer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.cluster import Cluster
from support.stack import eventually
from tidegate.demo.chaos.observer import Customers, Observer
from tidegate.demo.chaos.plan import FREEZE, KAFKA, KILL, STOP, Blow, Question, Wish
from tidegate.demo.chaos.provider import Call, Payment, Provider
from tidegate.demo.chaos.storm import LONG_FREEZE, Storm
from tidegate.domain import canonical
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.eventlog.interface import Record, WriteFailedError
from tidegate.eventlog.memory import MemoryBroker


def test_a_payment_counts_once_per_key(tmp_path: Path) -> None:
    provider = Provider(tmp_path)
    first = Payment("r", "s", "charge", 100, "k")
    assert provider.pay(first)
    assert not Provider(tmp_path).pay(first._replace(cents=200))
    assert provider.pay(first._replace(idempotency_key="other"))
    assert provider.payments() == [first, first._replace(idempotency_key="other")]
    assert [path.name for path in tmp_path.iterdir()] == ["paid"], "a draft was left"


def test_calls_are_noted_in_order(tmp_path: Path) -> None:
    provider = Provider(tmp_path)
    assert provider.calls() == []
    calls = [Call("r", "s", attempt, "executor-default-0", "k") for attempt in (1, 2)]
    for call in calls:
        provider.note(call)
    assert provider.calls() == calls


# --- the storm ---------------------------------------------------------------


class _Kafka:
    def __init__(self, failure: str = "") -> None:
        self._failure = failure
        self.fallen = 0

    def kill(self) -> None:
        self.fallen += 1

    def restart(self) -> None:
        if self._failure:
            raise EmbeddedKafkaError(self._failure)


class _Stack:
    """A stack of processes that do nothing, and are not started again."""

    def __init__(self, kafka: _Kafka) -> None:
        self.kafka = kafka
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def pid(self, name: str) -> int | None:
        process = self.processes[name]
        return process.pid if process.poll() is None else None

    def kill(self, name: str) -> int | None:
        pid = self.pid(name)
        self.processes[name].kill()
        self.processes[name].wait()
        return pid


@pytest.fixture
def stack() -> Iterator[_Stack]:
    made = _Stack(_Kafka())
    for name in ("gate-0", "gate-1"):
        made.processes[name] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()


def state_of(stack: _Stack, name: str) -> str:
    return psutil.Process(stack.processes[name].pid).status()


def test_who_is_frozen_is_woken(stack: _Stack) -> None:
    states: set[str] = set()
    storm = Storm(stack, [Blow(0.0, FREEZE, "gate-0", 0.3), Blow(0.0, KILL, KAFKA, 0.1)], lambda _: None)  # type: ignore[arg-type]
    storm.rage(lambda: states.add(state_of(stack, "gate-0")))
    assert psutil.STATUS_STOPPED in states
    eventually(lambda: state_of(stack, "gate-0") != psutil.STATUS_STOPPED, "it to be woken")
    assert storm.done == {(FREEZE, "gate"): 1, (KILL, "kafka"): 1}
    assert stack.kafka.fallen == 1


def test_a_frozen_process_can_be_killed_and_nobody_else_is_woken_in_its_place(stack: _Stack) -> None:
    plan = [
        Blow(0.0, FREEZE, "gate-0", 8.0),
        Blow(0.1, KILL, "gate-0"),
        Blow(0.2, STOP, "gate-0"),
        Blow(0.2, STOP, "gate-1"),
    ]
    said: list[str] = []
    storm = Storm(stack, plan, said.append)  # type: ignore[arg-type]

    def stop_early() -> None:
        if len(said) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storm.rage(stop_early)
    assert stack.processes["gate-0"].wait() == -signal.SIGKILL
    assert stack.processes["gate-1"].wait() == -signal.SIGTERM
    assert storm.done == {(LONG_FREEZE, "gate"): 1, (KILL, "gate"): 1, (STOP, "gate"): 1}
    assert [line.split()[2:4] for line in said] == [["SIGSTOP", "gate-0"], ["kill", "-9"], ["SIGTERM", "gate-1"]]


def test_a_broker_that_does_not_come_back_ends_the_storm(stack: _Stack) -> None:
    stack.kafka = _Kafka("no port")
    plan = [Blow(0.0, FREEZE, "gate-0", 60.0), Blow(0.0, KILL, KAFKA), Blow(60.0, KILL, "gate-1")]
    storm = Storm(stack, plan, lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(EmbeddedKafkaError, match="no port"):
        storm.rage(lambda: None)
    eventually(lambda: state_of(stack, "gate-0") != psutil.STATUS_STOPPED, "the frozen to be woken all the same")
    assert stack.pid("gate-1") is not None


# --- people ---------------------------------------------------------------


def requests_in(broker: MemoryBroker) -> list[dict[str, Any]]:
    found = []
    for partition in range(2):
        start, end = broker.offsets("run-requests", partition)
        found += [
            canonical.loads(message.value or b"") for message in broker.read("run-requests", partition, start, end)
        ]
    return found


def test_customers_send_until_it_is_written_and_answer_each_question_once() -> None:
    broker = MemoryBroker()
    broker.create_topic("run-requests", 2)
    make_writer, refusals = broker.writer, iter([WriteFailedError("away")] * 2)

    def writer() -> Any:
        for refusal in refusals:
            raise refusal
        return make_writer()

    broker.writer = writer  # type: ignore[method-assign]
    question = Question("r", "ship", 1, "policy")
    wish = Wish(0.0, {"type": "start", "run_id": "r", "workflow": "w"})
    customers = Customers(broker, 1, [wish], lambda: [question])
    try:
        eventually(lambda: len(requests_in(broker)) == 2, "the order and the answer")
    finally:
        customers.close()
    types = {request["type"] for request in requests_in(broker)}
    assert customers.wanted["r"] == types
    assert len(types & {"approve", "reject"}) == 1
    assert sum(customers.sent.values()) == 2


def test_the_observer_follows_runs_to_their_ends() -> None:
    cluster = Cluster()
    cluster.start_run("r")
    cluster.settle()
    observer = Observer(cluster.broker)
    try:
        eventually(lambda: not observer.unfinished(["r"]), "the run's end to be seen")
        assert observer.unfinished(["r", "nobody"]) == ["nobody"]
        assert observer.statuses() == {"succeeded": 1}
        assert observer.seen()["StepSucceeded"] > 0
        assert observer.questions() == []
    finally:
        observer.close()
    assert observer.failure == ""


def test_a_log_that_does_not_fold_is_a_failure() -> None:
    cluster = Cluster()
    cluster.start_run("r")
    cluster.settle()
    observer = Observer(cluster.broker)
    try:
        eventually(lambda: not observer.unfinished(["r"]), "the run's end to be seen")
        (partition,) = [n for n in range(2) if len(list(_read(cluster, n))) > 1]
        again = list(_read(cluster, partition))[-1]
        writer = cluster.broker.writer()
        writer.send(Record(again.topic, again.partition, again.key, again.value, again.headers))
        writer.flush(1)
        eventually(lambda: observer.failure, "the doubled entry to be noticed")
    finally:
        observer.close()
    assert "IllegalTransitionError" in observer.failure


def _read(cluster: Cluster, partition: int) -> Any:
    start, end = cluster.broker.offsets("run-events", partition)
    return cluster.broker.read("run-events", partition, start, end)
