"""What an entry of several inputs tells: as if each of them had an entry of its own (docs/adr/0040)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.cluster import Cluster
from support.pure import chain, step
from tidegate import codec
from tidegate.domain.messages import StepTask
from tidegate.eventlog import owner


def tasks(cluster: Cluster) -> list[tuple[str, str]]:
    found = [codec.decode(message.value) for message in cluster.messages("step-tasks.default", 0)]
    return [(task.type, task.step_id) for task in found if isinstance(task, StepTask)]


@pytest.mark.feature("P4")
@pytest.mark.feature("D4")
def test_what_is_approved_and_cancelled_in_one_turn_is_cancelled_where_it_runs() -> None:
    """As one message the gate took the two for one decision: the task went out, and nobody told the executor to stop."""
    cluster = Cluster()
    cluster.require_approval()
    cluster.start_run("r", "a")
    cluster.settle()
    assert cluster.verified()[1]["r"].status == "waiting"
    cluster.command("r", "approve", step_id="a")
    cluster.command("r", "cancel")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.ok, report.problems
    assert runs["r"].status == "cancelled"
    assert tasks(cluster) == [("run", "a"), ("cancel", "a")]
    for partition in range(2):
        state = cluster.ledger_state(partition)
        assert not state.attempts
        assert not state.runs


@pytest.mark.feature("D4")
def test_a_child_is_paused_as_often_as_its_parent() -> None:
    cluster = Cluster()
    child = {"name": "c", "version": "1", "nodes": {"w": {"kind": "sleep", "wait": {"seconds": 3600}}}, "functions": {}}
    parent = {
        "name": "p",
        "version": "1",
        "functions": {},
        "workflows": {"c@1": child},
        "nodes": {"c": {"kind": "workflow", "workflow": "c@1"}},
    }
    cluster.start_definition("r", parent)
    cluster.settle()
    for number, kind in enumerate(("pause", "resume", "pause")):
        cluster.command("r", kind, command_id=f"{kind}-{number}")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.ok, report.problems
    assert {run_id: run.paused is not None for run_id, run in runs.items()} == dict.fromkeys(runs, True)


def test_a_turn_that_tells_much_sends_it_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is gathered is in memory, and only the writer can make a turn wait."""
    sizes: list[int] = []
    send = owner.OwnerLoop._send_tells

    def counted(loop: owner.OwnerLoop) -> None:
        sizes.append(sum(len(record.value or b"") for record, _ in loop._to_tell))
        send(loop)

    monkeypatch.setattr(owner, "MAX_GATHERED_BYTES", 1_000)
    monkeypatch.setattr(owner.OwnerLoop, "_send_tells", counted)
    cluster = Cluster()
    for number in range(200):
        cluster.start_run(f"r{number}", "a", "b")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.ok, report.problems
    assert {run.status for run in runs.values()} == {"succeeded"}
    assert 1_000 < max(sizes) < 2_000, sorted(sizes)[-5:]


LIMIT = {"kind": "limit", "limit": "calls", "version": "1", "per": ["provider"], "at_once": 1}


def leases(cluster: Cluster) -> list[list[str]]:
    messages = [message for partition in range(2) for message in cluster.messages("gate-leases", partition)]
    return [[type(item).__name__ for item in codec.decode(message.value).items] for message in messages]


def begin(cluster: Cluster, run_id: str, account: str) -> None:
    cluster.start_definition(run_id, chain("a", a=step(provider="p")), account=account)


@pytest.mark.feature("P3")
def test_a_place_that_is_refused_and_given_in_one_turn_is_taken() -> None:
    """The one that asks is told to wait, and at once that it need not: because what held the place has ended meanwhile."""
    told = [message for seed in range(40) for message in refused_and_given(seed)]
    assert ["LeaseWait"] in told
    assert ["LeaseGrant"] in told


def refused_and_given(seed: int) -> list[list[str]]:
    cluster = Cluster(seed)
    cluster.publish(LIMIT)
    cluster.holds_back = True
    begin(cluster, "first", "acme")
    until(lambda: cluster.held_back, cluster.turn)
    begin(cluster, "second", "a")
    until(lambda: leases(cluster), lambda: [cluster.owners[name].run_once(0.0) for name in ("scheduler", "gate")])
    cluster.answer_late()
    cluster.holds_back = False
    for _ in range(20):  # the gate has both to read: what is asked of it, and that the place is free
        cluster.owners["scheduler"].run_once(0.0)
    cluster.settle(3_000)
    _, runs = cluster.verified()
    assert {run_id: run.status for run_id, run in runs.items()} == {"first": "succeeded", "second": "succeeded"}
    for partition in range(2):
        state = cluster.ledger_state(partition)
        assert (state.asks, state.attempts, state.held) == ({}, {}, {})
    return leases(cluster)


def until(is_so: Callable[[], object], work: Callable[[], object]) -> None:
    for _ in range(300):
        if is_so():
            return
        work()
    raise AssertionError("it never comes to be")
