"""Families: a run, the runs that do steps of it, and theirs, spend one budget."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from support.pure import Pair, chain, step
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.identity import child_run_id
from tidegate.domain.messages import Authorise, Call, CloseRun, GateRequest, OpenRun
from tidegate.gate.fold import apply, derive
from tidegate.gate.ledger import Ledger
from tidegate.gate.snapshots import dump, load

FUNCTIONS = ("step:a", "step:b", "step:c")


def child(name: str, *nodes: str, **settings: Any) -> dict[str, Any]:
    return {**chain(*nodes, **{node: step(**settings) for node in nodes}), "name": name}


def parent(
    children: dict[str, dict[str, Any]], *, budgets: dict[str, int] | None = None, **settings: Any
) -> dict[str, Any]:
    """Return a definition of a step `a`, after which all children begin at once."""
    nodes: dict[str, Any] = {"a": {"kind": "step", "function": "a"}}
    for name, definition in children.items():
        node = nodes[name] = {"kind": "workflow", "workflow": f"{definition['name']}@1"}
        if budgets and name in budgets:
            node["budget_micros"] = budgets[name]
    return {
        "name": "parent",
        "version": "1",
        "nodes": nodes,
        "edges": [["a", name] for name in children],
        "functions": {"a": step(**settings)},
        "workflows": {f"{definition['name']}@1": definition for definition in children.values()},
    }


def pair_of_family(**documents: Any) -> Pair:
    pair = Pair(functions=FUNCTIONS)
    for document in documents.values():
        pair.policy(document)
    return pair


def refused(pair: Pair) -> list[ev.AttemptRefused]:
    return [event for event in pair.ledger_events if isinstance(event, ev.AttemptRefused)]


def finish(pair: Pair, micros: int) -> None:
    """Let everything that there is to do succeed, at these costs."""
    while pair.tasks:
        task = pair.tasks.popleft()
        pair.answer(task, "cancelled" if task.type == "cancel" else "succeeded", 1, actual_micros=micros)


@pytest.mark.feature("P2", "G2")
def test_children_spend_what_their_parent_may_spend_and_not_as_much_again() -> None:
    pair = pair_of_family()
    two = {"left": child("leaf", "b", reserve_micros=40), "right": child("leaf", "b", reserve_micros=40)}
    pair.start("r", parent(two, reserve_micros=40), budget_micros=100)
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=40)
    assert [(task.run_id, task.step_id) for task in pair.tasks if task.type == "run"] == [
        (child_run_id("r", "left"), "b")
    ]
    denied = refused(pair)
    assert [(event.run_id, event.rule, event.policy) for event in denied] == [
        (child_run_id("r", "right"), "budget", "")
    ]
    assert json.loads(denied[0].values) == {
        "run": "r",
        "meter": "micros",
        "needed": 40,
        "limit": 100,
        "spent": 40,
        "reserved": 40,
    }
    assert denied[0].reason == (
        "the budget of run r, which this run is a part of: needs 40 micro-dollars; of 100, 40 are spent and 40 reserved"
    )


@pytest.mark.feature("P2", "G2")
def test_what_children_spent_counts_for_the_steps_of_their_parent_also_when_they_are_over() -> None:
    pair = pair_of_family()
    definition = parent({"w": child("leaf", "b", reserve_micros=60)}, reserve_micros=0)
    definition["nodes"]["c"] = {"kind": "step", "function": "c"}
    definition["edges"].append(["w", "c"])
    definition["functions"]["c"] = step(reserve_micros=50)
    pair.start("r", definition, budget_micros=100)
    finish(pair, 30)
    assert [(event.run_id, event.step_id) for event in refused(pair)] == [("r", "c")]
    assert (
        "the run's own budget: needs 50 micro-dollars; of 100, 60 are spent and 0 reserved" in refused(pair)[-1].reason
    )


@pytest.mark.feature("P2", "G2")
def test_the_budget_of_a_node_bounds_all_that_is_below_it() -> None:
    pair = pair_of_family()
    leaf = child("leaf", "b", reserve_micros=30)
    middle = {**parent({"x": leaf, "y": leaf}, reserve_micros=10), "name": "middle"}
    pair.start("r", parent({"m": middle}, budgets={"m": 60}), budget_micros=1_000)
    pair.answer(pair.tasks.popleft(), value=1)
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=10)
    middle_id = child_run_id("r", "m")
    assert [task.run_id for task in pair.tasks if task.type == "run"] == [child_run_id(middle_id, "x")]
    assert [event.run_id for event in refused(pair)] == [child_run_id(middle_id, "y")]
    assert json.loads(refused(pair)[0].values)["run"] == middle_id


@pytest.mark.feature("P2", "G2")
def test_a_budget_per_run_counts_a_family_together_and_ends_with_it() -> None:
    pair = pair_of_family(
        each={"kind": "budget", "budget": "each", "version": "1", "window": "run", "limits": {"calls": 2}}
    )
    two = {"left": child("leaf", "b"), "right": child("leaf", "b")}
    pair.start("r", parent(two))
    pair.answer(pair.tasks.popleft(), value=1)
    assert list(pair.ledger.buckets) == ["each|acme|run:r"]
    assert [event.rule for event in refused(pair)] == ["budget:each"]
    finish(pair, 0)
    assert pair.ledger.buckets == {}
    assert pair.ledger.of_run == {}
    over = [event.run_id for event in pair.ledger_events if isinstance(event, ev.FamilyOver)]
    assert sorted(over) == sorted(["r", child_run_id("r", "left"), child_run_id("r", "right")])
    assert over[-1] == "r"
    assert pair.ledger.runs == {}
    assert pair.ledger.below == {}
    assert pair.ledger.families_over == {}


def test_a_run_that_is_alone_leaves_no_trace_of_families() -> None:
    pair = pair_of_family()
    pair.start("r", chain("a", a=step(reserve_micros=5)), budget_micros=10)
    finish(pair, 5)
    assert not [event for event in pair.ledger_events if isinstance(event, ev.FamilyOver)]
    assert pair.ledger.runs == {}
    assert pair.ledger.below == {}


# --- messages that overtake each other ----------------------------------------------------------------------------------


CALL = Call(
    kind="step", function="b", queue="default", arguments="{}", timeout_ms=1, reserve_micros=40, idempotent=True
)


def ask(pair: Pair, run_id: str, *items: Any) -> None:
    pair._send(pair.gate, GateRequest(run_id=run_id, account="acme/x", source=Position(0, 0, 0), items=items))
    pair.settle_down()


def opened(parent_run_id: str = "", budget_micros: int | None = None, *, has_children: bool = False) -> OpenRun:
    return OpenRun(
        budget_micros=budget_micros, workflow="w@1", tags={}, parent_run_id=parent_run_id, has_children=has_children
    )


def names(pair: Pair, run_id: str) -> list[str]:
    return [type(event).__name__ for event in pair.ledger_events if getattr(event, "run_id", "") == run_id]


@pytest.mark.feature("P2", "G2")
def test_a_child_that_the_gate_hears_of_first_waits_for_its_parent() -> None:
    pair = pair_of_family()
    ask(pair, "grandchild", opened("child"), Authorise(step_id="s", attempt=1, call=CALL))
    ask(pair, "child", opened("r", has_children=True), Authorise(step_id="s", attempt=1, call=CALL))
    assert not pair.tasks
    ask(pair, "r", opened("", 50, has_children=True))
    assert [task.run_id for task in pair.tasks if task.type == "run"] == ["grandchild"]
    assert names(pair, "child")[-1] == "AttemptRefused"
    paused = next(event for event in pair.ledger_events if isinstance(event, ev.AttemptPaused))
    assert (paused.rule, paused.bucket) == ("family", "family:child")


@pytest.mark.feature("P2", "G2")
@pytest.mark.parametrize("has_children", [True, False])  # without: opened by a gate that knew nothing of families
def test_nothing_begins_below_a_run_that_is_over(has_children: bool) -> None:
    pair = pair_of_family(
        each={"kind": "budget", "budget": "each", "version": "1", "window": "run", "limits": {"calls": 1}}
    )
    ask(pair, "r", opened("", 50, has_children=has_children), Authorise(step_id="s", attempt=1, call=CALL))
    ask(pair, "r", CloseRun())
    ask(pair, "child", opened("r"), Authorise(step_id="s", attempt=1, call=CALL))
    assert names(pair, "child")[-1] == "AttemptPaused"
    finish(pair, 40)
    assert names(pair, "child")[-1] == "AttemptPaused"
    ask(pair, "child", CloseRun())
    pair.command("x", "nothing")
    assert [task.run_id for task in pair.tasks if task.type == "run"] == []


# --- the fold -----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2", "L2")
@pytest.mark.parametrize("seed", range(30))
def test_what_is_below_a_run_is_the_same_from_snapshots_of_different_times(seed: int) -> None:
    rng = random.Random(seed)
    pair = pair_of_family()
    leaf = child("leaf", "b", reserve_micros=30)
    middle = {**parent({"x": leaf, "y": leaf}, reserve_micros=10), "name": "middle"}
    for number in range(3):
        pair.start(f"r{number}", parent({"m": middle, "l": leaf}), budget_micros=rng.choice((None, 100, 40)))
    for _ in range(rng.randint(0, 40)):
        if pair.tasks:
            task = pair.tasks[rng.randrange(len(pair.tasks))]
            pair.tasks.remove(task)
            outcome = "cancelled" if task.type == "cancel" else rng.choice(("succeeded", "succeeded", "failed"))
            pair.answer(task, outcome, 1, actual_micros=rng.choice((0, 10, 30)), retryable=False)
    dumps: list[dict[str, bytes]] = [{}]
    ledger = Ledger(0)
    for seq, event in enumerate(pair.ledger_events, 1):
        apply(ledger, event, seq)
        dumps.append({unit: dump(ledger, unit) for unit in ledger.runs})
    assert ledger.below == pair.ledger.below
    first = rng.randint(0, len(dumps) - 1)
    units = {unit for there in dumps for unit in there}
    as_of = {unit: rng.randint(first, len(dumps) - 1) for unit in sorted(units)}
    restored = Ledger(0)
    for unit, at in as_of.items():
        if unit in dumps[at]:
            load(restored, unit, dumps[at][unit])
    derive(restored)
    for seq, event in enumerate(pair.ledger_events[first:], first + 1):
        units_of_event = pair.gate.units_of("ledger-0", event)
        covered = {unit for unit in units_of_event if seq <= as_of.get(unit, 0)}
        if not covered.issuperset(units_of_event):
            apply(restored, event, seq, 0, covered)
    for name in ("runs", "attempts", "below", "families_over", "held_by"):
        assert getattr(restored, name) == getattr(ledger, name), name


@pytest.mark.feature("P2")
def test_a_grandchild_whose_state_comes_before_its_parents_is_put_below_both() -> None:
    """Snapshots lie in the order in which they were written last, and requests of different runs overtake each other."""
    live = Ledger(0)
    for seq, (run_id, above) in enumerate((("g", "p"), ("p", "top"), ("top", "")), 1):
        named = {"account": "acme", "run_id": run_id, "budget_micros": None, "workflow": "w@1", "tags": {}}
        apply(live, ev.RunOpened(**named, parent_run_id=above, has_children=run_id != "g"), seq, 1_000)
    restored = Ledger(0)
    for run_id in live.runs:
        load(restored, run_id, dump(live, run_id))
    derive(restored)
    assert restored.below == live.below
    assert restored.below["top"].going == 2
