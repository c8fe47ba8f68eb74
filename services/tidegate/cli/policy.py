"""`tidegate policy apply|list|show|remove`: the gate's policies."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from tidegate import codec
from tidegate.cli.endings import EXIT_REFUSED, explained
from tidegate.cli.wording import counted
from tidegate.domain import canonical
from tidegate.domain.messages import PolicyPublished
from tidegate.eventlog.interface import Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.gate import limits
from tidegate.gate.limits import LimitError
from tidegate.gate.policy import Policy, PolicyError, parse
from tidegate.sdk.client import user_name

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Apply, list, show and remove policies of the gate. Exit codes: 0 done; 2 wrong usage, or a document that is no "
    "policy; 3 Kafka does not answer; 4 there is no such policy.",
)
POLICIES = "policies"


def _in_force(broker: KafkaBroker) -> dict[str, PolicyPublished]:
    tables = Tables((POLICIES,))
    tables.load(broker)
    return tables.rows[POLICIES]


@app.command()
@explained("policy apply")
def apply(
    files: Annotated[list[Path], typer.Argument(help="YAML or JSON documents; see docs/policy.md.", exists=True)],
) -> None:
    """Check policy documents, all of them first, and publish them: gates take them up as they run."""
    policies = []
    for file in files:
        try:
            policies += [_parsed(document) for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]
        except (PolicyError, LimitError, yaml.YAMLError) as error:
            problems = [str(error)] if isinstance(error, yaml.YAMLError) else error.problems
            for problem in problems:
                typer.echo(f"{file}: {problem}", err=True)
            raise typer.Exit(2) from None
    broker = KafkaBroker(KafkaSettings())
    writer = broker.writer()
    for policy in policies:
        row = PolicyPublished(
            policy_id=_key(policy),
            version=policy.version,
            document=canonical.dumps(policy.model_dump(mode="json", exclude_unset=True)),
            by=user_name(),
            at_ms=time.time_ns() // 1_000_000,
        )
        writer.send(Record(POLICIES, 0, _key(policy).encode(), codec.encode(row), ((TYPE_HEADER, b"PolicyPublished"),)))
    writer.flush(30.0)
    for policy in policies:
        what = counted(len(policy.rules), "rule") if isinstance(policy, Policy) else f"a {policy.kind}"
        typer.echo(f"published {_key(policy)}@{policy.version}: {what} (gates take it up within a second)")


def _parsed(document: Any) -> Policy | limits.Limit | limits.Queue:
    is_limit = isinstance(document, dict) and document.get("kind", "policy") != "policy"
    return limits.parse(document) if is_limit else parse(document)


def _key(document: Policy | limits.Limit | limits.Queue) -> str:
    return document.policy if isinstance(document, Policy) else document.topic_key


@app.command()
@explained("policy remove")
def remove(policy_id: Annotated[str, typer.Argument(help="The policy's id.")]) -> None:
    """Take a policy out of force."""
    broker = KafkaBroker(KafkaSettings())
    if policy_id not in _in_force(broker):
        typer.echo(f"there is no policy {policy_id!r}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    writer = broker.writer()
    writer.send(Record(POLICIES, 0, policy_id.encode(), None))
    writer.flush(30.0)
    typer.echo(f"removed {policy_id} (gates let go of it within a second)")


@app.command("list")
@explained("policy list")
def list_() -> None:
    """List the policies in force."""
    table = Table("policy", "version", "rules", "by")
    for policy_id, row in sorted(_in_force(KafkaBroker(KafkaSettings())).items()):
        table.add_row(policy_id, row.version, str(len(canonical.loads(row.document).get("rules", ()))), row.by)
    Console().print(table)


@app.command()
@explained("policy show")
def show(policy_id: Annotated[str, typer.Argument(help="The policy's id.")]) -> None:
    """Print a policy in force as JSON."""
    row = _in_force(KafkaBroker(KafkaSettings())).get(policy_id)
    if row is None:
        typer.echo(f"there is no policy {policy_id!r}", err=True)
        raise typer.Exit(EXIT_REFUSED)
    json.dump(canonical.loads(row.document), sys.stdout, indent=2)
    sys.stdout.write("\n")
