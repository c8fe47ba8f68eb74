"""Tools that somebody outside does: a call waits, its answer is an event, and no answer counts twice, late or unfit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from support.pure import Pair, agent, tool
from tidegate.domain import canonical
from tidegate.domain import run_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.messages import EndedIncarnation, StepTask
from tidegate.domain.run import apply
from tidegate.domain.workflow import validate_definition
from tidegate.gate.fold import derive
from tidegate.gate.ledger import Ledger
from tidegate.scheduler import snapshots

CALL = "clerk/1/tool:quote"
NUMBER = {"type": "object", "required": ["cents"], "properties": {"cents": {"type": "integer"}}}
QUOTE = {"kind": "tool", "outside": True, "timeout_ms": 60_000, "parameters": {"required": ["item"]}, "output": NUMBER}


def definition(quote: dict[str, Any] | None = None) -> dict[str, Any]:
    functions = {"clerk": agent("quote", "look"), "quote": quote or QUOTE, "look": tool()}
    return {
        "name": "w",
        "version": "1",
        "nodes": {"clerk": {"kind": "agent", "function": "clerk"}},
        "edges": [],
        "functions": functions,
    }


def planned(
    *calls: Any, documents: Sequence[dict[str, Any]] = (), quote: dict[str, Any] | None = None, **fields: Any
) -> Pair:
    """Return a run whose agent has just made these calls: (tool, arguments[, id]). documents: in force before it starts."""
    p = Pair(functions=("agent:clerk", "tool:look"))
    for document in documents:
        p.policy(document)
    p.start("r", definition(quote), **fields)
    listed = [{"name": name, "arguments": args, "id": more[0] if more else ""} for name, args, *more in calls]
    p.answer(p.tasks.popleft(), value={"content": "", "tool_calls": listed})
    return p


def observed(p: Pair) -> list[Any]:
    """Return what the agent sees of its calls in the turn that it is asked next, as (ok, output or error)."""
    call = p.tasks.popleft().call
    assert call is not None
    (turn,) = canonical.loads(call.arguments)["history"]
    return [(seen["ok"], seen["output"] if seen["ok"] else seen["error"]) for seen in turn["calls"]]


def ledger_of(p: Pair, step_id: str = CALL) -> list[str]:
    return [type(event).__name__ for event in p.ledger_events if getattr(event, "step_id", "") == step_id]


def refused(p: Pair) -> tuple[str, str]:
    event = p.events[-1][1]
    assert isinstance(event, ev.CommandRefused)
    return event.code, event.reason


@pytest.mark.feature("T4")
def test_a_call_waits_and_its_answer_is_recorded() -> None:
    p = planned(("quote", {"item": "tea"}, "call-7"))
    (wait,) = [event for _, event in p.events if isinstance(event, ev.WaitStarted)]
    assert (wait.step_id, wait.function, wait.input, wait.key) == (
        "clerk/1/tool:quote",
        "quote",
        '{"item":"tea"}',
        "call-7",
    )
    assert (p.run("r").status, len(p.tasks)) == ("waiting", 0)
    kept = snapshots.load(snapshots.dump(p.run("r")), p.runs.definitions)
    assert kept.steps == p.run("r").steps
    assert ledger_of(p) == ["AttemptGranted"]
    p.command("r", "respond", step_id=wait.step_id, value='{"cents":5}', by="erp")
    done = p.run("r").steps[wait.step_id]
    assert (done.status, done.output) == ("succeeded", '{"cents":5}')
    (given,) = [event for _, event in p.events if isinstance(event, ev.StepSucceeded) and event.step_id == wait.step_id]
    assert (given.given_by, given.attempt) == ("erp", 1)
    assert ledger_of(p)[1:] == ["AttemptSettled"]
    assert observed(p) == [(True, {"cents": 5})]


@pytest.mark.feature("T4")
def test_an_answer_that_does_not_fit_is_refused_and_the_call_stays_open() -> None:
    p = planned(("quote", {"item": "tea"}))
    for value in ('{"cents":"five"}', "{}", "null", '"x"'):
        p.command("r", "respond", value=value)
        code, reason = refused(p)
        assert code == "invalid_answer"
        assert reason.endswith("the question stays open")
    p.command("r", "respond", value='{"cents":1}')
    assert observed(p) == [(True, {"cents": 1})]


@pytest.mark.feature("T4")
def test_second_late_and_unknown_answers_are_refused_with_a_reason() -> None:
    p = planned(("quote", {"item": "tea"}), ("quote", {"item": "milk"}))
    p.command("r", "respond", value='{"cents":1}')
    assert refused(p)[0] == "no_such_wait"
    assert "that is meant for certain; open: clerk/1/tool:quote, clerk/1/tool:quote#2" in refused(p)[1]
    p.command("r", "respond", step_id="clerk/1/tool:quote", value='{"cents":1}')
    p.command("r", "respond", step_id="clerk/1/tool:quote", value='{"cents":2}')
    assert refused(p) == (
        "no_such_wait",
        "clerk/1/tool:quote is over (succeeded) and waits for nothing any more; open: clerk/1/tool:quote#2",
    )
    p.command("r", "respond", step_id="clerk/1/tool:nobody", value="1")
    assert refused(p)[1].startswith("no open wait 'clerk/1/tool:nobody'")
    p.pass_time_with_heartbeats(60_000)
    p.command("r", "respond", step_id="clerk/1/tool:quote#2", value='{"cents":2}')
    assert "is over (failed)" in refused(p)[1]
    (first, second) = observed(p)
    assert first == (True, {"cents": 1})
    assert second == (False, "nothing came within 60 s: an answer to the call of the outside tool quote")
    assert p.run("r").status == "running", "an agent that got no answer goes on"


@pytest.mark.feature("T4")
def test_whoever_does_the_tool_may_say_that_it_cannot() -> None:
    p = planned(("quote", {"item": "tea"}), ("look", {}))
    p.command("r", "reject", step_id="clerk/1/tool:quote", by="erp", reason="no such item")
    p.answer(p.tasks.popleft(), value=1)
    assert observed(p) == [(False, "rejected by erp: no such item"), (True, 1)]


@pytest.mark.feature("T1")
@pytest.mark.parametrize("ids", [("", "", ""), ("x", "x", "x"), ("x", "", "x")])
def test_repeated_and_empty_ids_of_calls_are_told_apart(ids: tuple[str, str, str]) -> None:
    p = planned(*(("look", {"n": number}, one) for number, one in enumerate(ids)))
    assert [task.step_id for task in p.tasks] == ["clerk/1/tool:look", "clerk/1/tool:look#2", "clerk/1/tool:look#3"]
    assert len({task.idempotency_key for task in p.tasks}) == 3
    for number in range(3):
        p.answer(p.tasks.popleft(), value=number)
    assert observed(p) == [(True, 0), (True, 1), (True, 2)]


@pytest.mark.feature("D4")
def test_a_cancelled_run_waits_for_nobody() -> None:
    p = planned(("quote", {"item": "tea"}))
    p.command("r", "cancel")
    assert (p.run("r").status, p.run("r").steps["clerk/1/tool:quote"].status) == ("cancelled", "cancelled")
    p.command("r", "respond", value='{"cents":1}')
    assert refused(p)[0] == "run_is_over"


def test_bad_arguments_are_an_observation_and_no_wait() -> None:
    p = planned(("quote", {"thing": "tea"}))
    ((ok, error),) = observed(p)
    assert not ok
    assert "'item' is a required property" in error


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"queue": "gpu", "max_attempts": 3}, "functions.quote.max_attempts: nothing of an outside tool is run here"),
        ({"kind": "step"}, "functions.quote.outside: a step cannot be done outside, only a tool can"),
        ({"outside": False}, "functions.quote.output: only a tool that is `outside` says what its output is"),
        ({"output": {"type": "nothing"}}, "functions.quote.output: not a JSON Schema"),
    ],
)
def test_a_definition_that_makes_no_sense_is_refused(fields: dict[str, Any], problem: str) -> None:
    found = validate_definition(definition({**QUOTE, **fields}))
    assert any(one.startswith(problem) for one in found), found


# --- the gate ---------------------------------------------------------------------------------------------------------------

TEA = ("quote", {"item": "tea"})
DEAR = {**QUOTE, "reserve_micros": 40}


def rule(then: str, **more: Any) -> dict[str, Any]:
    rules = [{"name": "about-quotes", "when": 'tool == "quote"', "then": then, "reason": "because", **more}]
    return {"policy": "p", "version": "1", "rules": rules}


def is_asked(p: Pair) -> bool:
    return p.run("r").steps[CALL].status == "waiting"


@pytest.mark.feature("T4", "P1")
def test_a_policy_denies_a_call_and_the_agent_is_told() -> None:
    p = planned(TEA, documents=[rule("deny")])
    assert not [event for _, event in p.events if isinstance(event, ev.WaitStarted)]
    assert observed(p) == [(False, "denied by about-quotes: because")]


@pytest.mark.feature("T4", "P4")
@pytest.mark.parametrize("answer", ["approve", "reject", "nothing"])
def test_a_policy_asks_before_anybody_outside_is(answer: str) -> None:
    p = planned(TEA, documents=[rule("require_approval", expires_s=5)])
    assert (p.run("r").steps[CALL].status, p.run("r").status) == ("awaiting_approval", "waiting")
    p.command("r", "respond", step_id=CALL, value='{"cents":1}')
    assert refused(p) == ("no_such_wait", f"{CALL} waits for an approval: approve or reject it")
    if answer == "nothing":
        p.pass_time_with_heartbeats(5_000)
        assert observed(p) == [(False, "nobody answered in time")]
        return
    p.command("r", answer, step_id=CALL, by="ann", attempt=1, why="policy")
    assert is_asked(p) == (answer == "approve")
    if answer == "reject":
        assert observed(p) == [(False, "rejected by ann")]
        return
    p.command("r", "respond", step_id=CALL, value='{"cents":1}', attempt=1)
    assert observed(p) == [(True, {"cents": 1})]


@pytest.mark.feature("T4", "P2")
@pytest.mark.parametrize("end", ["respond", "reject", "time", "cancel"])
def test_money_is_set_aside_for_a_call_and_spent_or_given_back_with_its_end(end: str) -> None:
    p = planned(TEA, quote=DEAR, budget_micros=100)
    assert (is_asked(p), p.money()) == (True, (40, 0))
    if end == "time":
        p.pass_time_with_heartbeats(60_000)
    elif end == "cancel":
        p.command("r", "cancel")
    else:
        p.command("r", end, step_id=CALL, **({"value": '{"cents":1}'} if end == "respond" else {"by": "erp"}))
    assert p.money() == (0, 40 if end == "respond" else 0)
    assert not [key for key in p.ledger.attempts if key.step_id == CALL]


@pytest.mark.feature("T4", "P2")
def test_a_budget_without_room_denies_a_call() -> None:
    p = planned(TEA, quote=DEAR, budget_micros=30)
    ((ok, error),) = observed(p)
    assert not ok
    assert error.startswith("denied by budget: ")


@pytest.mark.feature("T4", "P3")
def test_a_limit_lets_calls_wait_and_the_next_is_placed_when_one_is_answered() -> None:
    limit = {"kind": "limit", "limit": "quotes", "version": "1", "where": {"name": "quote"}, "at_once": 1}
    p = planned(TEA, ("quote", {"item": "milk"}), documents=[limit])
    second = p.run("r").steps[f"{CALL}#2"]
    assert (is_asked(p), second.status) == (True, "requested")
    assert "quotes" in second.waits_for
    p.pass_time_with_heartbeats(10_000)
    assert p.run("r").steps[f"{CALL}#2"].status == "requested"
    p.command("r", "respond", step_id=CALL, value='{"cents":1}')
    assert p.run("r").steps[f"{CALL}#2"].status == "waiting"
    p.command("r", "reject", step_id=f"{CALL}#2", by="erp")
    assert (p.ledger.held, p.ledger.limited, p.ledger.waiting, p.ledger.depth) == ({}, {}, {}, {})


@pytest.mark.feature("T4", "P3")
def test_a_limit_on_executors_is_not_about_what_none_of_them_does() -> None:
    limit = {"kind": "limit", "limit": "workers", "version": "1", "per": ["instance"], "at_once": 1}
    p = planned(TEA, ("quote", {"item": "milk"}), documents=[limit])
    assert {p.run("r").steps[step_id].status for step_id in (CALL, f"{CALL}#2")} == {"waiting"}


@pytest.mark.feature("T4", "P7")
def test_a_call_takes_no_slot_and_is_lost_with_no_executor() -> None:
    p = planned(TEA, ("look", {}))
    assert p.ledger.busy == {"acme": 1}
    again = Ledger(p.ledger.partition)
    again.runs, again.attempts = p.ledger.runs, p.ledger.attempts
    derive(again)
    assert (again.busy, again.held_by) == (p.ledger.busy, p.ledger.held_by)
    p.gate.executors.watch(p.ledger.held_by)
    p.register("", 7, 10, (), ended=(EndedIncarnation(incarnation=-1, evidence="so it says"),))
    p.pass_time(50_000)
    assert is_asked(p)
    assert "PlacementLost" not in ledger_of(p)


@pytest.mark.feature("T4", "D4")
def test_while_everything_is_paused_nobody_outside_is_asked() -> None:
    p = Pair(functions=("agent:clerk", "tool:look"))
    p.start("r", definition())
    p.control("*", paused=True)
    p.answer(p.tasks.popleft(), value={"content": "", "tool_calls": [{"name": "quote", "arguments": {"item": "tea"}}]})
    assert p.run("r").steps[CALL].status == "held"
    p.control("*", paused=False)
    assert is_asked(p)


@pytest.mark.feature("T4")
def test_no_executor_answers_for_whoever_does_the_tool() -> None:
    p = planned(TEA)
    task = StepTask(
        type="run",
        run_id="r",
        step_id=CALL,
        attempt=1,
        account="acme/support",
        instance_id="worker-0",
        incarnation=1,
        source=Position(0, 0, 0),
        result_partition=0,
        idempotency_key="",
        call=None,
    )
    p.answer(task, value={"cents": 0}, actual_micros=10**6)
    assert (is_asked(p), p.seen("r")[-1], p.money()) == (True, "WaitStarted", (0, 0))


@pytest.mark.feature("T4")
def test_calls_that_began_to_wait_before_the_gate_was_asked_go_on() -> None:
    """As in logs of older releases: the wait is the first that is said of the step."""
    p = planned(TEA)
    old = p.run("r")
    wait = old.steps.pop(CALL).wait
    assert wait is not None
    apply(old, msgspec.structs.replace(wait), p.now_ms)
    assert (old.steps[CALL].attempt, old.steps[CALL].status) == (0, "waiting")
    p.command("r", "respond", step_id=CALL, value='{"cents":5}', by="erp")
    assert observed(p) == [(True, {"cents": 5})]
    assert ledger_of(p) == ["AttemptGranted"], "nothing is settled that was not asked for"
