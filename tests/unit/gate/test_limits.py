"""Limits in one ledger partition: how many at once, how fast, in which order, breakers, full queues."""

from typing import Any

import pytest

from support.limits import apply, limit, one, pair
from support.pure import Pair, chain, step
from tidegate.domain.messages import Control
from tidegate.gate.kinds import DocumentError, parse


def later(p: Pair, ms: int, slots: int = 100) -> None:
    """Let time pass while the executor goes on beating."""
    while ms > 0:
        p.pass_time(min(ms, 5_000))
        p.register("worker-0", 1, slots, ("step:a", "step:b"))
        ms -= 5_000


def running(p: Pair) -> list[str]:
    return [task.run_id for task in p.tasks]


def ledger_events(p: Pair, name: str) -> list[Any]:
    return [event for event in p.ledger_events if type(event).__name__ == name]


# --- documents ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "limits nothing"),
        ({"at_once": 0}, "greater than or equal to 1"),
        ({"at_once": 1, "per": ["colour"]}, "per.0"),
        ({"at_once": 1, "burst": 3}, "burst means something only"),
        ({"at_once": 1, "account_level": 1}, "only with `account`"),
        ({"at_once": 1, "when": "1 +"}, "when"),
        ({"at_once": 1, "where": {"colour": "red"}}, "no such variable: colour"),
        ({"at_once": 1, "typo": 1}, "typo"),
    ],
)
def test_a_wrong_limit_is_refused_with_what_is_wrong(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(limit(**fields))
    assert problem in str(caught.value)


def test_a_broken_limit_leaves_the_one_of_before_in_force() -> None:
    p = pair()
    apply(p, limit(at_once=1))
    apply(p, limit(at_once=0), offset=2)
    for n in range(3):
        p.start(f"r{n}", one())
    assert len(p.tasks) == 1


def test_a_gate_that_knows_only_a_broken_limit_lets_nothing_through() -> None:
    p = pair()
    apply(p, limit(at_once=0))
    p.start("r", one())
    assert (p.run("r").code, "'limit:l' cannot be read" in p.run("r").reason) == ("denied", True)
    apply(p, limit(at_once=1), offset=2)
    p.start("next", one())
    assert running(p) == ["next"]


# --- at once ---------------------------------------------------------------


@pytest.mark.feature("P3")
@pytest.mark.parametrize(
    ("per", "together"),
    [
        ([], 2),
        (["provider"], 4),
        (["provider", "model"], 6),
        (["account"], 8),
        (["workflow"], 2),
        (["node"], 2),
        (["run"], 12),
        (["function"], 2),
        (["operation"], 12),  # no operation was declared: such a limit is not about these steps
    ],
)
def test_a_limit_counts_by_its_key(per: list[str], together: int) -> None:
    p = pair()
    apply(p, limit(per=per, at_once=2))
    kinds = [("x", "m1"), ("x", "m2"), ("y", "m1")]
    for number in range(12):
        provider, model = kinds[number % 3]
        p.start(f"r{number}", one(provider=provider, model=model), account=f"acme/{number // 3}")
    assert len(p.tasks) == together


@pytest.mark.feature("P3")
def test_a_limit_may_count_accounts_by_their_level_and_by_an_expression() -> None:
    p = pair()
    apply(p, limit(per=["account"], account_level=2, key="args.tenant", at_once=1))
    for number, (account, tenant) in enumerate(
        [("a/b/1", "x"), ("a/b/2", "x"), ("a/b/1", "y"), ("a/c/1", "x"), ("a/c/2", "x")]
    ):
        p.start(f"r{number}", one(), {"tenant": tenant}, account=account)
    assert running(p) == ["r0", "r2", "r3"]


@pytest.mark.feature("P3")
def test_a_limit_that_cannot_be_evaluated_denies() -> None:
    p = pair()
    apply(p, limit(when="args.missing > 1", at_once=1))
    p.start("r", one(), {})
    assert (p.run("r").code, p.tasks) == ("denied", p.tasks)
    assert "cannot be evaluated" in p.run("r").reason


@pytest.mark.feature("P3")
def test_what_a_limit_is_not_about_is_not_counted() -> None:
    p = pair()
    apply(p, limit(where={"provider": ["x", "z"]}, when="tags.size() == 0", at_once=1))
    p.start("r0", one(provider="x"))
    p.start("r1", one(provider="y"))
    p.start("r2", one(provider="x"), tags={"free": "yes"})
    p.start("r3", one(provider="z"))
    assert running(p) == ["r0", "r1", "r2"]


@pytest.mark.feature("P3")
@pytest.mark.parametrize("end", ["succeeded", "failed", "busy", "released", "lost", "cancelled"])
def test_a_lease_ends_with_its_attempt_however_that_ends(end: str) -> None:
    p = pair()
    apply(p, limit(at_once=1))
    p.start("first", one(max_attempts=1))
    p.start("second", one())
    task = p.tasks.popleft()
    if end == "lost":
        p.pass_time(20_000)
        p.register("worker-1", 7, 5, ("step:a",))
    elif end == "cancelled":
        p.command("first", "cancel")
        p.tasks.clear()
        p.answer(task, "cancelled")
    else:
        p.answer(task, end, value=1)
    p.pass_time(100)
    assert p.tasks, "nobody got the free place"
    for _ in range(10):
        if p.tasks:
            p.answer(p.tasks.popleft(), value=1)
        p.pass_time(200)
    assert p.ledger.held == {}
    assert not p.ledger.limited


@pytest.mark.feature("P3")
def test_waiting_is_visible_in_ledger_and_run_once() -> None:
    p = pair()
    apply(p, limit("openai", per=["provider"], at_once=1))
    for n in range(3):
        p.start(f"r{n}", one(provider="x"))
    said = [(e.run_id, e.limit, e.key, e.cause, e.position) for e in ledger_events(p, "AttemptThrottled")]
    assert said == [("r1", "openai", "x", "limit", 0), ("r2", "openai", "x", "limit", 1)]
    assert p.seen("r2")[-1] == "StepThrottled"
    assert p.run("r2").steps["a"].waits_for == "openai[x] allows 1 at once"
    while p.tasks:
        p.answer(p.tasks.popleft(), value=1)
    assert p.run("r2").steps["a"].waits_for == ""
    assert len(ledger_events(p, "AttemptThrottled")) == 2


@pytest.mark.feature("P3")
def test_who_waits_for_a_limit_does_not_hold_up_who_does_not() -> None:
    p = pair(slots=2)
    apply(p, limit(where={"provider": "x"}, at_once=1))
    for n in range(4):
        p.start(f"x{n}", one(provider="x"))
    p.start("free", one())
    assert running(p) == ["x0", "free"]


@pytest.mark.feature("P3")
def test_changed_limits_hold_for_what_waits() -> None:
    p = pair()
    apply(p, limit(at_once=1))
    for n in range(6):
        p.start(f"r{n}", one())
    apply(p, limit(at_once=3), offset=2)
    assert len(p.tasks) == 3
    apply(p, limit("other", at_once=2), offset=3)
    apply(p, None, "limit:l", offset=4)
    assert len(p.tasks) == 5  # two that count for the new one, besides those that were there before it
    while p.tasks:
        p.answer(p.tasks.popleft(), value=1)
    assert {p.run(f"r{n}").status for n in range(6)} == {"succeeded"}
    assert p.ledger.held == {}


@pytest.mark.feature("P3")
def test_a_limit_per_instance_is_kept_by_placing_elsewhere() -> None:
    p = pair(slots=10)
    p.register("worker-1", 2, 10, ("step:a",))
    apply(p, limit(per=["instance"], at_once=2))
    for n in range(6):
        p.start(f"r{n}", one())
    assert sorted(task.instance_id for task in p.tasks) == ["worker-0", "worker-0", "worker-1", "worker-1"]
    p.answer(p.tasks.popleft(), value=1)
    assert len(p.tasks) == 4


# --- order ---------------------------------------------------------------


@pytest.mark.feature("P3")
def test_a_place_goes_to_the_account_that_holds_least() -> None:
    p = pair()
    apply(p, limit(at_once=2))
    for n in range(6):
        p.start(f"big-{n}", one(), account="big")
    p.start("small-0", one(), account="small")
    order = []
    while p.tasks:
        task = p.tasks.popleft()
        order.append(task.run_id)
        p.answer(task, value=1)
    assert order[:4] == ["big-0", "big-1", "small-0", "big-2"]


@pytest.mark.feature("P3", "P6")
def test_priority_goes_first_but_nobody_starves() -> None:
    p = pair(slots=1)
    p.start("running", one())
    p.start("old-low", one(), priority=0)
    p.pass_time(1_000)
    p.start("normal", one())
    p.start("high", one(), priority=9)
    p.answer(p.tasks.popleft(), value=1)
    assert running(p) == ["high"]
    later(p, 89_500, slots=1)
    p.start("late-high", one(), priority=9)
    p.answer(p.tasks.popleft(), value=1)
    order = running(p)
    for _ in range(3):
        p.answer(p.tasks.popleft(), value=1)
        order += running(p)
    assert order == ["normal", "old-low", "late-high"]


# --- rate ---------------------------------------------------------------


@pytest.mark.feature("P3")
def test_a_rate_lets_a_burst_through_and_then_one_by_one() -> None:
    p = pair()
    apply(p, limit(rate_per_s=2, burst=3))
    for n in range(8):
        p.start(f"r{n}", one())
    assert len(p.tasks) == 3
    assert p.gate.next_due_ms(p.ledger) == p.now_ms + 500
    p.pass_time(499)
    assert len(p.tasks) == 3
    p.pass_time(1)
    assert len(p.tasks) == 4
    p.pass_time(1_000)
    assert len(p.tasks) == 6
    later(p, 20_000)
    assert len(p.tasks) == 8


def test_a_faster_rate_holds_at_once() -> None:
    p = pair()
    apply(p, limit(rate_per_s=0.001, burst=1))
    for n in range(3):
        p.start(f"r{n}", one())
    apply(p, limit(rate_per_s=10, burst=1), offset=2)
    p.pass_time(100)
    assert len(p.tasks) == 2


def test_what_a_rate_knows_of_a_key_is_forgotten_when_it_says_nothing_any_more() -> None:
    p = pair()
    apply(p, limit(per=["run"], rate_per_s=1))
    for n in range(500):
        p.start(f"r{n}", one())
        p.answer(p.tasks.popleft(), value=1)
        later(p, 600)
    assert len(p.ledger.gauges) < 10


# --- breaker ---------------------------------------------------------------


def failing(p: Pair, runs: int, outcome: str = "failed", begin: int = 0) -> None:
    for n in range(begin, begin + runs):
        p.start(f"f{n}", one(provider="x", max_attempts=1))
        p.answer(p.tasks.pop(), outcome, value=1)


@pytest.mark.feature("P3", "P2")
def test_a_breaker_opens_probes_and_closes() -> None:
    p = pair()
    breaker = {"failures": 3, "window_s": 60, "open_s": 10}
    apply(p, limit("x", per=["provider"], breaker=breaker))
    failing(p, 3)
    assert [e.until_ms for e in ledger_events(p, "BreakerOpened")] == [p.now_ms + 10_000]
    for n in range(3):
        p.start(f"r{n}", one(provider="x"))
    p.start("other", one(provider="y"))
    assert running(p) == ["other"]
    assert "3 failures in 60 s" in p.run("r0").steps["a"].waits_for
    p.tasks.clear()
    p.pass_time(9_999)
    assert not p.tasks
    p.register("worker-0", 1, 100, ("step:a",))
    p.pass_time(1)
    assert running(p) == ["r0"]  # one probe
    p.answer(p.tasks.popleft(), "timed_out", retryable=False)
    assert len(ledger_events(p, "BreakerOpened")) == 2
    p.pass_time(9_000)
    p.register("worker-0", 1, 100, ("step:a",))
    p.pass_time(1_000)
    assert running(p) == ["r1"]
    p.answer(p.tasks.popleft(), value=1)
    assert len(ledger_events(p, "BreakerClosed")) == 1
    assert running(p) == ["r2"]


@pytest.mark.feature("P3")
def test_old_failures_and_successes_do_not_open_a_breaker() -> None:
    p = pair()
    apply(p, limit(breaker={"failures": 3, "window_s": 5}))
    failing(p, 2)
    p.pass_time(6_000)
    failing(p, 2, begin=2)
    failing(p, 5, "succeeded", begin=4)
    assert ledger_events(p, "BreakerOpened") == []


@pytest.mark.feature("P3")
def test_an_open_breaker_may_deny_instead() -> None:
    p = pair()
    apply(p, limit("x", breaker={"failures": 1, "while_open": "deny", "open_s": 7}))
    failing(p, 1)
    p.start("r", one())
    assert (p.run("r").code, "try again in 7000 ms" in p.run("r").reason) == ("denied", True)
    assert p.money() == (0, 0)


# --- queues and placement ---------------------------------------------------------------


@pytest.mark.feature("P6")
def test_a_full_queue_refuses_with_a_code_and_a_time() -> None:
    p = pair(slots=1)
    apply(p, {"kind": "queue", "queue": "default", "version": "1", "depth": 2})
    for n in range(5):
        p.start(f"r{n}", one(reserve_micros=3))
    assert [p.run(f"r{n}").code for n in range(5)] == ["", "", "", "queue_full", "queue_full"]
    assert "try again in 1000 ms" in p.run("r4").reason
    refused = ledger_events(p, "AttemptRefused")
    assert {(e.rule, e.retry_after_ms) for e in refused} == {("queue_full", 1000)}
    while p.tasks:
        p.answer(p.tasks.popleft(), value=1, actual_micros=3)
    assert p.money() == (0, 9)
    assert p.ledger.depth == {}


@pytest.mark.feature("P6")
def test_a_queue_takes_so_many_a_second() -> None:
    p = pair(slots=200)
    apply(p, {"kind": "queue", "queue": "default", "version": "1", "rate_per_s": 50, "burst": 100})
    for n in range(120):
        p.start(f"r{n}", one())
    assert len(p.tasks) == 100
    assert p.run("r110").code == "queue_full"
    p.pass_time(20)
    p.start("later", one())
    assert len(p.tasks) == 101


@pytest.mark.feature("P6")
def test_a_queue_may_let_wait_and_say_so() -> None:
    p = pair(slots=1)
    apply(p, {"kind": "queue", "queue": "default", "version": "1", "depth": 1, "on_full": "wait"})
    for n in range(3):
        p.start(f"r{n}", one())
    assert "takes 1" in p.run("r2").steps["a"].waits_for
    while p.tasks:
        p.answer(p.tasks.popleft(), value=1)
    assert p.run("r2").status == "succeeded"


@pytest.mark.feature("P6")
def test_the_preferred_instance_gets_the_work_if_it_can() -> None:
    p = pair(slots=10)
    p.register("worker-1", 2, 1, ("step:a",))
    for n in range(3):
        p.start(f"r{n}", one(prefer="worker-1"))
    assert [task.instance_id for task in p.tasks] == ["worker-1", "worker-0", "worker-0"]


@pytest.mark.feature("P6")
@pytest.mark.parametrize(
    ("of_run", "of_function", "taken"),
    [
        ("worker-1", "", ["worker-1", "worker-0", "worker-0"]),
        ("worker-1", "worker-2", ["worker-1", "worker-2", "worker-0"]),
        ("nobody", "worker-2", ["worker-2", "worker-0", "worker-0"]),
        ("nobody", "", ["worker-0", "worker-0", "worker-0"]),
        ("gpu-0", "worker-1", ["worker-1", "worker-0", "worker-0"]),  # is there, but has another queue
        ("worker-2", "worker-2", ["worker-2", "worker-0", "worker-0"]),
    ],
)
def test_what_a_run_prefers_comes_before_what_its_function_does_and_neither_holds_anything_up(
    of_run: str, of_function: str, taken: list[str]
) -> None:
    p = pair(slots=10)
    p.register("worker-1", 2, 1, ("step:a",))
    p.register("worker-2", 3, 1, ("step:a",))
    p.register("gpu-0", 4, 5, ("step:a",), queue="gpu")
    for n in range(3):
        p.start(f"r{n}", one(prefer=of_function), prefer=of_run)
    assert [task.instance_id for task in p.tasks] == taken


@pytest.mark.feature("P6")
def test_who_waits_for_a_slot_takes_the_first_that_is_free_wherever_it_is() -> None:
    p = pair(slots=1)
    p.register("worker-1", 2, 1, ("step:a",))
    for n in range(3):
        p.start(f"r{n}", one(), prefer="worker-1")
    by_run = {task.run_id: task for task in p.tasks}
    p.tasks.clear()
    p.answer(by_run["r1"], value=1)
    assert [(task.run_id, task.instance_id) for task in p.tasks] == [("r2", "worker-0")]


@pytest.mark.feature("P6")
def test_further_attempts_and_all_steps_of_a_run_have_its_wish() -> None:
    p = pair(slots=10)
    p.register("worker-1", 2, 10, ("step:a", "step:b"))
    p.start("r", chain("a", "b", a=step(max_attempts=2)), prefer="worker-1")
    p.answer(p.tasks.popleft(), "failed", retryable=True)
    p.pass_time_with_heartbeats(5_000)
    p.answer(p.tasks.popleft(), value=1)
    p.answer(p.tasks.popleft(), value=1)
    assert [event.instance_id for event in ledger_events(p, "AttemptGranted")] == ["worker-1"] * 3


@pytest.mark.feature("P6", "P7")
def test_work_that_nobody_offers_waits_visibly_and_then_runs() -> None:
    p = pair()
    p.start("r", chain("c", c=step(queue="gpu")))
    assert p.run("r").steps["c"].waits_for == ""
    p.pass_time(2_000)
    assert p.run("r").steps["c"].waits_for == "no executor of queue gpu offers step:c"
    p.pass_time(60_000)
    assert p.seen("r").count("StepThrottled") == 1
    p.register("gpu-0", 9, 1, ("step:c",), queue="gpu")
    assert running(p) == ["r"]
    assert p.run("r").steps["c"].waits_for == ""


@pytest.mark.feature("P6")
def test_scale_out_is_wanted_once_and_taken_back_once() -> None:
    p = pair(slots=1)
    for n in range(4):
        p.start(f"r{n}", one())
    p.pass_time(4_900)
    assert ledger_events(p, "ScaleOutWanted") == []
    p.pass_time(200)
    p.pass_time(2_000)
    (wanted,) = ledger_events(p, "ScaleOutWanted")
    assert (wanted.queue, wanted.wanted, wanted.waiting, wanted.slots) == ("default", True, 3, 1)
    p.register("worker-1", 2, 8, ("step:a",))
    p.pass_time(500)
    _, over = ledger_events(p, "ScaleOutWanted")
    assert (over.wanted, over.waiting) == (False, 0)


@pytest.mark.feature("P6")
def test_a_paused_queue_neither_wants_executors_nor_lacks_them() -> None:
    p = pair()
    p.gate.table_changed("controls", "*", Control(queue="*", paused=True, by="t", reason="", at_ms=0), 5)
    p.start("r", one())
    later(p, 20_000)
    assert ledger_events(p, "ScaleOutWanted") + ledger_events(p, "AttemptThrottled") == []
    p.gate.table_changed("controls", "*", None, 6)
    later(p, 1)
    assert running(p) == ["r"]


@pytest.mark.feature("P6")
def test_the_ledger_tells_a_requests_life_in_the_queue() -> None:
    p = pair(slots=1)
    p.start("r0", one())
    p.start("r1", one(), command_id="order-7")
    p.pass_time(700)
    p.answer(p.tasks.popleft(), value=1)
    opened = next(e for e in ledger_events(p, "RunOpened") if e.run_id == "r1")
    assert [event.run_id for event in ledger_events(p, "AttemptGranted")] == ["r0"], "it did not wait"
    (placed,) = ledger_events(p, "AttemptPlaced")
    assert (opened.request_id, placed.run_id, placed.queued_ms) == ("order-7", "r1", p.now_ms - 700)
