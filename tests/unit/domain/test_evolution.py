"""Changes of a running graph: what is accepted, what is rejected and why, what conflicts, and that the log alone says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from support.pure import Pair, agent, chain, step, tool
from tidegate.domain import canonical, evolution
from tidegate.domain.evolution import MAX_BECAUSE, judge
from tidegate.domain.graph_changes import MAX_CHANGE_BYTES, MAX_CHANGES, AcceptedChange
from tidegate.domain.run import RunState, apply
from tidegate.domain.workflow import Workflow, compile_definition, evolved, validate_definition
from tidegate.scheduler import snapshots

pytestmark = pytest.mark.feature("G4")


def evolving(definition: dict[str, Any], mode: str = "optional", **rules: Any) -> dict[str, Any]:
    """Return the definition with leave to change, and a function that only changes use."""
    functions = {**definition["functions"], "extra": step()}
    return {**definition, "functions": functions, "evolution": {"mode": mode, **rules}}


def node(function: str = "extra", **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "function": function, **fields}


def change(*edges: Any, because: str = "", **nodes: Any) -> str:
    return canonical.dumps({"nodes": nodes, "edges": list(edges), "because": because})


def begun(definition: dict[str, Any], value: Any = None) -> Pair:
    p = Pair(functions=tuple(f"{found['kind']}:{name}" for name, found in definition["functions"].items()))
    p.start("r", definition, value)
    return p


def finish(p: Pair, step_id: str, value: Any = "out", **fields: Any) -> None:
    """Answer the open task of a step."""
    task = next(task for task in p.tasks if task.step_id == step_id and task.type == "run")
    p.tasks.remove(task)
    p.answer(task, value=value, **fields)


def work_on(p: Pair) -> None:
    while p.tasks:
        task = p.tasks.popleft()
        if task.type == "run":
            p.answer(task, value=f"{task.step_id} done")


def said(p: Pair, kind: str) -> list[Any]:
    return [event for _, event in p.events if type(event).__name__ == kind]


# --- what is accepted ---------------------------------------------------------------


def test_new_nodes_run_after_the_step_that_proposed_them() -> None:
    p = begun(evolving(chain("a", "b")))
    finish(p, "a", change=change(x=node(), y=node()))
    changed = p.seen("r").index("GraphChangeProposed")
    assert p.seen("r")[changed : changed + 3] == ["GraphChangeProposed", "GraphChangeAccepted", "StepSucceeded"]
    assert sorted(task.step_id for task in p.tasks) == ["b", "x", "y"]
    work_on(p)
    run = p.run("r")
    assert run.status == "succeeded"
    assert canonical.loads(run.output) == {"b": "b done", "x": "x done", "y": "y done"}


def test_a_node_can_be_put_between_two_that_are_there() -> None:
    p = begun(evolving(chain("a", "b")))
    finish(p, "a", value=1, change=change(["x", "b"], x=node()))
    assert [task.step_id for task in p.tasks] == ["x"], "b waits for what was put before it"
    finish(p, "x", value=2)
    (task,) = p.tasks
    assert canonical.loads(task.call.arguments) == {"a": 1, "x": 2}  # type: ignore[union-attr] # it is a run task
    work_on(p)
    assert p.run("r").status == "succeeded"


def test_maps_waits_and_conditions_can_be_added() -> None:
    p = begun(evolving(chain("a")))
    edges = ({"from": "a", "to": "m", "when": "output > 1"}, {"from": "a", "to": "n", "when": "output > 9"}, ["m", "w"])
    wait = {"kind": "wait_event", "wait": {"event": "go"}}
    finish(
        p,
        "a",
        value=5,
        change=change(*edges, m={"kind": "map", "function": "extra", "over": "[1, 2]"}, n=node(), w=wait),
    )
    work_on(p)
    assert p.run("r").status == "waiting"
    p.command("r", "signal", event="go", key=None, value='"gone"')
    run = p.run("r")
    assert run.status == "succeeded"
    assert canonical.loads(run.output) == {"w": "gone"}
    assert run.nodes["n"].status == "skipped"


def test_an_agent_proposes_with_its_last_plan() -> None:
    definition = evolving(chain("a"))
    definition["functions"]["a"] = agent()
    definition["nodes"]["a"]["kind"] = "agent"
    p = begun(definition)
    finish(p, "a/1", value={"output": "planned", "final": True}, change=change(x=node()))
    assert [task.step_id for task in p.tasks] == ["x"]


def test_what_was_added_may_add_more_and_each_change_counts() -> None:
    p = begun(evolving(chain("a"), max_changes=2))
    finish(p, "a", change=change(x=node()))
    finish(p, "x", change=change(y=node()))
    finish(p, "y", change=change(z=node()))
    run = p.run("r")
    assert run.status == "succeeded"
    assert [one.step_id for one in run.changes] == ["a", "x"]
    (rejected,) = said(p, "GraphChangeRejected")
    assert (rejected.step_id, rejected.code) == ("y", "too_many")


def test_a_run_s_graph_has_no_more_edges_than_can_be_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolution, "MAX_GRAPH_EDGES", 3)
    p = begun(evolving(chain("a", "b")))  # one edge
    finish(p, "a", change=change(x=node(), y=node()))
    assert [one.nodes for one in said(p, "GraphChangeAccepted")] == [("x", "y")]
    finish(p, "x", change=change(z=node()))
    (rejected,) = said(p, "GraphChangeRejected")
    assert (rejected.code, rejected.reason) == ("too_many", "the run's graph would have 4 edges, at most 3 it may")


def test_the_plan_of_an_agent_is_a_change_too() -> None:
    definition = chain("a")
    definition["functions"] = {"a": agent("t"), "t": tool(parameters={"type": "object", "required": ["x"]})}
    definition["nodes"]["a"]["kind"] = "agent"
    p = begun(definition)
    calls = [{"name": "t", "arguments": {"x": 1}}, {"name": "t", "arguments": {}}, {"name": "u"}]
    finish(p, "a/1", value={"tool_calls": calls})
    (proposed,), (accepted,), (rejected,) = (
        said(p, f"GraphChange{word}") for word in ("Proposed", "Accepted", "Rejected")
    )
    assert proposed.kind == accepted.kind == rejected.kind == "plan"
    assert proposed.nodes == ("a/1/tool:t", "a/1/tool:t#2", "a/1/tool:u")
    assert accepted.nodes == ("a/1/tool:t",)
    assert (rejected.code, rejected.nodes) == ("bad_calls", ("a/1/tool:t#2", "a/1/tool:u"))
    assert p.run("r").changes == (), "what an agent may call was said when its workflow was published"


# --- modes ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["disabled", None])
def test_without_leave_a_proposal_is_rejected_and_the_run_goes_on(mode: str | None) -> None:
    definition = evolving(chain("a", "b"), mode or "disabled")
    if mode is None:
        del definition["evolution"]
    p = begun(definition)
    finish(p, "a", change=change(x=node()))
    work_on(p)
    assert p.run("r").status == "succeeded"
    assert "x" not in p.run("r").steps
    assert [event.code for event in said(p, "GraphChangeRejected")] == ["evolution_disabled"]


def test_where_changes_are_required_a_rejected_one_fails_its_step_and_its_cost_is_settled() -> None:
    p = begun(evolving(chain("a", "b"), "required"))
    finish(p, "a", change=change(b=node()), actual_micros=7)
    run = p.run("r")
    assert (run.status, run.code) == ("failed", "change_rejected")
    assert "the definition has a node of that name" in run.reason
    assert p.money() == (0, 7)


def test_a_result_that_proposes_and_comes_twice_changes_the_graph_once() -> None:
    p = begun(evolving(chain("a")))
    task = p.tasks[0]
    finish(p, "a", change=change(x=node()))
    p.answer(task, value="out", change=change(x=node(), y=node()))
    work_on(p)
    assert [one.step_id for one in p.run("r").changes] == ["a"]
    assert "y" not in p.run("r").steps


# --- what is rejected ---------------------------------------------------------------

DIAMOND = {
    "name": "d",
    "version": "1",
    "nodes": {name: node("f") for name in "abcde"} | {"early": node("f", join="any")},
    "edges": [["a", "b"], ["a", "c"], ["b", "d"], ["c", "d"], ["b", "early"], ["c", "early"], ["early", "e"]],
    "functions": {"f": step(), "agent": agent()},
}
ROUTED = {
    "name": "r",
    "version": "1",
    "nodes": {
        "a": node("f"),
        "again": {"kind": "router", "choose": "null", "routes": ["a", "z"]},
        "z": node("f"),
        "free": node("f"),
        "after": node("f"),
    },
    "edges": [["a", "again"], {"from": "free", "to": "after", "when": "true"}],
    "functions": {"f": step()},
}


def verdict(definition: dict[str, Any], node_id: str, text: str, *accepted: AcceptedChange) -> Any:
    changed = evolving(definition)
    assert validate_definition(changed) == []
    graph = evolved(compile_definition(canonical.dumps(changed)).definition, tuple(one.change for one in accepted))
    return judge(graph, accepted, node_id, text)


@pytest.mark.parametrize(
    ("node_id", "text", "reason"),
    [
        ("b", "[", "not JSON"),
        ("b", '{"nodes":[]}', "not of type 'object'"),
        ("b", '{"more":1}', "more"),
        ("b", change(), "adds no node and no edge"),
        ("b", change(x={"kind": "dance"}), "dance"),
        ("b", change(because="x" * (MAX_BECAUSE + 1), x=node()), "because: "),
        ("b", change(x=node("unknown")), "unknown function 'unknown'"),
        ("b", change(x=node("agent")), "is a agent"),
        ("b", change(x=node(input="${ nodes.c }")), "which does not come before x"),
        ("b", change(x=node(input="${ 1 + }")), "does not compile"),
        ("b", change(a=node()), "the definition has a node of that name"),
        ("b", change(["b", "nowhere"], x=node()), "unknown node"),
        ("b", change(["x", "y"], ["y", "x"], x=node(), y=node()), "cycle"),
        ("b", change(["d", "a"]), "a need not wait for b"),
        ("b", change(["x", "c"], x=node()), "c need not wait for b"),
        ("b", change(["x", "early"], x=node()), "early need not wait for b"),
        ("b", change(["x", "e"], x=node()), "e need not wait for b"),
        ("b", change(["x", "b"], x=node()), "b need not wait for b"),
        ("b", change(["c", "x"], x=node()), "must come after b"),
        ("b", change(["x", "x"], x=node()), "cycle"),
        ("b", change({"from": "c", "to": "x", "when": "true"}, ["b", "x"], x=node()), "`when` is for edges from b"),
        ("b", change(["d", "x"], {"from": "d", "to": "x", "when": "true"}, x=node()), "twice"),
    ],
)
def test_a_change_that_does_not_fit_is_rejected_with_the_reason(node_id: str, text: str, reason: str) -> None:
    problem = verdict(DIAMOND, node_id, text).problem
    assert problem is not None
    assert problem.code == "invalid"
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("node_id", "text", "reason"),
    [
        ("a", change(x=node()), "lies in a loop"),
        ("free", change(["free", "x"], ["again", "x"], x=node()), "again chooses among its own edges"),
        ("z", change(["z", "x"], ["free", "x"], x=node()), "free chooses among its own edges"),
        (
            "z",
            change(["z", "x"], ["x", "y"], x=node(), y={"kind": "router", "choose": "null", "routes": ["free"]}),
            "free need not wait",
        ),
    ],
)
def test_what_chooses_or_repeats_is_left_alone(node_id: str, text: str, reason: str) -> None:
    problem = verdict(ROUTED, node_id, text).problem
    assert problem is not None
    assert reason in problem.reason


def test_a_change_that_is_too_large_is_not_even_recorded() -> None:
    found = verdict(DIAMOND, "b", change(x=node(input="x" * MAX_CHANGE_BYTES)))
    assert (found.change, found.nodes) == ("", ())
    assert found.problem.code == "too_large"


@pytest.mark.parametrize(
    "text",
    [
        change(["x", "d"], x=node()),
        change(["x", "d"], ["c", "x"], ["b", "x"], x=node(join="any")),
        change({"from": "b", "to": "x", "when": "true"}, x=node()),
        change(
            ["b", "x"], ["x", "y"], x=node(), y={"kind": "router", "choose": "null", "routes": ["x", "z"]}, z=node()
        ),
        change(["c", "d2"], ["b", "d2"], d2=node(input="${ nodes }")),
    ],
)
def test_a_change_that_fits_is_accepted(text: str) -> None:
    assert verdict(DIAMOND, "b", text).problem is None


def test_a_loop_of_new_nodes_runs() -> None:
    p = begun(evolving(chain("a")))
    again = {"kind": "router", "choose": "nodes.x == 'x done' ? 'x' : null", "routes": ["x"]}
    finish(p, "a", change=change(["a", "x"], ["x", "again"], x=node(), again=again))
    work_on(p)
    assert {"x", "x/2"} <= set(p.run("r").steps)
    assert p.run("r").status == "succeeded"


# --- conflicts ---------------------------------------------------------------


def parallel(mode: str = "optional") -> dict[str, Any]:
    return evolving(
        {
            "name": "p",
            "version": "1",
            "nodes": {name: node("f") for name in ("a", "b", "end")},
            "edges": [["a", "end"], ["b", "end"]],
            "functions": {"f": step()},
        },
        mode,
    )


def test_of_two_changes_that_do_not_go_together_the_one_the_log_has_first_is_in_force() -> None:
    for first, second in itertools.permutations("ab"):
        p = begun(parallel())
        finish(p, first, change=change(x=node(input=first)))
        finish(p, second, change=change(x=node(input=second)))
        (rejected,) = said(p, "GraphChangeRejected")
        assert (rejected.step_id, rejected.code, rejected.conflicts_with) == (second, "conflict", first)
        work_on(p)
        assert p.run("r").status == "succeeded"
        assert p.run("r").steps["x"].call.arguments == canonical.dumps(first)


def test_the_same_node_twice_is_no_conflict_and_runs_once() -> None:
    fingerprints = set()
    for first, second in itertools.permutations("ab"):
        p = begun(parallel())
        finish(p, first, change=change(x=node(input=1)))
        finish(p, second, change=change(x=node(input=1)))
        assert said(p, "GraphChangeRejected") == []
        work_on(p)
        assert p.run("r").status == "succeeded"
        assert [task for task in p.dispatches if task[0] == "x"] == [("x", 1)]
        fingerprints.add(p.run("r").fingerprint)
    assert len(fingerprints) == 2, "another step has caused it, which its edges say"


def test_changes_that_go_together_give_the_same_run_in_any_order() -> None:
    fingerprints = set()
    for first, second in itertools.permutations("ab"):
        p = begun(parallel())
        for name in (first, second):
            finish(p, name, change=change([f"x_{name}", "end"], **{f"x_{name}": node()}))
        work_on(p)
        assert p.run("r").status == "succeeded"
        fingerprints.add(p.run("r").fingerprint)
    assert len(fingerprints) == 1


def test_a_change_that_would_be_right_without_an_earlier_one_is_a_conflict() -> None:
    earlier = verdict(DIAMOND, "b", change(["x", "d"], x=node()))
    accepted = AcceptedChange("b", earlier.change)
    problem = verdict(
        DIAMOND, "c", change(["x2", "d"], ["c", "x2"], {"from": "x2", "to": "d", "when": "true"}), accepted
    )
    assert problem.problem.code == "invalid"
    twice = verdict(DIAMOND, "c", change(["y", "d"], ["c", "y"], y=node(input="${ nodes.d }")), accepted)
    assert twice.problem.code == "invalid"
    conditional = AcceptedChange(
        "b", verdict(DIAMOND, "b", change({"from": "b", "to": "x", "when": "true"}, x=node())).change
    )
    found = verdict(DIAMOND, "c", change(["b", "y"], ["c", "y"], y=node()), conditional).problem
    assert (found.code, found.conflicts_with) == ("conflict", "b")


# --- a person decides ---------------------------------------------------------------


def held(mode: str = "optional", **rules: Any) -> Pair:
    p = begun(evolving(chain("a", "b"), mode, approval=True, **rules))
    finish(p, "a", value="kept", change=change(x=node(), because="two parcels"), actual_micros=7)
    return p


def test_a_held_change_waits_for_a_person_its_cost_settled_and_its_slot_free() -> None:
    p = held()
    (asked,) = p.run("r").open_approvals()
    assert asked.approval is not None
    assert (asked.approval.why, asked.approval.reason) == ("change", "a wants to add x: two parcels")
    assert p.money() == (0, 7)
    assert p.run("r").status == "waiting"
    p.command("r", "approve", by="ann")
    assert sorted(task.step_id for task in p.tasks) == ["b", "x"]
    assert p.money() == (0, 7)
    work_on(p)
    assert p.run("r").status == "succeeded"
    assert p.run("r").steps["a"].output == '"kept"'


@pytest.mark.parametrize(
    ("mode", "status", "code"), [("optional", "succeeded", ""), ("required", "failed", "change_rejected")]
)
def test_a_persons_no_is_a_rejection(mode: str, status: str, code: str) -> None:
    p = held(mode)
    p.command("r", "reject", by="ann", reason="no")
    work_on(p)
    assert (p.run("r").status, p.run("r").code) == (status, code)
    assert "x" not in p.run("r").steps
    assert [event.code for event in said(p, "GraphChangeRejected")] == ["rejected"]


@pytest.mark.parametrize(
    ("mode", "status", "code"), [("optional", "succeeded", ""), ("required", "failed", "approval_expired")]
)
def test_a_question_that_nobody_answers_expires(mode: str, status: str, code: str) -> None:
    p = held(mode, expires_s=5)
    p.pass_time_with_heartbeats(4_999)
    assert p.run("r").status == "waiting"
    p.pass_time_with_heartbeats(2)
    work_on(p)
    assert (p.run("r").status, p.run("r").code) == (status, code)
    assert [event.code for event in said(p, "GraphChangeRejected")] == ["expired"]
    p.command("r", "approve", by="late")
    assert "x" not in p.run("r").steps


def test_what_was_approved_is_judged_again_against_the_graph_as_it_is_then() -> None:
    definition = parallel()
    definition["evolution"]["approval"] = True
    p = begun(definition)
    for name in "ab":
        finish(p, name, change=change(x=node(input=name)))
    p.command("r", "approve", step_id="b")
    p.command("r", "approve", step_id="a")
    (rejected,) = said(p, "GraphChangeRejected")
    assert (rejected.step_id, rejected.code, rejected.conflicts_with) == ("a", "conflict", "b")
    work_on(p)
    assert p.run("r").status == "succeeded"


def test_a_step_that_is_cancelled_while_its_change_is_held_leaves_nothing_behind() -> None:
    definition = evolving(
        {
            "name": "c",
            "version": "1",
            "nodes": {"m": {"kind": "map", "function": "f", "over": "[1, 2]"}, "n": node("f")},
            "edges": [["m", "n"]],
            "functions": {"f": step()},
            "failure_mode": "continue",
        },
        approval=True,
        max_changes=1,
    )
    p = begun(definition)
    finish(p, "m/#0", change=change(x=node()))
    task = next(task for task in p.tasks if task.step_id == "m/#1")
    p.tasks.remove(task)
    p.answer(task, "failed", error_class="E", error_message="no", retryable=False)
    run = p.run("r")
    assert run.steps["m/#0"].status == "cancelled"
    assert run.steps["m/#0"].proposal is None
    assert run.changes == ()


def test_cancel_and_pause_while_a_change_is_held() -> None:
    p = held()
    p.command("r", "pause")
    p.command("r", "approve")
    assert not p.tasks, "nothing begins while the run is paused"
    p.command("r", "resume")
    assert sorted(task.step_id for task in p.tasks) == ["b", "x"]
    other = held()
    other.command("r", "cancel")
    assert other.run("r").status == "cancelled"
    other.command("r", "approve")
    assert said(other, "GraphChangeAccepted") == []


def test_a_late_result_that_answers_the_question_may_ask_another() -> None:
    definition = evolving(chain("a"), approval=True)
    definition["functions"]["a"]["idempotent"] = False
    p = begun(definition)
    task = p.tasks.popleft()
    p.pass_time(60_000)
    assert p.run("r").steps["a"].approval.why == "outcome_unknown"  # type: ignore[union-attr] # it waits
    p.answer(task, value=1, change=change(x=node()))
    assert p.run("r").steps["a"].approval.why == "change"  # type: ignore[union-attr] # it waits
    p.register("worker-0", 2, 10, p.offered[0])
    p.command("r", "approve")
    assert [task.step_id for task in p.tasks] == ["x"]


# --- the log alone ---------------------------------------------------------------


def test_the_log_and_a_snapshot_at_any_point_give_the_same_graph() -> None:
    p = held()
    p.command("r", "approve", by="ann")
    work_on(p)
    run = p.run("r")
    folded = RunState("r", account=run.account)
    definitions = {}
    for _, event in p.events:
        apply(folded, event, 0)
        assert isinstance(folded.workflow, Workflow)
        definitions[folded.workflow.definition_hash] = folded.workflow.definition
        folded = snapshots.load(snapshots.dump(folded), definitions) if not folded.is_over else folded
    assert folded.fingerprint == run.fingerprint
    assert folded.workflow is not None
    assert run.workflow is not None
    assert folded.workflow.graph_hash == run.workflow.graph_hash != ""
    assert set(folded.workflow.document.nodes) == {"a", "b", "x"}
    assert folded.workflow.definition_hash == compile_definition(run.workflow.definition).definition_hash


def test_no_run_has_more_changes_than_fifty() -> None:
    assert MAX_CHANGES == 50
    definition = evolving(chain("a"), max_changes=51)
    assert any("51" in problem for problem in validate_definition(definition))
    assert any("expires_s" in problem for problem in validate_definition(evolving(chain("a"), expires_s=3)))


def test_a_large_change_is_judged_with_one_look_at_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is the same for all of its edges is found once, and what is wrong in itself is not looked for in other changes."""
    looks: list[str] = []

    def counted(name: str) -> None:
        real = getattr(evolution, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            looks.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(evolution, name, call)

    counted("reached")
    counted("validate_definition")
    definition = evolving(chain("a", "b"), max_changes=50)
    earlier = [
        AcceptedChange(f"s{n}", change(["a", f"n{n}"], [f"n{n}", "b"], **{f"n{n}": node("a")})) for n in range(9)
    ]
    graph = evolved(canonical.dumps(definition), tuple(one.change for one in earlier))
    many = {f"x{n}": node("a") for n in range(50)}
    edges = [[name, "b"] for name in many]
    assert judge(graph, earlier, "a", change(*edges, **many)).problem is None
    assert (looks.count("reached"), looks.count("validate_definition")) == (2, 1)
    looks.clear()
    problem = judge(graph, earlier, "a", change(*edges, ["x0", "a"], **many)).problem
    assert problem is not None
    assert (problem.code, problem.conflicts_with) == ("invalid", "")
    assert (looks.count("reached"), looks.count("validate_definition")) == (1, 1)
