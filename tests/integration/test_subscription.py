"""Readers that share topics in a group: what they are given, what they say of it, and what rebalances do to that.

The broker is real; what a coordinator answers, and when, is changed on the way (`LossyWay`) or at the client's call (`Late`).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException

from support.brokers import create_topic
from support.lossy import LossyWay
from support.stack import eventually
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker, subscription
from tidegate.eventlog.kafka.clients import make_consumer
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.eventlog.settings import KafkaSettings

TOPIC, PARTITIONS = "instances", 4
BUSY_S = 15.0


class Late:
    """A client of a coordinator that has just moved, or whose next answer takes so long that the group goes on meanwhile."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.answers: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)

    def committed(self, *args: Any, **options: Any) -> Any:
        answer = self.answers.pop(0) if self.answers else ""
        if answer == "moved":
            raise KafkaException(KafkaError(KafkaError.NOT_COORDINATOR))
        if answer == "late":
            time.sleep(4.0)
        return self._consumer.committed(*args, **options)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Every client that the test makes, in order."""
    made: list[Late] = []

    def make(settings: KafkaSettings, config: Mapping[str, Any]) -> Late:
        made.append(Late(make_consumer(settings, config)))
        return made[-1]

    monkeypatch.setattr(subscription, "make_consumer", make)
    return made


@pytest.fixture
def settings(bootstrap: str, topic_prefix: str) -> KafkaSettings:
    """Where there is a topic with two partitions."""
    create_topic(bootstrap, topic_prefix + TOPIC, partitions=2)
    return KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, session_timeout_ms=6_000)


def joined(settings: KafkaSettings) -> KafkaSubscription:
    """Return a member that has both partitions."""
    member = KafkaSubscription(settings, "g", [TOPIC])
    eventually(lambda: member.poll(10, 0.1) or len(member.assigned) == 2, "both partitions")
    return member


def write_one_each(settings: KafkaSettings) -> None:
    writer = KafkaBroker(settings).writer()
    for partition in range(2):
        writer.send(Record(TOPIC, partition, b"k", b"v"))
    writer.flush(30)


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
    world = World(seed)
    rng = world.rng
    settings = KafkaSettings(bootstrap=lossy.address, topic_prefix=topic_prefix, session_timeout_ms=6_000)
    create_topic(lossy.address, topic_prefix + TOPIC, partitions=PARTITIONS)
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
            lossy.deny_offsets = rng.randint(1, 3)
    lossy.deny_offsets = 0
    writer.flush(30)
    ends = {TopicPartition(TOPIC, n): KafkaBroker(settings).offsets(TOPIC, n).end for n in range(PARTITIONS)}

    def everything() -> bool:
        for member in members:
            member.poll(world)
        return all(len(world.delivered.get(at, ())) == n for at, n in ends.items())

    eventually(everything, "every message")
    for member in members:
        member.subscription.close()


def test_what_was_lost_again_is_not_told_as_gained(settings: KafkaSettings, late: list[Late]) -> None:
    first = KafkaSubscription(settings, "g", [TOPIC])
    late[0].answers = ["moved", "late"]
    stop = threading.Event()

    def join() -> None:
        time.sleep(2.0)
        second = KafkaSubscription(settings, "g", [TOPIC])
        while not stop.is_set():
            second.poll(10, 0.1)
        second.close()

    def shares() -> bool:
        first.poll(10, 0.2)
        assert first.take_changes().gained.keys() <= first.assigned
        return len(first.assigned) == 1

    other = threading.Thread(target=join)
    other.start()
    try:
        eventually(shares, "the second one's share")
    finally:
        stop.set()
        other.join()
        first.close()


def test_what_was_paused_lost_and_given_back_is_read(settings: KafkaSettings) -> None:
    """`resume` names only what is ours just then: what is away keeps its pause, and is read never again once it is back."""
    first = joined(settings)
    first.pause()
    second = KafkaSubscription(settings, "g", [TOPIC])
    eventually(
        lambda: (first.poll(10, 0.1), second.poll(10, 0.1), len(first.assigned) == len(second.assigned) == 1)[-1],
        "one partition each",
    )
    first.resume()
    second.close()
    eventually(lambda: first.poll(10, 0.1) or len(first.assigned) == 2, "both partitions again")
    write_one_each(settings)
    read: set[int] = set()
    eventually(lambda: read.update(m.partition for m in first.poll(10, 0.1)) or read == {0, 1}, "a message of each")
    first.close()


def test_a_resume_while_it_is_not_known_where_to_read_on_counts(settings: KafkaSettings, late: list[Late]) -> None:
    first = joined(settings)
    first.pause()
    late[0].answers = ["moved"] * 3
    second = KafkaSubscription(settings, "g", [TOPIC])
    eventually(lambda: (first.poll(10, 0.1), second.poll(10, 0.1), first._given)[-1], "a share to be read")
    first.resume()  # as the projection does as soon as ClickHouse has taken its batch, and never again
    write_one_each(settings)
    read: list[int] = []
    eventually(
        lambda: (read.extend(m.partition for m in first.poll(10, 0.1)), second.poll(10, 0.1), read)[-1], "a message"
    )
    assert first.assigned
    second.close()
    first.close()


def test_what_is_assigned_does_not_change_in_the_hands_of_who_asked(settings: KafkaSettings) -> None:
    member = joined(settings)
    assigned = member.assigned
    member.close()
    assert len(assigned) == 2


def test_who_is_told_to_end_before_it_was_told_its_share_ends_at_once(
    settings: KafkaSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = KafkaSubscription(settings, "g", [TOPIC])
    asked: list[object] = []
    monkeypatch.setattr(member, "_begin", lambda: bool(asked.append(1)))
    time.sleep(4.0)  # its assignment has come, and nobody has polled
    member.close()
    assert not asked, "a client that is closing never answers"
