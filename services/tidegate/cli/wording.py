"""How numbers are said."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return the number with its noun: `1 rule`, `2 rules`. many: the plural, if it is not `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
