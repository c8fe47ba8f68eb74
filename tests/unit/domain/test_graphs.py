"""Conditions, joins, failure modes and aggregation, seen through scheduler and gate together, without any log."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from support.graphs import NAMES, STEPS, events, graph
from support.pure import Pair, agent, tool
from tidegate.domain import run_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.messages import Denied, GateDecision
from tidegate.domain.workflow import validate_definition
from tidegate.scheduler import decide, snapshots


def play(definition: dict[str, Any], value: Any = None, **functions: Any) -> Any:
    """Run a definition whose steps say their name, unless told otherwise; returns the run."""
    assert validate_definition(definition) == []
    p = Pair(functions=STEPS)
    p.start("r", definition, value)
    said = {name: (lambda _, name=name: name) for name in NAMES} | functions
    p.work(said)
    return p, p.run("r")


def fails(_: Any) -> None:
    raise ValueError("no luck")


# --- conditions ---------------------------------------------------------------------------------------------------------

CHOICE = (("a", "b", "output.big"), ("a", "c", "!output.big"), ("b", "d"), ("c", "d"))


@pytest.mark.feature("G2")
@pytest.mark.parametrize(("big", "way"), [(True, "b"), (False, "c")])
def test_an_edge_that_is_not_taken_skips_what_only_it_leads_to(big: bool, way: str) -> None:
    p, run = play(graph(*CHOICE), a=lambda _: {"big": big}, d=lambda x: x)
    assert run.status == "succeeded"
    assert run.output == f'{{"{way}":"{way}"}}'
    assert sorted(run.steps) == ["a", way, "d"]
    (skipped,) = events(p, "NodeSkipped")
    assert (skipped.node_id, skipped.reason, skipped.wave) == ({"b": "c", "c": "b"}[way], "not_taken", 1)
    (chosen,) = events(p, "PathsChosen")
    assert chosen.targets == (way,)


@pytest.mark.feature("G2")
def test_skipping_flows_downstream_and_a_run_of_nothing_but_skips_ends() -> None:
    p, run = play(graph(("a", "b", "false"), ("b", "c"), ("c", "d"), ("b", "d")))
    assert run.status == "succeeded"
    assert run.output == "null"
    assert [event.node_id for event in events(p, "NodeSkipped")] == ["b", "c", "d"]
    assert list(run.steps) == ["a"]


@pytest.mark.feature("G2")
def test_a_condition_sees_input_output_and_what_came_before() -> None:
    definition = graph(("a", "b"), ("b", "c", "input.limit > nodes.a && output == 'b'"))
    _, run = play(definition, {"limit": 3}, a=lambda _: 2)
    assert run.output == '"c"'
    _, run = play(definition, {"limit": 1}, a=lambda _: 2)
    assert run.output == "null"


@pytest.mark.feature("G2")
@pytest.mark.parametrize(("when", "word"), [("output + 1", "true or false"), ("output.nothing", "nothing")])
def test_a_condition_that_fails_ends_the_run_with_its_place(when: str, word: str) -> None:
    _, run = play(graph(("a", "b", when), failure_mode="continue"), a=lambda _: 1)
    assert (run.status, run.code) == ("failed", "condition_failed")
    assert "a -> b" in run.reason
    assert word in run.reason


# --- joins --------------------------------------------------------------------------------------------------------------

FAN = (("a", "b"), ("a", "c"), ("a", "d"), ("b", "e"), ("c", "e"), ("d", "e"))


def fan(join: Any, *edges: Any, **more: Any) -> dict[str, Any]:
    return graph(*(edges or FAN), nodes={"e": {"join": join}}, **more)


@pytest.mark.feature("G2")
@pytest.mark.parametrize(("join", "need"), [("any", 1), ({"need": 2}, 2), ({"need": 3}, 3), ("all", 3)])
def test_a_join_begins_when_enough_came_and_late_branches_are_recorded_and_not_used(join: Any, need: int) -> None:
    p = Pair(functions=STEPS)
    p.start("r", fan(join))
    p.answer(p.tasks.popleft(), value="a")
    branches = {task.step_id: task for task in p.tasks}
    p.tasks.clear()
    order = ["c", "d", "b"]
    for count, name in enumerate(order, 1):
        assert ("e" in p.run("r").steps) == (count > need)
        p.answer(branches[name], value=name)
    (task,) = p.tasks
    assert task.call is not None
    assert task.call.arguments == "{" + ",".join(f'"{name}":"{name}"' for name in sorted(order[:need])) + "}"
    p.work({"e": lambda _: "end"})
    run = p.run("r")
    assert (run.status, run.output) == ("succeeded", '"end"')
    assert run.steps["b"].output == '"b"'


@pytest.mark.feature("G2")
def test_a_run_is_over_only_when_late_branches_are() -> None:
    p = Pair(functions=STEPS)
    p.start("r", graph(("a", "c"), ("b", "c"), nodes={"c": {"join": "any"}}))
    first, late = p.tasks
    p.tasks.clear()
    p.answer(first, value=1)
    p.answer(p.tasks.popleft(), value="end")
    assert p.run("r").status == "running"
    p.answer(late, value=2)
    assert p.run("r").status == "succeeded"
    assert p.seen("r").count("NodeJoined") == 1


@pytest.mark.feature("G2")
def test_a_node_behind_an_early_join_sees_only_what_led_to_it() -> None:
    definition = graph(("a", "c"), ("b", "c"), ("c", "d"), nodes={"c": {"join": "any"}})
    definition["nodes"]["d"]["input"] = "${ has(nodes.b) ? 'saw the late one' : nodes.a }"
    p = Pair(functions=STEPS)
    p.start("r", definition)
    first, late = p.tasks
    p.tasks.clear()
    p.answer(first, value="first")
    joined = p.tasks.popleft()
    p.answer(late, value="late")
    p.answer(joined, value="c")
    p.work({"d": lambda x: x})
    assert p.run("r").output == '"first"'


@pytest.mark.feature("G2")
def test_a_join_that_too_few_edges_lead_to_is_skipped() -> None:
    edges = (("a", "b", "true"), ("a", "c", "false"), ("a", "d", "false"), ("b", "e"), ("c", "e"), ("d", "e"))
    p, run = play(fan({"need": 2}, *edges))
    assert run.status == "succeeded"
    assert [event.node_id for event in events(p, "NodeSkipped")] == ["c", "d", "e"]


# --- failure modes ------------------------------------------------------------------------------------------------------


@pytest.mark.feature("G5")
def test_failing_fast_cancels_what_is_open() -> None:
    p = Pair(functions=STEPS)
    p.start("r", graph(("a", "c"), ("b", "d")))
    first, other = p.tasks
    p.tasks.clear()
    p.answer(first, "failed", error_class="E", error_message="no", retryable=False)
    assert p.run("r").status == "failed"
    assert p.run("r").steps["b"].status == "cancelled"
    assert [task.type for task in p.tasks] == ["cancel"]
    p.answer(other, value=1)
    assert sorted(p.run("r").steps) == ["a", "b"]


@pytest.mark.feature("G5")
def test_children_of_a_failed_node_never_run_and_independent_branches_do() -> None:
    edges = (("a", "b"), ("b", "c"), ("d", "e"), ("e", "f"), ("c", "g"), ("f", "g"))
    p, run = play(graph(*edges, failure_mode="continue"), b=fails)
    assert (run.status, run.code) == ("failed", "attempts_exhausted")
    assert "step b" in run.reason
    assert sorted(run.steps) == ["a", "b", "d", "e", "f"]
    assert {e.node_id: e.reason for e in events(p, "NodeSkipped")} == {"c": "upstream_failed", "g": "upstream_failed"}
    (failed,) = events(p, "NodeFailed")
    assert not failed.tolerated


@pytest.mark.feature("G5")
def test_a_join_that_needs_fewer_goes_on_after_a_failure() -> None:
    p, run = play(fan({"need": 2}, failure_mode="continue"), b=fails, e=lambda x: x)
    assert run.status == "failed"
    assert run.steps["e"].output == '{"c":"c","d":"d"}'
    assert not events(p, "NodeSkipped")


@pytest.mark.feature("G5")
def test_a_node_may_say_for_itself_what_its_failure_means() -> None:
    tolerant = graph(("a", "b"), ("a", "c"), nodes={"b": {"on_failure": "continue"}})
    p, run = play(tolerant, b=fails)
    assert (run.status, run.output) == ("succeeded", '{"c":"c"}')
    assert [event.tolerated for event in events(p, "NodeFailed")] == [True]
    strict = graph(("a", "b"), ("a", "c"), ("c", "d"), nodes={"b": {"on_failure": "fail"}}, failure_mode="continue")
    _, run = play(strict, b=fails)
    assert run.status == "failed"
    assert "d" not in run.steps


@pytest.mark.feature("G5")
def test_a_run_may_choose_its_failure_mode() -> None:
    for mode, ran in (("", False), ("continue", True), ("fail_fast", False)):
        p = Pair(functions=STEPS)
        p.start("r", graph(("a", "b"), ("c", "d")), failure_mode=mode)
        p.work({name: (lambda _, name=name: name) for name in NAMES} | {"a": fails})
        assert p.run("r").status == "failed"
        assert ("d" in p.run("r").steps) == ran


@pytest.mark.feature("G5")
@pytest.mark.parametrize(
    ("aggregate", "output"),
    [
        (None, '{"b":"b"}'),
        ("success_only", '{"b":"b"}'),
        ("latest", '"b"'),
        ("all", '{"b":{"output":"b","status":"succeeded"},"c":{"output":null,"status":"failed"}}'),
    ],
)
def test_results_are_aggregated_as_declared(aggregate: str | None, output: str) -> None:
    definition = graph(("a", "b"), ("a", "c"), failure_mode="continue", success="any")
    if aggregate:
        definition["aggregate"] = aggregate
    _, run = play(definition, c=fails)
    assert (run.status, run.output) == ("succeeded", output)


@pytest.mark.feature("G5")
def test_a_failed_run_has_an_output_only_if_it_says_how_results_are_aggregated() -> None:
    for aggregate, output in ((None, ""), ("success_only", '{"b":"b"}')):
        definition = graph(("a", "b"), ("a", "c"), failure_mode="continue")
        if aggregate:
            definition["aggregate"] = aggregate
        _, run = play(definition, c=fails)
        assert (run.status, run.output) == ("failed", output)


# --- maps ---------------------------------------------------------------------------------------------------------------


def mapped(**fields: Any) -> dict[str, Any]:
    node = {"kind": "map", "function": "b", "over": "nodes.a", **fields}
    return graph(("a", "m"), ("m", "c"), nodes={"m": node})


@pytest.mark.feature("G2")
def test_a_map_runs_a_few_items_at_a_time_and_keeps_their_order() -> None:
    p = Pair(functions=STEPS)
    p.start("r", mapped(at_once=2))
    p.answer(p.tasks.popleft(), value=[10, 20, 30, 40, 50])
    seen = []
    while p.run("r").steps.get("c") is None:
        assert len(p.tasks) <= 2
        task = p.tasks.pop()  # the younger one first: 1, 2, 3, 4, 0
        assert task.call is not None
        seen.append(task.step_id)
        p.answer(task, value=int(task.call.arguments) + 1)
    assert seen == ["m/#1", "m/#2", "m/#3", "m/#4", "m/#0"]
    p.work({"c": lambda x: x})
    run = p.run("r")
    assert run.output == "[11,21,31,41,51]"
    assert {step.wave for step_id, step in run.steps.items() if step_id.startswith("m/")} == {1}
    assert run.steps["c"].wave == 2


@pytest.mark.feature("G2")
def test_a_map_over_nothing_gives_nothing_and_goes_on() -> None:
    _, run = play(mapped(), a=lambda _: [], c=lambda x: x)
    assert (run.status, run.output) == ("succeeded", "[]")


@pytest.mark.feature("G2")
@pytest.mark.parametrize(
    ("items", "code"), [("text", "binding_failed"), (list(range(6)), "too_many_items"), (None, "binding_failed")]
)
def test_what_is_no_list_or_too_long_is_refused_loudly(items: Any, code: str) -> None:
    _, run = play(mapped(max_items=5), a=lambda _: items)
    assert (run.status, run.code) == ("failed", code)
    assert "node m" in run.reason


@pytest.mark.feature("G2")
def test_items_are_bound_with_their_number() -> None:
    definition = mapped(input={"is": "${ item.name }", "n": "${ index }", "of": "${ input }"})
    _, run = play(definition, "run", a=lambda _: [{"name": "x"}, {"name": "y"}], b=lambda x: x, c=lambda x: x)
    assert run.output == '[{"is":"x","n":0,"of":"run"},{"is":"y","n":1,"of":"run"}]'


@pytest.mark.feature("G5")
@pytest.mark.parametrize(("results", "output"), [("all", "[1,null,3]"), ("success_only", "[1,3]")])
def test_failed_items_are_left_out_or_null_if_the_map_goes_on(results: str, output: str) -> None:
    def no_two(x: int) -> int:
        return x if x != 2 else fails(x)  # type: ignore[func-returns-value]

    _, run = play(mapped(on_item_failure="continue", results=results), a=lambda _: [1, 2, 3], b=no_two, c=lambda x: x)
    assert (run.status, run.output) == ("succeeded", output)


@pytest.mark.feature("G5")
def test_a_message_about_several_items_is_decided_without_changing_the_map() -> None:
    """Only what is logged changes a run: an entry may be refused, and its partition given away."""
    p = Pair(functions=STEPS)
    p.start("r", mapped(at_once=2, on_item_failure="continue"))
    p.unheard = deque()
    p.answer(p.tasks.popleft(), value=[1, 2, 3, 4])
    run = p.run("r")
    denied = [
        Denied(step_id=f"m/#{number}", attempt=1, rule="no", policy="p@1", reason="no", values="") for number in (0, 1)
    ]
    before = snapshots.dump(run)
    decided = decide.on_decision(run, GateDecision(run_id="r", source=Position(0, 1, 0), items=tuple(denied)))
    assert [event.step_id for event in decided if isinstance(event, ev.StepReady)] == ["m/#2", "m/#3"]
    assert snapshots.dump(run) == before


@pytest.mark.feature("G5")
def test_a_failed_item_fails_its_map_and_cancels_the_other_items() -> None:
    p = Pair(functions=STEPS)
    definition = mapped(at_once=3)
    definition["nodes"]["d"] = {"kind": "step", "function": "d"}
    definition["edges"].append(["a", "d"])
    p.start("r", definition, failure_mode="continue")
    p.answer(p.tasks.popleft(), value=[1, 2, 3, 4])
    tasks = {task.step_id: task for task in p.tasks}
    p.tasks.clear()
    p.answer(tasks["m/#1"], "failed", error_class="E", error_message="no", retryable=False)
    run = p.run("r")
    assert run.status == "running"
    assert {i: run.steps[f"m/#{i}"].status for i in range(3)} == {0: "cancelled", 1: "failed", 2: "cancelled"}
    assert "m/#3" not in run.steps
    assert sorted(task.step_id for task in p.tasks if task.type == "cancel") == ["m/#0", "m/#2"]
    p.answer(tasks["d"], value="d")
    assert run.status == "failed"
    assert "m/#1" in run.reason
    assert [event.node_id for event in events(p, "NodeSkipped")] == ["c"]


@pytest.mark.feature("P2")
def test_a_cancelled_item_whose_executor_is_lost_keeps_nothing_set_aside_though_its_run_goes_on() -> None:
    """Found by simulation: the run does not answer the loss of a step that it has cancelled, so its gate must not wait for that."""
    p = Pair(functions=STEPS)
    definition = mapped(at_once=2)
    definition["nodes"]["d"] = {"kind": "step", "function": "d"}
    definition["edges"].append(["a", "d"])
    definition["functions"]["b"]["reserve_micros"] = 5
    p.start("r", definition, failure_mode="continue")
    p.answer(p.tasks.popleft(), value=[1, 2])
    tasks = {task.step_id: task for task in p.tasks}
    p.answer(tasks["m/#1"], "failed", error_class="E", error_message="no", retryable=False)
    assert p.run("r").steps["m/#0"].status == "cancelled"
    p.register("worker-1", 2, 5, STEPS)
    p.register("worker-0", 1, 1, STEPS, state="gone")
    assert p.money() == (0, 0)
    for task in [task for task in p.tasks if task.step_id == "d"][1:]:
        p.answer(task, value="d")
    assert p.run("r").status == "failed"
    assert not p.ledger.runs
    assert not p.ledger.attempts


@pytest.mark.feature("G2")
def test_a_map_may_ask_an_agent_about_each_item() -> None:
    definition = mapped(function="bot", at_once=1)
    definition["functions"] |= {"bot": agent("look"), "look": tool()}
    _, run = play(
        definition,
        a=lambda _: ["x", "y"],
        bot=lambda s: (
            {"tool_calls": [{"name": "look", "arguments": {"q": s["input"]}}]}
            if s["turn"] == 1
            else {"output": s["history"][0]["calls"][0]["output"]}
        ),
        look=lambda x: x["q"] * 2,
        c=lambda x: x,
    )
    assert run.output == '["xx","yy"]'
    assert "m/#1/1/tool:look" in run.steps
    assert run.steps["c"].wave == run.steps["m/#1/2"].wave + 1 == 4


@pytest.mark.feature("G6")
def test_items_count_as_steps() -> None:
    _, run = play({**mapped(), "max_steps": 5}, a=lambda _: [1, 2, 3, 4, 5])
    assert (run.status, run.code) == ("failed", "max_steps")
