"""The state of a run's nodes, and how events change it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.identity import item_number, visit_path

if TYPE_CHECKING:
    from tidegate.domain.run import RunState, StepState


class MapState(msgspec.Struct, array_like=True):
    """How far a map is. begun: items whose step exists. results: of those that are done; None for one that failed."""

    items: tuple[str, ...]
    begun: int = 0
    results: dict[int, str | None] = {}


class NodeState(msgspec.Struct, array_like=True):
    """One node in its present visit.

    wave: of its first step, once it is settled of its last. taken: the edges it took; None for all. used: the nodes that its
    join counted; None for all that led here. back_to: where a looping router goes. upstream_failed: why it was skipped.
    """

    status: str = states.PENDING
    visit: int = 1
    wave: int = 0
    output: str = ""
    taken: tuple[str, ...] | None = None
    used: tuple[str, ...] | None = None
    back_to: str = ""
    upstream_failed: bool = False
    map: MapState | None = None

    @property
    def is_settled(self) -> bool:
        """Tell whether the node is through, for this visit."""
        return self.status in states.NODE_SETTLED


def node_of(run: RunState, node_id: str) -> NodeState:
    """Return the node's state, which begins to exist with this call."""
    node = run.nodes.get(node_id)
    if node is None:
        node = run.nodes[node_id] = NodeState()
    return node


def begin_step(run: RunState, step: StepState, event: str) -> None:
    """Note a new step: the first one of its node makes that active, the first one of an item begins the item."""
    node = node_of(run, step.node_id)
    if node.map is not None:
        number = item_number(step.step_id, visit_path(step.node_id, node.visit))
        node.map.begun = max(node.map.begun, number + 1)
    elif node.status == states.PENDING:
        _move(node, event, states.ACTIVE)
        node.wave = step.wave


def take_output(run: RunState, step: StepState, event: str, output: str) -> None:
    """Note the output of a step that completes its node, or an item of it."""
    node = run.nodes[step.node_id]
    if node.map is None:
        _settle(run, node, event, states.SUCCEEDED, step.wave)
        node.output = output
    else:
        _item_done(node, step, output)


def take_item_failure(run: RunState, step: StepState) -> None:
    """Note that an item failed, if the step is of an item."""
    node = run.nodes[step.node_id]
    if node.map is not None and step.call.kind != "tool":
        _item_done(node, step, None)


def _item_done(node: NodeState, step: StepState, output: str | None) -> None:
    assert node.map is not None  # noqa: S101 - the callers have looked
    node.map.results[item_number(step.step_id, visit_path(step.node_id, node.visit))] = output
    node.wave = max(node.wave, step.wave)


def _move(node: NodeState, event: str, to: str) -> None:
    node.status = states.move(states.NODE_TRANSITIONS, node.status, event, to)


def _settle(run: RunState, node: NodeState, event: str, to: str, wave: int) -> None:
    _move(node, event, to)
    node.wave = wave
    run.settled_nodes += 1


def _joined(run: RunState, event: ev.NodeJoined, now_ms: int) -> None:
    node_of(run, event.node_id).used = event.used


def _skipped(run: RunState, event: ev.NodeSkipped, now_ms: int) -> None:
    node = node_of(run, event.node_id)
    _settle(run, node, "NodeSkipped", states.SKIPPED, event.wave)
    node.upstream_failed = event.reason == "upstream_failed"


def _succeeded(run: RunState, event: ev.NodeSucceeded, now_ms: int) -> None:
    node = node_of(run, event.node_id)
    _settle(run, node, "NodeSucceeded", states.SUCCEEDED, event.wave)
    node.output = event.output
    node.map = None


def _failed(run: RunState, event: ev.NodeFailed, now_ms: int) -> None:
    node = node_of(run, event.node_id)
    _settle(run, node, "NodeFailed", states.FAILED, event.wave)
    node.map = None
    if not event.tolerated:
        run.failures[visit_path(event.node_id, event.visit)] = (event.code, event.reason)


def _paths_chosen(run: RunState, event: ev.PathsChosen, now_ms: int) -> None:
    node = run.nodes[event.node_id]
    if event.targets and run.workflow is not None and event.node_id in run.workflow.routes:
        run.hops += 1
    node.taken = event.targets
    if event.back_to:
        _move(node, "PathsChosen", states.LOOPING)
        node.back_to = event.back_to
        run.settled_nodes -= 1


def _loop_entered(run: RunState, event: ev.LoopEntered, now_ms: int) -> None:
    assert run.workflow is not None  # noqa: S101 - a run that loops has a workflow
    for node_id in run.workflow.form.loops[event.router, event.node_id]:
        node = node_of(run, node_id)
        if node.is_settled:
            run.settled_nodes -= 1
        _move(node, "LoopEntered", states.PENDING)
        # Its first node is led to as before: from outside the loop nothing has changed.
        run.nodes[node_id] = NodeState(visit=node.visit + 1, used=node.used if node_id == event.node_id else None)


def _map_started(run: RunState, event: ev.MapStarted, now_ms: int) -> None:
    node = node_of(run, event.node_id)
    _move(node, "MapStarted", states.ACTIVE)
    node.wave = event.wave
    node.map = MapState(event.items)


HANDLERS: dict[type, Any] = {
    ev.NodeJoined: _joined,
    ev.NodeSkipped: _skipped,
    ev.NodeSucceeded: _succeeded,
    ev.NodeFailed: _failed,
    ev.PathsChosen: _paths_chosen,
    ev.LoopEntered: _loop_entered,
    ev.MapStarted: _map_started,
}
