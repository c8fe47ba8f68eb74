"""What is decided for a run, seen through scheduler and gate together, without any log."""

from __future__ import annotations

from typing import Any

import pytest

from support.pure import Pair, agent, chain, step, tool
from tidegate.domain import run_events as ev
from tidegate.domain.messages import EndedIncarnation
from tidegate.domain.progress import MAX_OPEN_STEPS
from tidegate.scheduler import commands, decide

STEPS = ("step:a", "step:b", "step:c", "step:d", "agent:bot", "tool:look", "tool:pay")


def pair(**options: Any) -> Pair:
    return Pair(functions=STEPS, **options)


def diamond() -> dict[str, Any]:
    return {
        "name": "diamond",
        "version": "1",
        "nodes": {name: {"kind": "step", "function": name} for name in "abcd"},
        "edges": [["a", "b"], ["a", "c"], ["b", "d"], ["c", "d"]],
        "functions": {name: step() for name in "abcd"},
    }


def one_agent(**settings: Any) -> dict[str, Any]:
    return {
        "name": "agent:bot",
        "version": "1",
        "nodes": {"bot": {"kind": "agent", "function": "bot"}},
        "functions": {"bot": agent("look", "pay", **settings), "look": tool(), "pay": tool()},
    }


@pytest.mark.feature("G2")
def test_a_chain_hands_each_output_to_the_next() -> None:
    p = pair()
    p.start("r", chain("a", "b", "c"), 1)
    p.work({"a": lambda x: x + 1, "b": lambda x: x * 10, "c": lambda x: {"is": x}})
    assert p.run("r").status == "succeeded"
    assert p.run("r").output == '{"is":20}'
    assert [s.wave for s in p.run("r").steps.values()] == [0, 1, 2]


@pytest.mark.feature("G2")
@pytest.mark.parametrize("late", ["b", "c"])
def test_branches_run_in_parallel_and_join_alike_in_any_order(late: str) -> None:
    p = pair()
    p.start("r", diamond(), 5)
    p.answer(p.tasks.popleft(), value=1)
    assert sorted(task.step_id for task in p.tasks) == ["b", "c"]
    first, second = sorted(p.tasks, key=lambda task: task.step_id == late)
    p.tasks.clear()
    p.answer(first, value=first.step_id)
    assert not p.tasks
    p.answer(second, value=second.step_id)
    (join,) = p.tasks
    assert join.call is not None
    assert join.call.arguments == '{"b":"b","c":"c"}'
    p.work({"d": lambda x: sorted(x.values())})
    assert p.run("r").output == '["b","c"]'


@pytest.mark.feature("G2")
def test_the_fingerprint_does_not_depend_on_interleaving_or_attempts() -> None:
    fingerprints = set()
    for order in (0, -1):
        p = pair()
        p.start("r", diamond(), 5)
        p.answer(p.tasks.popleft(), value=1)
        tasks = list(p.tasks)
        p.tasks.clear()
        task = tasks.pop(order)
        if order:
            p.answer(task, "failed", error_class="E", error_message="once")
            p.pass_time(100)
            task = p.tasks.popleft()
        p.answer(task, value=task.step_id)
        p.answer(tasks[0], value=tasks[0].step_id)
        p.work({"d": lambda x: x})
        fingerprints.add(p.run("r").fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.feature("D2")
def test_a_failing_step_backs_off_and_then_gives_up_with_a_reason() -> None:
    p = pair()
    p.start("r", chain("a", a=step(max_attempts=3)))

    def boom(_: Any) -> None:
        raise ValueError("no luck")

    waits = []
    for _ in range(3):
        p.work({"a": boom})
        due = p.scheduler.next_due_ms(p.runs)
        if due is not None:
            waits.append(due - p.now_ms)
            p.pass_time(due - p.now_ms - 1)
            assert not p.tasks, "an attempt started before its time"
            p.pass_time(1)
    run = p.run("r")
    assert run.status == "failed"
    assert run.code == "attempts_exhausted"
    assert "no luck" in run.reason
    assert 50 <= waits[0] <= 100
    assert 100 <= waits[1] <= 200
    assert p.money() == (0, 0)


@pytest.mark.feature("D2")
def test_the_log_says_which_code_an_attempt_was_entered_with() -> None:
    p = pair()
    p.start("r", chain("a"))
    p.answer(p.tasks.popleft(), "failed", error_class="Boom", code_version="v1")
    p.pass_time(1_000)
    p.answer(p.tasks.popleft(), value=1, code_version="v2" * 1_000)
    said = [event for _, event in p.events if isinstance(event, ev.AttemptEnded | ev.StepSucceeded)]
    assert [event.code_version for event in said] == ["v1", "v2" * 64]


@pytest.mark.feature("T1")
def test_an_agent_plans_calls_tools_in_parallel_and_ends() -> None:
    p = pair()
    states: list[Any] = []

    def bot(state: Any) -> Any:
        states.append(state)
        if state["turn"] == 1:
            calls = [
                {"id": "", "name": "look", "arguments": {"n": 1}},
                {"id": "", "name": "look", "arguments": {"n": 2}},
                {"id": "x", "name": "nope", "arguments": {}},
            ]
            return {"content": "looking", "tool_calls": calls, "final": None, "output": None}
        return {"content": "done", "tool_calls": [], "final": None, "output": None}

    p.start("r", one_agent(), {"order": 7})
    p.work({"bot": bot, "look": lambda args: args["n"] * 100})
    assert p.run("r").status == "succeeded"
    assert p.run("r").output == '"done"'
    assert list(p.run("r").steps) == ["bot/1", "bot/1/tool:look", "bot/1/tool:look#2", "bot/2"]
    (turn,) = states[1]["history"]
    assert [call["output"] for call in turn["calls"]] == [100, 200, None]
    assert "unknown tool" in turn["calls"][2]["error"]
    assert states[1]["input"] == {"order": 7}


@pytest.mark.feature("T2")
def test_a_failing_tool_is_an_observation_not_the_end() -> None:
    p = pair()

    def bot(state: Any) -> Any:
        if state["turn"] == 1:
            return {"content": "", "tool_calls": [{"id": "1", "name": "pay", "arguments": {}}]}
        return {"content": "", "final": True, "output": state["history"][0]["calls"][0]["error"]}

    p.start("r", one_agent())
    p.answer(p.tasks.popleft(), value=bot({"turn": 1}))
    p.answer(p.tasks.popleft(), "failed", error_class="CardError", error_message="declined", retryable=False)
    p.work({"bot": bot})
    assert p.run("r").status == "succeeded"
    assert "declined" in p.run("r").output


@pytest.mark.feature("G6")
def test_an_agent_that_never_ends_is_stopped_loudly() -> None:
    p = pair()
    p.start("r", one_agent())
    p.work({"bot": lambda s: {"content": "", "final": False}})
    assert p.run("r").status == "failed"
    assert p.run("r").code == "max_steps"
    assert len(p.run("r").steps) == 50


@pytest.mark.feature("P2")
def test_a_budget_is_reserved_before_and_settled_after() -> None:
    p = pair()
    p.start("r", chain("a", "b", a=step(reserve_micros=60), b=step(reserve_micros=60)), budget_micros=100)
    assert p.money() == (60, 0)
    p.answer(p.tasks.popleft(), value=1, actual_micros=50)
    run = p.run("r")
    assert run.status == "failed"
    assert run.code == "denied"
    assert "budget" in run.reason
    assert p.money() == (0, 50)
    assert p.dispatches == [("a", 1)]


@pytest.mark.feature("P4")
@pytest.mark.parametrize("approved", [True, False])
def test_an_approval_is_asked_for_once_and_bound_to_its_step(approved: bool) -> None:
    p = pair()
    p.policy(
        {
            "policy": "money",
            "version": "1",
            "rules": [{"name": "big", "when": "name == 'b' && args > 10", "then": "require_approval"}],
        }
    )
    p.start("r", chain("a", "b"), 0)
    p.work({"a": lambda _: 50, "b": lambda x: x})
    run = p.run("r")
    assert run.status == "waiting"
    assert [s.step_id for s in run.open_approvals()] == ["b"]
    assert p.money() == (0, 0)
    p.command("r", "approve" if approved else "reject", step_id="b", by="ann", reason="because")
    p.work({"b": lambda x: x})
    assert run.status == ("succeeded" if approved else "failed")
    if not approved:
        assert "ann" in run.reason
    p.command("r", "approve", step_id="b", by="bob")
    assert p.seen("r")[-1] == "CommandRefused"
    assert not p.ledger.attempts


@pytest.mark.feature("P1")
def test_deny_wins_and_says_which_rule() -> None:
    p = pair()
    rules = [
        {"name": "ok", "when": "true", "then": "allow"},
        {"name": "never", "when": "account.startsWith('acme')", "then": "deny", "reason": "acme may not"},
    ]
    p.policy({"policy": "p", "version": "3", "rules": rules})
    p.start("r", chain("a"))
    assert p.run("r").status == "failed"
    assert "never" in p.run("r").reason
    assert "acme may not" in p.run("r").reason
    assert p.dispatches == []


@pytest.mark.feature("P1")
def test_a_rule_that_fails_to_evaluate_denies() -> None:
    p = pair()
    p.policy({"policy": "p", "version": "1", "rules": [{"name": "odd", "when": "args.missing > 1", "then": "allow"}]})
    p.start("r", chain("a"), {})
    assert p.run("r").code == "denied"


@pytest.mark.feature("D4")
def test_cancel_ends_the_run_and_frees_what_waits() -> None:
    p = pair(slots=1)
    p.start("r", diamond())
    p.answer(p.tasks.popleft(), value=1)
    (running,) = p.tasks
    p.tasks.clear()
    p.command("r", "cancel", by="ann")
    assert p.run("r").status == "cancelled"
    (cancel,) = p.tasks
    assert (cancel.type, cancel.step_id) == ("cancel", running.step_id)
    p.answer(running, "cancelled", actual_micros=7)
    assert p.money() == (0, 7)
    assert not p.ledger.runs
    assert not p.ledger.waiting


@pytest.mark.feature("D1")
def test_lost_work_starts_again_under_a_new_attempt_once() -> None:
    p = pair()
    p.start("r", chain("a", a=step(reserve_micros=5)))
    old = p.tasks.popleft()

    ended = {"ended": (EndedIncarnation(incarnation=1, evidence="pid 7 is gone"),)}
    p.register("worker-0", 9, 10, STEPS, **ended)
    (new,) = p.tasks
    assert (new.attempt, new.incarnation) == (2, 9)
    assert new.idempotency_key == old.idempotency_key
    p.answer(old, value="late", actual_micros=3)
    assert p.seen("r")[-1] == "ResultIgnored"
    p.answer(old, value="late", actual_micros=3)
    p.tasks.clear()
    p.answer(new, value="right", actual_micros=5)
    assert p.run("r").output == '"right"'
    assert p.money() == (0, 8)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("answer", ["approve", "reject", "late result"])
def test_an_unrepeatable_tool_is_not_repeated_without_a_human(answer: str) -> None:
    p = pair()
    p.start("r", chain("a", a=step(idempotent=False)))
    old = p.tasks.popleft()
    p.pass_time(9_000)
    assert p.run("r").status == "running"
    p.pass_time(2_000)
    p.register("worker-1", 20, 10, STEPS)
    assert p.run("r").status == "waiting"
    assert not p.tasks
    if answer == "late result":
        p.answer(old, value="it had happened")
        assert p.run("r").output == '"it had happened"'
        return
    p.command("r", answer, by="ann")
    p.work({"a": lambda _: "again"})
    assert p.run("r").status == ("succeeded" if answer == "approve" else "failed")


@pytest.mark.feature("D1")
def test_a_lagging_gate_does_not_take_its_own_lag_for_silence() -> None:
    p = pair()
    p.start("r", chain("a"))
    p.table_end = 10**9 + 5  # five heartbeats lie unread
    p.pass_time(60_000)
    assert p.run("r").steps["a"].status == "dispatched"
    p.tables.versions["instances"] = 10**9 + 5
    p.pass_time(1)
    assert p.run("r").steps["a"].status == "requested"


@pytest.mark.feature("P3")
def test_an_account_with_much_to_do_does_not_make_others_wait_behind_all_of_it() -> None:
    """The account that holds the fewest slots goes first; among those that hold as many, who has waited longest."""
    p = pair(slots=2)
    for number in range(20):
        p.start(f"big-{number}", chain("a"), number, account="big/app")
    for number in range(2):
        p.start(f"small-{number}", chain("a"), number, account="small/app")
    order = []
    while p.tasks:
        task = p.tasks.popleft()
        order.append(task.run_id)
        p.answer(task, value=None)
    assert order[:5] == ["big-0", "big-1", "small-0", "big-2", "small-1"]
    assert len(order) == 22
    assert {p.run(f"big-{n}").status for n in range(20)} == {"succeeded"}
    assert p.ledger.busy == {}
    assert p.ledger.waiting == {}


@pytest.mark.feature("P6")
def test_waiting_work_is_placed_in_order_when_slots_come_free() -> None:
    p = pair(slots=1)
    for n in range(3):
        p.start(f"r{n}", chain("a"), n)
    assert len(p.tasks) == 1
    order = []
    while p.tasks:
        task = p.tasks.popleft()
        order.append(task.run_id)
        p.answer(task, value=None)
    assert order == ["r0", "r1", "r2"]


@pytest.mark.feature("D4")
def test_commands_to_nobody_and_to_the_dead_are_answered() -> None:
    p = pair()
    p.command("ghost", "cancel")
    assert p.seen("ghost") == ["CommandRefused"]
    assert p.letters[-1].code == "unknown_run"
    p.start("r", chain("a"))
    p.work({"a": lambda x: x})
    p.command("r", "cancel")
    assert p.letters[-1].code == "run_is_over"
    p.start("ghost", chain("a"))
    assert p.seen("ghost")[1] == "RunStarted"


@pytest.mark.feature("O3")
def test_the_same_start_twice_is_one_run_and_another_content_is_refused() -> None:
    p = pair()
    p.start("r", chain("a"), 1)
    p.start("r", chain("a"), 1)
    assert p.seen("r").count("RunStarted") == 1
    p.start("r", chain("a"), 2, content_hash="other")
    assert p.seen("r")[-1] == "CommandRefused"
    assert p.letters[-1].code == "duplicate_run_id"


@pytest.mark.feature("G1")
def test_all_problems_of_a_definition_come_at_once() -> None:
    p = pair()
    bad = chain("a", "b")
    bad["edges"].append(["b", "a"])
    bad["nodes"]["c"] = {"kind": "step", "function": "zzz", "input": {"x": "${ 1 + }"}}
    p.start("r", bad)
    run = p.run("r")
    assert run.status == "refused"
    for part in ("cycle", "unknown function 'zzz'", "nodes.c.input.x"):
        assert part in run.reason
    assert p.letters[-1].code == "invalid_definition"


@pytest.mark.feature("G7")
def test_inputs_and_the_output_are_bound_by_expressions() -> None:
    p = pair()
    definition = chain("a", "b")
    definition["nodes"]["b"]["input"] = {"total": "${ nodes.a.n * input.factor }", "text": "plain"}
    definition["output"] = {"from": "${ nodes.b.total }"}
    p.start("r", definition, {"factor": 3})
    p.work({"a": lambda _: {"n": 14}, "b": lambda x: x})
    assert p.run("r").output == '{"from":42}'


@pytest.mark.feature("G7")
def test_a_binding_that_fails_ends_the_run_with_its_place() -> None:
    p = pair()
    definition = chain("a", "b")
    definition["nodes"]["b"]["input"] = "${ nodes.a.nothing }"
    p.start("r", definition)
    p.work({"a": lambda _: {}})
    assert p.run("r").status == "failed"
    assert p.run("r").code == "binding_failed"
    assert "node b" in p.run("r").reason


@pytest.mark.feature("P2")
def test_money_of_a_cancelled_attempt_is_freed_when_its_executor_is_lost() -> None:
    p = pair()
    p.start("r", chain("a", a=step(reserve_micros=5)))
    p.command("r", "cancel")
    assert p.money() == (5, 0)
    p.pass_time(10_001)
    assert p.money() == (0, 0)
    assert not p.ledger.runs
    assert not p.ledger.attempts


@pytest.mark.feature("P7")
def test_an_older_life_that_goes_on_beating_is_given_nothing_new() -> None:
    p = pair()
    p.register("worker-0", 9, 10, STEPS)
    p.register("worker-0", 1, 10, STEPS)
    p.start("r", chain("a"))
    (task,) = p.tasks
    assert task.incarnation == 9


@pytest.mark.feature("P4")
def test_an_approval_does_not_stand_against_a_policy_that_denies_now() -> None:
    p = pair()
    rule = {"name": "ask", "when": "true", "then": "require_approval"}
    p.policy({"policy": "p", "version": "1", "rules": [rule]})
    p.start("r", chain("a"))
    p.policy({"policy": "p", "version": "2", "rules": [{**rule, "then": "deny", "reason": "not any more"}]})
    p.command("r", "approve")
    assert p.run("r").status == "failed"
    assert "not any more" in p.run("r").reason
    assert not p.dispatches


def test_a_start_is_new_whatever_was_sent_under_its_command_id_before() -> None:
    p = pair()
    p.command("r", "cancel", command_id="x")
    p.start("r", chain("a"), command_id="x")
    assert p.run("r").status == "running"
    p.start("r", chain("a"), command_id="x")
    assert p.seen("r").count("RunStarted") == 1


def test_a_run_may_not_have_more_steps_open_than_one_input_can_end() -> None:
    p = pair()
    names = [f"n{number}" for number in range(MAX_OPEN_STEPS + 1)]
    definition = {
        "name": "wide",
        "version": "1",
        "max_steps": 100_000,
        "nodes": {name: {"kind": "step", "function": "a"} for name in names},
        "functions": {"a": step()},
    }
    p.start("r", definition)
    assert (p.run("r").status, p.run("r").code) == ("failed", "too_wide")


@pytest.mark.parametrize("record", ["result", "decision", "command"])
def test_a_decision_that_fails_ends_the_run_with_a_reason(monkeypatch: pytest.MonkeyPatch, record: str) -> None:
    p = pair()

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a defect")

    if record != "result":
        module, name = {"decision": (decide, "on_decision"), "command": (commands, "on_command")}[record]
        monkeypatch.setattr(module, name, fail)
    p.start("r", chain("a", a=step(reserve_micros=5)))
    if record == "result":
        monkeypatch.setattr(decide, "on_result", fail)
        p.answer(p.tasks.popleft(), actual_micros=3)
    run = p.run("r")
    assert (run.status, run.code) == ("refused" if record == "command" else "failed", "internal_error")
    assert "ZeroDivisionError: a defect" in run.reason
    if record == "result":
        assert p.money() == (0, 3)
        assert not p.ledger.attempts
