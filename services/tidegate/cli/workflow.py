"""`tidegate workflow validate|publish|list|show|graph`: the definitions that runs are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tidegate.cli import drawing
from tidegate.cli.definition_files import YAML_SUFFIXES, read_definitions
from tidegate.cli.endings import EXIT_REFUSED, EXIT_USAGE, WORKFLOW_EXIT_CODES, explained, usage
from tidegate.cli.options import Json
from tidegate.cli.run_output import moment
from tidegate.cli.terminal import Console
from tidegate.domain import canonical
from tidegate.domain.messages import WorkflowPublished
from tidegate.domain.workflow import AGENT_PREFIX, with_children
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables, readable
from tidegate.sdk.client import WORKFLOWS, Client
from tidegate.sdk.judging import Judged, judged
from tidegate.sdk.loading import load_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Check, publish, list, show and draw workflow definitions.",
    epilog=WORKFLOW_EXIT_CODES,
    pretty_exceptions_show_locals=False,
)


Source = Annotated[
    str,
    typer.Argument(
        help="An app, as `module:attribute` or `file.py:attribute`, or a file of definitions, JSON or YAML: one, or a list of "
        "them."
    ),
]
AppOption = Annotated[
    str,
    typer.Option(
        "--app",
        help="An app whose functions a file's nodes name, so that it need not hold them: `module:attribute` or "
        "`file.py:attribute`.",
    ),
]


@app.command(epilog=WORKFLOW_EXIT_CODES)
def validate(source: Source, functions_of: AppOption = "", as_json: Json = False) -> None:
    """Check definitions without publishing them: says everything that is wrong, each with its place."""
    with explained("workflow validate"):
        found = _load("workflow validate", source, functions_of).problems
    if as_json:
        print(json.dumps(found))
    else:
        for label, problems in found.items():
            print("\n".join([f"{label}: {'cannot run' if problems else 'can run'}", *(f"  - {p}" for p in problems)]))
    if any(found.values()):
        raise typer.Exit(EXIT_USAGE)


@app.command(epilog=WORKFLOW_EXIT_CODES)
def publish(source: Source, functions_of: AppOption = "", as_json: Json = False) -> None:
    """Check definitions and publish them; prints `name@version` of each. What is there already stays as it is.

    An app's graphs and its agents are published. The one published last is what a bare name means.
    """
    with explained("workflow publish"):
        loaded = _load("workflow publish", source, functions_of)
        if wrong := loaded.wrong():
            usage("workflow publish", "\n".join(map(str, wrong)))
        with Client() as client:
            labels = client.publish(loaded)
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
            Text(row.name), Text(row.version), mark, row.definition_hash[:12], Text(row.by), moment(row.at_ms)[:-3]
        )
    Console(highlight=False).print(table)


@app.command(epilog=WORKFLOW_EXIT_CODES)
def show(name: Annotated[str, typer.Argument(help="`name`, for its latest version, or `name@version`.")]) -> None:
    """Print a definition as JSON."""
    json.dump(_find("workflow show", name), sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


class Picture(StrEnum):
    """What pictures can be written as."""

    MERMAID = "mermaid"
    DOT = "dot"


@app.command(epilog=WORKFLOW_EXIT_CODES)
def graph(
    name: Annotated[
        str,
        typer.Argument(help="A published workflow: `name` or `name@version`; or a file or an app, as for `validate`."),
    ] = "",
    functions_of: AppOption = "",
    run_id: Annotated[
        str, typer.Option("--run", metavar="RUN", help="Instead: the graph that this run goes by, as it has changed.")
    ] = "",
    picture: Annotated[Picture, typer.Option("--format", help="What to write it as.")] = Picture.MERMAID,
) -> None:
    """Draw a definition as Mermaid or DOT. Of a file or an app, each of its definitions is drawn."""
    if bool(name) == bool(run_id):
        usage("workflow graph", "name a workflow, a file or an app, or a run with --run")
    if run_id:
        with explained("workflow graph"), Client() as client:
            definitions: Sequence[Mapping[str, Any]] = [client.graph(run_id, calls=True)]
    elif _is_published_name(name):
        definitions = [_find("workflow graph", name)]
    else:
        with explained("workflow graph"):
            definitions, found = _load("workflow graph", name, functions_of)
        if wrong := [f"{label}: {problem}" for label, problems in found.items() for problem in problems]:
            usage("workflow graph", "\n".join(wrong))
    sys.stdout.write("\n".join(drawing.FORMATS[picture](definition) for definition in definitions))


def _is_published_name(text: str) -> bool:
    """Tell whether the text names a published workflow: it is no file, and has no colon but that of `agent:`."""
    return Path(text).suffix not in {*YAML_SUFFIXES, ".json", ".py"} and ":" not in text.removeprefix(AGENT_PREFIX)


def _find(command: str, name: str) -> Any:
    rows = _published(command)
    label = name if "@" in name else next((key for key in reversed(rows) if rows[key].name == name), name)
    if label not in rows:
        known = ", ".join(sorted({row.name for row in rows.values()})) or "none"
        typer.echo(f"tidegate {command}: there is no workflow {name!r}; published: {known}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    return canonical.loads(rows[label].definition)


def _load(command: str, source: str, functions_of: str) -> Judged:
    """Return the definitions that a user means, completed, and all that is wrong with each. Raises AppError."""
    file = Path(source)
    if file.suffix not in {*YAML_SUFFIXES, ".json"}:
        return judged(load_app(source))
    definitions, lines = read_definitions(command, file)
    if functions_of:
        known = load_app(functions_of)
        definitions = [known.completed(definition) for definition in definitions]
    return judged(with_children(definitions), lines.located)


def _published(command: str) -> dict[str, WorkflowPublished]:
    """Return what is published, by `name@version`, the latest last."""
    tables = Tables((WORKFLOWS,))
    with explained(command):
        tables.load(KafkaBroker(KafkaSettings()))
    rows, offsets = readable(tables.rows[WORKFLOWS]), tables.offsets[WORKFLOWS]
    return {label: rows[label] for label in sorted(rows, key=lambda key: offsets[key])}
