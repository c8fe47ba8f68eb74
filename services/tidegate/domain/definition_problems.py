"""What can be wrong with a definition's nodes, edges and expressions, beyond its shape. Each problem says where."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

from tidegate.domain import expressions, retries, waits
from tidegate.domain.definition_damage import MANY, SURE, Unsure
from tidegate.domain.graph_changes import edge_ends
from tidegate.domain.routes import CYCLE, Ancestry, Form, form_of

FLOW_CALLS: Final = ("step", "agent", "tool")  # the kinds of functions that flows may call
MAX_LISTED: Final = 20  # names that a problem lists
_OF_OUTSIDE_TOOLS: Final = frozenset(
    {"kind", "outside", "timeout_ms", "reserve_micros", "description", "parameters", "output"}
)
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


def node_problems(definition: Mapping[str, Any], unsure: Unsure = SURE) -> list[str]:
    """Return what is wrong with the fields of nodes."""
    found = []
    for node_id, node in definition["nodes"].items():
        where = f"nodes.{node_id}"
        if ("nodes", node_id) not in unsure.kinds:
            found += _field_problems(where, node_id, node)
        label = node.get("workflow")
        if label is not None and not _is_there(definition, "workflows", label, unsure):
            found.append(f"{where}: workflow {label!r} is not among the `workflows` of this definition")
    return found


def _field_problems(where: str, node_id: str, node: Mapping[str, Any]) -> list[str]:
    kind = node["kind"]
    needed, allowed = _FIELDS[kind]
    found = [f"{where}: a node of kind {kind} needs `{name}`" for name in sorted(needed - node.keys())]
    unknown = sorted(node.keys() - needed - allowed - _ANY)
    found += [f"{where}: a node of kind {kind} has no `{name}`" for name in unknown]
    return found + (waits.definition_problems(node_id, node) if kind in waits.KINDS else [])


def _is_there(definition: Mapping[str, Any], part: str, name: str, unsure: Unsure) -> bool:
    return name in definition.get(part, {}) or unsure.may_have(part, name)


def function_problems(definition: Mapping[str, Any], unsure: Unsure = SURE) -> list[str]:
    """Return what is wrong with the functions, and with what nodes name as theirs."""
    functions = definition["functions"]
    known = ", ".join([*itertools.islice(functions, MAX_LISTED), *(["…"] if len(functions) > MAX_LISTED else [])])
    found = []
    for node_id, node in definition["nodes"].items():
        name = node.get("function")
        if name is None or unsure.may_have("functions", name):
            continue
        if name not in functions:
            found.append(f"nodes.{node_id}: unknown function {name!r} (known: {known or 'none'})")
        elif not unsure.kinds.isdisjoint((("nodes", node_id), ("functions", name))):
            continue
        elif problem := _kind_problem(node["kind"], functions[name]["kind"]):
            found.append(f"nodes.{node_id}: {name!r} {problem}")
    for name, function in functions.items():
        found += retries.problems(function, f"functions.{name}")
        if ("functions", name) not in unsure.kinds:
            found += _outside_problems(name, function)
            found += _tool_problems(name, function, functions, unsure)
            found += _child_problems(name, function, definition, unsure)
    return found


def _kind_problem(node: str, function: str) -> str:
    if node == "map":
        return "" if function in ("step", "agent") else f"is a {function}, not a step or an agent"
    return "" if function == node else f"is a {function}, not a {node}"


def _tool_problems(
    name: str, function: Mapping[str, Any], functions: Mapping[str, Any], unsure: Unsure
) -> Iterator[str]:
    for tool in function.get("tools", ()):
        if unsure.may_have("functions", tool) or ("functions", tool) in unsure.kinds:
            continue
        if problem := _call_problem(function["kind"], functions.get(tool, {})):
            yield f"functions.{name}.tools: {tool!r} {problem} of this definition"


def _call_problem(caller: str, called: Mapping[str, Any]) -> str:
    kind = called.get("kind")
    if caller != "flow":
        return "" if kind == "tool" else "is not a tool"
    return "" if kind in FLOW_CALLS else "is not a step, agent or tool"


def _child_problems(name: str, function: Mapping[str, Any], definition: Mapping[str, Any], unsure: Unsure) -> list[str]:
    where, labels = f"functions.{name}.workflows", function.get("workflows", ())
    if labels and function["kind"] != "flow":
        return [f"{where}: a {function['kind']} starts no runs, only a flow does"]
    found = [
        f"{where}: {label!r} is not among the `workflows` of this definition"
        for label in labels
        if not _is_there(definition, "workflows", label, unsure)
    ]
    counts = Counter(label.partition("@")[0] for label in labels)
    return found + [f"{where}: {child!r} is there twice" for child, count in sorted(counts.items()) if count > 1]


def _outside_problems(name: str, function: Mapping[str, Any]) -> list[str]:
    where = f"functions.{name}"
    if not function.get("outside"):
        return (
            [f"{where}.output: only a tool that is `outside` says what its output is"] if "output" in function else []
        )
    if function["kind"] != "tool":
        return [f"{where}.outside: a {function['kind']} cannot be done outside, only a tool can"]
    foreign = sorted(function.keys() - _OF_OUTSIDE_TOOLS)
    return [f"{where}.{setting}: nothing of an outside tool is run here" for setting in foreign]


class Order(NamedTuple):
    """What comes before what in a graph, as far as that is known. is_whole: whether all edges are."""

    ancestry: Ancestry
    is_whole: bool

    def forbids(self, name: str, node_id: str) -> bool:
        """Tell whether a node cannot see the output of `name`, whatever edges are added that are yet unknown."""
        if self.is_whole:
            return not self.ancestry.is_before(name, node_id)
        return name == node_id or self.ancestry.is_before(node_id, name)


def graph_problems(definition: Mapping[str, Any], unsure: Unsure = SURE) -> tuple[list[str], Order]:
    """Return what is wrong with the edges and routes, and the order of nodes that they make."""
    nodes, edges, routes = definition["nodes"], _edges(definition), _routes(definition)
    start = definition.get("start", ())
    named = [("edges", edge) for edge in edges]
    named += [(f"nodes.{router}.routes", (router, target)) for router, targets in routes.items() for target in targets]
    found = [f"start: there is no node {name!r}" for name in start if name not in nodes]
    unknown = [(where, edge) for where, edge in named if edge[0] not in nodes or edge[1] not in nodes]
    found += [f"{where}: {a} -> {b} names an unknown node" for where, (a, b) in unknown]
    counts = Counter(edge for _, edge in named)
    found += [f"edges: {a} -> {b} is there twice" for (a, b), count in sorted(counts.items()) if count > 1]
    lacking = unsure.edges + len(unknown) + (MANY if found and start else 0)
    if sum(map(len, routes.values())) > MAX_ROUTES:
        found.append(f"nodes: more than {MAX_ROUTES} routes in one definition")
        routes, lacking = {}, MANY
    edges = list(dict.fromkeys(edge for edge in edges if nodes.keys() >= set(edge)))
    routes = {router: [name for name in dict.fromkeys(targets) if name in nodes] for router, targets in routes.items()}
    edges = [edge for edge in edges if edge[1] not in routes.get(edge[0], ())]
    found += [
        f"edges: {a} -> {b}: a node with routes has no other edges: add {b} to its routes"
        for a, b in edges
        if routes.get(a)
    ]
    form, problems = form_of(nodes, edges, routes, [name for name in start if name in nodes])
    # Without edges that are there but cannot be read, much may seem wrong; a cycle is one all the same.
    found += [problem for problem in problems if not lacking or problem.startswith(CYCLE)]
    found += _join_problems(definition, form, lacking)
    if not problems:
        return found, Order(Ancestry(form.successors), is_whole=not lacking)
    ways = {name: [*after, *routes.get(name, ())] for name, after in form.successors.items()}
    return found, Order(Ancestry(ways), is_whole=not lacking)


def _join_problems(definition: Mapping[str, Any], form: Form, lacking: int) -> list[str]:
    led_to = sorted(name for name in definition.get("start", ()) if form.predecessors.get(name))
    found = [f"start: {name} comes after {', '.join(form.predecessors[name])}" for name in led_to]
    for node_id, node in definition["nodes"].items():
        join, count = node.get("join", "all"), len(form.predecessors[node_id])
        if isinstance(join, dict) and join["need"] > count + lacking:
            found.append(f"nodes.{node_id}.join: needs {join['need']} of the {count} edges that lead there")
    return found


def binding_problems(definition: Mapping[str, Any], order: Order, *, is_new: bool) -> list[str]:
    """Return what is wrong with the expressions: those that do not compile, and those that read what cannot be there.

    is_new: somebody is about to publish it. What was published when less was looked at stays good.
    """
    found = []
    for where, node_id, template, more in _templates(definition):
        found += expressions.problems(template, where)
        found += [f"{where}: {problem}" for problem in _unbound(definition, order, node_id, template)]
        if is_new:
            found += _unknown_variables(where, template, {"input", "nodes", *more})
    return found


def _templates(definition: Mapping[str, Any]) -> Iterator[tuple[str, str | None, Any, tuple[str, ...]]]:
    """Yield the place, the node after whose predecessors it is evaluated (None: after everything), a template, and the
    variables that it has besides `input` and `nodes`.
    """
    for node_id, node in definition["nodes"].items():
        of_items = ("item", "index") if node["kind"] == "map" else ("hop",)
        yield f"nodes.{node_id}.input", node_id, node.get("input"), of_items
        if "wait" in node:
            template = {name: value for name, value in node["wait"].items() if name != "schema"}
            yield f"nodes.{node_id}.wait", node_id, template, ("hop",)
        if "over" in node:
            yield f"nodes.{node_id}.over", node_id, _as_template(node["over"]), ("hop",)
        if "choose" in node:
            yield f"nodes.{node_id}.choose", node_id, _as_template(node["choose"]), ("output",)
    for edge in definition.get("edges", ()):
        if isinstance(edge, dict) and "when" in edge:
            # A condition sees what its target will see of this way: the node it comes from, and what was before that.
            where = f"edges.{edge['from']} -> {edge['to']}.when"
            yield where, edge["to"], _as_template(edge["when"]), ("output",)
    yield "output", None, definition.get("output"), ()


def _as_template(expression: str) -> str:
    return f"${{ {expressions.source_of(expression)} }}"


def _unbound(definition: Mapping[str, Any], order: Order, node_id: str | None, template: Any) -> Iterator[str]:
    for name in sorted(expressions.nodes_read_by(template) or ()):
        if name not in definition["nodes"]:
            yield f"reads nodes.{name}, and there is no such node"
        elif node_id in definition["nodes"] and node_id is not None and order.forbids(name, node_id):
            yield f"reads nodes.{name}, which does not come before {node_id}"


def _unknown_variables(where: str, template: Any, known: Collection[str]) -> Iterator[str]:
    for source in expressions.sources(template):
        if unknown := expressions.unknown_variables(source, known):
            yield f"{where}: {source!r}: unknown: {', '.join(unknown)}; there are {', '.join(sorted(known))}"


def _edges(definition: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [edge_ends(edge) for edge in definition.get("edges", ())]


def _routes(definition: Mapping[str, Any]) -> dict[str, list[str]]:
    return {node_id: node["routes"] for node_id, node in definition["nodes"].items() if node.get("routes")}
