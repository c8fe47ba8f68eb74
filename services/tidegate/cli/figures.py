"""`tidegate figures`: what accounts and functions did in the last minutes, as the gateway's live view counts it."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from tidegate.cli.endings import explained, usage
from tidegate.cli.live_view import LiveView, Url, patiently
from tidegate.cli.run_output import money
from tidegate.cli.terminal import Console
from tidegate.cli.wording import moment_ms, plain_table

PIPED_WIDTH: Final = 160
ALL: Final = "all together"
_NUMBERS: Final = ("spent", "attempts", "errors", "error rate", "denied")
_OF_RUNS: Final = ("runs", "failed")
_COUNTED: Final = ("spent_micros", "attempts", "denied", "runs")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Show what accounts and functions did in the last minutes: money, attempts, errors, runs. Exit codes: 0 done; 2 wrong "
    "usage, or a window that is not kept; 3 the gateway does not answer; 4 nothing was counted of that name in that time.",
)
Minutes = Annotated[
    int | None,
    typer.Option("--minutes", "-m", min=1, help="One window of so many, instead of 5 minutes, an hour, a day."),
]
Until = Annotated[
    str, typer.Option("--until", help="When the windows end, instead of now: 2026-01-31T12:00Z, or 90m, 12h ago.")
]
Json = Annotated[bool, typer.Option("--json", help="Print what the gateway answers.")]

_tables = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
_notes = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command()
def accounts(
    account: Annotated[str, typer.Argument(metavar="[ACCOUNT]", help="This one and all below it; else all.")] = "",
    minutes: Minutes = None,
    until: Until = "",
    as_json: Json = False,
    url: Url = "",
) -> None:
    """Show what accounts did."""
    _show("accounts", account, {}, minutes, until, as_json, url)


@app.command()
def functions(
    function: Annotated[str, typer.Argument(metavar="[FUNCTION]", help="This one; else all.")] = "",
    kind: Annotated[
        str, typer.Option("--kind", help="Only those that were called as a step, an agent or a tool.")
    ] = "",
    minutes: Minutes = None,
    until: Until = "",
    as_json: Json = False,
    url: Url = "",
) -> None:
    """Show what functions did. Which ones there are, and where they run, says `tidegate functions`."""
    _show("functions", function, {"kind": kind} if kind else {}, minutes, until, as_json, url)


def _show(
    what: str, name: str, query: dict[str, Any], minutes: int | None, until: str, as_json: bool, url: str
) -> None:
    command = f"figures {what}"
    if minutes:
        query["minutes"] = minutes
    if until:
        try:
            query["until_ms"] = moment_ms(until, time.time())
        except ValueError as error:
            usage(command, f"--until: {error}")
    with explained(command):
        found = patiently(lambda: LiveView(url).figures(what, name, query), _say)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _tables.print(figures_table(what, found))
    if found["partitions_missing"]:
        _say(f"no gateway answers for partitions {found['partitions_missing']}: these figures are too small")


def _say(text: str) -> None:
    _notes.print(text, style="yellow", markup=False)


def figures_table(what: str, body: dict[str, Any]) -> Table:
    """Return a line for each name and each of its windows in which there was something; all together at the end."""
    are_accounts = what == "accounts"
    names = ("account",) if are_accounts else ("function", "called as")
    table = plain_table(*names, "last", *_NUMBERS, *(_OF_RUNS if are_accounts else ()))
    for column in table.columns[len(names) :]:
        column.justify = "right"
    rows = body[what]
    for row in rows:
        shown = [Text(row["name"]), *([] if are_accounts else [Text(row["kind"])])]
        for window in row["windows"]:
            if any(window[field] for field in _COUNTED):
                table.add_row(*shown, *_cells(window, are_accounts))
                shown = [Text("") for _ in names]
    if len(rows) != 1:
        for window in body["total"]:
            table.add_row(Text(ALL, style="dim"), *("" for _ in names[1:]), *_cells(window, are_accounts))
    return table


def _cells(window: dict[str, Any], are_accounts: bool) -> list[Text]:
    rate = window["error_rate"]
    cells = [
        Text(_length(window["minutes"])),
        Text(money(window["spent_micros"])),
        Text(str(window["attempts"])),
        Text(str(window["errors"])),
        Text("" if rate is None else f"{rate:.1%}", style="red" if rate else ""),
        Text(str(window["denied"])),
    ]
    if are_accounts:
        cells += [Text(str(window["runs"])), Text(str(window["failed_runs"]))]
    return cells


def _length(minutes: int) -> str:
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"
