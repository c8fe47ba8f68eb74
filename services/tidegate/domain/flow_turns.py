"""Flows: what follows from a turn of one, and when the next turn is due. Pure.

A flow is a function that is played from its beginning in each turn, with what its calls have brought so far, until all its
branches wait for calls that have brought nothing yet. A turn says which calls it makes and what its branches wait for; the calls
become steps. The next turn is due when a branch has all that it waits for, or knows that it will not get it. Each turn is told
what came at which turn, so that it is played in the same order as the ones before.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.domain import canonical, states
from tidegate.domain import run_events as ev
from tidegate.domain.calls import Changed, call_of
from tidegate.domain.graph_changes import FLOW
from tidegate.domain.identity import agent_turn_step
from tidegate.domain.run import RunState, StepState
from tidegate.domain.stop import Stop
from tidegate.domain.workflow import Workflow

MAX_CALLS: Final = 1_000  # of one turn


def first_turn(workflow: Workflow, node_id: str, path: str, wave: int, value: str) -> ev.StepReady:
    """Return the step of a flow's first turn; `path` is what the step ids of this visit begin with."""
    return _turn(workflow, node_id, path, 1, wave, f'{{"input":{value},"turns":[]}}')


def _turn(workflow: Workflow, node_id: str, path: str, number: int, wave: int, state: str) -> ev.StepReady:
    function = workflow.document.nodes[node_id].function
    call = call_of(workflow, function, state)
    return ev.StepReady(step_id=agent_turn_step(path, number), node_id=node_id, wave=wave, call=call)


def problem(state: str, value: Any) -> str | None:
    """Return what is wrong with what a turn says. state: the arguments of the turn."""
    if isinstance(value, dict) and value.keys() == {"output"}:
        return None
    if not isinstance(value, dict) or value.keys() != {"calls", "waits"}:
        return "a turn of a flow says its output, or its calls and what it waits for"
    calls, waits = value["calls"], value["waits"]
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return "the calls of a turn must be a list of objects with id, function, arguments and parents"
    if len(calls) > MAX_CALLS:
        return f"a turn may make at most {MAX_CALLS} calls, this one makes {len(calls)}"
    before = canonical.loads(state)
    names = [*_made(before), *(call["id"] for call in calls)]
    known = set(names)
    if len(known) < len(names):
        return "two calls of a flow have one id"
    if any(parent not in known for call in calls for parent in call["parents"]):
        return "a call of a flow has a parent that was never made"
    groups = waits if isinstance(waits, list) else []
    if not groups or not all(_is_among(group, known) for group in groups):
        return "a turn must wait for calls that were made"
    told = _told(before)
    if any(told.issuperset(group) for group in groups):
        return "a turn must wait for calls that it was not told of yet"
    return None


def _is_among(group: Any, known: set[str]) -> bool:
    return isinstance(group, list) and bool(group) and all(isinstance(name, str) and name in known for name in group)


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or call.keys() != {"id", "function", "arguments", "parents"}:
        return False
    name, function, parents = call["id"], call["function"], call["parents"]
    if not isinstance(name, str) or not isinstance(function, str) or not isinstance(parents, list):
        return False
    is_named_so = name == function or (name.startswith(f"{function}#") and name[len(function) + 1 :].isdecimal())
    return is_named_so and len(name) <= 80 and all(isinstance(parent, str) for parent in parents)


def _made(state: dict[str, Any]) -> list[str]:
    return [call["id"] for turn in state["turns"] for call in turn["calls"]]


def _told(state: dict[str, Any]) -> set[str]:
    return {result["id"] for turn in state["turns"] for result in turn["results"]}


def after_turn(run: RunState, workflow: Workflow, step: StepState, changed: Changed) -> list[Any]:
    """Return the steps of the calls that a turn makes, and the next turn if it is due already. Raises Stop."""
    path = step.step_id.rpartition("/")[0]
    said = canonical.loads(changed.output)
    flow = workflow.document.nodes[step.node_id].function
    for call in said["calls"]:
        if call["function"] not in workflow.function(flow).tools:
            raise Stop("bad_output", f"flow {flow} calls {call['function']!r}, which is not among its `steps`")
    ready = [
        ev.StepReady(
            step_id=f"{path}/{call['id']}",
            node_id=step.node_id,
            wave=step.wave + 1,
            call=call_of(workflow, call["function"], canonical.dumps(call["arguments"])),
        )
        for call in said["calls"]
    ]
    return [*_as_change(step, path, said["calls"]), *ready, *_next_turn(run, workflow, step, path, changed, "")]


def after_call(run: RunState, workflow: Workflow, step: StepState, changed: Changed, error: str = "") -> list[Any]:
    """Return the next turn, if this call was what a branch has waited for and no turn is out."""
    path = step.step_id.rpartition("/")[0]
    return _next_turn(run, workflow, step, path, changed, error)


def _as_change(step: StepState, path: str, calls: list[dict[str, Any]]) -> list[Any]:
    """Return the calls of a turn as the change of the run that they are, with edges from where their arguments come from."""
    if not calls:
        return []
    names = tuple(f"{path}/{call['id']}" for call in calls)
    nodes = {name: {"kind": "step", "function": call["function"]} for name, call in zip(names, calls, strict=True)}
    edges = [
        [f"{path}/{parent}", name]
        for name, call in zip(names, calls, strict=True)
        for parent in dict.fromkeys(call["parents"])
    ]
    begun = {target for _, target in edges}
    edges += [[step.node_id, name] for name in names if name not in begun]
    return [
        ev.GraphChangeProposed(
            step_id=step.step_id,
            node_id=step.node_id,
            attempt=step.attempt,
            kind=FLOW,
            nodes=names,
            change=canonical.dumps({"nodes": nodes, "edges": edges, "because": ""}),
        ),
        ev.GraphChangeAccepted(step_id=step.step_id, kind=FLOW, nodes=names),
    ]


def _next_turn(
    run: RunState, workflow: Workflow, step: StepState, path: str, changed: Changed, error: str
) -> list[ev.StepReady]:
    number = 1
    while agent_turn_step(path, number + 1) in run.steps:
        number += 1
    latest = run.steps[agent_turn_step(path, number)]
    is_this = latest.step_id == changed.step_id
    if not is_this and latest.status != states.SUCCEEDED:
        return []  # a turn is out; what came meanwhile is told to the one after it
    said = canonical.loads(changed.output if is_this else latest.output or "{}")
    state = canonical.loads(latest.call.arguments)
    told = _told(state)
    waiting = [name for name in (*_made(state), *(call["id"] for call in said["calls"])) if name not in told]
    results = {}
    for name in waiting:
        result = _result(run, f"{path}/{name}", changed, error)
        if result is not None:
            results[name] = {"id": name, **result}
    if not _is_due(said["waits"], waiting, results):
        return []
    made = [
        {"id": call["id"], "function": call["function"], "hash": canonical.digest(canonical.dumps(call["arguments"]))}
        for call in said["calls"]
    ]
    state["turns"].append({"calls": made, "results": list(results.values())})
    return [_turn(workflow, step.node_id, path, number + 1, step.wave + 1, canonical.dumps(state))]


def _is_due(waits: list[list[str]], waiting: list[str], results: dict[str, dict[str, Any]]) -> bool:
    """Tell whether a branch can go on: all that it waits for has come, or something of it never will."""
    if not results:
        return False
    if len(results) == len(waiting):
        return True
    for group in waits:
        came = [results[name] for name in group if name in results]
        open_ = [name for name in group if name in waiting and name not in results]
        if came and (not open_ or not all(result["ok"] for result in came)):
            return True
    return False


def _result(run: RunState, step_id: str, changed: Changed, error: str) -> dict[str, Any] | None:
    if step_id == changed.step_id:
        ok = changed.status == states.SUCCEEDED
        return {"ok": ok, "output": canonical.loads(changed.output) if ok else None, "error": error}
    step = run.steps.get(step_id)
    if step is None or step.status not in states.STEP_TERMINAL:
        return None
    ok = step.status == states.SUCCEEDED
    return {
        "ok": ok,
        "output": canonical.loads(step.output or "null") if ok else None,
        "error": "" if ok else step.error,
    }
