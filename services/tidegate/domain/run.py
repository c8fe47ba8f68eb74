"""A run's state: a fold of its valid events and of nothing else."""

from __future__ import annotations

from typing import Any

import msgspec

from tidegate.domain import canonical, node_state, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.graph_changes import GRAPH, AcceptedChange, OpenProposal
from tidegate.domain.identity import agent_turn_step
from tidegate.domain.messages import Call
from tidegate.domain.node_state import NodeState
from tidegate.domain.workflow import Workflow, evolved, pinned_definition


class KeptSignal(msgspec.Struct, frozen=True, array_like=True):
    """An event that came before anybody waited for it. seq: of its `SignalReceived`. key: null fits every wait of the name."""

    seq: int
    event: str
    key: str | None
    payload: str


class StepState(msgspec.Struct, array_like=True):
    """One step of a run.

    attempt: the latest one; 0 as long as none was asked for, and of waits. failures: attempts that failed or timed out (what
    `max_attempts` counts); losses: attempts whose executor went away. reported: attempts whose result was consumed, so that a
    doubled result is recognised. waits_for: why the gate lets it wait, while it does. child_run_id: the run that does it, if
    it is a workflow. rule_failures: of the failures, those that a retry rule counts, as (its label, how many). proposal: the
    change of the graph that it proposes, until that is decided on. call: of a turn of a flow that another has followed, it has no
    arguments any more: they are the beginning of that one's.
    """

    step_id: str
    node_id: str
    wave: int
    call: Call
    status: str = states.REQUESTED
    attempt: int = 1
    failures: int = 0
    losses: int = 0
    output: str | None = None
    error: str = ""
    retry_at_ms: int | None = None
    instance_id: str = ""
    incarnation: int = -1
    approval: ev.ApprovalRequested | None = None
    reported: tuple[int, ...] = ()
    wait: ev.WaitStarted | None = None
    waits_for: str = ""
    child_run_id: str = ""
    rule_failures: tuple[tuple[str, int], ...] = ()  # no dict: nearly all steps have none
    proposal: OpenProposal | None = None


class RunState(msgspec.Struct, array_like=True):
    """One run. nodes: those that anything is known of; settled_nodes: how many of them are through. hops: routes taken.
    failures: nodes that failed while the run went on, with code and reason, but for those that may. changes: those of its graph,
    in order; `workflow` is the graph with them. flow_turns: how many of its steps are turns of flows. prefer: the instance that
    should run its steps.

    head: SHA-256 of its last entry. changed_ms: time of its last event. Both kinds of state are msgspec structs so that
    snapshots need no code per field; the order of the fields is the format of `SNAPSHOT_FORMAT` in `scheduler/snapshots.py`.
    """

    run_id: str
    account: str = ""
    status: str = states.ABSENT
    seq: int = 0
    head: bytes = b""
    changed_ms: int = 0
    workflow: Workflow | None = None
    workflow_label: str = ""
    content_hash: str = ""
    input: str = "null"
    tags: dict[str, str] = {}
    budget_micros: int | None = None
    steps: dict[str, StepState] = {}
    nodes: dict[str, NodeState] = {}
    command_ids: set[str] = set()
    cancel: ev.RunCancelRequested | None = None
    output: str = ""
    code: str = ""
    reason: str = ""
    fingerprint: str = ""
    started_ms: int = 0
    finished_ms: int = 0
    paused: ev.RunPaused | None = None
    signals: tuple[KeptSignal, ...] = ()
    settled_nodes: int = 0
    hops: int = 0
    failures: dict[str, tuple[str, str]] = {}
    failure_mode: str = ""
    parent_run_id: str = ""
    parent_step_id: str = ""
    priority: int = 5
    changes: tuple[AcceptedChange, ...] = ()
    flow_turns: int = 0
    prefer: str = ""

    @property
    def is_over(self) -> bool:
        """Tell whether the run has reached a status that it never leaves."""
        return self.status in states.RUN_TERMINAL

    def open_approvals(self) -> list[StepState]:
        """Return the steps that wait for a human, in order of step id."""
        return sorted(
            (step for step in self.steps.values() if step.status == states.AWAITING_APPROVAL),
            key=lambda step: step.step_id,
        )

    def open_waits(self) -> list[StepState]:
        """Return the steps that wait for an event, a time or an answer, in the order in which they began to."""
        return [step for step in self.steps.values() if step.status == states.WAITING]

    def held_steps(self) -> list[StepState]:
        """Return the steps whose next attempt is held back, in the order in which they came to be."""
        return [step for step in self.steps.values() if step.status == states.HELD]


def apply(run: RunState, event: Any, now_ms: int) -> None:
    """Change the state by one event: the only way in which it ever changes. Raises IllegalTransitionError, KeyError."""
    run.seq += 1
    run.changed_ms = now_ms
    _HANDLERS[type(event)](run, event, now_ms)


def _move_run(run: RunState, event: str, to: str) -> None:
    run.status = states.move(states.RUN_TRANSITIONS, run.status, event, to)


def _move_step(step: StepState, event: str, to: str) -> None:
    step.status = states.move(states.STEP_TRANSITIONS, step.status, event, to)
    step.waits_for = ""  # whatever comes next, it is not waiting for that any more


def _run_started(run: RunState, event: ev.RunStarted, now_ms: int) -> None:
    _move_run(run, "RunStarted", states.RUNNING)
    run.command_ids.add(event.command_id)
    run.content_hash = event.content_hash
    run.workflow = pinned_definition(event.definition)
    run.workflow_label = event.workflow
    run.input = event.input
    run.tags = event.tags
    run.budget_micros = event.budget_micros
    run.failure_mode, run.priority, run.prefer = event.failure_mode, event.priority, event.prefer
    run.parent_run_id, run.parent_step_id = event.parent_run_id, event.parent_step_id
    run.started_ms = now_ms


def _run_refused(run: RunState, event: ev.RunRefused, now_ms: int) -> None:
    _move_run(run, "RunRefused", states.REFUSED)
    run.command_ids.add(event.command_id)
    run.content_hash = event.content_hash
    run.code, run.reason = event.code, event.reason
    run.started_ms = run.finished_ms = now_ms


def _command_refused(run: RunState, event: ev.CommandRefused, now_ms: int) -> None:
    run.command_ids.add(event.command_id)


def _step_ready(run: RunState, event: ev.StepReady, now_ms: int) -> None:
    if event.step_id in run.steps:
        raise states.IllegalTransitionError(f"step {event.step_id} exists already")
    step = StepState(event.step_id, event.node_id, event.wave, event.call)
    if event.held:
        step.status, step.attempt = states.HELD, 0
    run.steps[event.step_id] = step
    if event.call.kind == "flow":
        run.flow_turns += 1
        _forget_turn_before(run, event.step_id)
    node_state.begin_step(run, step, "StepReady")


def _forget_turn_before(run: RunState, turn_step_id: str) -> None:
    """Forget what the turn before this one was told: this one is told the same and more, and runs need not hold it twice."""
    path, _, number = turn_step_id.rpartition("/")
    before = run.steps.get(agent_turn_step(path, int(number) - 1))
    if before is not None:
        before.call = msgspec.structs.replace(before.call, arguments="null")


def _attempt_requested(run: RunState, event: ev.AttemptRequested, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "AttemptRequested", states.REQUESTED)
    if event.attempt != step.attempt + 1:
        raise states.IllegalTransitionError(f"attempt {event.attempt} of {step.step_id} after {step.attempt}")
    step.attempt = event.attempt
    step.retry_at_ms = None
    step.instance_id, step.incarnation = "", -1
    step.waits_for = ""


def _attempt_held(run: RunState, event: ev.AttemptHeld, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "AttemptHeld", states.HELD)
    step.retry_at_ms = None


def _attempt_dispatched(run: RunState, event: ev.AttemptDispatched, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "AttemptDispatched", states.DISPATCHED)
    step.instance_id, step.incarnation = event.instance_id, event.incarnation
    step.waits_for = ""


def _step_throttled(run: RunState, event: ev.StepThrottled, now_ms: int) -> None:
    run.steps[event.step_id].waits_for = event.reason


def _approval_requested(run: RunState, event: ev.ApprovalRequested, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "ApprovalRequested", states.AWAITING_APPROVAL)
    _move_run(run, "ApprovalRequested", states.WAITING)
    step.approval = event


def _approval_resolved(run: RunState, event: ev.ApprovalResolved, now_ms: int) -> None:
    step = run.steps[event.step_id]
    resumes = event.approved and event.why == "policy"
    _move_step(step, "ApprovalResolved", states.REQUESTED if resumes else states.ENDED)
    if event.command_id:
        run.command_ids.add(event.command_id)
    step.approval = None
    _leave_waiting(run, "ApprovalResolved")


def _change_proposed(run: RunState, event: ev.GraphChangeProposed, now_ms: int) -> None:
    if event.kind == GRAPH:
        run.steps[event.step_id].proposal = OpenProposal(event.change, event.output, event.goto)


def _change_accepted(run: RunState, event: ev.GraphChangeAccepted, now_ms: int) -> None:
    if event.kind != GRAPH:
        return
    step = run.steps[event.step_id]
    if step.proposal is None:
        raise states.IllegalTransitionError(f"step {event.step_id} has proposed no change")
    take_change(run, AcceptedChange(event.step_id, step.proposal.change))
    step.proposal = None
    if run.workflow is not None and run.workflow.graph_hash != event.graph_hash:
        raise states.IllegalTransitionError(f"the change of step {event.step_id} gives another graph than it gave")


def _change_rejected(run: RunState, event: ev.GraphChangeRejected, now_ms: int) -> None:
    if event.kind == GRAPH:
        run.steps[event.step_id].proposal = None


def take_change(run: RunState, change: AcceptedChange) -> None:
    """Make a change part of the run's graph."""
    run.changes = (*run.changes, change)
    run.workflow = graph_of(run)


def graph_of(run: RunState) -> Workflow:
    """Return the run's graph: its pinned definition with the changes that were accepted."""
    assert run.workflow is not None  # noqa: S101 - a run that changes has a definition
    return evolved(run.workflow.definition, tuple(one.change for one in run.changes))


def _approval_expired(run: RunState, event: ev.ApprovalExpired, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "ApprovalExpired", states.ENDED)
    step.approval = None
    _leave_waiting(run, "ApprovalExpired")


def _not_run(kind: str, function: str, arguments: str) -> Call:
    """Return what stands for the call of a step that no executor runs."""
    return Call(
        kind=kind,
        function=function,
        queue="",
        arguments=arguments,
        timeout_ms=0,
        reserve_micros=0,
        idempotent=True,
    )


def _wait_started(run: RunState, event: ev.WaitStarted, now_ms: int) -> None:
    step = run.steps.get(event.step_id)
    if step is None:
        # Older runs began to wait for outside tools at once: the gate was not asked.
        call = _not_run("tool" if event.kind == waits.OUTSIDE else event.kind, event.function, event.input)
        step = StepState(event.step_id, event.node_id, event.wave, call, status=states.ABSENT, attempt=0)
        run.steps[event.step_id] = step
        node_state.begin_step(run, step, "WaitStarted")
    _move_step(step, "WaitStarted", states.WAITING)
    step.wait = event
    _move_run(run, "WaitStarted", states.WAITING)


def _wait_ended(run: RunState, event: ev.WaitEnded, now_ms: int) -> None:
    _move_step(run.steps[event.step_id], "WaitEnded", states.ENDED)
    if event.command_id:
        run.command_ids.add(event.command_id)
    if event.signal_seq:
        run.signals = tuple(signal for signal in run.signals if signal.seq != event.signal_seq)
    _leave_waiting(run, "WaitEnded")


def _signal_received(run: RunState, event: ev.SignalReceived, now_ms: int) -> None:
    run.command_ids.add(event.command_id)
    if not event.step_id:
        run.signals = (*run.signals, KeptSignal(run.seq, event.event, event.key, event.payload))


def _attempt_ended(run: RunState, event: ev.AttemptEnded, now_ms: int) -> None:
    step = run.steps[event.step_id]
    was_asking = step.status == states.AWAITING_APPROVAL
    _move_step(step, "AttemptEnded", states.ENDED if event.retry_at_ms is None else states.BACKING_OFF)
    step.retry_at_ms = event.retry_at_ms
    if was_asking:
        step.approval = None
        _leave_waiting(run, "AttemptEnded")
    step.error = f"{event.error_class}: {event.error_message}" if event.error_class else event.error_message
    if event.outcome == "lost":
        step.losses += 1
        return
    step.reported = (*step.reported, event.attempt)
    if event.outcome in ("failed", "timed_out"):
        step.failures += 1
        if event.retry_rule:
            counts = dict(step.rule_failures)
            counts[event.retry_rule] = counts.get(event.retry_rule, 0) + 1
            step.rule_failures = tuple(counts.items())


def _step_succeeded(run: RunState, event: ev.StepSucceeded, now_ms: int) -> None:
    step = run.steps[event.step_id]
    was_asking = step.status == states.AWAITING_APPROVAL
    _move_step(step, "StepSucceeded", states.SUCCEEDED)
    step.output = event.output
    step.approval = None
    step.retry_at_ms = None
    step.reported = (*step.reported, event.attempt)
    if was_asking:
        _leave_waiting(run, "StepSucceeded")
    done = node_output(run, step)
    if done is not None:
        node_state.take_output(run, step, "StepSucceeded", done)


def _step_failed(run: RunState, event: ev.StepFailed, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "StepFailed", states.FAILED)
    step.error = event.reason
    node_state.take_item_failure(run, step)


def _child_started(run: RunState, event: ev.ChildStarted, now_ms: int) -> None:
    call = _not_run("workflow", event.workflow, event.input)
    step = StepState(event.step_id, event.node_id, event.wave, call, status=states.ABSENT)
    _move_step(step, "ChildStarted", states.IN_CHILD)
    step.child_run_id = event.child_run_id
    run.steps[event.step_id] = step
    node_state.begin_step(run, step, "ChildStarted")


def _child_ended(run: RunState, event: ev.ChildEnded, now_ms: int) -> None:
    run.command_ids.add(event.command_id)
    step = run.steps[event.step_id]
    if event.status == states.SUCCEEDED:
        _move_step(step, "ChildEnded", states.SUCCEEDED)
        step.output = event.output
        done = node_output(run, step)
        if done is not None:
            node_state.take_output(run, step, "ChildEnded", done)
    else:
        _move_step(step, "ChildEnded", states.FAILED)
        step.error = event.reason


def _told(run: RunState, event: ev.ChildCancelled | ev.EndReported, now_ms: int) -> None:
    """Another run is told; here nothing changes."""


def _step_cancelled(run: RunState, event: ev.StepCancelled, now_ms: int) -> None:
    step = run.steps[event.step_id]
    was_waiting = step.status in (states.AWAITING_APPROVAL, states.WAITING)
    _move_step(step, "StepCancelled", states.CANCELLED)
    step.approval = step.proposal = None
    step.retry_at_ms = None
    if was_waiting:
        _leave_waiting(run, "StepCancelled")


def _result_ignored(run: RunState, event: ev.ResultIgnored, now_ms: int) -> None:
    step = run.steps[event.step_id]
    step.reported = (*step.reported, event.attempt)


def _cancel_requested(run: RunState, event: ev.RunCancelRequested, now_ms: int) -> None:
    run.command_ids.add(event.command_id)
    run.cancel = event


def _nothing_else(run: RunState, event: ev.ChildPaused, now_ms: int) -> None:
    """What it says is told to another run; this one is as it was."""


def _run_paused(run: RunState, event: ev.RunPaused, now_ms: int) -> None:
    run.command_ids.add(event.command_id)
    run.paused = event


def _run_resumed(run: RunState, event: ev.RunResumed, now_ms: int) -> None:
    run.command_ids.add(event.command_id)
    run.paused = None


def _run_finished(run: RunState, event: ev.RunFinished, now_ms: int) -> None:
    _move_run(run, "RunFinished", event.status)
    run.output, run.code, run.reason, run.fingerprint = event.output, event.code, event.reason, event.fingerprint
    run.finished_ms = now_ms


def _leave_waiting(run: RunState, event: str) -> None:
    is_waiting = any(step.status in (states.AWAITING_APPROVAL, states.WAITING) for step in run.steps.values())
    _move_run(run, event, states.WAITING if is_waiting else states.RUNNING)


def node_output(run: RunState, step: StepState, output: str | None = None) -> str | None:
    """Return the node's output if this step's output (or the one given) completes its node, else None.

    A plain step or a wait completes its node; an agent's plan and a flow's turn do if they are final; a tool call or a call of
    a flow never does.
    """
    text = step.output if output is None else output
    if run.workflow is not None and step.node_id in run.workflow.flow_nodes:
        return flow_output(text) if step.call.kind == "flow" and text is not None else None
    if step.call.kind in ("step", "workflow") or step.call.kind in waits.KINDS:
        return text
    return None if step.call.kind == "tool" or text is None else plan_output(canonical.loads(text))


def flow_output(turn: str) -> str | None:
    """Return the output of a flow if this turn, canonical JSON, says it, else None."""
    said = canonical.loads(turn)
    return canonical.dumps(said["output"]) if "output" in said else None


def plan_output(plan: dict[str, Any]) -> str | None:
    """Return the output of an agent if this plan is its last one, else None."""
    if not plan_is_final(plan):
        return None
    return canonical.dumps(plan.get("output") if plan.get("output") is not None else plan.get("content", ""))


def plan_is_final(plan: dict[str, Any]) -> bool:
    """Tell whether a plan ends its agent: it says so, or it neither says otherwise nor calls a tool."""
    final = plan.get("final")
    return bool(final) if final is not None else not plan.get("tool_calls")


def _awaits_budget(run: RunState, event: ev.AttemptAwaitsBudget, now_ms: int) -> None:
    step = run.steps[event.step_id]
    _move_step(step, "AttemptAwaitsBudget", states.REQUESTED)
    step.waits_for = event.reason


_HANDLERS: dict[type, Any] = {
    ev.AttemptAwaitsBudget: _awaits_budget,
    ev.RunStarted: _run_started,
    ev.RunRefused: _run_refused,
    ev.CommandRefused: _command_refused,
    ev.StepReady: _step_ready,
    ev.AttemptRequested: _attempt_requested,
    ev.AttemptDispatched: _attempt_dispatched,
    ev.ApprovalRequested: _approval_requested,
    ev.ApprovalResolved: _approval_resolved,
    ev.AttemptEnded: _attempt_ended,
    ev.StepSucceeded: _step_succeeded,
    ev.StepFailed: _step_failed,
    ev.StepCancelled: _step_cancelled,
    ev.ResultIgnored: _result_ignored,
    ev.RunCancelRequested: _cancel_requested,
    ev.RunFinished: _run_finished,
    ev.AttemptHeld: _attempt_held,
    ev.ApprovalExpired: _approval_expired,
    ev.WaitStarted: _wait_started,
    ev.WaitEnded: _wait_ended,
    ev.SignalReceived: _signal_received,
    ev.RunPaused: _run_paused,
    ev.RunResumed: _run_resumed,
    ev.StepThrottled: _step_throttled,
    ev.ChildStarted: _child_started,
    ev.ChildPaused: _nothing_else,
    ev.ChildEnded: _child_ended,
    ev.ChildCancelled: _told,
    ev.EndReported: _told,
    ev.GraphChangeProposed: _change_proposed,
    ev.GraphChangeAccepted: _change_accepted,
    ev.GraphChangeRejected: _change_rejected,
    **node_state.HANDLERS,
}
