"""Executors as the gate sees them: two that beat under one instance id, whose records compaction takes for each other's."""

from __future__ import annotations

import pytest

from support.pure import Pair, chain, step
from tidegate import codec
from tidegate.domain.messages import Instance
from tidegate.eventlog.interface import Message

LEASE_MS = 10_000
OLDER, YOUNGER = 1, 5


def read(pair: Pair, offset: int, incarnation: int) -> None:
    """Let the gate read a heartbeat of one of the two, where compaction has left it."""
    row = pair.beat("worker-0", incarnation, 1, ("step:one",))
    message = Message("instances", 0, offset, b"worker-0", codec.encode(row), (), pair.now_ms)
    assert pair.tables.take(message)
    pair.gate.table_changed("instances", "worker-0", pair.tables.rows["instances"]["worker-0"], offset)
    pair.settle_down()


def lost(pair: Pair) -> list[int]:
    """Return the incarnations that the ledger says attempts were lost with."""
    return [event.incarnation for event in pair.ledger_events if type(event).__name__ == "PlacementLost"]


@pytest.fixture
def pair() -> Pair:
    """The younger of two runs an attempt when the gate stops reading for longer than a lease."""
    pair = Pair(1, ("step:one",))
    pair.tables.versions["instances"] = 2
    read(pair, 2, OLDER)
    read(pair, 3, YOUNGER)
    pair.start("r", chain("one", one=step()))
    assert [task.incarnation for task in pair.tasks] == [YOUNGER]
    pair.now_ms += LEASE_MS + 1
    pair.table_end = 24
    return pair


def test_who_was_silent_while_everything_was_read_is_lost(pair: Pair) -> None:
    for offset in range(4, 24):
        read(pair, offset, OLDER)
    assert lost(pair) == [YOUNGER]


@pytest.mark.feature("P7")
def test_a_beat_that_compaction_took_away_unread_is_no_silence(pair: Pair) -> None:
    read(pair, 23, OLDER)  # 4 to 22 held beats of both
    assert not lost(pair)
    pair.now_ms += 1_000
    read(pair, 24, YOUNGER)
    pair.start("s", chain("one", one=step()))
    pair.answer(pair.tasks.popleft(), value=1)
    assert pair.run("r").status == "succeeded"
    assert [task.incarnation for task in pair.tasks] == [YOUNGER], "and it is given new work"


def test_who_is_silent_after_a_hole_is_lost_a_lease_later(pair: Pair) -> None:
    read(pair, 23, OLDER)
    pair.now_ms += LEASE_MS
    read(pair, 24, OLDER)
    assert not lost(pair)
    pair.now_ms += 1
    pair.table_end = 26
    read(pair, 25, OLDER)
    assert lost(pair) == [YOUNGER]
    read(pair, 26, OLDER)
    assert [(task.attempt, task.incarnation) for task in pair.tasks] == [(1, YOUNGER), (2, OLDER)]


@pytest.mark.parametrize(
    "other", [None, Pair.beat("worker-0", -1, 0, (), service="gateway")], ids=["nothing", "another"]
)
def test_a_registration_that_vanished_proves_no_death(pair: Pair, other: Instance | None) -> None:
    pair.now_ms -= LEASE_MS  # to the time when the attempt began
    pair.gate.table_changed("instances", "worker-0", other, 30)
    pair.start("s", chain("one", one=step()))
    assert not lost(pair), "it holds its lease"
    assert len(pair.tasks) == 1, "nothing new is given to what is not registered"

    pair.now_ms += 1_000
    pair.answer(pair.tasks.popleft(), value=1)
    read(pair, 31, YOUNGER)
    assert pair.run("r").status == "succeeded"
    assert [(task.run_id, task.incarnation) for task in pair.tasks] == [("s", YOUNGER)], "it beats: it is there"


def test_who_is_silent_after_its_registration_vanished_is_lost(pair: Pair) -> None:
    pair.tables.versions["instances"] = 10**9
    pair.gate.table_changed("instances", "worker-0", None, 30)
    pair.settle_down()
    assert lost(pair) == [YOUNGER]
