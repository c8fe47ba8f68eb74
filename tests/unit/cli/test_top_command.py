"""`tidegate top`: what is on its page, and what it does without an answer. Real rows: `tests/integration/test_looking.py`."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tidegate.cli.sql_endpoint import SqlAddress, rows
from tidegate.cli.top import MAX_LINES, app, page

pytestmark = pytest.mark.feature("O1")


def snapshot(**parts: Any) -> dict[str, Any]:
    throughput = {"runs_started": 4, "runs_finished": 4, "runs_failed": 1, "steps_succeeded": 600}
    empty: dict[str, Any] = {name: [] for name in ("runs", "spend", "approvals", "executors", "queues", "freshness")}
    return {"window_s": 300, "throughput": throughput, **empty, **parts}


def shown(**parts: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(page(snapshot(**parts)))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def executor(name: str, queue: str) -> dict[str, Any]:
    return {"instance_id": name, "state": "ready", "queue": queue, "slots": 8, "busy": 3, "silent_s": 0}


def test_an_empty_system_has_a_page() -> None:
    assert shown().count("nothing") == 3


def test_rates_are_per_second_of_the_window_and_errors_a_share_of_what_ended() -> None:
    text = shown()

    assert "steps succeeded       600        2.00" in text
    assert "25.0%" in text


def test_a_queue_that_nobody_serves_is_there_and_one_that_is_served_counts_once() -> None:
    queues = [{"queue": "gpu", "waiting": 7, "oldest_s": 7_300}, {"queue": "default", "waiting": 2, "oldest_s": 1}]

    text = shown(executors=[executor("a", "default"), executor("b", "default")], queues=queues)

    lines = [line.split() for line in text.splitlines()]
    assert ["gpu", "nobody", "7,", "2", "h"] in lines
    assert ["default", "a", "ready", "3", "8", "0", "s", "2"] in lines
    assert ["default", "b", "ready", "3", "8", "0", "s"] in lines


def test_long_lists_are_cut_and_say_so() -> None:
    many = [
        {"account": f"a{number}", "window_micros": 1, "total_micros": 2_500_000, "reserved_micros": 0}
        for number in range(20)
    ]

    text = shown(spend=many)

    assert "2.500000" in text
    assert f"and {20 - MAX_LINES} more" in text
    assert f"a{MAX_LINES}" not in text


def test_text_of_others_is_not_markup() -> None:
    asked = {"run_id": "[red]r", "step_id": "s", "function": "f", "question": "[/] why [bold]", "waits_s": 59}

    text = shown(approvals=[asked])

    assert "[red]r" in text
    assert "[/] why [bold]" in text


def test_without_an_answer_it_says_where_it_asked_and_ends() -> None:
    done = CliRunner().invoke(app, ["--once", "--url", "http://127.0.0.1:9"])

    assert done.exit_code == 1
    assert "nothing answers at http://127.0.0.1:9" in done.output


def test_integers_are_integers_also_where_a_server_quotes_them() -> None:
    meta = [{"name": "a", "type": "Nullable(Int64)"}, {"name": "b", "type": "String"}, {"name": "c", "type": "UInt64"}]
    body = json.dumps(
        {"meta": meta, "data": [{"a": None, "b": "7", "c": "18446744073709551615"}, {"a": 1, "b": "", "c": 2}]}
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    try:
        found = rows(SqlAddress(f"http://127.0.0.1:{server.server_address[1]}", "tidegate", "test"), "SELECT 1")
    finally:
        thread.join()
        server.server_close()

    assert found == [{"a": None, "b": "7", "c": 2**64 - 1}, {"a": 1, "b": "", "c": 2}]


def freshness(missing: int) -> dict[str, Any]:
    return {"topic": "run-events", "last_event": None, "lag": 0, "missing": missing, "written_s_ago": 1}


def test_tables_that_lack_something_say_what_to_do() -> None:
    text = shown(freshness=[freshness(70)])
    assert "70" in text
    assert "tidegate replay projection --from earliest" in " ".join(text.split())
    assert "replay" not in shown(freshness=[freshness(0)])


def test_an_interval_is_a_time_that_ends() -> None:
    assert CliRunner().invoke(app, ["--interval", "inf"]).exit_code == 2
