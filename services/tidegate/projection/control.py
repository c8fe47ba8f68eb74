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
    GivenUp,
    Parts,
    Progress,
    Replay,
    ReplayError,
    ReplayRequest,
    load_all,
    save,
)
from tidegate.projection.store import Store, StoreError

MAX_BODY_BYTES: Final = 64 * 1024
HOST: Final = "127.0.0.1"
STOP_TIMEOUT_S: Final = 10.0
AGAIN_AFTER_S: Final = 2.0
# How often it is looked whether another member of the group was asked for a replay, and whether it is ours to do.
LOOK_EVERY_S: Final = 5.0
# Who takes a replay over writes rows that win over those which whoever had it before may still write.
TAKEN_OVER: Final = 1_000_000
PATH: Final = "/replay"
TOKEN_HEADER: Final = "X-Tidegate-Token"  # noqa: S105 - a name

_log = structlog.get_logger()


class BusyError(RuntimeError):
    """A replay is under way already, or there is none."""


class Replays:
    """The replays of a group of projections, one at a time, done by the member that has its first partition.

    Any member may be asked, by any thread: it writes the request down, as a row of `replays`. One thread of each member looks
    whether there is something to do, and whether it is this member's to do.
    """

    def __init__(
        self,
        parts: Parts,
        instance_id: str,
        clock_ms: Callable[[], int] | None = None,
        *,
        is_first: Callable[[], bool] = lambda: True,
        has_company: bool = False,
    ) -> None:
        """is_first: tells whether replays are ours to do, at any time. has_company: others may be asked for them, too."""
        self._parts = parts
        self._instance_id = instance_id
        self._is_first = is_first
        self._has_company = has_company
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._replay: Replay | None = None
        self._followed = ""  # the replay that we were asked for, or told somebody of
        self._hopeless: set[str] = set()
        self._is_looking = False
        self._thread: threading.Thread | None = None
        metrics.projection_replay.set(-1)

    def resume(self) -> None:
        """Begin to look for what is to be done, or to go on with, once ClickHouse answers. Does not block."""
        self._is_looking = True
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="replay", daemon=True)
        self._thread.start()

    def ask(self, request: ReplayRequest) -> Progress:
        """Have a replay begun, or return the unfinished one, which goes on. Raises BusyError, ReplayError, StoreError."""
        if self._under_way() is not None:
            raise BusyError("a replay is under way already; follow it with `tidegate replay projection --follow`")
        with self._lock:
            store = self._parts.open_store(self._parts.database)
            try:
                if request.dry_run:
                    return Replay(self._parts, self._new(request), self._stop).plan()
                progress = self._unfinished(store)
                if progress is None:
                    progress = self._new(request)
                    store.command(shadow.MAKE_REPLAYS)
                    save(store, progress)
            finally:
                store.close()
            self._followed = progress.replay_id
        self._wake.set()
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

    def _unfinished(self, store: Store) -> Progress | None:
        """Return the replay that is to go on, the oldest if there are several."""
        return next((one for one in load_all(store) if not one.is_over and one.replay_id not in self._hopeless), None)

    def _under_way(self) -> Progress | None:
        """Return the replay that this process is at."""
        replay = self._replay
        return None if replay is None or replay.progress.is_over else replay.progress

    def current(self) -> Progress | None:
        """Return the replay under way, whichever member does it, or the last one that this process has to do with.

        Blocks while ClickHouse is asked. Raises StoreError, also while it is not known yet whether one of before is to go on.
        """
        replay = self._replay
        if replay is not None and self._followed in ("", replay.progress.replay_id):
            return replay.progress
        if self._is_looking:
            raise StoreError("whether a replay is to go on is not known yet")
        if not self._followed and self._thread is None:
            return None
        store = self._parts.open_store(self._parts.database)
        try:
            known = {one.replay_id: one for one in load_all(store)}
        finally:
            store.close()
        unfinished = next((one for one in known.values() if not one.is_over), None)
        found = known.get(self._followed) or unfinished
        self._followed = found.replay_id if found is not None else ""
        return found

    def cancel(self) -> None:
        """Give up the replay under way, unless tables are being exchanged already. Blocks while ClickHouse is asked.

        Raises StoreError, or BusyError if there is none, or if another member has to be asked.
        """
        replay = self._replay
        if replay is not None and not replay.progress.is_over:
            replay.cancel_wanted = True
            return
        found = self.current()
        if found is None or found.is_over:
            raise BusyError("no replay is under way")
        if self._is_first():
            raise StoreError("the replay is about to begin")
        raise BusyError(f"the projection {found.instance_id} does the replay: give the command there")

    def close(self) -> None:
        """Stop working; what is under way goes on at the next start. Blocks for some seconds at the most."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _work(self) -> None:
        was_first = False
        while not self._stop.is_set():
            asked, is_first = self._wake.is_set(), self._is_first()
            self._wake.clear()
            # Who has no company hears of everything; each look opens a connection.
            if is_first and (asked or self._has_company or not was_first):
                try:
                    progress = self._taken_over()
                except StoreError as error:
                    _log.warning("replays are not known yet", error=str(error))
                    was_first = False  # what woke us is still to be looked for
                    self._stop.wait(AGAIN_AFTER_S)
                    continue
                if progress is not None:
                    self._do(progress)
                    was_first = False  # there may be another one to do
                    continue
                self._is_looking = False
            elif self._has_company:
                self._is_looking = False
            was_first = is_first
            self._wake.wait(LOOK_EVERY_S)

    def _taken_over(self) -> Progress | None:
        """Return what is to be done, noted as ours."""
        store = self._parts.open_store(self._parts.database)
        try:
            progress = self._unfinished(store)
            if progress is not None:
                progress.instance_id = self._instance_id
                progress.saved += TAKEN_OVER
                save(store, progress)
            return progress
        finally:
            store.close()

    def _do(self, progress: Progress) -> None:
        replay = self._replay = Replay(self._parts, progress, self._stop, ours=self._is_first)
        self._followed = progress.replay_id
        self._is_looking = False
        try:
            replay.run()
        except GivenUp:
            _log.info("replay stops here and goes on where the first partition is", step=progress.phase)
            self._replay = None
        except Exception as error:  # whatever it is, the projection goes on
            _log.exception("replay failed")
            self._hopeless.add(progress.replay_id)
            replay.fail(f"{type(error).__name__}: {error}")


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
