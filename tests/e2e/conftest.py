"""One release on a real cluster, a Kafka outside of it, and a stream of runs that all must end. See README.md."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from confluent_kafka import Producer

from tidegate.bench.app import app as bench_app
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.client import Client

ROOT: Final = Path(__file__).resolve().parents[2]
NAMESPACE: Final = "tidegate-e2e"
JOBS_NAMESPACE: Final = f"{NAMESPACE}-jobs"
RELEASE: Final = "tg"
EVERY_S: Final = 0.5
WAIT_S: Final = 300.0
IMAGE, _, TAG = os.environ.get("E2E_IMAGE", "localhost/tidegate:embedded").rpartition(":")

SMALL: Final = {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip everything here unless it is asked for: nobody's cluster is touched because KUBECONFIG happens to be set."""
    if not os.environ.get("TIDEGATE_E2E"):
        for item in items:
            if "e2e" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="changes a cluster: run `make e2e-k8s`"))


class Cluster:
    """The cluster, by its own tools; what they print goes to the test's output."""

    def run(self, command: str, *, stdin: str | None = None, check: bool = True, timeout_s: float = WAIT_S) -> str:
        """Run a command line and return its standard output. Raises AssertionError with all it said."""
        done = subprocess.run(
            shlex.split(command), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def kubectl(self, arguments: str, **options: Any) -> str:
        return self.run(f"kubectl -n {NAMESPACE} {arguments}", **options)

    def helm(self, arguments: str, **options: Any) -> str:
        return self.run(f"helm -n {NAMESPACE} {arguments}", **options)

    def install(self, values: dict[str, Any], extra: str = "") -> None:
        """Install or upgrade the release and wait until it is ready."""
        self.helm(
            f"upgrade --install {RELEASE} {ROOT}/charts/tidegate -f - --wait --timeout 5m {extra}",
            stdin=yaml.safe_dump(values),
            timeout_s=330,
        )

    def uninstall(self) -> None:
        self.helm(f"uninstall {RELEASE} --wait --timeout 4m")


def values_of(bootstrap: str, **more: Any) -> dict[str, Any]:
    """Return the values of the release: two of each owner, two executors, an embedded ClickHouse with a disk."""
    owner = {"replicas": 2, "minReadySeconds": 1, "resources": SMALL, "terminationGracePeriodSeconds": 30}
    executor = {
        "name": "bench",
        "app": "tidegate.bench.app:app",
        "queue": "default",
        "slots": 4,
        "replicas": 2,
        "drainSeconds": 10,
        "minReadySeconds": 1,
        "resources": SMALL,
    }
    tools = executor | {
        "name": "tools",
        "app": "tidegate.demo.isolation:app",
        "queue": "tools",
        "replicas": 1,
        "jobs": {"namespace": JOBS_NAMESPACE},
    }
    made: dict[str, Any] = {
        "image": {
            "repository": IMAGE,
            "tag": TAG,
            "pullPolicy": os.environ.get("E2E_PULL_POLICY", "IfNotPresent"),
        },
        "kafka": {"bootstrap": bootstrap, "topicPrefix": "e2e."},
        "topics": {"production": False},
        "health": {"enabled": os.environ.get("E2E_HEALTH", "true") == "true"},
        "scheduler": owner,
        "gate": owner,
        "gateway": owner | {"replicas": 1},
        "projection": {
            "minReadySeconds": 1,
            "resources": SMALL | {"limits": {"memory": "2Gi"}},
            "persistence": {"size": "1Gi", "storageClass": os.environ.get("E2E_STORAGE_CLASS", "")},
            "sql": {"enabled": True},
        },
        "executors": [executor, tools],
    }
    return made | more


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Empty namespaces, for the release and for Jobs, that refuse pods which are not restricted; removed at the end."""
    there = Cluster()
    for namespace in (NAMESPACE, JOBS_NAMESPACE):
        there.run(f"kubectl delete namespace {namespace} --ignore-not-found --wait=true")
        there.run(f"kubectl create namespace {namespace}")
        there.run(f"kubectl label namespace {namespace} pod-security.kubernetes.io/enforce=restricted")
    yield there
    there.helm(f"uninstall {RELEASE} --ignore-not-found", check=False)
    for namespace in (NAMESPACE, JOBS_NAMESPACE):
        there.run(f"kubectl delete namespace {namespace} --wait=false", check=False)


@pytest.fixture(scope="session")
def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Kafka outside of the cluster that pods reach."""
    if existing := os.environ.get("E2E_BOOTSTRAP"):
        yield existing
        return
    host = os.environ.get("E2E_HOST")
    assert host, "set E2E_HOST to the address under which pods reach this machine, or E2E_BOOTSTRAP to a Kafka"
    folder = tmp_path_factory.mktemp("kafka")
    with EmbeddedKafka(folder, host="0.0.0.0", advertised_host=host, profile="quick") as kafka:  # noqa: S104 - pods must reach it
        yield kafka.bootstrap


class Load:
    """Starts a run now and then, from outside, by a plain producer, and remembers when."""

    def __init__(self, bootstrap: str) -> None:
        self.settings = KafkaSettings(bootstrap=bootstrap, topic_prefix="e2e.")
        self.asked_s: dict[str, float] = {}
        self._producer = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def start(self) -> None:
        with Client(self.settings) as client:
            client.publish(bench_app)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        number = 0
        while not self._stop.wait(EVERY_S):
            run_id = f"load-{number}"
            number += 1
            request = {"workflow": "three", "run_id": run_id, "input": number}
            self._producer.produce("e2e.run-requests", json.dumps(request), "any")
            self._producer.flush()
            self.asked_s[run_id] = time.time()


@pytest.fixture(scope="session")
def sql(cluster: Cluster) -> Callable[[str], list[list[str]]]:
    """Ask the projection, in its own pod."""

    def ask(query: str) -> list[list[str]]:
        command = f"kubectl -n {NAMESPACE} exec -i {RELEASE}-tidegate-projection-0 -- tidegate sql -f TSV -"
        done = subprocess.run(shlex.split(command), input=query, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return [line.split("\t") for line in done.stdout.splitlines()]

    return ask


@pytest.fixture(scope="session")
def load(bootstrap: str) -> Iterator[Load]:
    made = Load(bootstrap)
    yield made
    with contextlib.suppress(RuntimeError):
        made.stop()


def eventually(ask: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    """Return the first answer that is true; trouble on the way there counts as no answer."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if last := ask():
                return last
        except (RuntimeError, AssertionError) as error:
            last = error
        time.sleep(1)
    raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}; last: {last}")


def say(text: str) -> None:
    """Print a line that is seen while the test runs."""
    sys.stderr.write(f"\n    {time.strftime('%H:%M:%S')} {text}")
    sys.stderr.flush()
