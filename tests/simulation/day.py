"""One simulated day: a seed, so many steps, then rest, then what must be refused. What came of it, and how to have it again."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from simulation.evening import Evening
from simulation.judge import Violation
from simulation.mutants import MUTANTS
from simulation.world import World

LAST_EVENTS = 40


@dataclass(slots=True)
class Day:
    """What came of a seed. violation: empty if nothing was wrong."""

    seed: int
    steps: int
    mutant: str
    violation: str = ""
    digest: str = ""
    last: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    def report(self) -> str:
        """Return what went wrong, the last events, and the command that has it again."""
        mutant = f" --mutant {self.mutant}" if self.mutant else ""
        return "\n".join(
            (
                f"seed {self.seed}: {self.violation}",
                f"The last {len(self.last)} events (step, milliseconds, process, what):",
                *(f"  {line}" for line in self.last),
                f"Again: PYTHONPATH=tests python -m simulation --seed {self.seed} --steps {self.steps}{mutant}",
            )
        )


def simulate(seed: int, steps: int, mutant: str = "") -> Day:
    """Simulate a day. Blocks for about a second per 3,000 steps, in this thread, and sleeps never."""
    day = Day(seed, steps, mutant)
    began_s = time.process_time()
    patch: Any = MUTANTS[mutant]() if mutant else nullcontext()
    with patch, World(seed) as world:
        try:
            world.begin()
            while world.steps < steps:
                world.step()
            day.counts["functions entered under faults"] = len(world.judge.entered_at)
            evening = Evening(world)
            evening.rest()
            evening.check_rebuild()
            evening.check_refusals()
        except Violation as violation:
            day.violation = str(violation)
        day.digest = world.digest
        day.last = list(world.last)[-LAST_EVENTS:]
        day.faults, day.crashes = world.faults, world.crashes
        day.counts.update(world.judge.counts())
    day.cpu_s = time.process_time() - began_s
    return day
