"""Runs read-only queries on the embedded ClickHouse, beside the projection that fills it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from tidegate.projection import read_only
from tidegate.projection.read_only import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CONCURRENT: Final = 4
WAIT_FOR_TURN_S: Final = 10.0
MAX_RESULT_BYTES: Final = 256 * 1024 * 1024
DEFAULT_FORMAT: Final = "TabSeparated"

TOO_MANY_QUERIES: Final = 202
UNKNOWN_EXCEPTION: Final = 1002

# Settings that a request may bring: they change how a result looks, or make the query stricter. Others are ignored, because
# clients send many by themselves.
_SETTINGS: Final = re.compile(
    r"""output_format_(?!schema)[a-z0-9_]+ | date_time_output_format | session_timezone | limit | offset | extremes
    | join_use_nulls | group_by_use_nulls | cast_keep_nullable | max_result_rows | result_overflow_mode""",
    re.VERBOSE,
)


class QueryError(RuntimeError):
    """The query failed; `code` is ClickHouse's number for why."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Answer(NamedTuple):
    """A result in the bytes of `format`, and what it took."""

    body: bytes
    format: str
    read_rows: int
    read_bytes: int
    elapsed_s: float


class SqlEngine:
    """Read-only queries, each on a connection of its own, with bounds on time, memory, result and number. Thread-safe."""

    def __init__(self, path: Path, database: str, *, timeout_s: float, memory_mb: int) -> None:
        """Open the engine at `path`, or join the one that this process has open there. Blocks. Raises QueryError."""
        self._path = str(path)
        self._database = database
        self._timeout_s = timeout_s
        self._turns = threading.BoundedSemaphore(MAX_CONCURRENT)
        self._limits = {
            "max_execution_time": str(timeout_s),
            "timeout_overflow_mode": "throw",
            "max_memory_usage": str(memory_mb * 1024 * 1024),
            "max_result_bytes": str(MAX_RESULT_BYTES),
            # The projection needs a core too.
            "max_threads": str(max(1, (os.cpu_count() or 2) // 2)),
        }
        with self._connection({}, database) as connection:
            functions = _words(connection, "SELECT name FROM system.functions")
            table_functions = _words(connection, "SELECT name FROM system.table_functions")
            self.version, self.timezone = _words(connection, "SELECT version(), timezone()")
        self._refused = read_only.refused_functions(functions, table_functions)

    def query(
        self,
        sql: str,
        *,
        default_format: str = "",
        database: str = "",
        settings: Mapping[str, str] | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Answer:
        """Run one query. `parameters` fill `{name:Type}`; settings that are not known to be harmless are ignored.

        Blocks until it is done, at most for the time limit and the wait for a turn. Raises QueryError, RefusedError.
        """
        if not self._turns.acquire(timeout=WAIT_FOR_TURN_S):
            raise QueryError(f"more than {MAX_CONCURRENT} queries at once", TOO_MANY_QUERIES)
        try:
            with self._connection(settings or {}, database) as connection:
                formatted = _formatted(connection, sql)
                asked = read_only.check(formatted, self._refused)
                read_only.check_format(default_format)
                output_format = asked or default_format or DEFAULT_FORMAT
                result = _run(connection, formatted, output_format, dict(parameters or {}))
                return Answer(
                    result.bytes() or b"", output_format, result.rows_read(), result.bytes_read(), result.elapsed()
                )
        finally:
            self._turns.release()

    @contextmanager
    def _connection(self, settings: Mapping[str, str], database: str) -> Iterator[Any]:
        """Yield a new read-only connection with the limits and the settings; opening one takes a fraction of a millisecond."""
        import chdb  # noqa: PLC0415 - comes with the extra only, and takes a second to load

        try:
            connection: Any = chdb.connect(self._path)  # type: ignore[no-untyped-call] # chdb has no types
        except RuntimeError as error:
            raise _query_error(error) from error
        try:
            # The name that ClickHouse's clients use when they are told none.
            name = self._database if database in ("", "default") else database
            _run(connection, f"USE {_quoted(name, '`')}")
            wanted = {key: value for key, value in settings.items() if _SETTINGS.fullmatch(key)} | self._limits
            changes = ", ".join(f"{key} = {_quoted(value, chr(39))}" for key, value in wanted.items())
            _run(connection, f"SET {changes}, readonly = 1")
            yield connection
        finally:
            connection.close()


def _formatted(connection: Any, sql: str) -> str:
    """Return the query as the engine's parser understands it. Raises QueryError if it does not, or if there are several."""
    text = sql.strip()
    result = _run(connection, "SELECT formatQuery({query:String})", "RawBLOB", {"query": _as_parameter(text)})
    return str(result.bytes().decode("utf-8", "surrogateescape"))


def _as_parameter(text: str) -> str:
    """Escape a value the way in which ClickHouse reads query parameters."""
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\0", "\\0")


def _run(connection: Any, sql: str, output_format: str = "Null", parameters: dict[str, str] | None = None) -> Any:
    try:
        return connection.query(sql, output_format, params=parameters or None)
    except RuntimeError as error:
        raise _query_error(error) from error
    except UnicodeEncodeError as error:
        raise QueryError(f"the query is not UTF-8: {error}", 62) from error


def _words(connection: Any, sql: str) -> list[str]:
    return str(_run(connection, sql, "TabSeparated").bytes().decode()).split()


def _query_error(error: Exception) -> QueryError:
    text = str(error).strip()
    found = re.search(r"Code: (\d+)", text)
    return QueryError(text, int(found.group(1)) if found else UNKNOWN_EXCEPTION)


def _quoted(text: str, quote: str) -> str:
    return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


__all__ = ["Answer", "QueryError", "RefusedError", "SqlEngine"]
