"""Migrations: numbered, applied once, never changed."""

import pytest

from tidegate.projection.migrations import MigrationError, migrations, pending


def test_they_are_numbered_from_one_without_gaps_and_named() -> None:
    found = migrations()

    assert [migration.version for migration in found] == list(range(1, len(found) + 1))
    assert all(migration.name and migration.statements for migration in found)


def test_every_statement_can_be_applied_again_after_a_crash_in_the_middle() -> None:
    for migration in migrations():
        for statement in migration.statements:
            assert statement.startswith("CREATE"), statement
            assert "IF NOT EXISTS" in statement.splitlines()[0], statement


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
