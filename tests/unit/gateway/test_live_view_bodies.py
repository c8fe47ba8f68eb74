"""What the live view answers: which runs, and what is said of them."""

from __future__ import annotations

import json

import msgspec
import pytest

from tidegate.gateway import web
from tidegate.gateway.figures import MINUTE_MS
from tidegate.gateway.view import LiveView, OpenApproval, RunRow, StepLine
from tidegate.gateway.web import newest, run_body, spend_body, summary


def row(run_id: str, started_ms: int, status: str = "running", workflow: str = "w@1", account: str = "acme") -> RunRow:
    return RunRow(run_id=run_id, started_ms=started_ms, status=status, workflow=workflow, account=account)


ROWS = [
    row("a", 10),
    row("b", 30, "failed", "w@2", "acme/shop"),
    row("c", 20, "waiting", "wide@1", "acmeville"),
    row("d", 30, "absent", "", ""),
    row("e", 30, "succeeded"),
]


@pytest.mark.feature("O4")
@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, "ebca"),
        ({"status": "failed"}, "b"),
        ({"status": "failed,waiting"}, "bc"),
        ({"status": "absent"}, "d"),
        ({"workflow": "w"}, "eba"),
        ({"workflow": "w@1"}, "ea"),
        ({"account": "acme"}, "eba"),
        ({"account": "acme/shop", "status": "running"}, ""),
        ({"since_ms": "20"}, "ebc"),
        ({"until_ms": "30"}, "ca"),
        ({"since_ms": "11", "until_ms": "30"}, "c"),
        ({"before": "30:b"}, "ca"),
        ({"before": "30:e"}, "bca"),
    ],
)
def test_the_newest_runs_that_fit(query: dict[str, str], found: str) -> None:
    assert "".join(one.run_id for one in newest(LiveView(ROWS), query, 10)) == found
    assert "".join(one.run_id for one in newest(LiveView(ROWS), query, 2)) == found[:2]


@pytest.mark.feature("O4")
def test_bodies_are_json_with_null_for_what_is_not_there() -> None:
    asked = OpenApproval(step_id="s", attempt=2, why="policy", rule="r", policy="p", reason="because", since_ms=5)
    one = RunRow(
        run_id="a", status="waiting", steps={"s": StepLine("awaiting_approval", 2, "e")}, approvals={"s": asked}
    )
    body = json.loads(msgspec.json.encode(run_body(one)))
    assert body["finished_ms"] is None
    assert body["output"] is None
    assert body["budget_micros"] is None
    assert body["open_approvals"] == 1
    assert body["steps"] == [
        {"step_id": "s", "status": "awaiting_approval", "attempt": 2, "error": "e", "waits_for": ""}
    ]
    assert body["approvals"] == [
        {
            "step_id": "s",
            "attempt": 2,
            "why": "policy",
            "rule": "r",
            "policy": "p",
            "reason": "because",
            "since_ms": 5,
            "expires_at_ms": 0,
            "arguments_hash": "",
            "question": "",
        }
    ]
    assert body.items() >= summary(one).items()
    assert {"steps", "approvals", "output"}.isdisjoint(summary(one))


@pytest.mark.feature("P2")
def test_spend_is_given_by_account_and_window_with_sums() -> None:
    body = spend_body({"b": {3: 5}, "a": {4: 1, 2: 7}}, 2)
    assert body["total_micros"] == 13
    assert body["since_ms"] == 2 * MINUTE_MS
    assert [account["account"] for account in body["accounts"]] == ["a", "b"]
    assert body["accounts"][0] == {
        "account": "a",
        "total_micros": 8,
        "windows": [{"start_ms": 2 * MINUTE_MS, "micros": 7}, {"start_ms": 4 * MINUTE_MS, "micros": 1}],
    }


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", " 1", "1.0", "1e3", "0x1", "²", "٣", "1001", "0" * 40 + "1", "9" * 5000]
)
def test_a_number_that_makes_no_sense_is_a_bad_request(text: str) -> None:
    with pytest.raises(web.BadRequestError, match="limit must be a whole number from 1 to 1000"):
        web._whole({"limit": text}, "limit", 50, 1, 1000)


def test_a_number_is_taken_or_its_default() -> None:
    assert web._whole({"limit": "1000"}, "limit", 50, 1, 1000) == 1000
    assert web._whole({}, "limit", 50, 1, 1000) == 50


@pytest.mark.feature("O4")
def test_pages_go_through_all_runs_once() -> None:
    rows = [row(f"run-{number}", number // 7) for number in range(100)]
    seen: list[str] = []
    before: str | None = ""
    while before is not None:
        page = [summary(one) for one in newest(LiveView(rows), {"before": before}, 9)]
        seen += [one["run_id"] for one in page]
        before = web._next_page(page, 9)
    assert len(seen) == len(set(seen)) == 100


@pytest.mark.parametrize("query", [{"before": "x"}, {"before": "soon:x"}, {"since_ms": "-1"}, {"until_ms": "now"}])
def test_places_that_make_no_sense_are_refused(query: dict[str, str]) -> None:
    with pytest.raises(web.BadRequestError):
        newest(LiveView(ROWS), query, 1)
