"""Who may do what on Kafka, derived from the topics' declared writers and readers. Pure.

The guarantee that nothing runs which the gate did not allow rests on this: `step-tasks.*` and `gate-ledger` have one writer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from tidegate.eventlog.settings import READERS_GROUP
from tidegate.topics.declaration import QUEUE_PLACE, SERVICES, Topic, TopicFile

Resource = Literal["topic", "group"]
Pattern = Literal["literal", "prefixed"]
Operation = Literal["Read", "Write", "DescribeConfigs", "Describe", "Create", "AlterConfigs"]

ROLES: Final = (*SERVICES, "cli", "topics", "user")
DEFAULT_PRINCIPAL: Final = "User:tidegate-{role}"
WILDCARD: Final = "*"
# Words of the declarations that stand for several roles.
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {"all": (*SERVICES, "cli"), "any": ROLES}
# The consumer groups of each role; a trailing `*` stands for anything. Their names are those in the services' code.
GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    "scheduler": ("tidegate-scheduler", "tidegate-admission"),
    "gate": ("tidegate-gate",),
    "projection": ("tidegate-projection*",),
    "gateway": ("tidegate-gateway-*",),
    "cli": ("tidegate-projection*",),  # `tidegate replay offsets`
}
# Operations that change what a topic holds or who may use it. A stranger who has one of them breaks the guarantee.
CHANGING: Final = frozenset({"Write", "All", "Alter", "AlterConfigs", "Delete"})


class Grant(NamedTuple):
    """A principal may do an operation on a resource. What `Read` and `Write` imply (Describe) is not said again."""

    principal: str
    resource: Resource
    name: str
    pattern: Pattern
    operation: Operation


class FoundGrant(NamedTuple):
    """What the brokers have: as `Grant`, but with whatever words they know."""

    principal: str
    resource: str
    name: str
    pattern: str
    operation: str


@dataclass(frozen=True, slots=True)
class AccessProblem:
    """One thing about the ACLs that is not as declared, and what to do about it."""

    kind: Literal["missing", "surplus"]
    grant: Grant | FoundGrant
    advice: str

    def __str__(self) -> str:
        grant = self.grant
        verb = "may not" if self.kind == "missing" else "may"
        where = f"{grant.resource} {grant.name}{'*' if grant.pattern == 'prefixed' else ''}"
        return f"{grant.principal} {verb} {grant.operation} {where}; {self.advice}"


class Principals:
    """Which principals play a role. Roles are those of `ROLES`, and `executor@QUEUE` for executors of one queue alone."""

    def __init__(self, given: Iterable[str] = ()) -> None:
        """Take `ROLE=PRINCIPAL` texts; a role may have several. Raises ValueError with all that are wrong."""
        self._given: dict[str, list[str]] = {}
        problems = []
        for text in given:
            role, separator, principal = text.partition("=")
            if not separator or not principal or role.partition("@")[0] not in ROLES:
                problems.append(f"not ROLE=PRINCIPAL with a role of {', '.join(ROLES)} or executor@QUEUE: {text!r}")
            elif "@" in role and not role.startswith("executor@"):
                problems.append(f"only executors are told apart by queue: {text!r}")
            else:
                self._given.setdefault(role, []).append(principal if ":" in principal else f"User:{principal}")
        if problems:
            raise ValueError("\n".join(problems))

    def of(self, role: str, queue: str | None = None) -> tuple[str, ...]:
        """Return the principals of a role: of executors those of all queues, and with `queue` those of that one, too.

        A role that nobody was named for has the default one; executors have it only if no queue's were named either.
        """
        named = list(self._given.get(role, ()))
        if role == "executor":
            by_queue = {name: found for name, found in self._given.items() if name.startswith("executor@")}
            wanted = by_queue.values() if queue is None else (by_queue.get(f"executor@{queue}", ()),)
            named += [principal for found in wanted for principal in found]
            if by_queue:
                return tuple(dict.fromkeys(named))
        return tuple(dict.fromkeys(named)) or (DEFAULT_PRINCIPAL.format(role=role),)


def grants(topics: Sequence[Topic], principals: Principals, prefix: str = "") -> list[Grant]:
    """Return everything that the roles need, and nothing else, sorted. `prefix`: of the names of topics and groups."""
    found: set[Grant] = set()
    for topic in topics:
        found.update(_of_topic(topic, principals, prefix))
    for role, groups in GROUPS.items():
        for principal in principals.of(role):
            for group in groups:
                pattern: Pattern = "prefixed" if group.endswith("*") else "literal"
                found.add(Grant(principal, "group", prefix + group.removesuffix("*"), pattern, "Read"))
    # Who reads without a group is not let into this one, but may ask for its coordinator: the client asks again and again.
    readers = {grant.principal for grant in found if grant.resource == "topic" and grant.operation == "Read"}
    found.update(Grant(principal, "group", prefix + READERS_GROUP, "literal", "Describe") for principal in readers)
    return sorted(found)


def used_by(role: str, files: Iterable[TopicFile], queue: str | None = None) -> list[str]:
    """Return the names of the topics that a role writes or reads, sorted. Of topics of tasks only the queue's, if there is one.

    The gate writes those of all queues, which come and go while it runs: whoever serves a queue vouches for its topic.
    """
    names = [
        file.name.replace(QUEUE_PLACE, queue or "")
        for file in files
        if role in _roles([*file.writers, *file.readers]) and (queue is not None or not file.is_template)
    ]
    return sorted(names)


def _of_topic(topic: Topic, principals: Principals, prefix: str) -> Iterator[Grant]:
    name = prefix + topic.name
    queue = topic.name.partition(".")[2] if topic.file.is_template else None
    writers, readers = _roles(topic.file.writers), _roles(topic.file.readers)
    for role, operation in [*((role, "Write") for role in writers), *((role, "Read") for role in readers)]:
        for principal in principals.of(role, queue):
            yield Grant(principal, "topic", name, "literal", "Write" if operation == "Write" else "Read")
            # A service looks at the settings of what it uses before it starts.
            yield Grant(principal, "topic", name, "literal", "DescribeConfigs")
    administration: tuple[Operation, ...] = ("Create", "Describe", "DescribeConfigs", "AlterConfigs")
    for principal in principals.of("topics"):
        for operation in administration:
            yield Grant(principal, "topic", name, "literal", operation)


def _roles(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(role for word in words for role in _WORDS.get(word, (word,))))


def compare(wanted: Collection[Grant], found: Collection[FoundGrant]) -> list[AccessProblem]:
    """Return what is missing for the services to work, and who else may change the topics they rest on."""
    missing = [grant for grant in sorted(set(wanted)) if not any(_covers(have, grant) for have in found)]
    allowed = {(grant.principal, grant.resource, grant.name, grant.operation) for grant in wanted}
    topics = sorted({grant.name for grant in wanted if grant.resource == "topic"})
    surplus = [
        have
        for have in sorted(set(found))
        if have.resource == "topic" and have.operation in CHANGING and _is_surplus(have, topics, allowed)
    ]
    return [
        *(AccessProblem("missing", grant, "set it with `tidegate topics apply --acls`") for grant in missing),
        *(AccessProblem("surplus", have, "nobody declared that: remove it") for have in surplus),
    ]


def _covers(have: FoundGrant, wanted: Grant) -> bool:
    implied = {"Describe": {"Read", "Write", "Delete", "Alter"}, "DescribeConfigs": {"AlterConfigs"}}
    return (
        have.principal in {wanted.principal, "User:*"}
        and have.resource == wanted.resource
        and _matches(have, wanted.name)
        and have.operation in {wanted.operation, "All", *implied.get(wanted.operation, ())}
    )


def _matches(have: FoundGrant, name: str) -> bool:
    if have.pattern == "prefixed":
        return name.startswith(have.name)
    return have.name in {name, WILDCARD}


def _is_surplus(have: FoundGrant, topics: Sequence[str], allowed: Collection[tuple[str, str, str, str]]) -> bool:
    touched = [name for name in topics if _matches(have, name)]
    return any((have.principal, "topic", name, have.operation) not in allowed for name in touched)


def kafka_commands(wanted: Sequence[Grant]) -> str:
    """Return the grants as a shell script of Kafka's own tool, one line for what a principal may do with a resource."""
    lines = [
        "#!/bin/sh -e",
        "# BOOTSTRAP: host:port of a broker. ADMIN_CONFIG: properties file with which you are let in as one who may alter ACLs.",
    ]
    for (principal, resource, name, pattern), operations in _by_resource(wanted).items():
        words = " ".join(f"--operation {operation}" for operation in operations)
        lines.append(
            'kafka-acls.sh --bootstrap-server "$BOOTSTRAP" --command-config "$ADMIN_CONFIG" --add '
            f"--allow-principal {_quoted(principal)} {words} --{resource} {_quoted(name)} --resource-pattern-type {pattern}"
        )
    return "\n".join(lines) + "\n"


def strimzi_acls(wanted: Sequence[Grant]) -> dict[str, list[dict[str, object]]]:
    """Return, by principal, the `acls` of a KafkaUser's simple authorization."""
    users: dict[str, list[dict[str, object]]] = {}
    for (principal, resource, name, pattern), operations in _by_resource(wanted).items():
        what = {"type": resource, "name": name, "patternType": "prefix" if pattern == "prefixed" else "literal"}
        users.setdefault(principal, []).append({"resource": what, "operations": operations, "host": "*"})
    return users


def _by_resource(wanted: Sequence[Grant]) -> dict[tuple[str, Resource, str, Pattern], list[str]]:
    grouped: dict[tuple[str, Resource, str, Pattern], list[str]] = {}
    for grant in sorted(wanted):
        key = (grant.principal, grant.resource, grant.name, grant.pattern)
        grouped.setdefault(key, []).append(grant.operation)
    return grouped


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
