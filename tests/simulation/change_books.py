"""The judge's books of changes of graphs: what each entry may say of them, and what may come of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tidegate.domain import canonical
from tidegate.domain import run_events as re

StepKey = tuple[str, str]
GRAPH = "graph"


class Proposals:
    """Remembers what was proposed until it is accepted."""

    def __init__(self) -> None:
        self._open: dict[StepKey, str] = {}

    def accepted(self, run_id: str, event: Any) -> dict[str, Any] | None:
        """Take an event; return the change of the run's graph that it makes, if it makes one."""
        if isinstance(event, re.GraphChangeProposed) and event.kind == GRAPH:
            self._open[run_id, event.step_id] = event.change
        elif isinstance(event, re.GraphChangeAccepted) and event.kind == GRAPH:
            return canonical.loads(self._open[run_id, event.step_id])
        return None


class ChangeBooks:
    """Takes note of events. require: raises its text if its condition does not hold."""

    def __init__(self, require: Callable[[object, str], None]) -> None:
        self._require = require
        self._rules: dict[str, dict[str, Any]] = {}
        self._nodes: dict[str, dict[str, Any]] = {}  # of each run's graph as its log makes it
        self._added_by: dict[StepKey, str] = {}
        self._proposed: dict[StepKey, re.GraphChangeProposed] = {}
        self._open: set[StepKey] = set()
        self._succeeded: set[StepKey] = set()
        self._accepted: dict[str, int] = defaultdict(int)
        self.accepted = 0
        self.rejected = 0
        self.conflicts = 0

    def event(self, run_id: str, event: Any) -> None:
        """Each proposal is decided on once and as its run allows; what it adds begins after the step that proposed it."""
        if isinstance(event, re.RunStarted):
            definition = canonical.loads(event.definition)
            self._rules[run_id] = definition.get("evolution", {"mode": "disabled"})
            self._nodes[run_id] = dict(definition["nodes"])
        elif isinstance(event, re.StepSucceeded):
            self._succeeded.add((run_id, event.step_id))
            self._require((run_id, event.step_id) not in self._open, f"{run_id} {event.step_id} went on undecided")
        elif isinstance(event, re.StepReady | re.WaitStarted | re.ChildStarted):
            self._require(event.node_id in self._nodes[run_id], f"{run_id} {event.step_id} is of no node of its graph")
            by = self._added_by.get((run_id, event.node_id))
            self._require(
                by is None or (run_id, by) in self._succeeded,
                f"{run_id} {event.step_id} began before {by}, which proposed it, was through",
            )
        elif isinstance(event, re.StepCancelled):
            self._open.discard((run_id, event.step_id))
        elif isinstance(event, re.RunFinished):
            self._require(not any(key[0] == run_id for key in self._open), f"{run_id} ended with a change undecided")
        elif isinstance(event, re.GraphChangeProposed) and event.kind == GRAPH:
            key = (run_id, event.step_id)
            self._require(key not in self._proposed, f"{run_id} {event.step_id} proposed twice")
            self._proposed[key] = event
            self._open.add(key)
        elif isinstance(event, re.GraphChangeAccepted) and event.kind == GRAPH:
            self._has_accepted(run_id, event)
        elif isinstance(event, re.GraphChangeRejected) and event.kind == GRAPH:
            self._decided((run_id, event.step_id))
            self.rejected += 1
            self.conflicts += event.code == "conflict"

    def _decided(self, key: StepKey) -> None:
        self._require(key in self._open, f"{key} was decided on twice, or never proposed")
        self._open.discard(key)

    def _has_accepted(self, run_id: str, event: re.GraphChangeAccepted) -> None:
        self._decided((run_id, event.step_id))
        self.accepted += 1
        self._accepted[run_id] += 1
        rules, nodes = self._rules[run_id], self._nodes[run_id]
        self._require(rules["mode"] != "disabled", f"{run_id} changed, which its workflow does not allow")
        self._require(self._accepted[run_id] <= rules.get("max_changes", 50), f"{run_id} changed too often")
        added = canonical.loads(self._proposed[run_id, event.step_id].change)["nodes"]
        for name, node in added.items():
            self._require(nodes.get(name, node) == node, f"{run_id}: node {name} was replaced")
            self._added_by.setdefault((run_id, name), event.step_id)
        nodes |= added
