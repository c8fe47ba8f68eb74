"""The `policies` topic as the command line sees it: documents of all kinds, read, published and removed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import typer

from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.messages import PolicyPublished
from tidegate.eventlog.interface import Broker, Record
from tidegate.eventlog.tables import Tables, Unreadable, readable
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.gate.kinds import Document, DocumentError, read
from tidegate.sdk.client import user_name

POLICIES: Final = "policies"
EXIT_WRONG: Final = 2


def in_topic(broker: Broker) -> dict[str, PolicyPublished | Unreadable]:
    """Return what stands under each key of the topic, rows that cannot be read too. Blocks; raises EventLogError."""
    tables = Tables((POLICIES,))
    tables.load(broker)
    return tables.rows[POLICIES]


def in_force(broker: Broker) -> dict[str, PolicyPublished]:
    """Return the published documents by key. Blocks; raises EventLogError."""
    return readable(in_topic(broker))


def value_of(row: PolicyPublished) -> Any:
    """Return what a published document says."""
    return canonical.loads(row.document)


def kind_of(row: PolicyPublished | Unreadable) -> str:
    """Return the kind of a published document; `?` if it cannot be read."""
    if isinstance(row, Unreadable):
        return "?"
    value = value_of(row)
    return str(value.get("kind", "policy")) if isinstance(value, dict) else "?"


def read_files(files: Iterable[Path]) -> list[Document]:
    """Return the documents of all files. Prints every problem as `file:line: text` and exits with 2 if there is any."""
    found: list[Document] = []
    is_wrong = False
    for file in files:
        try:
            found += read(file.read_text(encoding="utf-8"))
        except DocumentError as error:
            is_wrong = True
            for problem in error.problems:
                typer.echo(f"{file}:{problem.line or 1}: {problem.text}", err=True)
        except (OSError, UnicodeDecodeError) as error:
            is_wrong = True
            typer.echo(f"{file}:1: cannot be read: {error}", err=True)
    keys = [document.topic_key for document in found]
    for key in sorted({key for key in keys if keys.count(key) > 1}):
        is_wrong = True
        typer.echo(f"{key} is in several files", err=True)
    if is_wrong:
        raise typer.Exit(EXIT_WRONG)
    return found


def publish(broker: Broker, documents: Iterable[Document], removed: Iterable[str] = (), by: str | None = None) -> None:
    """Write documents, and tombstones for the removed keys, and wait until they are there. Raises EventLogError.

    by: who does it, by default the user of this process. It is recorded with each document; a tombstone holds nothing.
    """
    writer = broker.writer()
    for document in documents:
        row = PolicyPublished(
            policy_id=document.topic_key,
            version=document.version,
            document=document.to_json(),
            by=by or user_name(),
            at_ms=time.time_ns() // 1_000_000,
        )
        header = ((TYPE_HEADER, b"PolicyPublished"),)
        writer.send(Record(POLICIES, 0, document.topic_key.encode(), codec.encode(row), header))
    for key in removed:
        writer.send(Record(POLICIES, 0, key.encode(), None))
    writer.flush(30.0)
