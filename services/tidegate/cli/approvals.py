"""`tidegate approvals list|approve|reject`: the questions that wait for a human."""

from __future__ import annotations

import datetime
import json
from typing import Annotated, Any, Final

import typer

from tidegate.cli import run_output, runs
from tidegate.cli.endings import RUN_EXIT_CODES, explained
from tidegate.cli.live_view import LiveView, UnknownRunError, Url
from tidegate.cli.options import Json
from tidegate.cli.terminal import Console
from tidegate.domain import states

MAX_RUNS: Final = 1000

_out = Console(highlight=False, markup=False, soft_wrap=True)  # lines are copied and read by programs: never broken

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="List, approve and reject what waits for a human.",
    epilog=RUN_EXIT_CODES,
    pretty_exceptions_show_locals=False,
)
app.command(epilog=RUN_EXIT_CODES)(runs.approve)
app.command(epilog=RUN_EXIT_CODES)(runs.reject)


@app.command("list", epilog=RUN_EXIT_CODES)
def list_(
    account: Annotated[str, typer.Option("--account", help="This account and all below it.")] = "",
    as_json: Json = False,
    url: Url = "",
) -> None:
    """List open questions, the oldest first: who asks, why, since when, until when."""
    with explained("approvals list"):
        found, is_cut = _open(LiveView(url), account)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for question in found:
        _out.print(*_shown(question), sep="\n")
    if not found:
        print("nobody is asked for an approval")
    if is_cut:
        typer.echo(f"only the questions of the {MAX_RUNS} runs started last; --account narrows it down", err=True)


def _shown(question: dict[str, Any]) -> list[str]:
    """Return a question as lines: a table would cut step ids and reasons, and both are what an answer rests on."""
    until = f", until {_time(question['expires_at_ms'])}" if question["expires_at_ms"] else ""
    run, step, attempt = question["run_id"], question["step_id"], question["attempt"]
    return [
        f"{_time(question['since_ms'])}  {run}  {step} (attempt {attempt}) of {question['account']}{until}",
        *run_output.question(run, question),
    ]


def _open(view: LiveView, account: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the open questions, and whether there may be more of them. Raises LiveViewError."""
    query = {"status": states.WAITING, "limit": MAX_RUNS} | ({"account": account} if account else {})
    waiting = view.runs(query)["runs"]
    found: list[dict[str, Any]] = []
    for row in waiting:
        if not row["open_approvals"]:
            continue
        try:
            body = view.run(row["run_id"])
        except UnknownRunError:
            continue  # answered and put away meanwhile
        found += [
            {"run_id": row["run_id"], "account": row["account"], "expires_at_ms": 0} | question
            for question in body["approvals"]
        ]
    return sorted(found, key=lambda question: question["since_ms"]), len(waiting) == MAX_RUNS


def _time(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
