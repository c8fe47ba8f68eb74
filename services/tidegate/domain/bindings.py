"""What the expressions of a run see, and what they make of it: inputs of nodes, conditions, choices, the output. Pure.

A node sees what led to it: the outputs of nodes on the ways that were taken to it. So what it sees does not depend on the
order in which other branches come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import canonical, expressions, states, waits
from tidegate.domain.node_state import NodeState
from tidegate.domain.run import RunState
from tidegate.domain.stop import Stop
from tidegate.domain.workflow import Workflow

_PENDING: Final = NodeState()


class Hop(NamedTuple):
    """A visit that a router led back to: where from, with its output, and which visit of the node it is."""

    router: str
    output: str
    visit: int


NO_HOP: Final = Hop("", "null", 1)


class Sight:
    """What can be seen of a run inside one decision. changed: the nodes that the decision has changed so far; it grows with it."""

    __slots__ = ("_changed", "_contexts", "_run", "_workflow")

    def __init__(self, run: RunState, workflow: Workflow, changed: Mapping[str, NodeState]) -> None:
        self._run = run
        self._workflow = workflow
        self._changed = changed
        self._contexts: dict[Any, Any] = {}  # of expressions that look at large values

    def look(self, node_id: str) -> NodeState:
        """Return a node's state after what was decided so far."""
        return self._changed.get(node_id) or self._run.nodes.get(node_id) or _PENDING

    # -- what is evaluated ---------------------------------------------------------------

    def input_of(self, node_id: str, used: Iterable[str], hop: Hop = NO_HOP) -> str:
        """Return the node's input as canonical JSON. used: the nodes that led to it. Raises Stop if its template fails."""
        workflow = self._workflow
        template = workflow.document.nodes[node_id].input
        if template is msgspec.UNSET or workflow.document.nodes[node_id].kind == "map":
            return self.default_input(node_id, used, hop)
        names = workflow.reads[node_id]
        return self._rendered(template, names, used, f"input of node {node_id}", _hop_variable(hop))

    def default_input(self, node_id: str, used: Iterable[str], hop: Hop = NO_HOP) -> str:
        """Return what a node gets that says nothing about its input."""
        before = self._workflow.predecessors[node_id]
        if hop.router:
            return hop.output
        if not before:
            return self._run.input
        if len(before) == 1:
            return self.look(before[0]).output
        return self._object(used)

    def wait_of(self, node_id: str, used: Iterable[str], hop: Hop = NO_HOP) -> waits.Bound:
        """Return the wait of a node with its templates filled in. Raises Stop if one fails."""
        node, where = self._workflow.document.nodes[node_id], f"wait of node {node_id}"
        values = self._values(self._visible(self._workflow.reads[node_id], used), _hop_variable(hop))
        try:
            return waits.bind(node.kind, node.wait, where, lambda value: expressions.render(value, values.evaluate))
        except waits.WaitError as error:
            raise Stop("binding_failed", str(error)) from None  # says where itself
        except (expressions.ExpressionError, canonical.NotJsonError) as error:
            raise Stop("binding_failed", f"{where}: {error}") from None

    def item_input(self, node_id: str, item: str, number: int, used: Iterable[str]) -> str:
        """Return the input of a map's item. Raises Stop."""
        template = self._workflow.document.nodes[node_id].input
        if template is msgspec.UNSET:
            return item
        more = {"item": canonical.loads(item), "index": number}
        return self._rendered(template, self._workflow.reads[node_id], used, f"input of node {node_id}", more)

    def items_of(self, node_id: str, used: Iterable[str], hop: Hop = NO_HOP) -> list[Any]:
        """Return the list that a map goes over. Raises Stop."""
        node = self._workflow.document.nodes[node_id]
        where = f"`over` of node {node_id}"
        items = self._evaluated(node.over, used, where, "binding_failed", _hop_variable(hop))
        if not isinstance(items, list | tuple):
            raise Stop("binding_failed", f"{where} must give a list, not a {type(items).__name__}")
        if len(items) > node.max_items:
            raise Stop("too_many_items", f"{where} gives {len(items)} items, at most {node.max_items} (`max_items`)")
        return list(items)

    def is_taken(self, source: str, target: str, condition: str, output: str) -> bool:
        """Return what the condition of an edge says of its source's output, canonical JSON. Raises Stop."""
        where = f"`when` of {source} -> {target}"
        taken = self._evaluated(condition, (source,), where, "condition_failed", {}, output)
        if not isinstance(taken, bool):
            raise Stop("condition_failed", f"{where} must give true or false, not a {type(taken).__name__}")
        return taken

    def choice_of(self, node_id: str, used: Iterable[str], value: str) -> str:
        """Return the node that a router chooses for its input, canonical JSON; empty for none. Raises Stop."""
        where = f"`choose` of node {node_id}"
        chosen = self._evaluated(self._workflow.document.nodes[node_id].choose, used, where, "bad_route", {}, value)
        if chosen is None:
            return ""
        if not isinstance(chosen, str):
            raise Stop("bad_route", f"{where} must give a node's name or null, not a {type(chosen).__name__}")
        return chosen

    def run_output(self) -> str:
        """Return the run's output when every node is settled. Raises Stop if its template fails."""
        workflow, document = self._workflow, self._workflow.document
        if document.output is not msgspec.UNSET:
            names = workflow.output_reads
            every = document.nodes if names is None else names & document.nodes.keys()
            return self._render(document.output, every, "output", {})
        succeeded = [sink for sink in workflow.sinks if self.look(sink).status == states.SUCCEEDED]
        if document.aggregate == "all":
            return self._all_results()
        if document.aggregate == "latest" or (not document.aggregate and len(workflow.sinks) == 1):
            latest = max(succeeded, key=lambda sink: (self.look(sink).wave, sink), default=None)
            return "null" if latest is None else self.look(latest).output
        return self._object(succeeded)

    def _all_results(self) -> str:
        parts = []
        for sink in sorted(self._workflow.sinks):
            state = self.look(sink)
            output = state.output if state.status == states.SUCCEEDED else "null"
            parts.append(f'{canonical.dumps(sink)}:{{"output":{output},"status":"{state.status}"}}')
        return "{" + ",".join(parts) + "}"

    # -- how ---------------------------------------------------------------

    def _object(self, nodes: Iterable[str]) -> str:
        return "{" + ",".join(f"{canonical.dumps(node)}:{self.look(node).output}" for node in sorted(nodes)) + "}"

    def _evaluated(
        self,
        expression: str,
        used: Iterable[str],
        where: str,
        code: str,
        more: Mapping[str, Any],
        output: str | None = None,
    ) -> Any:
        source = expressions.source_of(expression)
        try:
            names = self._visible(expressions.nodes_read(source), used)
            return self._values(names, more, output).evaluate(source)
        except (expressions.ExpressionError, canonical.NotJsonError) as error:
            raise Stop(code, f"{where}: {error}") from None

    def _rendered(
        self, template: Any, names: frozenset[str] | None, used: Iterable[str], where: str, more: Mapping[str, Any]
    ) -> str:
        return self._render(template, self._visible(names, used), where, more)

    def _render(self, template: Any, names: Iterable[str], where: str, more: Mapping[str, Any]) -> str:
        try:
            return canonical.dumps(expressions.render(template, self._values(names, more).evaluate))
        except (expressions.ExpressionError, canonical.NotJsonError) as error:
            raise Stop("binding_failed", f"{where}: {error}") from None

    def _values(self, names: Iterable[str], more: Mapping[str, Any], output: str | None = None) -> expressions.Values:
        found = ((name, self.look(name)) for name in names)
        nodes = {name: state.output for name, state in found if state.status == states.SUCCEEDED}
        texts = {"input": self._run.input} if output is None else {"input": self._run.input, "output": output}
        return expressions.Values(texts, nodes, more, self._contexts)

    def _visible(self, names: frozenset[str] | None, used: Iterable[str]) -> Iterable[str]:
        """Return the nodes among `names` (None: all) that led to where `used` did."""
        if names is not None and not names:
            return ()
        if self._workflow.is_straight and names is not None:
            return names  # that they come before was seen when the definition was judged
        led_here = self._led_here(used)
        return led_here if names is None else led_here & names

    def _led_here(self, used: Iterable[str]) -> set[str]:
        found: set[str] = set()
        ahead = list(used)
        while ahead:
            node_id = ahead.pop()
            if node_id not in found:
                found.add(node_id)
                state = self.look(node_id)
                before = self._workflow.predecessors[node_id] if state.used is None else state.used
                ahead.extend(other for other in before if self._leads(other, node_id))
        return found

    def _leads(self, source: str, target: str) -> bool:
        state = self.look(source)
        return state.status == states.SUCCEEDED and (state.taken is None or target in state.taken)


def _hop_variable(hop: Hop) -> dict[str, Any]:
    if not hop.router:
        return {"hop": None}
    return {"hop": {"router": hop.router, "output": canonical.loads(hop.output), "visit": hop.visit}}
