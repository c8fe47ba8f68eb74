"""Pages of docs/ whose Python blocks hold tests of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def examples_of(page: str) -> list[Callable[[], None]]:
    """Run the Python blocks of a page as one module; return its test functions. There must be some, and none may hide another."""
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), page, "exec"), names)  # noqa: S102 - a page of this repository
    found = [value for name, value in names.items() if name.startswith("test_")]
    assert len(found) == text.count("\ndef test_") > 0
    return found
