"""The books, kept a second time: every account is recomputed from the bytes of `gate-ledger` alone.

Nothing of the gate is used, not even its rules: this is what an auditor would do with the records in hand. Void entries (of an
owner whose epoch was over) do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tidegate import codec
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.eventlog.interface import Message


class AttemptName(NamedTuple):
    run_id: str
    step_id: str
    attempt: int


class Placement(NamedTuple):
    instance_id: str
    incarnation: int


@dataclass(slots=True)
class RunBooks:
    """What a run may spend and what became of its money, in micro-dollars."""

    budget_micros: int | None
    reserved_micros: int = 0
    settled_micros: int = 0
    overshoot_micros: int = 0
    closed: bool = False


@dataclass(slots=True)
class Books:
    """All partitions' books together. `problems` lists what no correct ledger can hold; `waiting` what may still come."""

    runs: dict[str, RunBooks] = field(default_factory=dict)
    reserved: dict[AttemptName, int] = field(default_factory=dict)
    ended: dict[AttemptName, str] = field(default_factory=dict)
    placed: dict[AttemptName, Placement] = field(default_factory=dict)
    refused: dict[AttemptName, str] = field(default_factory=dict)
    held: dict[AttemptName, str] = field(default_factory=dict)
    lost: set[AttemptName] = field(default_factory=set)
    void_entries: int = 0
    problems: list[str] = field(default_factory=list)

    def open_reservations(self) -> dict[AttemptName, int]:
        """Return the money that is set aside and has neither been spent nor given back."""
        return {name: micros for name, micros in self.reserved.items() if name not in self.ended}

    def open_holds(self) -> set[AttemptName]:
        """Return the attempts that wait for an approval."""
        return {
            name
            for name in self.held
            if name not in self.reserved and name not in self.refused and name not in self.ended
        }


def audit(partitions: Iterable[Iterable[Message]]) -> Books:
    """Read every partition of the ledger from its beginning and return the books. Raises DecodeError on what is no record."""
    books = Books()
    for messages in partitions:
        _read(books, messages)
    kept: Counter[str] = Counter()
    for name, micros in books.open_reservations().items():
        kept[name.run_id] += micros
    for run_id, run in books.runs.items():
        if kept[run_id] != run.reserved_micros:
            books.problems.append(f"{run_id}: {run.reserved_micros} reserved, but open reservations of {kept[run_id]}")
    return books


def _read(books: Books, messages: Iterable[Message]) -> None:
    epoch, next_seq = -1, 1
    for message in messages:
        record = codec.decode(message.value)
        if isinstance(record, OwnerAnnounced):
            epoch = max(epoch, message.offset if record.epoch == -1 else record.epoch)
            continue
        assert isinstance(record, Entry), record
        if record.epoch != epoch:
            books.void_entries += 1
            continue
        if record.first_seq != next_seq:
            books.problems.append(f"{record.subject}: seq {record.first_seq} where {next_seq} was due")
        next_seq = record.first_seq + len(record.events)
        for event in record.events:
            book = _BOOKERS.get(type(event).__name__)
            if book is not None:
                book(books, event)


def _name(event: Any) -> AttemptName:
    return AttemptName(event.run_id, event.step_id, event.attempt)


def _opened(books: Books, event: Any) -> None:
    if event.run_id in books.runs:
        books.problems.append(f"{event.run_id}: opened twice")
    books.runs[event.run_id] = RunBooks(event.budget_micros)


def _reserved(books: Books, event: Any) -> None:
    name, run = _name(event), books.runs[event.run_id]
    if name in books.reserved:
        books.problems.append(f"{name}: reserved twice")
    if name in books.ended or name in books.refused:
        books.problems.append(f"{name}: reserved after its end")
    if run.closed:
        books.problems.append(f"{name}: reserved after the run was closed")
    books.reserved[name] = event.reserved_micros
    run.reserved_micros += event.reserved_micros
    if run.budget_micros is not None and run.reserved_micros + run.settled_micros > run.budget_micros:
        books.problems.append(
            f"{name}: {run.settled_micros} spent and {run.reserved_micros} reserved of {run.budget_micros}"
        )


def _placed(books: Books, event: Any) -> None:
    name = _name(event)
    if name in books.placed:
        books.problems.append(f"{name}: placed twice")
    if name not in books.open_reservations():
        books.problems.append(f"{name}: placed without money set aside")
    books.placed[name] = Placement(event.instance_id, event.incarnation)


def _settled(books: Books, event: Any) -> None:
    name, run = _name(event), books.runs[event.run_id]
    expected = _take_reservation(books, name, "settled")
    if event.reserved_micros != expected:
        books.problems.append(f"{name}: settled against {event.reserved_micros}, {expected} were reserved")
    if event.overshoot_micros != max(0, event.actual_micros - event.reserved_micros):
        books.problems.append(f"{name}: an overshoot of {event.overshoot_micros} is wrong")
    run.settled_micros += event.actual_micros
    run.overshoot_micros += event.overshoot_micros
    if run.budget_micros is not None:
        allowed = run.budget_micros + run.overshoot_micros
        if run.settled_micros + run.reserved_micros > allowed:
            books.problems.append(
                f"{name}: {run.settled_micros} spent of {run.budget_micros} beyond recorded overshoot"
            )


def _released(books: Books, event: Any) -> None:
    name = _name(event)
    if name in books.ended:
        books.problems.append(f"{name}: released after it was {books.ended[name]}")
    expected = _take_reservation(books, name, "released")
    if event.reserved_micros != expected:
        books.problems.append(f"{name}: released {event.reserved_micros}, {expected} were reserved")


def _take_reservation(books: Books, name: AttemptName, how: str) -> int:
    """End the attempt's reservation and return it: nothing if it ended before (a late result only adds what it cost)."""
    if name in books.ended:
        return 0
    books.ended[name] = how
    micros = books.reserved.get(name, 0)
    books.runs[name.run_id].reserved_micros -= micros
    return micros


def _closed(books: Books, event: Any) -> None:
    run = books.runs[event.run_id]
    if run.closed:
        books.problems.append(f"{event.run_id}: closed twice")
    if event.settled_micros != run.settled_micros:
        books.problems.append(
            f"{event.run_id}: closed with {event.settled_micros}, but {run.settled_micros} were spent"
        )
    run.closed = True


def _refused(books: Books, event: Any) -> None:
    books.refused[_name(event)] = event.rule


def _held(books: Books, event: Any) -> None:
    books.held[_name(event)] = event.rule


def _lost(books: Books, event: Any) -> None:
    name = _name(event)
    if name in books.lost:
        books.problems.append(f"{name}: lost twice")
    if books.placed.get(name) != (event.instance_id, event.incarnation):
        books.problems.append(f"{name}: lost by {event.instance_id}, which never had it")
    books.lost.add(name)


_BOOKERS = {
    "RunOpened": _opened,
    "AttemptReserved": _reserved,
    "AttemptRefused": _refused,
    "ApprovalHeld": _held,
    "AttemptPlaced": _placed,
    "AttemptSettled": _settled,
    "AttemptReleased": _released,
    "PlacementLost": _lost,
    "RunClosed": _closed,
}
