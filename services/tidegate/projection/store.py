"""ClickHouse as the projection writes it: one client for a server and for the embedded engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import clickhouse_connect
import structlog

from tidegate.eventlog.interface import TopicPartition
from tidegate.failpoints import failpoint
from tidegate.projection.migrations import pending
from tidegate.projection.rows import (
    COLUMNS,
    EVENTS,
    FRESHNESS,
    INSERT_FORMAT,
    INSERT_SETTINGS,
    LEDGER,
    WHOLE,
    Reach,
    Row,
    encode,
)
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.tables import AGED_BY

CONNECT_TIMEOUT_S: Final = 5
ANSWER_TIMEOUT_S: Final = 120

# The embedded engine shares its cores with everything else here; handing blocks between threads costs it a third more. And it
# need not merge what it is about to write: a batch has a fact once, and a view groups what it makes of a batch. What comes twice
# all the same is merged later, as doubles of two batches are, or by FINAL. Nor need what the views compute be compiled: that
# takes 0.15 s of processor time at the fourth insert after each start, and is no faster.
_CHEAP_INSERT: Final = {
    "max_threads": 1,
    "max_insert_threads": 1,
    "input_format_parallel_parsing": 0,
    "optimize_on_insert": 0,
    "compile_expressions": 0,
    "compile_aggregate_expressions": 0,
}
# How many parts of one size it gathers, about, before they become one; its own five means that a row is written once more for
# every five times that its table grows. A server's merges are its operators' affair.
_GATHERED_PARTS: Final = 10
_GATHERING: Final = (EVENTS, LEDGER, "run_state", "step_state", "attempt_state")  # those that every batch adds to
MIGRATIONS: Final = "schema_migrations"
_MIGRATIONS_TABLE: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations
(version Int32, name String, checksum String, applied_at DateTime64(3, 'UTC'))
ENGINE = ReplacingMergeTree ORDER BY version
"""

_log = structlog.get_logger()
logging.getLogger("clickhouse_connect").setLevel(logging.WARNING)


class StoreError(RuntimeError):
    """ClickHouse cannot be reached or did not do what it was asked: trying again later may help."""


class TablesMissingError(StoreError):
    """Tables are not there yet, and somebody else makes them."""


class Known(NamedTuple):
    """What the database says of a partition: up to where the tables lack nothing, when its freshness was written (0 if it is not
    there), and when the newest event was decided that it tells of, if it does."""

    whole_to: int
    written_ms: int
    last_event_ms: int | None


NOTHING_KNOWN: Final = Known(0, 0, None)


class Store:
    """A connection for writing. Not thread-safe: the thread that inserts owns it."""

    def __init__(self, client: Any, insert_settings: Mapping[str, Any] | None = None) -> None:
        self._client = client
        self._insert_settings = {**INSERT_SETTINGS, **(insert_settings or {})}
        self._written_ms: dict[TopicPartition, int] = {}  # of our last row of freshness
        self._since: dict[TopicPartition, int] = {}  # where the tables begin again, of partitions whose row was lost

    @classmethod
    def open(cls, settings: ProjectionSettings, may_migrate: Callable[[], bool] = lambda: True) -> Self:
        """Connect, make the database and apply pending migrations. Blocks. Raises StoreError, or MigrationError for good.

        may_migrate: asked before each change of the tables; of several projections one may. Where something is pending and we may
        not, raises TablesMissingError.
        """
        try:
            client = _connect(settings)
        except Exception as error:  # the client raises its own, urllib3's and the engine's exceptions
            hint = "; one process can have it open, and another may still have it" if settings.embedded_path else ""
            raise StoreError(f"cannot open {settings.effective_url}: {_first_line(error)}{hint}") from error
        store = cls(client, _CHEAP_INSERT if settings.embedded_path else None)
        try:
            store._migrate(settings.clickhouse_database, may_migrate)
            store._age(settings.projection_ttl_days)
            if settings.embedded_path:
                store._gather()
        except BaseException:
            store.close()
            raise
        return store

    def _migrate(self, database: str, may_migrate: Callable[[], bool]) -> None:
        self._command(f"CREATE DATABASE IF NOT EXISTS `{database}`", use_database=False)
        self._client.database = database
        self._command(_MIGRATIONS_TABLE)
        applied = {
            int(row[0]): str(row[1]) for row in self.rows("SELECT version, checksum FROM schema_migrations FINAL")
        }
        for migration in pending(applied):
            for statement in migration.statements:
                if not may_migrate():
                    raise TablesMissingError(
                        f"migration {migration.version} is left to the projection that has partition 0 of run-events; "
                        "if that is one of an older version, stop it"
                    )
                self._command(statement)
            self._command(
                "INSERT INTO schema_migrations SELECT "
                f"{migration.version}, '{migration.name}', '{migration.checksum}', now64(3)"
            )
            _log.info("migration applied", version=migration.version, name=migration.name)

    def _age(self, days: int) -> None:
        """Have rows forgotten after so many days, 0 for never. Changes nothing where that is so already: a change is a rewrite."""
        now = dict(
            self.rows(
                "SELECT name, extract(engine_full, 'TTL .*toIntervalDay\\\\((\\\\d+)\\\\)') FROM system.tables "
                "WHERE database = currentDatabase()"
            )
        )
        for table, moment in AGED_BY.items():
            if now.get(table, "") == (str(days) if days else ""):
                continue
            ttl = f"MODIFY TTL toDateTime({moment}) + toIntervalDay({days})" if days else "REMOVE TTL"
            self._command(f"ALTER TABLE {table} {ttl}")
            _log.info("rows are kept", table=table, days=days or "for ever")

    def _gather(self) -> None:
        """Have tables merged less often than is usual."""
        wanted = f"merge_selector_base = {_GATHERED_PARTS}"
        now = dict(self.rows("SELECT name, engine_full FROM system.tables WHERE database = currentDatabase()"))
        for table in _GATHERING:
            if wanted not in now.get(table, ""):
                self._command(f"ALTER TABLE {table} MODIFY SETTING {wanted}")

    def insert(
        self, tables: Mapping[str, list[Row]], reach: Mapping[TopicPartition, Reach] | None = None
    ) -> dict[TopicPartition, int]:
        """Insert rows into their tables, `freshness` last, so that it never promises what is not there. Blocks.

        reach: of the partitions whose freshness is told; it makes their last column. Returns up to where the tables lack nothing of
        them.
        Whatever fails in between, inserting all of it again is right: rows are idempotent. Raises StoreError.
        """
        whole_to: dict[TopicPartition, int] = {}
        written_ms: dict[TopicPartition, int] = {}
        for table in sorted(tables, key=lambda name: name == FRESHNESS):
            rows = tables[table]
            if not rows:
                continue
            if table == FRESHNESS:
                known = self._known()
                whole_to = self._extended(rows, reach or {}, known)
                rows = [_completed(row, whole_to, known) for row in rows]
                written_ms = {_place(row): row[5] for row in rows}
            try:
                self._client.raw_insert(
                    table, COLUMNS[table], encode(rows), fmt=INSERT_FORMAT, settings=self._insert_settings
                )
            except Exception as error:
                raise StoreError(f"insert into {table}: {_first_line(error)}") from error
            failpoint("projection.between-tables")
        self._written_ms |= written_ms
        return whole_to

    def _extended(
        self, rows: list[Row], reach: Mapping[TopicPartition, Reach], known: Mapping[TopicPartition, Known]
    ) -> dict[TopicPartition, int]:
        """Return up to where the tables lack nothing, now that they have what these rows of freshness tell.

        The database is asked each time. Somebody else, or a replay, may have filled a gap. And the tables may have been
        emptied, or restored from a backup, under us: then our row is gone, and they hold what comes from here on.
        """
        found = {}
        for row in rows:
            at, next_offset = _place(row), row[2]
            whole_to, written_ms, _ = known.get(at, NOTHING_KNOWN)
            if written_ms < self._written_ms.get(at, 0):
                self._since[at] = next_offset
            since, log_start = reach.get(at, Reach(0, 0))
            found[at] = Reach(max(since, self._since.get(at, 0)), log_start).whole_to(whole_to, next_offset)
        return found

    def whole_to(self) -> dict[TopicPartition, int]:
        """Return up to where the tables lack nothing, as the database says. Blocks. Raises StoreError."""
        return {at: known.whole_to for at, known in self._known().items()}

    def _known(self) -> dict[TopicPartition, Known]:
        """Return what the database says of the partitions. Raises StoreError."""
        query = (
            "SELECT topic, `partition`, max(whole_to), max(written_ms), max(last_event_ms) FROM ("  # noqa: S608 - tables of ours
            f"SELECT topic, `partition`, whole_to, written_ms, last_event_ms FROM {FRESHNESS} FINAL UNION ALL "
            f"SELECT topic, `partition`, whole_to, 0, NULL FROM {WHOLE} FINAL) GROUP BY topic, `partition`"
        )
        return {TopicPartition(str(topic), int(number)): Known(*known) for topic, number, *known in self.rows(query)}

    def note_whole(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Write down up to where the tables lack nothing, for whoever writes freshness. Blocks. Raises StoreError."""
        self.insert({WHOLE: [(at.topic, at.partition, offset) for at, offset in sorted(offsets.items())]})

    def insert_one(self, table: str, columns: Sequence[str], row: Row) -> None:
        """Insert a row of a table that is not made of the log. Blocks. Raises StoreError."""
        try:
            self._client.raw_insert(table, columns, encode([row]), fmt=INSERT_FORMAT, settings=self._insert_settings)
        except Exception as error:
            raise StoreError(f"insert into {table}: {_first_line(error)}") from error

    def command(self, statement: str) -> None:
        """Run a statement that returns nothing. Blocks. Raises StoreError."""
        self._command(statement)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query. Blocks. Raises StoreError."""
        try:
            return list(self._client.query(query).result_rows)
        except Exception as error:
            raise StoreError(_first_line(error)) from error

    def close(self) -> None:
        """Close the connection, and the embedded engine with it. Does not raise."""
        try:
            self._client.close()
        except Exception as error:
            _log.warning("closing ClickHouse failed", error=_first_line(error))

    def _command(self, statement: str, *, use_database: bool = True) -> None:
        try:
            self._client.command(statement, use_database=use_database)
        except Exception as error:
            raise StoreError(_first_line(error)) from error


def _completed(row: Row, whole_to: Mapping[TopicPartition, int], known: Mapping[TopicPartition, Known]) -> Row:
    """Return a row of freshness with what only the database tells. Who has just begun to read knows of no event before.

    It replaces the row that is there, also one of another member whose clock is ahead of ours.
    """
    at = _place(row)
    there = known.get(at, NOTHING_KNOWN)
    last_event_ms = row[4] if row[4] is not None else there.last_event_ms
    return (*row[:4], last_event_ms, max(row[5], there.written_ms + 1), whole_to[at])


def _place(row: Row) -> TopicPartition:
    """Return the topic partition that a row begins with."""
    return TopicPartition(row[0], row[1])


def _connect(settings: ProjectionSettings) -> Any:
    path = settings.embedded_path
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        return clickhouse_connect.get_client(dsn=f"chdb://{path}")
    return clickhouse_connect.get_client(
        dsn=settings.effective_url,
        username=settings.clickhouse_user,
        password=settings.clickhouse_password.get_secret_value(),
        # The database is made by us: asking for it at connect would fail the first time.
        database="default",
        connect_timeout=CONNECT_TIMEOUT_S,
        send_receive_timeout=ANSWER_TIMEOUT_S,
        autogenerate_session_id=False,
        client_name="tidegate-projection",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
