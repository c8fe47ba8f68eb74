"""What follows from what: the events after a start, a success, a failure. Pure; the state is only looked at.

Each function answers for the state *as if* the event that it follows had been applied already: that step's new status and
output are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import canonical, expressions, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.fingerprint import fingerprint
from tidegate.domain.identity import agent_turn_step, tool_call_step
from tidegate.domain.messages import Call
from tidegate.domain.run import RunState, StepState, node_output
from tidegate.domain.workflow import Workflow

# What one input may make a run hand out, or end with. Every entry and every message that follows from it must fit into a
# record (16 MiB) together with the output that caused it: an entry that cannot be written would stop its owner for good.
MAX_CALLS_BYTES: Final = 6 * 1024 * 1024
# How many steps of a run may be open at once: one input can end them all, or ask for them all, in one entry with one message
# for each.
MAX_OPEN_STEPS: Final = 2_000


class Changed(NamedTuple):
    """The step that the answered event has just moved, with its new status and output."""

    step_id: str
    status: str
    output: str


class _Stop(Exception):  # noqa: N818 - control flow inside this module: the run cannot go on
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Outputs:
    """Outputs and final waves of completed nodes, with one more than the state knows."""

    __slots__ = ("_more", "_nodes")

    def __init__(self, nodes: Mapping[str, tuple[str, int]], more: Mapping[str, tuple[str, int]]) -> None:
        self._nodes = nodes
        self._more = more

    def get(self, node_id: str) -> tuple[str, int] | None:
        return self._more.get(node_id) or self._nodes.get(node_id)

    def count(self) -> int:
        return len(self._nodes) + sum(1 for node in self._more if node not in self._nodes)

    def values(self) -> dict[str, Any]:
        return {node: canonical.loads(text) for node, (text, _) in {**self._nodes, **self._more}.items()}


def first_steps(run_id: str, workflow: Workflow, run_input: str) -> list[Any]:
    """Return the events that follow `RunStarted`: the root nodes' steps, or the end if their input cannot be bound."""
    run = RunState(run_id)
    run.workflow = workflow
    run.input = run_input
    try:
        return _limited(run, _ready(run, workflow.roots, _Outputs({}, {})))
    except _Stop as stop:
        return _finish(run, None, states.FAILED, "", stop.code, stop.reason)


def after_success(run: RunState, step: StepState, output: str) -> list[Any]:
    """Return the events that follow a step's success: next steps, the agent's next turn, or the end of the run."""
    changed = Changed(step.step_id, states.SUCCEEDED, output)
    try:
        if step.call.kind == "step" or step.call.kind in waits.KINDS:
            return _after_node(run, step, changed, output)
        if step.call.kind == "agent":
            return _after_plan(run, step, changed, canonical.loads(output))
        return _after_tool(run, step, changed)
    except _Stop as stop:
        return _finish(run, changed, states.FAILED, "", stop.code, stop.reason)


def after_failure(run: RunState, step: StepState, code: str, reason: str) -> list[Any]:
    """Return the events that follow `StepFailed`: an observation for the agent that called the tool, or the run's failure."""
    changed = Changed(step.step_id, states.FAILED, "")
    if step.call.kind != "tool":
        return _finish(run, changed, states.FAILED, "", code, f"step {step.step_id}: {reason}")
    try:
        return _after_tool(run, step, changed, reason)
    except _Stop as stop:
        return _finish(run, changed, states.FAILED, "", stop.code, stop.reason)


def broken(run: RunState, step: StepState, reason: str) -> list[Any]:
    """Return the events that end a run because nobody could decide what follows from this step's attempt."""
    return _finish(run, Changed(step.step_id, states.FAILED, ""), states.FAILED, "", "internal_error", reason)


def cancelled(run: RunState, reason: str) -> list[Any]:
    """Return the events that follow `RunCancelRequested`: every open step and the run are cancelled."""
    return _finish(run, None, states.CANCELLED, "", "cancelled", reason)


# --- nodes ---------------------------------------------------------------


def _workflow(run: RunState) -> Workflow:
    assert run.workflow is not None  # noqa: S101 - a run that has steps has a workflow
    return run.workflow


def _after_node(run: RunState, step: StepState, changed: Changed, output: str) -> list[Any]:
    workflow = _workflow(run)
    outputs = _Outputs(run.nodes, {step.node_id: (output, step.wave)})
    if outputs.count() == len(workflow.document.nodes):
        run_output = _run_output(run, outputs)
        _check_size([run_output], "the output of the run")
        return _finish(run, changed, states.SUCCEEDED, run_output, "", "")
    ready = [
        target
        for target in workflow.successors[step.node_id]
        if all(outputs.get(before) is not None for before in workflow.predecessors[target])
    ]
    return _limited(run, _ready(run, ready, outputs))


def _ready(run: RunState, node_ids: Iterable[str], outputs: _Outputs) -> list[Any]:
    workflow = _workflow(run)
    events: list[Any] = []
    for node_id in node_ids:
        node = workflow.document.nodes[node_id]
        before = [outputs.get(other) for other in workflow.predecessors[node_id]]
        wave = 1 + max((done[1] for done in before if done is not None), default=-1)
        if node.kind in waits.KINDS:
            events.append(_wait(run, node_id, wave, outputs))
            continue
        value = _bound_input(run, node_id, outputs)
        if node.kind == "agent":
            events.append(_turn(workflow, node_id, 1, wave, value, []))
        else:
            events.append(
                ev.StepReady(step_id=node_id, node_id=node_id, wave=wave, call=_call(workflow, node.function, value))
            )
    return events


def _wait(run: RunState, node_id: str, wave: int, outputs: _Outputs) -> ev.WaitStarted:
    """Return the beginning of a wait. Its times are reckoned later: nothing here knows what time it is."""
    node = _workflow(run).document.nodes[node_id]

    def variables() -> dict[str, Any]:
        return {"input": canonical.loads(run.input), "nodes": outputs.values()}

    try:
        bound = waits.bind(
            node.kind, node.wait, f"wait of node {node_id}", lambda value: expressions.render(value, variables)
        )
    except (waits.WaitError, expressions.ExpressionError, canonical.NotJsonError) as error:
        raise _Stop("binding_failed", f"wait of node {node_id}: {error}") from None
    return ev.WaitStarted(
        step_id=node_id,
        node_id=node_id,
        wave=wave,
        kind=node.kind,
        input=_bound_input(run, node_id, outputs) if node.kind in waits.TIMES else "null",
        **msgspec.structs.asdict(bound),
    )


def _bound_input(run: RunState, node_id: str, outputs: _Outputs) -> str:
    """Return the node's input as canonical JSON. Raises _Stop if its template fails."""
    workflow = _workflow(run)
    template = workflow.document.nodes[node_id].input
    before = workflow.predecessors[node_id]
    if template is msgspec.UNSET:
        if not before:
            return run.input
        texts = {other: (outputs.get(other) or ("null", 0))[0] for other in before}
        if len(before) == 1:
            return texts[before[0]]
        return "{" + ",".join(f"{canonical.dumps(other)}:{texts[other]}" for other in sorted(before)) + "}"
    return _rendered(run, template, outputs, f"input of node {node_id}")


def _run_output(run: RunState, outputs: _Outputs) -> str:
    workflow = _workflow(run)
    template = workflow.document.output
    if template is not msgspec.UNSET:
        return _rendered(run, template, outputs, "output")
    sinks = {node_id: (outputs.get(node_id) or ("null", 0))[0] for node_id in workflow.sinks}
    if len(sinks) == 1:
        return next(iter(sinks.values()))
    return "{" + ",".join(f"{canonical.dumps(node)}:{sinks[node]}" for node in sorted(sinks)) + "}"


def _rendered(run: RunState, template: Any, outputs: _Outputs, where: str) -> str:
    def variables() -> dict[str, Any]:
        return {"input": canonical.loads(run.input), "nodes": outputs.values()}

    try:
        return canonical.dumps(expressions.render(template, variables))
    except (expressions.ExpressionError, canonical.NotJsonError) as error:
        raise _Stop("binding_failed", f"{where}: {error}") from None


def _call(workflow: Workflow, function: str, arguments: str) -> Call:
    settings = workflow.function(function)
    return Call(
        kind=settings.kind,
        function=function,
        queue=settings.queue,
        arguments=arguments,
        timeout_ms=settings.timeout_ms,
        reserve_micros=settings.reserve_micros,
        idempotent=settings.idempotent,
        provider=settings.provider,
        model=settings.model,
        operation=settings.operation,
        prefer=settings.prefer,
    )


def _limited(run: RunState, events: list[Any]) -> list[Any]:
    limit = _workflow(run).document.max_steps
    if len(run.steps) + len(events) > limit:
        raise _Stop("max_steps", f"the run would need more than {limit} steps (`max_steps` of its definition)")
    if len(events) > 1 and len(run.steps) + len(events) > MAX_OPEN_STEPS:  # a chain never has more than before
        count = len(events) + sum(step.status not in states.STEP_TERMINAL for step in run.steps.values())
        if count > MAX_OPEN_STEPS:
            raise _Stop("too_wide", f"the run would have {count} steps open at once, at most {MAX_OPEN_STEPS} may be")
    _check_size(
        [text for event in events for text in _texts(event)],
        f"the input of {len(events)} steps that are ready together",
    )
    return events


def _texts(event: ev.StepReady | ev.WaitStarted) -> tuple[str, ...]:
    """Return what of a new step's event may be large."""
    if isinstance(event, ev.StepReady):
        return (event.call.arguments,)
    return event.input, event.timeout_value, event.schema, event.prompt, *event.choices


def _check_size(texts: list[str], what: str) -> None:
    if sum(map(len, texts)) * 4 <= MAX_CALLS_BYTES:  # no character takes more than four bytes
        return
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_CALLS_BYTES:
        raise _Stop(
            "too_large", f"{what} has {size} bytes, at most {MAX_CALLS_BYTES} are allowed: keep large values elsewhere"
        )


# --- agents ---------------------------------------------------------------


def _after_plan(run: RunState, step: StepState, changed: Changed, plan: dict[str, Any]) -> list[Any]:
    done = node_output(run, step, changed.output)
    if done is not None:
        return _after_node(run, step, changed, done)
    workflow = _workflow(run)
    agent = workflow.document.nodes[step.node_id].function
    tools = [
        ev.StepReady(
            step_id=call.step_id,
            node_id=step.node_id,
            wave=step.wave + 1,
            call=_call(workflow, call.tool, canonical.dumps(call.arguments)),
        )
        for call in _calls_of(workflow, agent, step.step_id, plan)
        if call.problem is None
    ]
    return _limited(run, tools or [_next_turn(run, step.node_id, _turn_of(step.step_id), step.wave + 1, changed, "")])


def _after_tool(run: RunState, step: StepState, changed: Changed, error: str = "") -> list[Any]:
    plan_step_id = step.step_id.rpartition("/tool:")[0]
    if any(
        other.status not in states.STEP_TERMINAL
        for other_id, other in run.steps.items()
        if other_id != step.step_id and other_id.startswith(plan_step_id + "/tool:")
    ):
        return []
    return _limited(run, [_next_turn(run, step.node_id, _turn_of(plan_step_id), step.wave + 1, changed, error)])


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
        tool, arguments = str(item.get("name", "")), item.get("arguments", {})
        counts[tool] = counts.get(tool, 0) + 1
        if tool not in allowed:
            problem: str | None = f"unknown tool {tool!r}; this agent may call: {', '.join(allowed) or 'none'}"
        else:
            problem = workflow.arguments_problem(tool, arguments)
        step_id = tool_call_step(plan_step_id, tool, counts[tool])
        calls.append(_PlannedCall(step_id, str(item.get("id") or ""), tool, arguments, problem))
    return calls


def _turn_of(plan_step_id: str) -> int:
    return int(plan_step_id.rpartition("/")[2])


def _turn(workflow: Workflow, node_id: str, turn: int, wave: int, value: str, history: list[Any]) -> ev.StepReady:
    state = f'{{"history":{canonical.dumps(history)},"input":{value},"turn":{turn}}}'
    function = workflow.document.nodes[node_id].function
    return ev.StepReady(
        step_id=agent_turn_step(node_id, turn), node_id=node_id, wave=wave, call=_call(workflow, function, state)
    )


def _next_turn(run: RunState, node_id: str, turn: int, wave: int, changed: Changed, error: str) -> ev.StepReady:
    """Return the step of turn + 1, whose State holds what the turns so far planned and observed."""
    workflow = _workflow(run)
    state = canonical.loads(run.steps[agent_turn_step(node_id, turn)].call.arguments)
    history = [*state["history"], _observed(run, workflow, node_id, turn, changed, error)]
    return _turn(workflow, node_id, turn + 1, wave, canonical.dumps(state["input"]), history)


def _observed(
    run: RunState, workflow: Workflow, node_id: str, turn: int, changed: Changed, error: str
) -> dict[str, Any]:
    """Return one turn as the agent sees it later: its content, and each call with what came of it."""
    plan_step_id = agent_turn_step(node_id, turn)
    text = changed.output if changed.step_id == plan_step_id else run.steps[plan_step_id].output
    plan = canonical.loads(text or "{}")
    agent = workflow.document.nodes[node_id].function
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


# --- the end ---------------------------------------------------------------


def _finish(run: RunState, changed: Changed | None, status: str, output: str, code: str, reason: str) -> list[Any]:
    """Return the cancellation of every step that is still open, and the end of the run."""
    finals = {step_id: (step.status, step.output or "") for step_id, step in run.steps.items()}
    if changed is not None:
        finals[changed.step_id] = (changed.status, changed.output)
    events: list[Any] = []
    for step_id in sorted(finals):
        if finals[step_id][0] not in states.STEP_TERMINAL:
            events.append(ev.StepCancelled(step_id=step_id, attempt=_attempt_out(run.steps[step_id])))
            finals[step_id] = (states.CANCELLED, "")
    mark = fingerprint(
        _workflow(run).definition_hash,
        run.input,
        ((step_id, *final) for step_id, final in finals.items()),
        status,
        output,
    )
    events.append(ev.RunFinished(status=status, output=output, code=code, reason=reason, fingerprint=mark))
    return events


def _attempt_out(step: StepState) -> int:
    """Return the attempt that the gate knows of and has not seen the end of; 0 if there is none."""
    if step.status in (states.REQUESTED, states.DISPATCHED):
        return step.attempt
    if step.status == states.AWAITING_APPROVAL and step.approval is not None and step.approval.why == "policy":
        return step.attempt
    return 0
