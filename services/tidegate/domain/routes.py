"""The form of a graph: which node comes before which, and where a router may lead back. Pure.

A plain edge never leads back. A route (an edge that its router may choose) may: then it must lead to a node that every way to
the router passes, so that what is repeated, the loop's body, is entered at one place. A body is left only by routes of nodes
that every round passes. So a round is over before the next one begins, whatever the order in which results come.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

Edge = tuple[str, str]

CYCLE: Final = (
    "edges: a cycle keeps these nodes from ever starting"  # how that problem begins: it is one whatever else is
)


class Form(NamedTuple):
    """predecessors, successors: by node, without the routes that lead back. loops: (router, target) -> the nodes repeated.

    held: edge that leaves a loop -> the routers that may still repeat it: it counts as not taken only when all of them are
    settled. released: router -> the nodes that such edges lead to.
    """

    roots: tuple[str, ...]
    predecessors: dict[str, tuple[str, ...]]
    successors: dict[str, tuple[str, ...]]
    loops: dict[Edge, frozenset[str]]
    held: dict[Edge, tuple[str, ...]]
    released: dict[str, tuple[str, ...]]


def form_of(
    nodes: Collection[str], edges: Sequence[Edge], routes: Mapping[str, Sequence[str]], start: Collection[str] = ()
) -> tuple[Form, list[str]]:
    """Return the form, and what is wrong with it. All names must be known and no edge there twice.

    start: nodes that a run begins with although a route leads back to them; only needed where that could be several.
    """
    forward = [*edges, *((router, target) for router, targets in routes.items() for target in targets)]
    problems: list[str] = []
    loops: dict[Edge, frozenset[str]] = {}
    if routes:
        after = _successors(nodes, forward)
        roots = _roots(nodes, edges, forward, after, start, problems)
        around = _routers_around(set().union(*routes.values()), roots, after, routes)
        back = {
            (router, target) for router, targets in routes.items() for target in targets if router not in around[target]
        }
        forward = [edge for edge in forward if edge not in back]
        for router, target in sorted(back):
            loops[router, target] = _body(router, target, nodes, forward)
    predecessors, successors = _successors(nodes, [(b, a) for a, b in forward]), _successors(nodes, forward)
    stuck = _stuck(predecessors, successors)
    if stuck:
        hint = "; only a router's route may lead back, to a node that every way to the router passes" if routes else ""
        problems.append(f"{CYCLE}: {', '.join(stuck)}{hint}")
    held = _held(loops, successors, routes, predecessors, problems)
    released: dict[str, list[str]] = {}
    for (_, target), routers in held.items():
        for router in routers:
            released.setdefault(router, []).append(target)
    form = Form(
        roots=tuple(node for node, before in predecessors.items() if not before),
        predecessors={node: tuple(before) for node, before in predecessors.items()},
        successors={node: tuple(after) for node, after in successors.items()},
        loops=loops,
        held=held,
        released={router: tuple(targets) for router, targets in released.items()},
    )
    return form, problems


class Ancestry:
    """Which nodes come before which: a bit for each node in an integer for each, so that large graphs stay affordable.

    Nodes that lie in a cycle count as before each other, and before themselves.
    """

    def __init__(self, successors: Mapping[str, Sequence[str]]) -> None:
        rings = _rings(successors)
        self._bits = {node: 1 << number for number, ring in enumerate(rings) for node in ring}
        self._before: dict[str, int] = {}
        led_here = dict.fromkeys(successors, 0)  # by node, the bits of all that comes before it
        for ring in reversed(rings):  # what comes first
            before = 0
            for node in ring:
                before |= led_here[node]
            if len(ring) > 1 or ring[0] in successors[ring[0]]:
                before |= self._bits[ring[0]]
            for node in ring:
                self._before[node] = before
                for target in successors[node]:
                    led_here[target] |= before | self._bits[node]

    def is_before(self, node: str, other: str) -> bool:
        """Tell whether `node` comes before `other`."""
        return bool(self._before[other] & self._bits[node])


def _rings(successors: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the nodes in groups of those that each can be reached from the others, groups that come later first."""
    found: list[list[str]] = []
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_: list[str] = []
    for root in successors:
        ahead = [] if root in order else [(root, iter(successors[root]))]
        while ahead:
            node, targets = ahead[-1]
            if node not in order:
                order[node] = lowest[node] = len(order)
                open_.append(node)
            for target in targets:
                if target not in order:
                    ahead.append((target, iter(successors[target])))
                    break
                lowest[node] = min(lowest[node], lowest.get(target, lowest[node]))
            else:
                ahead.pop()
                if ahead:
                    lowest[ahead[-1][0]] = min(lowest[ahead[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    ring: list[str] = []
                    while not ring or ring[-1] != node:
                        ring.append(open_.pop())
                        del lowest[ring[-1]]
                    found.append(ring)
    return found


def _successors(nodes: Iterable[str], edges: Iterable[Edge]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {node: [] for node in nodes}
    for source, target in edges:
        found[source].append(target)
    return found


def reached(starts: Iterable[str], after: Mapping[str, Iterable[str]], *, without: str = "") -> set[str]:
    """Return what can be reached from the starts (themselves included) on ways that do not pass `without`."""
    found: set[str] = set()
    ahead = [start for start in starts if start != without]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead.extend(target for target in after[node] if target != without)
    return found


def _routers_around(
    nodes: Iterable[str], roots: Iterable[str], after: Mapping[str, Iterable[str]], routes: Mapping[str, Any]
) -> dict[str, set[str]]:
    """Return by node the routers that can be reached without it. One walk through the graph for each."""
    return {node: reached(roots, after, without=node) & routes.keys() for node in nodes}


def _roots(
    nodes: Collection[str],
    edges: Sequence[Edge],
    forward: Sequence[Edge],
    after: Mapping[str, Sequence[str]],
    start: Collection[str],
    problems: list[str],
) -> list[str]:
    """Return the nodes that a run begins with: those that nothing leads to, and the first node of a loop at the beginning."""
    led_to = {target for _, target in forward}
    roots = [node for node in nodes if node not in led_to or node in start]
    found = reached(roots, after)
    after_plain = {target for _, target in edges}
    candidates = [node for node in nodes if node not in found and node not in after_plain]
    reach = {node: reached([node], after) for node in candidates}
    for node in candidates:
        if any(node in reach[other] and other not in reach[node] for other in candidates):
            continue  # something else comes first
        rivals = [other for other in candidates if other != node and node in reach[other]]
        if rivals:
            names = ", ".join(sorted([node, *rivals]))
            problems.append(f"edges: which of {names} comes first? name it in `start`")
        roots.append(node)
    return roots


def _body(router: str, target: str, nodes: Iterable[str], forward: Iterable[Edge]) -> frozenset[str]:
    """Return the nodes on ways from the target to the router."""
    before = _successors(nodes, [(b, a) for a, b in forward])
    return frozenset({target, *reached([router], before, without=target)})


def _stuck(predecessors: Mapping[str, Sequence[str]], successors: Mapping[str, Sequence[str]]) -> list[str]:
    waiting_for = {node: len(before) for node, before in predecessors.items()}
    free = [node for node, count in waiting_for.items() if count == 0]
    while free:
        for target in successors[free.pop()]:
            waiting_for[target] -= 1
            if waiting_for[target] == 0:
                free.append(target)
    return sorted(node for node, count in waiting_for.items() if count > 0)


def _held(
    loops: Mapping[Edge, frozenset[str]],
    successors: Mapping[str, Sequence[str]],
    routes: Mapping[str, Sequence[str]],
    predecessors: Mapping[str, Sequence[str]],
    problems: list[str],
) -> dict[Edge, tuple[str, ...]]:
    roots = [node for node, before in predecessors.items() if not before]
    around = _routers_around(routes, roots, successors, routes) if loops else {}
    held: dict[Edge, tuple[str, ...]] = {}
    wrong: set[Edge] = set()  # edges that leave a loop and may not: each is said once, however many loops it leaves
    for (router, target), body in loops.items():
        for node in sorted(body - {router}):
            for outside in successors[node]:
                if outside in body or (node, outside) in wrong:
                    continue
                if node not in routes or router in around[node]:
                    wrong.add((node, outside))
                    problems.append(
                        f"edges: {node} -> {outside} leaves the loop from {router} back to {target}: only {router} may, "
                        f"and routes of nodes that every way to {router} passes"
                    )
                else:
                    held[node, outside] = (*held.get((node, outside), ()), router)
    return held
