"""What must not happen to graphs, on a whole system whose scheduler is killed while they are under way."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from support.stack import WholeStack, assert_whole
from tidegate import PublishConflictError
from tidegate.domain.identity import child_run_id

SCHEDULER = "scheduler-0"


def step(name: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "function": name, **fields}


def definition(name: str, nodes: dict[str, Any], edges: list[Any], **more: Any) -> dict[str, Any]:
    """Return a workflow of functions of the fault app; `wait_here` takes as many seconds as it is given."""
    functions = {function: {"kind": "step", "timeout_ms": 60_000} for function in ("one", "wait_here", "fail_for_good")}
    return {"name": name, "version": "1", "nodes": nodes, "edges": edges, "functions": functions, **more}


SLOW = definition("graphs_slow", {"s": step("wait_here", input=1.5), "one": step("one", input=1)}, [["s", "one"]])
LONG = {**SLOW, "name": "graphs_long", "nodes": {"s": step("wait_here", input=50)}, "edges": []}
LEFT = definition(
    "graphs_left", {"w": {"kind": "workflow", "workflow": "graphs_long@1"}}, [], workflows={"graphs_long@1": LONG}
)
FAMILY = definition(
    "graphs_family",
    {"w": {"kind": "workflow", "workflow": "graphs_slow@1"}, "end": step("one")},
    [["w", "end"]],
    workflows={"graphs_slow@1": SLOW},
)
HALF = definition(
    "graphs_half",
    {
        "bad": step("fail_for_good"),
        "after": step("one"),
        "s": step("wait_here", input=1.5),
        "one": step("one", input=1),
    },
    [["bad", "after"], ["s", "one"]],
    failure_mode="continue",
    aggregate="all",
)
ROUND = definition(
    "graphs_round",
    {"n": step("one"), "r": {"kind": "router", "choose": "'n'", "routes": ["n"]}},
    [["n", "r"]],
    max_hops=4,
)
EACH = definition(
    "graphs_each",
    {
        "m": {"kind": "map", "function": "wait_here", "over": "[0.5, 0.5, 0.5, 0.5]", "at_once": 2},
        "many": step("one", input="${ size(nodes.m) }"),
        "none": step("one"),
    },
    [{"from": "m", "to": "many", "when": "size(output) > 3"}, {"from": "m", "to": "none", "when": "size(output) < 3"}],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    with WholeStack(tmp_path_factory.mktemp("graphs")) as stack:
        stack.client.publish([FAMILY, LEFT, HALF, ROUND, EACH])
        yield stack
        assert_whole(stack)


@pytest.mark.kafka
@pytest.mark.feature("G1")
@pytest.mark.feature("G2")
@pytest.mark.feature("G5")
@pytest.mark.feature("G6")
def test_a_scheduler_that_dies_and_another_definition_change_nothing(whole: WholeStack) -> None:
    ids = {name: f"{name}-{uuid.uuid4().hex[:8]}" for name in ("family", "left", "half", "round", "each")}
    for name, run_id in ids.items():
        whole.client.start(f"graphs_{name}", 1, run_id=run_id)
    child, left_child = (child_run_id(ids[name], "w") for name in ("family", "left"))
    for run_id in (child, left_child, ids["half"], ids["each"]):
        whole.until(run_id, "AttemptDispatched")
    whole.kill(SCHEDULER)
    # G1: under way, a workflow goes on as it began; under the same name and version there is no other.
    with pytest.raises(PublishConflictError):
        whole.client.publish([{**FAMILY, "output": "another"}])
    whole.client.publish([{**FAMILY, "version": "2", "output": "another"}])
    whole.client.cancel(ids["left"], reason="not needed")
    # G2: the child's end resumes the parent, the parent's end takes the child along, the map's items come in order.
    family = whole.wait(ids["family"])
    assert (family.status, family.output, family.workflow) == ("succeeded", 3, "graphs_family@1")
    assert whole.wait(child).status == "succeeded"
    assert {whole.wait(run_id).status for run_id in (ids["left"], left_child)} == {"cancelled"}
    each = whole.wait(ids["each"])
    assert (each.status, each.output) == ("succeeded", {"many": 5})
    # G5: what depends on the failed node never ran, also after the restart; the other branch did.
    half = whole.wait(ids["half"])
    assert half.status == "failed"
    assert {line.step_id for line in whole.entered(ids["half"])} == {"bad", "s", "one"}
    # G6: it ends, and says why.
    hops = whole.wait(ids["round"])
    assert (hops.status, hops.code) == ("failed", "max_hops")
    assert [line.step_id for line in whole.entered(ids["round"])] == ["n", "n/2", "n/3", "n/4", "n/5"]
