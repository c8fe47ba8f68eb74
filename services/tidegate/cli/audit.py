"""`tidegate audit`: keep the books a second time, and say where they do not agree."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from tidegate.audit.money import Books, Problem
from tidegate.cli.terminal import Console, say
from tidegate.cli.wording import counted
from tidegate.eventlog.interface import Broker, EventLogError, UnknownTopicError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import load_schemas
from tidegate.eventlog.settings import KafkaSettings

app = typer.Typer(add_completion=False, no_args_is_help=True)
LEDGER: Final = "gate-ledger"
MAX_SHOWN: Final = 20


@app.callback()
def audit() -> None:
    """Keep the books a second time, from the bytes of the logs alone."""


@app.command()
def money(
    run_id: Annotated[
        str | None, typer.Option("--run", help="Show this run alone; everything is read all the same.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the books as one JSON object.")] = False,
) -> None:
    """Recompute budgets, reservations and spending of every account from `gate-ledger`, with nothing of the gate.

    Reservations that are open are shown, and are no fault as long as their runs go on.

    Exit codes: 0 the ledger agrees with itself; 1 it does not; 2 it cannot be read, or has no such run.
    """
    settings = KafkaSettings()
    try:
        books = read_books(KafkaBroker(settings))
    except EventLogError as error:
        typer.echo(f"cannot read the ledger of Kafka at {settings.bootstrap}: {error}", err=True)
        raise typer.Exit(2) from None
    if run_id is not None and run_id not in books.runs:
        typer.echo(f"the ledger has no run {run_id}: the gate never opened one of that name", err=True)
        raise typer.Exit(2)
    problems = [problem for problem in books.problems if run_id in (None, problem.run_id)]
    if as_json:
        typer.echo(json.dumps(_as_json(books, problems, run_id)))
    else:
        _print(books, problems, run_id)
    raise typer.Exit(1 if problems else 0)


def read_books(broker: Broker) -> Books:
    """Read the whole ledger. Raises EventLogError."""
    described = broker.describe([LEDGER]).get(LEDGER)
    if described is None:
        raise UnknownTopicError(f"there is no topic {LEDGER}")
    load_schemas(broker)
    books = Books()
    with Console(stderr=True).status("reading the ledger …") as status:
        for partition in range(described.partition_count):
            status.update(f"reading {LEDGER}-{partition} …")
            start, end = broker.offsets(LEDGER, partition)
            for message in broker.read(LEDGER, partition, start, end):
                books.read(message)
    books.problems += books.torn()
    return books


def _as_json(books: Books, problems: list[Problem], run_id: str | None) -> dict[str, Any]:
    money: dict[str, Any] = (
        {"accounts": {account: asdict(totals) for account, totals in books.accounts().items()}}
        if run_id is None
        else {"run": asdict(books.runs[run_id])}
    )
    return {
        "ok": not problems,
        "entries": books.entries,
        "void_entries": books.void_entries,
        **money,
        "open": [{**name._asdict(), "reserved_micros": micros} for name, micros in _open(books, run_id)],
        "problems": [problem._asdict() for problem in problems],
    }


def _open(books: Books, run_id: str | None) -> list[tuple[Any, int]]:
    return [(name, micros) for name, micros in books.open_reservations().items() if run_id in (None, name.run_id)]


def _print(books: Books, problems: list[Problem], run_id: str | None) -> None:
    console = Console()
    console.print(_accounts(books) if run_id is None else _run(books, run_id))
    still_open = _open(books, run_id)
    for name, micros in still_open[:MAX_SHOWN]:
        say(f"  open: {name.run_id} {name.step_id}#{name.attempt} {micros:,} micro-dollars")
    if len(still_open) > MAX_SHOWN:
        typer.echo(f"  open: {len(still_open) - MAX_SHOWN} more; --json names all")
    found = "it agrees with itself" if not problems else counted(len(problems), "problem")
    seen = f"{counted(books.entries, 'entry', 'entries')}, {counted(books.void_entries, 'void entry', 'void entries')}"
    typer.echo(f"{seen}, {counted(len(still_open), 'open reservation')}: {found}")
    for problem in problems:
        say(f"  {problem}", err=True)


def _accounts(books: Books) -> Table:
    table = _table("account", "runs", "not over", "spent", "beyond declared", "set aside")
    for account, totals in books.accounts().items():
        figures = (
            totals.runs,
            totals.open_runs,
            totals.settled_micros,
            totals.overshoot_micros,
            totals.open_micros,
        )
        table.add_row(Text(account), *(f"{figure:,}" for figure in figures))
    return table


def _run(books: Books, run_id: str) -> Table:
    table = _table("run", "account", "budget", "spent", "beyond declared", "set aside", "")
    run = books.runs[run_id]
    budget = "none" if run.budget_micros is None else f"{run.budget_micros:,}"
    figures = (f"{run.settled_micros:,}", f"{run.overshoot_micros:,}", f"{run.reserved_micros:,}")
    table.add_row(Text(run_id), Text(run.account), budget, *figures, "over" if run.closed else "not over")
    return table


def _table(*headings: str) -> Table:
    table = Table(show_edge=False, header_style="bold")
    for heading in headings:
        names = heading in ("account", "run", "")
        table.add_column(heading, justify="left" if names else "right", overflow="fold" if names else "ellipsis")
    return table
