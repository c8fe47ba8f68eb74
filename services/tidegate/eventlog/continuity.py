"""Whether a topic is still the one that was written to: one that is deleted and made again keeps its name only (rule 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidegate.domain.entry import OwnerAnnounced
from tidegate.eventlog.interface import Broker, TopicDescription
from tidegate.eventlog.machine import RefusedToStartError


def same_topics(
    broker: Broker, log: str, inputs: Sequence[str], known: Mapping[str, TopicDescription]
) -> Mapping[str, TopicDescription]:
    """Return what Kafka says of a log and its inputs now; of an input that does not exist, what is known. Blocks for a round trip
    or two.

    Raises RefusedToStartError if there is no log, or another topic than the known one under one of the names: an owner that lost
    its place in its log must not begin anew in an empty one, and decide again on everything that its inputs still hold.
    """
    found = broker.describe([log, *inputs])
    if log not in found:
        if not known:
            raise RefusedToStartError(f"topic {log} does not exist: run `tidegate topics apply`")
        raise RefusedToStartError(
            f"{log} was deleted while its owner was at work. Restore it from a backup, with its offsets; an empty topic "
            "in its place will be refused."
        )
    if log in known:
        _same_count(log, known[log].partition_count, found[log].partition_count)
    for name in found.keys() & known.keys():
        if found[name].topic_id != known[name].topic_id:
            raise RefusedToStartError(
                f"{name} was deleted and made again while its owner was at work: its topic id was {known[name].topic_id} and is "
                f"{found[name].topic_id} now. Restore it from a backup, with its offsets, or begin a new installation under "
                "another TIDEGATE_KAFKA_TOPIC_PREFIX."
            )
    return {**known, **found}


def check_announcement(record: OwnerAnnounced, topics: Mapping[str, TopicDescription]) -> None:
    """Raise RefusedToStartError if a log or its inputs are not the topics that they were when an owner announced itself.

    Announcements of former versions do not name the inputs.
    """
    log = topics[record.log]
    _same_count(record.log, record.partition_count, log.partition_count)
    if record.topic_id != log.topic_id:
        raise RefusedToStartError(
            f"{record.log} was written under topic id {record.topic_id} and is {log.topic_id} now: it was deleted and "
            "made again, and its recorded offsets mean nothing. Restore it from a backup under a new installation."
        )
    for name, topic_id in record.input_topics.items():
        if name in topics and topics[name].topic_id != topic_id:
            raise RefusedToStartError(
                f"{name} had the topic id {topic_id} when an owner of {record.log} began to consume it, and has "
                f"{topics[name].topic_id} now: it was deleted and made again, and the recorded offsets mean nothing in it. Restore "
                "it from a backup, with its offsets (the runbook backup-and-restore), or begin a new installation under another "
                "TIDEGATE_KAFKA_TOPIC_PREFIX."
            )


def _same_count(log: str, before: int, now: int) -> None:
    if now != before:
        raise RefusedToStartError(
            f"{log} had {before} partitions when it was written and has {now} now. Runs would be looked for in the wrong "
            "partition. Restore the topic with its old partition count."
        )
