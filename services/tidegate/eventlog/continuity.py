"""Whether a topic is still the one that was written to: one that is deleted and made again keeps its name only (rule 10)."""

from __future__ import annotations

from tidegate.eventlog.interface import Broker, TopicDescription
from tidegate.eventlog.machine import RefusedToStartError


def same_topic(broker: Broker, known: TopicDescription) -> TopicDescription:
    """Return what Kafka says of a topic now. Blocks for a round trip or two.

    Raises RefusedToStartError if it is another one than the known, or none: an owner that lost its place in its log must not
    begin anew in an empty one, and decide again on everything that its inputs still hold.
    """
    found = broker.describe([known.name]).get(known.name)
    if found is None:
        raise RefusedToStartError(
            f"{known.name} was deleted while its owner was at work. Restore it from a backup, with its offsets; an empty topic "
            "in its place will be refused."
        )
    if found.topic_id != known.topic_id:
        raise RefusedToStartError(
            f"{known.name} was deleted and made again while its owner was at work: its topic id was {known.topic_id} and is "
            f"{found.topic_id} now. Restore it from a backup, with its offsets, or begin a new installation under another "
            "TIDEGATE_KAFKA_TOPIC_PREFIX."
        )
    return found
