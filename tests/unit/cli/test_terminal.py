"""What others wrote is shown in a terminal, and steers nothing; and every terminal can show it."""

from __future__ import annotations

import importlib
import io
import json
import pkgutil
import sys

import pytest
import rich.console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

import tidegate.cli
from tidegate.cli import __main__ as command_line
from tidegate.cli import run_output, sql_endpoint, terminal
from tidegate.cli.live_view import LiveView, LiveViewError
from tidegate.cli.sql_endpoint import SqlAddress, SqlError
from tidegate.cli.terminal import Console, harmless
from tidegate.domain import run_events as ev
from tidegate.sdk.client import Event

pytestmark = pytest.mark.feature("O4")

CLEAR, TITLE, C1, BACKWARDS = "\x1b[2J", "\x1b]0;mine\x07", "\x9b31m", "\u202egnp.exe"
# They print nothing that others wrote.
OWN_TEXTS = {"bench", "dev", "replay_offsets", "storm_screen", "terminal", "throttling_screen", "topics"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (CLEAR, r"\x1b[2J"),
        (TITLE, r"\x1b]0;mine\x07"),
        (C1, r"\x9b31m"),
        ("up\rover", r"up\rover"),
        (BACKWARDS, r"\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("tab\tline\nfeed", "tab\tline\nfeed"),
        ("äöü 😀 \u200d日本語\xa0", "äöü 😀 \u200d日本語\xa0"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown


@pytest.mark.parametrize("order", [CLEAR, TITLE, C1, BACKWARDS])
def test_a_console_shows_it_in_every_place_and_keeps_its_own_styles(order: str) -> None:
    paper = io.StringIO()
    console = Console(file=paper, force_terminal=True, width=200, color_system="standard", highlight=False)
    table = Table(f"a column's name {order}", box=None)
    table.add_row(Text(f"a cell of a table {order}"))
    console.print(order, Text(f"a {order}", style="red"), table, markup=False)
    shown = paper.getvalue()
    assert "\x1b[31ma " in shown
    for text in (order, "\x1b[2J", "\x1b]", "\x9b", "\u202e"):
        assert text not in shown
    assert shown.replace("\x1b[0m", "").count(harmless(order)[:4]) == 4


def test_what_is_written_out_pushes_nothing_out_of_its_column() -> None:
    paper = io.StringIO()
    table = Table("reason", box=None)
    table.add_row(Text("\x1b" * 40 + "pays 1,000,000", overflow="fold"))
    Console(file=paper, width=60).print(table)
    assert "pays1,000,000" in "".join(paper.getvalue().split())


def test_an_event_of_a_run_does_not_clear_the_page() -> None:
    paper = io.StringIO()
    why = {"code": "invalid", "reason": f"{CLEAR}all is well"}
    refused = ev.RunRefused(command_id="c", content_hash="", source="", original=b"", **why)
    line = run_output.time_line(Event(seq=1, at_ms=0, type="RunRefused", data=refused), 0)
    Console(file=paper, force_terminal=True, width=200).print(line)
    assert r"\x1b[2Jall is well" in paper.getvalue()
    assert CLEAR not in paper.getvalue()


def test_commands_that_show_texts_of_others_have_such_a_console() -> None:
    plain = set()
    for module in pkgutil.iter_modules(tidegate.cli.__path__):
        if module.name != "__main__":
            console = getattr(importlib.import_module(f"tidegate.cli.{module.name}"), "Console", terminal.Console)
            plain |= {module.name} if console is rich.console.Console else set()
    assert plain <= OWN_TEXTS


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_characters_gets_them_escaped_and_json_stays_json(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    value = {"text": "ä … 😀 \u3042"}
    paper = io.BytesIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", io.TextIOWrapper(paper, encoding=encoding, write_through=True))
        command_line._bear_any_text()
        sys.stdout.write(json.dumps(value, ensure_ascii=False))
        assert json.loads(paper.getvalue().decode(encoding)) == value


@pytest.mark.parametrize("url", ["http://[", "x", "ftp://x", "http://" + "a" * 70 + ".b"])
def test_an_address_that_is_none_is_said_to_be_none(url: str) -> None:
    with pytest.raises(LiveViewError, match=r"address|nothing answers"):
        LiveView(url).runs({})
    for words in (["sql", "select 1"], ["top", "--once"]):
        done = CliRunner().invoke(command_line.app, [*words, "--url", url])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit), done.exception
        assert "address" in done.stderr or "nothing answers" in done.stderr


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b"\xff", b'{"meta": []}'])
def test_who_does_not_answer_as_clickhouse_does_is_told_apart(body: bytes) -> None:
    with pytest.raises(SqlError, match="does not answer as ClickHouse does"):
        sql_endpoint.answer_in(SqlAddress("http://x", "tidegate", "you"), body)


@pytest.mark.parametrize(
    "words",
    [
        ["ledger", "retire", "--keep-days", "1e308"],
        ["ledger", "retire", "--keep-days", "1", "--every-hours", "1e300"],
        ["kafka", "--port", "-1"],
        ["dev", "--kafka-port", "65536"],
    ],
)
def test_numbers_that_cannot_be_are_wrong_usage(words: list[str]) -> None:
    done = CliRunner().invoke(command_line.app, words)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit), done.exception
