"""`tidegate policy …`: the documents that the gate decides by: policies, and whatever else lies beside them."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape

from tidegate.cli.documents import EXIT_WRONG, in_force, in_topic, kind_of, publish, read_files, value_of
from tidegate.cli.endings import EXIT_REFUSED, explained
from tidegate.cli.options import By, Json
from tidegate.cli.terminal import Console
from tidegate.cli.wording import counted, plain_table
from tidegate.domain.messages import PolicyPublished
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Unreadable
from tidegate.gate.documents import Document, DocumentError, read_as
from tidegate.gate.policy import Policy
from tidegate.gate.policy_cases import Case, Cases, tried

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Check, try out, apply, compare, list, show and remove the gate's documents: policies, budgets and more. Exit codes: "
    "0 done; 1 a case failed, or there are differences; 2 wrong usage, or a document that is none; 3 Kafka does not answer; "
    "4 there is no such document.",
)
EXIT_DIFFERENT = 1
Rows = dict[str, PolicyPublished | Unreadable]

Files = Annotated[list[Path], typer.Argument(help="YAML or JSON documents; see docs/policy.md.", exists=True)]
Key = Annotated[str, typer.Argument(metavar="DOCUMENT", help="A policy's name, or `kind:name`.")]


@app.command()
@explained("policy validate")
def validate(files: Files) -> None:
    """Check documents and report every problem with its line. Needs no Kafka."""
    typer.echo(f"{counted(len(read_files(files)), 'document')}, nothing wrong")


@app.command()
@explained("policy apply")
def apply(files: Files, by: By = None) -> None:
    """Check documents, all of them first, and publish them: gates take them up as they run."""
    documents = read_files(files)
    publish(KafkaBroker(KafkaSettings()), documents, by=by)
    for document in documents:
        typer.echo(f"published {_summary(document)} (gates take it up within a second)")


def _summary(document: Document) -> str:
    if isinstance(document, Policy):
        return f"{document.label}: {counted(len(document.rules), 'rule')}"
    return f"{document.KIND} {document.label}"


@app.command()
@explained("policy diff")
def diff(files: Files) -> None:
    """Show what applying documents would change; exit code 1 if anything."""
    there = in_force(KafkaBroker(KafkaSettings()))
    is_different = False
    for document in read_files(files):
        row = there.get(document.topic_key)
        old = "" if row is None else _as_yaml(value_of(row))
        new = _as_yaml(json.loads(document.to_json()))
        if old == new:
            continue
        is_different = True
        lines = difflib.unified_diff(
            old.splitlines(),
            new.splitlines(),
            f"{document.topic_key} in force",
            f"{document.topic_key} given",
            lineterm="",
        )
        typer.echo("\n".join(lines))
    if is_different:
        raise typer.Exit(EXIT_DIFFERENT)
    typer.echo("no differences")


def _as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, sort_keys=True, allow_unicode=True))


@app.command("test")
@explained("policy test")
def try_out(
    file: Annotated[Path, typer.Argument(help="A file of cases; see docs/policy.md.", exists=True)],
    as_json: Json = False,
) -> None:
    """Try policies and retry documents out on the cases of a file. Needs no Kafka; exit code 1 if one fails."""
    try:
        cases = read_as(file.read_text(encoding="utf-8"), Cases)
    except DocumentError as error:
        for problem in error.problems:
            typer.echo(f"{file}:{problem.line or 1}: {problem.text}", err=True)
        raise typer.Exit(EXIT_WRONG) from None
    documents = read_files(file.parent / name for name in cases.policies)
    failed = 0
    found = []
    for outcome in tried(cases, documents):
        failed += bool(outcome.problem)
        if as_json:
            found.append({"case": outcome.case.name, "ok": not outcome.problem, **outcome.fields})
            continue
        typer.echo(f"{'FAILED' if outcome.problem else 'ok':<7} {outcome.case.name}: {outcome.said}")
        if outcome.problem:
            looked = f"; it looked at {outcome.values or 'nothing'}" if isinstance(outcome.case, Case) else ""
            typer.echo(f"        {outcome.problem}{looked}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(f"{counted(len(cases.cases), 'case')}, {failed} failed")
    if failed:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
@explained("policy remove")
def remove(key: Key) -> None:
    """Take a document out of force."""
    broker = KafkaBroker(KafkaSettings())
    _found(in_topic(broker), key)
    publish(broker, (), [key])
    typer.echo(f"removed {key} (gates let go of it within a second)")


@app.command("list")
@explained("policy list")
def list_(as_json: Json = False) -> None:
    """List the documents in force."""
    rows = sorted(in_topic(KafkaBroker(KafkaSettings())).items())
    if as_json:
        found = [
            unreadable_of(row)
            if isinstance(row, Unreadable)
            else {"key": key, "kind": kind_of(row), "version": row.version, "by": row.by, "at_ms": row.at_ms}
            for key, row in rows
        ]
        typer.echo(json.dumps(found, indent=2))
        return
    table = plain_table("document", "kind", "version", "rules", "by")
    for key, row in rows:
        if isinstance(row, Unreadable):
            table.add_row(escape(key), "?", "", "", escape(f"{row}; apply it again, or remove it"))
            continue
        rules = value_of(row).get("rules") if kind_of(row) == "policy" else None
        table.add_row(escape(key), kind_of(row), row.version, "" if rules is None else str(len(rules)), escape(row.by))
    Console().print(table)


@app.command()
@explained("policy show")
def show(key: Key) -> None:
    """Print a document in force as JSON; of one that cannot be read, where it is and what is wrong with it."""
    row = _found(in_topic(KafkaBroker(KafkaSettings())), key)
    json.dump(unreadable_of(row) if isinstance(row, Unreadable) else value_of(row), sys.stdout, indent=2)
    sys.stdout.write("\n")


def unreadable_of(row: Unreadable) -> dict[str, Any]:
    """Return what is said of a document that cannot be read."""
    return {"key": row.key, "unreadable": row.problem, "topic": row.topic, "partition": 0, "offset": row.offset}


def _named(rows: Rows) -> list[str]:
    """Return what there is to name; top-ups come and go by themselves."""
    return sorted(key for key, row in rows.items() if kind_of(row) != "topup")


def _found(rows: Rows, key: str) -> PolicyPublished | Unreadable:
    if key not in rows:
        typer.echo(f"there is no document {key!r}; there are: {', '.join(_named(rows)) or 'none'}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    return rows[key]
