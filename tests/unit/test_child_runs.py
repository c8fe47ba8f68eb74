"""Parents and children in different partitions, with owners that die at the edges of the protocol (log in memory)."""

from __future__ import annotations

from typing import Any

import pytest

from support.cluster import RUN_PARTITIONS, Cluster, Crash
from support.pure import chain, step
from tidegate.domain.identity import child_run_id, partition_of
from tidegate.eventlog import owner
from tidegate.eventlog.settings import CheckpointSettings

EDGES = ("owner.before-log", "owner.after-log", "owner.between-tells", "owner.after-tell", "owner.after-announce")
PARENTS = [f"p{number}" for number in range(10)]
CHILD = chain("b", "c")
PARENT: dict[str, Any] = {
    "name": "parent",
    "version": "1",
    "nodes": {"a": {"kind": "step", "function": "a"}, "w": {"kind": "workflow", "workflow": "chain@1"}},
    "edges": [["a", "w"]],
    "functions": {"a": step()},
    "workflows": {"chain@1": CHILD},
}
CHILDREN = {parent: child_run_id(parent, "w") for parent in PARENTS}


def crash_at(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, edge: str, hits: set[int]) -> list[int]:
    """Kill the scheduler at these passages of an edge; returns how many there were, in a list."""
    passed = [0]

    def point(name: str) -> None:
        if cluster.running == "scheduler" and name == edge:
            passed[0] += 1
            if passed[0] in hits:
                raise Crash

    monkeypatch.setattr(owner, "failpoint", point)
    return passed


def test_the_children_lie_in_both_partitions() -> None:
    pairs = {(partition_of(p, RUN_PARTITIONS), partition_of(c, RUN_PARTITIONS)) for p, c in CHILDREN.items()}
    assert pairs == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.feature("G2")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("seed", range(6))
def test_a_parent_is_resumed_whenever_the_owner_of_either_dies(
    monkeypatch: pytest.MonkeyPatch, edge: str, seed: int
) -> None:
    cluster = Cluster(seed)
    first = seed % 2 if edge == "owner.after-announce" else seed  # that is passed once for each partition
    passed = crash_at(monkeypatch, cluster, edge, {first + 1, 2 * first + 4})
    for number, parent in enumerate(PARENTS):
        cluster.start_definition(parent, PARENT, account=f"acme{number % 3}")
    cluster.settle(2_000)
    assert passed[0] > first, "the edge was never reached: the test shows nothing"
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run_id: run.status for run_id, run in runs.items()} == dict.fromkeys(
        [*PARENTS, *CHILDREN.values()], "succeeded"
    )
    wanted = {(parent, "a", 1) for parent in PARENTS} | {(c, s, 1) for c in CHILDREN.values() for s in "bc"}
    assert set(cluster.entered) == wanted
    assert set(cluster.entered.values()) == {1}
    assert cluster.letters() == []


@pytest.mark.feature("G2")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("seed", range(4))
def test_a_cancelled_parent_takes_its_child_along_whenever_the_owner_dies(
    monkeypatch: pytest.MonkeyPatch, edge: str, seed: int
) -> None:
    cluster = Cluster(seed)
    cluster.holds_back = True
    parents = PARENTS[:4]  # as many as the executor has slots
    for parent in parents:
        cluster.start_definition(parent, PARENT)
    cluster.settle(1_000)
    cluster.answer_late()  # the first step's; the child's are never given
    cluster.held_back.clear()
    cluster.settle(1_000)
    crash_at(monkeypatch, cluster, edge, {seed + 1, 2 * seed + 4})
    for parent in parents:
        cluster.command(parent, "cancel")
    cluster.settle(2_000)
    _, runs = cluster.verified()
    wanted = [*parents, *(CHILDREN[parent] for parent in parents)]
    assert {run_id: run.status for run_id, run in runs.items()} == dict.fromkeys(wanted, "cancelled")
    assert cluster.letters() == []


@pytest.mark.feature("G2")
def test_a_parent_that_waits_for_its_child_leaves_the_memory_and_comes_back() -> None:
    cluster = Cluster(checkpoints=CheckpointSettings(every_entries=5, every_s=1.0, rest_after_s=1.0))
    cluster.holds_back = True
    cluster.start_definition("p0", PARENT)
    cluster.settle(1_000)
    cluster.answer_late()  # the first step's
    cluster.held_back.clear()
    for _ in range(600):
        cluster.turn()
    assert CHILDREN["p0"] in {result.run_id for _, result in cluster.held_back}
    assert "p0" not in cluster.owners["scheduler"].owned[partition_of("p0", RUN_PARTITIONS)].state.runs
    cluster.crash("scheduler")
    cluster.start("scheduler")
    cluster.holds_back = False
    cluster.answer_late()
    cluster.settle(1_000)
    _, runs = cluster.verified()
    assert runs["p0"].status == "succeeded"
