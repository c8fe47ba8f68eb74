"""Definitions of graphs of step functions a to h, in few words."""

from __future__ import annotations

from typing import Any

from support.pure import Pair, step

NAMES = "abcdefgh"
STEPS = (*(f"step:{name}" for name in NAMES), "agent:bot", "tool:look")


def graph(*edges: Any, nodes: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a definition; nodes named by edges run the step function of their name. An edge is (from, to[, when])."""
    found: dict[str, Any] = {}
    listed: list[Any] = []
    for source, target, *when in edges:
        for name in (source, target):
            found.setdefault(name, {"kind": "step", "function": name})
        listed.append({"from": source, "to": target, "when": when[0]} if when else [source, target])
    for name, fields in (nodes or {}).items():
        found[name] = {**found.get(name, {}), **fields} if "kind" not in fields else fields
    functions = {name: step(max_attempts=1) for name in NAMES}
    return {"name": "graph", "version": "1", "nodes": found, "edges": listed, "functions": functions, **more}


def events(p: Pair, name: str) -> list[Any]:
    return [event for _, event in p.events if type(event).__name__ == name]
