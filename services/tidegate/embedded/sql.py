"""Asks the projection of a stack: rows, and how far it is."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from tidegate.domain import canonical
from tidegate.eventlog.interface import Broker

LOGS: Final = ("run-events", "gate-ledger")
ANSWER_TIMEOUT_S: Final = 60.0
ASK_EVERY_S: Final = 0.1
POSITIONS: Final = "SELECT topic, `partition`, next_offset FROM freshness WHERE topic IN ('run-events', 'gate-ledger')"


def query(data_dir: Path, text: str) -> list[dict[str, Any]]:
    """Ask the SQL endpoint of the projection whose data is there. Blocks. Raises OSError if it does not answer (yet)."""
    address = canonical.loads((data_dir / "sql.json").read_text(encoding="utf-8"))
    url = f"{address['url'].rstrip('/')}/?{urlencode({'query': text, 'default_format': 'JSONEachRow'})}"
    with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer:  # noqa: S310 - the address is our own file's
        return [canonical.loads(line) for line in answer.read().decode().splitlines() if line]


def log_ends(broker: Broker) -> dict[tuple[str, int], int]:
    """Return the present end of each partition of the two logs that holds anything."""
    counts = broker.describe(LOGS)
    places = [(topic, p) for topic in LOGS for p in range(counts[topic].partition_count)]
    return {place: end for place in places if (end := broker.offsets(*place).end) > 0}


def lag(data_dir: Path, ends: dict[tuple[str, int], int]) -> int:
    """Return how many records below these ends are not in ClickHouse. Raises OSError."""
    positions = {(row["topic"], int(row["partition"])): int(row["next_offset"]) for row in query(data_dir, POSITIONS)}
    return sum(max(0, end - positions.get(place, 0)) for place, end in ends.items())


def wait_caught_up(data_dir: Path, ends: dict[tuple[str, int], int], timeout_s: float) -> float:
    """Block until everything below these ends is in ClickHouse; return when that was seen. Raises TimeoutError.

    Positions are written after the rows that they count, so all tables are complete then, not only the first one.
    """
    deadline_s = time.monotonic() + timeout_s
    left = -1
    while time.monotonic() < deadline_s:
        try:
            left = lag(data_dir, ends)
        except OSError:
            left = -1  # not up yet
        if left == 0:
            return time.monotonic()
        time.sleep(ASK_EVERY_S)
    raise TimeoutError(f"the projection did not catch up within {timeout_s:.0f} s, records behind: {left}")
