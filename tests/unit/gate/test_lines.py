"""Lines of those that wait: in what order they are left, and how far a round of placing looks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.pure import Pair
from tidegate.domain.messages import Call, Lease
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import Desk, Limit, LimitSet
from tidegate.gate.state import QUEUED, Ask, Attempt, AttemptKey, Line
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


def stand(ledger: Ledger, account: str, turn: int, queue: str, needs: tuple[Lease, ...] = ()) -> None:
    """Have an attempt of a run `r<turn>` wait."""
    key = AttemptKey(f"r{turn}", "s", 1)
    call = Call(kind="tool", function="f", queue=queue, arguments="1", timeout_ms=1, reserve_micros=0, idempotent=True)
    attempt = ledger.attempts[key] = Attempt(account, call, QUEUED, turn=turn, leases=needs)
    lines: dict[Any, Line] = ledger.limited.setdefault(attempt.line, {}) if needs else ledger.waiting
    lines.setdefault(needs or attempt.line, Line()).add(account, key, turn)
    ledger.waiting_count += 1


@pytest.mark.parametrize(("slots", "placed"), [(1, ["r0"]), (3, ["r0", "r1", "r2"]), (9, [f"r{n}" for n in range(5)])])
def test_a_round_looks_at_nobody_behind_the_one_that_takes_the_last_slot(slots: int, placed: list[str]) -> None:
    ledger = Ledger(0)
    for turn in range(5):
        stand(ledger, "acme", turn, "default")
    attempts: Any = Noted(ledger.attempts)
    ledger.attempts = attempts
    events = place_waiting(ledger, Pair(slots=slots, functions=("tool:f",)).executors.free_slots({}))
    assert [event.run_id for event in events] == placed
    assert attempts.looked_at == placed


@pytest.mark.parametrize("slotless", ["nobody", "outside", "asks"])
def test_a_round_ends_with_the_last_slot_also_where_those_without_one_stand_at_a_full_limit(slotless: str) -> None:
    """What nobody can go on from in this round keeps it from nothing."""
    people = Lease(0, "people", "")
    ledger = Ledger(0)
    ledger.held[people] = 1
    for turn in range(5):
        stand(ledger, f"root{turn}", turn, "default")
    if slotless == "outside":
        stand(ledger, "acme", 9, "", (people,))
    elif slotless == "asks":
        ledger.asks[AttemptKey("r9", "s", 1)] = ask = Ask("acme/x", 1, 5, (people,), 0, 9)
        ledger.ask_lines[people,] = line = Line()
        line.add("acme", AttemptKey("r9", "s", 1), ask.turn, ask.rank, ask.priority)
    attempts: Any = Noted(ledger.attempts)
    ledger.attempts = attempts
    limit = Limit(kind="limit", version="1", limit="people", at_once=1)
    slots = Pair(slots=1, functions=("tool:f",)).executors.free_slots({})
    events = place_waiting(ledger, slots, set(), Desk(ledger, LimitSet([limit]), 0))
    assert [event.run_id for event in events] == ["r0"]
    assert attempts.looked_at == ["r0"]
