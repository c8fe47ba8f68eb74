"""What the terminal shows of runs, and how commands end."""

from __future__ import annotations

import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from tidegate.cli import addresses, live_view, run_output, runs
from tidegate.cli.endings import EXIT_NO_ANSWER, exit_code, explained
from tidegate.cli.live_view import (
    URL_VARIABLE,
    BadQuestionError,
    LiveView,
    LiveViewError,
    NotReadyError,
    RestoringError,
    UnknownRunError,
)
from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gateway.view import OpenApproval, OpenWait, RunRow, StepLine
from tidegate.gateway.web import run_body
from tidegate.sdk.client import Event
from tidegate.sdk.errors import GraphError, RunNotFinishedError, RunNotFoundError

pytestmark = pytest.mark.feature("O4")


@pytest.mark.parametrize(
    ("micros", "shown"),
    [
        (0, "$0.00"),
        (1, "$0.000001"),
        (8800, "$0.0088"),
        (10_000, "$0.01"),
        (100_000, "$0.10"),
        (1_500_000, "$1.50"),
        (12_345_678, "$12.345678"),
        (-5, "-$0.000005"),
        (None, ""),
    ],
)
def test_money(micros: int | None, shown: str) -> None:
    assert run_output.money(micros) == shown


def test_an_event_is_one_line_with_what_a_person_wants_to_see() -> None:
    ended = ev.AttemptEnded(
        step_id="pay/1",
        attempt=2,
        outcome="failed",
        error_class="OSError",
        error_message="no\nluck " + "x" * 500,
        actual_micros=3,
        usage={},
        retry_at_ms=None,
        instance_id="e-0",
        incarnation=7,
    )
    text = run_output.time_line(Event(seq=4, at_ms=1500, type="AttemptEnded", data=ended), 1000).plain
    assert text.startswith(
        "    500 ms  AttemptEnded        pay/1 (attempt 2) instance_id=e-0 outcome=failed $0.000003 - no luck x"
    )
    assert text.endswith("…")
    assert "\n" not in text
    resolved = ev.ApprovalResolved(
        command_id="c", step_id="s", attempt=1, why="policy", approved=False, by="ann", reason="no", arguments_hash=""
    )
    shown = run_output.describe(Event(seq=1, at_ms=0, type="ApprovalResolved", data=resolved))
    assert shown == "s rejected why=policy by=ann - no"


def _signal(step_id: str) -> ev.SignalReceived:
    return ev.SignalReceived(command_id="c", event="paid", key=None, payload="1", by="", step_id=step_id)


def body(status: str = "running", seq: int = 1, **fields: Any) -> dict[str, Any]:
    """Return what the live view answers, as it comes out of its JSON."""
    made: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(run_body(RunRow(run_id="r", status=status, seq=seq, **fields)))
    )
    return made


def test_only_what_changed_is_told_and_everything_the_first_time() -> None:
    steps = {"a": StepLine("succeeded"), "b": StepLine("dispatched")}
    first = body(steps=steps)
    told = [line.plain for line in run_output.changes(None, first)]
    assert [line.split("  ", 1)[1] for line in told] == ["a  succeeded", "b  dispatched", "run r is running"]
    assert run_output.changes(first, first) == []

    asked = OpenApproval(step_id="c", attempt=1, why="policy", rule="big", policy="p", reason="too big", since_ms=0)
    second = body("waiting", 2, steps={**steps, "b": StepLine("backing_off", 2, "bad luck")}, approvals={"c": asked})
    told = [line.plain for line in run_output.changes(first, second)]
    assert told[0].endswith("b  backing_off (attempt 2) - bad luck")
    assert "c asks for approval" in told[1]
    assert "rule big of p: too big" in told[2]
    assert "tidegate approvals approve r c" in told[3]
    assert told[4].endswith("run r is waiting")

    third = body("waiting", 3, steps=second_steps(second), approvals={"c": asked}, cancel_requested=True)
    assert [line.plain.split("  ", 1)[1] for line in run_output.changes(second, third)] == ["cancel was asked for"]
    last = body("cancelled", 4, cancel_requested=True, code="cancelled", error="enough", spent_micros=5)
    (line,) = run_output.changes(third, last)
    assert line.plain.endswith("run r was cancelled, $0.000005 spent: cancelled: enough")


@pytest.mark.feature("D3")
def test_what_a_run_waits_for_is_told_with_how_to_answer_it() -> None:
    asked = OpenWait(
        step_id="w",
        kind="ask",
        prompt="Ship it?",
        choices=["yes", "no"],
        event="",
        key="",
        due_ms=0,
        timeout_at_ms=1,
        since_ms=0,
    )
    event = OpenWait(
        step_id="e",
        kind="wait_event",
        prompt="",
        choices=[],
        event="paid",
        key="7",
        due_ms=0,
        timeout_at_ms=0,
        since_ms=0,
    )
    outside = OpenWait(
        step_id="o",
        kind="outside",
        prompt="what it costs",
        choices=[],
        event="",
        key="c1",
        due_ms=0,
        timeout_at_ms=0,
        since_ms=0,
        function="quote",
        arguments='{"item":"tea"}',
    )
    line, how, *_ = run_output.changes(body(), body("waiting", waits={"o": outside}, waiting_count=1))
    assert line.plain == '  o waits for an answer of quote({"item":"tea"})'
    assert "tidegate runs respond r o --value JSON" in how.plain
    shown = body("waiting", waits={"w": asked, "e": event}, waiting_count=2, paused=True)
    told = [line.plain for line in run_output.changes(body(), shown)]
    assert told[0] == "  w asks: Ship it? (yes, no)"
    assert told[1].startswith("    given up 19")
    assert "tidegate runs respond r w --text" in told[2]
    assert told[3] == "  e waits for event paid with key 7"
    assert "tidegate runs signal r e" not in told[4]
    assert "tidegate runs signal r paid --key 7" in told[4]
    assert told[5].endswith("run r is paused")
    assert run_output.changes(shown, shown) == []
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(run_output.run_page(shown))
    console.print(run_output.runs_table([shown]))
    page = console.export_text()
    assert "waiting, paused" in page
    assert "2 open waits, paused" in page


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (ev.WaitEnded(step_id="w", outcome="answered", command_id="c"), "answered: w of run r"),
        (ev.WaitEnded(step_id="w", outcome="rejected", command_id="c"), "rejected: w of run r"),
        (_signal("w"), "paid: ends the wait of w"),
        (_signal(""), "paid: kept for what will wait for it"),
        (ev.RunPaused(command_id="c", by="", reason=""), "run r is paused"),
        (ev.RunResumed(command_id="c", by="", reason=""), "run r goes on"),
        (ev.RunCancelRequested(command_id="c", by="", reason=""), "run r is being cancelled"),
    ],
)
def test_what_came_of_a_command_is_a_line(event: Any, says: str) -> None:
    assert run_output.answer("r", Event(seq=1, at_ms=0, type=type(event).__name__, data=event)) == says


def second_steps(of: dict[str, Any]) -> dict[str, StepLine]:
    return {step["step_id"]: StepLine(step["status"], step["attempt"], step["error"]) for step in of["steps"]}


def test_every_status_of_a_run_has_an_exit_code_of_its_own() -> None:
    codes = {status: exit_code(status) for status in (*states.RUN_TERMINAL, states.RUNNING)}
    assert codes[states.SUCCEEDED] == 0
    assert len(set(codes.values())) == len(codes)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EventLogError("x"), 3),
        (LiveViewError("x"), 3),
        (UnknownRunError("x"), 4),
        (RunNotFoundError("x"), 4),
        (RunNotFinishedError("x"), 7),
        (GraphError("w@1", ["x", "y"]), 2),
    ],
)
def test_what_goes_wrong_is_a_line_and_an_exit_code(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as raised, explained("runs show"):
        raise error
    assert raised.value.exit_code == code
    assert capsys.readouterr().err.startswith("tidegate runs show: ")


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TIDEGATE_KAFKA_SECURITY_PROTOCOL", "none")
    with pytest.raises(typer.Exit) as raised, explained("runs start"):
        KafkaSettings()
    assert raised.value.exit_code == 2
    assert "TIDEGATE_KAFKA_SECURITY_PROTOCOL: Input should be" in capsys.readouterr().err


# --- asking the live view ---------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with what it is told to."""

    answer: tuple[int, bytes] = (200, b"{}")
    asked: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.asked.append(self.path)
        status, data = self.server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(addresses.DATA_DIR_VARIABLE, str(tmp_path))
    return tmp_path


def test_it_asks_at_the_address_that_the_gateway_wrote_at_that_moment(server: Server, data_dir: Path) -> None:
    view = LiveView()
    with pytest.raises(NotReadyError, match=r"no gateway has run here .*TIDEGATE_GATEWAY_URL"):
        view.run("r")
    (data_dir / "gateway.json").write_text(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}))
    server.answer = (200, b'{"seq": 3}')
    assert view.run("a/ä?", after_seq=2, wait_s=0.5) == {"seq": 3}
    assert server.asked == ["/v1/runs/a%2F%C3%A4%3F?after_seq=2&wait_ms=500"]
    (data_dir / "gateway.json").write_text("{")
    with pytest.raises(LiveViewError, match=r"gateway\.json cannot be read"):
        view.run("r")


@pytest.mark.parametrize(
    ("status", "data", "kind", "says"),
    [
        (404, b'{"code": "unknown_run", "message": "no r"}', UnknownRunError, "no r"),
        (503, b'{"code": "restoring", "message": "in a moment"}', RestoringError, "in a moment"),
        (400, b'{"code": "bad_request", "message": "wrong"}', BadQuestionError, "wrong"),
        (404, b"<html>", LiveViewError, "is it a gateway"),
        (200, b"<html>", LiveViewError, "does not answer as a gateway"),
        (200, b"[]", LiveViewError, "does not answer as a gateway"),
    ],
)
def test_every_answer_is_understood(server: Server, status: int, data: bytes, kind: type[Exception], says: str) -> None:
    server.answer = (status, data)
    with pytest.raises(kind, match=says) as raised:
        LiveView(f"http://127.0.0.1:{server.server_port}/").run("r")
    assert type(raised.value) is kind


def test_nobody_there_and_no_http() -> None:
    with pytest.raises(NotReadyError, match="Is the gateway running"):
        LiveView("http://127.0.0.1:1").runs({})
    with pytest.raises(LiveViewError, match="no http:// address"):
        LiveView("file:///etc/passwd").runs({})


class Restored:
    """A live view that is being restored for the first three questions of everybody."""

    asked = 0

    def __init__(self, url: str) -> None:
        assert url == ""

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        type(self).asked += 1
        if type(self).asked <= 3:
            raise RestoringError("being restored.")
        return body

    def runs(self, query: Any) -> dict[str, Any]:
        return self._answer({"runs": [], "next": None, "partitions_missing": []})

    def run(self, run_id: str, **_: Any) -> dict[str, Any]:
        return self._answer({"run_id": run_id, "seq": 1, "status": "succeeded"})


@pytest.mark.feature("O4")
@pytest.mark.parametrize("arguments", [["list"], ["show", "r"], ["watch", "r"]], ids=lambda arguments: arguments[0])
def test_a_live_view_that_is_being_restored_is_waited_for(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LiveView", Restored)
    for module in (runs, live_view):
        monkeypatch.setattr(module, "RETRY_S", 0.0)
    monkeypatch.setattr(Restored, "asked", 0)
    ended = CliRunner().invoke(runs.app, [*arguments, "--json"], env={URL_VARIABLE: ""})
    assert (ended.exit_code, Restored.asked) == (0, 4), ended.output
    assert ended.output.count("Waiting for it") <= 1
    assert json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.feature("O4")
def test_a_live_view_that_is_not_restored_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LiveView", Restored)
    monkeypatch.setattr(live_view, "GATEWAY_AWAY_S", -1.0)
    monkeypatch.setattr(Restored, "asked", 0)
    assert CliRunner().invoke(runs.app, ["list"], env={URL_VARIABLE: ""}).exit_code == EXIT_NO_ANSWER
