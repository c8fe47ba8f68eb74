"""What follows from what: the events after a start, a success, a failure. Pure; the state is only looked at.

Each function answers for the state *as if* the event that it follows had been applied already: that step's new status and
output are handed in. What becomes of nodes is in `flow.py`, what agents do next in `turns.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from tidegate.domain import calls, canonical, children, flow_turns, mapping, states, turns
from tidegate.domain import run_events as ev
from tidegate.domain.calls import Changed
from tidegate.domain.fingerprint import fingerprint
from tidegate.domain.flow import Flow
from tidegate.domain.identity import item_number, item_path, visit_path
from tidegate.domain.run import RunState, StepState, node_output, plan_is_final
from tidegate.domain.stop import MAX_OPEN_STEPS, Stop, check_size
from tidegate.domain.workflow import CONTINUE, FAIL_FAST, Workflow

MAX_FAILURES_NAMED: Final = 5
MAX_REASON: Final = 4_000


def first_steps(run: RunState) -> list[Any]:
    """Return the events that follow `RunStarted`, given the run as it would be then: what is ready, or its end."""
    flow = Flow(run, _workflow(run))
    try:
        flow.begin()
        return _what_follows(run, flow, None)
    except Stop as stop:
        return _stopped(run, None, stop)


def after_success(run: RunState, step: StepState, output: str, goto: str = "") -> list[Any]:
    """Return the events that follow a step's success: next steps, the agent's next turn, or the end of the run."""
    changed = Changed(step.step_id, states.SUCCEEDED, output)
    try:
        workflow = _workflow(run)
        if turns.is_tool_call(step):
            return _limited(run, turns.after_tool(run, workflow, step, changed))
        if step.call.kind == "agent":
            plan = canonical.loads(output)
            if not plan_is_final(plan):
                return _limited(run, turns.after_plan(run, workflow, step, changed, plan))
            goto = str(plan.get("goto") or "")
        done = node_output(run, step, output)
        if done is not None:
            return _after_part(run, step, changed, done, goto)
        if goto:
            raise Stop("bad_route", f"step {step.step_id} wants to go on with {goto!r}: a call of a flow has no routes")
        follows = flow_turns.after_turn if step.call.kind == "flow" else flow_turns.after_call
        return _limited(run, follows(run, workflow, step, changed))
    except Stop as stop:
        return _stopped(run, changed, stop)


def failed(run: RunState, step: StepState, code: str, reason: str) -> list[Any]:
    """Return the failure of a step, for good, and what follows from it."""
    return [ev.StepFailed(step_id=step.step_id, code=code, reason=reason), *after_failure(run, step, code, reason)]


def after_failure(run: RunState, step: StepState, code: str, reason: str) -> list[Any]:
    """Return the events that follow `StepFailed`: an observation for the agent that called the tool, an exception for the flow
    that called it, or what the failure modes say: the run's end, or what goes on without the node.
    """
    changed = Changed(step.step_id, states.FAILED, "")
    try:
        if turns.is_tool_call(step):
            return _limited(run, turns.after_tool(run, _workflow(run), step, changed, reason))
        if step.call.kind != "flow" and step.node_id in _workflow(run).flow_nodes:
            return _limited(run, flow_turns.after_call(run, _workflow(run), step, changed, reason))
        node = _workflow(run).document.nodes[step.node_id]
        if node.kind == "map" and node.on_item_failure == CONTINUE:
            return _after_part(run, step, changed, None)
        return _node_failed(run, step, changed, code, f"step {step.step_id}: {reason}")
    except Stop as stop:
        return _stopped(run, changed, stop)


def broken(run: RunState, step: StepState | None, reason: str) -> list[Any]:
    """Return the events that end a run because nobody could decide what follows from this step's attempt.

    None for a step that has not failed: it is cancelled as all others that are open.
    """
    changed = None if step is None else Changed(step.step_id, states.FAILED, "")
    return _finish(run, changed, states.FAILED, "", "internal_error", reason)


def cancelled(run: RunState, reason: str) -> list[Any]:
    """Return the events that follow `RunCancelRequested`: every open step and the run are cancelled."""
    return _finish(run, None, states.CANCELLED, "", "cancelled", reason)


# --- nodes ---------------------------------------------------------------


def _workflow(run: RunState) -> Workflow:
    assert run.workflow is not None  # noqa: S101 - a run that has steps has a workflow
    return run.workflow


def _after_part(run: RunState, step: StepState, changed: Changed, output: str | None, goto: str = "") -> list[Any]:
    """Go on after a step that completes its node, or an item of it (`output` is None for one that failed)."""
    flow = Flow(run, _workflow(run))
    if run.nodes[step.node_id].map is not None:
        _after_item(run, flow, step, output, goto)
    else:
        assert output is not None  # noqa: S101 - only of an item there is none
        _cancel_below(run, flow, step)
        flow.succeeded(step.node_id, output, step.wave, goto)
    return _what_follows(run, flow, changed)


def _after_item(run: RunState, flow: Flow, step: StepState, output: str | None, goto: str) -> None:
    node_id, state = step.node_id, run.nodes[step.node_id]
    node, so_far = flow.workflow.document.nodes[node_id], state.map
    assert so_far is not None  # noqa: S101 - the caller has looked
    if goto:
        raise Stop("bad_route", f"step {step.step_id} wants to go on with {goto!r}: an item of a map has no routes")
    wave = max(state.wave, step.wave)
    number = item_number(step.step_id, visit_path(node_id, state.visit))
    if len(so_far.results) + 1 == len(so_far.items):
        whole = mapping.output_of(so_far, number, output, keep_failed=node.results == "all", node_id=node_id)
        flow.events.append(ev.NodeSucceeded(node_id=node_id, visit=state.visit, wave=wave, output=whole))
        flow.succeeded(node_id, whole, wave)
    elif so_far.begun < len(so_far.items):
        following = so_far.begun
        first_wave = run.steps[_first_step(run, step)].wave
        flow.start_item(node_id, so_far.items[following], following, first_wave, flow.used_by(node_id))


def _first_step(run: RunState, step: StepState) -> str:
    """Return the id of the first step of the map's item 0, whose wave all items begin with."""
    path = item_path(visit_path(step.node_id, run.nodes[step.node_id].visit), 0)
    return path if path in run.steps else f"{path}/1"


def _node_failed(run: RunState, step: StepState, changed: Changed, code: str, reason: str) -> list[Any]:
    workflow = _workflow(run)
    node = workflow.document.nodes[step.node_id]
    mode = run.failure_mode or workflow.document.failure_mode
    if (node.on_failure or mode) in ("fail", FAIL_FAST):
        return _finish(run, changed, states.FAILED, "", code, reason)
    flow = Flow(run, workflow)
    state = run.nodes[step.node_id]
    _cancel_below(run, flow, step)
    flow.failed(step.node_id, max(state.wave, step.wave), code, reason)
    return _what_follows(run, flow, changed)


def _cancel_below(run: RunState, flow: Flow, step: StepState) -> None:
    """Cancel what else is open of the node of this step: items of a map, calls of a flow."""
    state = run.nodes[step.node_id]
    if state.map is None and step.node_id not in flow.workflow.flow_nodes:
        return
    below = visit_path(step.node_id, state.visit) + "/"
    for other_id in sorted(run.steps):
        other = run.steps[other_id]
        if other_id.startswith(below) and other_id != step.step_id and other.status not in states.STEP_TERMINAL:
            flow.events += _cancelled(other, f"{step.node_id} is over")
            flow.cancelled.add(other_id)


def _what_follows(run: RunState, flow: Flow, changed: Changed | None) -> list[Any]:
    """Return the events of the flow, with the end of the run if every node is through."""
    if not flow.is_through():
        return _limited(run, flow.events)
    status, code, reason = _verdict(flow)
    output = ""
    if status == states.SUCCEEDED or flow.workflow.document.aggregate:
        output = flow.sight.run_output()
        check_size([output, *_texts(flow.events)], "the output of the run, with those of the nodes that end with it,")
    return [*flow.events, *_finish(run, changed, status, output, code, reason, flow.cancelled)]


def _verdict(flow: Flow) -> tuple[str, str, str]:
    """Return status, code and reason of a run whose nodes are all through, by the rule that its definition names."""
    workflow = flow.workflow
    if not flow.failures:
        return states.SUCCEEDED, "", ""
    if workflow.document.success == "any" and any(
        flow.look(sink).status == states.SUCCEEDED for sink in workflow.sinks
    ):
        return states.SUCCEEDED, "", ""
    first = min(flow.failures)
    named = [flow.failures[name][1] for name in sorted(flow.failures)[:MAX_FAILURES_NAMED]]
    more = len(flow.failures) - len(named)
    reason = "; ".join(named)[:MAX_REASON] + (f"; and {more} more" if more else "")
    return states.FAILED, flow.failures[first][0], reason


def _limited(run: RunState, events: list[Any]) -> list[Any]:
    """Return the events if the run may have the steps that they begin. Raises Stop."""
    begun = [event for event in events if type(event) in (ev.StepReady, ev.ChildStarted, ev.WaitStarted)]
    workflow = _workflow(run)
    limit = workflow.document.max_steps
    count = len(run.steps) + len(begun)
    if count > limit and workflow.flow_nodes:  # turns of a flow only say what its calls are: these are counted
        count -= run.flow_turns + sum(isinstance(event, ev.StepReady) and event.call.kind == "flow" for event in begun)
    if count > limit:
        raise Stop("max_steps", f"the run would need more than {limit} steps (`max_steps` of its definition)")
    if len(begun) > 1 and len(run.steps) + len(begun) > MAX_OPEN_STEPS:  # a chain never has more than before
        count = len(begun) + sum(step.status not in states.STEP_TERMINAL for step in run.steps.values())
        if count > MAX_OPEN_STEPS:
            raise Stop("too_wide", f"the run would have {count} steps open at once, at most {MAX_OPEN_STEPS} may be")
    check_size(_texts(events), f"the input of {len(begun)} steps that are ready together")
    return [calls.as_wished(event, run.prefer) for event in events] if run.prefer else events


def _texts(events: list[Any]) -> list[str]:
    """Return what is large in these events, or may be."""
    texts: list[str] = []
    for event in events:
        if isinstance(event, ev.StepReady):
            texts.append(event.call.arguments)
        elif isinstance(event, ev.WaitStarted):
            texts += (event.input, event.timeout_value, event.schema, event.prompt, *event.choices)
        elif isinstance(event, ev.ChildStarted):
            texts += (event.input, event.definition)
        elif isinstance(event, ev.MapStarted):
            texts += event.items
        elif isinstance(event, ev.NodeSucceeded):
            texts.append(event.output)
        elif isinstance(event, ev.GraphChangeProposed):
            texts.append(event.change)
    return texts


# --- the end ---------------------------------------------------------------


def _stopped(run: RunState, changed: Changed | None, stop: Stop) -> list[Any]:
    return _finish(run, changed, states.FAILED, "", stop.code, stop.reason[:MAX_REASON])


def _finish(
    run: RunState,
    changed: Changed | None,
    status: str,
    output: str,
    code: str,
    reason: str,
    cancelled_already: Collection[str] = (),
) -> list[Any]:
    """Return the cancellation of every step that is still open, and the end of the run."""
    finals = {step_id: (step.status, step.output or "") for step_id, step in run.steps.items()}
    if changed is not None:
        finals[changed.step_id] = (changed.status, changed.output)
    events: list[Any] = []
    for step_id in sorted(finals):
        if finals[step_id][0] in states.STEP_TERMINAL:
            continue
        finals[step_id] = (states.CANCELLED, "")
        if step_id in cancelled_already:
            continue
        events += _cancelled(run.steps[step_id], reason)
    mark = fingerprint(
        _workflow(run).mark,
        run.input,
        ((step_id, *final) for step_id, final in finals.items()),
        status,
        output,
    )
    events.append(ev.RunFinished(status=status, output=output, code=code, reason=reason, fingerprint=mark))
    return events + children.end_reported(run, status, code, reason)


def _cancelled(step: StepState, reason: str) -> list[Any]:
    """Return the end of an open step, and what its run is told if one does it."""
    told = [children.cancelled(step, reason)] if step.status == states.IN_CHILD else []
    return [ev.StepCancelled(step_id=step.step_id, attempt=_attempt_out(step)), *told]


def _attempt_out(step: StepState) -> int:
    """Return the attempt that the gate knows of and has not seen the end of; 0 if there is none."""
    if step.status in (states.REQUESTED, states.DISPATCHED, states.WAITING):  # 0 of a wait that nobody was asked for
        return step.attempt
    if step.status == states.AWAITING_APPROVAL and step.approval is not None and step.approval.why == "policy":
        return step.attempt
    return 0
