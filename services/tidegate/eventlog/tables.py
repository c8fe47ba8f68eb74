"""Global tables: compacted one-partition topics that every process reads whole (`workflows`, `policies`, `instances`)."""

from __future__ import annotations

from typing import Any

import structlog

from tidegate import codec
from tidegate.eventlog.interface import Broker, Message, TopicPartition

_log = structlog.get_logger()


class Tables:
    """The rows of some global tables by key, and the next offset of each: the version that a decision used."""

    def __init__(self, topics: tuple[str, ...]) -> None:
        self.topics = topics
        self.versions: dict[str, int] = dict.fromkeys(topics, 0)
        self.rows: dict[str, dict[str, Any]] = {topic: {} for topic in topics}
        self.offsets: dict[str, dict[str, int]] = {topic: {} for topic in topics}

    def load(self, broker: Broker) -> None:
        """Read every table up to its present end. Blocks; raises EventLogError."""
        for topic in self.topics:
            start, end = broker.offsets(topic, 0)
            for message in broker.read(topic, 0, max(start, self.versions[topic]), end):
                self.take(message)
            self.versions[topic] = max(end, self.versions[topic])

    def positions(self) -> dict[TopicPartition, int]:
        """Return where to go on reading."""
        return {TopicPartition(topic, 0): version for topic, version in self.versions.items()}

    def take(self, message: Message) -> Any | None:
        """Fold one record of a table; returns the decoded row, None for a tombstone or a record that cannot be read.

        A broken record is logged and skipped: the row of before stays, so that one bad writer cannot take a table away.
        """
        rows, key = self.rows[message.topic], (message.key or b"").decode("utf-8", "replace")
        self.versions[message.topic] = message.offset + 1
        if message.value is None:
            rows.pop(key, None)
            self.offsets[message.topic].pop(key, None)
            return None
        try:
            row = codec.decode(message.value)
        except codec.DecodeError as error:
            _log.error("table record skipped", topic=message.topic, offset=message.offset, key=key, error=str(error))
            return None
        rows[key] = row
        self.offsets[message.topic][key] = message.offset
        return row
