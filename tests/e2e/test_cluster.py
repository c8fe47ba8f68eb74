"""What a release goes through in its life, in order, with runs coming in all the time. See README.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from e2e.conftest import NAMESPACE, RELEASE, ROOT, Cluster, Load, eventually, say, values_of
from tidegate.embedded.tools import tool_command

pytestmark = pytest.mark.feature("K1")

Sql = Callable[[str], list[list[str]]]
NAME = f"{RELEASE}-tidegate"
SETTLED_S = 3.0


@contextmanager
def disturbance(what: str, load: Load, sql: Sql) -> Iterator[None]:
    """Let runs come in before, during and after what happens; then all of them must succeed. Says how long the slowest took."""
    before = set(load.asked_s)
    began_s = time.monotonic()
    yield
    took_s = time.monotonic() - began_s
    time.sleep(SETTLED_S)
    asked = {run: at for run, at in load.asked_s.items() if run not in before}

    def finished() -> dict[str, float]:
        rows = sql("select run_id, toUnixTimestamp64Milli(finished_at) from runs where status = 'succeeded'")
        ends = {run_id: int(at_ms) / 1000 for run_id, at_ms in rows}
        return ends if asked.keys() <= ends.keys() else {}

    ends = eventually(finished, f"all {len(asked)} runs of: {what}")
    waits = sorted(ends[run] - at for run, at in asked.items())
    say(
        f"{what}: took {took_s:.0f} s, {len(asked)} runs, all succeeded; median {waits[len(waits) // 2]:.2f} s, "
        f"longest {waits[-1]:.2f} s"
    )


def test_development_profile_needs_nothing_else(cluster: Cluster) -> None:
    """With its own Kafka and ClickHouse in the cluster, as skaffold installs it."""
    image = values_of("")["image"]
    settings = f"--set image.repository={image['repository']} --set image.tag={image['tag']}"
    settings += f" --set health.enabled={os.environ.get('E2E_HEALTH', 'true')}"
    cluster.helm(
        f"install dev {ROOT}/charts/tidegate -f {ROOT}/helm/values-dev.yaml {settings} --wait --wait-for-jobs --timeout 5m",
        timeout_s=330,
    )
    say(cluster.helm("test dev --logs --timeout 4m").strip().splitlines()[-1])
    cluster.helm("uninstall dev --wait")


def test_install_and_a_run_from_inside(cluster: Cluster, bootstrap: str) -> None:
    began_s = time.monotonic()
    cluster.install(values_of(bootstrap))
    say(f"installed and ready after {time.monotonic() - began_s:.0f} s")
    shown = cluster.helm(f"test {RELEASE} --logs --timeout 4m")
    assert "its row is in ClickHouse" in shown
    say([line for line in shown.splitlines() if "smoke-" in line][-1])


def test_runs_from_outside(load: Load, sql: Sql) -> None:
    load.start()
    with disturbance("nothing happens", load, sql):
        time.sleep(8)


@pytest.mark.parametrize("component", ["scheduler", "gate", "executor-bench", "gateway", "projection"])
def test_a_pod_is_killed(cluster: Cluster, load: Load, sql: Sql, component: str) -> None:
    with disturbance(f"pod {component}-0 is deleted with one second of grace", load, sql):
        cluster.kubectl(f"delete pod {NAME}-{component}-0 --grace-period=1 --wait=false")
        time.sleep(2)
        cluster.kubectl(f"rollout status statefulset/{NAME}-{component} --timeout=3m")


def test_rolling_upgrade(cluster: Cluster, bootstrap: str, load: Load, sql: Sql) -> None:
    with disturbance("rolling upgrade of everything", load, sql):
        cluster.install(values_of(bootstrap, env={"TIDEGATE_LOG_LEVEL": "warning"}))


def test_scale_up_and_down(cluster: Cluster, load: Load, sql: Sql) -> None:
    for component, count in (("scheduler", 3), ("executor-bench", 3), ("scheduler", 1), ("executor-bench", 1)):
        with disturbance(f"scale {component} to {count}", load, sql):
            cluster.kubectl(f"scale statefulset/{NAME}-{component} --replicas={count}")
            cluster.kubectl(f"rollout status statefulset/{NAME}-{component} --timeout=3m")


def test_offsets_are_reset_by_hand(cluster: Cluster, bootstrap: str, load: Load, sql: Sql) -> None:
    before = sql("select count(), sum(cityHash64(run_id, status, fingerprint)) from runs where run_id like 'smoke%'")
    with disturbance("the projection's offsets are reset and its tables emptied", load, sql):
        cluster.kubectl(f"scale statefulset/{NAME}-projection --replicas=0")
        cluster.kubectl(f"wait --for=delete pod/{NAME}-projection-0 --timeout=2m")
        reset = ["--group", "e2e.tidegate-projection", "--reset-offsets", "--to-earliest", "--all-topics", "--execute"]
        done = subprocess.run(
            tool_command("consumer-groups", ["--bootstrap-server", bootstrap, *reset]),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "run-events" in done.stdout
        cluster.kubectl(f"delete pvc data-{NAME}-projection-0 --wait=true")
        cluster.kubectl(f"scale statefulset/{NAME}-projection --replicas=1")
        cluster.kubectl(f"rollout status statefulset/{NAME}-projection --timeout=3m")
    after = sql("select count(), sum(cityHash64(run_id, status, fingerprint)) from runs where run_id like 'smoke%'")
    assert after == before


def test_a_node_is_drained(cluster: Cluster, load: Load, sql: Sql) -> None:
    """With budgets for disruptions; where there is one node, what is evicted waits until it may come back."""
    node = cluster.kubectl(f"get pod {NAME}-gate-0 -o jsonpath={{.spec.nodeName}}")
    try:
        with disturbance(f"drain of {node}", load, sql):
            cluster.run(
                f"kubectl drain {node} --ignore-daemonsets --delete-emptydir-data --timeout=25s "
                "--pod-selector=app.kubernetes.io/name=tidegate",
                check=False,
            )
            cluster.run(f"kubectl uncordon {node}")
            for component in ("scheduler", "gate", "executor-bench", "gateway", "projection"):
                cluster.kubectl(f"rollout status statefulset/{NAME}-{component} --timeout=3m")
    finally:
        cluster.run(f"kubectl uncordon {node}")


def test_uninstall_and_install_again(cluster: Cluster, bootstrap: str, load: Load, sql: Sql) -> None:
    with disturbance("uninstall and install again", load, sql):
        cluster.uninstall()
        cluster.kubectl("wait --for=delete pod --selector app.kubernetes.io/name=tidegate --timeout=2m")
        left = cluster.kubectl("get pods,statefulsets,services -o name --selector app.kubernetes.io/name=tidegate")
        assert left == ""
        cluster.install(values_of(bootstrap))


def test_nothing_was_lost(cluster: Cluster, load: Load, sql: Sql) -> None:
    load.stop()
    eventually(
        lambda: (
            sql("select count() from runs where run_id like 'load-%' and status = 'succeeded'")
            == [[str(len(load.asked_s))]]
        ),
        "all runs",
    )
    environment = {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": load.settings.bootstrap,
        "TIDEGATE_KAFKA_TOPIC_PREFIX": load.settings.topic_prefix,
    }
    for command in (["verify"], ["audit", "money"]):
        done = subprocess.run(
            [sys.executable, "-m", "tidegate.cli", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        say(f"tidegate {' '.join(command)}: {done.stdout.strip().splitlines()[-1]}")
    counted = sql("select count(), countIf(status = 'succeeded'), max(length(run_id)) from runs")
    say(
        f"{len(load.asked_s)} runs were asked for in {NAMESPACE}; rows and successes with those of the tests: {counted}"
    )
