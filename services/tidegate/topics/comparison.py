"""What differs between a declared topic and the one that Kafka has, how bad it is and what to do. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from tidegate.eventlog.interface import TopicDescription
from tidegate.topics.declaration import CLEANUP_CONFIG, MIN_INSYNC_CONFIG, UNCLEAN_CONFIG, Topic, policies

Severity = Literal["error", "warning"]
MAX_MESSAGE_CONFIG: Final = "max.message.bytes"
RETENTION_BYTES_CONFIG: Final = "retention.bytes"
# How long a message is safe from deletion, and from a later one with its key.
_KEEPING_CONFIGS: Final = frozenset({"retention.ms", "min.compaction.lag.ms"})
_FOR_EVER: Final = -1


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing about one topic that is not as declared.

    what: `missing`, `partition count`, `replication factor`, or the name of a config entry. severity: an `error` can lose or
    block work, so nothing may run with it. advice: what to do about it.
    """

    topic: str
    what: str
    declared: str
    found: str
    severity: Severity
    advice: str

    @property
    def is_missing(self) -> bool:
        """Whether the topic is not there at all."""
        return self.what == "missing"

    def __str__(self) -> str:
        if self.is_missing:
            return f"{self.topic}: does not exist; {self.advice}"
        return f"{self.topic}: {self.what} is {self.found}, declared is {self.declared}; {self.advice}"


def compare(topic: Topic, found: TopicDescription | None, *, production: bool) -> list[Difference]:
    """Return the differences of one topic. In production, what could lose acknowledged records is an error."""
    if found is None:
        advice = "create it with `tidegate topics apply`"
        return [Difference(topic.name, "missing", f"{topic.partition_count} partitions", "nothing", "error", advice)]
    severity: Severity = "error" if production else "warning"
    return [
        *_partition_count(topic, found),
        *_replication(topic, found, severity),
        *_cleanup(topic, found),
        *_size_limit(topic, found, severity),
        *_other_config(topic, found, severity),
    ]


def group_problems(topics: Sequence[Topic], found: Mapping[str, TopicDescription]) -> list[str]:
    """Return what is wrong between topics: those of one group must have one partition count, whatever it is.

    For services, which take the count from Kafka and need no settings for it.
    """
    problems = []
    for group in sorted({topic.file.partition_group for topic in topics}):
        counts = {
            topic.name: found[topic.name].partition_count
            for topic in topics
            if topic.file.partition_group == group and topic.name in found
        }
        if group == "table" and any(count != 1 for count in counts.values()):
            problems.append(f"global tables must have one partition: {_listed(counts)}; delete them and apply again")
        elif group not in ("table", "tasks") and len(set(counts.values())) > 1:
            problems.append(
                f"topics of the group {group} must have the same number of partitions: {_listed(counts)}; "
                "what is wrong must be moved to new topics, because partition counts are fixed for good"
            )
    return problems


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} has {count}" for name, count in sorted(counts.items()))


def _partition_count(topic: Topic, found: TopicDescription) -> Iterator[Difference]:
    if found.partition_count != topic.partition_count:
        variable = f"TIDEGATE_TOPICS_PARTITIONS_{topic.file.partition_group.upper()}"
        yield Difference(
            topic.name,
            "partition count",
            str(topic.partition_count),
            str(found.partition_count),
            "error",
            f"it is fixed for good, because it decides where every run and account lives: set {variable}="
            f"{found.partition_count} if the topic is right, or use another TIDEGATE_KAFKA_TOPIC_PREFIX for a new start",
        )


def _replication(topic: Topic, found: TopicDescription, severity: Severity) -> Iterator[Difference]:
    if found.replication_factor < topic.replication_factor:
        yield Difference(
            topic.name,
            "replication factor",
            str(topic.replication_factor),
            str(found.replication_factor),
            severity,
            "a lost broker may lose records: add replicas with kafka-reassign-partitions.sh, or set "
            "TIDEGATE_TOPICS_REPLICATION_FACTOR if this is meant",
        )
    in_sync = int(found.config.get(MIN_INSYNC_CONFIG, "1"))
    if in_sync > found.replication_factor:
        yield Difference(
            topic.name,
            MIN_INSYNC_CONFIG,
            topic.config[MIN_INSYNC_CONFIG],
            str(in_sync),
            "error",
            f"with {found.replication_factor} replicas nothing can be written: {_alter(topic, MIN_INSYNC_CONFIG)}",
        )
    elif in_sync < int(topic.config[MIN_INSYNC_CONFIG]):
        yield Difference(
            topic.name,
            MIN_INSYNC_CONFIG,
            topic.config[MIN_INSYNC_CONFIG],
            str(in_sync),
            severity,
            f"acknowledged records may be on too few brokers: {_alter(topic, MIN_INSYNC_CONFIG)}",
        )
    if found.config.get(UNCLEAN_CONFIG, "false") != "false":
        yield Difference(
            topic.name,
            UNCLEAN_CONFIG,
            "false",
            found.config[UNCLEAN_CONFIG],
            severity,
            f"a broker that lags behind may become leader and drop acknowledged records: {_alter(topic, UNCLEAN_CONFIG)}",
        )


def _cleanup(topic: Topic, found: TopicDescription) -> Iterator[Difference]:
    wanted, there = policies(topic.config[CLEANUP_CONFIG]), policies(found.config.get(CLEANUP_CONFIG, "delete"))
    if there == wanted:
        return
    # A mailbox without `delete` only grows; everything else of this kind loses history or keeps what was replaced.
    severity: Severity = "warning" if there == {"compact"} else "error"
    why = (
        "it only grows" if severity == "warning" else "Kafka would delete what must be kept, or keep what was replaced"
    )
    yield Difference(
        topic.name,
        CLEANUP_CONFIG,
        topic.config[CLEANUP_CONFIG],
        found.config.get(CLEANUP_CONFIG, "delete"),
        severity,
        f"{why}: {_alter(topic, CLEANUP_CONFIG)}",
    )


def _size_limit(topic: Topic, found: TopicDescription, severity: Severity) -> Iterator[Difference]:
    """Yield that messages are deleted by size, however young they are; no topic of ours asks for it."""
    there = found.config.get(RETENTION_BYTES_CONFIG, str(_FOR_EVER))
    if "delete" in policies(topic.config[CLEANUP_CONFIG]) and int(there) != _FOR_EVER:
        yield Difference(
            topic.name,
            RETENTION_BYTES_CONFIG,
            str(_FOR_EVER),
            there,
            severity,
            "a flood would delete messages that nobody has read: remove it with "
            f"`kafka-configs.sh --alter --topic NAME --add-config {RETENTION_BYTES_CONFIG}={_FOR_EVER}`",
        )


def _other_config(topic: Topic, found: TopicDescription, severity: Severity) -> Iterator[Difference]:
    for name in sorted(topic.config.keys() - {CLEANUP_CONFIG, MIN_INSYNC_CONFIG, UNCLEAN_CONFIG}):
        declared, there = topic.config[name], found.config.get(name, "")
        if declared == there:
            continue
        how_bad, why = _judged(name, declared, there, severity)
        advice = f"{why}: {_alter(topic, name)}"
        yield Difference(topic.name, name, declared, there or "not set", how_bad, advice)


def _judged(name: str, declared: str, there: str, severity: Severity) -> tuple[Severity, str]:
    """Return how bad another value is, and why. `severity`: that of what can lose messages."""
    if name == MAX_MESSAGE_CONFIG and int(there or 0) < int(declared):
        return "error", "a record that is too large for the topic stops its writer for good"
    if name in _KEEPING_CONFIGS and int(there or 0) != _FOR_EVER and int(there or 0) < int(declared):
        return severity, "after an outage of that length messages may be gone that nobody has read"
    return "warning", "it may be meant"


def _alter(topic: Topic, name: str) -> str:
    return f"`tidegate topics apply --alter-config {topic.name}:{name}` sets it as declared"
