"""The test kit itself: what it plays is what production would do, and is the same whenever it is played."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tidegate import App, AppError, GraphError, Plan, RetryRule, State, ToolCall, context, idempotency_key
from tidegate.domain.run import RunState
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.gate.kinds import DocumentError
from tidegate.testing import CommandRefusedError, Rehearsal

app = App("kit")
keys: list[str] = []


@app.step(retries=2, retry_rules=[RetryRule(on=["Busy"], retries=5, backoff_s=10)])
def work(value: Any) -> Any:
    keys.append(idempotency_key())
    return value


@app.step
async def wait_a_moment(value: Any) -> Any:
    await asyncio.sleep(0.001)
    return value


@app.step(queue="elsewhere")
def elsewhere(value: int) -> int:
    return value + 1


@app.tool
def look_up(name: str) -> str:
    return name.upper()


@app.agent(tools=[look_up])
def clerk(state: State) -> Plan:
    calls = [ToolCall("look_up", {"name": "a"}, id="1"), ToolCall("look_up", {"name": 7}, id="1"), ToolCall("no", {})]
    return (
        Plan(tool_calls=calls)
        if state.turn == 1
        else Plan(output=[(call.ok, call.output) for call in state.observations()])
    )


inner = app.graph("inner").node("moment", wait_a_moment).sleep("nap", seconds=5).chain("moment", "nap")
outer = app.graph("outer").node("work", work).workflow("child", inner).node("elsewhere", elsewhere)
outer.chain("work", "child", "elsewhere")
asking = app.graph("asking").workflow("child", app.graph("asked").ask("ask", prompt="?"))
mapped = app.graph("mapped").map("work", work, over="input", at_once=2)
gated = app.graph("gated").wait_event("wait", "paid").node("work", work).chain("wait", "work")
event = app.graph("event").wait_event("wait", "paid", key="${ input }", timeout_s=60)


class Busy(Exception):  # noqa: N818 - its name is what the rule says
    pass


@pytest.fixture
def rehearsal() -> Any:
    with Rehearsal(app) as made:
        yield made


def test_children_queues_and_coroutines_are_played(rehearsal: Rehearsal) -> None:
    outcome = rehearsal.run("outer", 4)
    assert (outcome.status, outcome.output) == ("succeeded", 5)
    (child,) = outcome.children
    assert rehearsal.outcome(child).output == 4
    assert rehearsal.outcome(child).steps["nap"].status == "succeeded"


def test_the_clock_stands_still_while_a_child_asks(rehearsal: Rehearsal) -> None:
    outcome = rehearsal.run("asking")
    assert outcome.status == "running"
    (child,) = outcome.children
    assert rehearsal.outcome(child).waits[0].kind == "ask"
    rehearsal.respond("fine", run_id=child)
    assert rehearsal.outcome("run-1").output == "fine"


def test_the_same_rehearsal_gives_the_same_events() -> None:
    def play() -> list[Any]:
        with Rehearsal(app) as rehearsal:
            rehearsal.stub("work", raises=Busy()).then(takes_s=3, returns=1).then(calls=lambda value: value)
            found = [rehearsal.run("mapped", [1, 2, 3]), rehearsal.run("outer", 1, account="a/b", budget_micros=5)]
            return [(one.events, one.ledger) for one in found]

    assert play() == play()


def test_what_is_played_verifies(rehearsal: Rehearsal) -> None:
    rehearsal.stub("work", lost=True).then(raises=ValueError).then(returns=1)
    rehearsal.run("outer", 1)
    rehearsal.run(agent="clerk")
    report, runs = Report(), dict[str, RunState]()
    for topic in ("run-events", "gate-ledger"):
        runs |= verify_partition(rehearsal._stage.messages(topic), report)
    assert report.problems == []
    assert {run.status for run in runs.values()} == {"succeeded"}


@pytest.mark.feature("T1")
@pytest.mark.feature("T2")
def test_agents_see_what_they_would_see(rehearsal: Rehearsal) -> None:
    assert rehearsal.run(agent="clerk").output == [[True, "A"], [False, None], [False, None]]


def test_a_stand_in_for_an_agent_is_asked_with_its_state(rehearsal: Rehearsal) -> None:
    plan = Plan(tool_calls=[ToolCall("look_up", {"name": "b"})])
    stub = rehearsal.stub("clerk", returns=plan).then(calls=lambda state: Plan(output=state.output_of("look_up")))
    assert rehearsal.run(agent="clerk").output == "B"
    assert [asked["turn"] for asked in stub.calls] == [1, 2]


@pytest.mark.feature("D2")
def test_back_off_takes_no_real_time(rehearsal: Rehearsal) -> None:
    stub = rehearsal.stub("work", raises=Busy()).then(raises=Busy()).then(raises=ValueError()).then(returns=4)
    before = rehearsal.now
    outcome = rehearsal.run("outer", 1)
    assert [event.retry_rule for event in outcome.seen("AttemptEnded")] == ["Busy", "Busy", ""]
    assert (rehearsal.now - before).total_seconds() > 15
    assert len(stub.calls) == 4


@pytest.mark.feature("T3")
def test_the_real_function_is_entered_as_by_an_executor(rehearsal: Rehearsal) -> None:
    keys.clear()
    rehearsal.run("mapped", [1, 2])
    assert len(set(keys)) == 2


def test_an_event_comes_or_its_time_is_over(rehearsal: Rehearsal) -> None:
    assert rehearsal.run("event", "k").status == "waiting"
    assert rehearsal.signal("paid", {"cents": 5}, key="k").output == {"cents": 5}
    rehearsal.run("event", "k")
    assert rehearsal.pass_time(59).status == "waiting"
    assert rehearsal.pass_time(1).code == "wait_timed_out"


def test_pausing_and_cancelling(rehearsal: Rehearsal) -> None:
    rehearsal.run("gated")
    rehearsal.pause()
    assert rehearsal.signal("paid", 1).steps["work"].status == "held"
    assert rehearsal.resume().output == 1
    rehearsal.run("event", "k")
    assert rehearsal.cancel(reason="no more").status == "cancelled"
    with pytest.raises(CommandRefusedError, match="run_is_over"):
        rehearsal.cancel()


def test_what_the_gate_holds_up_is_said() -> None:
    limit = {"kind": "limit", "limit": "slow", "version": "1", "rate_per_s": 0.1}
    with Rehearsal(app, policies=[limit]) as rehearsal:
        before = rehearsal.now
        assert rehearsal.run("mapped", [1, 2, 3]).status == "succeeded"
        assert (rehearsal.now - before).total_seconds() >= 20


def test_mistakes_of_a_test_are_named(rehearsal: Rehearsal) -> None:
    with pytest.raises(AppError, match=r"'wrok'.*known: clerk, elsewhere, look_up"):
        rehearsal.stub("wrok", returns=1)
    with pytest.raises(ValueError, match="one of returns, raises, calls and lost"):
        rehearsal.stub("work", returns=1, raises=KeyError)
    with pytest.raises(AppError, match="no workflow 'outre'"):
        rehearsal.run("outre")
    with pytest.raises(CommandRefusedError, match="priority"):
        rehearsal.run("outer", priority=77)
    with pytest.raises(DocumentError):
        rehearsal.apply({"policy": "p"})
    with pytest.raises(GraphError):
        Rehearsal(app, workflows=[{"name": "w", "version": "1", "nodes": {"n": {"function": "nobody"}}}])


def test_a_definition_from_a_file_uses_the_functions_of_the_app() -> None:
    given = {"name": "w", "version": "1", "nodes": {"n": {"function": "work"}}}
    with Rehearsal(app, workflows=[given]) as rehearsal:
        assert rehearsal.run("w", 3).output == 3


def test_inside_a_running_loop() -> None:
    async def play() -> Any:
        with Rehearsal(app) as rehearsal:
            return rehearsal.run("inner", 2).output

    assert asyncio.run(play()) == 2


def test_runs_have_ids_of_their_own_and_the_same_one_is_the_same_run(rehearsal: Rehearsal) -> None:
    ids = [rehearsal.run("inner", 1).run.run_id for _ in range(2)]
    assert ids == ["run-1", "run-2"]
    seqs = [rehearsal.run("inner", 1, run_id="mine").run.seq for _ in range(2)]
    assert all(a == b for a, b in itertools.pairwise(seqs))


@pytest.mark.feature("G7")
def test_a_function_can_ask_what_it_uses_and_what_allowed_it() -> None:
    asked = App("asked")

    @asked.tool(provider="acme", model="m-1", operation="embed", cost_micros=7)
    def see() -> list[Any]:
        here = context()
        return [here.provider, here.model, here.operation, here.agent, here.policy, here.rule, here.reserved_micros]

    @asked.agent(tools=[see])
    def looker(state: State) -> Plan:
        return Plan(tool_calls=[ToolCall("see")]) if state.turn == 1 else Plan(output=state.output_of("see"))

    policy = {"policy": "p", "version": "3", "rules": [{"name": "tools", "when": 'tool == "see"', "then": "allow"}]}
    with Rehearsal(asked, policies=[policy]) as rehearsal:
        assert rehearsal.run(agent="looker").output == ["acme", "m-1", "embed", "looker", "p@3", "tools", 7]
    with Rehearsal(asked) as rehearsal:
        assert rehearsal.run(agent="looker").output[4:6] == ["", "default"]


@pytest.mark.feature("T4")
def test_functions_run_in_this_process_whatever_isolation_is_demanded() -> None:
    apart = App("apart")

    @apart.step(isolation="subprocess")
    def first(value: int) -> int:
        seen.append(value)
        return value

    @apart.step
    def second(value: int) -> int:
        return value + 1

    seen: list[int] = []
    apart.graph("both").chain(first, second)
    rule = {"name": "apart", "when": 'name == "second"', "then": "allow", "isolation": "subprocess"}
    with Rehearsal(apart, policies=[{"policy": "p", "version": "1", "rules": [rule]}]) as rehearsal:
        outcome = rehearsal.run("both", 1)
        assert (outcome.output, seen) == (2, [1]), outcome.reason
        assert [event.isolation for event in outcome.seen("AttemptDispatched")] == ["", "subprocess"]


@pytest.mark.feature("P2")
def test_what_a_model_may_use_at_most_is_set_aside_by_the_price_table() -> None:
    priced = App("priced")

    @priced.agent(tools=[], provider="openai", model="gpt-4o", max_input_tokens=1000, max_output_tokens=100)
    def thinker(state: State) -> Plan:
        return Plan(output="done", usage={"input_tokens": 100, "output_tokens": 10})

    with Rehearsal(priced) as stage:
        outcome = stage.run(agent="thinker", input="x")
    reserved = next(event for event in outcome.ledger if type(event).__name__ == "AttemptGranted")
    assert (outcome.run.status, reserved.reserved_micros) == ("succeeded", 3500)


def test_a_stand_in_for_a_flow_gives_the_flow_s_output() -> None:
    flows = App("flows")

    @flows.step
    def plain(value: Any) -> Any:
        return value

    @flows.flow(steps=[plain])
    async def whole(value: Any) -> Any:
        return (await plain(value)).value

    flows.graph("g").node("whole", whole).node("end", plain, input="${ nodes.whole }").chain("whole", "end")
    with Rehearsal(flows) as rehearsal:
        stub = rehearsal.stub("whole", returns={"n": 7})
        assert (rehearsal.run("g", 1).output, stub.calls) == ({"n": 7}, [1])
        rehearsal.stub("whole", calls=lambda value: value + 1)
        assert rehearsal.run("g", 1).output == 2
        rehearsal.stub("whole", raises=ValueError("no"))
        outcome = rehearsal.run("g", 1)
        assert (outcome.status, outcome.steps["whole/1"].attempts) == ("failed", 1)
        assert "ValueError: no" in outcome.reason


def test_records_may_be_as_large_as_in_a_deployment() -> None:
    large = App("large")

    @large.step
    def part(number: int) -> str:
        return "x" * 400_000

    @large.step
    def sizes(parts: list[str]) -> list[int]:
        return [len(one) for one in parts]

    large.graph("g").map("m", part, over="input").node("end", sizes).chain("m", "end")
    with Rehearsal(large) as rehearsal:
        assert rehearsal.run("g", [1, 2, 3]).output == [400_000] * 3


@pytest.mark.feature("D3")
def test_an_event_with_an_empty_key_is_for_the_wait_without_one() -> None:
    """As the client sends it: without any key, the event would fit both waits, and is refused."""
    app = App("x")
    app.graph("two").wait_event("keyed", "paid", key="A-1").wait_event("plain", "paid")
    with Rehearsal(app) as rehearsal:
        rehearsal.run("two")
        with pytest.raises(CommandRefusedError, match="ambiguous_signal"):
            rehearsal.signal("paid", 1)
        rehearsal.signal("paid", 2, key="")
        assert rehearsal.signal("paid", 3, key="A-1").output == {"keyed": 3, "plain": 2}


def test_an_error_with_a_long_message_is_that_error() -> None:
    """A body in base64, say. Shown on a terminal with its traceback it would take longer than the attempt may."""
    shop = App("long")

    @shop.step(retries=0, timeout_s=10)
    def ask(value: Any) -> Any:
        raise ConnectionError("é" * 100_000)

    shop.graph("long").node("ask", ask)
    with Rehearsal(shop) as rehearsal:
        outcome = rehearsal.run("long")
    (ended,) = outcome.seen("AttemptEnded")
    assert (ended.error_class, len(ended.error_message)) == ("ConnectionError", 4000)
