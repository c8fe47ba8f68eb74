"""`tidegate topics acls`, and what `apply --acls` and `diff --acls` do: who may do what on Kafka, as the topics declare it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Final, Literal

import typer
import yaml

from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.topics.access import AccessProblem, Grant, Principals, compare, grants, kafka_commands, strimzi_acls
from tidegate.topics.acls import found_grants, set_grants
from tidegate.topics.declaration import Topic

Format = Literal["kafka", "strimzi", "json"]
Principal = Annotated[
    list[str] | None,
    typer.Option(
        "--principal",
        metavar="ROLE=PRINCIPAL",
        help="Who plays a role: scheduler, gate, executor, projection, gateway, cli, topics, user, or executor@QUEUE. "
        "Repeatable, also for one role. Default: User:tidegate-ROLE.",
    ),
]
USER: Final = "User:"


def wanted_grants(topics: Sequence[Topic], principals: Sequence[str] | None) -> list[Grant]:
    """Return the grants of this installation. Raises ValueError for principals that are none."""
    return grants(topics, Principals(principals or ()), KafkaSettings().topic_prefix)


def apply_acls(broker: KafkaBroker, wanted: Sequence[Grant]) -> list[Grant]:
    """Set the grants that are not there, and return them. Blocks. Raises EventLogError."""
    admin = broker.admin_client()
    return set_grants(admin, wanted, found_grants(admin))


def acl_problems(broker: KafkaBroker, wanted: Sequence[Grant]) -> list[AccessProblem]:
    """Return what is missing, and who may change a topic though nobody declared it. Blocks. Raises EventLogError."""
    return compare(wanted, found_grants(broker.admin_client()))


def printed(wanted: Sequence[Grant], form: Format) -> str:
    """Return the grants as a script for Kafka's tool, as Strimzi's users, or as JSON."""
    if form == "json":
        return json.dumps([grant._asdict() for grant in wanted], indent=2) + "\n"
    if form == "kafka":
        return kafka_commands(wanted)
    users = [kafka_user(principal, acls) for principal, acls in strimzi_acls(wanted).items()]
    return yaml.safe_dump_all(users, sort_keys=False, explicit_start=True, width=120)


def kafka_user(principal: str, acls: list[dict[str, object]]) -> dict[str, object]:
    """Return a KafkaUser of Strimzi, for whom it makes a password. The label names the Kafka and is yours to change."""
    return {
        "apiVersion": "kafka.strimzi.io/v1",
        "kind": "KafkaUser",
        "metadata": {
            "name": principal.removeprefix(USER),
            "labels": {"strimzi.io/cluster": "tidegate"},
        },
        "spec": {
            "authentication": {"type": "scram-sha-512"},
            "authorization": {"type": "simple", "acls": acls},
        },
    }
