"""ACLs on the brokers: what of `access.py` speaks to Kafka's administration. Physical names only."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from tidegate.eventlog.interface import EventLogError
from tidegate.topics.access import FoundGrant, Grant

REQUEST_TIMEOUT_S: Final = 30.0
ASK_AGAIN_S: Final = 0.1
ANY_HOST: Final = "*"
_PATTERNS: Final = {"literal": ResourcePatternType.LITERAL, "prefixed": ResourcePatternType.PREFIXED}

_MAY_NOT: Final = (
    "this user may not see or set ACLs: Kafka asks for Describe (to see) and Alter (to set) on the cluster. Let who may do "
    "that run the script that `tidegate topics acls --format kafka` prints"
)


def found_grants(admin: AdminClient) -> list[FoundGrant]:
    """Return everything that the brokers' ACLs allow about topics and groups. Blocks. Raises EventLogError."""
    anything: Any = None  # a filter's names are optional, whatever the client's types say
    everything = AclBindingFilter(
        ResourceType.ANY,
        anything,
        ResourcePatternType.ANY,
        anything,
        anything,
        AclOperation.ANY,
        AclPermissionType.ALLOW,
    )
    try:
        bindings = admin.describe_acls(everything, request_timeout=REQUEST_TIMEOUT_S).result()
        if not bindings:
            _refuse_blindness(admin)
    except KafkaException as error:
        raise _explained(error.args[0]) from error
    return [
        FoundGrant(
            binding.principal,
            binding.restype.name.lower(),
            binding.name,
            binding.resource_pattern_type.name.lower(),
            _words(binding.operation.name),
        )
        for binding in bindings
    ]


def _refuse_blindness(admin: AdminClient) -> None:
    """Raise EventLogError if there may be ACLs that we do not see: who may not, is answered with none of them."""
    cluster = admin.describe_cluster(include_authorized_operations=True, request_timeout=REQUEST_TIMEOUT_S).result()
    if AclOperation.DESCRIBE not in (cluster.authorized_operations or ()):
        raise EventLogError(_MAY_NOT)


def set_grants(admin: AdminClient, wanted: Sequence[Grant], there: Collection[FoundGrant]) -> list[Grant]:
    """Make those of the grants that are not there; return them. Takes nothing away. Raises EventLogError.

    Blocks until a broker that is asked knows them, too: the controller has them a moment before.
    """
    missing = [grant for grant in wanted if FoundGrant(*grant) not in set(there)]
    if not missing:
        return []
    futures: dict[AclBinding, Future[Any]] = admin.create_acls(
        [_binding(grant) for grant in missing], request_timeout=REQUEST_TIMEOUT_S
    )
    for future in futures.values():
        try:
            future.result()
        except KafkaException as error:
            raise _explained(error.args[0]) from error
    made = {FoundGrant(*grant) for grant in missing}
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    while not made <= set(found_grants(admin)) and time.monotonic() < deadline:
        time.sleep(ASK_AGAIN_S)
    return missing


def _binding(grant: Grant) -> AclBinding:
    kind = ResourceType.TOPIC if grant.resource == "topic" else ResourceType.GROUP
    operation = getattr(AclOperation, "".join(f"_{c}" if c.isupper() else c for c in grant.operation)[1:].upper())
    pattern = _PATTERNS[grant.pattern]
    return AclBinding(kind, grant.name, pattern, grant.principal, ANY_HOST, operation, AclPermissionType.ALLOW)


def _words(name: str) -> str:
    """Return `DescribeConfigs` for `DESCRIBE_CONFIGS`."""
    return "".join(part.capitalize() for part in name.split("_"))


def _explained(error: KafkaError) -> EventLogError:
    if error.code() == KafkaError.SECURITY_DISABLED:
        return EventLogError(
            "the brokers have no authorizer, so everybody may do everything: set authorizer.class.name (docs/security.md)"
        )
    if error.code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
        return EventLogError(_MAY_NOT)
    return EventLogError(f"Kafka refuses: {error.str()} ({error.name()})")
