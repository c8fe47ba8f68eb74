"""Which tasks are taken: by address and by position, and never twice whatever the order of arrival."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.domain.entry import Position
from tidegate.domain.messages import Call, StepTask
from tidegate.executor.decide import Verdict, judge_task
from tidegate.executor.holdings import Holdings, key_of
from tidegate.registry import mark_name


def task(offset: int = 5, *, partition: int = 0, index: int = 0, **changes: object) -> StepTask:
    fields: dict[str, object] = {
        "type": "run",
        "run_id": "run-1",
        "step_id": f"node-{partition}-{offset}-{index}",
        "attempt": 1,
        "account": "acme",
        "instance_id": "me",
        "incarnation": 7,
        "source": Position(partition=partition, offset=offset, index=index),
        "result_partition": 0,
        "idempotency_key": "k",
        "call": Call(
            kind="tool",
            function="f",
            queue="default",
            arguments="{}",
            timeout_ms=1000,
            reserve_micros=10,
            idempotent=True,
        ),
    }
    return StepTask(**{**fields, **changes})  # type: ignore[arg-type]


def judge(judged: StepTask, **state: object) -> Verdict:
    defaults: dict[str, object] = {
        "instance_id": "me",
        "incarnation": 7,
        "marks": {"gate-ledger-0": (5 << 12) | 3},
        "free_slots": 1,
        "draining": False,
    }
    return judge_task(judged, **{**defaults, **state})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("judged", "state", "verdict"),
    [
        (task(6), {}, Verdict.RUN),
        (task(5, index=4), {}, Verdict.RUN),
        (task(5, index=3), {}, Verdict.SEEN_BEFORE),
        (task(5, index=2), {}, Verdict.SEEN_BEFORE),
        (task(4, index=9), {}, Verdict.SEEN_BEFORE),
        (task(0, partition=1), {}, Verdict.RUN),  # another ledger partition has its own mark
        (task(6, incarnation=6), {}, Verdict.NOT_OURS),
        (task(6, incarnation=8), {}, Verdict.NOT_OURS),
        (task(6, instance_id="you"), {}, Verdict.NOT_OURS),
        (task(6), {"free_slots": 0}, Verdict.ANSWER_BUSY),
        (task(6), {"draining": True}, Verdict.ANSWER_RELEASED),
        (task(6), {"draining": True, "free_slots": 0}, Verdict.ANSWER_RELEASED),
        (task(6, type="cancel"), {"draining": True, "free_slots": 0}, Verdict.CANCEL),
        (task(5, type="cancel"), {}, Verdict.SEEN_BEFORE),
        (task(6, type="cancel", incarnation=6), {}, Verdict.NOT_OURS),
    ],
)
def test_verdicts(judged, state, verdict):
    assert judge(judged, **state) is verdict


positions = st.builds(
    lambda partition, offset, index: (partition, offset, index),
    st.integers(0, 1),
    st.integers(0, 6),
    st.integers(0, 2),
)


@given(st.lists(positions, max_size=40))
def test_at_most_one_dispatch_per_position_whatever_arrives_in_whatever_order(arrivals):
    holdings = Holdings("me", slots=1000)
    holdings.incarnation = 7
    entered = []
    for partition, offset, index in arrivals:
        if holdings.take(task(offset, partition=partition, index=index)) is Verdict.RUN:
            entered.append((partition, offset, index))
    assert len(entered) == len(set(entered))
    for partition in (0, 1):
        taken = [entry[1:] for entry in entered if entry[0] == partition]
        assert taken == sorted(taken)


@pytest.fixture
def holdings():
    holdings = Holdings("me", slots=2)
    holdings.incarnation = 7
    return holdings


def test_a_heartbeat_never_shows_a_mark_without_its_attempt(holdings):
    first, second, third = task(1), task(2), task(3, partition=4)
    assert [holdings.take(t) for t in (first, second, third)] == [Verdict.RUN, Verdict.RUN, Verdict.ANSWER_BUSY]
    load = holdings.load()
    assert load.free_slots == 0
    assert load.marks == {mark_name(0): 2 << 12, mark_name(4): 3 << 12}
    assert [(r.step_id, r.ledger_partition) for r in load.running] == [
        (first.step_id, 0),
        (second.step_id, 0),
        (third.step_id, 4),
    ]
    holdings.answered(key_of(third))
    assert holdings.free_slot()  # all were taken: worth telling
    assert not holdings.free_slot()
    assert len(holdings.load().running) == 2  # their answers are not acknowledged yet
    holdings.answered(key_of(first))
    holdings.answered(key_of(second))
    assert (holdings.load().free_slots, holdings.load().running) == (2, ())


def test_what_is_ignored_leaves_no_mark(holdings):
    assert holdings.take(task(9, incarnation=6)) is Verdict.NOT_OURS
    assert holdings.load() == (2, 2, (), {})


def test_a_cancel_raises_the_mark_and_takes_no_slot(holdings):
    assert holdings.take(task(9, type="cancel")) is Verdict.CANCEL
    assert holdings.load() == (2, 2, (), {mark_name(0): 9 << 12})


def test_stuck_slots_are_out_of_use_until_their_functions_end(holdings):
    holdings.take(task(1))
    holdings.stick()
    assert (holdings.load().slots, holdings.load().free_slots) == (1, 1)
    assert holdings.free_slot(stuck=True)
    assert (holdings.load().slots, holdings.load().free_slots) == (2, 2)


def test_draining_offers_nothing(holdings):
    holdings.drain()
    assert holdings.load().free_slots == 0
    assert holdings.take(task(1)) is Verdict.ANSWER_RELEASED
