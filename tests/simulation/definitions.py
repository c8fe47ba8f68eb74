"""Random workflows: graphs of nodes of every kind, and the functions that they use."""

from __future__ import annotations

from datetime import UTC, datetime
from random import Random
from typing import Any

from simulation.flows import CHOICES, EVENTS, FLOWS, INNER, KEYS, OUTSIDE, STEPS_ALONE, app_of
from tidegate.domain import canonical
from tidegate.domain.graph_changes import edge_ends
from tidegate.domain.workflow import validate_definition

QUEUES = ("default", "gpu")
STEPS = ("ok", "flaky", "fatal", "slow", "long", "dear", "once", "once_flaky", "odd")
GOES = "goes"  # a step that chooses one of the routes that its input names
OFTEN = ("ok", "ok", "ok", "flaky", "once", "once_flaky", "long", "dear")
TOOLS = ("t_ok", "t_flaky", "t_once", "t_fatal")
AGENTS = ("a_plan", "a_wild")
FLOW_APP = app_of(STEPS, AGENTS, TOOLS, 2_678_370_000)
KINDS = dict.fromkeys((*STEPS, GOES), "step") | dict.fromkeys(TOOLS, "tool") | dict.fromkeys(AGENTS, "agent")
KINDS |= dict.fromkeys(FLOWS, "flow")
FUNCTIONS = tuple(f"{kind}:{name}" for name, kind in KINDS.items())
ONCE = frozenset({"once", "once_flaky", "t_once"})
MAPPED = ("[]", "[1]", "[1, 2, 3, 4]")


def definition(rng: Random, name: str, version: int, now_ms: int) -> dict[str, Any]:
    """Return a random workflow that can be published: nodes of every kind, with conditions, routes and joins."""
    names = [f"n{number}" for number in range(rng.randint(1, 5))]
    flows = FLOWS if rng.random() < 0.7 else STEPS_ALONE
    nodes: dict[str, Any] = {}
    for node in names:
        kind = "agent" if rng.random() < 0.25 else "step"
        function = rng.choice(AGENTS if kind == "agent" else OFTEN if rng.random() < 0.8 else STEPS)
        nodes[node] = {"kind": kind, "function": function}
        if rng.random() < 0.2:
            nodes[node] = {"kind": "flow", "function": rng.choice((*flows, flows[-1], flows[-1]))}
    shape = rng.choice(("chain", "wide", "any"))
    edges = []
    for index, target in enumerate(names[1:], 1):
        before = {"chain": [names[index - 1]], "wide": [names[0]]}.get(shape) or rng.sample(
            names[:index], rng.randint(0, min(2, index))
        )
        edges += [_edge(rng, source, target) for source in before]
    for node in names:
        if rng.random() < 0.15:
            nodes[node] = {"kind": "map", "function": rng.choice(OFTEN), "over": rng.choice(MAPPED)}
            nodes[node] |= {"at_once": rng.randint(1, 3), "on_item_failure": rng.choice(("fail", "continue"))}
        elif rng.random() < 0.2:
            nodes[node] = _wait(rng, now_ms)
        if rng.random() < 0.2:
            nodes[node]["join"] = "any"
        elif (count := _led_to(edges, node)) and rng.random() < 0.3:
            nodes[node]["join"] = {"need": rng.randint(1, count)}
        if rng.random() < 0.1:
            nodes[node]["on_failure"] = rng.choice(("fail", "continue"))
    children = [node for node in names if rng.random() < 0.1]
    for node in children:
        nodes[node] = {"kind": "workflow", "workflow": f"{INNER}@1"}
    made = {
        "name": name,
        "version": str(version),
        "nodes": nodes,
        "edges": edges,
        "functions": {function: _settings(rng, function, kind) for function, kind in _functions(flows).items()}
        | {OUTSIDE: _outside(rng)},
        "max_steps": rng.choice((6, 50, 50, 50)),
        "failure_mode": rng.choice(("fail_fast", "continue")),
        "success": rng.choice(("all", "all", "any")),
        "max_hops": rng.choice((1, 3, 6)),
        **({"aggregate": rng.choice(("latest", "all", "success_only"))} if rng.random() < 0.3 else {}),
        "workflows": {f"{INNER}@1": _inner(rng, now_ms)} if children or flows is FLOWS else {},
        **({"evolution": _evolution(rng)} if rng.random() < 0.9 else {}),
    }
    problems = validate_definition(made)
    assert not problems, problems
    routed = _with_routes(rng, made) if rng.random() < 0.5 else made
    return made if validate_definition(routed) else routed


def _functions(flows: tuple[str, ...]) -> dict[str, str]:
    return {function: kind for function, kind in KINDS.items() if kind != "flow" or function in flows}


def _led_to(edges: list[Any], node: str) -> int:
    return sum(edge_ends(edge)[1] == node for edge in edges)


def _with_routes(rng: Random, made: dict[str, Any]) -> dict[str, Any]:
    """Return the same with a router, or with a step that goes on where it likes, be it back; that may be no graph any more."""
    names = sorted(made["nodes"])
    router, nodes, edges = rng.choice(names), dict(made["nodes"]), made["edges"]
    targets = rng.sample(names, min(len(names), rng.randint(1, 2)))
    if rng.random() < 0.5:
        nodes[router] = {"kind": "step", "function": GOES, "routes": targets, "input": {"routes": targets}}
        edges = [edge for edge in edges if edge_ends(edge)[0] != router]
    else:
        first, last = targets[0], targets[-1]
        choose = rng.choice((f'output.n > 4 ? "{first}" : "{last}"', f"'{first}'", "null"))
        nodes["r0"] = {"kind": "router", "choose": choose, "routes": targets}
        edges = [*edges, [router, "r0"]]
    return {**made, "nodes": nodes, "edges": edges}


def _evolution(rng: Random) -> dict[str, Any]:
    """Return whether runs may change their graphs, and who decides."""
    rules: dict[str, Any] = {"mode": rng.choice(("disabled", "optional", "optional", "optional", "required"))}
    if rng.random() < 0.3:
        rules["approval"] = True
        if rng.random() < 0.6:
            rules["expires_s"] = rng.choice((0.5, 2, 8))
    if rng.random() < 0.3:
        rules["max_changes"] = rng.randint(1, 2)
    return rules


def proposal(rng: Random, step_id: str) -> str:
    """Return a change that a step proposes: few names, so that changes meet; some fit nowhere, and one is no JSON."""
    if rng.random() < 0.03:
        return rng.choice(("[", '{"nodes":{"x":5}}', "{}"))
    names = rng.sample(("x0", "x1", "x2"), rng.randint(0, 2))
    nodes: dict[str, Any] = {}
    for name in names:
        nodes[name] = {"kind": "step", "function": rng.choice(OFTEN)}
        if rng.random() < 0.15:
            nodes[name] = {"kind": "map", "function": rng.choice(OFTEN), "over": rng.choice(MAPPED)}
        elif rng.random() < 0.1:
            nodes[name] = {"kind": "flow", "function": rng.choice(FLOWS)}
        elif rng.random() < 0.1:
            nodes[name] = _wait(rng, 0) if rng.random() < 0.5 else {"kind": "step", "function": "unknown"}
    here = step_id.partition("/")[0]
    before, after = (here, *names, here, "n0", "n1"), (*names, *names, "n2", "n3", "n4")
    edges = [_edge(rng, rng.choice(before), rng.choice(after)) for _ in range(rng.choice((0, 0, 1, 2)))]
    return canonical.dumps({"nodes": nodes, "edges": edges, "because": "sim"})


def _inner(rng: Random, now_ms: int) -> dict[str, Any]:
    function = rng.choice(OFTEN)
    nodes: dict[str, Any] = {"x": {"kind": "step", "function": function}, "y": {"kind": "step", "function": "ok"}}
    if rng.random() < 0.3:
        nodes["x"] = _wait(rng, now_ms)
    elif rng.random() < 0.3:
        nodes["x"] = {"kind": "flow", "function": rng.choice(STEPS_ALONE)}
    functions = {name: _settings(rng, name, KINDS[name]) for name in (*STEPS, *STEPS_ALONE)}
    return {"name": INNER, "version": "1", "nodes": nodes, "edges": [["x", "y"]], "functions": functions}


def _edge(rng: Random, source: str, target: str) -> Any:
    """Return an edge, every fifth with a condition; one that fails on an output without `n` is meant to."""
    if rng.random() < 0.8:
        return [source, target]
    return {
        "from": source,
        "to": target,
        "when": rng.choice(("output.n > 4", "has(output.n) && output.n < 7", "false")),
    }


def _settings(rng: Random, function: str, kind: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "kind": kind,
        "queue": rng.choice((*QUEUES[:1] * 3, *QUEUES)),
        "timeout_ms": rng.choice((500, 2_000, 8_000)),
        "max_attempts": rng.randint(1, 4),
        "backoff_ms": rng.choice((20, 100, 400)),
        "backoff_max_ms": 2_000,
        "reserve_micros": rng.choice((0, 5, 20, 50)),
        "idempotent": function not in ONCE,
    }
    if rng.random() < 0.7:
        rule = {"on": ["Flaky"], "max_attempts": rng.randint(1, 6), "backoff_ms": rng.choice((20, 200))}
        settings["retry_rules"] = [rule]
    if kind == "agent":
        settings["tools"] = [*TOOLS, OUTSIDE]
    if kind == "flow":
        settings["tools"] = list(STEPS)
    if function == "f_all":
        settings |= {"tools": [*STEPS, *AGENTS, *TOOLS, OUTSIDE], "workflows": [f"{INNER}@1"]}
    return settings


def _outside(rng: Random) -> dict[str, Any]:
    """Return a tool that is done outside, sometimes for too short a time, sometimes with answers that must fit."""
    made: dict[str, Any] = {"kind": "tool", "outside": True, "timeout_ms": rng.choice((500, 8_000, 60_000))}
    made["reserve_micros"] = rng.choice((0, 5, 50))
    return made | ({"output": {"enum": list(CHOICES)}} if rng.random() < 0.5 else {})


def _wait(rng: Random, now_ms: int) -> dict[str, Any]:
    """Return a random node that waits."""
    kind = rng.choice(("sleep", "wait_until", "wait_event", "wait_event", "ask"))
    if kind == "wait_until":
        at = datetime.fromtimestamp(now_ms // 1000 + rng.randint(-5, 30), UTC)
        return {"kind": kind, "wait": {"at": at.isoformat()}}
    wait: dict[str, Any] = {
        "sleep": lambda: {"seconds": rng.choice((0, 0.2, 1, 5))},
        "wait_event": lambda: {"event": rng.choice(EVENTS), "key": rng.choice(KEYS)},
        "ask": lambda: {"prompt": "?", **({"choices": list(CHOICES)} if rng.random() < 0.7 else {})},
    }[kind]()
    if rng.random() < 0.5:
        wait["timeout_s"] = rng.choice((0, 0.5, 2, 8))
        if rng.random() < 0.5:
            wait |= {"on_timeout": "value", "timeout_value": {"n": 5}}
    return {"kind": kind, "wait": wait}
