"""A client that lost its group for ever ends its process; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaPartition

from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import clients, inbox, subscription
from tidegate.eventlog.kafka.contact import ASK_EVERY_S, SESSIONS, GroupContact
from tidegate.eventlog.settings import KafkaSettings

SESSION_S, POLL_S = 10.0, 300.0
LIMIT_S = POLL_S + SESSIONS * SESSION_S


class Brokers:
    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.answer = True
        self.asked = 0

    def ask(self) -> bool:
        self.asked += 1
        return self.answer

    def contact(self) -> GroupContact:
        return GroupContact(
            "run-commands",
            session_timeout_s=SESSION_S,
            max_poll_interval_s=POLL_S,
            is_answered=self.ask,
            monotonic_s=lambda: self.now_s,
        )

    def wait(self, contact: GroupContact, seconds: float) -> None:
        """Let time pass, with a poll every second."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            contact.check()


def test_a_member_that_has_its_share_is_never_asked_about() -> None:
    brokers = Brokers()
    contact = brokers.contact()
    contact.gained()
    brokers.wait(contact, 10 * LIMIT_S)
    assert brokers.asked == 0


@pytest.mark.parametrize("was_in", [True, False])
def test_a_member_that_stays_without_its_group_while_brokers_answer_ends(was_in: bool) -> None:
    brokers = Brokers()
    contact = brokers.contact()
    if was_in:
        contact.gained()
        contact.lost()
    brokers.wait(contact, LIMIT_S)  # another member may keep the group waiting for that long
    with pytest.raises(EventLogError, match=r"run-commands has given us no share for 3\d\d s, although brokers answer"):
        brokers.wait(contact, 2 * ASK_EVERY_S)
    assert brokers.asked < LIMIT_S / ASK_EVERY_S + 2


def test_brokers_that_are_away_end_nobody_and_their_return_gives_all_time_again() -> None:
    brokers = Brokers()
    contact = brokers.contact()
    contact.gained()
    contact.lost()
    brokers.answer = False
    brokers.wait(contact, 10 * LIMIT_S)
    brokers.answer = True
    brokers.wait(contact, LIMIT_S - ASK_EVERY_S)
    contact.gained()
    contact.lost()
    brokers.wait(contact, LIMIT_S - ASK_EVERY_S)


class StuckConsumer:
    """A client that never hears anything."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.assigned: Callable[..., None] | None = None

    def subscribe(self, topics: list[str], on_assign: Callable[..., None], **callbacks: Any) -> None:
        self.assigned = on_assign

    def assign(self, partitions: list[KafkaPartition]) -> None:
        assert not partitions, "nobody said where to read on"

    resume = assign

    def committed(self, partitions: list[KafkaPartition], timeout: float) -> list[KafkaPartition]:
        raise KafkaException(KafkaError(KafkaError.NOT_COORDINATOR))

    def poll(self, timeout_s: float) -> None:
        return None

    def consume(self, count: int, timeout_s: float) -> list[Any]:
        return []


def test_a_subscription_says_whether_it_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "make_consumer", lambda _, config: StuckConsumer(config))
    member = subscription.KafkaSubscription(KafkaSettings(), "g", ["run-requests"])
    assert not member.has_share
    member._on_assign(member._consumer, [])  # of more members than partitions one has none
    assert member.has_share
    member._on_assign(member._consumer, [KafkaPartition("run-requests", 0)])  # nothing was taken from it before
    assert not member.has_share, "it was not told where to read on"
    member._on_assign(member._consumer, [])
    assert member.has_share
    member._on_revoke(member._consumer, [])
    assert not member.has_share


def poll_for(seconds: int, poll: Callable[[], object], clock: list[float]) -> None:
    for _ in range(seconds):
        clock[0] += 1.0
        poll()


@pytest.mark.parametrize("client", ["inbox", "subscription", "subscription that is not told where to read on"])
def test_both_kinds_of_members_are_watched(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(clients, "is_answered", lambda _: True)
    monkeypatch.setattr(clients.time, "monotonic", lambda: clock[0])
    for module in (inbox, subscription):
        monkeypatch.setattr(module, "make_consumer", lambda _, config: StuckConsumer(config))
    settings = KafkaSettings(session_timeout_ms=1_000, max_poll_interval_ms=5_000)
    poll: Callable[[], object]
    if client == "inbox":
        member = inbox.Member(settings, "g", "i", "run-commands", lambda: pytest.fail("nobody to ask"))
        poll = partial(member.serve, 0.0)
    else:
        reader = subscription.KafkaSubscription(settings, "g", ["run-requests"])
        poll = partial(reader.poll, 1, 0.0)
        if client != "subscription":
            reader._on_assign(reader._consumer, [KafkaPartition("run-requests", 0)])
            assert not reader.assigned

    with pytest.raises(EventLogError, match="our client is stuck"):
        poll_for(200, poll, clock)
