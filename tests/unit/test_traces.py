"""Lines that functions of tests leave are read whole or not at all: the checks after a kill -9 rest on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fault_app import leave, left


@pytest.mark.parametrize("kept", range(1, 20))
def test_a_line_that_a_killed_process_left_torn_spoils_no_other(tmp_path: Path, kept: int) -> None:
    """The kernel looks for a deadly signal between two pages of one write: this is the file that it leaves then."""
    path = tmp_path / "entered.log"
    leave(path, "run-1", "first", 1)
    whole = path.stat().st_size
    leave(path, "run-2", "second", 2)
    with path.open("r+b") as file:
        file.truncate(whole + min(kept, path.stat().st_size - whole - 1))
    leave(path, "run-3", "third", 3)
    assert left(path) == [["run-1", "first", "1"], ["run-3", "third", "3"]]


def test_a_file_that_nobody_wrote_has_no_lines(tmp_path: Path) -> None:
    assert left(tmp_path / "none.log") == []
