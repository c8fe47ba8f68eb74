"""`tidegate figures`: what it asks a gateway, what it shows, how it ends. A real one: `tests/integration/test_gateway.py`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tidegate.cli.figures import app
from tidegate.gateway.figures import Figures, Name
from tidegate.gateway.web import figures_body

pytestmark = pytest.mark.feature("O4")

HOUR = Figures(spent_micros=1_250_000, attempts=8, errors=2, denied=1, runs=4, failed_runs=1)
DAY = Figures(spent_micros=2_500_000, attempts=20, errors=2, denied=1, runs=9, failed_runs=1)


def answer(what: str, *names: Name) -> dict[str, Any]:
    found = {name: [Figures(), HOUR, DAY] for name in names}
    return {**figures_body(what, found, (5, 60, 1440), 0), "partitions_missing": []}


class Gateway:
    """Answers with what it was given, one after the other, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.asked: list[tuple[str, dict[str, list[str]]]] = []
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                gateway.asked.append((url.path, parse_qs(url.query)))
                status, body = gateway.answers.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def figures(self, *words: str) -> Result:
        return CliRunner().invoke(app, [*words, "--url", f"http://127.0.0.1:{self.server.server_port}"])

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.close()


def test_windows_with_nothing_in_them_are_left_out_and_all_together_is_last(gateway: Gateway) -> None:
    gateway.answers = [(200, answer("accounts", Name("account", "acme"), Name("account", "wayne")))]
    lines = [line.split() for line in gateway.figures("accounts").stdout.splitlines()]
    hour, day = (
        ["1", "h", "$1.25", "8", "2", "25.0%", "1", "4", "1"],
        ["24", "h", "$2.50", "20", "2", "10.0%", "1", "9", "1"],
    )
    assert lines[0] == ["account", "last", "spent", "attempts", "errors", "error", "rate", "denied", "runs", "failed"]
    assert lines[1:5] == [["acme", *hour], day, ["wayne", *hour], day]
    assert lines[5:] == [
        ["all", "together", "5", "min", "$0.00", "0", "0", "0", "0", "0"],
        ["all", "together", "1", "h", "$2.50", "16", "4", "25.0%", "2", "8", "2"],
        ["all", "together", "24", "h", "$5.00", "40", "4", "10.0%", "2", "18", "2"],
    ]
    assert gateway.asked == [("/v1/accounts", {})]


def test_functions_are_shown_with_what_they_were_called_as(gateway: Gateway) -> None:
    gateway.answers = [(200, answer("functions", Name("tool", "refund")))]
    found = gateway.figures("functions", "refund", "--kind", "tool", "--minutes", "90", "--until", "1970-01-01T02:00Z")
    assert [line.split() for line in found.stdout.splitlines()] == [
        ["function", "called", "as", "last", "spent", "attempts", "errors", "error", "rate", "denied"],
        ["refund", "tool", "1", "h", "$1.25", "8", "2", "25.0%", "1"],
        ["24", "h", "$2.50", "20", "2", "10.0%", "1"],
    ]
    assert gateway.asked == [("/v1/functions/refund", {"kind": ["tool"], "minutes": ["90"], "until_ms": ["7200000"]})]


def test_json_is_what_the_gateway_answers_and_a_view_that_is_being_restored_is_waited_for(gateway: Gateway) -> None:
    body = answer("accounts", Name("account", "acme/shop")) | {"partitions_missing": [3]}
    gateway.answers = [(503, {"code": "restoring", "message": "the live view is being restored"}), (200, body)]
    found = gateway.figures("accounts", "acme/shop", "--json")
    assert (found.exit_code, json.loads(found.stdout)) == (0, body)
    assert "being restored" in found.stderr
    assert "too small" in found.stderr
    assert gateway.asked == [("/v1/accounts/acme/shop", {})] * 2


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [(404, "nothing_counted", 4), (400, "bad_request", 2), (500, "broken", 3)],
)
def test_the_exit_code_says_why_there_is_nothing(gateway: Gateway, status: int, code: str, exit_code: int) -> None:
    gateway.answers = [(status, {"code": code, "message": "because it is so"})]
    found = gateway.figures("accounts", "acme")
    assert (found.exit_code, found.stdout) == (exit_code, "")
    assert "because it is so" in found.stderr


def test_a_time_that_is_none_is_not_asked_about(gateway: Gateway) -> None:
    found = gateway.figures("accounts", "--until", "yesterday")
    assert (found.exit_code, gateway.asked) == (2, [])
