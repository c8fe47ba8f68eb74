"""What the client library says many times is written once, and then seldom, with a count."""

import logging

import pytest

from tidegate.eventlog.kafka.client_lines import Sparing

REFUSED = (
    "FAIL [{client}] [thrd:{at}]: {at}: Connect to ipv4#127.0.0.1:9092 failed: Connection refused "
    "(after {ms}ms in state CONNECT)"
)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said(clock: Clock) -> "Said":
    return Said(clock)


class Said:
    """A filter, and what passed it."""

    def __init__(self, clock: Clock) -> None:
        self._filter = Sparing(30.0, clock)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        record = logging.LogRecord("client", logging.ERROR, "", 0, "%s", (text,), None)
        if self._filter.filter(record):
            self.lines.append(record.getMessage())


def refused(client: str, at: str = "127.0.0.1:9092/bootstrap", ms: int = 0) -> str:
    return REFUSED.format(client=client, at=at, ms=ms)


def test_lines_of_one_kind_are_said_once_whichever_client_says_them(said: Said) -> None:
    for number in range(100):
        said.say(refused(f"tidegate#producer-{number}", ms=number))
        said.say(refused(f"tidegate#consumer-{number}", at="GroupCoordinator: 127.0.0.1:9092"))
    assert said.lines == [refused("tidegate#producer-0")]


def test_another_trouble_is_said_at_once(said: Said) -> None:
    said.say(refused("a"))
    said.say("FAIL [a] [thrd:b/1]: b/1: SASL authentication error: no such user (after 3ms in state AUTH)")
    said.say(refused("a").replace("9092", "9093"))
    assert len(said.lines) == 3


def test_it_is_said_again_after_a_while_with_how_often(said: Said, clock: Clock) -> None:
    for _ in range(5):
        said.say(refused("a"))
    clock.now_s = 31.0
    said.say(refused("b"))
    said.say(refused("b"))
    assert said.lines == [refused("a"), refused("b") + " (and 4 more like it in 31 s)"]


def test_kinds_are_bounded(said: Said) -> None:
    for number in range(5_000):
        said.say(f"trouble {number}")
    assert len(said.lines) == 5_000
