"""The simulation can fail: without any one of the rules it finds something, with all of them it does not."""

from __future__ import annotations

import pytest

from simulation.day import simulate
from simulation.mutants import MUTANTS

SEEDS = range(1, 61)  # most need one; a lost lease that a hole hides shows in one of fifteen
CONTROL = range(1, 13)
STEPS = 4_000


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_without_the_rule_it_is_found(mutant: str) -> None:
    for seed in SEEDS:
        day = simulate(seed, STEPS, mutant)
        if day.violation:
            return
    pytest.fail(f"{len(SEEDS)} seeds show no difference without {mutant!r}")


@pytest.mark.timeout(300)
def test_with_all_rules_the_same_seeds_find_nothing() -> None:
    for seed in CONTROL:
        day = simulate(seed, STEPS)
        assert not day.violation, day.report()
