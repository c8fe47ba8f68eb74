"""Times as people write them on a command line."""

from __future__ import annotations

import pytest

from tidegate.cli.wording import moment_ms


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90m", 94_600_000),
        ("1d", 13_600_000),
        ("7d", 0),
        ("1970-01-02T00:00Z", 86_400_000),
        ("1970-01-01T01:00+01:00", 0),
    ],
)
def test_moments(text: str, found: int) -> None:
    assert moment_ms(text, 100_000.0) == found


@pytest.mark.parametrize("text", ["soon", "12", "1w", "\u0661h", "2026-13-01", "9" * 50])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        moment_ms(text, 0.0)
