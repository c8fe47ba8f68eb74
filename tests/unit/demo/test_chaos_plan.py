"""What a storm does is a pure function of its seed, and spares nobody."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.demo.chaos.demo import ENVIRONMENT, EXECUTORS, INSTANCES, SIZES
from tidegate.demo.chaos.plan import (
    FREEZE,
    KAFKA,
    KAFKA_START_S,
    KILL,
    LONG_FREEZE_S,
    STOP,
    Question,
    answer,
    blows,
    run_ids,
    service_of,
    wishes,
)
from tidegate.domain import canonical
from tidegate.domain.requests import parse_request

PROCESSES = (
    *(f"{service}-{n}" for service, count in INSTANCES.items() for n in range(count)),
    "projection-0",
    "gateway-0",
    *(f"executor-default-{n}" for n in range(EXECUTORS)),
)
SIZE = SIZES["chaos-100"]
seeds = st.integers(0, 10**6)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("name", sorted(SIZES))
@given(seed=seeds)
def test_everybody_is_killed_restarted_and_every_service_frozen_for_long(name: str, seed: int) -> None:
    size = SIZES[name]
    plan = blows(seed, size.seconds, size.blows, PROCESSES)
    assert len(plan) == size.blows
    for kind in (KILL, STOP):
        assert {blow.target for blow in plan if blow.kind == kind} >= set(PROCESSES)
    assert {service_of(blow.target) for blow in plan if blow.is_long} == {service_of(name) for name in PROCESSES}
    kafka = [blow for blow in plan if blow.target == KAFKA]
    assert len(kafka) == 1 + size.seconds // 60
    assert {blow.kind for blow in kafka} == {KILL}
    assert {blow.target for blow in plan} == {*PROCESSES, KAFKA}


@given(seed=seeds)
def test_blows_come_in_order_and_none_outlasts_the_storm(seed: int) -> None:
    plan = blows(seed, SIZE.seconds, SIZE.blows, PROCESSES)
    assert [blow.at_s for blow in plan] == sorted(blow.at_s for blow in plan)
    assert all(blow.at_s + blow.hold_s <= SIZE.seconds + 0.02 for blow in plan)
    falls = [blow for blow in blows(seed, 200, 0, PROCESSES) if blow.target == KAFKA]
    for first, second in itertools.pairwise(falls):
        assert first.at_s + first.hold_s + KAFKA_START_S - 0.02 <= second.at_s


def test_a_seed_repeats_everything_and_another_does_not() -> None:
    assert blows(7, 40, 30, PROCESSES) == blows(7, 40, 30, PROCESSES) != blows(8, 40, 30, PROCESSES)
    assert wishes(7, 50, 40) == wishes(7, 50, 40) != wishes(8, 50, 40)
    question = Question("order-001", "ship", 1, "policy")
    assert answer(7, question) == answer(7, question)
    assert {answer(seed, question)[1]["type"] for seed in range(50)} == {"approve", "reject"}


def test_a_long_freeze_outlasts_leases_and_sessions() -> None:
    """Else there would be no zombies in it."""
    lasting_s = (
        float(ENVIRONMENT["TIDEGATE_GATE_LEASE_S"]),
        int(ENVIRONMENT["TIDEGATE_KAFKA_SESSION_TIMEOUT_MS"]) / 1000,
    )
    assert LONG_FREEZE_S[0] > 1 + max(lasting_s)
    plan = blows(1, SIZE.seconds, SIZE.blows, PROCESSES)
    assert all(blow.hold_s > max(lasting_s) for blow in plan if blow.is_long)
    assert {blow.kind for blow in plan if blow.is_long} == {FREEZE}


@given(seed=seeds)
def test_customers_ask_for_every_run_in_words_that_admission_understands(seed: int) -> None:
    asked = wishes(seed, SIZE.runs, SIZE.seconds)
    requests = [parse_request(canonical.dumps(wish.request).encode()) for wish in asked]
    times = Counter(request.run_id for request in requests if request.type == "start")
    assert times.keys() == set(run_ids(SIZE.runs))
    assert set(times.values()) == {1, 2}
    for question in (Question("order-000", "ship", 1, "policy"), Question("order-000", "stamp", 2, "outcome_unknown")):
        parse_request(canonical.dumps(answer(seed, question)[1]).encode())


def test_a_cancel_comes_after_the_order() -> None:
    asked = wishes(3, 500, 100)
    first = {wish.request["run_id"]: wish.at_s for wish in reversed(asked) if wish.request["type"] == "start"}
    cancels = [wish for wish in asked if wish.request["type"] == "cancel"]
    assert cancels
    assert all(wish.at_s > first[wish.request["run_id"]] for wish in cancels)
