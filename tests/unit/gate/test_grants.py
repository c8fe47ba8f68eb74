"""A grant is a reservation and a placement: it changes what the two change, and nothing else."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from support.pure import Pair, chain, step
from tidegate.domain import ledger_events as ev
from tidegate.gate.fold import apply
from tidegate.gate.ledger import Ledger
from tidegate.gate.snapshots import dump, units_of, units_of_event

DERIVED = ("held_by", "busy", "held", "waiting", "limited", "lacking", "questions", "depth", "of_run", "below")
DOCUMENTS: tuple[dict[str, Any], ...] = (
    {
        "policy": "p",
        "version": "1",
        "rules": [
            {"name": "ask", "when": "step == 'asks'", "then": "require_approval", "redact": ["x"]},
            {"name": "alone", "when": "step == 'a'", "then": "allow", "isolation": "job"},
        ],
    },
    {"kind": "budget", "version": "1", "budget": "org", "limits": {"money_micros": 200}, "on_exceed": "pause"},
    {"kind": "budget", "version": "1", "budget": "each", "window": "run", "limits": {"calls": 1}, "on_exceed": "ask"},
    {"kind": "limit", "version": "1", "limit": "root", "per": ["account"], "account_level": 1, "at_once": 9},
)


def halves(event: ev.AttemptGranted) -> tuple[ev.AttemptReserved, ev.AttemptPlaced]:
    """Return the two events that say the same, as a gate that knows no grants wrote them."""
    fields = msgspec.structs.asdict(event)
    reserved, placed = (
        {name: value for name, value in fields.items() if name in kind.__struct_fields__}
        for kind in (ev.AttemptReserved, ev.AttemptPlaced)
    )
    return ev.AttemptReserved(**reserved, counts=bool(event.buckets)), ev.AttemptPlaced(**placed)


def folded(pair: Pair, *, in_halves: bool) -> Ledger:
    ledger = Ledger(0)
    for seq, event in enumerate(pair.ledger_events, 1):
        parts = halves(event) if in_halves and isinstance(event, ev.AttemptGranted) else (event,)
        for part in parts:
            apply(ledger, part, seq, 1_000)
    return ledger


def states(ledger: Ledger) -> Iterator[tuple[str, Any]]:
    for unit in units_of(ledger):
        yield unit, dump(ledger, unit)
    for name in DERIVED:
        yield name, getattr(ledger, name)


def days() -> Iterator[Pair]:
    """Yield systems with attempts that are granted: at once, after a question, beyond a budget, after a pause."""
    pair = Pair(slots=2, functions=("step:a", "step:asks"))
    for document in DOCUMENTS:
        pair.policy(document)
    pair.start("at-once", chain("a", a=step(reserve_micros=150)))
    pair.start("asked", chain("asks", "a", asks=step(reserve_micros=10), a=step(reserve_micros=5)))
    yield pair
    pair.command("asked", "approve", by="ann")
    pair.start("paused", chain("a", a=step(reserve_micros=60)))
    yield pair
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=100)
    pair.pass_time_with_heartbeats(1_000)
    yield pair
    pair.answer(pair.tasks.popleft(), value=1, actual_micros=10)
    pair.command("asked", "approve", by="bob")
    yield pair


@pytest.mark.feature("P2", "P6")
def test_a_grant_changes_what_a_reservation_and_a_placement_change() -> None:
    granted: dict[str, ev.AttemptGranted] = {}
    for pair in days():
        assert dict(states(folded(pair, in_halves=False))) == dict(states(folded(pair, in_halves=True)))
        granted |= {f"{e.run_id} {e.step_id}": e for e in pair.ledger_events if isinstance(e, ev.AttemptGranted)}
    assert {"at-once a", "asked asks", "asked a", "paused a"} <= granted.keys()
    assert granted["asked asks"].approved_by == "ann"
    assert granted["asked a"].exceeds
    assert all(event.leases and len(event.buckets) == 2 for event in granted.values())


def test_what_a_snapshot_holds_of_a_grant_is_not_changed_again() -> None:
    """Its run and each of its buckets may come from a snapshot, or not."""
    *_, pair = days()
    for place, event in enumerate(pair.ledger_events):
        if not isinstance(event, ev.AttemptGranted):
            continue
        units = units_of_event(event)
        for covered in ({unit} for unit in units):
            before, after = Ledger(0), Ledger(0)
            for ledger in (before, after):
                for seq, earlier in enumerate(pair.ledger_events[:place], 1):
                    apply(ledger, earlier, seq)
            apply(after, event, place + 1, 0, covered)
            changed = {unit for unit in units if dump(before, unit) != dump(after, unit)}
            assert changed == set(units) - covered
