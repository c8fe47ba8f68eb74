"""Attempts that wait for room in budgets: who is tried, in which order, and that nobody is forgotten."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from support.pure import Pair, chain, step
from tidegate.domain import ledger_events as ev
from tidegate.domain.messages import Call
from tidegate.gate import decide
from tidegate.gate.budgets import estimate
from tidegate.gate.lacking import Alike, Lacking, Look, Scope, Shortage
from tidegate.gate.service import LOOK_AGAIN_MS
from tidegate.gate.state import AttemptKey, RunMoney

HOUR_MS = 3600 * 1000
DAY_MS = 24 * HOUR_MS


def budget(name: str, account: str, calls: int, version: str = "1", **fields: Any) -> dict[str, Any]:
    shape = {"window": "total", "on_exceed": "pause", **fields}
    return {
        "kind": "budget",
        "budget": name,
        "version": version,
        "account": account,
        "limits": {"calls": calls},
        **shape,
    }


def entered(pair: Pair) -> list[str]:
    return [task.run_id for task in pair.tasks]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("waiting", [5, 20])
def test_those_who_wait_for_one_budget_do_not_hide_those_of_others(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(decide, "MAX_LOOKED_AT", 10)
    pair = Pair(functions=("step:a",))
    pair.policy(budget("full", "acme/full", 0))
    pair.policy(budget("small", "acme/small", 0))
    for number in range(waiting):
        pair.start(f"f{number}", chain("a"), account="acme/full")
    pair.start("s", chain("a"), account="acme/small")
    pair.policy(budget("small", "acme/small", 10, "2"))
    assert entered(pair) == ["s"]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("waiting", [5, 20])
def test_those_about_whom_one_budget_asks_do_not_hide_those_of_others(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    monkeypatch.setattr(decide, "MAX_LOOKED_AT", 10)
    pair = Pair(functions=("step:a",))
    pair.policy(budget("full", "acme/full", 0, on_exceed="ask"))
    pair.policy(budget("small", "acme/small", 0, on_exceed="ask"))
    for number in range(waiting):
        pair.start(f"f{number}", chain("a"), account="acme/full")
    pair.start("s", chain("a"), account="acme/small")
    pair.policy(budget("small", "acme/small", 10, "2", on_exceed="ask"))
    assert entered(pair) == ["s"]


@pytest.mark.feature("P2")
def test_lines_whose_attempts_all_differ_are_looked_at_in_turns_that_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt makes a line of its own, and more of them than one decision looks at come before the one with room."""
    monkeypatch.setattr(decide, "MAX_LOOKED_AT", 7)
    pair = Pair(functions=("step:a",))
    pair.policy(budget("full", "acme/full", 0))
    pair.policy(budget("small", "acme/small", 0))
    for number in range(40):
        pair.start(f"f{number}", chain("a"), account="acme/full", tags={"n": str(number)})
    pair.start("s", chain("a"), account="acme/small")
    pair.policy(budget("small", "acme/small", 1, "2"))
    for _ in range(40 // 7 + 1):
        pair.settle_down()
    assert entered(pair) == ["s"]


@pytest.mark.feature("P2")
def test_the_line_that_was_served_goes_behind_the_others() -> None:
    pair = Pair(functions=("step:a",))
    pair.policy(budget("one", "acme", 1))
    pair.start("first", chain("a"), account="acme/a")
    for number in range(3):
        for account in ("acme/a", "acme/b", "acme/c"):
            pair.start(f"{account[-1]}{number}", chain("a"), account=account)
    order = []
    for number in range(2, 8):
        pair.policy(budget("one", "acme", number, str(number)))
        order.append(pair.tasks[-1].run_id)
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1"]


@pytest.mark.feature("P2")
def test_an_account_whose_attempts_all_differ_keeps_no_other_waiting() -> None:
    """Tags of their own make lines of their own: not lines take turns, but accounts."""
    pair = Pair(functions=("step:a",))
    pair.policy(budget("one", "acme", 1))
    pair.start("first", chain("a"), account="acme/hot")
    for number in range(40):
        pair.start(f"hot{number}", chain("a"), account="acme/hot", tags={"order": str(number)})
    for number in range(2):
        pair.start(f"cold{number}", chain("a"), account="acme/cold")
    order = []
    for number in range(2, 8):
        pair.policy(budget("one", "acme", number, str(number)))
        order.append(pair.tasks[-1].run_id)
    assert order == ["hot0", "cold0", "hot1", "cold1", "hot2", "hot3"]


@pytest.mark.feature("P2")
def test_one_that_lacks_something_else_by_now_makes_way() -> None:
    """The first of a line that has room again is counted by another budget that is full; behind it is one that is not."""
    pair = Pair(functions=("step:a",))
    pair.policy(budget("all", "acme", 0))
    pair.policy(budget("each", "acme", 1, window="run"))
    pair.start("r", chain("a"))
    pair.start("s", chain("a"))
    pair.ledger.lacking.wake(pair.now_ms)
    each = {"kind": "topup", "topup": "t", "budget": "each", "account": "acme", "run": "r", "at_ms": pair.now_ms}
    pair.policy(budget("each", "acme", 0, "2", window="run"))
    pair.policy(budget("all", "acme", 9, "2"))
    assert entered(pair) == []
    pair.policy(each | {"run": "s", "topup": "u", "add": {"calls": 1}})
    assert entered(pair) == ["s"]
    pair.policy(each | {"add": {"calls": 1}})
    assert entered(pair) == ["s", "r"]


@pytest.mark.feature("P2")
def test_a_window_that_nobody_has_used_yet_ends_too() -> None:
    """At midnight there is no room in the new day's bucket either, which is not in the ledger; the day after there is."""
    pair = Pair(functions=("step:a",))
    pair.policy(budget("daily", "acme", 0, window="day"))
    pair.start("r", chain("a"))
    pair.pass_time_with_heartbeats(DAY_MS)
    assert entered(pair) == []
    bucket = next(iter(pair.ledger.lacking._until_ms.items()))
    assert bucket == (Scope("daily|acme", False), pair.now_ms // DAY_MS * DAY_MS + DAY_MS)


@pytest.mark.feature("P2")
def test_an_average_that_falls_lets_those_go_on_who_are_expected_to_use_less() -> None:
    pair = Pair(functions=("step:a",))
    pair.policy({**budget("money", "acme/a", 100), "limits": {"money_micros": 100}})
    pair.policy(budget("other", "acme", 100))
    pair.start("dear", chain("a"), account="acme/b")
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=150)
    pair.start("waits", chain("a"), account="acme/a")
    assert entered(pair) == []
    pair.start("cheap", chain("a"), account="acme/b")
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=10)
    assert entered(pair) == ["waits"]


def test_what_an_attempt_is_expected_to_use_depends_on_what_makes_attempts_alike_only() -> None:
    call = Call(
        kind="tool",
        function="f",
        queue="q",
        arguments="{}",
        timeout_ms=1000,
        reserve_micros=0,
        idempotent=True,
        provider="openai",
        model="gpt-4o",
        max_input_tokens=5,
        max_output_tokens=7,
    )
    now = estimate(call, None, 1_700_000_000_000)
    assert now.amounts[0] > 0
    other: dict[type, Any] = {str: "other", int: 99, bool: False, tuple: ("x",)}
    for field in set(call.__struct_fields__) - set(Alike._fields):
        value = getattr(call, field)
        changed = msgspec.structs.replace(call, **{field: other.get(type(value), value)})
        assert estimate(changed, None, 1_700_000_000_000) == now, field


@pytest.mark.feature("P2")
@pytest.mark.parametrize("seed", range(10))
def test_whoever_has_room_goes_on_whatever_happens_to_budgets(seed: int) -> None:
    """Held against trying everybody: when all is quiet, nobody who waits could be given what it needs."""
    dice = random.Random(seed)
    pair = Pair(functions=("step:a", "step:b"))
    names = ("org", "team", "each", "flow")
    shapes: dict[str, dict[str, Any]] = {
        "org": {"account": "acme", "window": "total"},
        "team": {"account": "acme/*", "window": "day"},
        "each": {"account": "acme", "window": "run"},
        "flow": {"account": "*", "window": "hour", "tags": {"t": "1"}},
    }
    version = 0
    started = 0
    for _ in range(120):
        chosen = dice.random()
        if chosen < 0.35:
            started += 1
            account = f"acme/{dice.choice('xyz')}"
            graph = chain(dice.choice("ab"), a=step(reserve_micros=dice.choice((0, 5, 50))), b=step())
            pair.start(f"r{started}", graph, account=account, tags={"t": str(dice.randrange(2))})
        elif chosen < 0.6 and pair.tasks:
            pair.answer(pair.tasks.popleft(), value=1, actual_micros=dice.randrange(60))
        elif chosen < 0.85:
            version += 1
            name = dice.choice(names)
            on_exceed = dice.choice(("pause", "pause", "pause", "ask"))
            limits = {"calls": dice.randrange(0, 30), "money_micros": dice.randrange(0, 600)}
            document = budget(name, "acme", 0, str(version), on_exceed=on_exceed)
            pair.policy({**document, **shapes[name], "limits": limits})
        elif chosen < 0.9 and version:
            pair.forget(f"budget:{dice.choice(names)}")
        else:
            pair.pass_time_with_heartbeats(dice.choice((1000, 3_600_000, DAY_MS)))
        assert _could_go_on(pair) == []
    assert started > 20
    kinds = {type(event) for event in pair.ledger_events}
    assert kinds >= {ev.AttemptPaused, ev.BudgetSet}
    assert any(event.buckets for event in pair.ledger_events if isinstance(event, ev.AttemptSettled))


def _could_go_on(pair: Pair) -> list[AttemptKey]:
    gate: Any = pair.gate
    desk = decide.Desk(pair.ledger, gate.documents.limits, pair.now_ms)
    turn = decide.Turn(
        pair.ledger, gate.documents.policies, gate.documents.budgets, pair.executors.free_slots({}), desk
    )
    return [
        key
        for key, attempt in pair.ledger.attempts.items()
        if (attempt.status == "paused" or (attempt.status == "held" and attempt.exceeds))
        and decide._lacks_now(turn, key, attempt, Scope("", is_asked=True)) is None
    ]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("on_exceed", ["pause", "ask"])
def test_a_window_that_turns_while_what_filled_it_goes_on_lets_the_next_one_in(on_exceed: str) -> None:
    pair = Pair(functions=("step:a",))
    pair.policy(budget("hourly", "acme", 1, window="hour", on_exceed=on_exceed))
    pair.policy(budget("never", "zed", 0))
    pair.start("z", chain("a"), account="zed")  # waits for something else all the time
    for first, second in (("a", "b"), ("c", "d")):  # the first two are looked at in any case, after the document
        pair.start(first, chain("a"))
        pair.start(second, chain("a"))
        assert entered(pair) == [first]
        pair.pass_time_with_heartbeats(HOUR_MS)
        assert entered(pair) == [first, second]
        while pair.tasks:
            pair.answer(pair.tasks.popleft(), value=1)
        pair.pass_time_with_heartbeats(HOUR_MS)


@pytest.mark.feature("P2")
def test_a_budget_that_moves_all_the_time_and_in_which_all_differ_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decide, "MAX_LOOKED_AT", 10)
    pair = Pair(functions=("step:a",), slots=10)
    pair.policy({**budget("hot", "acme", 0), "limits": {"money_micros": 1_000}})
    pair.policy(budget("small", "zed", 0))
    for number in range(25):
        pair.start(f"f{number}", chain("a", a=step(reserve_micros=5_000)), tags={"ticket": str(number)})
    pair.start("s", chain("a"), account="zed")
    pair.policy(budget("small", "zed", 1, "2"))
    for number in range(10):
        pair.start(f"c{number}", chain("a", a=step(reserve_micros=1)))
        if "s" in entered(pair):
            return
        pair.answer(pair.tasks.popleft(), value=1, actual_micros=1)
    raise AssertionError("s has room, and was never looked at")


def test_lines_forget_whoever_leaves() -> None:
    lacking = Lacking()
    run = RunMoney("acme", None, "w@1", {})
    call = Call(kind="step", function="a", queue="q", arguments="", timeout_ms=1, reserve_micros=0, idempotent=True)
    keys = [AttemptKey("r", "s", number) for number in range(3)]
    for key in keys:
        lacking.add(key, Shortage("b|acme|100", 100), 9 - key.attempt, run, call, is_asked=False)
    assert lacking.wake(0)
    ((spot, members),) = lacking.to_look_at()
    assert list(members) == keys[::-1]
    lacking.looked(Look([], None, [], [(keys[0], Shortage("c|acme|100", 200))]))
    lacking.looked(Look([], None, [(spot, Shortage("b|acme|100", 100))], []))
    assert not lacking.wake(99)
    assert lacking.wake(100)
    assert [spot.scope.lacks for spot, _ in lacking.to_look_at()] == ["b|acme"]
    for key in keys:
        lacking.discard(key)
    assert not lacking.wake(1_000)
    assert not lacking
    assert lacking == Lacking()
    for name in ("_lines", "_members", "_of_function", "_stirred", "_until_ms"):
        assert not getattr(lacking, name), name


@pytest.mark.parametrize("broken", ["resumption", "losses", "lapses"])
def test_what_cannot_be_decided_keeps_nothing_else_from_being_decided(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    pair = Pair(functions=("step:a",), slots=1)
    pair.policy(budget("full", "acme/full", 0))
    pair.start("waits", chain("a"), account="acme/full")
    pair.start("first", chain("a"))
    pair.start("second", chain("a"))
    tries: list[int] = []

    def failing(*arguments: Any) -> list[Any]:
        tries.append(pair.now_ms)
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(decide, broken, failing)
        pair.policy(budget("full", "acme/full", 1, "2"))
        pair.answer(pair.tasks.popleft(), value=1)
        pair.policy(budget("other", "acme/other", 1))
        assert entered(pair)[0] == "second"
        assert len(tries) == 1, "it is tried again at once"
    pair.pass_time_with_heartbeats(LOOK_AGAIN_MS)
    pair.answer(pair.tasks.popleft(), value=1)
    assert entered(pair) == ["waits"]
