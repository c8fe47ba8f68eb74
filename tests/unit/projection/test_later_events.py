"""Events that later versions write: all are in `events` and `ledger`; what they say of steps, runs and money is in the views."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tidegate.projection import migrations as module
from tidegate.projection import rows
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import Store
from tidegate.projection.tables import REBUILT_VIEWS

pytestmark = [pytest.mark.feature("O1"), pytest.mark.timeout(120)]
Event = tuple[str, dict[str, Any]]
AMOUNTS = {"input_tokens": 0, "output_tokens": 0, "calls": 0, "wall_ms": 0}
CALL = {"kind": "step", "function": "f", "queue": "q", "arguments": "1", "model": "m-1"}
STARTED: Event = ("RunStarted", {"workflow": "w@1", "input": "1", "budget_micros": None, "tags": {}})


def ready(step_id: str, **more: Any) -> Event:
    return "StepReady", {"step_id": step_id, "node_id": step_id, "wave": 0, "call": CALL, **more}


def about(name: str, step_id: str, attempt: int = 1, **more: Any) -> Event:
    return name, {"step_id": step_id, "attempt": attempt, **more}


def wait(step_id: str, kind: str, **more: Any) -> Event:
    return "WaitStarted", {"step_id": step_id, "node_id": step_id, "wave": 1, "kind": kind, "input": '"in"', **more}


def requested(name: str) -> Event:
    fields = {"why": "policy", "rule": "r", "policy": "p@1", "reason": "sure?", "arguments_hash": "h"}
    return about("ApprovalRequested", name, **fields, expires_at_ms=9_000_000)


RUNS: dict[str, list[Event]] = {
    "answered": [
        STARTED,
        wait("a", "ask", prompt="which?"),
        ("WaitEnded", {"step_id": "a", "outcome": "answered"}),
        about("StepSucceeded", "a", 0, output='"blue"', usage={}, incarnation=-1),
    ],
    "asking": [STARTED, wait("a", "ask", prompt="which?", due_ms=None, timeout_at_ms=7_000_000)],
    "listening": [STARTED, wait("a", "wait_event", event="paid", key="o-1")],
    "sleeping": [STARTED, wait("a", "sleep", due_ms=8_000_000)],
    "held": [STARTED, ready("a", held=True), ("RunPaused", {"by": "ann"})],
    "resumed": [
        STARTED,
        ready("a", held=True),
        ("RunPaused", {"by": "ann"}),
        ("RunResumed", {"by": "ann"}),
        about("AttemptRequested", "a", 1, call=CALL),
    ],
    "outside": [STARTED, wait("a", "outside", function="quote", prompt="what it costs", key="c1")],
    "held-again": [
        STARTED,
        ready("a"),
        about("AttemptEnded", "a", outcome="failed"),
        about("AttemptHeld", "a", 2, why="queue"),
    ],
    "expired": [
        STARTED,
        ready("a"),
        requested("a"),
        about("ApprovalExpired", "a", rule="r"),
        about("StepFailed", "a", code="expired"),
    ],
    "budget": [STARTED, ready("a"), about("AttemptAwaitsBudget", "a", reason="empty", until_ms=6_000_000)],
    "limit": [STARTED, ready("a"), about("StepThrottled", "a", cause="rate", reason="10|s", retry_at_ms=0)],
    "no-slot": [STARTED, ready("a"), about("StepThrottled", "a", cause="no_executor", reason="nobody", retry_at_ms=0)],
    "through": [
        STARTED,
        ready("a"),
        about("StepThrottled", "a", cause="rate", reason="10/s", retry_at_ms=0),
        about("AttemptDispatched", "a", instance_id="ex-1", incarnation=4),
    ],
    "parent": [
        STARTED,
        (
            "ChildStarted",
            {"step_id": "a", "node_id": "a", "wave": 0, "workflow": "inner@2", "input": '{"x":1}', "child_run_id": "c"},
        ),
    ],
    "parent-done": [
        STARTED,
        (
            "ChildStarted",
            {"step_id": "a", "node_id": "a", "wave": 0, "workflow": "inner@2", "input": "1", "child_run_id": "c"},
        ),
        ("ChildEnded", {"step_id": "a", "status": "succeeded", "output": "2", "code": "", "reason": ""}),
    ],
    "unheard-of": [STARTED, ("TideTurned", {"height_mm": 3})],
}


def facts() -> list[rows.Row]:
    found: list[rows.Row] = []
    for (run_id, events), offset in zip(RUNS.items(), itertools.count()):
        entry = {
            "subject": run_id,
            "account": "acme",
            "epoch": 0,
            "now_ms": 1_000 + offset,
            "cause": "",
            "first_seq": 1,
        }
        rows.add_run_events(found, {**entry, "events": events}, 0, offset)
    return found


def open_store(folder: Path) -> Store:
    return Store.open(ProjectionSettings(clickhouse_url=f"chdb://{folder}"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = open_store(tmp_path_factory.mktemp("later"))
    made.insert({rows.EVENTS: facts()})
    yield made
    made.close()


def test_steps_say_how_they_stand(store: Store) -> None:
    shown = {row[0]: row[1:] for row in store.rows("SELECT run_id, status, attempts, kind FROM steps")}

    assert shown == {
        "answered": ("succeeded", 0, "ask"),
        "asking": ("waiting", 0, "ask"),
        "listening": ("waiting", 0, "wait_event"),
        "outside": ("waiting", 0, "outside"),
        "sleeping": ("waiting", 0, "sleep"),
        "held": ("held", 0, "step"),
        "resumed": ("requested", 1, "step"),
        "held-again": ("held", 1, "step"),
        "expired": ("failed", 1, "step"),
        "budget": ("requested", 1, "step"),
        "limit": ("requested", 1, "step"),
        "no-slot": ("requested", 1, "step"),
        "through": ("dispatched", 1, "step"),
        "parent": ("in_child", 1, "workflow"),
        "parent-done": ("succeeded", 1, "workflow"),
    }
    assert store.rows("SELECT function, arguments, output FROM steps WHERE run_id = 'parent-done'") == [
        ("inner@2", "1", "2")
    ]
    assert store.rows("SELECT arguments, output FROM steps WHERE run_id = 'answered'") == [('"in"', '"blue"')]
    assert store.rows("SELECT DISTINCT model FROM steps WHERE kind = 'step'") == [("m-1",)]


def test_waits_say_what_for_until_when_and_why(store: Store) -> None:
    query = "SELECT run_id, waits_for, toInt64(toUnixTimestamp64Milli(due_at)), detail FROM waits"

    assert {row[0]: row[1:] for row in store.rows(query)} == {
        "asking": ("answer", 7_000_000, "which?"),
        "listening": ("event", None, "paid o-1"),
        "outside": ("answer", None, "what it costs"),
        "sleeping": ("time", 8_000_000, " "),
        "held": ("resume", None, ""),
        "held-again": ("resume", None, ""),
        "resumed": ("gate", None, ""),
        "budget": ("budget", 6_000_000, "empty"),
        "limit": ("limit", None, "10|s"),
        "no-slot": ("executor", None, "nobody"),
        "through": ("function", None, ""),
        "parent": ("run", None, ""),
    }


def test_runs_wait_and_are_paused(store: Store) -> None:
    shown = {row[0]: row[1:] for row in store.rows("SELECT run_id, status, paused FROM runs")}

    assert {run_id for run_id, (status, _) in shown.items() if status == "waiting"} == {
        "asking",
        "listening",
        "outside",
        "sleeping",
    }
    assert {run_id: paused for run_id, (_, paused) in shown.items() if paused} == {"held": "paused by ann"}


def test_attempts_that_were_never_asked_for_are_none_and_lapsed_questions_no_denials(store: Store) -> None:
    shown = {row[:2]: row[2] for row in store.rows("SELECT run_id, attempt, outcome FROM attempts")}

    assert shown == {
        ("resumed", 1): "requested",
        ("held-again", 1): "failed",
        ("expired", 1): "expired",
        ("budget", 1): "requested",
        ("limit", 1): "requested",
        ("no-slot", 1): "requested",
        ("through", 1): "dispatched",
    }
    query = "SELECT run_id, status, toInt64(toUnixTimestamp64Milli(expires_at)) FROM approvals"
    assert store.rows(query) == [("expired", "expired", 9_000_000)]


def test_an_event_that_nobody_has_heard_of_is_there_with_all_its_fields(store: Store) -> None:
    assert store.rows("SELECT seq, body FROM events WHERE type = 'TideTurned'") == [(2, '{"height_mm":3}')]


def test_what_an_older_projection_stored_of_them_is_merged_when_it_is_upgraded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = module.migrations()
    monkeypatch.setattr(module, "migrations", lambda: everything[:7])
    older = Store.open(ProjectionSettings(clickhouse_url=f"chdb://{store_path(store)}", clickhouse_database="older"))
    older.insert({rows.EVENTS: [*facts(), *facts()]})
    older.close()
    monkeypatch.undo()

    upgraded = Store.open(ProjectionSettings(clickhouse_url=f"chdb://{store_path(store)}", clickhouse_database="older"))
    try:
        for view in REBUILT_VIEWS:
            # A step that was held was taken for requested: see the migration.
            where = (
                "WHERE NOT has(['held', 'held-again', 'resumed'], run_id)"
                if view in ("steps", "attempts", "waits")
                else ""
            )
            query = f"SELECT * FROM {view} {where} ORDER BY ALL"
            assert upgraded.rows(query) == store.rows(query), view
    finally:
        upgraded.close()


def store_path(store: Store) -> str:
    ((path,),) = store.rows("SELECT path FROM system.disks WHERE name = 'default'")
    return str(path).removesuffix("/")


def test_budgets_of_accounts_are_what_their_buckets_hold(store: Store) -> None:
    def money(micros: int) -> dict[str, int]:
        return {"micros": micros, **AMOUNTS}

    bucket = {"account": "acme", "bucket": "monthly|acme|2026-11"}
    limits = {"micros": 1_000, "input_tokens": None, "output_tokens": None, "calls": None, "wall_ms": None}
    begun = {"budget": "monthly", "version": "1", "limits": limits, "on_exceed": "deny", "from_ms": 1, "until_ms": 9}
    attempt = {"run_id": "r", "step_id": "s", "attempt": 1, "account": "acme/support"}
    settled = {"buckets": [bucket["bucket"]], "used": money(0)}
    counted = {"counts": True, "buckets": [bucket["bucket"], "other|acme|total"]}
    events: list[Event] = [
        ("BudgetSet", {**bucket, **begun}),
        ("BudgetReserved", {**bucket, **attempt, "amounts": money(300)}),
        ("BudgetReserved", {**bucket, **attempt, "attempt": 2, "amounts": money(500)}),
        ("BudgetSettled", {**bucket, **attempt, "reserved": money(300), "used": money(210)}),
        ("BudgetSet", {**bucket, **begun, "version": "2", "limits": {**limits, "micros": 2_000}}),
        *(
            (
                "AttemptReserved",
                {**attempt, "attempt": number, "buckets": [bucket["bucket"]], "amounts": money(micros), **more},
            )
            for number, micros, more in (
                (2, 500, {}),
                (3, 70, {"counts": True}),
                (4, 40, {"counts": True}),
                (5, 1, counted),
            )
        ),
        ("AttemptSettled", {**attempt, "attempt": 1, "actual_micros": 210}),
        ("AttemptSettled", {**attempt, "attempt": 3, "actual_micros": 60, **settled, "set_aside": money(70)}),
        ("BudgetsReleased", {**attempt, "attempt": 4, **settled, "amounts": money(40)}),
        ("AttemptGranted", {**attempt, "attempt": 6, "buckets": [bucket["bucket"]], "amounts": money(9)}),
        ("AttemptGranted", {**attempt, "attempt": 7, "buckets": [bucket["bucket"]], "amounts": money(5)}),
        ("AttemptSettled", {**attempt, "attempt": 7, "actual_micros": 4, **settled, "set_aside": money(5)}),
    ]
    found: list[rows.Row] = []
    rows.add_ledger_events(found, {"epoch": 0, "now_ms": 5, "cause": "", "first_seq": 1, "events": events}, 3, 0)
    for _ in range(2):  # doubled, in a batch and in another one
        store.insert({rows.LEDGER: [*found, *found]})

    query = (
        "SELECT bucket, account, version, limit_micros, reserved_micros, spent_micros, is_closed FROM account_budgets"
    )
    assert store.rows(f"{query} WHERE bucket = '{bucket['bucket']}'") == [
        (bucket["bucket"], "acme", "2", 2_000, 510, 274, 0)
    ]
    assert store.rows(f"{query} WHERE bucket != '{bucket['bucket']}'") == [("other|acme|total", "", "", None, 1, 0, 0)]
    assert (
        json.loads(store.rows("SELECT body FROM ledger WHERE type = 'BudgetReserved' ORDER BY seq")[0][0])["amounts"][
            "micros"
        ]
        == 300
    )
    spent = store.rows("SELECT settled_micros, reserved_micros FROM budgets WHERE run_id = 'r'")
    assert spent == [(274, 0)], "what buckets hold is not counted for the run once more"


def test_a_grant_counts_as_the_reservation_and_the_placement_that_it_is(store: Store) -> None:
    """Also beside those of attempts that waited in between, and of ledgers of before."""
    names = {"run_id": "granted", "step_id": "s", "account": "acme"}
    placed = {"rule": "default", "instance_id": "worker-1", "incarnation": 7, "call": {"queue": "granted-queue"}}
    events: list[Event] = [
        ("RunOpened", {"run_id": "granted", "account": "acme", "budget_micros": 100}),
        ("AttemptGranted", {**names, "attempt": 1, "reserved_micros": 30, **placed}),
        ("AttemptReserved", {**names, "attempt": 2, "reserved_micros": 20}),
        ("AttemptQueued", {**names, "attempt": 2, "call": placed["call"]}),
        ("AttemptPlaced", {**names, "attempt": 2, "reserved_micros": 20, **placed}),
        ("AttemptGranted", {**names, "attempt": 3, "reserved_micros": 7, **placed}),
        ("AttemptSettled", {**names, "attempt": 3, "reserved_micros": 7, "actual_micros": 5}),
    ]
    found: list[rows.Row] = []
    now_ms = time.time_ns() // 1_000_000
    rows.add_ledger_events(found, {"epoch": 0, "now_ms": now_ms, "cause": "", "first_seq": 1, "events": events}, 9, 0)
    for _ in range(2):  # doubled, in a batch and in another one
        store.insert({rows.LEDGER: [*found, *found]})

    columns = "budget_micros, reserved_micros, settled_micros"
    assert store.rows(f"SELECT {columns} FROM budgets WHERE run_id = 'granted'") == [(100, 50, 5)]
    columns = "attempt, decision, rule, instance_id, incarnation, reserved_micros"
    assert store.rows(f"SELECT {columns} FROM decisions WHERE run_id = 'granted' ORDER BY attempt") == [
        (number, "allow", "default", "worker-1", 7, micros) for number, micros in ((1, 30), (2, 20), (3, 7))
    ]
    ((queued, placed_now),) = store.rows(
        "SELECT round(queued_per_s * 60), round(placed_per_s * 60) FROM queues WHERE queue = 'granted-queue'"
    )
    assert (queued, placed_now) == (1, 3)


def test_what_only_the_gate_can_price_is_what_runs_steps_and_attempts_cost(store: Store) -> None:
    """A function that reports tokens and no amount: its result says 0, the ledger what the tokens cost."""
    ended = about("StepSucceeded", "a", output="1", usage={"input_tokens": 90}, actual_micros=0, incarnation=4)
    told: Event = "StepSucceeded", {**ended[1], "step_id": "b", "actual_micros": 30}
    events = [STARTED, ready("a"), ended, ready("b"), told]
    entry = {"subject": "priced", "account": "acme", "epoch": 0, "now_ms": 1, "cause": "", "first_seq": 1}
    found: list[rows.Row] = []
    rows.add_run_events(found, {**entry, "events": events}, 0, 900)
    settled = {"run_id": "priced", "account": "acme", "attempt": 1}
    ledger: list[Event] = [
        ("AttemptSettled", {**settled, "step_id": "a", "actual_micros": 78, "basis": "price:openai:m-1"}),
        ("AttemptSettled", {**settled, "step_id": "b", "actual_micros": 30}),
    ]
    money: list[rows.Row] = []
    rows.add_ledger_events(money, {**entry, "events": ledger}, 1, 0)
    for _ in range(2):  # doubled, and in both orders
        store.insert({rows.LEDGER: money})
        store.insert({rows.EVENTS: found})

    of = "WHERE run_id = 'priced'"
    assert store.rows(f"SELECT spent_micros FROM runs {of}") == [(108,)]
    assert store.rows(f"SELECT step_id, spent_micros FROM steps {of} ORDER BY 1") == [("a", 78), ("b", 30)]
    assert store.rows(f"SELECT step_id, actual_micros FROM attempts {of} ORDER BY 1") == [("a", 78), ("b", 30)]
    assert store.rows(f"SELECT count() FROM runs {of} AND status = 'running'") == [(1,)]


def test_the_retry_rule_that_counted_a_failure_is_named_whatever_came_first(store: Store) -> None:
    more = {"retry_rule": "model", "retry_document": "models@2", "retry_at_ms": 9, "code_version": "v7"}
    failed = about("AttemptEnded", "a", outcome="failed", error_class="RateLimited", **more)
    plain = about("AttemptEnded", "b", outcome="failed", error_class="Boom")
    plain = (plain[0], {**plain[1], "step_id": "b"})
    entry = {"subject": "retried", "account": "acme", "epoch": 0, "now_ms": 1, "cause": "", "first_seq": 1}
    found: list[rows.Row] = []
    rows.add_run_events(found, {**entry, "events": [STARTED, ready("a"), failed, ready("b"), plain]}, 0, 901)
    for part in (found[2:], found[:2], found):  # in another order, and doubled
        store.insert({rows.EVENTS: part})
    assert store.rows(
        "SELECT step_id, outcome, error_class, retry_rule, retry_document, code_version FROM attempts "
        "WHERE run_id = 'retried' ORDER BY 1"
    ) == [("a", "failed", "RateLimited", "model", "models@2", "v7"), ("b", "failed", "Boom", "", "", "")]


def test_a_call_of_an_outside_tool_is_an_attempt_and_then_waits_for_its_answer(store: Store) -> None:
    call = {"kind": "tool", "function": "quote", "queue": "", "arguments": '{"item":"tea"}', "model": ""}
    asked: Event = "StepReady", {**ready("a")[1], "call": call}
    entry = {"subject": "governed", "account": "acme", "epoch": 0, "now_ms": 1, "cause": "", "first_seq": 1}
    events = [STARTED, asked, about("AttemptDispatched", "a", instance_id="", incarnation=-1, reserved_micros=40)]
    shown = []
    for number, more in enumerate(([], [wait("a", "outside", function="quote")])):
        found: list[rows.Row] = []
        events += more
        rows.add_run_events(found, {**entry, "events": events}, 0, 902 + number)
        store.insert({rows.EVENTS: found})
        shown += store.rows("SELECT status, attempts, kind, function, queue FROM steps WHERE run_id = 'governed'")
    assert shown == [("dispatched", 1, "outside", "quote", ""), ("waiting", 1, "outside", "quote", "")]
    assert store.rows("SELECT outcome, reserved_micros, instance_id FROM attempts WHERE run_id = 'governed'") == [
        ("dispatched", 40, "")
    ]
