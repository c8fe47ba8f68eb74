"""ClickHouse's HTTP interface as the command line asks it: where it is, and what it answers."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

from tidegate.cli.addresses import AddressError, address_file, read_address

URL_VARIABLE: Final = "TIDEGATE_SQL_URL"
ADDRESS_FILE: Final = "sql.json"
ANSWER_TIMEOUT_S: Final = 120.0


class SqlAddress(NamedTuple):
    """Where to ask, in which database, and who says so."""

    url: str
    database: str
    source: str


class SqlError(RuntimeError):
    """What to tell the user; no traceback helps."""


def find(url: str) -> SqlAddress:
    """Return where to ask: what was said, a ClickHouse server that the projection fills, or what the projection wrote down."""
    database = os.environ.get("TIDEGATE_CLICKHOUSE_DATABASE", "tidegate")
    if url:
        return SqlAddress(url, database, URL_VARIABLE)
    server = os.environ.get("TIDEGATE_CLICKHOUSE_URL", "")
    if server.startswith(("http://", "https://")):
        return SqlAddress(server, database, "TIDEGATE_CLICKHOUSE_URL")
    file = address_file(ADDRESS_FILE)
    try:
        found = read_address(file, "projection")
        return SqlAddress(found["url"], str(found.get("database", database)), str(file))
    except AddressError as error:
        raise SqlError(
            f"{error}. Start `tidegate dev`, or say where SQL is served with --url or {URL_VARIABLE}."
        ) from None


def ask(address: SqlAddress, query: str, default_format: str) -> tuple[str, bytes]:
    """Return the format of the answer and the answer. Raises SqlError."""
    parameters = urlencode({"database": address.database, "default_format": default_format})
    target = f"{address.url.rstrip('/')}/?{parameters}"
    if not target.startswith(("http://", "https://")):
        raise SqlError(f"{address.url} ({address.source}) is no http:// address")
    try:
        request = urllib.request.Request(  # noqa: S310 - checked above
            target, data=query.encode("utf-8", "replace"), headers=_credentials()
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:  # noqa: S310 - checked above
            return response.headers.get("X-ClickHouse-Format", default_format), response.read()
    except urllib.error.HTTPError as error:
        raise SqlError(error.read().decode("utf-8", "replace").strip() or str(error)) from None
    except ValueError as error:  # brackets that do not close, a name that cannot be one
        raise SqlError(f"{address.url} ({address.source}) is no address: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error) or type(error).__name__
        raise SqlError(
            f"nothing answers at {address.url} (from {address.source}): {reason}. Is the projection running?"
        ) from None


def answer_in(address: SqlAddress, body: bytes) -> dict[str, Any]:
    """Return what an answer in a JSON format of ClickHouse says. Raises SqlError: anybody may serve that address."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not {"meta", "data"} <= answer.keys():
        raise SqlError(
            f"{address.url} (from {address.source}) does not answer as ClickHouse does: is SQL served there?"
        )
    return answer


def _credentials() -> dict[str, str]:
    user = os.environ.get("TIDEGATE_CLICKHOUSE_USER")
    password = os.environ.get("TIDEGATE_CLICKHOUSE_PASSWORD", "")
    return {"X-ClickHouse-User": user, "X-ClickHouse-Key": password} if user else {}


def rows(address: SqlAddress, query: str) -> list[dict[str, Any]]:
    """Return the rows of a query. Blocks. Raises SqlError."""
    _, body = ask(address, query, "JSON")
    answer = answer_in(address, body)
    # Some servers write 64-bit integers as strings.
    wide = [column["name"] for column in answer["meta"] if "Int64" in column["type"]]
    for row in answer["data"]:
        row.update({name: int(row[name]) for name in wide if isinstance(row[name], str)})
    found: list[dict[str, Any]] = answer["data"]
    return found
