"""Readers that share topics in a group: what they are given, what they say of it, and what rebalances do to that.

The broker is real; what a coordinator answers, and when, is changed on the way (`LossyWay`) or at the client's call (`Late`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import KafkaError, KafkaException

from support.brokers import create_topic
from support.lossy import LossyWay
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.eventlog.settings import KafkaSettings

TOPIC, PARTITIONS = "instances", 4
BUSY_S = 15.0


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LossyWay]:
    """The only way to a broker of its own."""
    with LossyWay() as way:
        extra = {"advertised.listeners": f"PLAINTEXT://{way.address}"}
        kafka = EmbeddedKafka(tmp_path_factory.mktemp("lossy"), profile="quick", extra_config=extra)
        way.lead_to(lambda: kafka.bootstrap)
        with kafka:
            yield way


class Watched:
    """A member, and what it must deliver next of each partition by its own words."""

    def __init__(self, settings: KafkaSettings, instance_id: str | None) -> None:
        self.subscription = KafkaSubscription(settings, "g", [TOPIC], instance_id)
        self.next: dict[TopicPartition, int] = {}
        self.names = instance_id

    def poll(self, world: World) -> None:
        messages = self.subscription.poll(world.rng.choice([1, 10, 300]), world.rng.choice([0.0, 0.02, 0.2]))
        changes = self.subscription.take_changes()
        assigned = self.subscription.assigned
        for at in changes.lost:
            self.next.pop(at, None)
        for at, committed in changes.gained.items():
            assert at in assigned, "gained and lost again"
            assert committed is None or committed <= world.committed.get(at, 0), "beyond what anybody committed"
            self.next[at] = committed or 0
        assert self.next.keys() == assigned, f"{self.next.keys()} {assigned}"
        for message in messages:
            at = TopicPartition(message.topic, message.partition)
            assert at in self.next, "of a partition that is not ours"
            assert message.offset == self.next[at], f"{at}: {message.offset}, not {self.next[at]}"
            self.next[at] += 1
            world.delivered.setdefault(at, set()).add(message.offset)
        if world.rng.random() < 0.4:
            commits = {at: world.rng.randint(max(0, n - 5), n) for at, n in self.next.items() if n}
            self.subscription.commit(commits)
            for at, offset in commits.items():
                world.committed[at] = max(world.committed.get(at, 0), offset)


class World:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.committed: dict[TopicPartition, int] = {}
        self.delivered: dict[TopicPartition, set[int]] = {}


@pytest.mark.parametrize(("seed", "static"), [(1, False), (2, True)])
def test_members_that_come_and_go(lossy: LossyWay, topic_prefix: str, seed: int, static: bool) -> None:
    way = lossy
    world = World(seed)
    rng = world.rng
    settings = KafkaSettings(bootstrap=way.address, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(way.address, topic_prefix + TOPIC, partitions=PARTITIONS)
    writer = KafkaBroker(settings).writer()
    members: list[Watched] = []
    written = 0

    def write() -> None:
        nonlocal written
        for _ in range(rng.randint(0, 20)):
            writer.send(Record(TOPIC, rng.randrange(PARTITIONS), b"k", b"%d" % written))
            written += 1
        writer.poll()

    def join() -> None:
        used = {member.names for member in members}
        free = next(f"m-{n}" for n in range(4) if f"m-{n}" not in used)
        members.append(Watched(settings, free if static else None))

    end = time.monotonic() + BUSY_S
    join()
    while time.monotonic() < end:
        write()
        for member in list(members):
            member.poll(world)
        dice = rng.random()
        if dice < 0.03 and len(members) < 3:
            join()
        elif dice < 0.055 and len(members) > 1:
            members.pop(rng.randrange(len(members))).subscription.close()
        if rng.random() < 0.05:
            way.deny_offsets = rng.randint(1, 3)
    way.deny_offsets = 0
    writer.flush(30)
    ends = {TopicPartition(TOPIC, n): KafkaBroker(settings).offsets(TOPIC, n).end for n in range(PARTITIONS)}
    deadline = time.monotonic() + 60
    while any(len(world.delivered.get(at, ())) < n for at, n in ends.items()):
        assert time.monotonic() < deadline, {at: (len(world.delivered.get(at, ())), n) for at, n in ends.items()}
        for member in members:
            member.poll(world)
    for member in members:
        member.subscription.close()


class Late:
    """A coordinator that has just moved, and whose next answer takes so long that the group goes on meanwhile."""

    def __init__(self, consumer: object) -> None:
        self._consumer = consumer
        self.answers = ["moved", "late"]

    def __getattr__(self, name: str) -> object:
        return getattr(self._consumer, name)

    def committed(self, *args: object, **options: object) -> object:
        answer = self.answers.pop(0) if self.answers else ""
        if answer == "moved":
            raise KafkaException(KafkaError(KafkaError.NOT_COORDINATOR))
        if answer == "late":
            time.sleep(4.0)
        return self._consumer.committed(*args, **options)  # type: ignore[attr-defined]


def test_what_was_lost_again_is_not_told_as_gained(bootstrap: str, topic_prefix: str) -> None:
    settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    first = KafkaSubscription(settings, "g", [TOPIC])
    first._consumer = Late(first._consumer)  # type: ignore[assignment]
    stop = threading.Event()

    def join() -> None:
        time.sleep(2.0)
        second = KafkaSubscription(settings, "g", [TOPIC])
        while not stop.is_set():
            second.poll(10, 0.1)
        second.close()

    other = threading.Thread(target=join)
    other.start()
    try:
        deadline = time.monotonic() + 60
        while len(first.assigned) != 1 and time.monotonic() < deadline:
            first.poll(10, 0.2)
            assert first.take_changes().gained.keys() <= first.assigned
    finally:
        stop.set()
        other.join()
        first.close()


def test_what_was_paused_lost_and_given_back_is_read(bootstrap: str, topic_prefix: str) -> None:
    """`resume` names only what is ours just then: what is away keeps its pause, and is read never again once it is back."""
    settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    first = KafkaSubscription(settings, "g", [TOPIC])
    _until(lambda: first.poll(10, 0.1) or len(first.assigned) == 2)
    first.pause()
    second = KafkaSubscription(settings, "g", [TOPIC])
    _until(lambda: (first.poll(10, 0.1), second.poll(10, 0.1), len(first.assigned) == len(second.assigned) == 1)[-1])
    first.resume()
    second.close()
    _until(lambda: first.poll(10, 0.1) or len(first.assigned) == 2)
    writer = KafkaBroker(settings).writer()
    for partition in range(2):
        writer.send(Record(TOPIC, partition, b"k", b"v"))
    writer.flush(30)
    read: set[int] = set()
    _until(lambda: read.update(m.partition for m in first.poll(10, 0.1)) or len(read) == 2, 15.0)
    first.close()
    assert read == {0, 1}


def test_a_resume_while_it_is_not_known_where_to_read_on_counts(bootstrap: str, topic_prefix: str) -> None:
    settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    first = KafkaSubscription(settings, "g", [TOPIC])
    _until(lambda: first.poll(10, 0.1) or len(first.assigned) == 2)
    first.pause()
    late = Late(first._consumer)
    late.answers = ["moved"] * 3
    first._consumer = late  # type: ignore[assignment]
    second = KafkaSubscription(settings, "g", [TOPIC])
    _until(lambda: (first.poll(10, 0.1), second.poll(10, 0.1), first._given)[-1])
    first.resume()  # as the projection does as soon as ClickHouse has taken its batch, and never again
    writer = KafkaBroker(settings).writer()
    for partition in range(2):
        writer.send(Record(TOPIC, partition, b"k", b"v"))
    writer.flush(30)
    read: list[int] = []
    _until(lambda: (read.extend(m.partition for m in first.poll(10, 0.1)), second.poll(10, 0.1), read)[-1], 15.0)
    assigned = frozenset(first.assigned)
    second.close()
    first.close()
    assert assigned
    assert read


def test_what_is_assigned_does_not_change_in_the_hands_of_who_asked(bootstrap: str, topic_prefix: str) -> None:
    settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    subscription = KafkaSubscription(settings, "g", [TOPIC])
    _until(lambda: subscription.poll(10, 0.1) or subscription.assigned)
    assigned = subscription.assigned
    subscription.close()
    assert len(assigned) == 2


def _until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        pass


def test_who_is_told_to_end_before_it_was_told_its_share_ends_at_once(bootstrap: str, topic_prefix: str) -> None:
    settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    subscription = KafkaSubscription(settings, "g", [TOPIC])
    asked: list[object] = []
    subscription._begin = lambda: bool(asked.append(1))  # type: ignore[method-assign, func-returns-value]
    time.sleep(4.0)  # its assignment has come, and nobody has polled
    subscription.close()
    assert not asked, "a client that is closing never answers"
