"""ClickHouse's HTTP interface over the embedded engine, for reading only, so that its clients and curl work unchanged.

https://clickhouse.com/docs/interfaces/http: `GET /?query=` and `POST /` (the query in the address, in the body, or begun in one
and ended in the other), `database`, `default_format`, `param_*`, `FORMAT`, gzip for those who ask for it. No users: it listens
on the loopback address unless told otherwise.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlsplit

import structlog

from tidegate.projection.sql_engine import Answer, QueryError, RefusedError, SqlEngine

MAX_BODY_BYTES: Final = 1024 * 1024
MAX_PASSED_OVER_BYTES: Final = 16 * 1024 * 1024
IDLE_CONNECTION_S: Final = 60.0
GZIP_FROM_BYTES: Final = 1024

_STATUS_OF_CODE: Final[dict[int, HTTPStatus]] = {
    60: HTTPStatus.NOT_FOUND,  # UNKNOWN_TABLE
    81: HTTPStatus.NOT_FOUND,  # UNKNOWN_DATABASE
    159: HTTPStatus.REQUEST_TIMEOUT,  # TIMEOUT_EXCEEDED
    164: HTTPStatus.FORBIDDEN,  # READONLY
    202: HTTPStatus.SERVICE_UNAVAILABLE,  # TOO_MANY_SIMULTANEOUS_QUERIES
    241: HTTPStatus.INTERNAL_SERVER_ERROR,  # MEMORY_LIMIT_EXCEEDED
    497: HTTPStatus.FORBIDDEN,  # ACCESS_DENIED
    1002: HTTPStatus.INTERNAL_SERVER_ERROR,  # UNKNOWN_EXCEPTION
}
NOT_IMPLEMENTED: Final = 48
TOO_LARGE: Final = 62
_CONTENT_TYPES: Final = (
    ("JSON", "application/json; charset=UTF-8"),
    ("CSV", "text/csv; charset=UTF-8"),
    ("TabSeparated", "text/tab-separated-values; charset=UTF-8"),
    ("TSV", "text/tab-separated-values; charset=UTF-8"),
    ("Native", "application/octet-stream"),
    ("RowBinary", "application/octet-stream"),
    ("Arrow", "application/vnd.apache.arrow.stream"),
    ("Parquet", "application/vnd.apache.parquet"),
)
# Parameters of the request that are no settings of the query.
_NOT_SETTINGS: Final = frozenset(
    {"query", "database", "default_format", "query_id", "session_id", "user", "password", "quota_key", "compress"}
)

_log = structlog.get_logger()


class SqlServer:
    """Serves an engine's read-only queries in threads of its own, from construction until `close`."""

    def __init__(self, engine: SqlEngine, host: str, port: int) -> None:
        """Listen; port 0 takes a free one. Raises OSError if the address cannot be had."""
        self._server = _Server((host, port), _Handler)
        self._server.engine = engine
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="sql-server", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}"

    def close(self) -> None:
        """Stop listening. Blocks for a moment; queries under way end with the process. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_address(file: Path, url: str, database: str) -> None:
    """Write where the SQL is served, for `tidegate sql`, in one step. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"url": url, "database": database, "pid": os.getpid()}, indent=2)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A restart must not wait for connections of before. Two servers on one port are still refused.
    allow_reuse_address = True
    engine: SqlEngine

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is no trouble of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "tidegate-projection"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = IDLE_CONNECTION_S
    server: _Server

    def do_GET(self) -> None:
        """Answer GET."""
        self._serve("")

    def do_HEAD(self) -> None:
        """Answer HEAD, which clients use as a ping."""
        self._send(HTTPStatus.OK, b"", {})

    def do_POST(self) -> None:
        """Answer POST."""
        try:
            body = self._body()
        except QueryError as error:
            self.close_connection = True
            self._send_error(error)
            return
        self._serve(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Be silent: queries are not events of the service."""

    def _serve(self, body: str) -> None:
        target = urlsplit(self.path)
        if target.path not in ("/", ""):
            known = target.path in ("/ping", "/replicas_status")
            self._send(
                HTTPStatus.OK if known else HTTPStatus.NOT_FOUND, b"Ok.\n" if known else b"There is no such path.\n", {}
            )
            return
        request = dict(parse_qsl(target.query, keep_blank_values=True))
        sql = "\n".join(part for part in (request.get("query", ""), body) if part.strip())
        if not sql.strip() and self.command == "GET":
            self._send(HTTPStatus.OK, b"Ok.\n", {})
            return
        try:
            answer = self._answer(sql, request)
        except (QueryError, RefusedError) as error:
            self._send_error(error)
        except Exception as error:
            _log.exception("query failed")
            self._send_error(QueryError(f"{type(error).__name__}: {error}", 1002))
        else:
            self._send_answer(answer, request)

    def _answer(self, sql: str, request: Mapping[str, str]) -> Answer:
        if request.get("compress", "0") not in ("", "0"):
            raise QueryError("compress=1 is not implemented here: use enable_http_compression=1", NOT_IMPLEMENTED)
        return self.server.engine.query(
            sql,
            default_format=request.get("default_format") or self.headers.get("X-ClickHouse-Format") or "",
            database=request.get("database") or self.headers.get("X-ClickHouse-Database") or "",
            settings={k: v for k, v in request.items() if k not in _NOT_SETTINGS and not k.startswith("param_")},
            parameters={k.removeprefix("param_"): v for k, v in request.items() if k.startswith("param_")},
        )

    def _body(self) -> str:
        if self.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise QueryError("compressed requests are not implemented here", NOT_IMPLEMENTED)
        if self.headers.get("Content-Type", "").startswith("multipart/"):
            raise QueryError("multipart requests are not implemented here", NOT_IMPLEMENTED)
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = self._chunked_body()
        else:
            length = self.headers.get("Content-Length", "0")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                self._pass_over(int(length) if length.isdecimal() else 0)
                raise QueryError(f"a query may have at most {MAX_BODY_BYTES} bytes", TOO_LARGE)
            data = self.rfile.read(int(length))
        return data.decode("utf-8", "surrogateescape")

    def _pass_over(self, size: int) -> None:
        """Read what is not wanted, within reason: who is still sending when we hang up may never read our answer."""
        left = min(size, MAX_PASSED_OVER_BYTES)
        while left > 0 and (piece := self.rfile.read(min(left, MAX_BODY_BYTES))):
            left -= len(piece)

    def _chunked_body(self) -> bytes:
        data = b""
        while True:
            size = int(self.rfile.readline(64).split(b";")[0], 16)
            if len(data) + size > MAX_BODY_BYTES:
                self._pass_over(size)
                raise QueryError(f"a query may have at most {MAX_BODY_BYTES} bytes", TOO_LARGE)
            data += self.rfile.read(size)
            self.rfile.readline(64)
            if not size:
                return data

    def _send_answer(self, answer: Answer, request: Mapping[str, str]) -> None:
        elapsed_ns = int(answer.elapsed_s * 1e9)
        summary = {"read_rows": answer.read_rows, "read_bytes": answer.read_bytes, "elapsed_ns": elapsed_ns}
        headers = {
            "Content-Type": _content_type(answer.format),
            "X-ClickHouse-Format": answer.format,
            "X-ClickHouse-Timezone": self.server.engine.timezone,
            "X-ClickHouse-Query-Id": request.get("query_id") or str(uuid.uuid4()),
            "X-ClickHouse-Summary": json.dumps({name: str(value) for name, value in summary.items()}),
        }
        body = answer.body
        wants_gzip = "gzip" in self.headers.get("Accept-Encoding", "") and request.get("enable_http_compression") == "1"
        if wants_gzip and len(body) >= GZIP_FROM_BYTES:
            body = gzip.compress(body, compresslevel=1)
            headers["Content-Encoding"] = "gzip"
        self._send(HTTPStatus.OK, body, headers)

    def _send_error(self, error: QueryError | RefusedError) -> None:
        text = str(error).strip()
        if not text.startswith("Code: "):
            text = f"Code: {error.code}. DB::Exception: {text}"
        headers = {"X-ClickHouse-Exception-Code": str(error.code), "Content-Type": "text/plain; charset=UTF-8"}
        self._send(
            _STATUS_OF_CODE.get(error.code, HTTPStatus.BAD_REQUEST), f"{text}\n".encode("utf-8", "replace"), headers
        )

    def _send(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value.replace("\r", " ").replace("\n", " "))
        self.send_header("X-ClickHouse-Server-Display-Name", self.server_version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _content_type(output_format: str) -> str:
    return next(
        (kind for prefix, kind in _CONTENT_TYPES if output_format.startswith(prefix)), "text/plain; charset=UTF-8"
    )
