"""Tools that somebody outside does: a call waits, its answer is an event, and no answer counts twice, late or unfit."""

from __future__ import annotations

from typing import Any

import pytest

from support.pure import Pair, agent, tool
from tidegate.domain import canonical
from tidegate.domain import run_events as ev
from tidegate.domain.workflow import validate_definition
from tidegate.scheduler import snapshots

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


def planned(*calls: Any) -> Pair:
    """Return a run whose agent has just made these calls: (tool, arguments[, id])."""
    p = Pair(functions=("agent:clerk", "tool:look"))
    p.start("r", definition())
    listed = [{"name": name, "arguments": args, "id": more[0] if more else ""} for name, args, *more in calls]
    p.answer(p.tasks.popleft(), value={"content": "", "tool_calls": listed})
    return p


def observed(p: Pair) -> list[Any]:
    """Return what the agent sees of its calls in the turn that it is asked next, as (ok, output or error)."""
    call = p.tasks.popleft().call
    assert call is not None
    (turn,) = canonical.loads(call.arguments)["history"]
    return [(seen["ok"], seen["output"] if seen["ok"] else seen["error"]) for seen in turn["calls"]]


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
    assert not [event for event in p.ledger_events if getattr(event, "step_id", "") == wait.step_id]
    p.command("r", "respond", step_id=wait.step_id, value='{"cents":5}', by="erp")
    done = p.run("r").steps[wait.step_id]
    assert (done.status, done.output) == ("succeeded", '{"cents":5}')
    (given,) = [event for _, event in p.events if isinstance(event, ev.StepSucceeded) and event.step_id == wait.step_id]
    assert (given.given_by, given.attempt) == ("erp", 0)
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
