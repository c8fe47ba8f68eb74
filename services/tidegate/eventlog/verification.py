"""Does a log say what it must? Contiguity, hash chain, epochs, and (for runs) that the events fold. Pure over what was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tidegate import codec
from tidegate.domain.entry import Entry, OwnerAnnounced, causes_of
from tidegate.domain.fingerprint import fingerprint
from tidegate.domain.ledger_events import carried_by
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.interface import Message
from tidegate.eventlog.validity import EpochTracker

MAX_PROBLEMS = 100


@dataclass(slots=True)
class Report:
    """What a verification looked at and found. `problems` is cut at MAX_PROBLEMS; `problem_count` is not.

    carried: ledgers of which older entries were retired: they are verified from the entry on that carries their balances.
    """

    subjects: int = 0
    entries: int = 0
    events: int = 0
    void_entries: int = 0
    carried: int = 0
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problem_count

    def note(self, problem: str) -> None:
        """Add a problem."""
        self.problem_count += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)


@dataclass(slots=True)
class _Subject:
    seq: int = 0
    head: bytes = b""
    broken: bool = False
    torn: str = ""
    run: RunState | None = None


def verify_partition(messages: Iterable[Message], report: Report, only: str | None = None) -> dict[str, RunState]:
    """Verify one partition of a log from its first record on; returns the folded runs (none for a ledger).

    only: look at this subject alone. What is wrong goes into `report`; each subject is reported once, at its first fault.
    """
    tracker = EpochTracker()
    subjects: dict[str, _Subject] = {}
    for message in messages:
        if message.value is None:
            continue
        where = f"{message.topic}-{message.partition}@{message.offset}"
        try:
            record = codec.decode(message.value)
        except codec.DecodeError as error:
            report.note(f"{where}: {error}")
            continue
        if isinstance(record, OwnerAnnounced):
            tracker.announced(message.offset, record.epoch)
        elif not isinstance(record, Entry):
            report.note(f"{where}: a {type(record).__name__} has no place in a log")
        elif not tracker.is_valid(record.epoch):
            report.void_entries += 1
        elif only is None or record.subject == only:
            subject = subjects.setdefault(record.subject, _Subject())
            if not subject.broken:
                _verify_entry(record, message.value, subject, report, where, folds=message.topic == "run-events")
    report.subjects += len(subjects)
    for name, subject in subjects.items():
        if subject.torn and not subject.broken:
            report.note(subject.torn)
        if subject.run is not None and subject.run.is_over and not subject.broken:
            _verify_end(name, subject.run, report)
    return {name: subject.run for name, subject in subjects.items() if subject.run is not None}


def _verify_entry(entry: Entry, value: bytes, subject: _Subject, report: Report, where: str, *, folds: bool) -> None:
    report.entries += 1
    report.events += len(entry.events)
    problem: str | None = None
    if entry.first_seq != subject.seq + 1:
        problem = f"starts at seq {entry.first_seq} after {subject.seq}"
    elif entry.prev_hash != subject.head:
        problem = "its previous hash is not that of the entry before"
    else:
        problem = _damage(entry) or (_fold(entry, subject) if folds else None)
    if not folds and (problem or subject.torn):
        # Entries before one that carries everything forward may have been retired, some of them sooner than others.
        subject.torn = subject.torn or f"{where}: {entry.subject}: {problem}"
        if carried_by(entry.events) is not None:
            subject.torn = ""
            report.carried += 1
    elif problem is not None:
        subject.broken = True
        report.note(f"{where}: {entry.subject}: {problem}")
    subject.seq = entry.first_seq + len(entry.events) - 1
    subject.head = hashlib.sha256(value).digest()


def _damage(entry: Entry) -> str | None:
    try:
        if entry.parts:
            causes_of(entry)
    except ValueError as error:
        return str(error)
    return None


def _fold(entry: Entry, subject: _Subject) -> str | None:
    run = subject.run = subject.run or RunState(entry.subject)
    try:
        for event in entry.events:
            apply(run, event, entry.now_ms)
    except Exception as error:  # whatever a wrong event makes the fold stumble over is the finding
        return f"does not fold: {type(error).__name__}: {error}"
    return None


def _verify_end(name: str, run: RunState, report: Report) -> None:
    if run.workflow is None or not run.fingerprint:
        return
    steps: list[tuple[str, str, str]] = [(s.step_id, s.status, s.output or "") for s in run.steps.values()]
    if fingerprint(run.workflow.mark, run.input, steps, run.status, run.output) != run.fingerprint:
        report.note(f"{name}: its fingerprint is not that of its steps and its output")


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as a JSON object."""
    return {
        "ok": report.ok,
        "subjects": report.subjects,
        "entries": report.entries,
        "events": report.events,
        "void_entries": report.void_entries,
        "carried": report.carried,
        "problem_count": report.problem_count,
        "problems": report.problems,
    }
