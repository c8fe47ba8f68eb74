"""The benchmark does its works and prints its figures. Nothing here is about how large they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.projection.dashboards.boards import BOARDS

LIMIT_S = 300.0
COMMON = {"work", "load_before", "processes", "target", "met"}
KEYS = {
    "W4": {"killed", "runs", "repeats", "recovery_s", "recovery_median_s", "undisturbed_s", "log_records"},
    "W1": {
        "runs",
        "steps",
        "seconds",
        "steps_per_s",
        "p50_ms",
        "p99_ms",
        "projection_lag_records",
        "projection_caught_up_s",
    },
    "W2": {"runs", "p50_ms", "p99_ms"},
    "W5": {"killed", "live_runs", "repeats", "ready_s", "ready_median_s", "log_records"},
    "W7": {
        "runs",
        "scheduler_before_mib",
        "scheduler_asleep_mib",
        "scheduler_restored_mib",
        "ready_s",
        "late_p50_ms",
        "late_p99_ms",
        "late_max_ms",
        "early",
    },
    "MEM": {"runs", "portion", "seconds", "resident_mib", "growth_mib"},
    "W6": {"events", "identical_count", "seconds", "seconds_with_start", "events_per_s"},
}


def test_small_works_print_a_json_line_per_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures.jsonl"
    words = ["bench", "--works", "W4,W1,W2,W6,W5,W7,MEM", "--runs", "20", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", *words], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["work"] for figure in figures] == ["W4", "W4", "W4", "W1", "W2", "W6", "W5", "W5", "W7", "MEM"]
    assert [figure["killed"] for figure in figures[:3]] == ["executor", "scheduler", "gate"]
    for figure in figures:
        assert set(figure) == COMMON | KEYS[figure["work"]]
        assert all(cost["cpu_s"] >= 0 and cost["peak_rss_mib"] > 0 for cost in figure["processes"].values())
    assert figures[5]["identical_count"]
    assert figures[8]["early"] == 0
    assert [figure["live_runs"] for figure in figures[6:8]] == [20, 20]
    assert {"kafka", "scheduler", "gate", "executor", "projection", "bench"} <= set(figures[3]["processes"])
    assert out.read_text(encoding="utf-8").splitlines() == done.stdout.splitlines()
    assert "processor seconds" in done.stderr


@pytest.mark.feature("O1")
def test_a_dataset_is_made_by_real_runs_and_rebuilt_with_all_panels_timed(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    words = [sys.executable, "-m", "tidegate.bench.dataset", str(folder), "--runs", "150"]
    killed = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert killed.stderr is not None
    for line in killed.stderr:
        if line.startswith("dataset: "):  # it has asked for runs, and written down how far it is
            break
    killed.kill()
    killed.communicate(timeout=LIMIT_S)
    other = _run("-m", "tidegate.bench.dataset", str(folder), "--runs", "151")
    assert (other.returncode, "was begun with --runs 150" in other.stderr) == (2, True)
    made = _run(*words[1:])
    assert made.returncode == 0, made.stderr
    note = json.loads(made.stdout)
    assert {path.name for path in folder.iterdir()} == {"kafka", "dataset.json"}
    assert note["events"] > 150 * 10
    again = _run(*words[1:])
    assert (again.returncode, "is not empty" in again.stderr) == (2, True)

    done = _run("-m", "tidegate.cli", "bench", "--works", "W6", "--dataset", str(folder))
    assert done.returncode == 0, done.stderr
    figure = json.loads(done.stdout)
    assert set(figure) == COMMON | KEYS["W6"] | {"events_per_cpu_s", "panels_ms", "slowest_panel"}
    assert (figure["events"], figure["identical_count"]) == (note["events"], True)
    assert len(figure["panels_ms"]) == sum(len(board.all_panels) for board in BOARDS)
    assert figure["slowest_panel"] in done.stderr


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT_S, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ("--works", "W9"),
        ("--works", ""),
        ("--runs", "0"),
        ("--dataset", "x"),
        ("--works", "W6", "--dataset", "/nowhere"),
    ],
)
def test_wrong_usage_starts_nothing(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", "bench", *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert "Kafka" not in done.stderr
