"""Changes of a running graph: what one consists of, and the graph that a definition and its changes make. Pure.

A change only ever adds. What is there stays as it was defined, so nothing that has happened can come to mean something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from tidegate.domain import canonical

GRAPH: Final = "graph"  # nodes and edges of the run's graph
PLAN: Final = "plan"  # an agent's tool calls
FLOW: Final = "flow"  # a flow's calls

DISABLED: Final = "disabled"
OPTIONAL: Final = "optional"
REQUIRED: Final = "required"
MODES: Final = (DISABLED, OPTIONAL, REQUIRED)

MAX_CHANGES: Final = 50  # of one run
MAX_CHANGE_NODES: Final = 100
MAX_CHANGE_EDGES: Final = 1_000
MAX_GRAPH_EDGES: Final = 10_000  # of a graph that has changed: each change is judged by walks through all of it
MAX_CHANGE_BYTES: Final = 256 * 1024
MAX_EXPIRES_S: Final = 366 * 24 * 3600


class Evolution(msgspec.Struct, frozen=True):
    """Whether runs of a definition may change their graph.

    mode: `disabled` (every proposal is rejected), `optional` (a rejected one changes nothing) or `required` (a rejected one
    fails its step). approval: a person decides on each, within `expires_s` seconds if that is said. max_changes: of one run.
    """

    mode: str = DISABLED
    approval: bool = False
    expires_s: float | None = None
    max_changes: int = MAX_CHANGES


class AcceptedChange(msgspec.Struct, frozen=True, array_like=True):
    """A change that is part of a run's graph. step_id: the step that proposed it. change: canonical JSON."""

    step_id: str
    change: str


class OpenProposal(msgspec.Struct, frozen=True, array_like=True):
    """A change on which nothing is decided yet, with what its step gives when that is done: its output and choice of a route."""

    change: str
    output: str
    goto: str


EVOLUTION_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["mode"],
    "properties": {
        "mode": {"enum": list(MODES)},
        "approval": {"type": "boolean"},
        "expires_s": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_EXPIRES_S},
        "max_changes": {"type": "integer", "minimum": 1, "maximum": MAX_CHANGES},
    },
    "dependentRequired": {"expires_s": ["approval"]},
}


def edge_ends(edge: Any) -> tuple[str, str]:
    """Return where an edge of a definition comes from and leads to."""
    return (edge["from"], edge["to"]) if isinstance(edge, Mapping) else (edge[0], edge[1])


def merged(definition: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Return the definition of the graph that these changes, in this order, make of one."""
    made = {**definition, "nodes": dict(definition["nodes"]), "edges": list(definition.get("edges", ()))}
    there = set(map(_edge_mark, made["edges"]))
    for text in changes:
        change = canonical.loads(text)
        made["nodes"] |= change["nodes"]
        made["edges"] += [edge for edge in change["edges"] if _edge_mark(edge) not in there]
        there.update(map(_edge_mark, change["edges"]))
    return made


def _edge_mark(edge: Any) -> tuple[Any, ...]:
    """Return what tells an edge from every other one, whichever way each is written."""
    return tuple(sorted(edge.items())) if isinstance(edge, Mapping) else tuple(edge)


def graph_hash(definition: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a graph as its changes have made it: of nodes and edges, whatever the order of these."""
    edges = sorted(map(canonical.dumps, definition.get("edges", ())))
    return canonical.digest(canonical.dumps({"nodes": definition["nodes"], "edges": edges}))
