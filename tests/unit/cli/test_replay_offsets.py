"""Scaling the projection down and up around a reset, and keeping KEDA out of it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fake_cluster import FakeCluster, refused, serving
from tidegate.cli.replay_offsets import ANNOTATION, PAUSED, PAUSED_BEFORE, _Workload
from tidegate.cluster_api import ClusterApiError

pytestmark = [pytest.mark.feature("L4"), pytest.mark.timeout(60)]
WORKLOAD, SCALER = "deployments/p", "scaledobjects/p"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with serving(FakeCluster("here", tmp_path), monkeypatch) as cluster:
        cluster.workloads[WORKLOAD] = {"metadata": {"name": "p"}, "spec": {"replicas": 3}}
        yield cluster


def annotations(cluster: FakeCluster, name: str) -> Any:
    return cluster.workloads[name]["metadata"].get("annotations", {})


@pytest.mark.parametrize("paused_by_somebody", [None, "2"])
def test_keda_is_paused_from_before_the_scaling_until_after_it(
    cluster: FakeCluster, paused_by_somebody: str | None
) -> None:
    before = {} if paused_by_somebody is None else {PAUSED: paused_by_somebody}
    cluster.workloads[SCALER] = {"metadata": {"name": "p", "annotations": dict(before)}}
    seen: list[tuple[int, Any]] = []
    cluster.on_scale = lambda _, replicas: seen.append((replicas, dict(annotations(cluster, SCALER))))
    ours = {PAUSED: "0", PAUSED_BEFORE: paused_by_somebody or ""}

    _Workload("deployment/p", "here").down()  # and is killed
    assert annotations(cluster, WORKLOAD) == {ANNOTATION: "3"}
    again = _Workload("deployment/p", "here")
    again.down()
    again.up()

    assert seen == [(0, ours), (0, ours), (3, ours)]
    assert annotations(cluster, SCALER) == before
    assert annotations(cluster, WORKLOAD) == {}
    assert cluster.workloads[WORKLOAD]["spec"] == {"replicas": 3}


def test_where_there_is_no_keda_or_one_may_not_know_the_workload_is_scaled_all_the_same(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for status in (404, 403):
        cluster.trouble = lambda _, path, s=status: refused(s, "no") if "keda" in path else None
        workload = _Workload("deployment/p", "here")
        workload.down()
        assert cluster.workloads[WORKLOAD]["spec"] == {"replicas": 0}
        workload.up()
        assert cluster.workloads[WORKLOAD]["spec"] == {"replicas": 3}
        assert ("not known whether KEDA" in capsys.readouterr().err) == (status == 403)


def test_what_was_taken_is_given_back_when_keda_cannot_be_paused(cluster: FakeCluster) -> None:
    cluster.workloads[SCALER] = {"metadata": {"name": "p"}}
    cluster.trouble = lambda method, path: refused(500, "no") if "keda" in path and method == "PATCH" else None
    workload = _Workload("deployment/p", "here")
    with pytest.raises(ClusterApiError):
        workload.down()
    workload.up()
    assert cluster.workloads[WORKLOAD] == {"metadata": {"name": "p", "annotations": {}}, "spec": {"replicas": 3}}
