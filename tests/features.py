"""Print each row of docs/features.md with the tests that show it, and the rows that no test shows."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"pytest\.mark\.feature\(([^)]*)\)")
ROW = re.compile(r"^\| ([A-Z]\d+) \| ([^|]+)\|", re.MULTILINE)
TEST = re.compile(r"^(?:async )?def (test_\w+)|^    (?:async )?def (test_\w+)", re.MULTILINE)


def tests_by_row() -> dict[str, list[str]]:
    """Return row -> tests, found by reading the marks in the sources."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        for mark in MARK.finditer(text):
            test = TEST.search(text, mark.end())
            name = (test.group(1) or test.group(2)) if test else "(module)"
            for row in re.findall(r"[A-Z]\d+", mark.group(1)):
                found[row].append(f"{path.relative_to(ROOT)}::{name}")
    return found


def main() -> int:
    """Print the table; fails if a mark names a row that does not exist."""
    rows = {row: text.strip() for row, text in ROW.findall((ROOT / "docs/features.md").read_text(encoding="utf-8"))}
    found = tests_by_row()
    for row, text in rows.items():
        sys.stdout.write(f"{row:<4} {text[:100]}\n")
        for test in sorted(set(found.get(row, []))):
            sys.stdout.write(f"       {test}\n")
        if row not in found:
            sys.stdout.write("       (no test yet)\n")
    unknown = sorted(set(found) - set(rows))
    sys.stdout.write(f"\n{len(rows) - len(set(rows) - set(found))} of {len(rows)} rows have a test\n")
    if unknown:
        sys.stderr.write(f"marks that name no row: {', '.join(unknown)}\n")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
