"""What a policy wants nobody to see: cut out of rows where the decision says so, and out of the views of what came before it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tidegate.projection import rows
from tidegate.projection.redaction import MARK, redact
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.store import Store

pytestmark = pytest.mark.feature("O1")
NUMBER = "4111-1111"
ARGUMENTS = json.dumps({"card": {"number": NUMBER, "name": "ann"}, "lines": [{"to": NUMBER}, {"to": NUMBER, "n": 1}]})


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], {"a": {"b": 1}, "c": [1, {"d": 2}]}),
        (["a"], {"a": MARK, "c": [1, {"d": 2}]}),
        (["a.b"], {"a": {"b": MARK}, "c": [1, {"d": 2}]}),
        (["c.1.d"], {"a": {"b": 1}, "c": [1, {"d": MARK}]}),
        (["c.*.d", "a.*"], {"a": {"b": MARK}, "c": [1, {"d": MARK}]}),
        (["*"], {"a": MARK, "c": MARK}),
        (["nowhere", "a.b.c", "c.9", "c.x", ""], {"a": {"b": 1}, "c": [1, {"d": 2}]}),
    ],
)
def test_a_path_hides_what_it_leads_to_and_nothing_else(paths: list[str], expected: Any) -> None:
    assert json.loads(redact('{"a":{"b":1},"c":[1,{"d":2}]}', paths)) == expected


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nul", '"\ud800"'])
def test_what_is_no_json_is_hidden_as_a_whole(text: str) -> None:
    assert redact(text, ["a"]) == MARK
    assert redact(text, []) == text


def call(**more: Any) -> dict[str, Any]:
    return {"run_id": "r", "step_id": "s", "attempt": 1, "call": {"kind": "tool", "arguments": ARGUMENTS}, **more}


def entry(*events: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"subject": "r", "account": "acme", "epoch": 0, "now_ms": 1, "cause": "", "first_seq": 1, "events": events}


@pytest.mark.parametrize("placing", ["AttemptGranted", "AttemptPlaced"])
def test_the_ledgers_row_comes_without_what_its_decision_redacts(placing: str) -> None:
    found: list[rows.Row] = []

    rows.add_ledger_events(found, entry((placing, call(redact=["card.number", "lines.*.to"]))), 0, 7)

    body = json.loads(bytes(found[0][rows.COLUMNS[rows.LEDGER].index("body")]))
    shown = json.loads(body["call"]["arguments"])
    assert shown == {"card": {"number": MARK, "name": "ann"}, "lines": [{"to": MARK}, {"to": MARK, "n": 1}]}
    assert NUMBER not in rows.encode(found).decode()


@pytest.mark.parametrize("ledger_first", [True, False])
def test_no_view_shows_what_was_redacted_whichever_log_is_read_first(tmp_path: Path, ledger_first: bool) -> None:
    events: list[rows.Row] = []
    rows.add_run_events(events, entry(("StepReady", call(node_id="s", wave=0)), ("AttemptRequested", call())), 0, 0)
    rows.add_run_events(events, entry(("StepReady", call(step_id="open", node_id="open", wave=0))), 0, 1)
    events[-1] = (events[-1][0], 3, *events[-1][2:])
    # As a call of a tool that is done outside: what it waits with are the arguments.
    waits = {
        "run_id": "r",
        "step_id": "s",
        "node_id": "s",
        "wave": 0,
        "kind": "outside",
        "key": "k",
        "input": ARGUMENTS,
    }
    rows.add_run_events(events, entry(("WaitStarted", waits), ("WaitStarted", waits | {"step_id": "open"})), 0, 2)
    events[-2:] = [(line[0], 4 + number, *line[2:]) for number, line in enumerate(events[-2:])]
    ledger: list[rows.Row] = []
    queued, placed = ("AttemptQueued", call()), ("AttemptPlaced", call(redact=["card.number", "lines.*.to"]))
    rows.add_ledger_events(ledger, entry(queued, placed), 0, 0)
    store = Store.open(ProjectionSettings(clickhouse_url=f"chdb://{tmp_path}"))
    try:
        inserts = [{rows.LEDGER: ledger}, {rows.EVENTS: events}]
        for tables in inserts if ledger_first else inserts[::-1]:
            store.insert(tables)

        for view in ("events", "ledger", "steps", "attempts", "approvals", "decisions", "waits"):
            query = f"SELECT count() FROM {view} WHERE step_id = 's' AND position(toString(tuple(*)), '{NUMBER}') > 0"
            assert store.rows(query) == [(0,)], view
        ((arguments,),) = store.rows("SELECT arguments FROM steps WHERE step_id = 's'")
        assert json.loads(arguments)["card"] == {"number": MARK, "name": "ann"}
        # Nothing was asked for the other step.
        assert store.rows("SELECT arguments FROM steps WHERE step_id = 'open'") == [(ARGUMENTS,)]
        ((body,),) = store.rows("SELECT body FROM events WHERE step_id = 's' AND type = 'StepReady'")
        assert json.loads(body)["call"] == {"kind": "tool", "arguments": MARK}
        shown = store.rows("SELECT step_id, body FROM events WHERE type = 'WaitStarted' ORDER BY step_id")
        assert [(step_id, json.loads(body)["input"]) for step_id, body in shown] == [("open", ARGUMENTS), ("s", MARK)]
        assert json.loads(shown[1][1]) == waits | {"input": MARK}
    finally:
        store.close()
