"""Seeds of the simulation in which nothing may be found, and what makes a found one worth something: it can be had again."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tidegate
from simulation.__main__ import main
from simulation.day import Day, simulate

SEEDS = range(1, 41)
STEPS = 6_000
PACKAGE = Path(tidegate.__file__).parent
# Passed only by real threads, an event loop or ClickHouse; tests/integration/test_failpoints.py and test_replay.py kill there.
NOT_SIMULATED = re.compile(r"^((gateway|replay|replay-offsets)\..*|executor\.before-close)$")


@functools.cache
def day_of(seed: int) -> Day:
    return simulate(seed, STEPS)


@pytest.mark.feature("D1")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong_the_invariants_hold(seed: int) -> None:
    day = day_of(seed)
    assert not day.violation, day.report()


def test_there_was_work_and_trouble() -> None:
    """The seeds are worth something only if much went on while much went wrong."""
    total = sum((day_of(seed).counts for seed in SEEDS), Counter())
    assert total["functions entered under faults"] > 500
    assert total["void entries"] > 10
    assert total["attempts lost"] > 100
    assert total["runs over"] > 500
    assert total["waits ended"] > 200
    assert total["attempts held back"] > 200
    assert total["outside calls ended"] > 5
    assert all(total[f"unknown outcomes: {how}"] > 20 for how in ("lost", "timed_out", "died"))
    assert total["failures under a rule"] > 50
    assert total["turns of flows"] > 200
    assert total["step called by flows"] > 200
    others = ("agent", "tool", "workflow", "sleep", "wait_until", "wait_event", "ask")
    assert sum(total[f"{kind} called by flows"] for kind in others) > 20
    assert total["flows ended"] > 50
    assert total["routes taken"] > 20
    assert total["loops entered"] > 10
    assert total["paused by budgets"] > 50
    assert total["budgets exceeded"] > 10
    assert total["questions expired"] > 50
    assert total["changes accepted"] > 40
    assert total["changes rejected"] > 100
    assert total["changes in conflict"] > 3


def test_processes_died_at_every_failpoint() -> None:
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    known = {name for text in sources for name in re.findall(r'failpoint\("([a-z.-]+)"\)', text)}
    died = {name for seed in SEEDS for name in day_of(seed).crashes}
    assert {name for name in known - died if not NOT_SIMULATED.match(name)} == set()


def test_a_seed_is_the_same_day_in_every_process() -> None:
    """Neither the order of sets nor a clock nor an address decides anything."""
    code = "from simulation.day import simulate; print(simulate(3, 2_000).digest)"
    digests = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1
    assert simulate(4, 2_000).digest not in digests


def test_a_failing_seed_says_how_to_have_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "6", "--seeds", "24", "--steps", "1500", "--mutant", "once"]) == 1
    told = capsys.readouterr().err
    again = re.search(r"--seed \d+ --steps 1500 --mutant once", told)
    assert again is not None, told
    assert main(again[0].split()) == 1
    assert capsys.readouterr().err == told
    assert re.search(r"repeats \w+, attempt \d+ of which may have had its effect", told), told


def test_the_command_goes_on_for_as_long_as_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "5", "--seeds", "2", "--steps", "200", "--verbose"]) == 0
    assert "2 seeds" in capsys.readouterr().out
