"""The money, recomputed: budgets, reservations and spending from the bytes of `gate-ledger` alone.

What an auditor with the records in hand would do. Nothing of the gate is used, and not the structs that the gate writes and
folds: records are read with Avro's own reader by the schema that they name, fields by the names in that schema. So neither a
wrong rule of the gate nor a wrong field of a struct can hide here. What is shared: the schemas, and the epoch rule, which all
readers of a log must share (rule 6).
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import fastavro

from tidegate import codec
from tidegate.audit import carried
from tidegate.audit.budgets import BUDGET_EVENTS, BudgetBooks
from tidegate.eventlog.interface import Message
from tidegate.eventlog.validity import EpochTracker

FINGERPRINT: Final = slice(2, 10)  # of a record in Avro's single-object encoding, after the two bytes that mark it
BODY: Final = 10
LARGEST_MICROS: Final = 2**63 - 1  # what a field can hold: sums stop there

HELD, REFUSED, RESERVED, QUEUED, PLACED, LOST = "held", "refused", "reserved", "queued", "placed", "lost"
SETTLED, RELEASED, PAUSED, LAPSED, ANSWERED = "settled", "released", "paused", "lapsed", "answered"
ENDED: Final = frozenset({REFUSED, SETTLED, RELEASED, LAPSED})

# (what became of an attempt so far, event) -> what becomes of it. What is not here breaks the rules of the ledger.
ATTEMPTS: Final[dict[tuple[str, str], str]] = {
    ("", "AttemptGranted"): PLACED,
    ("", "AttemptReserved"): RESERVED,
    ("", "AttemptRefused"): REFUSED,
    ("", "ApprovalHeld"): HELD,
    ("", "AttemptPaused"): PAUSED,
    (HELD, "AttemptGranted"): PLACED,
    (HELD, "AttemptReserved"): RESERVED,
    (HELD, "ApprovalHeld"): HELD,  # a rule's question was answered, now a budget has one
    (HELD, "AttemptPaused"): PAUSED,
    (HELD, "ApprovalLapsed"): LAPSED,
    (HELD, "QuestionAnswered"): ANSWERED,  # by the gate: how it goes on stands in the same entry
    (ANSWERED, "AttemptGranted"): PLACED,
    (ANSWERED, "AttemptReserved"): RESERVED,
    (ANSWERED, "AttemptRefused"): REFUSED,
    (ANSWERED, "AttemptPaused"): PAUSED,
    (PAUSED, "AttemptPaused"): PAUSED,
    (PAUSED, "ApprovalHeld"): HELD,
    (PAUSED, "AttemptGranted"): PLACED,
    (PAUSED, "AttemptReserved"): RESERVED,
    (PAUSED, "AttemptRefused"): REFUSED,
    (PAUSED, "AttemptReleased"): RELEASED,
    (HELD, "AttemptRefused"): REFUSED,
    (HELD, "AttemptReleased"): RELEASED,
    (HELD, "AttemptSettled"): SETTLED,
    (RESERVED, "AttemptQueued"): QUEUED,
    (RESERVED, "AttemptPlaced"): PLACED,
    (QUEUED, "AttemptQueued"): QUEUED,
    (QUEUED, "AttemptRefused"): REFUSED,
    (QUEUED, "AttemptPlaced"): PLACED,
    (QUEUED, "AttemptReleased"): RELEASED,
    (QUEUED, "AttemptSettled"): SETTLED,
    (PLACED, "AttemptCancelTold"): PLACED,
    (PLACED, "PlacementLost"): LOST,
    (PLACED, "AttemptReleased"): RELEASED,
    (PLACED, "AttemptSettled"): SETTLED,
    (LOST, "AttemptReleased"): RELEASED,
    (LOST, "AttemptSettled"): SETTLED,
    # The result of an attempt that was given up turned up: what it cost counts, once, beyond any reservation.
    (RELEASED, "AttemptSettled"): SETTLED,
}

# Of limits, leases and queues: no money moves by these.
NO_MONEY: Final = frozenset(
    {
        "AttemptThrottled",
        "LeasesAsked",
        "LeasesGranted",
        "LeasesReturned",
        "LeaseHeard",
        "LeaseGiven",
        "LeaseRefused",
        "LeaseEnded",
        "TokenTaken",
        "FailureCounted",
        "BreakerOpened",
        "BreakerClosed",
        "LimitForgotten",
        "ScaleOutWanted",
    }
)


class AttemptName(NamedTuple):
    """Names an attempt."""

    run_id: str
    step_id: str
    attempt: int


class Placement(NamedTuple):
    """Names the executor life that an attempt belongs to."""

    instance_id: str
    incarnation: int


ANYBODY: Final = Placement("", -1)


class Problem(NamedTuple):
    """What no correct ledger can hold. where: `topic-partition@offset` of the record; run_id: empty if it concerns no run."""

    where: str
    run_id: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(slots=True)
class RunBooks:
    """What a run may spend and what became of it, in micro-dollars. `budget_micros` None: no limit.

    parent: the run that it does a step of, which bills the same account; empty for none. below_micros: what is set aside for and
    spent by all runs below it. is_alone: whether it is of no family. over: whether its family is said to be over. is_carried:
    whether the books began with it carried forward: attempts of it that had ended by then are unknown.
    """

    account: str
    budget_micros: int | None
    reserved_micros: int = 0
    settled_micros: int = 0
    overshoot_micros: int = 0
    closed: bool = False
    parent: str = ""
    below_micros: int = 0
    over: bool = False
    is_alone: bool = True
    is_carried: bool = False


@dataclass(slots=True)
class AttemptBooks:
    """What became of an attempt. reserved_micros: what is, or was, set aside for it; None if nothing ever was."""

    status: str = ""
    reserved_micros: int | None = None
    placement: Placement | None = None
    is_declared: bool = True  # whether what is set aside is what its call says

    @classmethod
    def carried(cls, said: dict[str, Any]) -> AttemptBooks:
        """Return those of an attempt that is carried forward. By whom it was placed, nothing says any more."""
        was_reserved = said["status"] not in (HELD, PAUSED)
        return cls(said["status"], said["reserved_micros"] if was_reserved else None, ANYBODY, is_declared=False)


@dataclass(slots=True)
class AccountTotals:
    """What the runs of an account came to, in micro-dollars. `open_micros`: set aside, neither spent nor given back yet."""

    runs: int = 0
    open_runs: int = 0
    settled_micros: int = 0
    overshoot_micros: int = 0
    open_micros: int = 0


@dataclass(slots=True)
class _Partition:
    """How far a partition of the ledger was read.

    torn: the first entry that does not continue the one before, until one comes that carries all balances forward: what is
    missing was retired then, else it is a fault. is_carried: the books began with such an entry. runs, buckets: of its accounts.
    """

    epochs: EpochTracker = field(default_factory=EpochTracker)
    next_seq: int = 1
    torn: Problem | None = None
    is_carried: bool = False
    runs: set[str] = field(default_factory=set)
    buckets: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Books:
    """The books of all partitions together. Fed record by record, each partition from its first on, in any mixture."""

    runs: dict[str, RunBooks] = field(default_factory=dict)
    attempts: dict[AttemptName, AttemptBooks] = field(default_factory=dict)
    budgets: BudgetBooks = field(default_factory=BudgetBooks)
    entries: int = 0
    void_entries: int = 0
    problems: list[Problem] = field(default_factory=list)
    _partitions: dict[int, _Partition] = field(default_factory=dict)
    _names: dict[str, dict[AttemptName, None]] = field(default_factory=dict)

    def read(self, message: Message) -> list[Problem]:
        """Take the next record of its partition into the books; return the problems that it shows. Does not raise.

        Entries of an owner whose epoch is over count for nothing. An event that breaks a rule is noted and left out.
        """
        before = len(self.problems)
        if message.value is not None:
            _Page(self, message).read(message.value)
        return self.problems[before:]

    def torn(self) -> list[Problem]:
        """Return what is missing of the ledger and was carried forward by no later entry. Not part of `problems`: the one that
        does may come next."""
        return [partition.torn for partition in self._partitions.values() if partition.torn is not None]

    def attempts_of(self, run_id: str) -> list[tuple[AttemptName, AttemptBooks]]:
        """Return the attempts of a run that have not ended."""
        return [
            (name, self.attempts[name])
            for name in self._names.get(run_id, ())
            if self.attempts[name].status not in ENDED
        ]

    def open_reservations(self) -> dict[AttemptName, int]:
        """Return the money that is set aside and has neither been spent nor given back."""
        return {
            name: attempt.reserved_micros
            for name, attempt in self.attempts.items()
            if attempt.reserved_micros is not None and attempt.status not in ENDED
        }

    def open_holds(self) -> set[AttemptName]:
        """Return the attempts that wait for an approval."""
        return {name for name, attempt in self.attempts.items() if attempt.status == HELD}

    def accounts(self) -> dict[str, AccountTotals]:
        """Return the totals of every account, by its path."""
        found: dict[str, AccountTotals] = {}
        for run in self.runs.values():
            totals = found.setdefault(run.account, AccountTotals())
            totals.runs += 1
            totals.open_runs += not run.closed
            totals.settled_micros += run.settled_micros
            totals.overshoot_micros += run.overshoot_micros
            totals.open_micros += run.reserved_micros
        return dict(sorted(found.items()))

    def problems_at_rest(self) -> list[Problem]:
        """Return what is wrong if nothing is under way any more: money set aside for ever, questions and books left open.

        Not part of `problems`: in the middle of things all of these are as they should be.
        """
        left = [
            (name.run_id, f"{_said(name)}: {left} still set aside") for name, left in self.open_reservations().items()
        ]
        left += [(name.run_id, f"{_said(name)}: still held for approval") for name in self.open_holds()]
        left += [
            (name.run_id, f"{_said(name)}: still waits for a budget")
            for name, attempt in self.attempts.items()
            if attempt.status == PAUSED
        ]
        left += [(name[0], text) for name, text in self.budgets.left_open()]
        left += [(run_id, f"{run_id}: never closed") for run_id, run in self.runs.items() if not run.closed]
        return [Problem("at the end", run_id, text) for run_id, text in left]


def audit(partitions: Iterable[Iterable[Message]]) -> Books:
    """Read every partition of the ledger from its first record on, and return the books. Blocks as its readers do."""
    books = Books()
    for messages in partitions:
        for message in messages:
            books.read(message)
    books.problems += books.torn()
    return books


# --- reading ---------------------------------------------------------------


@functools.cache
def _schema(fingerprint: bytes) -> Any:
    """Return the parsed schema. Raises LookupError for one that nobody registered."""
    return fastavro.parse_schema(json.loads(codec.schema_texts()[fingerprint.hex()]))


def record_fields(value: bytes) -> tuple[str, dict[str, Any]]:
    """Return a record's name and fields, those of unions as (name, fields). Raises on bytes that are no such record."""
    schema = _schema(value[FINGERPRINT])
    fields = fastavro.schemaless_reader(io.BytesIO(value[BODY:]), schema, None, return_record_name=True)
    return schema["name"].rpartition(".")[2], fields  # type: ignore[return-value] # both of our records are objects


class _Page:
    """One record on its way into the books."""

    def __init__(self, books: Books, message: Message) -> None:
        self._books = books
        self._partition = books._partitions.setdefault(message.partition, _Partition())
        self._message = message
        self._where = f"{message.topic}-{message.partition}@{message.offset}"

    def read(self, value: bytes) -> None:
        try:
            kind, fields = record_fields(value)
        except Exception as error:  # whatever is wrong with the bytes: money may hide in them
            self._note("", f"cannot be read: {type(error).__name__}: {error}")
            return
        if kind == "OwnerAnnounced":
            self._partition.epochs.announced(self._message.offset, fields["epoch"])
        elif kind != "LedgerEntry":
            self._note("", f"a {kind} has no place in the ledger")
        elif not self._partition.epochs.is_valid(fields["epoch"]):
            self._books.void_entries += 1
        else:
            self._entry(fields)

    def _entry(self, fields: dict[str, Any]) -> None:
        self._books.entries += 1
        self._books.budgets.now_ms = fields["now_ms"]
        due, seq = self._partition.next_seq, fields["first_seq"]
        self._partition.next_seq = seq + len(fields["events"])
        if seq != due and self._partition.torn is None:
            self._partition.torn = Problem(self._where, "", f"begins at seq {seq}, {due} was due")
        if self._partition.torn is not None:
            kind, event = fields["events"][0]
            if kind.rpartition(".")[2] == "LedgerCarried":
                self._begin_with(event)
            return
        for kind, event in fields["events"]:
            name = kind.rpartition(".")[2]
            if name in BUDGET_EVENTS:
                if name == "BudgetSet":
                    self._partition.buckets.add(event["bucket"])
                for problem in self._books.budgets.post(name, event):
                    self._note(event.get("run_id", ""), problem)
                continue
            for problem in self._books.budgets.attempt(name, event):
                self._note(event["run_id"], problem)
            post = _RUNS.get(name, _Page._attempt)
            post(self, name, event)
        for run_id, problem in self._books.budgets.end_of_entry():
            self._note(run_id, problem)

    def _carried(self, _: str, event: dict[str, Any]) -> None:
        partition = self._partition
        for run_id, problem in carried.contradictions(self._books, partition.runs, partition.buckets, event):
            self._note(run_id, problem)

    def _begin_with(self, event: dict[str, Any]) -> None:
        """Begin the partition's books anew with what is carried forward: what was before is not all there."""
        books, partition = self._books, self._partition
        partition.torn, partition.is_carried = None, True
        for run_id in partition.runs:
            del books.runs[run_id]
            for name in books._names.pop(run_id, ()):
                del books.attempts[name]
        books.budgets.forget(partition.buckets)
        partition.runs, partition.buckets = set(), set()
        for run in event["runs"]:
            partition.runs.add(run["run_id"])
            books.runs[run["run_id"]] = RunBooks(
                run["account"],
                run["budget_micros"],
                run["reserved_micros"],
                run["settled_micros"],
                closed=run["closed"],
                parent=run["parent_run_id"],
                is_alone=not run["parent_run_id"] and not run["has_children"],
                is_carried=True,
            )
        for run_id in partition.runs:
            begun = books.runs[run_id]
            self._bill_above(begun, begun.reserved_micros + begun.settled_micros)
        for bucket in event["buckets"]:
            partition.buckets.add(bucket["bucket"])
            books.budgets.begin(bucket)
        for run in event["runs"]:
            for said in run["attempts"]:
                name = AttemptName(run["run_id"], said["step_id"], said["attempt"])
                books.attempts[name] = AttemptBooks.carried(said)
                books._names.setdefault(name.run_id, {})[name] = None
                books.budgets.hold(name, said["buckets"], said["amounts"])
        for run_id, problem in carried.contradictions(books, partition.runs, partition.buckets, event):
            self._note(run_id, problem)

    def _note(self, run_id: str, text: str) -> None:
        self._books.problems.append(Problem(self._where, run_id, text))

    # -- runs ---------------------------------------------------------------------------

    def _opened(self, _: str, event: dict[str, Any]) -> None:
        run_id, budget_micros = event["run_id"], event["budget_micros"]
        if run_id in self._books.runs:
            self._note(run_id, f"{run_id}: opened twice")
            return
        if budget_micros is not None and budget_micros < 0:
            self._note(run_id, f"{run_id}: a budget of {budget_micros}")
        parent = event.get("parent_run_id", "")
        is_alone = not parent and not event.get("has_children", False)
        run = self._books.runs[run_id] = RunBooks(event["account"], budget_micros, parent=parent, is_alone=is_alone)
        self._partition.runs.add(run_id)
        above = self._books.runs.get(run.parent)
        if above is not None and above.account != run.account:
            self._note(run_id, f"{run_id}: billed to {run.account}, its parent to {above.account}")

    def _closed(self, _: str, event: dict[str, Any]) -> None:
        run = self._run(event)
        if run is None:
            return
        run_id, settled_micros = event["run_id"], event["settled_micros"]
        if run.closed:
            self._note(run_id, f"{run_id}: closed twice")
        if settled_micros != min(run.settled_micros, LARGEST_MICROS):
            self._note(run_id, f"{run_id}: closed with {settled_micros} spent, {run.settled_micros} were")
        run.closed = True

    def _over(self, _: str, event: dict[str, Any]) -> None:
        run_id, run = event["run_id"], self._run(event)
        if run is None:
            return
        if not run.closed or run.reserved_micros or run.over:
            self._note(run_id, f"{run_id}: its family is said to be over, it is not, or was before")
        run.over = True

    def _bill_above(self, run: RunBooks, micros: int) -> None:
        """Count what changed about a run in all above it."""
        while micros and (above := self._books.runs.get(run.parent)) is not None:
            above.below_micros += micros
            run = above

    def _may_spend(self, name: AttemptName, run: RunBooks) -> None:
        """What is set aside for a run has room in the budgets of all above it, and these are open."""
        while run.parent:
            above_id, above = run.parent, self._books.runs.get(run.parent)
            if above is None or above.closed:
                self._note(name.run_id, f"{_said(name)}: reserved below {above_id}, which is not open")
                return
            micros = above.reserved_micros + above.settled_micros + above.below_micros
            if above.budget_micros is not None and micros > above.budget_micros:
                self._note(name.run_id, f"{_said(name)}: with it, {micros} of the {above.budget_micros} of {above_id}")
            run = above

    def _run(self, event: dict[str, Any]) -> RunBooks | None:
        run_id, account = event["run_id"], event["account"]
        run = self._books.runs.get(run_id)
        if run is None:
            self._note(run_id, f"{run_id}: never opened")
        elif run.account != account:
            self._note(run_id, f"{run_id}: billed to {account or 'nobody'}, it belongs to {run.account}")
        return run

    # -- attempts -----------------------------------------------------------------------

    def _attempt(self, kind: str, event: dict[str, Any]) -> None:
        if kind in NO_MONEY:
            return
        if kind not in _KINDS:
            self._note(event.get("run_id", ""), f"an event {kind}, of which the auditor knows nothing")
            return
        name = AttemptName(event["run_id"], event["step_id"], event["attempt"])
        if kind == "AttemptSettled" and self._partition.is_carried and name.run_id not in self._books.runs:
            return  # a late cost of a run that was over, and forgotten, when balances were carried forward
        attempt = self._books.attempts.get(name) or self._unknown(name, kind, event)
        becomes = ATTEMPTS.get((attempt.status, kind))
        if becomes is None:
            self._note(name.run_id, f"{_said(name)}: {kind} after it was {attempt.status or 'never asked for'}")
            return
        if (post := _POSTINGS.get(kind)) is not None:
            run = self._run(event)
            if run is None:
                return
            before_micros = run.reserved_micros + run.settled_micros
            for problem in post(run, attempt, event):
                self._note(name.run_id, f"{_said(name)}: {problem}")
            self._bill_above(run, run.reserved_micros + run.settled_micros - before_micros)
            if kind in _RESERVING:
                self._may_spend(name, run)
        attempt.status = becomes
        self._books.attempts[name] = attempt
        self._books._names.setdefault(name.run_id, {})[name] = None
        if kind in _RESERVING:
            for problem in self._books.budgets.reserved_for(name, event):
                self._note(name.run_id, f"{_said(name)}: {problem}")
        elif becomes in ENDED:
            self._books.budgets.ended(name)

    def _unknown(self, name: AttemptName, kind: str, event: dict[str, Any]) -> AttemptBooks:
        """Return the books of an attempt that an event is the first to name.

        A settlement against nothing, in a run that was carried forward, is the late cost of an attempt that was given up before.
        """
        run = self._books.runs.get(name.run_id)
        is_late = kind == "AttemptSettled" and event["reserved_micros"] == 0 and run is not None and run.is_carried
        return AttemptBooks(RELEASED, placement=ANYBODY) if is_late else AttemptBooks()


_RUNS: Final[dict[str, Callable[[_Page, str, dict[str, Any]], None]]] = {
    "RunOpened": _Page._opened,
    "RunClosed": _Page._closed,
    "LedgerCarried": _Page._carried,
    "FamilyOver": _Page._over,
}
_KINDS: Final = frozenset(kind for _, kind in ATTEMPTS)
_RESERVING: Final = frozenset({"AttemptGranted", "AttemptReserved"})


# --- posting: what an event does to its attempt and to its run; returns what is wrong with it -------------------------


def _held(run: RunBooks, _attempt: AttemptBooks, _event: dict[str, Any]) -> Iterable[str]:
    if run.closed:
        yield "held after its run was closed"


def _reserved(run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    micros = event["reserved_micros"]
    if micros < 0:
        yield f"{micros} reserved"
    if run.closed:
        yield "reserved after its run was closed"
    if attempt.status == HELD and not event["approved_by"]:
        yield "reserved although nobody approved it"
    attempt.reserved_micros = micros
    attempt.is_declared = event.get("basis", "") in ("", "declared")
    run.reserved_micros += micros
    total_micros = run.reserved_micros + run.settled_micros + run.below_micros
    if run.budget_micros is not None and total_micros > run.budget_micros:
        below = f" ({run.below_micros} more below it)" if run.below_micros else ""
        yield (
            f"{micros} reserved; with that {run.reserved_micros} are set aside and {run.settled_micros} spent{below} "
            f"of {run.budget_micros}"
        )


def _queued(_run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    micros = event["call"]["reserve_micros"]
    if attempt.is_declared and micros != attempt.reserved_micros:
        yield f"{attempt.reserved_micros} reserved, its call asks for {micros}"


def _placed(run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    yield from _queued(run, attempt, event)
    if event["reserved_micros"] != attempt.reserved_micros:
        yield f"placed with {event['reserved_micros']}, {attempt.reserved_micros} were reserved"
    if run.closed:
        yield "placed after its run was closed"
    attempt.placement = Placement(event["instance_id"], event["incarnation"])


def _granted(run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    yield from _reserved(run, attempt, event)
    yield from _placed(run, attempt, event)


def _lost(_run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    if attempt.placement not in (ANYBODY, (event["instance_id"], event["incarnation"])):
        yield f"lost by {event['instance_id']} of incarnation {event['incarnation']}, which never had it"


def _settled(run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    actual_micros = event["actual_micros"]
    expected_micros = _take_back(run, attempt)
    if actual_micros < 0:
        yield f"{actual_micros} spent"
    if actual_micros and attempt.placement is None:
        yield f"{actual_micros} spent by what was never placed"
    if event["reserved_micros"] != expected_micros:
        yield f"settled against {event['reserved_micros']}, {expected_micros} were set aside"
    if event["overshoot_micros"] != max(0, actual_micros - expected_micros):
        yield f"{actual_micros} spent of {expected_micros} is no overshoot of {event['overshoot_micros']}"
    run.settled_micros += actual_micros
    run.overshoot_micros += max(0, actual_micros - expected_micros)


def _released(run: RunBooks, attempt: AttemptBooks, event: dict[str, Any]) -> Iterable[str]:
    expected_micros = _take_back(run, attempt)
    if event["reserved_micros"] != expected_micros:
        yield f"{event['reserved_micros']} released, {expected_micros} were set aside"


def _refused(run: RunBooks, attempt: AttemptBooks, _event: dict[str, Any]) -> Iterable[str]:
    """What waited and was refused by a limit after all gives back what was set aside for it."""
    _take_back(run, attempt)
    return ()


def _take_back(run: RunBooks, attempt: AttemptBooks) -> int:
    """End the reservation and return it: nothing if none was made, or if it ended before."""
    if attempt.reserved_micros is None or attempt.status in ENDED:
        return 0
    run.reserved_micros -= attempt.reserved_micros
    return attempt.reserved_micros


_POSTINGS: Final[dict[str, Callable[[RunBooks, AttemptBooks, dict[str, Any]], Iterable[str]]]] = {
    "ApprovalHeld": _held,
    "AttemptGranted": _granted,
    "AttemptReserved": _reserved,
    "AttemptQueued": _queued,
    "AttemptPlaced": _placed,
    "PlacementLost": _lost,
    "AttemptSettled": _settled,
    "AttemptReleased": _released,
    "AttemptRefused": _refused,
}


def _said(name: AttemptName) -> str:
    return f"{name.run_id} {name.step_id}#{name.attempt}"
