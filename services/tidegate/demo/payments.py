"""The outside world of the refund demo: a payment provider's ledger, durable and apart from Tidegate (a SQLite file)."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS refunds (idempotency_key TEXT PRIMARY KEY, order_id TEXT, amount_cents INTEGER, at REAL);
CREATE TABLE IF NOT EXISTS calls (order_id TEXT, idempotency_key TEXT, at REAL);
"""


class Payments:
    """Refunds by idempotency key: a key that is known pays nothing again. Every call is noted, every refund is synced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as db, db:
            db.executescript(_SCHEMA)

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=10.0)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        return db

    def refund(self, order_id: str, amount_cents: int, idempotency_key: str) -> bool:
        """Refund once per key; returns whether money moved this time. Durable when it returns."""
        with closing(self._open()) as db, db:
            db.execute("INSERT INTO calls VALUES (?, ?, ?)", (order_id, idempotency_key, time.time()))
            done = db.execute(
                "INSERT OR IGNORE INTO refunds VALUES (?, ?, ?, ?)",
                (idempotency_key, order_id, amount_cents, time.time()),
            )
            return done.rowcount == 1

    def refunds(self, order_id: str) -> int:
        """Return how often the order was really refunded."""
        with closing(self._open()) as db:
            return int(db.execute("SELECT count(*) FROM refunds WHERE order_id = ?", (order_id,)).fetchone()[0])

    def calls(self, order_id: str) -> int:
        """Return how often somebody asked for a refund of the order."""
        with closing(self._open()) as db:
            return int(db.execute("SELECT count(*) FROM calls WHERE order_id = ?", (order_id,)).fetchone()[0])
