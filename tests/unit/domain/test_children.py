"""Runs that do a step of another run, seen through scheduler and gate together, without any log."""

from __future__ import annotations

from typing import Any

import pytest

from support.graphs import NAMES, STEPS, graph
from support.pure import Pair, chain, step
from tidegate.domain import identity
from tidegate.domain.workflow import MAX_NESTING, validate_definition

CHILD = chain("b", "c")
CHILD_ID = identity.child_run_id("r", "w")


def parent(child: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a definition a -> w (the child) -> d."""
    inner = child or CHILD
    label = f"{inner['name']}@{inner['version']}"
    nodes = {"w": {"kind": "workflow", "workflow": label}, **more.pop("nodes", {})}
    return graph(("a", "w"), ("w", "d"), nodes=nodes, workflows={label: inner}, **more)


def started(definition: dict[str, Any], value: Any = 1, **fields: Any) -> Pair:
    assert validate_definition(definition) == []
    p = Pair(functions=STEPS)
    p.start("r", definition, value, **fields)
    p.answer(p.tasks.popleft(), value=10)
    return p


SAID: dict[str, Any] = {name: (lambda _, name=name: name) for name in NAMES}


@pytest.mark.feature("G2")
def test_a_child_runs_and_its_parent_goes_on_with_its_output() -> None:
    p = started(parent(), tags={"team": "x"}, account="acme/x", priority=7, prefer="near")
    child = p.run(CHILD_ID)
    assert (child.account, child.tags, child.input) == ("acme/x", {"team": "x"}, "10")
    assert (child.priority, child.prefer, child.steps["b"].call.prefer) == (7, "near", "near")
    assert (child.parent_run_id, child.parent_step_id) == ("r", "w")
    assert p.run("r").steps["w"].status == "in_child"
    p.work({"b": lambda x: x + 1, "c": lambda x: x * 2, "d": lambda x: {"got": x}})
    assert child.status == "succeeded"
    assert p.run("r").output == '{"got":22}'
    assert p.run("r").steps["d"].wave == 2
    assert not p.letters
    assert not p.ledger.runs


@pytest.mark.feature("G2")
@pytest.mark.parametrize("mode", ["fail_fast", "continue"])
def test_a_child_that_fails_fails_its_step(mode: str) -> None:
    inner = chain("b", b=step(max_attempts=1))
    p = started(parent(inner, failure_mode=mode))
    p.work({**SAID, "b": lambda _: 1 / 0})
    run = p.run("r")
    assert (run.status, run.code) == ("failed", "child_failed")
    assert "division" in run.reason
    assert CHILD_ID in run.reason
    assert p.seen("r").count("NodeSkipped") == (1 if mode == "continue" else 0)


@pytest.mark.feature("G2")
def test_cancelling_the_parent_cancels_the_child_and_what_it_runs() -> None:
    p = started(parent())
    (running,) = p.tasks
    assert (running.run_id, running.step_id) == (CHILD_ID, "b")
    p.command("r", "cancel", by="ann")
    assert p.run("r").status == p.run(CHILD_ID).status == "cancelled"
    assert p.run(CHILD_ID).cancel is not None
    assert "run r" in p.run(CHILD_ID).cancel.by  # type: ignore[union-attr]
    assert [task.type for task in p.tasks] == ["run", "cancel"]
    assert not p.letters, "that a child's end comes too late is nobody's mistake"


@pytest.mark.feature("G2")
def test_a_parent_that_fails_cancels_its_children_too() -> None:
    definition = parent(nodes={"e": {"kind": "step", "function": "e"}})
    definition["edges"].append(["a", "e"])
    p = started(definition)
    tasks = {task.step_id: task for task in p.tasks}
    p.answer(tasks["e"], "failed", error_class="E", error_message="no", retryable=False)
    assert p.run("r").status == "failed"
    assert p.run(CHILD_ID).status == "cancelled"


@pytest.mark.feature("G2")
def test_a_child_that_somebody_else_cancels_fails_its_step() -> None:
    p = started(parent())
    p.command(CHILD_ID, "cancel")
    assert (p.run("r").status, p.run("r").code) == ("failed", "child_cancelled")


@pytest.mark.feature("G2")
def test_a_child_that_cannot_start_fails_its_step_with_the_reason() -> None:
    p = started(parent({**CHILD, "input_schema": {"type": "string"}}))
    assert p.run(CHILD_ID).status == "refused"
    assert (p.run("r").status, p.run("r").code) == ("failed", "child_refused")
    assert "is not of type 'string'" in p.run("r").reason


@pytest.mark.feature("G2")
def test_a_run_that_has_taken_the_childs_id_fails_the_step_and_is_left_alone() -> None:
    p = Pair(functions=STEPS)
    p.start(CHILD_ID, chain("f"))
    p.start("r", parent())
    other, task = p.tasks
    p.answer(task, value=1)
    assert (p.run("r").status, p.run("r").code) == ("failed", "child_refused")
    assert "exists already" in p.run("r").reason
    p.answer(other, value=1)
    assert p.run(CHILD_ID).status == "succeeded"


@pytest.mark.feature("G2")
def test_every_visit_has_a_child_of_its_own() -> None:
    definition = parent()
    definition["nodes"]["d"] = {"kind": "router", "choose": "output < 2 ? 'w' : null", "routes": ["w"]}
    count = iter(range(10))
    p = started(definition)
    p.work({**SAID, "c": lambda _: next(count)})
    assert list(p.run("r").steps) == ["a", "w", "w/2", "w/3"]
    assert {identity.child_run_id("r", name) for name in ("w", "w/2", "w/3")} <= set(p.runs.runs)
    assert p.run("r").output == "2"


@pytest.mark.feature("G2")
def test_children_of_children_are_bounded_and_end_one_after_the_other() -> None:
    definition, label = chain("b"), "chain@1"
    for depth in range(MAX_NESTING):
        node = {"w": {"kind": "workflow", "workflow": label}}
        definition = {**graph(nodes=node, workflows={label: definition}), "name": f"d{depth}"}
        label = f"d{depth}@1"
    assert validate_definition(definition) == []
    p = Pair(functions=STEPS)
    p.start("r", definition)
    p.work({"b": lambda _: "deep"})
    assert p.run("r").output == '"deep"'
    assert len(p.runs.runs) == MAX_NESTING + 1
    node = {"w": {"kind": "workflow", "workflow": label}}
    assert any("deep" in problem for problem in validate_definition(graph(nodes=node, workflows={label: definition})))


@pytest.mark.feature("G2")
def test_a_childs_id_can_always_name_a_run() -> None:
    for run_id in ("r", "x" * 128):
        assert identity.is_run_id(identity.child_run_id(run_id, "w/2"))
    assert identity.child_run_id("x" * 128, "w") != identity.child_run_id("x" * 127, "w")


@pytest.mark.parametrize("step_id", ["w", "a", "nothing"])
def test_what_no_child_says_changes_nothing_or_ends_the_run_loudly(step_id: str) -> None:
    p = started(parent())
    p.command("r", "child_ended", step_id=step_id, status="succeeded", output="no JSON")
    if step_id == "w":
        assert (p.run("r").status, p.run("r").code) == ("failed", "internal_error")
        assert "not JSON" in p.run("r").reason
    else:
        assert p.run("r").status == "running"
        assert p.seen("r")[-1] == "CommandRefused"


@pytest.mark.feature("P2")
@pytest.mark.parametrize(
    ("of_parent", "of_node", "budget"), [(100, None, 100), (100, 70, 70), (50, 70, 50), (None, 70, 70)]
)
def test_a_child_has_its_parents_budget_or_the_smaller_one_of_its_node(
    of_parent: int | None, of_node: int | None, budget: int
) -> None:
    definition = parent(chain("b", "c", b=step(reserve_micros=30), c=step(reserve_micros=budget)))
    if of_node is not None:
        definition["nodes"]["w"]["budget_micros"] = of_node
    p = started(definition, budget_micros=of_parent)
    p.answer(p.tasks.popleft(), value=1, actual_micros=1)
    assert (p.run(CHILD_ID).budget_micros, p.run(CHILD_ID).code) == (budget, "denied")
    assert "budget" in p.run("r").reason
    assert p.money() == (0, 1)


@pytest.mark.feature("D4")
def test_a_pause_reaches_children_that_run_and_children_that_are_yet_to_start() -> None:
    p = started(parent())
    before = list(p.tasks)
    p.command("r", "pause", by="ann")
    assert p.run(CHILD_ID).paused is not None
    p.answer(p.tasks.popleft(), value=1)
    assert p.run(CHILD_ID).steps["c"].status == "held"
    p.command("r", "resume")
    assert p.run(CHILD_ID).paused is None
    p.work(SAID)
    assert p.run("r").status == "succeeded"
    assert len(before) == 1

    q = Pair(functions=STEPS)
    q.start("r", parent())
    q.command("r", "pause")
    q.answer(q.tasks.popleft(), value=10)
    assert q.run(CHILD_ID).steps["b"].status == "held", "it starts paused: nothing of it is asked of the gate"
    assert not q.tasks
    q.command("r", "resume")
    q.work(SAID)
    assert q.run("r").status == "succeeded"
    assert not q.letters
