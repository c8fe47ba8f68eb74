"""Whether logs are what they were when their owners last worked: what must be known before an owner takes over (rule 10).

A log that was deleted and made again says nothing of its past. Its owners' group does: Kafka keeps what the group committed of
the input, and an owner announces itself in the log before it commits anything.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, TYPE_HEADER
from tidegate.topics.administration import AdministeredBroker
from tidegate.topics.apply import TopicsError


class OwnedLog(NamedTuple):
    """A log, the group of its owners, and the input by whose partitions they share it."""

    name: str
    group: str
    lead_topic: str


OWNED_LOGS: Final = (
    OwnedLog("run-events", "tidegate-scheduler", "run-commands"),
    OwnedLog("gate-ledger", "tidegate-gate", "gate-requests"),
)


def check_logs(broker: AdministeredBroker, topics: Collection[str]) -> None:
    """Refuse a log, if it and its lead topic are among the topics, that has partitions without a trace of its owners.

    Blocks for some round trips. Raises TopicsError with all problems, EventLogError if Kafka does not answer.
    """
    problems = []
    for log in OWNED_LOGS:
        if not {log.name, log.lead_topic} <= set(topics):
            continue  # somebody else's log, whose group we may not be allowed to ask about
        emptied = {
            partition: position
            for partition, position in sorted(committed(broker, log).items())
            if _is_emptied(broker, log, partition, position)
        }
        if emptied:
            problems.append(
                f"{log.name}: it was deleted and made again. Its owners have consumed "
                f"{', '.join(f'{log.lead_topic}-{p} up to {position}' for p, position in emptied.items())}, and it does not "
                "know of them. To go on would repeat everything that its inputs still hold. Restore it from a backup, with "
                "its offsets, or begin a new installation under another TIDEGATE_KAFKA_TOPIC_PREFIX"
            )
    if problems:
        raise TopicsError(problems)


def _is_emptied(broker: AdministeredBroker, log: OwnedLog, partition: int, position: int) -> bool:
    """Tell whether a partition has lost its past. What a surprised owner wrote last may be in the new one, unannounced."""
    start, end = broker.offsets(log.name, partition)
    if end >= position:
        return False  # nearly everything that is consumed makes an entry, so it has its past
    first = next(broker.read(log.name, partition, start, end), None)
    return first is None or (TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()) not in first.headers


def committed(broker: AdministeredBroker, log: OwnedLog) -> dict[int, int]:
    """Return what the group of a log's owners has committed, by partition. Blocks. Raises EventLogError."""
    return broker.committed(log.group, log.lead_topic)
