"""`tidegate topics apply|diff|list|acls|docs`: the topics declared in schemas/topics, and the ones that Kafka has.

Exit codes: 0 as declared (or made so; warnings do not count), 1 something differs that must not, 2 wrong usage, settings or
declarations, 3 Kafka does not answer or refuses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
from rich.console import Console
from rich.table import Column, Table

from tidegate import codec
from tidegate.cli.acls import Format, Principal, acl_problems, apply_acls, printed, wanted_grants
from tidegate.cli.options import Json
from tidegate.cli.states_page import states_page
from tidegate.domain.requests import request_json_schema
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import publish_schemas
from tidegate.eventlog.settings import KafkaSettings
from tidegate.process import settings_problems
from tidegate.topics.apply import TopicsError
from tidegate.topics.apply import apply as apply_topics
from tidegate.topics.apply import diff as diff_topics
from tidegate.topics.comparison import Difference
from tidegate.topics.declaration import Topic, load_topics, read_topic_files
from tidegate.topics.documentation import topics_page
from tidegate.topics.settings import TopicsSettings

EXIT_DIFFERS = 1
EXIT_USAGE = 2
EXIT_KAFKA = 3

EXIT_CODES = (
    "Exit codes: 0 as declared (warnings do not count), 1 something differs that must not, 2 wrong usage, settings or "
    "declarations, 3 Kafka does not answer or refuses."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Create and check the topics that are declared in schemas/topics.",
    epilog=EXIT_CODES,
)

Queues = Annotated[
    list[str] | None,
    typer.Option("--queue", help="Queue that executors serve; repeatable. Default: TIDEGATE_TOPICS_QUEUES."),
]
Production = Annotated[
    bool | None,
    typer.Option(
        "--production/--development",
        help="Whether topics that could lose acknowledged records are refused. Default: TIDEGATE_TOPICS_PRODUCTION.",
    ),
]

# Progress and problems go to standard error, so that standard output can be piped.
_notes = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command(epilog=EXIT_CODES)
def apply(
    queue: Queues = None,
    production: Production = None,
    alter_config: Annotated[
        list[str] | None,
        typer.Option(
            "--alter-config",
            metavar="[TOPIC:]KEY",
            help="Set this config entry as declared where it differs; repeatable. Nothing else that exists is altered.",
        ),
    ] = None,
    acls: Annotated[bool, typer.Option("--acls", help="Set the ACLs that are missing, too. Takes none away.")] = False,
    principal: Principal = None,
    as_json: Json = False,
) -> None:
    """Create the topics that are missing and publish the schemas. Changes no topic if something else is wrong."""
    with _explained():
        declared, settings = _declared(queue, production)
        _check_alterations(declared, alter_config or [])
        wanted = wanted_grants(declared, principal)
        broker = _kafka()
        # First: among them are the rights to make the topics, which nobody has yet whose only right is to set ACLs.
        granted = apply_acls(broker, wanted) if acls else []
        done = apply_topics(
            broker,
            declared,
            production=settings.production,
            alter_config=alter_config or (),
            on_progress=lambda text: _notes.print(text, markup=False),
        )
        published = publish_schemas(broker)
    for warning in done.warnings:
        _notes.print(f"warning: {warning}", markup=False)
    if as_json:
        _print_json(
            {
                "created": done.created,
                "altered": [f"{difference.topic}:{difference.what}" for difference in done.altered],
                "schemas_published": published,
                "acls_set": [grant._asdict() for grant in granted],
                "warnings": [dataclasses.asdict(difference) for difference in done.warnings],
            }
        )
    else:
        print(
            f"{len(declared)} topics: {len(done.created)} created, {len(declared) - len(done.created)} were there; "
            f"{len(done.altered)} config entries altered; {len(published)} schemas published"
            + (f"; {len(granted)} ACLs set, {len(wanted) - len(granted)} were there" if acls else "")
        )


@app.command(epilog=EXIT_CODES)
def diff(
    queue: Queues = None,
    production: Production = None,
    acls: Annotated[
        bool, typer.Option("--acls", help="Compare the ACLs, too: what is missing, and who else may change a topic.")
    ] = False,
    principal: Principal = None,
    as_json: Json = False,
) -> None:
    """Say how the topics on Kafka differ from the declared ones. Changes nothing."""
    with _explained():
        declared, settings = _declared(queue, production)
        wanted = wanted_grants(declared, principal)
        broker = _kafka()
        differences = diff_topics(broker, declared, production=settings.production)
        problems = acl_problems(broker, wanted) if acls else []
    if as_json:
        listed = [dataclasses.asdict(difference) for difference in differences]
        grants = [{"kind": problem.kind, **problem.grant._asdict()} for problem in problems]
        _print_json({"topics": listed, "acls": grants} if acls else listed)
    elif differences:
        _print_differences(differences)
    else:
        print(f"{len(declared)} topics, all as declared")
    if acls and not as_json:
        for problem in problems:
            _notes.print(f"ACL: {problem}", markup=False)
        if not problems:
            print(f"{len(wanted)} ACLs, all as declared, and nobody else may change a topic")
    if problems or any(difference.severity == "error" for difference in differences):
        raise typer.Exit(EXIT_DIFFERS)


@app.command("list", epilog=EXIT_CODES)
def list_(queue: Queues = None, production: Production = None, as_json: Json = False) -> None:
    """List the declared topics as they would be made here. Needs no Kafka."""
    with _explained():
        declared, _ = _declared(queue, production)
    if as_json:
        _print_json([_as_dict(topic) for topic in declared])
        return
    table = Table(Column("topic", no_wrap=True), "kind", "partitions", "replicas", "only writer", "value")
    for topic in declared:
        file = topic.file
        table.add_row(
            topic.name,
            file.kind,
            f"{topic.partition_count} ({file.partition_group})",
            str(topic.replication_factor),
            ", ".join(file.writers),
            ", ".join(file.value) or "JSON",
        )
    Console().print(table)


@app.command(epilog=EXIT_CODES)
def acls(
    queue: Queues = None,
    principal: Principal = None,
    form: Annotated[
        Format, typer.Option("--format", help="A script of kafka-acls.sh, Strimzi's KafkaUsers, or JSON.")
    ] = "kafka",
) -> None:
    """Print the ACLs that each role needs: who writes and who reads, as the topics declare it. Needs no Kafka."""
    with _explained():
        declared, _ = _declared(queue, None)
        text = printed(wanted_grants(declared, principal), form)
    sys.stdout.write(text)


@app.command()
def docs(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is not up to date.")
    ] = False,
) -> None:
    """Write what is generated: docs/topics.md, docs/states.md and schemas/json. For a checkout of the sources."""
    stale = [path for path, text in generated_files().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(generated_files()[path], encoding="utf-8")
        print(f"{path}: {'not up to date; run `tidegate topics docs`' if check else 'written'}")
    if check and stale:
        raise typer.Exit(EXIT_DIFFERS)


def generated_files() -> dict[Path, str]:
    """Return the generated files of a checkout and what they must hold. Exits if this is not a checkout."""
    root = codec.schemas_dir().parent
    if not (root / "pyproject.toml").is_file():
        typer.echo("this is an installed package: the generated files are in the sources", err=True)
        raise typer.Exit(EXIT_USAGE)
    schema = json.dumps(request_json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {
        root / "docs/topics.md": topics_page(read_topic_files()),
        root / "docs/states.md": states_page(),
        root / "schemas/json/run-request.v1.json": schema,
    }


def _declared(queues: list[str] | None, production: bool | None) -> tuple[list[Topic], TopicsSettings]:
    wanted: dict[str, Any] = {}
    if queues:
        wanted["queues"] = ",".join(queues)
    if production is not None:
        wanted["production"] = production
    settings = TopicsSettings(**wanted)
    return load_topics(settings=settings), settings


def _kafka() -> KafkaBroker:
    settings = KafkaSettings()
    prefix = f", topics beginning with {settings.topic_prefix}" if settings.topic_prefix else ""
    _notes.print(f"Kafka at {settings.bootstrap}{prefix}", markup=False)
    return KafkaBroker(settings)


def _check_alterations(declared: Sequence[Topic], named: Sequence[str]) -> None:
    """Refuse names that no declaration has: they are slips of the pen."""
    known = {key for topic in declared for name in topic.config for key in (name, f"{topic.name}:{name}")}
    if unknown := [name for name in named if name not in known]:
        raise ValueError(f"--alter-config: not declared for any topic: {', '.join(unknown)}")


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what can go wrong into lines on standard error and the exit code that is promised for it."""
    try:
        yield
    except TopicsError as error:
        _fail([*error.problems, "no topic that exists was changed"], EXIT_DIFFERS)
    except EventLogError as error:
        _fail([f"Kafka at {KafkaSettings().bootstrap}: {error}"], EXIT_KAFKA)
    except pydantic.ValidationError as error:
        _fail(settings_problems(error), EXIT_USAGE)
    except ValueError as error:
        _fail(str(error).splitlines(), EXIT_USAGE)


def _fail(lines: Sequence[str], code: int) -> None:
    for line in lines:
        typer.echo(line, err=True)
    raise typer.Exit(code) from None


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def _as_dict(topic: Topic) -> dict[str, Any]:
    return {
        "name": topic.name,
        "partition_count": topic.partition_count,
        "replication_factor": topic.replication_factor,
        "config": dict(topic.config),
        **topic.file.model_dump(exclude={"name", "config"}),
    }


def _print_differences(differences: Sequence[Difference]) -> None:
    table = Table("", "topic", "what", "declared", "found", "advice", show_lines=True)
    for difference in differences:
        colour = "red" if difference.severity == "error" else "yellow"
        table.add_row(
            f"[{colour}]{difference.severity}[/]",
            difference.topic,
            difference.what,
            difference.declared,
            difference.found,
            difference.advice,
        )
    Console().print(table)
