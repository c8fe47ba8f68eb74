"""The judge's books of routes: which node goes on where, how often, and that what is repeated was through."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from simulation.change_books import Proposals
from tidegate.domain import canonical
from tidegate.domain import run_events as re
from tidegate.domain.graph_changes import edge_ends

NodeKey = tuple[str, str]


class RouteBooks:
    """Takes note of events. require: raises its text if its condition does not hold."""

    def __init__(self, require: Callable[[object, str], None]) -> None:
        self._require = require
        self._proposals = Proposals()
        self._routes: dict[NodeKey, list[str]] = {}
        self._conditional: dict[NodeKey, list[str]] = defaultdict(
            list
        )  # of nodes that have an edge with a condition: all
        self._most: dict[str, int] = {}
        self._hops: Counter[str] = Counter()
        self._back: dict[NodeKey, str] = {}  # where a node wants to go back to, until that is entered
        self._visits: Counter[NodeKey] = Counter()
        self.taken = 0
        self.loops = 0

    def event(self, run_id: str, event: Any) -> None:
        """Only routes that there are are taken, at most `max_hops` of them; a loop is entered because its router wants it."""
        if isinstance(event, re.RunStarted):
            definition = canonical.loads(event.definition)
            self._most[run_id] = definition.get("max_hops", 50)
            self._graph(run_id, definition["nodes"], definition["edges"])
        elif (change := self._proposals.accepted(run_id, event)) is not None:
            self._graph(run_id, change["nodes"], change["edges"])
        elif isinstance(event, re.PathsChosen):
            self._chosen(run_id, event)
        elif isinstance(event, re.LoopEntered):
            wanted = self._back.pop((run_id, event.router), "")
            self._require(wanted == event.node_id, f"{run_id}: {event.router} repeats {event.node_id}, not {wanted!r}")
            before = max(1, self._visits[run_id, event.node_id])  # a loop around it counts them, too
            self._require(event.visit > before, f"{run_id}: visit {event.visit} of {event.node_id} after {before}")
            self._visits[run_id, event.node_id] = event.visit
            self.loops += 1

    def _graph(self, run_id: str, nodes: dict[str, Any], edges: list[Any]) -> None:
        for name, node in nodes.items():
            if node.get("routes"):
                self._routes[run_id, name] = node["routes"]
        for edge in edges:
            source, target = edge_ends(edge)
            self._conditional[run_id, source].append(target)

    def _chosen(self, run_id: str, event: re.PathsChosen) -> None:
        key = (run_id, event.node_id)
        allowed = self._routes.get(key) or self._conditional[key]
        self._require(set(event.targets) <= {*allowed, event.back_to}, f"{key} takes {event.targets}, of {allowed}")
        if key not in self._routes:
            return
        self._require(len(event.targets) <= 1, f"{key} takes {len(event.targets)} routes at once")
        self._hops[run_id] += bool(event.targets)
        self._require(self._hops[run_id] <= self._most[run_id], f"{run_id} takes more routes than {self._most[run_id]}")
        self.taken += bool(event.targets)
        if event.back_to:
            self._back[key] = event.back_to
