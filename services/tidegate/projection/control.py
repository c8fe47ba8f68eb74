"""Replays on request: asked for over HTTP on the loopback address, done in a thread of the projection.

The projection does them itself because an embedded ClickHouse can be opened by one process only, and because there is one way
then for both kinds (ADR "The projection replays itself"). Who may ask is who can read the file with the address and the token.
"""

from __future__ import annotations

import contextvars
import json
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from tidegate import metrics
from tidegate.eventlog.interface import EventLogError
from tidegate.projection import shadow
from tidegate.projection.replay import (
    FAILED,
    GivenUp,
    Parts,
    Progress,
    Replay,
    ReplayError,
    ReplayRequest,
    load_all,
    save,
)
from tidegate.projection.store import StoreError

MAX_BODY_BYTES: Final = 64 * 1024
HOST: Final = "127.0.0.1"
STOP_TIMEOUT_S: Final = 10.0
AGAIN_AFTER_S: Final = 2.0
PATH: Final = "/replay"
TOKEN_HEADER: Final = "X-Tidegate-Token"  # noqa: S105 - a name

_log = structlog.get_logger()


class BusyError(RuntimeError):
    """A replay is under way already, or there is none."""


class Replays:
    """The replays of this process: one at a time. Any thread may ask; one thread of its own works."""

    def __init__(self, parts: Parts, instance_id: str, clock_ms: Callable[[], int] | None = None) -> None:
        self._parts = parts
        self._instance_id = instance_id
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._replay: Replay | None = None
        self._is_looking = False
        self._thread: threading.Thread | None = None
        metrics.projection_replay.set(-1)

    def resume(self) -> None:
        """Go on with what this instance had begun, if anything, once ClickHouse answers. Does not block."""
        self._is_looking = True
        self._begin(self._resumed)

    def _resumed(self) -> Progress | None:
        store = self._parts.open_store(self._parts.database)
        try:
            unfinished = [one for one in load_all(store) if not one.is_over and one.instance_id == self._instance_id]
        finally:
            store.close()
        return unfinished[-1] if unfinished else None

    def ask(self, request: ReplayRequest) -> Progress:
        """Begin a replay, or go on with an unfinished one of an instance that is gone. Raises BusyError, StoreError."""
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                raise BusyError("a replay is under way already; follow it with `tidegate replay projection --follow`")
        store = self._parts.open_store(self._parts.database)
        try:
            unfinished = [one for one in load_all(store) if not one.is_over]
            progress = unfinished[0] if unfinished and not request.dry_run else self._new(request)
            if request.dry_run:
                return Replay(self._parts, progress, self._stop).plan()
            progress.instance_id = self._instance_id
            progress.saved += 1
            store.command(shadow.MAKE_REPLAYS)
            save(store, progress)
        finally:
            store.close()
        self._begin(lambda: progress)
        return progress

    def _new(self, request: ReplayRequest) -> Progress:
        now_ms = self._clock_ms()
        return Progress(
            replay_id=str(uuid.uuid4()),
            instance_id=self._instance_id,
            request=request,
            started_ms=now_ms,
            updated_ms=now_ms,
        )

    def current(self) -> Progress | None:
        """Return the replay under way, or the last one of this process. Raises StoreError while one of before is looked for."""
        if self._is_looking:
            raise StoreError("whether a replay is to go on is not known yet")
        return None if self._replay is None else self._replay.progress

    def cancel(self) -> None:
        """Give up the replay under way, unless tables are being exchanged already. Raises BusyError if there is none."""
        if self._replay is None or self._replay.progress.is_over:
            raise BusyError("no replay is under way")
        self._replay.cancel_wanted = True

    def close(self) -> None:
        """Stop working; what is under way goes on at the next start. Blocks for some seconds at the most."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _begin(self, find: Callable[[], Progress | None]) -> None:
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work, find), name="replay", daemon=True)
        self._thread.start()

    def _work(self, find: Callable[[], Progress | None]) -> None:
        while not self._stop.is_set():
            try:
                progress = find()
                break
            except StoreError as error:
                _log.warning("replays are not known yet", error=str(error))
                self._stop.wait(AGAIN_AFTER_S)
        else:
            return
        self._replay = None if progress is None else Replay(self._parts, progress, self._stop)
        self._is_looking = False
        if self._replay is None or progress is None:
            return
        try:
            self._replay.run()
        except GivenUp:
            _log.info("replay stops here and goes on at the next start", step=progress.phase)
        except Exception as error:  # whatever it is, the projection goes on
            _log.exception("replay failed")
            progress.phase, progress.reason = FAILED, f"{type(error).__name__}: {error}"


class Control:
    """Serves `GET`, `POST` and `DELETE /replay` on the loopback address to who has the token, until `close`."""

    def __init__(self, replays: Replays, address_file: Path) -> None:
        """Listen on a free port and write the address and a new token, for the owner of the file only. Raises OSError."""
        self._file = address_file
        self._server = _Server((HOST, 0), _Handler)
        self._server.replays, self._server.token = replays, secrets.token_hex(16)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="control", daemon=True)
        self._thread.start()
        url = f"http://{HOST}:{self._server.server_address[1]}"
        _write_secretly(address_file, {"url": url, "token": self._server.token, "pid": os.getpid()})

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._file.unlink(missing_ok=True)


def _write_secretly(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        json.dump(content, out)
    temporary.replace(file)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    replays: Replays
    token: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def do_GET(self) -> None:
        """Answer how the replay stands."""
        self._answer(lambda: self._standing(self.server.replays.current()))

    def do_POST(self) -> None:
        """Begin a replay."""
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"message": "too large"})
            return
        body = self.rfile.read(int(length))
        self._answer(lambda: self._standing(self.server.replays.ask(msgspec.json.decode(body, type=ReplayRequest))))

    def do_DELETE(self) -> None:
        """Give a replay up."""

        def cancel() -> Any:
            self.server.replays.cancel()
            return self._standing(self.server.replays.current())

        self._answer(cancel)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Be silent."""

    def _standing(self, progress: Progress | None) -> Any:
        return {"replay": None} if progress is None else {"replay": msgspec.to_builtins(progress)}

    def _answer(self, ask: Callable[[], Any]) -> None:
        if self.path != PATH:
            self._send(HTTPStatus.NOT_FOUND, {"message": f"there is {PATH}"})
        elif not secrets.compare_digest(self.headers.get(TOKEN_HEADER, ""), self.server.token):
            self._send(HTTPStatus.FORBIDDEN, {"message": f"the token of the address file belongs into {TOKEN_HEADER}"})
        else:
            try:
                self._send(HTTPStatus.OK, ask())
            except BusyError as error:
                self._send(HTTPStatus.CONFLICT, {"message": str(error)})
            except (msgspec.MsgspecError, ReplayError) as error:
                self._send(HTTPStatus.BAD_REQUEST, {"message": str(error)})
            except StoreError as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"message": f"ClickHouse: {error}"})
            except EventLogError as error:
                self._send(HTTPStatus.SERVICE_UNAVAILABLE, {"message": f"Kafka: {error}"})

    def _send(self, status: HTTPStatus, body: Any) -> None:
        data = msgspec.json.encode(body)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
