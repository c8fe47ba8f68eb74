"""A day in small: runs that end in every way, on a whole stack, and what its logs say of them.

What the tables should show is counted here from the logs alone, by code that shares nothing with the projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from support.stack import LEDGER, RUNS, WholeStack, assert_whole, eventually, valid_entries
from tidegate.domain.run import RunState
from tidegate.embedded import sql

ASKED, DENIED, OPEN, REJECTED = "day-asked", "day-denied", "day-open", "day-rejected"
THIN, NO_ROOM = "day-thin", "day-no-room"
STUCK, CANCELLED, TOO_DEAR, AGENT = "day-stuck", "day-cancelled", "day-dear", "day-confused-0"
HOPELESS, CHAIN = "day-fail-0", "day-chain-0"
ASKS, ANSWERED, LISTENS = "day-asks", "day-answered", "day-listens"
# Not over: one waits for an executor that does not exist, one for an answer, one for an event (and is paused), one for a budget.
UNFINISHED = frozenset({STUCK, ASKS, LISTENS, NO_ROOM})
WAITS = [
    {
        "name": name,
        "version": "1",
        "nodes": {"w": {"kind": kind, "wait": settings}, "one": {"kind": "step", "function": "one"}},
        "edges": [["w", "one"]],
        "functions": {"one": {"kind": "step"}},
    }
    for name, kind, settings in (
        ("asks", "ask", {"prompt": "How many?", "schema": {"type": "integer"}}),
        ("listens", "wait_event", {"event": "paid", "key": "${ string(input) }", "timeout_s": 3600}),
    )
]
INNER = {
    "name": "inner",
    "version": "1",
    "nodes": {"one": {"kind": "step", "function": "one"}},
    "edges": [],
    "functions": {"one": {"kind": "step"}},
}
OUTER = {
    "name": "outer",
    "version": "1",
    "nodes": {"w": {"kind": "workflow", "workflow": "inner@1"}},
    "edges": [],
    "functions": {},
    "workflows": {"inner@1": INNER},
}
ACCOUNTS = ("shop/eu", "shop/us", "lab/ml")
RUN_BUDGET_MICROS = 150
POLICY = """
policy: day
version: "7"
rules:
  - name: somebody-must-look
    when: account == 'asked/desk' && step == 'two'
    then: require_approval
    reason: somebody must look
  - name: not-for-interns
    when: account == 'asked/interns'
    then: deny
    reason: interns run nothing
---
kind: budget
budget: teams
version: "1"
account: "*/*"
limits: {money_micros: 1000000}
---
kind: budget
budget: strict
version: "3"
account: thin/strict
limits: {money_micros: 25}
---
kind: budget
budget: patient
version: "1"
account: thin/patient
limits: {money_micros: 25}
on_exceed: pause
"""


class Fact(NamedTuple):
    """An event of a log, as the log has it: its name and fields, when it was decided, and of which run."""

    name: str
    run_id: str
    at_ms: int
    event: Any


class Day(NamedTuple):
    """The facts of both logs, every zombie's left out, the runs that they come to, and where ClickHouse is asked."""

    runs: list[Fact]
    ledger: list[Fact]
    folded: dict[str, RunState]
    data_dir: Path

    def of(self, *names: str) -> list[Fact]:
        """Return the facts of these kinds, of both logs."""
        return [fact for fact in (*self.runs, *self.ledger) if fact.name in names]

    def statuses(self) -> dict[str, str]:
        """Return the run ids that were started or refused, and how they stand."""
        found = {fact.run_id: "running" for fact in self.of("RunStarted")}
        waiting = {(fact.run_id, fact.event.step_id) for fact in self.of("ApprovalRequested", "WaitStarted")}
        waiting -= {(fact.run_id, fact.event.step_id) for fact in self.of("ApprovalResolved", "WaitEnded")}
        found |= {run_id: "waiting" for run_id, _ in waiting}
        found |= {fact.run_id: "refused" for fact in self.of("RunRefused")}
        return found | {fact.run_id: fact.event.status for fact in self.of("RunFinished")}

    def spent(self, run_id: str = "") -> int:
        """Return what was settled (for a run), in micro-dollars."""
        return sum(fact.event.actual_micros for fact in self.of("AttemptSettled") if run_id in ("", fact.run_id))


def play_day(whole: WholeStack, folder: Path) -> Day:
    """Play the day and wait until all of it is in ClickHouse. Takes about ten seconds."""
    file = folder / "day.yaml"
    file.write_text(POLICY, encoding="utf-8")
    whole.cli("policy", "apply", str(file))
    whole.client.publish([*WAITS, OUTER])
    start = whole.client.start
    start("chain", 1, run_id=ASKED, account="asked/desk")
    start("chain", 1, run_id=REJECTED, account="asked/desk")
    start("chain", 1, run_id=OPEN, account="asked/desk")
    start("chain", 1, run_id=DENIED, account="asked/interns")
    start("chain", 1, run_id=THIN, account="thin/strict/app")
    start("chain", 1, run_id=NO_ROOM, account="thin/patient/app")
    start("never", None, run_id=STUCK, account="shop/eu", budget_micros=1_000)
    start("asks", 1, run_id=ASKS, account="lab/ml")
    start("asks", 1, run_id=ANSWERED, account="lab/ml")
    start("listens", 7, run_id=LISTENS, account="shop/eu")
    start("wait_here", 60.0, run_id=CANCELLED, account="shop/us")
    start("dear-twice", 200, run_id=TOO_DEAR, account="lab/ml", budget_micros=RUN_BUDGET_MICROS)
    names = [
        start("no-such-workflow", 1, run_id="day-refused", account="shop/eu"),
        start("outer", 4, run_id="day-outer", account="shop/us"),
    ]
    for number, (kind, name, given) in enumerate(_WORK):
        what = {"agent" if kind == "agent" else "workflow": name}
        run_id = f"day-{name}-{given}"
        account = ACCOUNTS[number % len(ACCOUNTS)]
        names.append(
            start(**what, input=given, run_id=run_id, account=account, budget_micros=10_000, tags={"team": "blue"})
        )
    letter = whole.produce("run-requests", b'{"workflow": "chain", ')
    for run_id, answer in ((ASKED, "approve"), (REJECTED, "reject")):
        whole.until(run_id, "ApprovalRequested")
        getattr(whole.client, answer)(run_id, "two", reason="I looked")
    whole.until(OPEN, "ApprovalRequested")
    whole.until(ASKS, "WaitStarted")
    whole.until(ANSWERED, "WaitStarted")
    whole.client.respond(ANSWERED, 3)
    whole.until(LISTENS, "WaitStarted")
    whole.client.pause(LISTENS, reason="not now")
    whole.until(LISTENS, "RunPaused")
    whole.until(CANCELLED, "AttemptDispatched")
    whole.client.cancel(CANCELLED, reason="not today")
    whole.until(NO_ROOM, "AttemptAwaitsBudget")
    for run_id in (ASKED, REJECTED, DENIED, CANCELLED, TOO_DEAR, ANSWERED, THIN, *names):
        whole.wait(run_id)
    whole.letter(letter)
    whole.until(STUCK, "StepThrottled")  # by then nothing more happens to it
    truth = assert_whole(whole, unfinished=UNFINISHED)
    data_dir = whole.stack.data_dir
    sql.wait_caught_up(data_dir, sql.log_ends(whole.broker), 60)
    eventually(lambda: sql.query(data_dir, "SELECT 1 FROM dead_letters"), "the dead letter's row")
    return Day(list(_facts(whole, RUNS)), list(_facts(whole, LEDGER)), truth.runs, data_dir)


_WORK = [
    *(("graph", "chain", number) for number in range(6)),
    *(("graph", "fail_twice", number) for number in range(3)),
    *(("graph", "fail", number) for number in range(2)),
    ("graph", "fail_for_good", 0),
    ("graph", "hang", 0),
    *(("graph", "busy", number) for number in range(2)),
    *(("agent", "confused", number) for number in range(3)),
]


def _facts(whole: WholeStack, topic: str) -> Iterator[Fact]:
    """Yield what a log says, partition by partition, in its order."""
    for (_, _), entry in valid_entries(whole.log(topic)).items():
        for event in entry.events:
            run_id = entry.subject if topic == RUNS else getattr(event, "run_id", "")
            yield Fact(type(event).__name__, run_id, entry.now_ms, event)
