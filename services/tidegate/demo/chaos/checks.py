"""What must hold after a storm. Pure: facts in, breaches out, so that each check can be shown facts that are wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tidegate.audit.money import AttemptName, Books
from tidegate.demo.chaos.app import PAYING
from tidegate.demo.chaos.provider import Call, Payment
from tidegate.domain import states
from tidegate.domain.messages import DeadLetter
from tidegate.domain.run import RunState
from tidegate.eventlog.verification import Report

REJECTED, CANCELLED = "rejected", "cancelled"
REFUSED_COMMANDS: Final = frozenset({"scheduler"})  # of late answers and cancels: they come with a storm


class Row(NamedTuple):
    """What ClickHouse says of a run."""

    status: str
    last_seq: int
    events: int
    spent_micros: int


@dataclass(slots=True)
class Facts:
    """Everything that is known when all is quiet. `wanted` maps run ids to the requests that customers made of them."""

    wanted: Mapping[str, frozenset[str]]
    runs: Mapping[str, RunState] = field(default_factory=dict)
    run_report: Report = field(default_factory=Report)
    ledger_report: Report = field(default_factory=Report)
    books: Books = field(default_factory=Books)
    calls: Sequence[Call] = ()
    payments: Sequence[Payment] = ()
    rows: Mapping[str, Row] = field(default_factory=dict)
    ledger_rows: int = 0
    live: Mapping[str, str] = field(default_factory=dict)
    letters: Sequence[DeadLetter] = ()
    crashes: Sequence[str] = ()


def lost_runs(facts: Facts) -> list[str]:
    """Every run that was asked for is over, in a way that somebody asked for; nobody else's run is there."""
    breaches = [f"{run_id}: nobody asked for it" for run_id in facts.runs if run_id not in facts.wanted]
    for run_id, wishes in facts.wanted.items():
        run = facts.runs.get(run_id)
        if run is None:
            breaches.append(f"{run_id}: asked for, and not in the log")
        elif not run.is_over:
            breaches.append(f"{run_id}: still {run.status}")
        elif run.status != states.SUCCEEDED and not _was_wanted(run, wishes):
            breaches.append(f"{run_id}: {run.status}, {run.code}: {run.reason}")
    return breaches


def _was_wanted(run: RunState, wishes: frozenset[str]) -> bool:
    if run.status == states.CANCELLED:
        return "cancel" in wishes
    return run.status == states.FAILED and run.code == REJECTED and "reject" in wishes


def doubled_effects(facts: Facts) -> list[str]:
    """What moves money did so once at most per run, and once where its step succeeded; an attempt was entered once."""
    times = Counter((payment.run_id, payment.function) for payment in facts.payments)
    breaches = [f"{run_id}: {function} paid {n} times" for (run_id, function), n in times.items() if n > 1]
    paid = {(payment.run_id, payment.step_id) for payment in facts.payments}
    breaches += [
        f"{run.run_id} {step.step_id}: succeeded, and nothing was paid"
        for run in facts.runs.values()
        for step in run.steps.values()
        if step.call.function in PAYING and step.status == states.SUCCEEDED and (run.run_id, step.step_id) not in paid
    ]
    entered = Counter(AttemptName(call.run_id, call.step_id, call.attempt) for call in facts.calls)
    breaches += [f"{_said(name)}: entered {n} times" for name, n in entered.items() if n > 1]
    keys: dict[tuple[str, str], set[str]] = {}
    for call in facts.calls:
        keys.setdefault((call.run_id, call.step_id), set()).add(call.idempotency_key)
    return breaches + [f"{run} {step}: {len(found)} keys" for (run, step), found in keys.items() if len(found) > 1]


def ungoverned(facts: Facts) -> list[str]:
    """Nothing was entered that the ledger had not placed on that executor."""
    breaches = []
    for call in facts.calls:
        name = AttemptName(call.run_id, call.step_id, call.attempt)
        attempt = facts.books.attempts.get(name)
        if attempt is None or attempt.placement is None:
            breaches.append(f"{_said(name)}: entered, and never placed")
        elif attempt.placement.instance_id != call.instance_id:
            breaches.append(f"{_said(name)}: entered by {call.instance_id}, placed on {attempt.placement.instance_id}")
    return breaches


def broken_chains(facts: Facts) -> list[str]:
    """Both logs verify, and there is something in them."""
    empty = [] if facts.run_report.events and facts.ledger_report.events else ["a log is empty: nothing was verified"]
    return empty + facts.run_report.problems + facts.ledger_report.problems


def wrong_money(facts: Facts) -> list[str]:
    """The ledger agrees with itself, nothing is left set aside, and runs spent what the ledger says that they spent."""
    books = facts.books
    breaches = [str(problem) for problem in (*books.problems, *books.problems_at_rest())]
    for run_id, row in facts.rows.items():
        settled_micros = books.runs[run_id].settled_micros if run_id in books.runs else 0
        if row.spent_micros != settled_micros:
            breaches.append(f"{run_id}: {row.spent_micros} spent by its events, {settled_micros} by the ledger")
    return breaches


def wrong_tables(facts: Facts) -> list[str]:
    """ClickHouse has every event of both logs, and the same end of every run; the live view has, too."""
    breaches = [f"{run_id}: in ClickHouse, and not in the log" for run_id in facts.rows if run_id not in facts.runs]
    for run_id, run in facts.runs.items():
        row = facts.rows.get(run_id)
        if row is None:
            breaches.append(f"{run_id}: not in ClickHouse")
        elif (row.status, row.last_seq, row.events) != (run.status, run.seq, run.seq):
            breaches.append(
                f"{run_id}: {row.status} with {row.events} events up to {row.last_seq} in ClickHouse, "
                f"{run.status} with {run.seq} in the log"
            )
        if facts.live.get(run_id) != run.status:
            breaches.append(f"{run_id}: {facts.live.get(run_id, 'absent')} in the live view, {run.status} in the log")
    if facts.ledger_rows != facts.ledger_report.events:
        breaches.append(f"ledger: {facts.ledger_rows} events in ClickHouse, {facts.ledger_report.events} in the log")
    return breaches


def dead_letters(facts: Facts) -> list[str]:
    """Nothing that our own services wrote was refused; a customer's second thoughts may have been."""
    return [
        f"{letter.topic}-{letter.partition}@{letter.offset}: {letter.service} refused it: {letter.code}: {letter.reason}"
        for letter in facts.letters
        if letter.service not in REFUSED_COMMANDS or not letter.run_id
    ]


def crashed_processes(facts: Facts) -> list[str]:
    """Nobody died of a signal that nobody sent, and everybody runs. (To end with an exit code and begin afresh is allowed.)"""
    return list(facts.crashes)


def _said(name: AttemptName) -> str:
    return f"{name.run_id} {name.step_id}#{name.attempt}"


CHECKS: Final[dict[str, Callable[[Facts], list[str]]]] = {
    "lost runs": lost_runs,
    "doubled effects": doubled_effects,
    "entered without the gate": ungoverned,
    "broken chains": broken_chains,
    "wrong money": wrong_money,
    "tables that differ": wrong_tables,
    "our own records refused": dead_letters,
    "crashed processes": crashed_processes,
}


def breaches(facts: Facts) -> dict[str, list[str]]:
    """Return what every check found, the sound ones with nothing."""
    return {name: check(facts) for name, check in CHECKS.items()}
