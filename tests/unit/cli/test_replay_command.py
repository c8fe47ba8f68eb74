"""`tidegate replay projection`: what it says of how a replay ended. Done for real in tests/integration/test_replay.py."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.cli import replay

COMPARED = {"rows_in_place": 4, "rows_rebuilt": 4, "equal": True}


@pytest.mark.feature("L4")
@pytest.mark.parametrize(("check", "what"), [(True, "1 table compared"), (False, "2 tables replaced")])
def test_a_table_that_is_not_compared_is_not_counted_as_equal(
    check: bool, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: dict[str, Any] = {
        "phase": "done",
        "request": {"check": check},
        "tables": ["run_state", "instance_facts"],
        "comparisons": [{"table": "run_state", **COMPARED}],
        "records_done": 7,
    }
    monkeypatch.setattr(replay, "_watch", lambda: ended)
    shown = CliRunner().invoke(replay.app, ["projection", "--follow"])
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.stdout.splitlines()]
    assert lines == [
        "run_state 4 rows, rebuilt 4 equal",
        "instance_facts not compared: it changes with every heartbeat",
        f"{what}, 7 records read",
    ]
