"""Where the state of units lies that need not be in memory: on disk, disposable, gone with the process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Final, NamedTuple

CACHE_KIB: Final = 2048


class Shelved(NamedTuple):
    """A unit that was put away. as_of: own offset of its last entry. done: it is over; else it waits for a message or a time."""

    unit: str
    as_of: int
    state: bytes
    done: bool


class Shelf:
    """The units of one log partition that were put away, by name. Not thread-safe.

    A temporary SQLite database without a name: the operating system removes it when the process ends, however it ends. What
    is on it can be read from the snapshots or folded from the log at any time, so nothing is made durable. It lies in
    SQLITE_TMPDIR, TMPDIR or /var/tmp. No call blocks but for the disk; sqlite3.Error if that is full.
    """

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None  # most partitions of most tests never need one

    def put(self, unit: str, as_of: int, state: bytes, *, done: bool) -> None:
        """Put a unit away, in place of what lies there under its name."""
        self._open().execute(
            "INSERT OR REPLACE INTO units (unit, as_of, state, done, fresh) VALUES (?, ?, ?, ?, ?)",
            (unit, as_of, state, done, done),
        )

    def put_known(self, unit: str, as_of: int, state: bytes) -> None:
        """Put a unit away that is over and stands in a certified segment already."""
        self._open().execute(
            "INSERT OR REPLACE INTO units (unit, as_of, state, done, fresh) VALUES (?, ?, ?, 1, 0)",
            (unit, as_of, state),
        )

    def get(self, unit: str) -> Shelved | None:
        """Return what lies under the name, and leave it there."""
        if self._database is None:
            return None
        row = self._database.execute("SELECT unit, as_of, state, done FROM units WHERE unit = ?", (unit,)).fetchone()
        return None if row is None else Shelved(row[0], row[1], row[2], bool(row[3]))

    def forget_resting(self, unit: str) -> None:
        """Remove a unit that goes on. One that is over stays, as it was: a segment may be about to hold it."""
        if self._database is not None:
            self._database.execute("DELETE FROM units WHERE unit = ? AND done = 0", (unit,))

    def resting(self) -> Iterator[str]:
        """Return the names of the units that are not over."""
        if self._database is None:
            return iter(())
        return (row[0] for row in self._database.execute("SELECT unit FROM units WHERE done = 0").fetchall())

    def take_fresh(self, most: int, most_bytes: int) -> list[Shelved]:
        """Return units that are over and that no call returned before: up to so many, and so many bytes (but at least one)."""
        if self._database is None:
            return []
        rows = self._database.execute(
            "SELECT unit, as_of, state FROM units WHERE fresh = 1 LIMIT ?", (most,)
        ).fetchall()
        taken: list[Shelved] = []
        size = 0
        for unit, as_of, state in rows:
            size += len(state)
            if taken and size > most_bytes:
                break
            taken.append(Shelved(unit, as_of, state, done=True))
        self._database.executemany("UPDATE units SET fresh = 0 WHERE unit = ?", [(item.unit,) for item in taken])
        return taken

    def count(self) -> int:
        """Return how many units lie here."""
        if self._database is None:
            return 0
        return int(self._database.execute("SELECT count(*) FROM units").fetchone()[0])

    def close(self) -> None:
        """Throw everything away."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect("", isolation_level=None)
            for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.execute(
                "CREATE TABLE units (unit TEXT PRIMARY KEY, as_of INTEGER, state BLOB, done INTEGER, fresh INTEGER) WITHOUT ROWID"
            )
            self._database.execute("CREATE INDEX fresh ON units (unit) WHERE fresh = 1")
            self._database.execute("CREATE INDEX resting ON units (unit) WHERE done = 0")
        return self._database
