"""The dataset's day: every request is one that admission takes, and a day told twice, or from its middle, is the same."""

from __future__ import annotations

from tidegate.bench import day_app
from tidegate.bench.day import DOCUMENTS, KINDS, NIGHT_AT, RELEASE_AT, TOPUP_AT, Day
from tidegate.domain import requests
from tidegate.gate import kinds

RUNS = 2_000


def test_every_request_is_valid_and_names_what_the_app_has() -> None:
    day = Day(seed=5, runs=RUNS)
    labels = {f"{one['name']}@{one['version']}" for one in day_app.app.definitions()}
    names = {label.partition("@")[0] for label in labels}
    unknown = broken = 0
    for number in range(RUNS):
        wish = day.wish(number)
        for later in wish.later:
            requests.validate(later.request)
        if wish.raw:
            broken += 1
            continue
        requests.validate(wish.request)
        asked = wish.request.get("workflow") or f"agent:{wish.request['agent']}"
        unknown += asked == "male"
        assert asked == "male" or asked in labels | names
        assert not (wish.ends and asked == "male"), "a refused run never ends"
    assert unknown > 0
    assert broken > 0


def test_a_day_told_from_its_middle_is_the_same_day() -> None:
    assert Day(5, RUNS).wish(1_234) == Day(5, RUNS).wish(1_234)
    assert Day(6, RUNS).wish(1_234) != Day(5, RUNS).wish(1_234)
    assert Day(5, RUNS).answer("day-5-000100", "ship", True) == Day(5, RUNS).answer("day-5-000100", "ship", True)


def test_nobody_answers_at_night_and_orders_change_with_the_release() -> None:
    day = Day(5, RUNS)
    assert day.answer(day.run_id(int(NIGHT_AT * RUNS) - 1), "ship", True) is not None
    assert day.answer(day.run_id(int(NIGHT_AT * RUNS)), "ship", True) is None
    child = f"{day.run_id(100)}.3f3013d296aec3e2dfac44f6"
    assert day.answer(child, "tag", True) is not None, "a child asks on behalf of its run"
    orders = [
        (number, target)
        for number in range(RUNS)
        if str(target := day.wish(number).request.get("workflow")).startswith("order")
    ]
    assert {target for number, target in orders if number < RELEASE_AT * RUNS} == {"order@1"}
    assert {target for number, target in orders if number >= RELEASE_AT * RUNS} == {"order@2"}


def test_its_documents_are_documents() -> None:
    day = Day(5, RUNS)
    assert len(kinds.read(day.documents())) == DOCUMENTS.count("\n---\n") + 1
    kinds.parse(day.topup(at_ms=1_790_000_000_000))
    assert sum(KINDS.values()) == 10_000
    assert RELEASE_AT < TOPUP_AT < NIGHT_AT
