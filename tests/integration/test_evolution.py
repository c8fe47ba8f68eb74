"""What must not happen to graphs that change, on a whole system whose scheduler is killed while changes are under way."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from support.stack import WholeStack, assert_whole

SCHEDULER = "scheduler-0"
CHANGE = {
    "nodes": {
        "s": {"kind": "step", "function": "wait_here", "input": 1.5},
        "more": {"kind": "step", "function": "one", "input": 40},
    },
    "edges": [["s", "more"], ["more", "end"]],
    "because": "it was asked for",
}


def evolving(name: str, evolution: dict[str, Any] | None, change: dict[str, Any] = CHANGE) -> dict[str, Any]:
    step = {"kind": "step", "function": "propose", "input": change}
    functions = {function: {"kind": "step", "timeout_ms": 60_000} for function in ("one", "wait_here", "propose")}
    return {
        "name": name,
        "version": "1",
        "nodes": {"p": step, "end": {"kind": "step", "function": "one", "input": 1}},
        "edges": [["p", "end"]],
        "functions": functions,
        "output": "${ nodes.end }",
        **({"evolution": evolution} if evolution else {}),
    }


REPLACING = {"nodes": {"end": {"kind": "step", "function": "wait_here", "input": 0}}, "edges": []}
GRAPHS = {
    "free": evolving("evolving_free", {"mode": "optional"}),
    "fixed": evolving("evolving_fixed", None),
    "asked": evolving("evolving_asked", {"mode": "required", "approval": True}),
    "late": evolving("evolving_late", {"mode": "required", "approval": True, "expires_s": 1}),
    "bad": evolving("evolving_bad", {"mode": "required"}, REPLACING),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    with WholeStack(tmp_path_factory.mktemp("evolution")) as stack:
        stack.client.publish(list(GRAPHS.values()))
        yield stack
        assert_whole(stack)


@pytest.mark.kafka
@pytest.mark.feature("G4")
def test_a_change_is_made_once_as_the_log_says_whatever_dies(whole: WholeStack) -> None:
    ids = {name: f"{name}-{uuid.uuid4().hex[:8]}" for name in GRAPHS}
    for name, run_id in ids.items():
        whole.client.start(f"evolving_{name}", run_id=run_id)
    whole.until(ids["free"], "GraphChangeAccepted")
    whole.until(ids["asked"], "ApprovalRequested")
    whole.kill(SCHEDULER)
    # What was accepted goes on as it was accepted, and what waits for a person still waits.
    free = whole.wait(ids["free"])
    assert (free.status, free.output, free.changes) == ("succeeded", 2, ("p",))
    assert [line.step_id for line in whole.entered(ids["free"])] == ["p", "s", "more", "end"]
    (question,) = whole.client.get(ids["asked"]).approvals
    assert (question.why, question.arguments["because"]) == ("change", "it was asked for")
    assert {line.step_id for line in whole.entered(ids["asked"])} == {"p"}
    whole.cli("runs", "approve", ids["asked"], "p", "--why", "change", "--by", "ann")
    whole.until(ids["asked"], "GraphChangeAccepted")
    assert whole.wait(ids["asked"]).status == "succeeded"
    assert [line.step_id for line in whole.entered(ids["asked"])] == ["p", "s", "more", "end"]
    # Nothing changes that may not, nothing is replaced, nothing is taken for a yes.
    assert whole.wait(ids["fixed"]).status == "succeeded"
    assert [line.step_id for line in whole.entered(ids["fixed"])] == ["p", "end"]
    bad, late = whole.wait(ids["bad"]), whole.wait(ids["late"])
    assert (bad.status, bad.code) == ("failed", "change_rejected")
    assert (late.status, late.code) == ("failed", "approval_expired")
    assert {line.step_id for run_id in (ids["bad"], ids["late"]) for line in whole.entered(run_id)} == {"p"}
    # People can see it.
    drawn = whole.cli("workflow", "graph", "--run", ids["free"])
    assert all(f'"{name}' in drawn for name in ("p", "s", "more", "end"))
    told = whole.cli("why", ids["fixed"], "p", "--json").splitlines()
    assert any("evolution_disabled" in json.loads(line)["said"] for line in told)
