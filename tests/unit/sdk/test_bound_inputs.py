"""Where each input came from: expression, what it read, and what that was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate import App, Plan, State, ToolCall
from tidegate.cli.why import shown_input
from tidegate.sdk.bound_inputs import BoundInput
from tidegate.testing import Outcome, Rehearsal

app = App("bound")


@app.step
def same(value: Any) -> Any:
    return value


@app.step
def bump(n: int) -> int:
    return n + 1


@app.tool
def look(n: int) -> int:
    return n


@app.agent(tools=[look])
def clerk(state: State) -> Plan:
    return Plan(tool_calls=[ToolCall("look", {"n": 1})]) if state.turn == 1 else Plan(output=state.input)


graph = app.graph("graph").node("first", same)
graph.node(
    "second",
    same,
    input={"id": "${ input.id + '-' + string(nodes.first.n) }", "fixed": "input", "more": ["${ nodes.first }"]},
)
graph.node("joined", same).map("each", same, over="[nodes.first.n, 2]", input={"it": "${ item }"})
graph.ask("ask", prompt="${ 'is ' + input.id + ' good?' }", timeout_s=5, timeout_value="${ nodes.first.n }")
graph.node("clerk", clerk, input="${ input.id }").node("constant", same, input=7)
for source, target in (
    ("first", "second"),
    ("second", "joined"),
    ("first", "joined"),
    ("first", "each"),
    ("first", "ask"),
):
    graph.edge(source, target)


@app.flow(steps=[bump])
async def twice(n: int) -> int:
    first = await bump(n)  # type: ignore[misc]  # in a flow, calls are awaited
    return (await bump(first)).value  # type: ignore[misc]


app.graph("flowing").node("twice", twice, input="${ input.n }")
loop = app.graph("loop").node("go", bump).router("again", "output < 3 ? 'go' : null", routes=["go"]).edge("go", "again")


def played(workflow: str, value: Any) -> Outcome:
    with Rehearsal(app) as rehearsal:
        rehearsal.run(workflow, value)
        outcome = rehearsal.pass_time(6)
        assert outcome.status == "succeeded", outcome.reason
        return outcome


@pytest.fixture(scope="module")
def run() -> Outcome:
    return played("graph", {"id": "A", "n": 4})


FIRST = {"id": "A", "n": 4}


@pytest.mark.feature("G7")
@pytest.mark.feature("L7")
@pytest.mark.parametrize(
    ("step_id", "parts"),
    [
        ("first", [BoundInput("", "", ("input",), FIRST)]),
        (
            "second",
            [
                BoundInput("id", "input.id + '-' + string(nodes.first.n)", ("input", "nodes.first"), "A-4"),
                BoundInput("more[0]", "nodes.first", ("nodes.first",), FIRST),
            ],
        ),
        (
            "each/#1",
            [BoundInput("item", "[nodes.first.n, 2]", ("nodes.first",), None), BoundInput("it", "item", ("item",), 2)],
        ),
        (
            "ask",
            [
                BoundInput("timeout_value", "nodes.first.n", ("nodes.first",), 4),
                BoundInput("prompt", "'is ' + input.id + ' good?'", ("input",), "is A good?"),
            ],
        ),
        ("clerk/1", [BoundInput("", "input.id", ("input",), "A")]),
        ("clerk/1/tool:look", [BoundInput("", "", ("the plan of clerk/1",), {"n": 1})]),
        ("constant", [BoundInput("", "", ("the definition",), 7)]),
    ],
)
def test_each_part_of_an_input_says_where_it_is_from(run: Outcome, step_id: str, parts: list[BoundInput]) -> None:
    assert run.steps[step_id].bound == tuple(parts)


def test_the_outputs_that_a_join_counted_are_named(run: Outcome) -> None:
    (part,) = run.steps["joined"].bound
    assert part.sources == ("nodes.second", "nodes.first")
    assert set(part.value) == {"first", "second"}


def test_a_later_turn_names_what_it_saw(run: Outcome) -> None:
    first, second = run.steps["clerk/2"].bound
    assert (first.part, first.value, second.part) == ("input", "A", "history")
    assert second.value[0]["calls"][0]["output"] == 1


def test_turns_and_calls_of_a_flow_say_what_they_were_given() -> None:
    steps = played("flowing", {"n": 4}).steps
    assert steps["twice/1"].bound == (BoundInput("", "input.n", ("input",), 4),)
    first, second = steps["twice/2"].bound
    assert (first.part, first.sources, first.value) == ("input", ("input of twice/1",), 4)
    assert (second.part, second.sources) == ("turns", ("calls and results of twice before turn 2",))
    assert second.value[0]["results"][0]["output"] == 5
    assert steps["twice/bump#2"].bound == (BoundInput("", "", ("the call in flow twice",), 5),)


def test_tools_and_waits_that_a_flow_calls_say_what_they_were_called_with() -> None:
    app = App("calling")
    sign = app.outside_tool("sign")

    @app.tool
    def look(n: int) -> int:
        return n

    @app.flow(steps=[look, sign])
    async def all_kinds(n: int) -> None:
        await look(n)  # type: ignore[misc]  # in a flow, calls are awaited
        await app.sleep(2)
        await app.wait_event("paid", key="k", timeout_s=5, timeout_value={"never": 1})
        await app.ask("sure?", choices=["yes", "no"], timeout_s=5, timeout_value="no")
        await sign(paper="will")

    with Rehearsal(app) as rehearsal:
        rehearsal.run("all_kinds", 3)
        rehearsal.pass_time(5)
        steps = rehearsal.pass_time(5).steps
    said = {
        "look": {"n": 3},
        "sleep": {"seconds": 2.0},
        "wait_event": {"event": "paid", "key": "k", "timeout_s": 5.0, "timeout_value": {"never": 1}},
        "ask": {"prompt": "sure?", "choices": ["yes", "no"], "timeout_s": 5.0, "timeout_value": "no"},
        "sign": {"paper": "will"},
    }
    for name, value in said.items():
        assert steps[f"all_kinds/{name}"].bound == (BoundInput("", "", ("the call in flow all_kinds",), value),)


def test_a_round_of_a_loop_names_the_router_that_led_back() -> None:
    steps = played("loop", 1).steps
    assert [part.sources for name in ("go", "go/2") for part in steps[name].bound] == [("input",), ("nodes.again",)]


def test_it_is_said_for_people(run: Outcome) -> None:
    lines = [shown_input(part) for part in run.steps["second"].bound]
    assert lines[0] == "input id = input.id + '-' + string(nodes.first.n) from input, nodes.first\n    it was \"A-4\""
    large = shown_input(BoundInput("", "", (), ["x" * 1000]))
    assert len(large) < 600
    assert large.startswith("input\n    it was " + json.dumps(["x" * 10])[:8])
