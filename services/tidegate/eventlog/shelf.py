"""Where the state of units lies that need not be in memory: on disk, disposable, gone with the process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from tidegate.eventlog.interface import EventLogError

CACHE_KIB: Final = 2048


class ShelfError(EventLogError):
    """The disk failed. Nothing is lost: what lay on the shelf is in the log. The process must end and begin afresh."""


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
    SQLITE_TMPDIR, TMPDIR or /var/tmp. No call blocks but for the disk; all raise ShelfError if that fails.
    """

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None  # most partitions of most tests never need one

    def put(self, units: Sequence[Shelved], *, are_known: bool = False) -> None:
        """Put units away, each in place of what lies there under its name.

        Those that are over will be returned by `take_fresh`. are_known: they stand in a certified segment already, and will not.
        """
        if not units:
            return
        database = self._opened()
        rows = [(*unit, unit.done and not are_known) for unit in units]
        text = "INSERT OR REPLACE INTO units (unit, as_of, state, done, fresh) VALUES (?, ?, ?, ?, ?)"
        try:
            with database:  # commits, or rolls back
                database.execute("BEGIN")
                database.executemany(text, rows)
        except sqlite3.Error as error:
            raise _failure(error) from error

    def get(self, unit: str) -> Shelved | None:
        """Return what lies under the name, and leave it there."""
        if self._database is None:
            return None
        rows = self._ask("SELECT unit, as_of, state, done FROM units WHERE unit = ?", unit)
        return None if not rows else Shelved(rows[0][0], rows[0][1], rows[0][2], bool(rows[0][3]))

    def forget_resting(self, unit: str) -> None:
        """Remove a unit that goes on. One that is over stays, as it was: a segment may be about to hold it."""
        if self._database is not None:
            self._ask("DELETE FROM units WHERE unit = ? AND done = 0", unit)

    def resting(self) -> Iterator[str]:
        """Return the names of the units that are not over."""
        if self._database is None:
            return iter(())
        return (row[0] for row in self._ask("SELECT unit FROM units WHERE done = 0"))

    def take_fresh(self, most: int, most_bytes: int) -> list[Shelved]:
        """Return units that are over and that no call returned before: up to so many, and so many bytes (but at least one)."""
        if self._database is None:
            return []
        rows = self._ask("SELECT unit, as_of, state FROM units WHERE fresh = 1 ORDER BY unit LIMIT ?", most)
        taken: list[Shelved] = []
        size = 0
        for unit, as_of, state in rows:
            size += len(state)
            if taken and size > most_bytes:
                break
            taken.append(Shelved(unit, as_of, state, done=True))
        if taken:
            self._ask("UPDATE units SET fresh = 0 WHERE fresh = 1 AND unit <= ?", taken[-1].unit)
        return taken

    def close(self) -> None:
        """Throw everything away."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _opened(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        self._database = sqlite3.connect("", isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", f"cache_size = -{CACHE_KIB}"):
            self._ask(f"PRAGMA {pragma}")
        columns = "unit TEXT PRIMARY KEY, as_of INTEGER, state BLOB, done INTEGER, fresh INTEGER"
        self._ask(f"CREATE TABLE units ({columns}) WITHOUT ROWID")
        self._ask("CREATE INDEX fresh ON units (unit) WHERE fresh = 1")
        self._ask("CREATE INDEX resting ON units (unit) WHERE done = 0")
        return self._database

    def _ask(self, text: str, *values: Any) -> list[Any]:
        """Do something with the open database and return all rows. Raises ShelfError."""
        assert self._database is not None  # noqa: S101 - whoever asks has looked
        try:
            return self._database.execute(text, values).fetchall()
        except sqlite3.Error as error:
            raise _failure(error) from error


def _failure(error: sqlite3.Error) -> ShelfError:
    return ShelfError(f"the temporary file on disk failed (TMPDIR): {error}")
