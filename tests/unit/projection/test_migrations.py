"""Migrations: numbered, applied once, never changed; and what they make in the real engine."""

import re
from pathlib import Path

import pytest

from tidegate.eventlog.interface import TopicPartition
from tidegate.projection import migrations as module
from tidegate.projection.migrations import MigrationError, migrations, pending
from tidegate.projection.rows import FRESHNESS, Reach
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import MIGRATIONS, Store, TablesMissingError
from tidegate.projection.tables import AGED_BY, FACTS, MERGED, TABLES, VIEWS


def test_they_are_numbered_from_one_without_gaps_and_named() -> None:
    found = migrations()

    assert [migration.version for migration in found] == list(range(1, len(found) + 1))
    assert all(migration.name and migration.statements for migration in found)


AT = TopicPartition("run-events", 3)
AGAIN = re.compile(
    r"CREATE (TABLE|VIEW|MATERIALIZED VIEW) IF NOT EXISTS |CREATE OR REPLACE VIEW |DROP VIEW IF EXISTS "
    r"|ALTER TABLE \w+ (ADD COLUMN IF NOT EXISTS|MODIFY QUERY) "
    # Facts, into the table that they are in: the same rows, twice.
    r"|INSERT INTO (event|ledger)_facts \((?:.|\n)*\nFROM \3_facts FINAL\n"
    # What is merged of facts, by aggregates that do not count.
    r"|INSERT INTO (run|step|attempt)_state \((?:.|\n)*\nFROM (?:ledger_facts AS l|event_facts AS f)\s+WHERE "
)


def test_every_statement_can_be_applied_again_after_a_crash_in_the_middle() -> None:
    for migration in migrations():
        for statement in migration.statements:
            assert AGAIN.match(statement), statement


def test_all_are_pending_in_an_empty_database_and_none_after_all_are_applied() -> None:
    applied = {migration.version: migration.checksum for migration in migrations()}

    assert pending({}) == migrations()
    assert pending(applied) == []


def test_the_rest_is_pending_after_some_are_applied() -> None:
    first, *others = migrations()

    assert pending({first.version: first.checksum}) == others


def test_a_migration_of_a_newer_version_is_refused() -> None:
    with pytest.raises(MigrationError, match="newer projection"):
        pending({999: "abc"})


def test_a_changed_migration_is_refused() -> None:
    with pytest.raises(MigrationError, match="other content"):
        pending({1: "abc"})


def open_store(folder: Path, **settings: int) -> Store:
    return Store.open(ProjectionSettings(clickhouse_url=f"chdb://{folder}", **settings))


def made(store: Store) -> dict[str, str]:
    """Return what there is, by name."""
    return dict(store.rows("SELECT name, engine FROM system.tables WHERE database = currentDatabase()"))


def ttl_days(store: Store) -> dict[str, str]:
    query = "SELECT name, extract(engine_full, 'toIntervalDay.([0-9]+)') FROM system.tables WHERE database = currentDatabase()"
    return {name: days for name, days in store.rows(query) if days}


def test_the_list_of_tables_is_what_the_migrations_make(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    try:
        engines = made(store)
        assert {name for name, engine in engines.items() if engine.endswith("MergeTree")} == {*TABLES, MIGRATIONS}
        assert {name for name, engine in engines.items() if engine == "View"} == set(VIEWS)
        sources = {merged.by: (merged.table, merged.source) for merged in MERGED}
        assert {name for name, engine in engines.items() if engine == "MaterializedView"} == set(sources)
        for name, (table, source) in sources.items():
            ((text,),) = store.rows(f"SELECT create_table_query FROM system.tables WHERE name = '{name}'")
            assert f".{table} " in text
            assert f"FROM tidegate.{source}" in text
        assert not any("Summing" in engine for engine in engines.values()), "a sum counts twice what comes twice"
    finally:
        store.close()


@pytest.mark.feature("O1")
def test_an_older_installation_is_brought_up_to_date_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = migrations()
    monkeypatch.setattr(module, "migrations", lambda: everything[:7])
    store = open_store(tmp_path)
    store._command(
        "INSERT INTO event_facts (run_id, seq, at, type, body) SELECT 'old', 1, now64(3), 'RunStarted', '{}'"
    )
    before = store.rows("SELECT run_id, status, last_seq FROM runs")
    store.close()
    monkeypatch.undo()

    store = open_store(tmp_path)
    try:
        assert store.rows("SELECT run_id, status, last_seq FROM runs") == before != []
        assert [row[0] for row in store.rows("SELECT version FROM schema_migrations FINAL ORDER BY version")] == [
            migration.version for migration in everything
        ]
        assert {*FACTS, *VIEWS} <= made(store).keys()
    finally:
        store.close()


def test_of_several_projections_one_makes_the_tables_and_the_others_wait_for_it(tmp_path: Path) -> None:
    settings = ProjectionSettings(clickhouse_url=f"chdb://{tmp_path}")
    left = iter([True] * 5)
    with pytest.raises(TablesMissingError, match="migration 1 "):
        Store.open(settings, may_migrate=lambda: False)
    with pytest.raises(TablesMissingError):  # it may no more in the middle of a file
        Store.open(settings, may_migrate=lambda: next(left, False))
    with pytest.raises(TablesMissingError):
        Store.open(settings, may_migrate=lambda: False)
    open_store(tmp_path).close()

    store = Store.open(settings, may_migrate=lambda: False)
    try:
        assert {*FACTS, *VIEWS} <= made(store).keys()
        assert len(store.rows("SELECT version FROM schema_migrations FINAL")) == len(migrations())
    finally:
        store.close()


def test_rows_are_kept_for_as_long_as_the_setting_says_whatever_it_said_before(tmp_path: Path) -> None:
    for days in (0, 90, 90, 30, 0):
        store = open_store(tmp_path, projection_ttl_days=days)
        try:
            assert ttl_days(store) == (dict.fromkeys(AGED_BY, str(days)) if days else {})
        finally:
            store.close()


def test_the_embedded_engine_gathers_more_parts_before_it_merges_them(tmp_path: Path) -> None:
    for _ in range(2):
        store = open_store(tmp_path)
        try:
            base = "extract(engine_full, 'merge_selector_base = ([0-9]+)') AS base"
            found = dict(
                store.rows(f"SELECT name, {base} FROM system.tables WHERE database = 'tidegate' AND base != ''")
            )
            assert found == dict.fromkeys(
                ("event_facts", "ledger_facts", "run_state", "step_state", "attempt_state"), "10"
            )
        finally:
            store.close()


def test_rows_older_than_that_go_and_the_others_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path, projection_ttl_days=30)
    try:
        for run_id, age_days in (("old", 40), ("new", 20)):
            store._command(
                "INSERT INTO event_facts (run_id, seq, at, type, body) "
                f"SELECT '{run_id}', 1, now64(3) - INTERVAL {age_days} DAY, 'RunStarted', '{{}}'"
            )
        for table in TABLES:
            store._command(f"OPTIMIZE TABLE {table} FINAL")
        assert store.rows("SELECT run_id FROM events") == store.rows("SELECT run_id FROM runs") == [("new",)]
    finally:
        store.close()


@pytest.mark.feature("O1")
def test_what_an_earlier_version_stored_is_believed_to_be_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = migrations()
    before = next(number for number, migration in enumerate(everything) if migration.name == "whole")
    monkeypatch.setattr(module, "migrations", lambda: everything[:before])
    store = open_store(tmp_path)
    store._command("INSERT INTO freshness_facts VALUES ('run-events', 3, 40, 50, NULL, 1)")
    store.close()
    monkeypatch.undo()

    store = open_store(tmp_path)
    try:
        assert store.rows("SELECT `partition`, lag, whole_to, missing FROM freshness") == [(3, 10, 40, 0)]
        row = ("run-events", 3, 60, 60, None, 2, 0)
        assert store.insert({FRESHNESS: [row]}, {AT: Reach(40, 0)}) == {AT: 60}
        assert store.rows("SELECT whole_to, missing FROM freshness") == [(60, 0)]
        for number, (tells, is_shown) in enumerate([(None, None), (7, 7), (None, 7), (9, 9)]):
            store.insert({FRESHNESS: [("run-events", 3, 60, 60, tells, 3 + number, 0)]})
            shown = store.rows("SELECT toUnixTimestamp64Milli(last_event_at) FROM freshness")
            assert shown == [(is_shown,)], "who has just begun to read knows of no event, and makes none forgotten"
    finally:
        store.close()


def whole_and_missing(store: Store, next_offset: int, since: int = 0, log_start: int = 0) -> list[tuple[int, int]]:
    """Write that a reader who has all since an offset is at another one; return up to where tables are whole and what they lack."""
    row = ("run-events", 3, next_offset, next_offset, None, next_offset, 0)
    assert store.insert({FRESHNESS: [row]}, {AT: Reach(since, log_start)}).keys() == {AT}
    return store.rows("SELECT whole_to, missing FROM freshness")


@pytest.mark.feature("O1")
def test_a_gap_stays_until_somebody_has_filled_it_and_closes_from_both_sides(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    try:
        assert whole_and_missing(store, 10) == [(10, 0)]
        assert whole_and_missing(store, 30, since=20) == [(10, 20)]
        assert whole_and_missing(store, 40, since=20) == [(10, 30)]
        store.note_whole({AT: 35})
        assert store.rows("SELECT whole_to, missing FROM freshness") == [(35, 5)]
        found = whole_and_missing(store, 41, since=20)
        assert found == [(41, 0)], "we have all since 20, somebody else what is before 35"
        assert whole_and_missing(store, 60, since=50, log_start=45) == [(45, 15)]
        found = whole_and_missing(store, 70, since=50, log_start=50)
        assert found == [(70, 0)], "what is in no log any more is not missing"
    finally:
        store.close()


BACKUP = "CREATE TABLE backup ENGINE = MergeTree ORDER BY tuple() AS SELECT * FROM freshness_facts"
LOSSES = {
    "emptied": ([], ["TRUNCATE TABLE freshness_facts"], 0),
    "restored from a backup": (
        [BACKUP],
        ["TRUNCATE TABLE freshness_facts", "INSERT INTO freshness_facts SELECT * FROM backup"],
        10,
    ),
}


@pytest.mark.feature("O1")
@pytest.mark.parametrize(("before", "lost", "whole_to"), LOSSES.values(), ids=LOSSES)
def test_tables_that_lose_rows_under_a_running_projection_lack_them_until_a_replay(
    tmp_path: Path, before: list[str], lost: list[str], whole_to: int
) -> None:
    store = open_store(tmp_path)
    try:
        assert whole_and_missing(store, 10) == [(10, 0)]
        for statement in before:
            store.command(statement)
        assert whole_and_missing(store, 20) == [(20, 0)]
        for statement in lost:
            store.command(statement)
        assert whole_and_missing(store, 31) == [(whole_to, 31 - whole_to)]
        assert whole_and_missing(store, 32) == [(whole_to, 32 - whole_to)]
        store.close()
        store = open_store(tmp_path)
        assert whole_and_missing(store, 33, since=32) == [(whole_to, 33 - whole_to)], "a restart does not make it whole"
        store.note_whole({AT: 33})
        assert whole_and_missing(store, 34, since=32) == [(34, 0)]
    finally:
        store.close()


@pytest.mark.feature("O1")
def test_a_row_that_hides_ours_because_its_writer_s_clock_is_ahead_is_no_loss(tmp_path: Path) -> None:
    at = TopicPartition("run-events", 3)
    store = open_store(tmp_path)
    try:
        store.command("INSERT INTO freshness_facts VALUES ('run-events', 3, 10, 10, NULL, 9000, 10)")
        for next_offset in (20, 30):
            row = ("run-events", 3, next_offset, next_offset, None, next_offset, 0)
            assert store.insert({FRESHNESS: [row]}, {at: Reach(5, 0)}) == {at: next_offset}
            assert store.rows("SELECT next_offset FROM freshness") == [(next_offset,)], "who wrote last is shown"
    finally:
        store.close()
