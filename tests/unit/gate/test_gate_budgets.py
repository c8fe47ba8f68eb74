"""Budgets: what is set aside, spent and given back, where, and what happens when there is no room."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import msgspec
import pytest

from support.pure import Pair, chain, step
from tidegate.domain import canonical
from tidegate.domain import ledger_events as ev
from tidegate.domain import run_events as run_ev
from tidegate.domain.identity import MAX_MICROS
from tidegate.gate.budgets import Budget, Budgets
from tidegate.gate.fold import apply, derive
from tidegate.gate.kinds import parse
from tidegate.gate.ledger import Ledger
from tidegate.gate.measure import budgets_left
from tidegate.gate.snapshots import dump, load
from tidegate.gate.state import MANY_OPEN, MAX_SET_ASIDE
from tidegate.scheduler import decide as scheduler_decide
from tidegate.scheduler.snapshots import dump as dump_run
from tidegate.scheduler.snapshots import load as load_run

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
FUNCTIONS = ("step:a", "step:b", "step:c")


def budget(name: str = "daily", **fields: Any) -> dict[str, Any]:
    return {"kind": "budget", "budget": name, "version": "1", "window": "day"} | fields


def top_up(name: str, of: str, account: str, at_ms: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "topup", "topup": name, "budget": of, "account": account, "at_ms": at_ms, "add": fields}


def events(pair: Pair, kind: type) -> list[Any]:
    return [event for event in pair.ledger_events if isinstance(event, kind)]


def one(**settings: Any) -> dict[str, Any]:
    return chain("a", a=step(**settings))


def pair_with(*documents: dict[str, Any], **more: Any) -> Pair:
    pair = Pair(**({"functions": FUNCTIONS} | more))
    pair.now_ms = 20_000 * DAY_MS
    later(pair, 0)
    for document in documents:
        pair.policy(document)
    return pair


def later(pair: Pair, ms: int) -> None:
    """Let time pass, of which the executor is heard all the while."""
    pair.now_ms += ms
    pair.register("worker-0", 1, pair.executors.by_id["worker-0"].slots, FUNCTIONS)


def spent(pair: Pair, account: str, name: str = "daily") -> tuple[int, ...]:
    return next(b.spent for b in pair.ledger.buckets.values() if (b.account, b.budget) == (account, name))


# --- which budgets count ------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
@pytest.mark.parametrize(
    ("pattern", "account", "counted_as"),
    [
        ("*", "acme/support/eu", "acme"),
        ("*/*", "acme/support/eu", "acme/support"),
        ("*/*", "acme", None),
        ("acme", "acme", "acme"),
        ("acme", "acme2", None),
        ("acme/*", "acme/support/eu", "acme/support"),
        ("acme/support", "acme/support/eu", "acme/support"),
        ("acme/support", "acme/sales", None),
    ],
)
def test_a_pattern_tells_accounts_apart_or_counts_them_together(pattern: str, account: str, counted_as: str) -> None:
    document = parse(budget(account=pattern))
    assert isinstance(document, Budget)
    scopes = Budgets([document]).scopes(account, "w", {})
    assert [scope.account for scope in scopes] == ([counted_as] if counted_as else [])


@pytest.mark.feature("P2")
def test_budgets_may_be_of_a_workflow_or_a_tag() -> None:
    documents = [
        budget("w", workflow="refunds"),
        budget("t", tags={"env": "prod"}),
        budget("both", workflow="x", tags={"a": "b"}),
    ]
    budgets = Budgets([d for d in map(parse, documents) if isinstance(d, Budget)])
    assert [s.budget.budget for s in budgets.scopes("acme", "refunds", {"env": "prod", "a": "b"})] == ["t", "w"]
    assert [s.budget.budget for s in budgets.scopes("acme", "x", {"a": "b"})] == ["both"]


# --- reserve, settle, release ---------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
def test_every_level_of_the_tree_counts_the_same_attempt() -> None:
    pair = pair_with(
        budget("org", account="acme", limits={"money_micros": 100}),
        budget("team", account="acme/*", limits={"money_micros": 60}),
    )
    for team in ("support", "sales"):
        pair.start(f"r-{team}", one(reserve_micros=50), account=f"acme/{team}/app")
    assert [(b.account, b.reserved[0]) for b in pair.ledger.buckets.values()] == [
        ("acme", 100),
        ("acme/support", 50),
        ("acme/sales", 50),
    ]
    pair.start("r-third", one(reserve_micros=1), account="acme/legal")
    assert pair.run("r-third").status == "failed"
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=20)
    pair.answer(pair.tasks.popleft(), "failed", retryable=False, actual_micros=3)
    assert spent(pair, "acme", "org") == (23, 0, 0, 2, 0)
    assert spent(pair, "acme/support", "team")[0] == 20
    assert all(b.reserved == (0,) * 5 and not b.open for b in pair.ledger.buckets.values())


@pytest.mark.feature("P2")
def test_several_budgets_are_taken_all_or_none() -> None:
    pair = pair_with(
        budget("a-money", limits={"money_micros": 1000}),
        budget("b-calls", limits={"calls": 1}),
    )
    pair.start("first", one(reserve_micros=10))
    pair.start("second", one(reserve_micros=10))
    refused = events(pair, ev.AttemptRefused)
    assert [(event.run_id, event.rule, event.policy) for event in refused] == [
        ("second", "budget:b-calls", "b-calls@1")
    ]
    assert json.loads(refused[0].values) == {
        "bucket": next(key for key in pair.ledger.buckets if key.startswith("b-calls")),
        "meter": "calls",
        "needed": 1,
        "limit": 1,
        "spent": 0,
        "reserved": 1,
    }
    assert next(b for b in pair.ledger.buckets.values() if b.budget == "a-money").reserved[0] == 10


@pytest.mark.feature("P2")
def test_tokens_calls_and_time_are_settled_as_they_were_used() -> None:
    pair = pair_with(budget(limits={"output_tokens": 1000, "wall_seconds": 100}))
    pair.start("r", one(max_input_tokens=300, max_output_tokens=200, timeout_ms=20_000))
    bucket = next(iter(pair.ledger.buckets.values()))
    assert bucket.reserved == (0, 300, 200, 1, 20_000)
    usage = {"input_tokens": 120, "output_tokens": 30}
    pair.answer(pair.tasks.popleft(), value=1, usage=usage, started_ms=1_000, finished_ms=3_500)
    bucket = next(iter(pair.ledger.buckets.values()))
    assert (bucket.reserved, bucket.spent) == ((0,) * 5, (0, 120, 30, 1, 2_500))


@pytest.mark.feature("P2")
def test_the_price_table_says_what_is_set_aside_and_what_reported_tokens_cost() -> None:
    pair = pair_with(budget(limits={"money_micros": 10_000_000}))
    pair.start("r", one(provider="openai", model="gpt-4o", max_input_tokens=1000, max_output_tokens=100))
    reserved = events(pair, ev.Reserving)[0]
    assert reserved.reserved_micros == 3500
    assert reserved.basis.startswith("price:openai:gpt-4o@")
    pair.answer(pair.tasks.popleft(), value=1, usage={"input_tokens": 100, "output_tokens": 10})
    settled = events(pair, ev.AttemptSettled)[0]
    assert (settled.actual_micros, settled.basis) == (350, reserved.basis)
    assert spent(pair, "acme")[0] == 350
    assert [event.actual_micros for _, event in pair.events if isinstance(event, run_ev.StepSucceeded)] == [350]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("reported", [0, 7])
def test_both_logs_say_the_same_of_tokens_whatever_became_of_the_attempt(reported: int) -> None:
    """What functions report as an amount counts; else the tokens of a known model, also of attempts that failed."""
    pair = pair_with()
    pair.start("r", one(provider="openai", model="gpt-4o"))
    task = pair.tasks.popleft()
    pair.answer(task, outcome="failed", usage={"input_tokens": 100}, actual_micros=reported)
    costs = reported or 250
    settled = events(pair, ev.AttemptSettled)[0]
    assert (settled.actual_micros, settled.basis.partition("@")[0]) == (
        costs,
        "" if reported else "price:openai:gpt-4o",
    )
    assert [event.actual_micros for _, event in pair.events if isinstance(event, run_ev.AttemptEnded)] == [costs]


@pytest.mark.feature("P2")
@pytest.mark.parametrize("was_written_down", [False, True])
def test_tokens_of_a_late_result_cost_the_same_whether_or_not_its_run_has_left_the_memory(
    was_written_down: bool,
) -> None:
    pair = pair_with()
    pair.start("r", one(provider="openai", model="gpt-4o"))
    task = pair.tasks.popleft()
    pair.command("r", "cancel")
    assert pair.run("r").is_over
    if was_written_down:
        pair.runs.runs["r"] = load_run(dump_run(pair.run("r")), pair.runs.definitions)
    pair.answer(task, value=1, usage={"input_tokens": 100, "output_tokens": 10})
    assert [event.actual_micros for _, event in pair.events if isinstance(event, run_ev.ResultIgnored)] == [350]
    assert events(pair, ev.AttemptSettled)[-1].actual_micros == 350


@pytest.mark.feature("P2")
def test_tokens_of_an_unknown_model_or_of_none_cost_nothing() -> None:
    pair = pair_with()
    for number, model in enumerate(("no-such-model", "")):
        pair.start(f"r{number}", one(provider="openai", model=model))
        pair.answer(pair.tasks.popleft(), value=1, usage={"input_tokens": 100, "output_tokens": 10})
    assert [(event.actual_micros, event.basis) for event in events(pair, ev.AttemptSettled)] == [(0, "")] * 2
    assert [event.actual_micros for _, event in pair.events if isinstance(event, run_ev.StepSucceeded)] == [0, 0]


@pytest.mark.feature("P2")
def test_the_gate_prices_what_a_scheduler_of_before_settles_without_an_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_decide, "_priced", lambda step, result, now_ms: result)
    pair = pair_with()
    pair.start("r", one(provider="openai", model="gpt-4o"))
    pair.answer(pair.tasks.popleft(), value=1, usage={"input_tokens": 100, "output_tokens": 10})
    settled = events(pair, ev.AttemptSettled)[0]
    assert (settled.actual_micros, settled.basis.partition("@")[0]) == (350, "price:openai:gpt-4o")


@pytest.mark.feature("P2")
def test_without_a_declaration_the_average_so_far_is_set_aside() -> None:
    pair = pair_with(budget(limits={"money_micros": 1000}))
    for number, cost in enumerate((100, 300)):
        pair.start(f"r{number}", one())
        pair.answer(pair.tasks.popleft(), value=1, actual_micros=cost)
    pair.start("r2", one())
    last = events(pair, ev.Reserving)[-1]
    assert (last.reserved_micros, last.basis) == (200, "history")


@pytest.mark.feature("P2")
def test_an_overshoot_is_spent_and_closes_the_budget() -> None:
    pair = pair_with(budget(limits={"money_micros": 100}))
    pair.start("r", one(reserve_micros=60))
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=130)
    assert spent(pair, "acme")[0] == 130
    assert events(pair, ev.AttemptSettled)[0].overshoot_micros == 70
    pair.start("free", one())
    assert pair.run("free").status == "failed"


@pytest.mark.feature("P2")
def test_lost_cancelled_and_late_attempts_leave_nothing_set_aside() -> None:
    pair = pair_with(budget(limits={"money_micros": 1000}), slots=1)
    pair.start("running", one(reserve_micros=10))
    pair.start("queued", one(reserve_micros=10))
    pair.command("queued", "cancel")
    running = pair.tasks.popleft()
    pair.command("running", "cancel")
    assert next(iter(pair.ledger.buckets.values())).reserved[0] == 10  # it runs until its executor says otherwise
    pair.register("worker-0", 1, 1, ("step:a",), state="gone")
    bucket = next(iter(pair.ledger.buckets.values()))
    assert (bucket.reserved, bucket.open, bucket.spent) == ((0,) * 5, 0, (0,) * 5)
    pair.answer(running, value=1, actual_micros=7)  # it had gone on, after all
    assert events(pair, ev.AttemptSettled)[-1].actual_micros == 7


@pytest.mark.feature("P2")
def test_what_a_lost_attempt_cost_counts_as_long_as_its_run_is_open() -> None:
    pair = pair_with(budget(limits={"money_micros": 1000}))
    pair.start("r", one(reserve_micros=10))
    first = pair.tasks.popleft()
    pair.register("worker-1", 2, 5, ("step:a",))
    pair.register("worker-0", 1, 1, ("step:a",), state="gone")
    pair.answer(first, value=1, actual_micros=7)
    bucket = next(iter(pair.ledger.buckets.values()))
    assert (bucket.spent[0], bucket.reserved[0], bucket.open) == (7, 10, 1)


# --- windows --------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
def test_a_window_turns_and_the_old_one_ends_with_what_was_set_aside_in_it() -> None:
    pair = pair_with(budget(limits={"calls": 1}))
    pair.start("today", one())
    pair.start("no-room", one())
    assert pair.run("no-room").status == "failed"
    later(pair, DAY_MS)
    assert len(pair.ledger.buckets) == 1  # something is set aside in it
    pair.start("tomorrow", one())
    assert [b.open for b in pair.ledger.buckets.values()] == [1, 1]
    pair.answer(pair.tasks.popleft(), value=1)
    assert [b.spent[3] for b in pair.ledger.buckets.values()] == [0]
    assert [event.spent.calls for event in events(pair, ev.BudgetClosed)] == [1]
    pair.answer(pair.tasks.popleft(), value=1)
    later(pair, DAY_MS)
    assert pair.ledger.buckets == {}
    assert pair.ledger.window_ends == []


@pytest.mark.feature("P2")
def test_a_window_that_becomes_longer_keeps_what_was_spent_since_it_began() -> None:
    """The hour from midnight and the day begin at the same time: they are one bucket, which must not end with the hour."""
    pair = pair_with(budget(window="hour", limits={"calls": 3}))
    later(pair, HOUR_MS // 2)
    for number in range(2):
        pair.start(f"r{number}", one())
    pair.policy(budget(limits={"calls": 3}))  # under the same version, which is a text of its author's
    pair.start("third", one())
    pair.work({"a": lambda _: 1})
    later(pair, HOUR_MS)
    pair.start("fourth", one())
    assert pair.run("fourth").status == "failed"
    assert spent(pair, "acme")[3] == 3
    later(pair, DAY_MS)
    assert (pair.ledger.buckets, pair.ledger.window_ends) == ({}, [])


@pytest.mark.feature("P2")
def test_what_waits_for_a_window_that_became_shorter_goes_on_when_that_turns() -> None:
    pair = pair_with(budget(limits={"calls": 1}, on_exceed="pause"))
    pair.start("first", one())
    pair.work({"a": lambda _: 1})
    pair.start("waits", one())
    pair.policy(budget(window="hour", limits={"calls": 1}, on_exceed="pause", version="2"))
    later(pair, HOUR_MS - 1)
    assert not pair.tasks
    later(pair, 1)
    assert [task.run_id for task in pair.tasks] == ["waits"]


@pytest.mark.feature("P2")
def test_a_window_that_was_over_does_not_end_a_longer_one_that_began_with_it() -> None:
    pair = pair_with(
        budget("a", account="acme/a", limits={"calls": 9}), budget("b", account="acme/b", limits={"calls": 1})
    )
    later(pair, 28 * DAY_MS)  # the first of November
    pair.start("goes-on", one(), account="acme/a")
    pair.start("ends", one(), account="acme/b")
    pair.answer(pair.tasks.pop(), value=1)
    later(pair, DAY_MS)
    assert [bucket.budget for bucket in pair.ledger.buckets.values()] == ["a"]
    pair.policy(budget("b", account="acme/b", limits={"calls": 1}, window="month", version="2"))
    pair.start("of-the-month", one(), account="acme/b")
    pair.answer(pair.tasks.pop(), value=1)
    pair.answer(pair.tasks.pop(), value=1)
    later(pair, DAY_MS)
    assert [bucket.spent[3] for bucket in pair.ledger.buckets.values()] == [1]


@pytest.mark.feature("P2")
def test_more_than_can_be_counted_is_not_set_aside_even_where_nothing_limits_it() -> None:
    """Sums that stop at what a field can hold would give back more than they took: reservations below nothing."""
    pair = pair_with(budget(), slots=MANY_OPEN + 10)
    for number in range(MANY_OPEN + 2):
        pair.start(f"r{number}", one(reserve_micros=MAX_MICROS))
    (bucket,) = pair.ledger.buckets.values()
    assert bucket.reserved[0] == (MANY_OPEN + 1) * MAX_MICROS
    assert pair.run(f"r{MANY_OPEN}").status == "running"
    assert f"of {MAX_SET_ASIDE}, 0 are spent" in pair.run(f"r{MANY_OPEN + 1}").reason
    while pair.tasks:
        pair.answer(pair.tasks.popleft(), value=1)
    assert bucket.reserved == (0, 0, 0, 0, 0)


@pytest.mark.feature("P2")
def test_buckets_that_are_still_needed_do_not_hide_those_whose_window_is_over() -> None:
    pair = pair_with(budget(account="*/*", window="hour", limits={"calls": 9}))
    pair.start("z", one(), account="acme/z")
    pair.answer(pair.tasks.popleft(), value=1)
    for number in range(120):  # more than one entry closes
        pair.start(f"r{number}", one(), account=f"acme/a{number}")
    assert len(pair.ledger.buckets) == 121
    later(pair, 3_600_000)
    assert "acme/z" not in {bucket.account for bucket in pair.ledger.buckets.values()}
    assert len(pair.ledger.buckets) == 120


@pytest.mark.feature("P2")
def test_a_budget_per_run_lives_as_long_as_its_run() -> None:
    pair = pair_with(budget("each", window="run", limits={"calls": 2}))
    pair.start("r", chain("a", "b", "c"))
    pair.start("other", one())
    pair.work(dict.fromkeys("abc", lambda _: 1))
    assert (pair.run("r").status, pair.run("other").status) == ("failed", "succeeded")
    assert pair.ledger.buckets == {}
    assert pair.ledger.of_run == {}


# --- without room ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
def test_pause_holds_the_attempt_until_the_window_turns() -> None:
    pair = pair_with(budget(limits={"calls": 1}, on_exceed="pause"))
    pair.start("first", one())
    pair.work({"a": lambda _: 1})
    pair.start("waits", one())
    assert pair.run("waits").status == "running"
    assert pair.seen("waits")[-1] == "AttemptAwaitsBudget"
    assert "needs 1 calls; of 1, 1 are spent" in pair.run("waits").steps["a"].waits_for
    pair.pass_time(1000)
    assert not pair.tasks
    later(pair, DAY_MS)
    pair.work({"a": lambda _: 1})
    assert pair.run("waits").status == "succeeded"
    assert pair.run("waits").steps["a"].waits_for == ""


@pytest.mark.feature("P2")
def test_pause_ends_when_others_give_back_what_they_did_not_need() -> None:
    pair = pair_with(budget(limits={"money_micros": 100}, on_exceed="pause"))
    pair.start("first", one(reserve_micros=80))
    pair.start("second", one(reserve_micros=80))
    pair.start("third", one(reserve_micros=10))  # fits beside the first
    assert pair.run("third").steps["a"].status == "dispatched"
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=5)
    assert [task.run_id for task in pair.tasks] == ["third", "second"]


@pytest.mark.feature("P2")
def test_a_top_up_lets_paused_attempts_go_on_in_its_window_only() -> None:
    pair = pair_with(budget(limits={"money_micros": 100}, account="*/*", on_exceed="pause"))
    for number in range(3):
        pair.start(f"r{number}", one(reserve_micros=100))
    assert [task.run_id for task in pair.tasks] == ["r0"]
    pair.policy(top_up("t1", "daily", "acme/other", pair.now_ms, money_micros=100))
    pair.policy(top_up("t2", "daily", "acme/support", pair.now_ms - DAY_MS, money_micros=100))
    assert len(pair.tasks) == 1
    pair.policy(top_up("t3", "daily", "acme/support", pair.now_ms, money_micros=100))
    assert [task.run_id for task in pair.tasks] == ["r0", "r1"]
    assert [(e.limits.micros, e.top_ups) for e in events(pair, ev.BudgetSet)] == [(100, ()), (200, ("t3",))]


@pytest.mark.feature("P2")
def test_other_limits_take_effect_at_once() -> None:
    pair = pair_with(budget(limits={"money_micros": 100}, on_exceed="pause"))
    pair.start("a1", one(reserve_micros=100))
    pair.start("a2", one(reserve_micros=100))
    pair.policy(budget(limits={"money_micros": 250}, on_exceed="pause") | {"version": "2"})
    assert [task.run_id for task in pair.tasks] == ["a1", "a2"]
    pair.policy(budget(limits={"money_micros": 50}) | {"version": "3"})
    pair.start("a3", one(reserve_micros=1))
    assert pair.run("a3").status == "failed"
    assert events(pair, ev.AttemptRefused)[0].policy == "daily@3"


@pytest.mark.feature("P2")
@pytest.mark.feature("P4")
def test_ask_lets_one_attempt_exceed_once() -> None:
    pair = pair_with(budget(limits={"money_micros": 100}, on_exceed="ask"))
    pair.start("r", chain("a", "b", a=step(reserve_micros=90), b=step(reserve_micros=50)))
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=90)
    assert pair.run("r").status == "waiting"
    held = events(pair, ev.ApprovalHeld)[0]
    assert (held.rule, held.policy, held.exceeds) == ("budget:daily", "daily@1", tuple(pair.ledger.buckets))
    pair.command("r", "approve", by="ada")
    reserved = events(pair, ev.Reserving)[-1]
    assert (reserved.exceeds, reserved.approved_by) == (held.exceeds, "ada")
    pair.answer(pair.tasks.popleft(), "failed", error_class="E", error_message="m", actual_micros=50)
    pair.pass_time(1000)  # the second attempt is another one: it asks anew
    assert pair.run("r").status == "waiting"
    pair.command("r", "reject", by="bob")
    assert pair.run("r").status == "failed"
    assert spent(pair, "acme")[0] == 140


@pytest.mark.feature("P2")
def test_a_question_of_a_rule_and_one_of_a_budget_are_both_asked_and_neither_twice() -> None:
    pair = pair_with(budget(limits={"calls": 1}, on_exceed="ask"))
    rule = {"name": "r", "when": 'step == "b"', "then": "require_approval"}
    pair.policy({"policy": "p", "version": "1", "rules": [rule]})
    pair.start("r", chain("a", "b"))
    pair.answer(pair.tasks.popleft(), value=1)
    pair.command("r", "approve", by="ada")
    assert [(e.rule, e.approved_by) for e in events(pair, ev.ApprovalHeld)] == [("r", ""), ("budget:daily", "ada")]
    pair.command("r", "approve", by="bob")
    assert [task.step_id for task in pair.tasks] == ["b"]
    assert pair.ledger.runs["r"].approved["b"][1] == "ada"


@pytest.mark.feature("P2")
def test_the_strictest_of_the_budgets_without_room_decides() -> None:
    pair = pair_with(
        budget("a", limits={"calls": 0}, on_exceed="pause"),
        budget("b", limits={"calls": 0}, on_exceed="deny"),
        budget("c", limits={"calls": 0}, on_exceed="ask"),
    )
    pair.start("r", one())
    assert events(pair, ev.AttemptRefused)[0].rule == "budget:b"
    pair.policy(budget("b", limits={"calls": 9}))
    pair.start("s", one())
    held = events(pair, ev.ApprovalHeld)[0]
    assert held.rule == "budget:c"
    pair.command("s", "approve", by="ada")
    assert pair.run("s").steps["a"].status == "dispatched"  # the answer covers every bucket that had no room


@pytest.mark.feature("P2")
def test_alerts_come_once_for_each_threshold_and_window() -> None:
    pair = pair_with(budget(limits={"money_micros": 100, "calls": 10}, alerts=[50, 80]))
    for number in range(4):
        pair.start(f"r{number}", one(reserve_micros=25))
        pair.answer(pair.tasks.popleft(), value=1, actual_micros=25)
    said = [(e.meter, e.percent, e.spent) for e in events(pair, ev.BudgetAlerted)]
    assert said == [("micros", 50, 50), ("micros", 80, 100)]
    later(pair, DAY_MS)
    pair.start("next", one(reserve_micros=60))
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=60)
    assert len(events(pair, ev.BudgetAlerted)) == 3


@pytest.mark.feature("P2")
def test_runs_that_no_budget_counts_leave_no_trace_of_budgets() -> None:
    pair = pair_with(budget(account="other", limits={"calls": 0}))
    pair.start("r", one(reserve_micros=5))
    pair.work({"a": lambda _: 1})
    assert pair.run("r").status == "succeeded"
    kinds = {type(event).__name__ for event in pair.ledger_events}
    assert kinds == {"RunOpened", "AttemptGranted", "AttemptSettled", "RunClosed"}


def test_a_cancelled_run_leaves_no_paused_attempt() -> None:
    pair = pair_with(budget(limits={"calls": 0}, on_exceed="pause"))
    pair.start("r", one())
    pair.command("r", "cancel")
    assert (pair.run("r").status, bool(pair.ledger.lacking), pair.ledger.attempts) == ("cancelled", False, {})


def test_a_document_that_cannot_be_read_keeps_the_one_of_before_or_denies() -> None:
    pair = pair_with(budget(limits={"calls": 0}))
    broken = budget(limits={"calls": 9}, window="fortnight")
    pair.policy(broken)
    pair.start("r", one())
    assert events(pair, ev.AttemptRefused)[0].rule == "budget:daily"
    fresh = pair_with(broken)
    fresh.start("r", one())
    refused = events(fresh, ev.AttemptRefused)[0]
    assert "budget:daily" in refused.reason


# --- state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
def test_the_ledger_comes_back_from_its_units() -> None:
    pair = pair_with(
        budget("org", limits={"money_micros": 100}, on_exceed="pause", alerts=[10]),
        budget("each", window="run", limits={"calls": 5}),
    )
    for number in range(4):
        pair.start(f"r{number}", one(reserve_micros=40))
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=30)
    other = Ledger(0)
    for unit in (*pair.ledger.runs, *pair.ledger.buckets, *pair.ledger.learned):
        load(other, unit, dump(pair.ledger, unit))
    derive(other)
    for name in ("runs", "buckets", "learned", "attempts", "lacking", "of_run", "held_by"):
        assert getattr(other, name) == getattr(pair.ledger, name), name
    assert sorted(other.window_ends) == sorted(set(pair.ledger.window_ends))


def test_every_event_changes_the_unit_that_it_names_and_no_other() -> None:
    """Snapshots of units are taken at different times, so an event must not reach into another unit."""
    pair = pair_with(budget("org", limits={"money_micros": 100}, on_exceed="pause", alerts=[10]), slots=1)
    ledger = Ledger(0)
    recorded: list[Any] = []
    pair.start("r0", one(reserve_micros=40))
    pair.start("r1", one())
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=30)
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=30)
    recorded += pair.ledger_events
    for number, event in enumerate(recorded, 1):
        units = {*ledger.runs, *ledger.buckets, *ledger.learned}
        before = {unit: dump(ledger, unit) for unit in units}
        apply(ledger, event, number)
        own = pair.gate.units_of("ledger-0", event)
        after = {unit: dump(ledger, unit) for unit in {*ledger.runs, *ledger.buckets, *ledger.learned}}
        changed = {unit for unit in before.keys() | after.keys() if before.get(unit) != after.get(unit)}
        assert changed <= set(own), (event, changed)
    kinds = {ev.BudgetSet, ev.AttemptGranted, ev.AttemptReserved, ev.AttemptPlaced, ev.AttemptSettled, ev.UsageLearned}
    assert {type(event) for event in recorded} >= kinds


def test_what_is_asked_for_is_in_the_events_as_canonical_json() -> None:
    pair = pair_with(budget(limits={"calls": 0}))
    pair.start("r", one())
    values = events(pair, ev.AttemptRefused)[0].values
    assert canonical.dumps(json.loads(values)) == values


# --- questions that need no answer any more -------------------------------------------------------------------------------

ROOM: Any = {
    "a top-up": lambda pair: pair.policy(top_up("t1", "daily", "acme", pair.now_ms, money_micros=40)),
    "another limit": lambda pair: pair.policy(budget(limits={"money_micros": 140}, on_exceed="ask", version="2")),
    "another effect, and room": lambda pair: pair.policy(budget(limits={"money_micros": 140}, version="2")),
    "of another workflow": lambda pair: pair.policy(
        budget(limits={"money_micros": 1}, on_exceed="ask", version="2", workflow="other")
    ),
    "of other tags": lambda pair: pair.policy(
        budget(limits={"money_micros": 1}, on_exceed="ask", version="2", tags={"a": "b"})
    ),
    "of another account": lambda pair: pair.policy(budget(account="beta", on_exceed="ask", version="2")),
    "counts by another path": lambda pair: pair.policy(
        budget(account="*/*", limits={"money_micros": 50}, on_exceed="ask", version="2")
    ),
    "removed": lambda pair: pair.forget("budget:daily"),
}
ANSWERED_BY = {"a top-up": "topup:t1", "removed": "budget:daily"}


def asking(**more: Any) -> Pair:
    """Return a system in which the second step of a run asks for 50 where 10 are left."""
    pair = pair_with(budget(limits={"money_micros": 100}, on_exceed="ask", **more))
    pair.start("r", chain("a", "b", a=step(reserve_micros=90), b=step(reserve_micros=50)))
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=90)
    assert pair.run("r").status == "waiting"
    return pair


@pytest.mark.feature("P2")
@pytest.mark.feature("P4")
@pytest.mark.parametrize("why", ROOM)
def test_a_question_for_which_there_is_room_now_is_answered_by_the_document_that_made_it(why: str) -> None:
    pair = asking(expires_s=60)
    ROOM[why](pair)
    answered = events(pair, ev.QuestionAnswered)
    assert [(event.step_id, event.by) for event in answered] == [("b", ANSWERED_BY.get(why, "budget:daily@2"))]
    assert pair.run("r").status == "running"
    resolved = next(event for _, event in pair.events if type(event).__name__ == "ApprovalResolved")
    assert (resolved.approved, resolved.by, resolved.command_id) == (True, answered[0].by, "")
    assert not any(event.exceeds for event in events(pair, ev.Reserving))
    assert events(pair, ev.Reserving)[-1].approved_by == ""
    later(pair, 120_000)
    assert events(pair, ev.ApprovalLapsed) == []
    pair.answer(pair.tasks.popleft(), value=1)
    assert pair.run("r").status == "succeeded"


@pytest.mark.feature("P2")
@pytest.mark.feature("D2")
@pytest.mark.parametrize("outcome", ["succeeded", "failed"])
def test_a_result_may_overtake_the_answer_that_let_its_attempt_run(outcome: str) -> None:
    """Answers of the gate and results lie in different topics: a scheduler that was away may read the results first."""
    pair = asking()
    pair.unheard = deque()
    ROOM["a top-up"](pair)
    pair.answer(pair.tasks.popleft(), outcome, value=1, actual_micros=7)
    resolved = next(event for _, event in pair.events if isinstance(event, run_ev.ApprovalResolved))
    assert (resolved.approved, resolved.by, resolved.command_id) == (True, "budget:daily", "")
    assert pair.money() == (0, 97), "it ran: what it cost is spent"
    seen = pair.seen("r")
    pair.hear()
    assert pair.seen("r") == seen, "the answer says nothing new"
    later(pair, 1_000)
    if outcome == "succeeded":
        assert pair.run("r").status == "succeeded"
    else:
        asked = pair.run("r").steps["b"].approval
        assert asked is not None
        assert asked.attempt == 2, "the second attempt asks anew: 43 are left"


@pytest.mark.feature("P4")
def test_a_result_of_an_attempt_that_a_rule_holds_is_nobodys() -> None:
    """Only a human's answer lets it run, and that one is in the run's log first."""
    pair = pair_with()
    pair.start("before", chain("a"))
    ran = pair.tasks.popleft()
    rule = {"name": "r", "when": 'step == "a"', "then": "require_approval"}
    pair.policy({"policy": "p", "version": "1", "rules": [rule]})
    pair.start("r", chain("a"))
    asked = pair.seen("r")
    pair.answer(msgspec.structs.replace(ran, run_id="r"), value=1)
    assert pair.seen("r") == asked
    pair.command("r", "approve", by="ada")
    pair.answer(pair.tasks.popleft(), value=2)
    assert pair.run("r").output == "2"


@pytest.mark.feature("P2")
@pytest.mark.feature("P4")
@pytest.mark.parametrize(
    "document",
    [
        top_up("t1", "daily", "acme", 20_000 * DAY_MS, money_micros=39),
        top_up("t1", "daily", "beta", 20_000 * DAY_MS, money_micros=1000),
        budget(limits={"money_micros": 139}, on_exceed="ask", version="2"),
        budget(limits={"money_micros": 100}, on_exceed="deny", version="2"),
        budget("other", limits={"money_micros": 10_000}),
    ],
)
def test_a_question_for_which_there_is_no_room_stays_open(document: dict[str, Any]) -> None:
    pair = asking()
    pair.policy(document)
    assert events(pair, ev.QuestionAnswered) == []
    assert pair.run("r").status == "waiting"
    pair.command("r", "approve", by="ada")
    assert events(pair, ev.Reserving)[-1].approved_by == "ada"


@pytest.mark.feature("P4")
def test_a_rule_that_came_into_force_meanwhile_is_not_answered_by_a_top_up() -> None:
    pair = asking()
    rule = {"name": "r", "when": 'step == "b"', "then": "require_approval"}
    pair.policy({"policy": "p", "version": "1", "rules": [rule]})
    ROOM["a top-up"](pair)
    assert pair.run("r").status == "waiting"
    pair.command("r", "approve", by="ada")  # the budget's question; now the rule asks its own
    assert pair.run("r").status == "waiting"
    pair.command("r", "approve", by="bob")
    assert pair.tasks[0].step_id == "b"


@pytest.mark.feature("P4")
def test_an_answer_and_a_top_up_at_once_let_it_run_once() -> None:
    for first in ("human", "document"):
        pair = asking()
        if first == "human":
            pair.command("r", "approve", by="ada")
            ROOM["a top-up"](pair)
        else:
            ROOM["a top-up"](pair)
            pair.command("r", "approve", by="ada")
            assert [letter.code for letter in pair.letters] == ["no_such_approval"]
        assert [task.step_id for task in pair.tasks] == ["b"], first


# --- how much is left -----------------------------------------------------------------------------------------------------


@pytest.mark.feature("O5")
def test_the_metric_says_what_is_left_where_least_is() -> None:
    pair = pair_with(
        budget(limits={"money_micros": 1000, "calls": 4}),
        budget("free"),
        budget("each", window="run", limits={"calls": 1}),
    )
    assert budgets_left([pair.ledger], pair.now_ms) == {}
    pair.start("r0", one(reserve_micros=300), account="acme")
    assert budgets_left([pair.ledger], pair.now_ms) == {"daily": 0.7}  # what is set aside is not left
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=1250)
    assert budgets_left([pair.ledger], pair.now_ms) == {"daily": -0.25}
    pair.start("r1", one(reserve_micros=1), account="wayne")
    assert {bucket.account for bucket in pair.ledger.buckets.values()} == {"acme", "wayne"}
    assert budgets_left([pair.ledger], pair.now_ms) == {"daily": -0.25}  # of both accounts the smaller
    later(pair, DAY_MS)
    assert budgets_left([pair.ledger], pair.now_ms) == {}  # another day, in which nobody has asked yet
