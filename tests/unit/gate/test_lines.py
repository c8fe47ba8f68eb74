"""Lines of those that wait: in what order they are left, and how far a round of placing looks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.pure import Pair
from tidegate.domain.messages import Call
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import QUEUED, Attempt, AttemptKey, Line
from tidegate.gate.waiting import place_waiting

ROOTS = ("acme", "globex", "initech")


@pytest.mark.parametrize("seed", range(20))
def test_whoever_joins_and_leaves_the_order_is_that_of_rank_and_turn(seed: int) -> None:
    """Also of those that are met late, as when a log is folded on top of snapshots."""
    rng = random.Random(seed)
    line = Line()
    standing: dict[AttemptKey, tuple[str, int, int, int]] = {}  # root, priority, rank, turn
    for number in range(300):
        if standing and rng.random() < 0.4:
            key = rng.choice(sorted(standing))
            root, priority, _, _ = standing.pop(key)
            line.remove(root, key, priority)
        else:
            key, root, priority = AttemptKey(f"run-{number}", "s", 1), rng.choice(ROOTS), rng.choice((1, 5, 9))
            turn = number if rng.random() < 0.9 else -number
            standing[key] = (root, priority, turn // 3, turn)
            line.add(root, key, turn, turn // 3, priority)
        expected = {
            root: sorted((rank, turn, key) for key, (of, _, rank, turn) in standing.items() if of == root)
            for root in {of for of, _, _, _ in standing.values()}
        }
        if number % 7 == 0:  # not after each, so that several are out of order when they are asked for
            assert dict(line.heads()) == {root: found[0] for root, found in expected.items()}
            assert {root: list(line.of(root)) for root in line.roots()} == expected


class Noted(dict[AttemptKey, Attempt]):
    """Attempts that note who was asked for."""

    def __init__(self, attempts: dict[AttemptKey, Attempt]) -> None:
        super().__init__(attempts)
        self.looked_at: list[str] = []

    def __getitem__(self, key: AttemptKey) -> Attempt:
        self.looked_at.append(key.run_id)
        return super().__getitem__(key)


@pytest.mark.parametrize(("slots", "placed"), [(1, ["r0"]), (3, ["r0", "r1", "r2"]), (9, [f"r{n}" for n in range(5)])])
def test_a_round_looks_at_nobody_behind_the_one_that_takes_the_last_slot(slots: int, placed: list[str]) -> None:
    call = Call(
        kind="step", function="f", queue="default", arguments="1", timeout_ms=1, reserve_micros=0, idempotent=True
    )
    ledger = Ledger(0)
    line = ledger.waiting["default", "f"] = Line()
    for turn in range(5):
        key = AttemptKey(f"r{turn}", "s", 1)
        ledger.attempts[key] = Attempt("acme/x", call, QUEUED, turn=turn)
        line.add("acme", key, turn)
        ledger.waiting_count += 1
    attempts: Any = Noted(ledger.attempts)
    ledger.attempts = attempts
    events = place_waiting(ledger, Pair(slots=slots, functions=("step:f",)).executors.free_slots({}))
    assert [event.run_id for event in events] == placed
    assert attempts.looked_at == placed
