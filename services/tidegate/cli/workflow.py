"""`tidegate workflow publish|list|show`: the definitions that runs are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidegate.cli.endings import EXIT_REFUSED, WORKFLOW_EXIT_CODES, explained, usage
from tidegate.cli.run_output import moment
from tidegate.domain import canonical
from tidegate.domain.messages import WorkflowPublished
from tidegate.domain.requests import parse_json
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.sdk.app import App
from tidegate.sdk.client import WORKFLOWS, Client
from tidegate.sdk.loading import load_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Publish, list and show workflow definitions.",
    epilog=WORKFLOW_EXIT_CODES,
    pretty_exceptions_show_locals=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Definitions = App | Mapping[str, Any] | Sequence[Mapping[str, Any]]

_YAML: Final = frozenset({".yaml", ".yml"})


@app.command(epilog=WORKFLOW_EXIT_CODES)
def publish(
    source: Annotated[
        str,
        typer.Argument(
            help="An app, as `module:attribute` or `file.py:attribute`, or a file of definitions, JSON or YAML: one, or a "
            "list of them."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Check definitions and publish them; prints `name@version` of each. What is there already stays as it is.

    An app's graphs and its agents are published. The one published last is what a bare name means.
    """
    with explained("workflow publish"):
        what = _load(source)
        with Client() as client:
            labels = client.publish(what)
    print(json.dumps(labels) if as_json else "\n".join(labels))


@app.command("list", epilog=WORKFLOW_EXIT_CODES)
def list_(as_json: Json = False) -> None:
    """List the published workflows. Of each name, the version published last is marked: a bare name means it."""
    rows = _published("workflow list")
    latest = {row.name: label for label, row in rows.items()}  # in order of publication
    if as_json:
        found = [
            {
                "name": row.name,
                "version": row.version,
                "definition_hash": row.definition_hash,
                "by": row.by,
                "at_ms": row.at_ms,
                "is_latest": latest[row.name] == label,
            }
            for label, row in sorted(rows.items())
        ]
        print(json.dumps(found))
        return
    table = Table("workflow", "version", "latest", "hash", "by", "published", show_edge=False, header_style="bold")
    for label, row in sorted(rows.items()):
        mark = "*" if latest[row.name] == label else ""
        table.add_row(
            Text(row.name), Text(row.version), mark, row.definition_hash[:12], Text(row.by), moment(row.at_ms)
        )
    Console(highlight=False).print(table)


@app.command(epilog=WORKFLOW_EXIT_CODES)
def show(name: Annotated[str, typer.Argument(help="`name`, for its latest version, or `name@version`.")]) -> None:
    """Print a definition as JSON."""
    rows = _published("workflow show")
    label = name if "@" in name else next((key for key in reversed(rows) if rows[key].name == name), name)
    if label not in rows:
        known = ", ".join(sorted({row.name for row in rows.values()})) or "none"
        typer.echo(f"tidegate workflow show: there is no workflow {name!r}; published: {known}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    json.dump(canonical.loads(rows[label].definition), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _load(source: str) -> Definitions:
    """Return the app or the definitions that a user means. Raises AppError, NotJsonError."""
    file = Path(source)
    is_yaml = file.suffix in _YAML
    if not is_yaml and file.suffix != ".json":
        return load_app(source)
    try:
        data = file.read_bytes()
        found = yaml.safe_load(data) if is_yaml else parse_json(data)
    except OSError as error:
        usage("workflow publish", f"{file} cannot be read: {error.strerror or error}")
    except (yaml.YAMLError, canonical.NotJsonError) as error:
        usage("workflow publish", f"{file}: {error}")
    definitions = found if isinstance(found, list) else [found]
    if not definitions or not all(isinstance(definition, dict) for definition in definitions):
        usage("workflow publish", f"{file}: a definition is an object; the file holds one, or a list of them")
    return definitions


def _published(command: str) -> dict[str, WorkflowPublished]:
    """Return what is published, by `name@version`, the latest last."""
    tables = Tables((WORKFLOWS,))
    with explained(command):
        tables.load(KafkaBroker(KafkaSettings()))
    rows, offsets = tables.rows[WORKFLOWS], tables.offsets[WORKFLOWS]
    return {label: rows[label] for label in sorted(rows, key=lambda key: offsets[key])}
