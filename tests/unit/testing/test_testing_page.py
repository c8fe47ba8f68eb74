"""The examples of docs/testing-workflows.md are tests themselves: each of them is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[3] / "docs/testing-workflows.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
names: dict[str, Any] = {}
exec("\n".join(BLOCKS), names)  # noqa: S102 - our own page
EXAMPLES: list[Callable[[], None]] = [value for name, value in names.items() if name.startswith("test_")]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_the_example_passes(example: Callable[[], None]) -> None:
    example()


def test_every_example_is_found() -> None:
    assert len(EXAMPLES) == PAGE.count("\ndef test_")
