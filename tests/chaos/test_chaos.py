"""`tidegate demo chaos-100`, as anybody would start it. What its checks are worth: tests/unit/demo/test_chaos_checks.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.demo.chaos.checks import CHECKS
from tidegate.demo.chaos.plan import KILL, STOP
from tidegate.demo.chaos.storm import LONG_FREEZE

SEED = 4
LIMIT_S = 600.0  # against hanging; it takes about 80 s
SERVICES = {"scheduler", "gate", "projection", "gateway", "executor"}


@pytest.mark.feature("D1")
@pytest.mark.feature("K3")
def test_a_hundred_runs_come_through_a_storm(tmp_path: Path) -> None:
    """The seed fixes who is hit when, not what it meets: a breach here is a bug, and need not come again at once."""
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", "demo", "chaos-100", "--seed", str(SEED), "--json"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    summary = json.loads(done.stdout)
    assert (summary["ok"], summary["runs"], summary["seed"]) == (True, 100, SEED)
    assert summary["breaches"] == {check: [] for check in CHECKS}
    assert sum(summary["ended"].values()) == 100
    struck = {what: services.keys() for what, services in summary["done"].items()}
    assert struck[KILL] == SERVICES | {"kafka"}
    assert struck[STOP] == SERVICES
    assert struck[LONG_FREEZE] == SERVICES
    # It was a storm: work was lost, repeated and paid for, and humans were asked.
    assert summary["attempts_failed"]
    assert summary["questions_answered"]
    assert summary["functions_entered"] > summary["payments"] > 100
    assert not list(tmp_path.glob("tidegate-chaos-100-*")), "its data was left behind"
