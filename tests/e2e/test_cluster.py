"""What a release goes through in its life, in order, with runs coming in all the time. See README.md."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from e2e.conftest import (
    JOBS_NAMESPACE,
    NAMESPACE,
    RELEASE,
    ROOT,
    WAIT_S,
    Cluster,
    Load,
    eventually,
    say,
    values_of,
)
from tidegate.demo.isolation import app as isolation_app
from tidegate.embedded.tools import tool_command
from tidegate.sdk.client import Client

pytestmark = pytest.mark.feature("K1")

Sql = Callable[[str], list[list[str]]]
NAME = f"{RELEASE}-tidegate"
SETTLED_S = 3.0


def tidegate(load: Load, *arguments: str) -> str:
    """Run a command against the release's Kafka, from outside, and return what it printed."""
    environment = {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": load.settings.bootstrap,
        "TIDEGATE_KAFKA_TOPIC_PREFIX": load.settings.topic_prefix,
    }
    command = [sys.executable, "-m", "tidegate.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


def jobs_there(cluster: Cluster) -> list[str]:
    return cluster.run(f"kubectl -n {JOBS_NAMESPACE} get jobs,pods -o name").split()


@pytest.mark.feature("T4")
def test_functions_run_as_jobs(cluster: Cluster, load: Load, tmp_path: Path) -> None:
    """By their own wish and by a policy's; what fails leaves its log behind, and nothing leaves anything else."""
    rule = {"name": "apart", "when": "account == 'apart/desk'", "then": "allow", "isolation": "job"}
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump({"policy": "apart", "version": "1", "rules": [rule]}))
    tidegate(load, "policy", "apply", str(tmp_path / "apart.yaml"))
    executor = f"{NAME}-executor-tools-0"
    with Client(load.settings) as client:
        client.publish(isolation_app)
        for workflow, account, is_apart in (
            ("as-job", "some/desk", True),
            ("in-process", "some/desk", False),
            ("as-usual", "some/desk", False),
            ("as-usual", "apart/desk", True),
        ):
            began_s = time.monotonic()
            run = client.run(workflow, account=account, timeout_s=WAIT_S)
            assert run.status == "succeeded", run
            assert (run.output["host"] != executor) == is_apart, run.output
            assert not is_apart or run.output["host"].startswith("tidegate-")
            say(f"{workflow} of {account}: in {run.output['host']}, {time.monotonic() - began_s:.1f} s")
        for workflow, says in (
            ("too-slow", ("not finished after 3 s", "I shall not see the end of this")),
            ("failing", ("no space left", "the disk is full")),
            ("too-large", ("OOMKilled", "SIGKILL")),
        ):
            run = client.run(workflow, timeout_s=WAIT_S)
            said = "".join(str(event.data) for event in client.events(run.run_id))
            assert run.status == "failed"
            found = [text for text in says if text in said]
            assert found == list(says) if workflow != "too-large" else found, said
            say(f"{workflow}: {run.status}, {found}")
    eventually(lambda: jobs_there(cluster) == [], "all Jobs to be gone")


@pytest.mark.feature("T4")
def test_a_cancelled_run_deletes_its_job_and_so_does_the_next_incarnation_of_a_killed_executor(
    cluster: Cluster, load: Load
) -> None:
    with Client(load.settings) as client:
        asleep = client.start("until-ended")
        eventually(lambda: jobs_there(cluster), "a Job")
        client.cancel(asleep)
        assert client.wait(asleep, WAIT_S).status == "cancelled"
        eventually(lambda: jobs_there(cluster) == [], "the Job to be gone")
        orphaned = client.start("until-ended")
        (job, *_) = eventually(lambda: [name for name in jobs_there(cluster) if "job" in name], "a Job")
        eventually(lambda: "Running" in cluster.run(f"kubectl -n {JOBS_NAMESPACE} get pods"), "its pod")
        cluster.kubectl(f"delete pod {NAME}-executor-tools-0 --grace-period=0 --force", check=False)
        again = eventually(
            lambda: [name for name in jobs_there(cluster) if "job.batch" in name and name != job], "another Job"
        )
        assert job not in jobs_there(cluster)
        say(f"{job} went with its executor, {again[0]} is the next attempt's")
        client.cancel(orphaned)
        assert client.wait(orphaned, WAIT_S).status == "cancelled"
    eventually(lambda: jobs_there(cluster) == [], "all Jobs to be gone")


@pytest.mark.feature("T4")
def test_an_executor_of_jobs_may_do_nothing_else(cluster: Cluster) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:{NAME}-executor-tools"

    def may(what: str, namespace: str) -> bool:
        answer = cluster.run(f"kubectl -n {namespace} auth can-i {what} --as {account}", check=False)
        return answer.strip() == "yes"

    assert all(
        may(what, JOBS_NAMESPACE) for what in ("create jobs", "delete jobs", "list pods", "get pods --subresource=log")
    )
    assert not may("create jobs", NAMESPACE)
    for what in ("get secrets", "create pods", "create pods --subresource=exec", "patch jobs", "delete pods"):
        assert not may(what, JOBS_NAMESPACE), what


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


@pytest.mark.feature("L4")
def test_offsets_are_reset_by_command(load: Load, sql: Sql) -> None:
    before = sql("select count(), sum(cityHash64(run_id, status, fingerprint)) from runs where run_id like 'smoke%'")
    with disturbance("tidegate replay offsets", load, sql):
        workload = ("--workload", f"statefulset/{NAME}-projection", "-n", NAMESPACE)
        shown = tidegate(load, "replay", "offsets", *workload)
    assert "caught up" in shown
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
    for command in (["verify"], ["audit", "money"]):
        say(f"tidegate {' '.join(command)}: {tidegate(load, *command).strip().splitlines()[-1]}")
    counted = sql("select count(), countIf(status = 'succeeded'), max(length(run_id)) from runs")
    say(
        f"{len(load.asked_s)} runs were asked for in {NAMESPACE}; rows and successes with those of the tests: {counted}"
    )
