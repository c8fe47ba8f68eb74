"""`python -m simulation`: run seeds, say what came of them, and how to have a failing one again."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter

from simulation.day import Day, simulate
from simulation.mutants import MUTANTS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 if nothing was found, 1 if something was."""
    options = _options(arguments)
    deadline_s = time.monotonic() + 60 * options.minutes
    total: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for count in itertools.count(1):
        day = simulate(options.seed + count - 1, options.steps, options.mutant)
        if day.violation:
            print(day.report(), file=sys.stderr)
            return 1
        total.update(day.counts)
        faults.update(day.faults)
        is_last = count >= options.seeds and time.monotonic() >= deadline_s
        if options.verbose or is_last or count % 10 == 0:
            print(_line(day, count, total), flush=True)
        if is_last:
            break
    print("faults: " + ", ".join(f"{number} {name}" for name, number in faults.most_common()))
    return 0


def _line(day: Day, count: int, total: Counter[str]) -> str:
    numbers = ", ".join(f"{number} {name}" for name, number in total.items())
    return f"seed {day.seed} ok ({day.cpu_s:.1f} s, trace {day.digest[:12]}); {count} seeds so far: {numbers}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default 1)")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, one after another (default 1)")
    parser.add_argument(
        "--steps", type=int, default=4_000, help="steps per seed before everything comes to rest (default 4000)"
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with new seeds for so long")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), default="", help="take this rule out of the code first")
    parser.add_argument("--verbose", action="store_true", help="a line for every seed, not for every tenth")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
