"""Conventions that a review would repeat, as checks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "services" / "tidegate"
SOURCES = sorted(PACKAGE.rglob("*.py"))
VAGUE = {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}
PURE = [
    *sorted((PACKAGE / "domain").glob("*.py")),
    *(PACKAGE / "scheduler" / name for name in ("decide.py", "admit.py", "tells.py")),
    *(PACKAGE / "gate" / name for name in ("decide.py", "ledger.py", "policy.py", "tells.py")),
    PACKAGE / "projection" / "rows.py",
]
IMPURE = re.compile(r"\b(datetime\.now|time\.time|monotonic|uuid4|random\.|os\.environ|open\()")
MAX_FUNCTION_LINES = 70


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [str(path) for path in SOURCES if path.stem in VAGUE or path.parent.name in VAGUE] == []


@pytest.mark.parametrize("room", ["scheduler", "gate", "executor", "projection", "gateway"])
def test_every_service_is_the_same_kind_of_room(room: str) -> None:
    missing = [
        name
        for name in ("README.md", "__main__.py", "settings.py", "service.py")
        if not (PACKAGE / room / name).exists()
    ]
    assert missing == []


@pytest.mark.feature("L1")
@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_pure_modules_ask_no_clock_and_no_chance(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if IMPURE.search(line)] == []


def test_a_function_fits_a_screen() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if path.read_text(encoding="utf-8").strip()
        and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert silent == []


def test_nothing_waits_to_be_finished() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


def test_the_tests_that_the_guarantees_name_exist() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/guarantees.md").read_text()))
    assert named
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
