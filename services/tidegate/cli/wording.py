"""How numbers are said."""

from __future__ import annotations

import datetime
import re

from rich.table import Table


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return the number with its noun: `1 rule`, `2 rules`. many: the plural, if it is not `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def moment_ms(text: str, now_s: float) -> int:
    """Return a time as Unix milliseconds: ISO 8601 (local time unless it says otherwise), or `90m`, `12h`, `7d` for ago.

    Raises ValueError.
    """
    ago = re.fullmatch(r"(\d{1,6})([smhd])", text, re.ASCII)
    if ago:
        seconds = int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[ago[2]]
        return max(0, int((now_s - seconds) * 1000))
    try:
        return max(0, int(datetime.datetime.fromisoformat(text).timestamp() * 1000))
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is no time: 2026-01-31T12:00Z, say, or 12h for twelve hours ago") from None


def plain_table(*columns: str) -> Table:
    """Return an empty table as all lists have it: no lines, and nothing cut off but wrapped."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
