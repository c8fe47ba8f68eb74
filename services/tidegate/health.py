"""Whether this process lives and is ready, and its metrics: one small HTTP endpoint that every service has.

    /health/live    200 while every loop of the process advances; a broker or a ClickHouse that is away does not change that
    /health/ready   200 when state is restored and work is taken, 503 before, with the reason
    /metrics        Prometheus

It answers from threads of its own, so it tells of a loop that hangs. It asks nobody who they are and shows no data of runs.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET6
from typing import Any, Final

import structlog
from prometheus_client import ProcessCollector
from prometheus_client.exposition import choose_encoder

from tidegate import metrics

MAIN_LOOP: Final = "loop"
STARTING: Final = "starting"
IDLE_CONNECTION_S: Final = 30.0
BEAT_EVERY_S: Final = 1.0

_log = structlog.get_logger()


class Pulse:
    """When each loop of this process last advanced. Any thread may beat; a beat costs as much as reading a clock.

    reasons_to_end: what some thread found that concerns all of the process.
    """

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._beats: dict[str, float] = {}
        self.reasons_to_end: list[str] = []

    def end(self, reason: str) -> None:
        """Say that this process can be of no use any more: its loops end with that reason (`process.run_until_stopped`)."""
        if reason not in self.reasons_to_end:  # it may be found again and again
            self.reasons_to_end.append(reason)

    def beat(self, loop: str = MAIN_LOOP) -> None:
        """Say that a loop advances. Whatever takes long without an end of its own (a restore, say) beats too."""
        self._beats[loop] = self._monotonic_s()

    def ages_s(self) -> dict[str, float]:
        """Return for each loop how long ago it last advanced."""
        now_s = self._monotonic_s()
        return {loop: now_s - beat_s for loop, beat_s in list(self._beats.items())}


# A process has one: what is deep inside a restore needs to say that it goes on, and knows nobody here.
PULSE: Final = Pulse()


async def beat_forever(measure: Callable[[], None] = lambda: None) -> None:
    """Say again and again that the running event loop advances, and have gauges set, until it is cancelled."""
    while True:
        PULSE.beat()
        measure()
        await asyncio.sleep(BEAT_EVERY_S)


class Health:
    """What the endpoint answers. Thread-safe."""

    def __init__(self, service: str, stuck_after_s: float, pulse: Pulse = PULSE) -> None:
        self.service = service
        self._stuck_after_s = stuck_after_s
        self._pulse = pulse
        self._why_not_ready: Callable[[], str] = lambda: STARTING
        pulse.beat()

    def ready_when(self, why_not: Callable[[], str]) -> None:
        """From now on `why_not` is asked, on the endpoint's threads: what is missing, empty for nothing. Must not block."""
        self._why_not_ready = why_not

    def live(self) -> tuple[bool, dict[str, Any]]:
        """Tell whether every loop advances, and how long ago each last did."""
        ages = self._pulse.ages_s()
        stuck = sorted(loop for loop, age_s in ages.items() if age_s > self._stuck_after_s)
        return not stuck, {"stuck": stuck, "seconds_since": {loop: round(age, 3) for loop, age in ages.items()}}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Tell whether work is taken, and what is missing."""
        why_not = self._why_not_ready()
        metrics.ready.set(not why_not)
        return not why_not, {"missing": why_not}


class Endpoint:
    """Serves health and metrics in threads of its own, from construction until `close`."""

    def __init__(self, health: Health, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError if the address cannot be had."""
        self._server = _Server((host, port), health)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="health", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def close(self) -> None:
        """Stop listening. Blocks for a moment."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def served(health: Health, instance_id: str, host: str, port: int | None) -> Iterator[Health]:
    """Serve health and metrics for as long as the block takes; `port` None: not at all.

    Raises SystemExit, with a line that says what to do, if the address cannot be had: a probe that asks in vain would have
    the process killed again and again without a word.
    """
    if port is None:
        yield health
        return
    registry = metrics.REGISTRIES[health.service]
    metrics.build_info.labels(importlib.metadata.version("tidegate"), instance_id).set(1)
    try:
        endpoint = Endpoint(health, host, port)
    except OSError as error:
        raise SystemExit(f"TIDEGATE_HTTP_PORT: cannot listen on {host}:{port}: {error}; choose another, or 0") from None
    process = ProcessCollector(registry=registry)
    _log.info("health and metrics", url=endpoint.url)
    try:
        yield health
    finally:
        registry.unregister(process)
        endpoint.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], health: Health) -> None:
        if ":" in address[0]:
            self.address_family = AF_INET6
        self.health = health
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is no trouble of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tidegate"
    sys_version = ""
    timeout = IDLE_CONNECTION_S
    server: _Server

    def do_GET(self) -> None:
        """Answer GET."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._send_metrics()
        elif path == "/health/live":
            self._send_verdict(*self.server.health.live())
        elif path == "/health/ready":
            self._send_verdict(*self.server.health.ready())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"There are /metrics, /health/live and /health/ready.\n")

    def do_HEAD(self) -> None:
        """Answer HEAD."""
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Be silent: probes are not events of the service."""

    def _send_metrics(self) -> None:
        self.server.health.ready()  # its gauge is as old as the last question
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._send(HTTPStatus.OK, content_type, encode(metrics.REGISTRIES[self.server.health.service]))

    def _send_verdict(self, good: bool, body: dict[str, Any]) -> None:
        status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        text = json.dumps({"service": self.server.health.service, "ok": good, **body})
        self._send(status, "application/json", f"{text}\n".encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
