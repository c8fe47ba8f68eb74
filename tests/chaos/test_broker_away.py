"""What a broker that dies and comes back must not do to those who ask it something at that moment. Found by the chaos demo."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.topics.apply import apply
from tidegate.topics.declaration import load_topics
from tidegate.topics.settings import TopicsSettings

LIMIT_S = 120.0
WARM_UP_S = 1.0
DEATHS = 2

# In a process of its own: what it is about ends the process.
ASKS_FOR_COMMITS = """
import sys
import threading
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings

broker = KafkaBroker(KafkaSettings(bootstrap=sys.argv[1]))
wanted, answered = threading.Event(), threading.Event()

def ask():
    while broker.committed("tidegate-gate", "gate-requests"):
        if wanted.is_set():
            wanted.clear()
            answered.set()

threading.Thread(target=ask, daemon=True).start()
for line in sys.stdin:  # whoever writes a line wants to hear of an answer that comes after it
    answered.clear()
    wanted.set()
    print(answered.wait(60), flush=True)
"""


@pytest.fixture
def kafka_with_topics(own_kafka: Callable[..., EmbeddedKafka]) -> EmbeddedKafka:
    """Start a broker with our topics, and let a group commit something."""
    kafka = own_kafka()
    broker = KafkaBroker(KafkaSettings(bootstrap=kafka.bootstrap))
    apply(broker, load_topics(queues=["default"], settings=TopicsSettings()))
    inbox = broker.inbox("tidegate-gate", "gate-0", "gate-requests")
    gained: frozenset[int] = frozenset()
    deadline = time.monotonic() + LIMIT_S
    while not gained and time.monotonic() < deadline:
        inbox.poll(1, 0.1)
        gained = inbox.take_changes().gained
    inbox.commit(dict.fromkeys(gained, 7))
    while broker.committed("tidegate-gate", "gate-requests") != dict.fromkeys(gained, 7):
        assert time.monotonic() < deadline, "the commit is not there"
        inbox.poll(1, 0.1)
    inbox.close()
    broker.close()
    return kafka


@pytest.mark.feature("D1")
def test_who_asks_for_offsets_while_the_broker_dies_waits_for_it(kafka_with_topics: EmbeddedKafka) -> None:
    """The client knows no partitions at the moment when its connection breaks: that is not their end."""
    failures: list[EventLogError] = []
    answers = 0
    stop = threading.Event()

    def ask() -> None:
        nonlocal answers
        broker = KafkaBroker(KafkaSettings(bootstrap=kafka_with_topics.bootstrap))
        while not stop.is_set():
            try:
                broker.offsets("instances", 0)
                answers += 1
            except EventLogError as error:
                failures.append(error)
        broker.close()

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    for _ in range(DEATHS):
        stop.wait(WARM_UP_S)
        kafka_with_topics.kill()
        kafka_with_topics.restart()
    before = answers
    deadline = time.monotonic() + LIMIT_S
    while answers == before and not failures and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for asker in askers:
        asker.join()
    assert failures == []
    assert answers > before, "it does not answer any more"


@pytest.mark.feature("D1")
def test_who_asks_for_a_groups_offsets_while_the_broker_comes_back_survives(kafka_with_topics: EmbeddedKafka) -> None:
    """The admin client ends the process if the group's coordinator is not up yet (librdkafka issue 5040)."""
    command = [sys.executable, "-c", ASKS_FOR_COMMITS, kafka_with_topics.bootstrap]
    pipe = subprocess.PIPE
    askers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1) for _ in range(3)]
    try:
        for _ in range(DEATHS):
            for asker in askers:
                _hear_an_answer(asker)
            kafka_with_topics.kill()
            kafka_with_topics.restart()
        for asker in askers:
            _hear_an_answer(asker)
    finally:
        for asker in askers:
            asker.kill()
            asker.wait()


def _hear_an_answer(asker: subprocess.Popen[str]) -> None:
    assert asker.stdin is not None
    assert asker.stdout is not None
    try:
        asker.stdin.write("\n")
        line = asker.stdout.readline()
    except BrokenPipeError:
        line = ""
    assert line == "True\n", f"it ended with {asker.wait(LIMIT_S)}" if not line else "no answer"
