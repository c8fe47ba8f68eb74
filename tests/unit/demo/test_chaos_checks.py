"""Every check of the chaos demo says yes to what is right, and no to each way in which it can be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from support.logs import Decided, LogWriter, Story
from tidegate.audit.money import AttemptName, audit
from tidegate.demo.chaos.checks import CHECKS, Facts, Row, breaches
from tidegate.demo.chaos.provider import Call, Payment
from tidegate.domain.ledger_events import AttemptSettled, RunClosed
from tidegate.domain.messages import DeadLetter
from tidegate.eventlog.interface import Message
from tidegate.eventlog.verification import Report, verify_partition

# The app's functions that pay, by the names that the story's functions go by.
PAYS = "charge"


class Tale(Story):
    """Two runs that paid, one that a human rejected, one that was cancelled: all of them over."""

    def __init__(self) -> None:
        super().__init__("t")
        self.decided.clear()
        for number in range(2):
            self.play_plain(number)
        self.begin("rejected", "ask", account="umbrella/lab")
        self.command("t-rejected", "reject", by="ann", reason="no")
        run = self.begin("cancelled", "a")
        self.command(run, "cancel", by="bob")
        self.do(run, "cancelled", 3)


def messages_of(decided: list[Decided], topic: str) -> list[Message]:
    records = [record for record in LogWriter(1, 1).take(decided, trouble=0.0) if record.topic == topic]
    return [Message(r.topic, 0, offset, r.key, r.value, r.headers, 0) for offset, r in enumerate(records)]


def facts_of(decided: list[Decided]) -> Facts:
    """Return the facts as a demo would gather them from these logs."""
    runs_report, ledger_report = Report(), Report()
    runs = verify_partition(messages_of(decided, "run-events"), runs_report)
    ledger = messages_of(decided, "gate-ledger")
    verify_partition(ledger, ledger_report)
    books = audit([ledger])
    for run in runs.values():
        for step in run.steps.values():
            if step.step_id == "b":
                step.call = msgspec.structs.replace(step.call, function=PAYS)
    placed = [(name, attempt.placement) for name, attempt in books.attempts.items() if attempt.placement]
    paid = [name for name, _ in placed if name.step_id == "b"]
    return Facts(
        wanted={
            run_id: frozenset(
                {"start", *(["reject"] if "rejected" in run_id else ["cancel"] if "canc" in run_id else [])}
            )
            for run_id in runs
        },
        runs=runs,
        run_report=runs_report,
        ledger_report=ledger_report,
        books=books,
        calls=[Call(*name, placement.instance_id, f"{name.run_id}/{name.step_id}") for name, placement in placed],
        payments=[Payment(name.run_id, name.step_id, PAYS, 5, f"{name.run_id}/{name.step_id}") for name in paid],
        rows={
            run_id: Row(run.status, run.seq, run.seq, books.runs[run_id].settled_micros) for run_id, run in runs.items()
        },
        ledger_rows=ledger_report.events,
        live={run_id: run.status for run_id, run in runs.items()},
    )


DECIDED = Tale().decided
FIRST = "t-plain-0"


@pytest.fixture
def facts() -> Facts:
    return facts_of(copy.copy(DECIDED))


def found(facts: Facts) -> dict[str, list[str]]:
    return {name: breaches for name, breaches in breaches(facts).items() if breaches}


def test_what_is_right_is_right(facts: Facts) -> None:
    assert found(facts) == {}
    assert {run.status for run in facts.runs.values()} == {"succeeded", "failed", "cancelled"}
    assert len(facts.payments) == 2


Doctor = Callable[[Facts], Any]
DOCTORED: dict[str, tuple[Doctor, str, str]] = {
    "a run that is not in the log": (
        lambda f: setattr(f, "wanted", {**f.wanted, "gone": frozenset({"start"})}),
        "lost runs",
        "gone: asked for, and not in the log",
    ),
    "a run that does not end": (
        lambda f: setattr(f.runs[FIRST], "status", "running"),
        "lost runs",
        f"{FIRST}: still running",
    ),
    "a run that failed and should not have": (
        lambda f: (setattr(f.runs[FIRST], "status", "failed"), setattr(f.runs[FIRST], "code", "attempts_exhausted")),
        "lost runs",
        f"{FIRST}: failed, attempts_exhausted: ",
    ),
    "a rejection that nobody gave": (
        lambda f: setattr(f, "wanted", {**f.wanted, "t-rejected": frozenset({"start"})}),
        "lost runs",
        "t-rejected: failed, rejected: ",
    ),
    "a cancellation that nobody asked for": (
        lambda f: setattr(f, "wanted", {**f.wanted, "t-cancelled": frozenset({"start"})}),
        "lost runs",
        "t-cancelled: cancelled, ",
    ),
    "a run that nobody asked for": (
        lambda f: setattr(f, "wanted", {k: v for k, v in f.wanted.items() if k != FIRST}),
        "lost runs",
        f"{FIRST}: nobody asked for it",
    ),
    "a payment under two keys": (
        lambda f: f.payments.append(Payment(FIRST, "b", PAYS, 5, "another key")),
        "doubled effects",
        f"{FIRST}: {PAYS} paid 2 times",
    ),
    "a success without its payment": (
        lambda f: f.payments.pop(0),
        "doubled effects",
        f"{FIRST} b: succeeded, and nothing was paid",
    ),
    "an attempt that was entered twice": (
        lambda f: f.calls.append(f.calls[0]),
        "doubled effects",
        "#1: entered 2 times",
    ),
    "another key for another attempt": (
        lambda f: f.calls.append(f.calls[0]._replace(attempt=2, idempotency_key="other")),
        "doubled effects",
        ": 2 keys",
    ),
    "an attempt that the gate never saw": (
        lambda f: f.calls.append(Call(FIRST, "z", 1, "worker-0", "k")),
        "entered without the gate",
        f"{FIRST} z#1: entered, and never placed",
    ),
    "an attempt that was entered elsewhere": (
        lambda f: f.calls.append(f.calls.pop()._replace(instance_id="worker-9")),
        "entered without the gate",
        "entered by worker-9, placed on worker-0",
    ),
    "a log with nothing in it": (
        lambda f: setattr(f, "ledger_report", Report()),
        "broken chains",
        "a log is empty",
    ),
    "a run that spent what the ledger does not know": (
        lambda f: f.rows.update({FIRST: f.rows[FIRST]._replace(spent_micros=1)}),
        "wrong money",
        f"{FIRST}: 1 spent by its events, 900 by the ledger",
    ),
    "money that stays set aside": (
        lambda f: setattr(f.books.attempts[AttemptName(FIRST, "a", 1)], "status", "placed"),
        "wrong money",
        f"{FIRST} a#1: 1000 still set aside",
    ),
    "a run that ClickHouse does not have": (
        lambda f: f.rows.pop(FIRST),
        "tables that differ",
        f"{FIRST}: not in ClickHouse",
    ),
    "a run that only ClickHouse has": (
        lambda f: f.rows.update({"ghost": Row("succeeded", 1, 1, 0)}),
        "tables that differ",
        "ghost: in ClickHouse, and not in the log",
    ),
    "an event that ClickHouse does not have": (
        lambda f: f.rows.update({FIRST: f.rows[FIRST]._replace(events=3)}),
        "tables that differ",
        "with 3 events up to",
    ),
    "another end in ClickHouse": (
        lambda f: f.rows.update({FIRST: f.rows[FIRST]._replace(status="running")}),
        "tables that differ",
        f"{FIRST}: running with",
    ),
    "a ledger event that ClickHouse does not have": (
        lambda f: setattr(f, "ledger_rows", f.ledger_rows - 1),
        "tables that differ",
        "ledger: ",
    ),
    "another end in the live view": (
        lambda f: f.live.update({FIRST: "running"}),
        "tables that differ",
        f"{FIRST}: running in the live view, succeeded in the log",
    ),
    "a process that crashed": (
        lambda f: setattr(f, "crashes", ["gate-0: SIGSEGV"]),
        "crashed processes",
        "gate-0: SIGSEGV",
    ),
    "a run that the live view does not have": (
        lambda f: f.live.pop(FIRST),
        "tables that differ",
        f"{FIRST}: absent in the live view, succeeded in the log",
    ),
}


@pytest.mark.feature("D1")
@pytest.mark.parametrize("what", sorted(DOCTORED))
def test_what_is_wrong_is_found_and_named(facts: Facts, what: str) -> None:
    doctor, check, expected = DOCTORED[what]
    doctor(facts)
    lines = found(facts)
    assert check in lines
    assert any(expected in line for line in lines[check]), lines


@pytest.mark.feature("L2")
def test_a_broken_chain_is_found() -> None:
    messages = messages_of(DECIDED, "run-events")
    report = Report()
    verify_partition([message for number, message in enumerate(messages) if number != 3], report)
    whole = facts_of(DECIDED)
    whole.run_report = report
    assert found(whole).keys() == {"broken chains"}


@pytest.mark.feature("P2")
@pytest.mark.parametrize("kind", [AttemptSettled, RunClosed])
def test_a_wrong_balance_is_found(kind: type) -> None:
    field = "actual_micros" if kind is AttemptSettled else "settled_micros"
    doctored = list(DECIDED)
    for number, one in enumerate(doctored):
        wrong = [event for event in one.events if isinstance(event, kind)]
        if one.log == "gate-ledger" and wrong:
            changed = msgspec.structs.replace(wrong[0], **{field: getattr(wrong[0], field) + 1})
            doctored[number] = one._replace(events=tuple(changed if e is wrong[0] else e for e in one.events))
            break
    assert "wrong money" in found(facts_of(doctored))


@pytest.mark.parametrize(
    ("service", "run_id", "is_breach"), [("scheduler", "r", False), ("scheduler", "", True), ("gate", "r", True)]
)
def test_only_what_customers_wrote_may_have_been_refused(
    facts: Facts, service: str, run_id: str, is_breach: bool
) -> None:
    letter = DeadLetter(
        topic="run-requests",
        partition=0,
        offset=1,
        service=service,
        code="c",
        reason="r",
        run_id=run_id,
        original=b"",
        original_size=0,
        original_key=b"",
        headers={},
        at_ms=0,
    )
    facts.letters = [letter]
    assert bool(found(facts)) is is_breach


def test_every_check_was_seen_to_fail() -> None:
    seen = {check for _, check, _ in DOCTORED.values()}
    assert seen == CHECKS.keys() - {"our own records refused"}
