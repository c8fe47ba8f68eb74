"""Routers, loops and their bounds, seen through scheduler and gate together, without any log."""

from __future__ import annotations

from typing import Any

import pytest

from support.graphs import NAMES, STEPS, events, graph
from support.pure import Pair, agent
from tidegate.domain import canonical
from tidegate.domain import run_events as ev
from tidegate.domain.messages import StepResult, StepTask
from tidegate.domain.workflow import validate_definition


class Go:
    """What a step returns that chooses the next node."""

    def __init__(self, to: str, output: Any = None) -> None:
        self.to, self.output = to, output


def work(p: Pair, functions: dict[str, Any], *, last_first: bool = False) -> None:
    """Let the executor do everything, with choices."""
    for _ in range(1000):
        if not p.tasks:
            return
        task: StepTask = p.tasks.pop() if last_first else p.tasks.popleft()
        if task.call is None:
            continue
        value = functions[task.call.function](canonical.loads(task.call.arguments))
        goto, output = (value.to, value.output) if isinstance(value, Go) else ("", value)
        p._send(
            p.scheduler,
            StepResult(
                run_id=task.run_id,
                step_id=task.step_id,
                attempt=task.attempt,
                account=task.account,
                instance_id=task.instance_id,
                incarnation=task.incarnation,
                outcome="succeeded",
                output=canonical.dumps(output),
                goto=goto,
            ),
        )
        p.settle_down()
    raise AssertionError("the run does not end")


def play(definition: dict[str, Any], value: Any = None, *, last_first: bool = False, **functions: Any) -> Any:
    assert validate_definition(definition) == []
    p = Pair(functions=STEPS)
    p.start("r", definition, value)
    work(p, {name: (lambda _, name=name: name) for name in NAMES} | functions, last_first=last_first)
    return p, p.run("r")


def router(choose: str, *routes: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "router", "choose": choose, "routes": list(routes), **fields}


def routed(*routes: str, function: str = "a") -> dict[str, Any]:
    return {"kind": "step", "function": function, "routes": list(routes)}


STEP = {name: {"kind": "step", "function": name} for name in NAMES}


@pytest.mark.feature("G6")
@pytest.mark.parametrize(("kind", "way"), [("x", "b"), ("y", "c")])
def test_a_router_sends_its_input_on_to_the_node_that_it_chooses(kind: str, way: str) -> None:
    nodes = {"r": router("output.kind == 'x' ? 'b' : 'c'", "b", "c"), "b": STEP["b"], "c": STEP["c"]}
    p, run = play(graph(("a", "r"), nodes=nodes), a=lambda _: {"kind": kind}, b=lambda x: x, c=lambda x: x)
    assert run.output == f'{{"{way}":{{"kind":"{kind}"}}}}'
    assert sorted(run.steps) == ["a", way]
    assert run.steps[way].wave == 2
    assert run.hops == 1
    assert len(events(p, "NodeSkipped")) == 1


@pytest.mark.feature("G6")
def test_a_router_may_end_its_way() -> None:
    nodes = {"r": router("null", "b"), "b": STEP["b"]}
    _, run = play(graph(("a", "r"), nodes=nodes))
    assert (run.status, run.output) == ("succeeded", "null")


@pytest.mark.feature("G6")
@pytest.mark.parametrize("agent_chooses", [False, True])
def test_a_step_or_agent_chooses_the_next_node(agent_chooses: bool) -> None:
    definition = graph(nodes={"a": routed("b", "c"), "b": STEP["b"], "c": STEP["c"]})
    if agent_chooses:
        definition["nodes"]["a"] = {"kind": "agent", "function": "bot", "routes": ["b", "c"]}
        definition["functions"]["bot"] = agent()
    chosen = {"output": {"n": 1}, "goto": "c"} if agent_chooses else Go("c", {"n": 1})
    _, run = play(definition, a=lambda _: chosen, bot=lambda _: chosen, c=lambda x: x)
    assert run.output == '{"c":{"n":1}}'
    assert "b" not in run.steps


@pytest.mark.feature("G6")
@pytest.mark.parametrize(
    "definition", [graph(nodes={"a": routed("b"), "b": STEP["b"], "d": STEP["d"]}), graph(("a", "b"))]
)
def test_a_choice_that_was_not_declared_ends_the_run_loudly(definition: dict[str, Any]) -> None:
    _, run = play(definition, a=lambda _: Go("d"))
    assert (run.status, run.code) == ("failed", "bad_route")
    assert "'d'" in run.reason


@pytest.mark.feature("G6")
@pytest.mark.parametrize(("length", "code"), [(64, "bad_route"), (65, "bad_output"), (100_000, "bad_output")])
@pytest.mark.parametrize("agent_chooses", [False, True])
def test_a_choice_longer_than_a_name_is_bad_output(agent_chooses: bool, length: int, code: str) -> None:
    definition = graph(nodes={"a": routed("b"), "b": STEP["b"]})
    if agent_chooses:
        definition["nodes"]["a"] = {"kind": "agent", "function": "bot", "routes": ["b"]}
        definition["functions"]["bot"] = agent()
    _, run = play(definition, a=lambda _: Go("x" * length), bot=lambda _: {"output": 1, "goto": "x" * length})
    assert (run.status, run.code) == ("failed", code)
    assert len(run.reason) < 200


@pytest.mark.feature("G6")
@pytest.mark.parametrize("length", [64, 65, 1_000_000])
def test_a_made_up_name_of_any_length_is_an_observation(length: int) -> None:
    p = Pair(functions=("agent:bot",))
    definition = graph(nodes={"a": {"kind": "agent", "function": "bot"}})
    definition["functions"]["bot"] = agent()
    p.start("r", definition)
    p.answer(p.tasks.popleft(), value={"tool_calls": [{"name": "x" * length}, {"name": "x" * length}]})
    assert p.run("r").status == "running"
    (turn,) = p.tasks
    assert turn.call is not None
    calls = canonical.loads(turn.call.arguments)["history"][0]["calls"]
    name = "x" * 64 if length == 64 else "x" * 63 + "…"
    assert [(call["name"], call["ok"]) for call in calls] == [(name, False)] * 2
    assert all(call["error"].startswith(f"unknown tool {name!r}") for call in calls)
    (rejected,) = [event for _, event in p.events if isinstance(event, ev.GraphChangeRejected)]
    assert rejected.nodes == (f"a/1/tool:{name}", f"a/1/tool:{name}#2")


@pytest.mark.feature("G6")
def test_the_reason_of_a_bad_route_is_bounded() -> None:
    """A router chooses by an expression: nobody has looked at how long that is."""
    definition = graph(nodes={"r": router("input", "b"), "b": STEP["b"]})
    _, run = play(definition, "x" * 100_000)
    assert (run.code, len(run.reason)) == ("bad_route", 4_000)


@pytest.mark.feature("G6")
def test_a_choice_of_the_wrong_kind_ends_the_run_loudly() -> None:
    _, run = play(graph(("a", "r"), nodes={"r": router("1", "b"), "b": STEP["b"]}))
    assert (run.status, run.code) == ("failed", "bad_route")


def revising() -> dict[str, Any]:
    """a drafts, b reviews and sends back or on; c comes after."""
    return graph(("a", "b"), nodes={"b": routed("a", "c", function="b"), "c": STEP["c"]})


@pytest.mark.feature("G6")
def test_a_loop_repeats_what_led_to_its_router_under_new_step_ids() -> None:
    rounds = iter(range(100))

    def review(draft: Any) -> Go:
        return Go("a", {"better": draft}) if next(rounds) < 2 else Go("c", draft)

    definition = revising()
    definition["nodes"]["a"]["input"] = "${ hop == null ? input : [hop.router, hop.visit, hop.output.better] }"
    p, run = play(definition, "text", a=lambda x: x, b=review, c=lambda x: x)
    assert list(run.steps) == ["a", "b", "a/2", "b/2", "a/3", "b/3", "c"]
    assert run.output == '["b",3,["b",2,"text"]]'
    assert [step.wave for step in run.steps.values()] == [0, 1, 2, 3, 4, 5, 6]
    assert not events(p, "NodeSkipped")
    assert run.hops == 3


@pytest.mark.feature("G6")
def test_without_a_template_the_router_s_output_is_the_next_round_s_input() -> None:
    _, run = play(revising(), 1, a=lambda x: x + 1, b=lambda x: Go("a" if x < 5 else "c", x * 2), c=lambda x: x)
    assert run.output == "10"  # 1 + 1 = 2, doubled and back; 4 + 1 = 5, doubled and on


@pytest.mark.feature("G6")
@pytest.mark.parametrize("limit", [0, 3, 50])
def test_more_hops_than_allowed_are_refused_loudly(limit: int) -> None:
    definition = revising() if limit == 50 else {**revising(), "max_hops": limit}
    definition["max_steps"] = 1000
    _, run = play(definition, b=lambda x: Go("a", x))
    assert (run.status, run.code) == ("failed", "max_hops")
    assert str(limit) in run.reason
    assert len(run.steps) == 2 * (limit + 1)


@pytest.mark.feature("G6")
def test_steps_are_bounded_in_loops_too() -> None:
    _, run = play({**revising(), "max_hops": 1000}, b=lambda x: Go("a", x))
    assert (run.status, run.code) == ("failed", "max_steps")
    assert len(run.steps) == 50


@pytest.mark.feature("G6")
@pytest.mark.parametrize("last_first", [False, True])
def test_loops_in_loops_with_branches_maps_and_agents(last_first: bool) -> None:
    """a -> f -> (b, map m, agent g) -> c -> inner router r back to f; then outer router s back to a."""
    nodes = {
        "m": {"kind": "map", "function": "d", "over": "[1, 2]"},
        "g": {"kind": "agent", "function": "bot"},
        "c": {"kind": "step", "function": "c"},
        "r": router("output % 3 > 0 ? 'f' : 's'", "f", "s"),
        "s": router("output < 6 ? 'a' : 'h'", "a", "h"),
        "h": STEP["h"],
    }
    edges = (("a", "f"), ("f", "b"), ("f", "m"), ("f", "g"), ("b", "c"), ("m", "c"), ("g", "c"), ("c", "r"))
    definition = graph(*edges, nodes=nodes, max_steps=1000, start=["a"])
    definition["functions"]["bot"] = agent()
    count = iter(range(1, 100))
    bot = {"bot": lambda s: {"output": s["turn"]}}
    _, run = play(definition, last_first=last_first, c=lambda _: next(count), h=lambda x: x, **bot)
    assert (run.status, run.output) == ("succeeded", "6")
    assert {"a/2", "f/6", "m/6/#1", "g/6/1", "b/6", "c/6", "h"} <= set(run.steps)
    assert len(run.steps) == 2 + 6 * 6 + 1
    assert all(step.status == "succeeded" for step in run.steps.values())


@pytest.mark.feature("G6")
def test_a_loop_waits_until_a_late_branch_of_its_round_is_over() -> None:
    nodes = {"r": {**routed("a", "d", function="c"), "join": "any"}, "d": STEP["d"]}
    definition = graph(("a", "b"), ("a", "e"), ("b", "r"), ("e", "r"), nodes=nodes)
    p = Pair(functions=STEPS)
    p.start("r", definition)
    work_one = lambda goto="": _answer(p, p.tasks.popleft(), goto)  # noqa: E731
    work_one()
    (early, late) = p.tasks
    p.tasks.clear()
    _answer(p, early)
    work_one("a")
    assert "a/2" not in p.run("r").steps
    _answer(p, late)
    assert "a/2" in p.run("r").steps


def _answer(p: Pair, task: StepTask, goto: str = "") -> None:
    p.answer(task, value=1, goto=goto)


@pytest.mark.feature("G6")
def test_an_exit_in_the_middle_of_a_loop_is_open_until_the_loop_is_over() -> None:
    """a -> b(routes c, e) -> c(routes a, d): while c may go back, e is not skipped, because b may choose it next time."""
    nodes = {"b": routed("c", "e", function="b"), "c": routed("a", "d", function="c"), "d": STEP["d"], "e": STEP["e"]}
    times = iter((Go("c"), Go("e")))
    definition = graph(("a", "b"), nodes=nodes, start=["a"])
    p, run = play(definition, b=lambda _: next(times), c=lambda _: Go("a"))
    assert list(run.steps) == ["a", "b", "c", "a/2", "b/2", "e"]
    assert [(event.node_id, event.visit) for event in events(p, "NodeSkipped")] == [("c", 2), ("d", 1)]


@pytest.mark.feature("G6")
def test_an_exit_that_was_never_taken_is_skipped_when_the_loop_is_over() -> None:
    nodes = {"b": routed("c", "e", function="b"), "c": routed("a", "d", function="c"), "d": STEP["d"], "e": STEP["e"]}
    definition = graph(("a", "b"), nodes=nodes, start=["a"])
    times = iter((Go("a"), Go("d")))
    p, run = play(definition, b=lambda _: Go("c"), c=lambda _: next(times))
    assert run.status == "succeeded"
    assert list(run.steps) == ["a", "b", "c", "a/2", "b/2", "c/2", "d"]
    assert [event.node_id for event in events(p, "NodeSkipped")] == ["e"]


@pytest.mark.feature("G6")
def test_a_repeated_join_counts_the_branches_that_it_counted_first() -> None:
    """a and b lead to c, which needs one of them; b comes after c began, and stays unseen in c's second visit too."""
    nodes = {
        "c": {"kind": "step", "function": "c", "join": "any", "input": "${ has(nodes.b) ? 'b' : 'only ' + nodes.a }"},
        "d": {**routed("c", "e", function="d"), "input": "${ has(nodes.b) ? 'saw b' : nodes.c }"},
        "e": STEP["e"],
    }
    p = Pair(functions=STEPS)
    p.start("r", graph(("a", "c"), ("b", "c"), ("c", "d"), nodes=nodes))
    first, late = p.tasks
    p.tasks.clear()
    p.answer(first, value="a")
    p.answer(late, value="b")
    work(p, {"c": lambda x: x, "d": lambda x: Go("e" if p.run("r").hops else "c", x), "e": lambda x: x})
    assert p.run("r").steps["c/2"].output == '"only a"'
    assert p.run("r").steps["d/2"].output == '"only a"'


# --- what is refused before a run ---------------------------------------------------------------------------------------


@pytest.mark.feature("G1")
@pytest.mark.parametrize(
    ("definition", "part"),
    [
        (graph(("a", "b"), ("b", "a")), "a cycle keeps these nodes from ever starting: a, b"),
        (graph(("a", "b"), ("d", "b"), ("b", "c"), nodes={"c": routed("b")}), ""),
        (graph(("a", "b"), ("b", "c"), ("a", "c"), nodes={"c": routed("b")}), "a cycle"),
        (
            graph(("a", "b"), ("b", "c"), ("b", "d"), nodes={"c": routed("b")}),
            "b -> d leaves the loop from c back to b",
        ),
        (graph(nodes={"a": routed("b"), "b": routed("a")}), "which of a, b comes first? name it in `start`"),
        (graph(("a", "b"), start=["b"]), "start: b comes after a"),
        (graph(("a", "b"), start=["z"]), "start: there is no node 'z'"),
        (graph(("a", "b"), nodes={"a": routed("c"), "c": STEP["c"]}), "a node with routes has no other edges"),
        (graph(("a", "b"), nodes={"a": routed("nobody")}), "a -> nobody names an unknown node"),
        (graph(("a", "b"), nodes={"b": {"join": {"need": 2}}}), "needs 2 of the 1 edges"),
        (graph(("a", "b", "output >")), "edges.a -> b.when"),
        (
            graph(("a", "b"), ("c", "b"), nodes={"b": {"input": "${ nodes.d }"}}),
            "reads nodes.d, and there is no such node",
        ),
        (
            graph(("a", "b"), ("c", "d"), nodes={"d": {"input": "${ nodes.a }"}}),
            "reads nodes.a, which does not come before d",
        ),
        (graph(("a", "b"), ("a", "c", "nodes['b'] == 1")), "reads nodes.b, which does not come before c"),
        (graph(("a", "b"), nodes={"b": {"kind": "map", "function": "b"}}), "a node of kind map needs `over`"),
        (graph(("a", "b"), nodes={"b": {"over": "[1]"}}), "a node of kind step has no `over`"),
        (graph(("a", "b"), nodes={"b": {"kind": "router", "choose": "'a'"}}), "a node of kind router needs `routes`"),
        (graph(("a", "b"), nodes={"b": {"kind": "workflow", "workflow": "x@1"}}), "'x@1' is not among the `workflows`"),
    ],
)
def test_what_cannot_run_is_refused_with_its_place(definition: dict[str, Any], part: str) -> None:
    problems = validate_definition(definition)
    assert any(part in problem for problem in problems) if part else problems == []
