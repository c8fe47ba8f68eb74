"""Agents: what follows from a plan, and from what its tool calls came to. Pure."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from tidegate.domain import canonical, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.calls import Changed, call_of
from tidegate.domain.graph_changes import PLAN
from tidegate.domain.identity import MAX_NAME_CHARACTERS, agent_turn_step, tool_call_step
from tidegate.domain.run import RunState, StepState
from tidegate.domain.workflow import Workflow

MAX_REASON: Final = 4_000


def first_turn(workflow: Workflow, agent: str, node_id: str, path: str, wave: int, value: str) -> ev.StepReady:
    """Return the step of an agent's first plan; `path` is what the step ids of this visit, item or call begin with."""
    return _turn(workflow, agent, node_id, path, 1, wave, value, [])


def is_tool_call(step: StepState) -> bool:
    """Tell whether a step is what an agent's plan calls. A tool that a flow calls is none."""
    return step.call.kind == "tool" and "/tool:" in step.step_id


def after_plan(run: RunState, workflow: Workflow, step: StepState, changed: Changed, plan: dict[str, Any]) -> list[Any]:
    """Return the steps of a plan's tool calls, or the next turn if it calls none that there is."""
    agent = step.call.function
    calls = _calls_of(workflow, agent, step.step_id, plan)
    tools = [_called(workflow, step, agent, call) for call in calls if call.problem is None]
    following = tools or [_next_turn(run, workflow, step.node_id, step.step_id, step.wave + 1, changed, "")]
    return [*_as_change(step, calls), *following]


def _as_change(step: StepState, calls: list[_PlannedCall]) -> list[Any]:
    """Return the calls of a plan as the change of the run that they are: what is proposed, and what becomes of it."""
    if not calls:
        return []
    good = tuple(call.step_id for call in calls if call.problem is None)
    bad = tuple(call.step_id for call in calls if call.problem is not None)
    nodes = tuple(call.step_id for call in calls)
    found: list[Any] = [
        ev.GraphChangeProposed(step_id=step.step_id, node_id=step.node_id, attempt=step.attempt, kind=PLAN, nodes=nodes)
    ]
    if good:
        found.append(ev.GraphChangeAccepted(step_id=step.step_id, kind=PLAN, nodes=good))
    if bad:
        why = "; ".join(f"{call.step_id}: {call.problem}" for call in calls if call.problem is not None)
        found.append(
            ev.GraphChangeRejected(
                step_id=step.step_id, kind=PLAN, code="bad_calls", reason=why[:MAX_REASON], nodes=bad
            )
        )
    return found


def _called(workflow: Workflow, step: StepState, agent: str, call: _PlannedCall) -> ev.StepReady:
    """Return the step of a tool call: one to run, or one that waits, once it is allowed, until somebody outside has answered it."""
    made = call_of(workflow, call.tool, canonical.dumps(call.arguments), agent)
    return ev.StepReady(step_id=call.step_id, node_id=step.node_id, wave=step.wave + 1, call=made)


def outside_wait(run: RunState, step: StepState) -> ev.WaitStarted:
    """Return the wait that an allowed call of an outside tool becomes. It names the call as the model did, if one made it."""
    assert run.workflow is not None  # noqa: S101 - a run with steps has its workflow
    tool = run.workflow.function(step.call.function)
    return ev.WaitStarted(
        step_id=step.step_id,
        node_id=step.node_id,
        wave=step.wave,
        kind=waits.OUTSIDE,
        input=step.call.arguments,
        function=step.call.function,
        key=_call_id(run, run.workflow, step)[: waits.MAX_KEY] if is_tool_call(step) else "",
        prompt=tool.description[: waits.MAX_PROMPT],
        schema="" if tool.output is True else canonical.dumps(tool.output),
        timeout_ms=tool.timeout_ms,
    )


def _call_id(run: RunState, workflow: Workflow, step: StepState) -> str:
    """Return what the model calls the call of its plan that a step is."""
    plan_step_id = step.step_id.rpartition("/tool:")[0]
    plan = canonical.loads(run.steps[plan_step_id].output or "{}")
    calls = _calls_of(workflow, step.call.agent, plan_step_id, plan)
    return next(call.call_id for call in calls if call.step_id == step.step_id)


def after_tool(run: RunState, workflow: Workflow, step: StepState, changed: Changed, error: str = "") -> list[Any]:
    """Return the agent's next turn if this tool call was the last one of its plan."""
    plan_step_id = step.step_id.rpartition("/tool:")[0]
    if any(
        other.status not in states.STEP_TERMINAL
        for other_id, other in run.steps.items()
        if other_id != step.step_id and other_id.startswith(plan_step_id + "/tool:")
    ):
        return []
    return [_next_turn(run, workflow, step.node_id, plan_step_id, step.wave + 1, changed, error)]


class _PlannedCall(NamedTuple):
    step_id: str
    call_id: str
    tool: str
    arguments: Any
    problem: str | None


def _calls_of(workflow: Workflow, agent: str, plan_step_id: str, plan: dict[str, Any]) -> list[_PlannedCall]:
    """Return a plan's tool calls with the step each becomes, or why it becomes none (the model is told)."""
    allowed = workflow.function(agent).tools
    counts: dict[str, int] = {}
    calls = []
    for item in plan.get("tool_calls") or ():
        tool, arguments = _name(str(item.get("name", ""))), item.get("arguments", {})
        counts[tool] = counts.get(tool, 0) + 1
        if tool not in allowed:
            problem: str | None = f"unknown tool {tool!r}; this agent may call: {', '.join(allowed) or 'none'}"
        else:
            problem = workflow.arguments_problem(tool, arguments)
        step_id = tool_call_step(plan_step_id, tool, counts[tool])
        calls.append(_PlannedCall(step_id, str(item.get("id") or ""), tool, arguments, problem))
    return calls


def _name(tool: str) -> str:
    """Return what a model calls a tool; what is longer than a name may be is no name of one, and is cut to be told so."""
    return tool if len(tool) <= MAX_NAME_CHARACTERS else tool[: MAX_NAME_CHARACTERS - 1] + "…"


def _turn(
    workflow: Workflow, agent: str, node_id: str, path: str, turn: int, wave: int, value: str, history: list[Any]
) -> ev.StepReady:
    state = f'{{"history":{canonical.dumps(history)},"input":{value},"turn":{turn}}}'
    call = call_of(workflow, agent, state, agent)
    return ev.StepReady(step_id=agent_turn_step(path, turn), node_id=node_id, wave=wave, call=call)


def _next_turn(
    run: RunState, workflow: Workflow, node_id: str, plan_step_id: str, wave: int, changed: Changed, error: str
) -> ev.StepReady:
    """Return the step of the next plan, whose State holds what the turns so far planned and observed."""
    path, _, turn = plan_step_id.rpartition("/")
    call = run.steps[plan_step_id].call
    state = canonical.loads(call.arguments)
    history = [*state["history"], _observed(run, workflow, call.function, plan_step_id, changed, error)]
    return _turn(workflow, call.function, node_id, path, int(turn) + 1, wave, canonical.dumps(state["input"]), history)


def _observed(
    run: RunState, workflow: Workflow, agent: str, plan_step_id: str, changed: Changed, error: str
) -> dict[str, Any]:
    """Return one turn as the agent sees it later: its content, and each call with what came of it."""
    text = changed.output if changed.step_id == plan_step_id else run.steps[plan_step_id].output
    plan = canonical.loads(text or "{}")
    calls = []
    for call in _calls_of(workflow, agent, plan_step_id, plan):
        output, problem = _outcome(run, call, changed, error)
        calls.append(
            {
                "id": call.call_id,
                "name": call.tool,
                "arguments": call.arguments,
                "ok": problem is None,
                "output": output,
                "error": problem,
            }
        )
    return {"content": plan.get("content", ""), "calls": calls}


def _outcome(run: RunState, call: _PlannedCall, changed: Changed, error: str) -> tuple[Any, str | None]:
    if call.problem is not None:
        return None, call.problem
    if call.step_id == changed.step_id:
        return (canonical.loads(changed.output), None) if changed.status == states.SUCCEEDED else (None, error)
    step = run.steps[call.step_id]
    return (canonical.loads(step.output or "null"), None) if step.status == states.SUCCEEDED else (None, step.error)
