"""Families: a run, the runs that do steps of it, and theirs. What one of them may spend bounds all that is below it, too. Pure.

All runs of a family have one account, so they are in one ledger. What the runs below a run come to follows from them and from
who their parents are; it is kept up to date here, so that no decision has to add it up. A run stays in the ledger until its
whole family is over: what it spent counts as long as anybody may spend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from tidegate.gate.ledger import Ledger
from tidegate.gate.names import family_wait
from tidegate.gate.state import Below, RunMoney


class Money(Protocol):
    """What is needed of a run inside a decision."""

    budget_micros: int | None
    reserved_micros: int
    settled_micros: int
    parent_run_id: str


class NoRoom(NamedTuple):
    """A run that may not spend so much more: the one that asks, or one above it. The sums are those of its whole family."""

    run_id: str
    is_own: bool
    needed_micros: int
    budget_micros: int
    settled_micros: int
    reserved_micros: int

    def said(self) -> str:
        """Return the reason for people."""
        whose = (
            "the run's own budget" if self.is_own else f"the budget of run {self.run_id}, which this run is a part of"
        )
        return (
            f"{whose}: needs {self.needed_micros} micro-dollars; of {self.budget_micros}, {self.settled_micros} are spent "
            f"and {self.reserved_micros} reserved"
        )

    def values(self) -> dict[str, Any]:
        """Return the numbers that decided."""
        return {
            "run": self.run_id,
            "meter": "micros",
            "needed": self.needed_micros,
            "limit": self.budget_micros,
            "spent": self.settled_micros,
            "reserved": self.reserved_micros,
        }


# --- what the fold keeps ---------------------------------------------------------------


def is_done(run: RunMoney) -> bool:
    """Tell whether nothing of the run itself can change any more."""
    return run.closed and not run.open


def opened(ledger: Ledger, run_id: str) -> None:
    """A run begins. Those below it may have been heard of before it: what they come to is now above it, too."""
    join(ledger, run_id)
    below = ledger.below.get(run_id)
    if below is not None:
        bill(ledger, ledger.runs[run_id], below.going, below.reserved_micros, below.settled_micros)
        ledger.lacking.stir(family_wait(run_id))
        for child in below.children:
            ledger.families_over.pop(child, None)
    _note_end(ledger, run_id)


def join(ledger: Ledger, run_id: str) -> None:
    """Count a run, and nothing of those below it, among those below the ones above it."""
    run = ledger.runs[run_id]
    if not run.parent_run_id:
        return
    ledger.below.setdefault(run.parent_run_id, Below(children={})).children[run_id] = None
    bill(ledger, run, int(not is_done(run)), run.reserved_micros, run.settled_micros)


def bill(ledger: Ledger, run: RunMoney, going: int = 0, reserved_micros: int = 0, settled_micros: int = 0) -> None:
    """Add what changed about a run to all above it, as far up as they are known."""
    each: RunMoney | None = run
    while each is not None and each.parent_run_id:
        below = ledger.below[each.parent_run_id]
        below.going += going
        below.reserved_micros += reserved_micros
        below.settled_micros += settled_micros
        each = ledger.runs.get(each.parent_run_id)


def done(ledger: Ledger, run_id: str) -> None:
    """Nothing of the run can change any more. It is forgotten at once if it is alone, else with its family.

    Which of the two was said when it began: it must not depend on other runs, of which a snapshot may be older or newer.
    """
    run = ledger.runs[run_id]
    if run.is_alone:
        del ledger.runs[run_id]
        for child in ledger.below[run_id].children if run_id in ledger.below else ():
            _note_end(ledger, child)
        return
    bill(ledger, run, going=-1)
    _note_end(ledger, run_id)


def derive(ledger: Ledger) -> None:
    """Make what follows from the runs, which were put in by themselves, in any order: a child may come before its parent."""
    for run_id, run in ledger.runs.items():
        if run.parent_run_id:
            ledger.below.setdefault(run.parent_run_id, Below(children={})).children[run_id] = None
    for run_id in ledger.runs:
        join(ledger, run_id)
    for run_id in ledger.runs:
        _note_end(ledger, run_id)


def forgotten(ledger: Ledger, run_id: str) -> None:
    """Forget a run of a family that is over: those below it went before it."""
    run = ledger.runs[run_id]
    bill(ledger, run, 0, -run.reserved_micros, -run.settled_micros)
    ledger.families_over.pop(run_id, None)
    del ledger.runs[run_id]
    above = ledger.below.get(run.parent_run_id)
    if above is not None:
        del above.children[run_id]
        if not above.children:
            del ledger.below[run.parent_run_id]


def _note_end(ledger: Ledger, run_id: str) -> None:
    """Note by the highest run that is known of it whether the family is over."""
    top_id = root(ledger, run_id)
    top, below = ledger.runs[top_id], ledger.below.get(top_id)
    if is_done(top) and (below is None or not below.going):
        ledger.families_over[top_id] = None
    else:
        ledger.families_over.pop(top_id, None)


# --- what decisions ask ---------------------------------------------------------------


def root(ledger: Ledger, run_id: str, parent_run_id: str = "") -> str:
    """Return the highest run above this one that is known, or itself. parent_run_id: if the run is not in the ledger yet."""
    run = ledger.runs.get(run_id)
    above_id = parent_run_id if run is None else run.parent_run_id
    while above_id and (run := ledger.runs.get(above_id)) is not None:
        run_id, above_id = above_id, run.parent_run_id
    return run_id


def not_open(ledger: Ledger, run: Money) -> str:
    """Return the nearest run above this one that is not open at the gate; empty if all are.

    It may be over, and this one about to be cancelled; or it has not been heard of yet, because messages of different run
    partitions overtake each other. Which of the two it is, nobody here can tell.
    """
    above_id = run.parent_run_id
    while above_id:
        above = ledger.runs.get(above_id)
        if above is None or above.closed:
            return above_id
        above_id = above.parent_run_id
    return ""


def without_room(ledger: Ledger, run_id: str, run: Money, micros: int) -> NoRoom | None:
    """Return the first of the run and those above it that has no room for so much; None if all have.

    run: as it stands inside the decision; all others are as in the ledger.
    """
    if run.budget_micros is None and not run.parent_run_id:
        return None  # as most
    known = ledger.runs.get(run_id)
    reserved_more = run.reserved_micros - (0 if known is None else known.reserved_micros)
    settled_more = run.settled_micros - (0 if known is None else known.settled_micros)
    for each_id, each in _upwards(ledger, run_id, run):
        if each.budget_micros is None:
            continue
        below = ledger.below.get(each_id)
        reserved_micros = each.reserved_micros + (0 if below is None else below.reserved_micros)
        settled_micros = each.settled_micros + (0 if below is None else below.settled_micros)
        if each is not run:
            reserved_micros += reserved_more
            settled_micros += settled_more
        if reserved_micros + settled_micros + micros > each.budget_micros:
            return NoRoom(each_id, each is run, micros, each.budget_micros, settled_micros, reserved_micros)
    return None


def _upwards(ledger: Ledger, run_id: str, run: Money) -> Iterator[tuple[str, Money]]:
    yield run_id, run
    above_id = run.parent_run_id
    while above_id and (above := ledger.runs.get(above_id)) is not None:
        yield above_id, above
        above_id = above.parent_run_id


def members(ledger: Ledger, run_id: str) -> list[str]:
    """Return a run and all below it, each after those that are below it."""
    found = [run_id]
    for each in found:  # grows as it is walked
        below = ledger.below.get(each)
        if below is not None:
            found += below.children
    return found[::-1]
