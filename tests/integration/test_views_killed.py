"""The projection and the live view are killed again and again while a hundred runs are under way: they miss nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.stack import RUNS, WAIT_S, WholeStack, assert_whole, eventually, valid_entries
from tidegate.cli.addresses import AddressError, read_address
from tidegate.cli.live_view import LiveView, LiveViewError
from tidegate.embedded import sql

RUN_COUNT = 100
KILLS = 3
SERVICES = ("scheduler", "gate", "projection", "gateway")
ROWS = "SELECT run_id, status, spent_micros FROM runs ORDER BY run_id"
EVENTS = "SELECT run_id, count() AS n, uniqExact(seq) AS seqs, max(seq) AS last FROM events GROUP BY run_id"


def settled_runs(stack: WholeStack) -> list[dict[str, Any]] | None:
    """Return all runs as the live view has them; None while it is away, being restored, or behind."""
    try:
        url = read_address(stack.stack.data_dir / "gateway.json", "gateway")["url"]
        found: list[dict[str, Any]] = LiveView(url).runs({"limit": RUN_COUNT, "status": "succeeded"})["runs"]
    except (AddressError, LiveViewError):
        return None
    return found if len(found) == RUN_COUNT else None


@pytest.mark.feature("O1")
def test_views_that_are_killed_while_runs_are_going_show_all_of_them_once(tmp_path: Path) -> None:
    with WholeStack(tmp_path, services=SERVICES, slots=8) as stack:
        runs = [f"seen-{number}" for number in range(RUN_COUNT)]
        common = {"workflow": "busy", "input": 1, "budget_micros": 1_000}
        stack.requests([{**common, "run_id": run_id, "account": f"org{n % 8}/app"} for n, run_id in enumerate(runs)])
        for number in range(1, KILLS + 1):
            most = RUN_COUNT * 4 * number // (KILLS + 1)
            eventually(lambda most=most: len(stack.effects()) >= most, f"{most} effects")
            for name in ("projection-0", "gateway-0"):
                stack.kill(name)
            assert len(stack.effects()) < RUN_COUNT * 4, "all was over before the kill"
        eventually(lambda: len(stack.effects()) >= RUN_COUNT * 4, "all effects")
        stack.expect_any_pid(("projection-0", "gateway-0"))
        assert_whole(stack)
        ends = sql.log_ends(stack.broker)
        sql.wait_caught_up(stack.stack.data_dir, ends, WAIT_S)
        rows = {row["run_id"]: row for row in sql.query(stack.stack.data_dir, ROWS)}
        assert {run_id: row["status"] for run_id, row in rows.items()} == dict.fromkeys(runs, "succeeded")
        events = {row["run_id"]: row for row in sql.query(stack.stack.data_dir, EVENTS)}
        written = valid_entries(stack.log(RUNS)).values()
        lengths = {entry.subject: entry.first_seq + len(entry.events) - 1 for entry in written}
        for run_id in runs:
            row = events[run_id]
            assert int(row["n"]) == int(row["seqs"]) == int(row["last"]) == lengths[run_id]
        view = eventually(lambda: settled_runs(stack), "the live view of all runs")
        assert {run["run_id"]: run["status"] for run in view} == dict.fromkeys(runs, "succeeded")
        spent = {run["run_id"]: run["spent_micros"] for run in view}
        assert spent == {run_id: int(row["spent_micros"]) for run_id, row in rows.items()}
