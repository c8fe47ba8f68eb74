"""`make bench-compare BASE=ref`: the benchmark of another commit and of this tree, turn by turn on the same machine.

Absolute figures of a shared machine say little; the ratio of two that were taken in turns says more. The other commit is
checked out beside this tree (git worktree) and run with this environment's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What is compared of each work, and whether more is better.
FIGURES = {
    "W1": (("steps_per_s", True), ("p50_ms", False), ("cpu_ms_per_step", False)),
    "W2": (("p50_ms", False), ("p99_ms", False), ("cpu_s", False)),
    "W3": (("seconds", False), ("cpu_s", False)),
    "W4": (("recovery_median_s", False), ("cpu_s", False)),
    "W5": (("ready_median_s", False), ("cpu_s", False)),
    "W6": (("events_per_s", True), ("cpu_s", False)),
}
Values = dict[tuple[str, str], list[float]]


def main() -> int:
    """Run both sides in turns and print a table; exit code 1 if a side cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="the commit to compare with, say HEAD~3 or main")
    parser.add_argument("--works", default="W1,W2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, help="runs per work, instead of the standard sizes")
    words = parser.parse_args()
    if not words.base:
        parser.error("which commit? make bench-compare BASE=ref")
    with tempfile.TemporaryDirectory(prefix="tidegate-compare-") as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", str(base), words.base], cwd=ROOT, check=True)
        try:
            sides: dict[str, tuple[Path, Values]] = {
                "base": (base, defaultdict(list)),
                "this": (ROOT, defaultdict(list)),
            }
            for number in range(words.rounds):
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]  # neither is always the first
                for name in order:
                    tree, values = sides[name]
                    print(f"round {number + 1} of {words.rounds}: {name}", flush=True)
                    _measure(tree, words.works, words.runs, values)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)
        _print(sides["base"][1], sides["this"][1])
    return 0


def _measure(tree: Path, works: str, runs: int | None, values: Values) -> None:
    """Run the benchmark of a tree and add its figures. Raises CalledProcessError."""
    size = ["--runs", str(runs)] if runs else []
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", "bench", "--works", works, *size],
        env={**os.environ, "PYTHONPATH": str(tree / "services")},
        cwd=tree,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        figure = json.loads(line)
        work = figure["work"]
        figure["cpu_s"] = sum(cost["cpu_s"] for cost in figure["processes"].values())
        if work == "W1":
            figure["cpu_ms_per_step"] = 1000 * figure["cpu_s"] / figure["steps"]
        part = figure.get("killed") or (figure["runs"] if work == "W1" else "")
        for name, _ in FIGURES.get(work, ()):
            values[f"{work} {part}".strip(), name].append(float(figure[name]))


def _print(base: Values, this: Values) -> None:
    print(f"\n{'work':<18}{'figure':<20}{'base':>12}{'this':>12}{'this/base':>12}   spread of base")
    for work, name in this:
        if (work, name) not in base:
            continue
        ours, theirs = this[work, name], base[work, name]
        more_is_better = dict(FIGURES[work.split(" ", maxsplit=1)[0]])[name]
        ratio = statistics.median(ours) / statistics.median(theirs)
        word = "" if abs(ratio - 1) < 0.05 else "better" if (ratio > 1) == more_is_better else "WORSE"
        spread = f"{min(theirs):,.2f} to {max(theirs):,.2f}"
        print(
            f"{work:<18}{name:<20}{statistics.median(theirs):>12,.2f}{statistics.median(ours):>12,.2f}{ratio:>11.2f}x"
            f"   {spread:<24}{word}"
        )


if __name__ == "__main__":
    sys.exit(main())
