"""A small API server over HTTP: Jobs, their pods and logs, scale of workloads. Pods are processes of this machine.

It is no Kubernetes: it knows the requests that `tidegate` makes, and answers them as the real one does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

JOBS: Final = re.compile(r"/apis/batch/v1/namespaces/([^/]+)/jobs(?:/([^/]+))?")
PODS: Final = re.compile(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/]+)/log)?")
WORKLOADS: Final = re.compile(
    r"/apis/(?:apps/v1|keda.sh/v1alpha1)/namespaces/([^/]+)/(statefulsets|deployments|scaledobjects)/([^/]+)"
)
TOKEN: Final = "fake-token"  # noqa: S105 - of a server of our own

Answer = tuple[int, Any]


class FakeCluster:
    """What the server holds. A test may look at it, and make it misbehave, at any time."""

    def __init__(self, namespace: str, folder: Path) -> None:
        self.namespace = namespace
        self.folder = folder
        self.jobs: dict[str, dict[str, Any]] = {}  # those that are there
        self.made: list[dict[str, Any]] = []  # all that ever were
        self.deleted: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.workloads: dict[str, dict[str, Any]] = {}
        self.starts_pods = True
        self.waiting = {"reason": "ImagePullBackOff", "message": "no such image"}  # said of pods that do not start
        self.trouble: Callable[[str, str], Answer | None] = lambda method, path: None
        self.on_scale: Callable[[str, int], None] = lambda name, replicas: None
        self.pods: dict[str, subprocess.Popen[bytes] | None] = {}
        self._lock = threading.RLock()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Answer:
        with self._lock:
            self.requests.append((method, path))
            if (trouble := self.trouble(method, path)) is not None:
                return trouble
            if found := JOBS.fullmatch(path):
                return self._jobs(method, found[1], found[2], query, body)
            if found := PODS.fullmatch(path):
                return self._pods(found[1], found[2], query)
            if found := WORKLOADS.fullmatch(path):
                return self._workload(method, f"{found[2]}/{found[3]}", body)
            return refused(404, f"the server could not find {path}")

    def _jobs(self, method: str, namespace: str, name: str | None, query: dict[str, str], body: Any) -> Answer:
        if namespace != self.namespace:
            return refused(403, f"jobs.batch is forbidden in the namespace {namespace!r}")
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return refused(409, f'jobs.batch "{name}" already exists')
            self.jobs[name] = body
            self.made.append(body)
            self.pods[name] = self._started(name, body) if self.starts_pods else None
            return 201, body
        if method == "DELETE" and name is not None:
            if self.jobs.pop(name, None) is None:
                return refused(404, f'jobs.batch "{name}" not found')
            self.deleted.append(name)
            process = self.pods.pop(name)
            if process is not None:
                process.kill()
                process.wait()
            return 200, {}
        return 200, {"items": [job for job in self.jobs.values() if selects(query, job)]}

    def _started(self, name: str, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        program = [sys.executable, *container["command"][1:]]
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.environ["PATH"], **given}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(program, env=environment, stdout=log, stderr=log, cwd=self.folder)

    def _pods(self, namespace: str, name: str | None, query: dict[str, str]) -> Answer:
        if namespace != self.namespace:
            return refused(403, f"pods is forbidden in the namespace {namespace!r}")
        if name is not None:
            lines = (self.folder / f"{name}.log").read_text().splitlines()
            return 200, "\n".join(lines[-int(query["tailLines"]) :]) + "\n"
        items = [self._pod(name, self.pods[name]) for name, job in self.jobs.items() if selects(query, job)]
        return 200, {"items": items}

    def _pod(self, name: str, process: subprocess.Popen[bytes] | None) -> dict[str, Any]:
        if process is None:
            phase, state = "Pending", {"waiting": self.waiting}
        elif (status := process.poll()) is None:
            phase, state = "Running", {"running": {}}
        else:
            phase = "Failed" if status else "Succeeded"
            reason = "OOMKilled" if status == -9 else "Error" if status else "Completed"
            state = {"terminated": {"exitCode": status % 128 if status >= 0 else 128 - status, "reason": reason}}
        return {"metadata": {"name": name}, "status": {"phase": phase, "containerStatuses": [{"state": state}]}}

    def _workload(self, method: str, name: str, body: Any) -> Answer:
        if name not in self.workloads:
            return refused(404, f"{name} not found")
        workload = self.workloads[name]
        if method == "PATCH":
            for key, value in body.get("metadata", {}).get("annotations", {}).items():
                workload["metadata"].setdefault("annotations", {})[key] = value
                if value is None:
                    del workload["metadata"]["annotations"][key]
            if "replicas" in body.get("spec", {}):
                workload["spec"]["replicas"] = body["spec"]["replicas"]
                self.on_scale(name, body["spec"]["replicas"])
        return 200, workload


def selects(query: dict[str, str], wanted: dict[str, Any]) -> bool:
    """Tell whether a query's selector picks an object."""
    labels = wanted["metadata"]["labels"]
    pairs = [pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair]
    return all(labels.get(key) == value for key, value in pairs)


def refused(status: int, message: str) -> Answer:
    """Return what an API server says when it refuses."""
    return status, {"kind": "Status", "status": "Failure", "message": message, "code": status}


@contextmanager
def serving(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """Serve it, and point KUBECONFIG at it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            where = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(where.query).items()}
            status, answer = refused(401, "Unauthorized")
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, answer = cluster.answer(self.command, where.path, query, json.loads(body) if body else None)
            data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = _serve  # noqa: N815 - names that the server looks for

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is declared there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {"token": TOKEN}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        "current-context": "fake",
    }
    file = cluster.folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(file))
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        for process in cluster.pods.values():
            if process is not None:
                process.kill()
                process.wait()
