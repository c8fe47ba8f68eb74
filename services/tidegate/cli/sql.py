"""`tidegate sql`: ask the projections, over ClickHouse's HTTP interface."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from tidegate.cli.sql_endpoint import URL_VARIABLE, SqlError, answer_in, ask, find
from tidegate.cli.terminal import Console, say

TABLE_FORMAT: Final = "JSONCompact"

app = typer.Typer(add_completion=False, help="Query the ClickHouse projections.", pretty_exceptions_show_locals=False)


@app.command()
def sql(
    query: Annotated[
        str, typer.Argument(help='SQL, for example "select * from runs"; - or nothing reads it from stdin.')
    ] = "-",
    format_name: Annotated[
        str,
        typer.Option(
            "--format", "-f", help="A format of ClickHouse (JSON, CSV, TSV, Vertical, ...) instead of a table."
        ),
    ] = "",
    url: Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="Where SQL is served.")] = "",
) -> None:
    """Run a query and print its result. Tables: runs, steps, attempts, events, ledger, decisions, budgets, spend, approvals, waits,
    instances, dead_letters, freshness, unreadable."""
    try:
        text = sys.stdin.read() if query == "-" else query
        address = find(url)
        answered_format, body = ask(address, text, format_name or TABLE_FORMAT)
        is_table = answered_format == TABLE_FORMAT and not format_name
        answer = answer_in(address, body) if is_table else {}
    except SqlError as error:
        say(f"tidegate sql: {error}", err=True)
        raise typer.Exit(1) from None
    if is_table:
        _print_table(answer)
    else:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


def _print_table(answer: dict[str, Any]) -> None:
    console = Console()
    table = Table(show_edge=False, header_style="bold")
    numeric = ("Int", "UInt", "Float", "Decimal")
    for column in answer["meta"]:
        kind = column["type"].removeprefix("Nullable(")
        table.add_column(Text(column["name"]), justify="right" if kind.startswith(numeric) else "left", overflow="fold")
    for row in answer["data"]:
        table.add_row(*(_shown(value) for value in row))
    console.print(table)
    count = len(answer["data"])
    console.print(Text(f"{count} row{'' if count == 1 else 's'}", style="dim"))


def _shown(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    return Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
