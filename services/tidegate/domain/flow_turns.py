"""Flows: what follows from a turn of one, and when the next turn is due. Pure.

A flow is a function that is played from its beginning in each turn, with what its calls have brought so far, until all its
branches wait for calls that have brought nothing yet. A turn says which calls it makes and what its branches wait for; the calls
become steps: of functions, of agents with their plans and tools, runs of other workflows, waits. The next turn is due when a
branch has all that it waits for, or knows that it will not get it. Each turn is told what came at which turn, so that it is
played in the same order as the ones before.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.domain import canonical, children, states, turns, waits
from tidegate.domain import run_events as ev
from tidegate.domain.calls import Changed, call_of, wait_of
from tidegate.domain.definition_problems import FLOW_CALLS
from tidegate.domain.graph_changes import FLOW
from tidegate.domain.identity import agent_turn_step, visit_path
from tidegate.domain.run import RunState, StepState, plan_output
from tidegate.domain.stop import Stop
from tidegate.domain.workflow import Function, Workflow

MAX_CALLS: Final = 1_000  # of one turn
# Characters that all turns of a flow are told: some 700 calls one by one of 1 KiB each.
MAX_TOLD: Final = 256 * 1024 * 1024
STEP: Final = "step"  # the kind of a call that names none, as none did when steps were all that there was
CHILD: Final = "workflow"
_CHILD_SETTINGS: Final = frozenset({"input", "budget_micros"})


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
    calls, groups = value["calls"], value["waits"]
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return (
            "the calls of a turn must be a list of objects with id, function, arguments and parents, and perhaps kind"
        )
    if len(calls) > MAX_CALLS:
        return f"a turn may make at most {MAX_CALLS} calls, this one makes {len(calls)}"
    if wrong := next(filter(None, map(_settings_problem, calls)), None):
        return wrong
    before = canonical.loads(state)
    names = [*_made(before), *(call["id"] for call in calls)]
    known = set(names)
    if len(known) < len(names):
        return "two calls of a flow have one id"
    if any(parent not in known for call in calls for parent in call["parents"]):
        return "a call of a flow has a parent that was never made"
    if not isinstance(groups, list) or not groups or not all(_is_among(group, known) for group in groups):
        return "a turn must wait for calls that were made"
    told = _told(before)
    if any(told.issuperset(group) for group in groups):
        return "a turn must wait for calls that it was not told of yet"
    return None


def _is_among(group: Any, known: set[str]) -> bool:
    return isinstance(group, list) and bool(group) and all(isinstance(name, str) and name in known for name in group)


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or call.keys() - {"kind"} != {"id", "function", "arguments", "parents"}:
        return False
    name, function, parents = call["id"], call["function"], call["parents"]
    if not isinstance(name, str) or not isinstance(function, str) or not isinstance(parents, list):
        return False
    kind = kind_of(call)
    is_known = kind in (*FLOW_CALLS, CHILD) or (kind == function and kind in waits.KINDS)
    is_named_so = name == function or (name.startswith(f"{function}#") and name[len(function) + 1 :].isdecimal())
    return is_known and is_named_so and len(name) <= 80 and all(isinstance(parent, str) for parent in parents)


def kind_of(call: dict[str, Any]) -> Any:
    """Return what a call is of: a kind of function, a kind of wait, or `workflow`."""
    return call.get("kind", STEP)


def _settings_problem(call: dict[str, Any]) -> str | None:
    """Return what is wrong with what a call says besides its input."""
    kind, arguments = kind_of(call), call["arguments"]
    if kind in waits.KINDS:
        return waits.call_problem(kind, arguments)
    if kind != CHILD:
        return None
    if not isinstance(arguments, dict) or arguments.keys() - _CHILD_SETTINGS or "input" not in arguments:
        return f"the call of workflow {call['function']} must say its input, and nothing else but budget_micros"
    budget = arguments.get("budget_micros", 0)
    return None if type(budget) is int and budget >= 0 else f"budget_micros of {call['id']} must be a whole number"


def _made(state: dict[str, Any]) -> list[str]:
    return [call["id"] for turn in state["turns"] for call in turn["calls"]]


def _told(state: dict[str, Any]) -> set[str]:
    return {result["id"] for turn in state["turns"] for result in turn["results"]}


def after_turn(run: RunState, workflow: Workflow, step: StepState, changed: Changed) -> list[Any]:
    """Return the steps of the calls that a turn makes, and the next turn if it is due already. Raises Stop."""
    path = _path(run, step)
    said = canonical.loads(changed.output)
    flow = workflow.function(workflow.document.nodes[step.node_id].function)
    labels = {label.partition("@")[0]: label for label in flow.workflows}
    for call in said["calls"]:
        if wrong := _impossible(workflow, flow, call, labels):
            raise Stop("bad_output", f"flow {step.call.function} {wrong}")
    begun = [_begun(run, workflow, step, path, call, labels) for call in said["calls"]]
    return [
        *_as_change(step, path, said["calls"], labels),
        *begun,
        *_next_turn(run, workflow, step, path, changed, ""),
    ]


def _impossible(workflow: Workflow, flow: Function, call: dict[str, Any], labels: dict[str, str]) -> str:
    """Return why a call of this flow cannot be made, empty if it can. What runs somewhere checks its arguments itself."""
    name, kind = call["function"], kind_of(call)
    if kind == CHILD and name not in labels:
        return f"starts {name!r}, which is not among its `workflows`"
    if kind not in FLOW_CALLS:
        return ""
    if name not in flow.tools or workflow.function(name).kind != kind:
        return f"calls {kind} {name!r}, which is not among its `steps`"
    if workflow.function(name).outside and (problem := workflow.arguments_problem(name, call["arguments"])):
        return f"calls {kind} {name!r} with wrong arguments: {problem}"
    return ""


def after_call(run: RunState, workflow: Workflow, step: StepState, changed: Changed, error: str = "") -> list[Any]:
    """Return the next turn, if this call was what a branch has waited for and no turn is out."""
    return _next_turn(run, workflow, step, _path(run, step), changed, error)


def _path(run: RunState, step: StepState) -> str:
    """Return what the step ids of the flow begin with that a step is of: a turn, a call, or what is done for one."""
    return visit_path(step.node_id, run.nodes[step.node_id].visit)


def _begun(
    run: RunState, workflow: Workflow, step: StepState, path: str, call: dict[str, Any], labels: dict[str, str]
) -> ev.StepReady | ev.ChildStarted | ev.WaitStarted:
    """Return the event that begins a call."""
    name, kind, said = call["function"], kind_of(call), call["arguments"]
    step_id, node_id, wave = f"{path}/{call['id']}", step.node_id, step.wave + 1
    if kind in waits.KINDS:
        return wait_of(step_id, node_id, wave, kind, "null", waits.bind_values(kind, said))
    if kind == CHILD:
        child = children.Child(labels[name], said.get("budget_micros"))
        return children.started(run, workflow, node_id, step_id, wave, canonical.dumps(said["input"]), child)
    arguments = canonical.dumps(said)
    if kind == "agent":
        return turns.first_turn(workflow, name, node_id, step_id, wave, arguments)
    return ev.StepReady(step_id=step_id, node_id=node_id, wave=wave, call=call_of(workflow, name, arguments))


def _as_node(call: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """Return a call as the node that it is in the graph of the run, without what its step says."""
    name, kind = call["function"], kind_of(call)
    if kind in waits.KINDS:
        return {"kind": kind, "wait": {"event": call["arguments"]["event"]}} if kind == waits.EVENT else {"kind": kind}
    return {"kind": kind, "workflow": labels[name]} if kind == CHILD else {"kind": kind, "function": name}


def _as_change(step: StepState, path: str, calls: list[dict[str, Any]], labels: dict[str, str]) -> list[Any]:
    """Return the calls of a turn as the change of the run that they are, with edges from where their arguments come from."""
    if not calls:
        return []
    names = tuple(f"{path}/{call['id']}" for call in calls)
    nodes = {name: _as_node(call, labels) for name, call in zip(names, calls, strict=True)}
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
    latest = run.steps[_latest_turn(run, path)]
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
    text = canonical.dumps(state)
    _check_told(latest.call.function, state["turns"], text)
    return [_turn(workflow, step.node_id, path, len(state["turns"]) + 1, step.wave + 1, text)]


def _check_told(flow: str, turns: list[Any], text: str) -> None:
    """Raise Stop if all turns up to the next one, which is told this text, are told too much together."""
    if len(text) * len(turns) <= MAX_TOLD:
        return
    told = sum(len(canonical.dumps(turn)) * (len(turns) - number) for number, turn in enumerate(turns))
    if told > MAX_TOLD:
        raise Stop(
            "too_large",
            f"flow {flow}: its {len(turns) + 1} turns would be told {told} characters, at most {MAX_TOLD} in all: each is told "
            "what all calls before it gave. Let flows of their own do parts of it (`app.workflow`), or let calls give less",
        )


def _latest_turn(run: RunState, path: str) -> str:
    """Return the step id of the latest turn of a flow, or plan of an agent, whose first one there is."""
    number = 1
    while agent_turn_step(path, number + 1) in run.steps:
        number += 1
    return agent_turn_step(path, number)


def _is_due(groups: list[list[str]], waiting: list[str], results: dict[str, dict[str, Any]]) -> bool:
    """Tell whether a branch can go on: all that it waits for has come, or something of it never will."""
    if not results:
        return False
    if len(results) == len(waiting):
        return True
    for group in groups:
        came = [results[name] for name in group if name in results]
        open_ = [name for name in group if name in waiting and name not in results]
        if came and (not open_ or not all(result["ok"] for result in came)):
            return True
    return False


def _result(run: RunState, step_id: str, changed: Changed, error: str) -> dict[str, Any] | None:
    """Return what a call has come to; None while it is open."""
    if agent_turn_step(step_id, 1) in run.steps:
        step_id = _latest_turn(run, step_id)
    step = run.steps.get(step_id)
    status, output = (changed.status, changed.output) if step_id == changed.step_id else ("", "")
    if step is not None and not status:
        status, output, error = step.status, step.output or "null", step.error
    if step is None or status not in states.STEP_TERMINAL:
        return None
    if status != states.SUCCEEDED:
        return {"ok": False, "output": None, "error": error}
    value = canonical.loads(output)
    if step.call.kind == "agent":
        given = plan_output(value)
        if given is None:
            return None  # its tools are at work
        value = canonical.loads(given)
    return {"ok": True, "output": value, "error": ""}
