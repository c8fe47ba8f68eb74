"""The tables, as numbered SQL files that are applied in order, once each, and never changed after a release."""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import NamedTuple


class Migration(NamedTuple):
    """A file of SQL statements; each statement can be applied again after a crash in the middle of the file."""

    version: int
    name: str
    statements: tuple[str, ...]
    checksum: str
    text: str


class MigrationError(RuntimeError):
    """The files and what the database says was applied do not fit together."""


def migrations() -> list[Migration]:
    """Return all migrations in order. Raises MigrationError if their numbers are not 1, 2, 3, …"""
    found = []
    for file in resources.files(__package__).iterdir():
        if not file.name.endswith(".sql"):
            continue
        text = file.read_text(encoding="utf-8")
        number, _, name = file.name.removesuffix(".sql").partition("_")
        found.append(Migration(int(number), name, _statements(text), hashlib.sha256(text.encode()).hexdigest(), text))
    found.sort()
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise MigrationError(f"migrations must be numbered from 1 without gaps: {[m.version for m in found]}")
    return found


def _statements(text: str) -> tuple[str, ...]:
    """Split at semicolons that end a line, after leaving out lines that are comments."""
    code = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("--"))
    return tuple(part.strip().rstrip(";") for part in code.split(";\n") if part.strip())


def pending(applied: dict[int, str]) -> list[Migration]:
    """Return what is still to be applied; `applied` maps version to checksum. Raises MigrationError on a contradiction."""
    known = {migration.version: migration for migration in migrations()}
    unknown = sorted(set(applied) - set(known))
    if unknown:
        raise MigrationError(
            f"the database has migration {unknown[-1]}, which this version does not know: a newer projection was here. "
            "Run that version, or give this one a database of its own (TIDEGATE_CLICKHOUSE_DATABASE) and group."
        )
    for version, checksum in applied.items():
        if known[version].checksum != checksum:
            raise MigrationError(
                f"migration {version} ({known[version].name}) was applied with other content than this version ships: "
                "a released migration must not change. Rebuild into a new database."
            )
    return [migration for version, migration in sorted(known.items()) if version not in applied]
