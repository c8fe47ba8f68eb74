"""A ClickHouse server's HTTP interface over the embedded engine, writable, that can be made to be away."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import chdb

_INSERT = re.compile(r"(?s)(INSERT INTO .*?)\s+FORMAT\s+(\w+)\s*$")


class StandIn:
    """Serves an engine in `path` on a free port. `fault` says what becomes of requests: "", "refuse", "hang up", "fail"."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        # Keeps the engine open between requests.
        self._keep: Any = chdb.connect(self.path)
        self.fault = ""
        self.insert_count = 0
        self.faults_met = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def run(self, query: str, data: bytes, parameters: dict[str, str]) -> bytes:
        """Run a statement as a server would."""
        with self._lock:
            connection: Any = chdb.connect(self.path)
            try:
                if parameters.get("database"):
                    connection.query(f"USE `{parameters['database']}`")
                found = _INSERT.match(query)
                if found is None:
                    return bytes(
                        connection.query(query, parameters.get("default_format", "TabSeparated")).bytes() or b""
                    )
                self.insert_count += 1
                with tempfile.NamedTemporaryFile() as file:
                    file.write(data)
                    file.flush()
                    connection.query(f"{found[1]} FROM INFILE '{file.name}' FORMAT {found[2]}")
                return b""
            finally:
                connection.close()

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query on the projection's database."""
        text = self.run(query, b"", {"database": "tidegate", "default_format": "JSONEachRow"}).decode()
        return [json.loads(line) for line in text.splitlines()]

    @contextmanager
    def away(self, fault: str, seconds: float = 0.0) -> Iterator[None]:
        """Be at fault for as long as the block takes, and for so many seconds at least."""
        self.fault = fault
        met = self.faults_met
        try:
            yield
            deadline = time.monotonic() + 30
            while self.faults_met == met and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(seconds)
        finally:
            self.fault = ""
        assert self.faults_met > met, "nobody asked while it was away"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._keep.close()


def _handler_of(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._serve(b"")

        def do_POST(self) -> None:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self._serve(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)

        def log_message(self, *_: Any) -> None: ...

        def _serve(self, body: bytes) -> None:
            if stand_in.fault:
                stand_in.faults_met += 1
            if stand_in.fault == "hang up":
                self.close_connection = True
                return
            if stand_in.fault:
                self._answer(503, b"Code: 210. DB::NetException: away\n", "210")
                return
            parameters = dict(parse_qsl(urlsplit(self.path).query))
            query, data = parameters.get("query", ""), body
            if not query:
                query, data = body.decode(), b""
            try:
                answer = stand_in.run(query, data, parameters)
            except RuntimeError as error:
                self._answer(500, str(error).encode(), (re.findall(r"Code: (\d+)", str(error)) or ["1002"])[0])
            else:
                self._answer(200, answer, "")

        def _answer(self, status: int, body: bytes, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-ClickHouse-Exception-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
