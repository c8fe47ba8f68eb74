"""What can be wrong with a definition's nodes, edges and expressions, beyond its shape. Each problem says where."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tidegate.domain import expressions, waits
from tidegate.domain.graph_changes import edge_ends
from tidegate.domain.routes import Ancestry, form_of

MAX_ROUTES: Final = 500  # each is a walk through the graph when it is judged

# By kind: fields that a node must have, and further ones that it may have. All may have those of `_ANY`.
_ANY: Final = frozenset({"kind", "input", "join"})
_FIELDS: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {
    "step": (frozenset({"function"}), frozenset({"on_failure", "routes"})),
    "agent": (frozenset({"function"}), frozenset({"on_failure", "routes"})),
    "map": (
        frozenset({"function", "over"}),
        frozenset({"on_failure", "at_once", "max_items", "on_item_failure", "results"}),
    ),
    "flow": (frozenset({"function"}), frozenset({"on_failure"})),
    "router": (frozenset({"choose", "routes"}), frozenset()),
    **dict.fromkeys(waits.KINDS, (frozenset[str](), frozenset({"on_failure", "wait", "function"}))),  # see `waits.py`
    "workflow": (frozenset({"workflow"}), frozenset({"on_failure", "budget_micros"})),
}
_ALL_FIELDS: Final = _ANY.union(*(needed | more for needed, more in _FIELDS.values()))


def without_damage(definition: Any, places: Sequence[tuple[Any, ...]]) -> dict[str, Any] | None:
    """Return a definition without what stands in these places, where its shape is wrong; None if too little would be left.

    A node stays, whatever is wrong with it: others may name it.
    """
    made: dict[str, Any] = copy.deepcopy(definition) if isinstance(definition, dict) else {}
    edges = {place[1] for place in places if place[:1] == ("edges",) and len(place) > 1}
    for place in places:
        part, name, field = (*place, None, None, None)[:3]
        if part == "nodes" and name is not None:
            node = made["nodes"][name] if isinstance(made["nodes"][name], dict) else {}
            made["nodes"][name] = {key: value for key, value in node.items() if key in _ALL_FIELDS and key != field}
            made["nodes"][name].setdefault("kind", _kind_of(made, node))
        elif part == "functions" and name is not None and field not in (None, "kind"):
            made["functions"][name].pop(field, None)
        elif part == "edges" and name is not None:
            continue
        elif part in (None, "nodes", "functions", "workflows", "name", "version"):
            return None
        else:
            made.pop(part, None)
    if edges and "edges" in made:
        made["edges"] = [edge for number, edge in enumerate(made["edges"]) if number not in edges]
    return made


def _kind_of(definition: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return what a node without a good kind may be meant as: what its function is."""
    functions, name = definition.get("functions"), node.get("function")
    function = functions.get(name) if isinstance(functions, dict) and isinstance(name, str) else None
    kind = function.get("kind") if isinstance(function, dict) else None
    return kind if kind in ("agent", "flow") else "step"


def node_problems(definition: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the fields of nodes."""
    found = []
    for node_id, node in definition["nodes"].items():
        where, kind = f"nodes.{node_id}", node["kind"]
        needed, allowed = _FIELDS[kind]
        found += [f"{where}: a node of kind {kind} needs `{name}`" for name in sorted(needed - node.keys())]
        unknown = sorted(node.keys() - needed - allowed - _ANY)
        found += [f"{where}: a node of kind {kind} has no `{name}`" for name in unknown]
        if kind in waits.KINDS:
            found += waits.definition_problems(node_id, node)
        label = node.get("workflow")
        if label is not None and label not in definition.get("workflows", {}):
            found.append(f"{where}: workflow {label!r} is not among the `workflows` of this definition")
    return found


def graph_problems(definition: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the edges and routes."""
    nodes, edges, routes = definition["nodes"], _edges(definition), _routes(definition)
    named = [("edges", edge) for edge in edges]
    named += [(f"nodes.{router}.routes", (router, target)) for router, targets in routes.items() for target in targets]
    found = [f"start: there is no node {name!r}" for name in definition.get("start", ()) if name not in nodes]
    found += [
        f"{where}: {a} -> {b} names an unknown node" for where, (a, b) in named if a not in nodes or b not in nodes
    ]
    counts = Counter(edge for _, edge in named)
    found += [f"edges: {a} -> {b} is there twice" for (a, b), count in sorted(counts.items()) if count > 1]
    if sum(map(len, routes.values())) > MAX_ROUTES:
        return [*found, f"nodes: more than {MAX_ROUTES} routes in one definition"]
    if found:  # of what there is, the rest may be wrong as well
        edges = list(dict.fromkeys(edge for edge in edges if nodes.keys() >= set(edge)))
        routes = {router: [name for name in routes[router] if name in nodes] for router in routes}
        edges = [edge for edge in edges if edge[1] not in routes.get(edge[0], ())]
        form, problems = form_of(nodes, edges, routes, [name for name in definition.get("start", ()) if name in nodes])
        return found + problems
    found += [
        f"edges: {a} -> {b}: a node with routes has no other edges: add {b} to its routes"
        for a, b in edges
        if a in routes
    ]
    form, problems = form_of(nodes, edges, routes, definition.get("start", ()))
    led_to = sorted(name for name in definition.get("start", ()) if form.predecessors[name])
    problems += [f"start: {name} comes after {', '.join(form.predecessors[name])}" for name in led_to]
    for node_id, node in nodes.items():
        join = node.get("join", "all")
        count = len(form.predecessors[node_id])
        if isinstance(join, dict) and join["need"] > count:
            problems.append(f"nodes.{node_id}.join: needs {join['need']} of the {count} edges that lead there")
    return found + problems


def binding_problems(definition: Mapping[str, Any], *, is_graph: bool) -> list[str]:
    """Return what is wrong with the expressions: those that do not compile, and those that read what cannot be there.

    is_graph: whether edges and routes are right, so that there is a before and after.
    """
    ancestry = None
    if is_graph:
        form, _ = form_of(definition["nodes"], _edges(definition), _routes(definition), definition.get("start", ()))
        ancestry = Ancestry(form)
    found = []
    for where, node_id, template in _templates(definition):
        problems = expressions.problems(template, where)
        if ancestry is not None and not problems:
            problems = [f"{where}: {problem}" for problem in _unbound(definition, ancestry, node_id, template)]
        found += problems
    return found


def _templates(definition: Mapping[str, Any]) -> Iterator[tuple[str, str | None, Any]]:
    """Yield the place, the node after whose predecessors it is evaluated (None: after everything), and a template."""
    for node_id, node in definition["nodes"].items():
        yield f"nodes.{node_id}.input", node_id, node.get("input")
        if "wait" in node:
            yield f"nodes.{node_id}.wait", node_id, {k: v for k, v in node["wait"].items() if k != "schema"}
        for name in ("over", "choose"):
            if name in node:
                yield f"nodes.{node_id}.{name}", node_id, _as_template(node[name])
    for edge in definition.get("edges", ()):
        if isinstance(edge, dict) and "when" in edge:
            # A condition sees what its target will see of this way: the node it comes from, and what was before that.
            yield f"edges.{edge['from']} -> {edge['to']}.when", edge["to"], _as_template(edge["when"])
    yield "output", None, definition.get("output")


def _as_template(expression: str) -> str:
    return f"${{ {expressions.source_of(expression)} }}"


def _unbound(definition: Mapping[str, Any], ancestry: Ancestry, node_id: str | None, template: Any) -> Iterator[str]:
    for name in sorted(expressions.nodes_read_by(template) or ()):
        if name not in definition["nodes"]:
            yield f"reads nodes.{name}, and there is no such node"
        elif node_id is not None and not ancestry.is_before(name, node_id):
            yield f"reads nodes.{name}, which does not come before {node_id}"


def _edges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [edge_ends(edge) for edge in definition.get("edges", ())]


def _routes(definition: Mapping[str, Any]) -> dict[str, list[str]]:
    return {node_id: node["routes"] for node_id, node in definition["nodes"].items() if node.get("routes")}
