"""The SQL of a replay: tables of the same form in a database of their own, filled, compared and exchanged.

What tables there are, and which of them ClickHouse fills from which, is asked of ClickHouse itself.
"""

from __future__ import annotations

import re
from typing import Final

from tidegate.projection import rows
from tidegate.projection.store import MIGRATIONS, Store

REPLAYS: Final = "replays"
MAKE_REPLAYS: Final = f"""
CREATE TABLE IF NOT EXISTS {REPLAYS}
(replay_id String, saved Int64, at_ms Int64, instance_id String, phase LowCardinality(String), body String)
ENGINE = ReplacingMergeTree(saved) ORDER BY replay_id
"""
# None is made of the log.
_NOT_REBUILT: Final = frozenset({rows.FRESHNESS, rows.WHOLE, MIGRATIONS, REPLAYS})
# They change with every heartbeat, and by topics that are not compared by offset.
_NOT_COMPARED: Final = frozenset({rows.INSTANCES})
_TARGET: Final = re.compile(r"^CREATE MATERIALIZED VIEW \S+ TO (?:`?\w+`?\.)?`?(\w+)`?", re.IGNORECASE)
_WITHOUT_RUNS: Final = frozenset({rows.DEAD_LETTERS})  # they may name one
_PARTITION_COLUMN: Final = {rows.EVENTS: "partition", rows.LEDGER: "ledger"}


def name_of(database: str) -> str:
    """Return the name of the shadow of a database."""
    return f"{database}_replay"


def drop(store: Store, shadow: str) -> None:
    """Drop a shadow, if it is there."""
    store.command(f"DROP DATABASE IF EXISTS `{shadow}` SYNC")


def lineage(store: Store, database: str) -> dict[str, set[str]]:
    """Return each table that is made of the log, with the fact tables that it is filled from (itself, for facts)."""
    found = {}
    views = {}
    query = "SELECT name, engine, dependencies_table, create_table_query FROM system.tables "
    for name, engine, dependencies, text in store.rows(f"{query} WHERE database = '{database}'"):
        if engine == "MaterializedView":
            target = _TARGET.match(text)
            views[name] = target[1] if target else ""
        elif engine.endswith("MergeTree") and name not in _NOT_REBUILT:
            found[name] = dependencies
    merged: dict[str, set[str]] = {}
    for name, dependencies in found.items():
        for view in dependencies:
            if views.get(view) in found:
                merged.setdefault(views[view], set()).add(name)
    return {name: merged.get(name, {name}) for name in found}


def uuids(store: Store, database: str) -> dict[str, str]:
    """Return the UUIDs of a database's tables: a table that was exchanged has another one."""
    query = "SELECT name, toString(uuid) FROM system.tables WHERE engine LIKE '%MergeTree' AND database"
    return {str(name): str(uuid) for name, uuid in store.rows(f"{query} = '{database}'")}


def exchange(store: Store, database: str, shadow: str, table: str) -> None:
    """Put a rebuilt table in place of the one that is there, and that one in its."""
    store.command(f"EXCHANGE TABLES `{database}`.`{table}` AND `{shadow}`.`{table}`")


def seed(store: Store, database: str, shadow: str, table: str, positions: dict[int, int]) -> None:
    """Copy the facts that lie before the positions, by partition: what the log is not asked for again."""
    partition = _PARTITION_COLUMN[table]
    before = " OR ".join(f"(`{partition}` = {number} AND `offset` < {offset})" for number, offset in positions.items())
    copy(store, database, shadow, table, before or "0")


def carry_over(store: Store, database: str, shadow: str, table: str) -> None:
    """Copy the facts of runs of which the shadow has none: those that the log holds no more."""
    known = f"SELECT run_id FROM `{shadow}`.`{table}`"  # noqa: S608 - names of ours
    copy(store, database, shadow, table, f"run_id != '' AND run_id NOT IN ({known})")


def copy(store: Store, database: str, shadow: str, table: str, condition: str = "1") -> None:
    """Copy rows of a table; what is merged from them is merged in the shadow."""
    names = ", ".join(f"`{name}`" for name in _columns(store, shadow, table))
    store.command(
        f"INSERT INTO `{shadow}`.`{table}` ({names}) SELECT {names} FROM `{database}`.`{table}` WHERE {condition}"  # noqa: S608
    )


def _columns(store: Store, database: str, table: str) -> list[str]:
    query = "SELECT name FROM system.columns WHERE default_kind NOT IN ('ALIAS', 'MATERIALIZED', 'EPHEMERAL')"
    found = store.rows(f"{query} AND database = '{database}' AND table = '{table}' ORDER BY position")
    return [str(row[0]) for row in found]


def compare(store: Store, database: str, shadow: str, tables: list[str]) -> list[tuple[str, int, int, bool]]:
    """Return for each table how many rows it has here and there, and whether they are the same.

    Of tables with runs, those rows are compared whose run is over, by the rebuilt events: the others go on changing.
    """
    events = shadow if _has_events(store, shadow) else database
    over = f"SELECT run_id FROM `{events}`.`{rows.EVENTS}` WHERE type IN ('RunFinished', 'RunRefused')"  # noqa: S608
    compared = []
    for table in tables:
        if table in _NOT_COMPARED:
            continue
        columns = _columns(store, shadow, table)
        condition = f"WHERE run_id IN ({over})" if "run_id" in columns and table not in _WITHOUT_RUNS else ""
        names = ", ".join(f"`{name}`" for name in columns)
        digests = [
            store.rows(
                f"SELECT count(), sum(cityHash64(toString(tuple({names})))) FROM `{one}`.`{table}` FINAL {condition}"  # noqa: S608
            )[0]
            for one in (database, shadow)
        ]
        compared.append((table, int(digests[0][0]), int(digests[1][0]), digests[0] == digests[1]))
    return compared


def _has_events(store: Store, shadow: str) -> bool:
    return bool(store.rows(f"SELECT 1 FROM `{shadow}`.`{rows.EVENTS}` LIMIT 1"))  # noqa: S608
