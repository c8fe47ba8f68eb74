"""What becomes of the nodes of a run: which begin, which are skipped, what a router repeats, and when all are through. Pure.

A `Flow` walks on from what one decision has settled. It looks at the run's nodes through its own changes, which are those that
the events it collects will make when they are applied. Nodes are settled once per visit, and a join waits for edges and not
for time, so the same outputs settle the same nodes alike in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from tidegate.domain import canonical, children, flow_turns, mapping, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.bindings import NO_HOP, Hop, Sight
from tidegate.domain.calls import call_of, wait_of
from tidegate.domain.identity import visit_path
from tidegate.domain.node_state import NodeState
from tidegate.domain.run import RunState
from tidegate.domain.stop import Stop
from tidegate.domain.turns import first_turn
from tidegate.domain.workflow import ALL, CONTINUE, Workflow


class Way(Enum):
    """How an edge stands. BROKEN: it will never be taken, because something failed before it."""

    OPEN = "open"
    TAKEN = "taken"
    NOT_TAKEN = "not_taken"
    BROKEN = "broken"


class Flow:
    """The nodes as one decision leaves them, and the events that make them so."""

    def __init__(self, run: RunState, workflow: Workflow) -> None:
        self.run = run
        self.workflow = workflow
        self.events: list[Any] = []
        self.cancelled: set[str] = set()  # steps that these events cancel
        self.failures = dict(run.failures)
        self._changed: dict[str, NodeState] = {}
        self._settled = run.settled_nodes
        self._hops = run.hops
        self._to_look_at: deque[str] = deque()
        self.sight = Sight(run, workflow, self._changed)
        self.look = self.sight.look

    # -- what a decision brings ---------------------------------------------------------------

    def begin(self) -> None:
        """Begin the run."""
        self._to_look_at.extend(self.workflow.roots)
        self._walk()

    def succeeded(self, node_id: str, output: str, wave: int, goto: str = "") -> None:
        """Walk on from a node that has its output. goto: the node that its step chose. Raises Stop."""
        self._has_succeeded(node_id, output, wave, goto)
        self._walk()

    def failed(self, node_id: str, wave: int, code: str, reason: str) -> None:
        """Walk on from a node that failed. Raises Stop."""
        node = self.workflow.document.nodes[node_id]
        state = self.look(node_id)
        tolerated = node.on_failure == CONTINUE
        self.events.append(
            ev.NodeFailed(node_id=node_id, visit=state.visit, wave=wave, code=code, reason=reason, tolerated=tolerated)
        )
        if not tolerated:
            self.failures[visit_path(node_id, state.visit)] = (code, reason)
        self._settle(node_id, NodeState(states.FAILED, state.visit, wave))
        self._walk()

    def is_through(self) -> bool:
        """Tell whether every node is settled."""
        return self._settled == len(self.workflow.document.nodes)

    def used_by(self, node_id: str) -> Iterable[str]:
        """Return the nodes that led to one that has begun."""
        state = self.look(node_id)
        return self._leading_to(node_id) if state.used is None else state.used

    # -- settling ---------------------------------------------------------------

    def _settle(self, node_id: str, state: NodeState) -> None:
        self._changed[node_id] = state
        self._settled += 1
        self._to_look_at.extend(self.workflow.successors[node_id])
        self._to_look_at.extend(self.workflow.form.released.get(node_id, ()))

    def _has_succeeded(self, node_id: str, output: str, wave: int, goto: str = "") -> None:
        workflow, visit, used = self.workflow, self.look(node_id).visit, self.look(node_id).used
        state = NodeState(states.SUCCEEDED, visit, wave, output, used=used)
        if goto and goto not in workflow.routes.get(node_id, ()):
            routes = ", ".join(workflow.routes.get(node_id, ())) or "none"
            raise Stop("bad_route", f"node {node_id} wants to go on with {goto!r}; its routes are: {routes}")
        if node_id in workflow.routes:
            state.taken = (goto,) if goto else ()
            if (node_id, goto) in workflow.form.loops:
                self._will_repeat(node_id, state, goto)
                return
            self._choose(node_id, state)
        elif node_id in workflow.conditions:
            self._changed[node_id] = state  # a condition may look at it
            state.taken = self._edges_taken(node_id, output)
            self._choose(node_id, state)
        self._settle(node_id, state)

    def _edges_taken(self, node_id: str, output: str) -> tuple[str, ...]:
        conditions = dict(self.workflow.conditions[node_id])
        return tuple(
            target
            for target in self.workflow.successors[node_id]
            if target not in conditions or self.sight.is_taken(node_id, target, conditions[target], output)
        )

    def _choose(self, node_id: str, state: NodeState, back_to: str = "") -> None:
        if state.taken and node_id in self.workflow.routes:
            limit = self.workflow.document.max_hops
            if self._hops >= limit:
                raise Stop(
                    "max_hops",
                    f"node {node_id} takes one more route than the {limit} that `max_hops` of the run allows",
                )
            self._hops += 1
        self.events.append(
            ev.PathsChosen(node_id=node_id, visit=state.visit, targets=state.taken or (), back_to=back_to)
        )

    # -- looking at what comes next ---------------------------------------------------------------

    def _walk(self) -> None:
        while True:
            while self._to_look_at:
                node_id = self._to_look_at.popleft()
                if self.look(node_id).status == states.PENDING:
                    self._consider(node_id)
            if not self.workflow.form.loops or not self._enter_loop():
                return

    def _consider(self, node_id: str) -> None:
        """Begin the node or skip it, if the edges that lead to it are decided as far as its join needs."""
        workflow = self.workflow
        before = workflow.predecessors[node_id]
        need = workflow.needs.get(node_id, ALL)
        if len(before) == 1 and need == ALL:  # a chain, as most graphs are
            way = self._way(before[0], node_id)
            if way is Way.TAKEN:
                source = self.look(before[0])
                state = NodeState(states.ACTIVE, self.look(node_id).visit, 1 + source.wave)
                self._start(node_id, before, state)
            elif way is not Way.OPEN:
                self._skip(node_id, upstream_failed=way is Way.BROKEN)
            return
        ways = [self._way(source, node_id) for source in before]
        taken = ways.count(Way.TAKEN)
        waiting = ways.count(Way.OPEN)
        if need == ALL:
            if waiting:
                return
            begins = taken > 0 and Way.BROKEN not in ways if before else True
        else:
            if taken < need <= taken + waiting:
                return
            begins = taken >= need
        if not begins:
            self._skip(node_id, upstream_failed=Way.BROKEN in ways)
            return
        used = tuple(source for source, way in zip(before, ways, strict=True) if way is Way.TAKEN)
        visit = self.look(node_id).visit
        wave = 1 + max((self.look(source).wave for source in used), default=-1)
        if need != ALL:
            self.events.append(ev.NodeJoined(node_id=node_id, visit=visit, used=used))
        self._start(node_id, used, NodeState(states.ACTIVE, visit, wave, used=None if need == ALL else used))

    def _way(self, source: str, target: str) -> Way:
        state = self.look(source)
        if not state.is_settled:
            return Way.OPEN
        if state.status == states.FAILED or state.upstream_failed:
            return Way.BROKEN
        if state.status == states.SKIPPED:
            return Way.NOT_TAKEN
        if state.taken is None or target in state.taken:
            return Way.TAKEN
        held = self.workflow.form.held.get((source, target), ())
        return Way.NOT_TAKEN if all(self.look(router).is_settled for router in held) else Way.OPEN

    def _leading_to(self, node_id: str) -> tuple[str, ...]:
        return tuple(
            source for source in self.workflow.predecessors[node_id] if self._way(source, node_id) is Way.TAKEN
        )

    def _skip(self, node_id: str, *, upstream_failed: bool) -> None:
        visit = self.look(node_id).visit
        settled = [self.look(other) for other in self.workflow.predecessors[node_id]]
        wave = 1 + max((state.wave for state in settled if state.is_settled), default=-1)
        reason = "upstream_failed" if upstream_failed else "not_taken"
        self.events.append(ev.NodeSkipped(node_id=node_id, visit=visit, wave=wave, reason=reason))
        self._settle(node_id, NodeState(states.SKIPPED, visit, wave, upstream_failed=upstream_failed))

    # -- beginning nodes ---------------------------------------------------------------

    def _start(self, node_id: str, used: tuple[str, ...], state: NodeState, hop: Hop = NO_HOP) -> None:
        self._changed[node_id] = state
        _STARTS[self.workflow.document.nodes[node_id].kind](self, node_id, used, state.wave, hop)

    def _path(self, node_id: str) -> str:
        return visit_path(node_id, self.look(node_id).visit)

    def _start_step(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        value = self.sight.input_of(node_id, used, hop)
        call = call_of(self.workflow, self.workflow.document.nodes[node_id].function, value)
        self.events.append(ev.StepReady(step_id=self._path(node_id), node_id=node_id, wave=wave, call=call))

    def _start_agent(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        value = self.sight.input_of(node_id, used, hop)
        agent = self.workflow.document.nodes[node_id].function
        self.events.append(first_turn(self.workflow, agent, node_id, self._path(node_id), wave, value))

    def _start_flow(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        value = self.sight.input_of(node_id, used, hop)
        self.events.append(flow_turns.first_turn(self.workflow, node_id, self._path(node_id), wave, value))

    def _start_router(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        value = self.sight.input_of(node_id, used, hop)
        goto = self.sight.choice_of(node_id, used, value)
        visit = self.look(node_id).visit
        self.events.append(ev.NodeSucceeded(node_id=node_id, visit=visit, wave=wave, output=value))
        self._has_succeeded(node_id, value, wave, goto)

    def _start_map(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        node, visit = self.workflow.document.nodes[node_id], self.look(node_id).visit
        items = tuple(map(canonical.dumps, self.sight.items_of(node_id, used, hop)))
        if not items:
            self.events.append(ev.NodeSucceeded(node_id=node_id, visit=visit, wave=wave, output="[]"))
            self._has_succeeded(node_id, "[]", wave)
            return
        self.events.append(ev.MapStarted(node_id=node_id, visit=visit, wave=wave, items=items))
        for number in range(min(node.at_once, len(items))):
            self.start_item(node_id, items[number], number, wave, used)

    def start_item(self, node_id: str, item: str, number: int, wave: int, used: Iterable[str]) -> None:
        """Begin an item of a map. Raises Stop."""
        value = self.sight.item_input(node_id, item, number, used)
        self.events.append(mapping.item_step(self.workflow, node_id, self._path(node_id), number, wave, value))

    def _start_child(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        node = self.workflow.document.nodes[node_id]
        value, child = self.sight.input_of(node_id, used, hop), children.Child(node.workflow, node.budget_micros)
        self.events.append(children.started(self.run, self.workflow, node_id, self._path(node_id), wave, value, child))

    def _start_wait(self, node_id: str, used: tuple[str, ...], wave: int, hop: Hop) -> None:
        kind = self.workflow.document.nodes[node_id].kind
        value = self.sight.input_of(node_id, used, hop) if kind in waits.TIMES else "null"
        bound = self.sight.wait_of(node_id, used, hop)
        self.events.append(wait_of(self._path(node_id), node_id, wave, kind, value, bound))

    # -- loops ---------------------------------------------------------------

    def _will_repeat(self, node_id: str, state: NodeState, target: str) -> None:
        self._choose(node_id, state, back_to=target)
        state.status, state.back_to = states.LOOPING, target
        self._changed[node_id] = state

    def _enter_loop(self) -> bool:
        """Begin the next round of a loop whose router wants it and whose other nodes have come to rest, if there is one."""
        for (router, target), body in self.workflow.form.loops.items():
            state = self.look(router)
            if state.status != states.LOOPING or state.back_to != target:
                continue
            if all(node_id == router or self.look(node_id).is_settled for node_id in body):
                self._repeat(router, target, body, state)
                return True
        return False

    def _repeat(self, router: str, target: str, body: frozenset[str], state: NodeState) -> None:
        counted = self.look(target).used
        visit = self.look(target).visit + 1
        used = self._leading_to(target) if counted is None else counted
        self.events.append(ev.LoopEntered(node_id=target, router=router, visit=visit))
        for node_id in body:
            old = self.look(node_id)
            self._settled -= old.is_settled
            self._changed[node_id] = NodeState(visit=old.visit + 1)
        begun = NodeState(states.ACTIVE, visit, state.wave + 1, used=counted)
        self._start(target, used, begun, Hop(router, state.output, visit))


_STARTS: dict[str, Callable[[Flow, str, tuple[str, ...], int, Hop], None]] = {
    "step": Flow._start_step,
    "agent": Flow._start_agent,
    "flow": Flow._start_flow,
    "router": Flow._start_router,
    "map": Flow._start_map,
    "workflow": Flow._start_child,
    **dict.fromkeys(waits.KINDS, Flow._start_wait),
}
