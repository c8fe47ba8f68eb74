"""A day of real runs, looked at: every panel of the dashboards, every query of the cookbook, and `tidegate top`.

What they must show is counted from the logs (`support/workload.py`), not from the tables.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import workload
from support.stack import WholeStack
from support.workload import (
    ANSWERED,
    ASKED,
    ASKS,
    CANCELLED,
    HOPELESS,
    LISTENS,
    NO_ROOM,
    OPEN,
    STUCK,
    TOO_DEAR,
    Day,
    play_day,
)
from tidegate.embedded import sql
from tidegate.projection.dashboards.boards import BOARDS
from tidegate.projection.dashboards.macros import ALL, Range, substituted
from tidegate.projection.dashboards.panels import Panel, query_of

pytestmark = [pytest.mark.timeout(300), pytest.mark.feature("O1")]
COOKBOOK = Path(__file__).parents[2] / "docs" / "sql-cookbook.md"
HOUR_S = 3600
Rows = list[dict[str, Any]]
Check = Callable[[Rows, Day], bool]
OVER = ("succeeded", "failed", "cancelled")
PLACING = ("AttemptGranted", "AttemptPlaced")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    services = ("scheduler", "gate", "projection")
    with WholeStack(tmp_path_factory.mktemp("looking"), services=services, slots=12) as stack:
        yield stack


@pytest.fixture(scope="module")
def day(whole: WholeStack, tmp_path_factory: pytest.TempPathFactory) -> Day:
    return play_day(whole, tmp_path_factory.mktemp("policy"))


def the(rows: Rows, **key: Any) -> dict[str, Any]:
    """Return the one row with these values."""
    (found,) = [row for row in rows if all(row[name] == value for name, value in key.items())]
    return found


def near(dollars: float, micros: int) -> bool:
    return round(dollars * 1_000_000) == micros


def total(rows: Rows, column: str) -> Any:
    return sum(row[column] for row in rows)


def counted(rows: Rows, name: str, count: str) -> Counter[str]:
    return Counter({row[name]: row[count] for row in rows})


def function_of(day: Day, run_id: str, step_id: str) -> str:
    (ready,) = [f for f in day.of("StepReady") if (f.run_id, f.event.step_id) == (run_id, step_id)]
    return str(ready.event.call.function)


def settled_by(day: Day, name: Callable[[Any], str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for fact in day.of("AttemptSettled"):
        found[name(fact)] += fact.event.actual_micros
    return found


def workflow_of(day: Day, run_id: str) -> str:
    (started,) = [fact for fact in day.of("RunStarted") if fact.run_id == run_id]
    return str(started.event.workflow).rpartition("@")[0]


def succeeded_calls(day: Day) -> Counter[str]:
    return Counter(function_of(day, f.run_id, f.event.step_id) for f in by_attempts(day))


def by_attempts(day: Day) -> list[Any]:
    """Return the steps that succeeded by an attempt; waits succeed without one."""
    return [fact for fact in day.of("StepSucceeded") if fact.event.attempt]


def ends(day: Day, *outcomes: str) -> int:
    return len([fact for fact in day.of("AttemptEnded") if fact.event.outcome in outcomes])


def asks(day: Day) -> int:
    return len(day.of("ApprovalRequested"))


def ended(day: Day, status: str) -> int:
    return len([fact for fact in day.of("RunFinished") if fact.event.status == status])


def placed(day: Day) -> int:
    return len(day.of(*PLACING))


def micros_by(rows: Rows, name: str) -> dict[str, int]:
    return {row[name]: round(row["spent"] * 1_000_000) for row in rows if row["spent"]}


def buckets(day: Day) -> set[tuple[str, str, int]]:
    """Return the budget, account and limit of every bucket."""
    return {(f.event.budget, f.event.account, f.event.limits.micros) for f in day.of("BudgetSet")}


def spent_in(day: Day, budget: str, account: str) -> int:
    """Return the micro-dollars that were spent in a bucket."""
    of = [budget, account]
    return sum(
        fact.event.actual_micros
        for fact in day.of("AttemptSettled")
        for bucket in fact.event.buckets
        if bucket.split("|")[:2] == of
    )


def latest_ms(day: Day) -> int:
    return max(fact.at_ms for fact in (*day.runs, *day.ledger))


CHECKS: dict[tuple[str, str], Check] = {
    ("operations", "Runs by status"): lambda rows, day: (
        counted(rows, "status", "runs") == Counter(day.statuses().values())
    ),
    ("operations", "Runs started and finished"): lambda rows, day: (
        (total(rows, "started"), total(rows, "finished")) == (len(day.of("RunStarted")), len(day.of("RunFinished")))
    ),
    ("operations", "Failed runs, share"): lambda rows, day: (
        len(rows) > 1 or rows[0]["failed"] == ended(day, "failed") / len(day.of("RunFinished"))
    ),
    ("operations", "Steps finished"): lambda rows, day: (
        [total(rows, name) for name in ("succeeded", "failed", "cancelled")]
        == [len(day.of(kind)) for kind in ("StepSucceeded", "StepFailed", "StepCancelled")]
    ),
    ("operations", "Duration of runs"): lambda rows, day: (
        max(row["p99"] for row in rows)
        == max(
            fact.at_ms - next(start.at_ms for start in day.of("RunStarted") if start.run_id == fact.run_id)
            for fact in day.of("RunFinished")
            if fact.event.status == "succeeded"
        )
    ),
    ("operations", "Why runs failed"): lambda rows, day: (
        the(rows, workflow="fail")["runs"] == 2
        and the(rows, workflow="chain", code="rejected")["run_id"] == workload.REJECTED
        and total(rows, "runs") == ended(day, "failed") + len(day.of("RunRefused"))
    ),
    ("operations", "Attempts by outcome"): lambda rows, day: (
        the(rows, outcome="failed")["attempts"] == ends(day, "failed")
    ),
    ("operations", "Accounts"): lambda rows, day: (
        (total(rows, "errors"), total(rows, "denied"))
        == (ends(day, "failed", "timed_out", "lost"), ends(day, "denied"))
        and total(rows, "attempts") == total(rows, "errors") + len(by_attempts(day))
        and near(total(rows, "spent"), day.spent())
        and the(rows, account="asked/interns")["denied"] == 1
    ),
    ("operations", "What everything waits for"): lambda rows, _: (
        sorted((row["for"], row["queue"]) for row in rows if row["steps"] == row["runs"] == 1)
        == [("answer", ""), ("approval", "default"), ("budget", "default"), ("event", ""), ("executor", "nobody")]
    ),
    ("operations", "Slowest functions"): lambda rows, day: (
        counted(rows, "function", "attempts") == succeeded_calls(day) and the(rows, function="dawdle")["longest"] >= 300
    ),
    ("operations", "Not over, quiet the longest"): lambda rows, _: (
        {row["run_id"]: row["status"] for row in rows}
        == {STUCK: "running", NO_ROOM: "running", OPEN: "waiting", ASKS: "waiting", LISTENS: "waiting"}
    ),
    ("operations", "Dead letters"): lambda rows, _: the(rows, code="malformed")["letters"] == 1,
    ("operations", "Records the projection could not read"): lambda rows, _: rows[0]["records"] == 0,
    ("operations", "Latest runs"): lambda rows, day: (
        {row["run_id"] for row in rows} == set(day.statuses())
        and near(the(rows, run_id=TOO_DEAR)["spent"], day.spent(TOO_DEAR))
    ),
    ("spend", "Spent"): lambda rows, day: (
        near(rows[0]["spent"], day.spent())
        and near(rows[0]["beyond what was declared"], sum(f.event.overshoot_micros for f in day.of("AttemptSettled")))
    ),
    ("spend", "Set aside now"): lambda rows, day: near(
        rows[0]["set aside"],
        sum(f.event.reserved_micros for f in day.of("AttemptGranted", "AttemptReserved"))
        - sum(f.event.reserved_micros for f in day.of("AttemptSettled", "AttemptReleased")),
    ),
    ("spend", "Spend by account"): lambda rows, day: (
        settled_by(day, lambda fact: fact.event.account)
        == Counter(
            {
                name: sum(round(row["spent"] * 1_000_000) for row in rows if row["account"] == name)
                for name in {row["account"] for row in rows}
            }
        )
    ),
    ("spend", "Spend by workflow"): lambda rows, day: (
        micros_by(rows, "workflow") == +settled_by(day, lambda fact: workflow_of(day, fact.run_id))
    ),
    ("spend", "Spend by model"): lambda rows, day: near(total(rows, "spent"), day.spent()),
    ("spend", "Spend by function and tool"): lambda rows, day: (
        micros_by(rows, "function") == +settled_by(day, lambda fact: function_of(day, fact.run_id, fact.event.step_id))
        and the(rows, kind="tool")["function"] == "look"
    ),
    ("spend", "Usage"): lambda rows, day: (
        the(rows, what="input_tokens")["amount"]
        == sum(fact.event.usage.get("input_tokens", 0) for fact in day.of("StepSucceeded"))
        == 36
    ),
    ("spend", "Nearest to their budget"): lambda rows, day: (
        rows[0]["run_id"] == TOO_DEAR and rows[0]["used"] == day.spent(TOO_DEAR) / workload.RUN_BUDGET_MICROS
    ),
    ("spend", "Budgets of accounts"): lambda rows, day: (
        {(row["budget"], row["account"]): (round(row["spent"] * 1_000_000), row["limit"]) for row in rows}
        == {
            (budget, account): (spent_in(day, budget, account), limit / 1_000_000)
            for budget, account, limit in buckets(day)
        }
        and {row["until_at"] for row in rows} == {None}
        and len(rows) >= 8
    ),
    ("spend", "Stopped by a budget"): lambda rows, day: (
        {(row["run_id"], row["step_id"], row["rule"], row["decision"]) for row in rows}
        == {
            (f.run_id, f.event.step_id, f.event.rule, "deny" if f.name == "AttemptRefused" else "pause")
            for f in day.of("AttemptRefused", "AttemptPaused")
            if f.event.rule.partition(":")[0] == "budget"
        }
        and {row["rule"] for row in rows} == {"budget", "budget:strict", "budget:patient"}
    ),
    ("spend", "Dearest runs"): lambda rows, day: (
        (rows[0]["run_id"], round(rows[0]["spent"] * 1_000_000)) == (TOO_DEAR, day.spent(TOO_DEAR))
    ),
    ("approvals", "Waiting for a human"): lambda rows, day: (
        rows[0]["questions"]
        == asks(day) - len(day.of("ApprovalResolved")) + len({ASKS, ANSWERED}) - len(day.of("WaitEnded"))
        == 2
    ),
    ("approvals", "Time to an answer"): lambda rows, day: (
        rows[0]["p95"]
        == max(
            fact.at_ms - next(ask.at_ms for ask in day.of("ApprovalRequested") if ask.run_id == fact.run_id)
            for fact in day.of("ApprovalResolved")
        )
    ),
    ("approvals", "Open questions"): lambda rows, _: (
        {(row["run_id"], row["an"], row["policy"], row["arguments"], row["question"]) for row in rows}
        == {(OPEN, "approval", "day@7", "2", "somebody must look"), (ASKS, "answer", "", "", "How many?")}
    ),
    ("approvals", "Asked and answered"): lambda rows, day: (
        (total(rows, "asked"), total(rows, "answered")) == (asks(day), len(day.of("ApprovalResolved")))
    ),
    ("approvals", "Answers by person"): lambda rows, _: (
        [(row["answered_by"], row["approved"], row["rejected"]) for row in rows] == [("tester", 1, 1)]
    ),
    ("approvals", "Decisions"): lambda rows, day: (
        counted(rows, "decision", "decisions")
        == Counter(
            allow=placed(day),
            deny=len(day.of("AttemptRefused")),
            require_approval=len(day.of("ApprovalHeld")),
            throttle=len(day.of("AttemptThrottled")),
            pause=len(day.of("AttemptPaused")),
        )
    ),
    ("approvals", "Decisions by rule"): lambda rows, day: (
        the(rows, rule="not-for-interns")["decisions"] == 1
        and the(rows, rule="default")["decisions"] == placed(day) - 1
    ),
    ("approvals", "Denied"): lambda rows, day: (
        {(row["run_id"], row["reason"]) for row in rows}
        == {(fact.run_id, fact.event.reason) for fact in day.of("AttemptRefused")}
    ),
    ("executors", "Slots"): lambda rows, _: (rows[0]["slots"], rows[0]["busy"]) == (12, 0),
    ("executors", "Waiting for an executor"): lambda rows, day: (
        rows[0]["attempts"]
        == len({f.run_id for f in day.of("AttemptQueued")} - {f.run_id for f in day.of(*PLACING)})
        == 1
    ),
    ("executors", "Queues"): lambda rows, _: (
        the(rows, queue="nobody")["trouble"] == "nobody serves it" and the(rows, queue="default")["slots"] == 12
    ),
    ("executors", "Processes"): lambda rows, _: (
        Counter(row["service"] for row in rows) == Counter(["executor", "gate", "projection", "scheduler"])
    ),
    ("executors", "Attempts placed"): lambda rows, day: total(rows, "attempts") == placed(day),
    ("executors", "Wait for a slot"): lambda rows, day: (
        0 <= max(row["longest"] for row in rows) == max(fact.at_ms - _asked_ms(day, fact) for fact in day.of(*PLACING))
    ),
    ("executors", "Work by executor"): lambda rows, day: (
        the(rows, instance_id="executor-default-0")["succeeded"] == len(by_attempts(day))
        and rows[0]["attempts"] == placed(day)
    ),
    ("executors", "Retries"): lambda rows, day: (
        counted(rows, "function", "retries")
        == Counter(function_of(day, f.run_id, f.event.step_id) for f in day.of("AttemptRequested"))
    ),
    ("executors", "Attempts that did not succeed"): lambda rows, day: (
        {(row["run_id"], row["step_id"], row["attempt"]) for row in rows}
        == {
            (fact.run_id, fact.event.step_id, fact.event.attempt)
            for fact in day.of("AttemptEnded")
            if fact.event.outcome != "denied"
        }
    ),
    ("run", "The run"): lambda rows, day: (
        (rows[0]["status"], rows[0]["output"]) == ("succeeded", '{"n":4}') and near(rows[0]["spent"], day.spent(ASKED))
    ),
    ("run", "Time line"): lambda rows, _: (
        [row["state"] for row in rows if row["step"] == "two #1" and row["state"] != "running"]
        == ["asked for", "asks a human", "answered", "succeeded"]
    ),
    ("run", "Steps"): lambda rows, _: (
        [(r["step_id"], r["arguments"], r["output"]) for r in rows]
        == [("one", "1", "2"), ("two", "2", "4"), ("three", "4", '{"n":4}')]
    ),
    ("run", "Attempts"): lambda rows, day: (
        [(row["step_id"], row["attempt"], row["outcome"]) for row in rows]
        == [(f.event.step_id, f.event.attempt, "succeeded") for f in day.of("StepSucceeded") if f.run_id == ASKED]
    ),
    ("run", "Cost by step"): lambda rows, _: micros_by(rows, "step_id") == {"three": 30, "two": 15, "one": 10},
    ("run", "Money"): lambda rows, day: near(rows[0]["spent"], day.spent(ASKED)) and rows[0]["set aside"] == 0,
    ("run", "Decisions"): lambda rows, _: (
        [row["decision"] for row in rows if row["step_id"] == "two"] == ["require_approval", "allow"]
    ),
    ("run", "Events"): lambda rows, day: (
        [row["type"] for row in rows] == [fact.name for fact in day.runs if fact.run_id == ASKED]
    ),
}


def _asked_ms(day: Day, placed_fact: Any) -> int:
    """Return when an attempt that was placed had been asked for."""
    name = (placed_fact.run_id, placed_fact.event.step_id)
    asked = [f for f in day.of("StepReady", "AttemptRequested") if (f.run_id, f.event.step_id) == name]
    (found,) = [f.at_ms for f in asked if getattr(f.event, "attempt", 1) == placed_fact.event.attempt]
    return found


def ask_panel(day: Day, panel: Panel, accounts: list[str]) -> Rows:
    now_s = int(time.time())
    variables = {"database": "tidegate", "account": accounts, "run_id": ASKED}
    shown = Range(now_s - 6 * HOUR_S, now_s + 1, HOUR_S)
    return sql.query(day.data_dir, substituted(query_of(panel), shown, variables))


def holds(check: Check, rows: Rows, day: Day) -> bool:
    with contextlib.suppress(ValueError, LookupError, TypeError, StopIteration):  # it looks for what is not there
        return check(rows, day)
    return False


def other(value: Any) -> Any:
    """Return a value of the same kind that is wrong: a check that holds with it checks nothing."""
    return value + 1 if isinstance(value, int | float) else f"{value}?"


PANELS = [(board.slug, panel) for board in BOARDS for panel in board.panels]


@pytest.mark.parametrize(("slug", "panel"), PANELS, ids=[f"{slug}: {panel.title}" for slug, panel in PANELS])
def test_every_panel_shows_what_the_logs_say(day: Day, slug: str, panel: Panel) -> None:
    rows = ask_panel(day, panel, [ALL])

    assert rows, "it shows nothing"
    check = CHECKS[slug, panel.title]
    assert check(rows, day), rows
    assert not holds(check, [{name: other(value) for name, value in row.items()} for row in rows], day)
    # Narrowed to accounts it shows some, too: never more, and none of other accounts.
    fewer = ask_panel(day, panel, ["asked/desk", "asked/interns", "shop/eu", "lab/ml"])
    assert 0 < len(fewer) <= len(rows)
    assert "shop/us" not in {row.get("account") for row in fewer} or ":scope" not in panel.sql


def test_every_panel_has_a_check_and_every_check_a_panel() -> None:
    assert set(CHECKS) == {(slug, panel.title) for slug, panel in PANELS}


@pytest.mark.parametrize("board", BOARDS, ids=[board.slug for board in BOARDS])
def test_every_board_says_how_fresh_it_is(day: Day, board: Any) -> None:
    (row,) = ask_panel(day, board.all_panels[0], [ALL])

    latest = sql.query(day.data_dir, "SELECT toUnixTimestamp64Milli(max(last_event_at)) AS ms FROM freshness")
    assert latest[0]["ms"] >= latest_ms(day)
    assert row["records behind"] == 0
    assert 0 <= row["tables written before"] < 60


def recipes() -> dict[str, str]:
    """Return the queries of the cookbook by their questions."""
    text = COOKBOOK.read_text(encoding="utf-8")
    return dict(re.findall(r"^### (.+?)\n(?:(?!^###).)*?```sql\n(.*?)```", text, re.DOTALL | re.MULTILINE))


ANSWERS: dict[str, Check] = {
    "Who spends most": lambda rows, day: (
        {row["account"]: round(row["dollars"] * 1_000_000) for row in rows}
        == dict(settled_by(day, lambda fact: fact.event.account))
    ),
    "What does each workflow cost per day": lambda rows, day: near(
        the(rows, workflow="chain")["dollars"], settled_by(day, lambda fact: workflow_of(day, fact.run_id))["chain"]
    ),
    "Which models and services refuse us, and which rules wait for them": lambda rows, _: (
        [(row["rule"], row["failures"], row["given_up"]) for row in rows] == [("OSError", 10, 0)]
    ),
    "Which tools cost most": lambda rows, _: [(row["tool"], row["attempts"]) for row in rows] == [("look", 3)],
    "What was spent for nothing": lambda rows, day: near(
        the(rows, function="fail", outcome="failed")["dollars"], day.spent(HOPELESS) + day.spent("day-fail-1")
    ),
    "Which functions cost more than they declare": lambda rows, _: [row["function"] for row in rows] == ["dear"],
    "Do the two logs agree about the money": lambda rows, day: (
        (rows[0]["runs"], rows[0]["differ"]) == (len(day.of("RunFinished")), 0)
    ),
    "Whom did a budget stop": lambda rows, _: (
        {(row["run_id"], row["rule"]) for row in rows}
        == {(TOO_DEAR, "budget"), (workload.THIN, "budget:strict"), (NO_ROOM, "budget:patient")}
    ),
    "How far do the budgets of accounts go": lambda rows, day: (
        the(rows, budget="strict", account="thin/strict")["spent_micros"] == day.spent(workload.THIN)
        and len(rows) == len(buckets(day))
    ),
    "Why do runs fail": lambda rows, day: total(rows, "runs") == ended(day, "failed") + len(day.of("RunRefused")),
    "Is a new version better": lambda rows, day: (
        total(rows, "runs") == len(day.of("RunFinished"))
        and round(sum(row["failed"] * row["runs"] for row in rows)) == ended(day, "failed")
    ),
    "What do functions raise": lambda rows, _: the(rows, raised="OSError")["attempts"] == 10,
    "Which functions need retries": lambda rows, day: (
        total(rows, "attempts") == len(day.of("StepReady", "AttemptRequested", "ChildStarted"))
    ),
    "What was asked for and refused": lambda rows, _: [row["run_id"] for row in rows] == ["day-refused"],
    "Which runs are stuck, and on what": lambda rows, _: (
        {(row["run_id"], row["waits_for"]) for row in rows}
        == {(OPEN, "approval"), (STUCK, "executor"), (ASKS, "answer"), (LISTENS, "event"), (NO_ROOM, "budget")}
    ),
    "Whom are we waiting for": lambda rows, _: (
        {(row["run_id"], row["step_id"]) for row in rows} == {(OPEN, "two"), (ASKS, "w")}
    ),
    "Who approved what": lambda rows, _: (
        {(row["run_id"], row["status"]) for row in rows} == {(ASKED, "approved"), (workload.REJECTED, "rejected")}
    ),
    "What did a policy deny": lambda rows, _: [row["run_id"] for row in rows] == [workload.DENIED],
    "How often does each rule decide": lambda rows, day: (
        total(rows, "decisions")
        == len(day.of(*PLACING, "AttemptRefused", "ApprovalHeld", "AttemptThrottled", "AttemptPaused"))
    ),
    "How many slots are free now": lambda rows, _: [(row["queue"], row["free"]) for row in rows] == [("default", 12)],
    "Which queues does nobody serve": lambda rows, _: [(r["queue"], r["waiting"]) for r in rows] == [("nobody", 1)],
    "What happened in it": lambda rows, day: len(rows) == len([fact for fact in day.runs if fact.run_id == ASKED]),
    "How fresh are the tables": lambda rows, _: the(rows, topic="run-events")["records_behind"] == 0,
}


@pytest.mark.parametrize("question", list(recipes()))
def test_every_recipe_of_the_cookbook_answers(day: Day, question: str) -> None:
    query = recipes()[question].replace("'RUN'", f"'{ASKED}'").replace("INTERVAL 10 MINUTE", "INTERVAL -1 MINUTE")

    rows = sql.query(day.data_dir, query)

    assert rows, "it answers nothing"
    assert ANSWERS.get(question, lambda *_: True)(rows, day), rows


def test_the_cookbook_is_read_as_a_whole() -> None:
    assert len(recipes()) == COOKBOOK.read_text(encoding="utf-8").count("```sql") >= 20
    assert set(ANSWERS) <= set(recipes())


def test_runs_and_steps_stand_as_the_folded_log_says(day: Day) -> None:
    runs = {row["run_id"]: row for row in sql.query(day.data_dir, "SELECT run_id, status, last_seq FROM runs")}
    steps = sql.query(day.data_dir, "SELECT run_id, step_id, status, attempts FROM steps")

    assert {name: (row["status"], row["last_seq"]) for name, row in runs.items()} == {
        name: (run.status, run.seq) for name, run in day.folded.items()
    }
    assert {(row["run_id"], row["step_id"]): (row["status"], row["attempts"]) for row in steps} == {
        (name, step.step_id): (step.status, step.attempt)
        for name, run in day.folded.items()
        for step in run.steps.values()
    }


def test_what_is_waited_for_is_said_and_what_is_cancelled_is_waited_for_no_longer(day: Day) -> None:
    query = "SELECT run_id, waits_for, detail, due_at IS NULL AS is_open FROM waits"
    found = {row["run_id"]: row for row in sql.query(day.data_dir, query)}

    assert {run_id: row["waits_for"] for run_id, row in found.items()} == {
        OPEN: "approval",
        STUCK: "executor",
        ASKS: "answer",
        LISTENS: "event",
        NO_ROOM: "budget",
    }
    assert (found[ASKS]["detail"], found[ASKS]["is_open"]) == ("How many?", 1)
    assert (found[LISTENS]["detail"], found[LISTENS]["is_open"]) == ("paid 7", 0)
    assert day.statuses()[CANCELLED] == "cancelled"
    paused = sql.query(day.data_dir, "SELECT run_id, paused FROM runs WHERE paused != ''")
    assert paused == [{"run_id": LISTENS, "paused": "paused by tester"}]


def test_top_shows_the_same_in_a_terminal(whole: WholeStack, day: Day) -> None:
    where = ("--url", sql_url(day))
    found = json.loads(whole.cli("top", "--once", "--json", "--window", "3600", *where))

    standing = Counter(day.statuses().values())
    assert counted(found["runs"], "status", "runs") == standing
    assert found["throughput"]["steps_succeeded"] == len(day.of("StepSucceeded"))
    assert found["throughput"]["runs_failed"] == ended(day, "failed")
    assert found["throughput"]["attempts_failed"] == len(
        [fact for fact in day.of("AttemptEnded") if fact.event.outcome != "denied"]
    )
    spent = settled_by(day, lambda fact: fact.event.account)
    assert {row["account"]: row["total_micros"] for row in found["spend"]} == spent
    assert {row["account"]: row["window_micros"] for row in found["spend"]} == spent
    assert {(row["run_id"], row["waits_for"]) for row in found["approvals"]} == {(OPEN, "approval"), (ASKS, "answer")}
    assert [(row["instance_id"], row["slots"]) for row in found["executors"]] == [("executor-default-0", 12)]
    assert [(row["queue"], row["waiting"]) for row in found["queues"]] == [("nobody", 1)]
    assert {row["topic"]: row["lag"] for row in found["freshness"]}["run-events"] == 0
    page = whole.cli("top", "--once", *where)
    assert OPEN in page
    assert "somebody must look" in page


def sql_url(day: Day) -> str:
    return str(json.loads((day.data_dir / "sql.json").read_text(encoding="utf-8"))["url"])
