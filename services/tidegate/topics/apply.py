"""Declared topics on a Kafka: what differs, making what is missing, and the check that services do at start.

Nothing that exists is ever altered, unless the entry was named by who asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from tidegate.eventlog.interface import Broker, EventLogError, TopicDescription
from tidegate.topics.administration import AdministeredBroker, alter, await_made, create
from tidegate.topics.comparison import Difference, compare, group_problems
from tidegate.topics.declaration import Topic, load_topics
from tidegate.topics.settings import TopicsSettings

_log = structlog.get_logger()


class TopicsError(EventLogError):
    """Topics are not fit for use; `problems` lists everything that is wrong, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` did (`created` topics, `altered` config entries) and what differs still and may."""

    created: list[str]
    altered: list[Difference]
    warnings: list[Difference]


def diff(broker: Broker, declared: Sequence[Topic], *, production: bool = False) -> list[Difference]:
    """Return how the topics on Kafka differ from the declared ones. Blocks for a round trip or two. Raises EventLogError."""
    found = broker.describe([topic.name for topic in declared])
    return [
        difference for topic in declared for difference in compare(topic, found.get(topic.name), production=production)
    ]


def apply(
    broker: AdministeredBroker,
    declared: Sequence[Topic],
    *,
    production: bool = False,
    alter_config: Collection[str] = (),
    on_progress: Callable[[str], None] = lambda _: None,
) -> Applied:
    """Create the topics that are missing; alter the config entries named in `alter_config` (`KEY` or `TOPIC:KEY`).

    If anything else is wrong with a topic that exists, nothing is created or altered at all. Idempotent; several may do it
    at once. Blocks until what was done is in force. Raises TopicsError with all problems, EventLogError if Kafka fails or refuses.
    """
    differences = diff(broker, declared, production=production)
    if await_made(broker, _missing(declared, differences)):
        differences = diff(broker, declared, production=production)
    to_alter = [difference for difference in differences if _may_alter(difference, alter_config)]
    left = [difference for difference in differences if not difference.is_missing and difference not in to_alter]
    _refuse_errors(left)
    created = create(broker, _missing(declared, differences), on_progress)
    if late := [topic for topic in _missing(declared, differences) if topic.name not in created]:
        # Somebody else made these meanwhile, perhaps otherwise than declared.
        found = diff(broker, late, production=production)
        _refuse_errors(found)
        left += found
    alter(broker, to_alter, on_progress)
    return Applied(created, to_alter, left)


def _missing(declared: Sequence[Topic], differences: Sequence[Difference]) -> list[Topic]:
    missing = {difference.topic for difference in differences if difference.is_missing}
    return [topic for topic in declared if topic.name in missing]


def _refuse_errors(differences: Sequence[Difference]) -> None:
    errors = [difference for difference in differences if difference.severity == "error"]
    if errors:
        raise TopicsError([str(difference) for difference in errors])


def _may_alter(difference: Difference, named: Collection[str]) -> bool:
    is_config = difference.what not in ("missing", "partition count", "replication factor")
    return is_config and (difference.what in named or f"{difference.topic}:{difference.what}" in named)


def apply_command(names: Iterable[str]) -> str:
    """Return the command that makes topics: those of a queue only if it is named."""
    return " ".join(["tidegate topics apply", *(f"--queue {queue}" for queue in _queues_of(names))])


def _queues_of(names: Iterable[str]) -> list[str]:
    """Return the queues that have their tasks in some of the topics."""
    return [name.partition(".")[2] for name in names if name.startswith("step-tasks.")]


def check_at_start(
    broker: Broker, names: Sequence[str], *, production: bool, found: Mapping[str, TopicDescription] | None = None
) -> None:
    """Check the topics that a service is about to use. Blocks for a round trip or two unless `found` says what the broker has.

    Partition counts are taken as they are: services learn them from Kafka, so only the topics of one group must agree.
    Raises TopicsError with all problems; warnings are logged.
    """
    wanted = set(names)
    # A service may use topics of queues that the settings do not name, so theirs are taken from the names.
    queues = _queues_of(names)
    settings = TopicsSettings(production=production)
    declared = [topic for topic in load_topics(queues, settings) if topic.name in wanted]
    if unknown := wanted - {topic.name for topic in declared}:
        raise TopicsError([f"{name}: no such topic is declared in schemas/topics" for name in sorted(unknown)])
    if found is None:
        found = broker.describe(sorted(wanted))
    problems = group_problems(declared, found)
    for topic in declared:
        for difference in compare(topic, found.get(topic.name), production=production):
            if difference.what == "partition count":
                continue
            if difference.severity == "error":
                problems.append(str(difference))
            else:
                _log.warning("topic not as declared", problem=str(difference))
    if problems:
        raise TopicsError(problems)
