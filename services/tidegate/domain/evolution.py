"""What a change of a running graph may be, and which of two that do not go together is in force. Pure.

A step proposes nodes and edges. They are judged against the graph as it is then, by rules that look at the form of the graph
and not at how far the run is: whether a change fits does not depend on the order in which other branches come. Only when two
changes do not go together does the order count: the one that the log has first is in force, the later one is a conflict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

from tidegate.domain import canonical
from tidegate.domain.graph_changes import (
    DISABLED,
    MAX_CHANGE_BYTES,
    MAX_CHANGE_EDGES,
    MAX_CHANGE_NODES,
    MAX_GRAPH_EDGES,
    AcceptedChange,
    edge_ends,
    merged,
)
from tidegate.domain.routes import reached
from tidegate.domain.strict_schema import Validator, shape_problem
from tidegate.domain.workflow import DEFINITION_SCHEMA, Workflow, evolved, validate_definition

INVALID: Final = "invalid"
CONFLICT: Final = "conflict"
MAX_BECAUSE: Final = 2_000
MAX_LOOKED_BACK: Final = 8  # changes that a conflict is looked for in: each is a look at the whole graph
_MAX_PROBLEMS: Final = 10

_properties: Final = DEFINITION_SCHEMA["properties"]
CHANGE_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "nodes": {**_properties["nodes"], "minProperties": 0, "maxProperties": MAX_CHANGE_NODES},
        "edges": {**_properties["edges"], "maxItems": MAX_CHANGE_EDGES},
        "because": {"type": "string", "maxLength": MAX_BECAUSE},
    },
}
_validator: Final = Validator(CHANGE_SCHEMA)


class Problem(NamedTuple):
    """Why a change is rejected. conflicts_with: the step whose change it does not go together with; or empty."""

    code: str
    reason: str
    conflicts_with: str = ""


class Verdict(NamedTuple):
    """What became of a proposal. change: as it is recorded, canonical JSON, empty if it cannot be read; nodes: those it adds."""

    change: str
    nodes: tuple[str, ...]
    problem: Problem | None = None


def judge(workflow: Workflow, accepted: Sequence[AcceptedChange], node_id: str, text: str) -> Verdict:
    """Judge what a step of this node proposes, against the graph that the accepted changes have made."""
    size = len(text.encode())
    if size > MAX_CHANGE_BYTES:
        return Verdict("", (), Problem("too_large", f"the change has {size} bytes, at most {MAX_CHANGE_BYTES}"))
    proposed, problem = _read(text)
    if problem is not None:
        return Verdict("", (), problem)
    rules = workflow.document.evolution
    definition = canonical.loads(workflow.definition)
    change, problem = _completed(workflow, definition, accepted, node_id, proposed)
    verdict = Verdict(canonical.dumps(change), tuple(change["nodes"]))
    if rules.mode == DISABLED:
        problem = Problem("evolution_disabled", "this workflow does not let its runs change their graph (`evolution`)")
    elif len(accepted) >= rules.max_changes:
        problem = Problem("too_many", f"the run has changed {len(accepted)} times, at most {rules.max_changes} it may")
    elif problem is None:
        problem = _misfit(workflow, definition, accepted, node_id, verdict.change)
    return verdict._replace(problem=problem)


def _read(text: str) -> tuple[dict[str, Any], Problem | None]:
    try:
        value = canonical.loads(text)
    except canonical.NotJsonError as error:
        return {}, Problem(INVALID, f"the change is not JSON: {error}")
    found = sorted(
        f"{'.'.join(map(str, error.absolute_path)) or 'change'}: {shape_problem(error)}"
        for error in _validator.iter_errors(value)
    )
    if not found and not value.get("nodes") and not value.get("edges"):
        found = ["change: it adds no node and no edge"]
    return value, _invalid(found) if found else None


def _invalid(problems: Sequence[str]) -> Problem:
    more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
    return Problem(INVALID, "; ".join(problems[:_MAX_PROBLEMS]) + more)


def _completed(
    workflow: Workflow,
    definition: Mapping[str, Any],
    accepted: Sequence[AcceptedChange],
    node_id: str,
    proposed: Mapping[str, Any],
) -> tuple[dict[str, Any], Problem | None]:
    """Return the change without what is there already, and with an edge from its node to whatever nothing leads to."""
    by: dict[str, tuple[str, Any]] = {}
    edges_there = set(map(canonical.dumps, definition.get("edges", ())))
    for one in accepted:
        earlier = canonical.loads(one.change)
        by |= {name: (one.step_id, node) for name, node in earlier["nodes"].items()}
        edges_there |= set(map(canonical.dumps, earlier["edges"]))
    problem = None
    nodes = {}
    for name, node in sorted(proposed.get("nodes", {}).items()):
        if name not in workflow.document.nodes:
            nodes[name] = node
        elif name not in by:
            problem = problem or Problem(INVALID, f"nodes.{name}: the definition has a node of that name")
        elif by[name][1] != node:
            reason = f"nodes.{name}: step {by[name][0]} has added another node of that name"
            problem = problem or Problem(CONFLICT, reason, by[name][0])
    edges = [edge for edge in proposed.get("edges", ()) if canonical.dumps(edge) not in edges_there]
    led_to = {edge_ends(edge)[1] for edge in edges}
    led_to.update(target for node in nodes.values() for target in node.get("routes", ()))
    edges += [[node_id, name] for name in nodes if name not in led_to]
    if edges and len(edges_there) + len(edges) > MAX_GRAPH_EDGES:
        reason = f"the run's graph would have {len(edges_there) + len(edges)} edges, at most {MAX_GRAPH_EDGES} it may"
        problem = problem or Problem("too_many", reason)
    return {"nodes": nodes, "edges": edges, "because": proposed.get("because", "")}, problem


def _misfit(
    workflow: Workflow, definition: Mapping[str, Any], accepted: Sequence[AcceptedChange], node_id: str, change: str
) -> Problem | None:
    """Return why the change does not fit. One that would fit without changes that came before it is in conflict with them."""
    added = canonical.loads(change)
    broken = _broken_rules(workflow, node_id, added)
    problems = broken.problems
    if not broken.is_final:
        changes = [one.change for one in accepted]
        problems = _with_graph_problems(problems, workflow, definition, changes, node_id, change)
    if not problems:
        return None
    furthest = len(accepted) if broken.is_its_own else max(0, len(accepted) - MAX_LOOKED_BACK)
    for count in range(len(accepted) - 1, furthest - 1, -1):
        before = [one.change for one in accepted[:count]]
        graph = evolved(workflow.definition, tuple(before))
        if _broken_rules(graph, node_id, added).problems:
            continue
        if not _with_graph_problems([], graph, definition, before, node_id, change):
            other = accepted[count].step_id
            reason = f"it does not go together with the change of step {other}: {_invalid(problems).reason}"
            return Problem(CONFLICT, reason, other)
    return _invalid(problems)


class _Broken(NamedTuple):
    """Rules that a change breaks by where it begins and leads to.

    is_its_own: it broke them without the changes before it too, because these only ever add nodes and ways, and repeat nothing
    that was there. is_final: there is no graph with it that could be looked at.
    """

    problems: list[str]
    is_its_own: bool = False
    is_final: bool = False


def _broken_rules(workflow: Workflow, node_id: str, added: Mapping[str, Any]) -> _Broken:
    if node_id not in workflow.document.nodes:
        return _Broken([f"there is no node {node_id!r}"], is_its_own=True, is_final=True)
    if any(node_id in body for body in workflow.form.loops.values()):
        problem = f"node {node_id} lies in a loop: what is repeated cannot change the graph"
        return _Broken([problem], is_its_own=True, is_final=True)
    nodes, ends = added["nodes"], [edge_ends(edge) for edge in added["edges"]]
    ends += [(router, target) for router, node in nodes.items() for target in node.get("routes", ())]
    names = {*workflow.document.nodes, *nodes}
    unknown = [f"edges: {a} -> {b} names an unknown node" for a, b in ends if a not in names or b not in names]
    if unknown:
        return _Broken(unknown, is_its_own=True, is_final=True)
    conditional = {edge_ends(edge) for edge in added["edges"] if isinstance(edge, dict) and edge.get("when")}
    behind = _behind(workflow, node_id)
    found, is_its_own = [], False
    for source, target in ends:
        is_conditional = (source, target) in conditional
        at_source = _source_problem(workflow, node_id, nodes, source, target, is_conditional=is_conditional)
        at_target = _target_problem(behind, node_id, nodes, source, target)
        found += [problem for problem in (at_source, at_target) if problem]
        is_its_own = is_its_own or bool(at_target)
    return _Broken(found, is_its_own)


def _with_graph_problems(
    problems: list[str],
    workflow: Workflow,
    definition: Mapping[str, Any],
    accepted: Sequence[str],
    node_id: str,
    change: str,
) -> list[str]:
    """Return the problems and what is wrong with the graph that the change makes of `workflow`, the graph before it."""
    found = problems + validate_definition(merged(definition, [*accepted, change]), is_new=False)
    if found:
        return found
    after = evolved(workflow.definition, (*accepted, change))
    return _form_problems(workflow, after, node_id, canonical.loads(change)["nodes"])


def _source_problem(
    workflow: Workflow, node_id: str, nodes: Collection[str], source: str, target: str, *, is_conditional: bool
) -> str:
    """An edge may begin where nothing has been decided yet of what comes next, or where nothing ever is."""
    if source in nodes or source == node_id:
        return ""
    if source in workflow.routes or source in workflow.conditions:
        return f"edges: {source} -> {target}: {source} chooses among its own edges, and may have chosen already"
    if is_conditional:
        return f"edges: {source} -> {target}: `when` is for edges from {node_id} and from new nodes"
    return ""


def _behind(workflow: Workflow, node_id: str) -> set[str]:
    """Return the nodes that must wait for this one."""
    early = workflow.needs.keys()
    after = workflow.form.successors.items()
    waits_for_all = {name: [one for one in followers if one not in early] for name, followers in after}
    return reached([node_id], waits_for_all) - {node_id}


def _target_problem(behind: Collection[str], node_id: str, nodes: Collection[str], source: str, target: str) -> str:
    """An edge may lead only to what cannot have begun: to new nodes, and to those that must wait for the proposing one."""
    if target in nodes or target in behind:
        return ""
    return f"edges: {source} -> {target}: {target} need not wait for {node_id}, so it may have begun already"


def _form_problems(old: Workflow, new: Workflow, node_id: str, nodes: Collection[str]) -> list[str]:
    later = reached([node_id], new.form.successors)
    found = [
        f"nodes.{name}: it must come after {node_id}, whose step proposes it" for name in nodes if name not in later
    ]
    for (router, target), body in new.form.loops.items():
        if old.form.loops.get((router, target)) != body and not body <= set(nodes):
            found.append(f"nodes.{router}: a loop back to {target} may only be of new nodes")
    found += [f"nodes.{router}: its loop would be gone" for router, _ in old.form.loops.keys() - new.form.loops.keys()]
    return sorted(found)
