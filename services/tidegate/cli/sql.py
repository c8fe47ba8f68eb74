"""`tidegate sql`: ask the projections, over ClickHouse's HTTP interface."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Annotated, Any, Final, NamedTuple
from urllib.parse import urlencode

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidegate.cli.addresses import AddressError, address_file, read_address

URL_VARIABLE: Final = "TIDEGATE_SQL_URL"
ADDRESS_FILE: Final = "sql.json"
TABLE_FORMAT: Final = "JSONCompact"
ANSWER_TIMEOUT_S: Final = 120.0

app = typer.Typer(help="Query the ClickHouse projections.", pretty_exceptions_show_locals=False)


class _Address(NamedTuple):
    url: str
    database: str
    source: str


class _SqlError(RuntimeError):
    """What to tell the user; no traceback helps."""


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
    """Run a query and print its result. Tables: runs, steps, attempts, events, ledger, decisions, spend, approvals, instances,
    dead_letters, freshness, unreadable."""
    try:
        text = sys.stdin.read() if query == "-" else query
        address = _find(url)
        answered_format, body = _ask(address, text, format_name or TABLE_FORMAT)
    except _SqlError as error:
        typer.echo(f"tidegate sql: {error}", err=True)
        raise typer.Exit(1) from None
    if answered_format == TABLE_FORMAT and not format_name:
        _print_table(json.loads(body))
    else:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


def _find(url: str) -> _Address:
    """Return where to ask: what was said, a ClickHouse server that the projection fills, or what the projection wrote down."""
    database = os.environ.get("TIDEGATE_CLICKHOUSE_DATABASE", "tidegate")
    if url:
        return _Address(url, database, URL_VARIABLE)
    server = os.environ.get("TIDEGATE_CLICKHOUSE_URL", "")
    if server.startswith(("http://", "https://")):
        return _Address(server, database, "TIDEGATE_CLICKHOUSE_URL")
    file = address_file(ADDRESS_FILE)
    try:
        found = read_address(file, "projection")
        return _Address(found["url"], str(found.get("database", database)), str(file))
    except AddressError as error:
        raise _SqlError(
            f"{error}. Start `tidegate dev`, or say where SQL is served with --url or {URL_VARIABLE}."
        ) from None


def _ask(address: _Address, query: str, default_format: str) -> tuple[str, bytes]:
    """Return the format of the answer and the answer. Raises _SqlError."""
    parameters = urlencode({"database": address.database, "default_format": default_format})
    request = urllib.request.Request(  # noqa: S310 - the address is the user's own
        f"{address.url.rstrip('/')}/?{parameters}", data=query.encode("utf-8", "replace"), headers=_credentials()
    )
    if not request.full_url.startswith(("http://", "https://")):
        raise _SqlError(f"{address.url} ({address.source}) is no http:// address")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:  # noqa: S310 - checked above
            return response.headers.get("X-ClickHouse-Format", default_format), response.read()
    except urllib.error.HTTPError as error:
        raise _SqlError(error.read().decode("utf-8", "replace").strip() or str(error)) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise _SqlError(
            f"nothing answers at {address.url} (from {address.source}): {reason}. Is the projection running?"
        ) from None


def _credentials() -> dict[str, str]:
    user = os.environ.get("TIDEGATE_CLICKHOUSE_USER")
    password = os.environ.get("TIDEGATE_CLICKHOUSE_PASSWORD", "")
    return {"X-ClickHouse-User": user, "X-ClickHouse-Key": password} if user else {}


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
    count = answer["rows"]
    console.print(Text(f"{count} row{'' if count == 1 else 's'}", style="dim"))


def _shown(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    return Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
