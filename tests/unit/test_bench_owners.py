"""The benchmark of several owners measures several owners."""

import pytest

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster
from tidegate.bench import owners
from tidegate.eventlog import owner


@pytest.mark.parametrize(
    ("held", "replicas", "spread"),
    [
        ([0, 0, 0, 0], 1, True),
        ([0, 0, 0, 0], 2, False),  # the second one has only been started
        ([0, 1, 0, 1], 2, True),
        ([0, 1, 1, 1], 2, False),
        ([0, 1, 2], 2, False),  # one that is gone has not been replaced
        ([], 1, False),
    ],
)
def test_partitions_are_spread_when_every_replica_has_its_share(held: list[int], replicas: int, spread: bool) -> None:
    assert owners.are_spread({p: f"gate-{n}" for p, n in enumerate(held)}, "gate", replicas) is spread


def test_an_owner_is_whoever_announced_itself_last_however_far_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "_SPAN", 2)
    monkeypatch.setattr(owner, "ANNOUNCE_EVERY_ENTRIES", 10_000)
    cluster = Cluster()
    cluster.start_run("r")
    cluster.settle()
    cluster.crash("scheduler")
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    cluster.start("scheduler", "scheduler-1")
    cluster.start_run("s")
    cluster.settle()

    assert owners.of_partitions(cluster.broker, "run-events") == dict.fromkeys(range(RUN_PARTITIONS), "scheduler-1")
    assert owners.of_partitions(cluster.broker, "gate-ledger") == dict.fromkeys(range(ACCOUNT_PARTITIONS), "gate-0")
