"""What the owners make at work is in no reference cycles, so that they may have the garbage collector look seldom."""

from __future__ import annotations

import gc
from collections import Counter
from types import FunctionType
from typing import Any

import pytest

from support.cluster import Cluster
from support.pure import chain

CHOICES: dict[str, Any] = {
    **chain("a", "b", "c"),
    "name": "choices",
    "nodes": {
        "a": {"kind": "step", "function": "a"},
        "each": {"kind": "map", "function": "b", "over": "[1, 2, 3]"},
        "last": {"kind": "step", "function": "c", "input": {"given": ["${nodes.a}"]}},
    },
    "edges": [["a", "each"], {"from": "a", "to": "last", "when": "output.ok"}, ["each", "last"]],
}


def test_scheduler_and_gate_leave_nothing_to_the_garbage_collector(request: pytest.FixtureRequest) -> None:
    cluster = Cluster()
    cluster.incarnation = cluster.register(slots=2)
    work(cluster, "warm")
    gc.collect()
    for undo in (gc.enable, gc.garbage.clear, lambda: gc.set_debug(0)):
        request.addfinalizer(undo)
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)

    work(cluster, "watched")

    gc.collect()
    assert not Counter(name for name in map(ours, gc.garbage) if name)


def ours(thing: Any) -> str:
    """Return the name of a function of ours, or of what is of a class of ours; empty for everything else."""
    named = thing if isinstance(thing, FunctionType) else type(thing)
    return named.__qualname__ if named.__module__ and named.__module__.startswith("tidegate") else ""


def work(cluster: Cluster, name: str) -> None:
    """Have a chain and a graph run to their ends, with attempts that wait for one of two slots."""
    cluster.start_run(f"{name}-chain", "a", "b", "c")
    cluster.start_definition(f"{name}-choices", CHOICES | {"name": name})  # judged each time, as a new one
    cluster.settle()
    for run in ("chain", "choices"):
        assert cluster.events_of(f"{name}-{run}")[-1].status == "succeeded"
