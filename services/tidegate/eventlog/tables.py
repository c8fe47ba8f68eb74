"""Global tables: compacted one-partition topics that every process reads whole (`workflows`, `policies`, …)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import structlog

from tidegate import codec
from tidegate.domain.messages import Control, Instance, PolicyPublished, WorkflowPublished
from tidegate.eventlog.interface import Broker, Message, TopicPartition

_ROWS: Final = {
    "workflows": WorkflowPublished,
    "policies": PolicyPublished,
    "instances": Instance,
    "controls": Control,
}

# Where a row that cannot be read must not be taken for none. Instances repeat theirs with every heartbeat.
_KEEPS_UNREADABLE: Final = frozenset({"workflows", "policies", "controls"})

MAX_PROBLEM: Final = 200
_log = structlog.get_logger()


class Unreadable(NamedTuple):
    """Stands in a table for a row of which nothing is known: its latest record cannot be read, and Kafka has none of before."""

    topic: str
    key: str
    offset: int
    problem: str

    def __str__(self) -> str:
        return f"the record at {self.topic}-0@{self.offset}, under the key {self.key!r}, cannot be read: {self.problem}"


def readable(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of a table that can be read."""
    return {key: row for key, row in rows.items() if not isinstance(row, Unreadable)}


class Tables:
    """The rows of some global tables by key, and the next offset of each: the version that a decision used.

    decode: turns a record into a row. Who decides by the rows gives one that looks for schemas which it does not know: a policy
    that a newer version published must not be missed.
    """

    def __init__(self, topics: tuple[str, ...], decode: Callable[[bytes], Any] = codec.decode) -> None:
        self.topics = topics
        self._decode = decode
        self.versions: dict[str, int] = dict.fromkeys(topics, 0)
        self.rows: dict[str, dict[str, Any]] = {topic: {} for topic in topics}
        self.offsets: dict[str, dict[str, int]] = {topic: {} for topic in topics}
        # Up to where records may have been compacted away that were not read, by topic. Whoever begins has no such place: what it
        # reads of a key is the latest that there was, or all that there is.
        self.unread: dict[str, int] = dict.fromkeys(topics, 0)

    def load(self, broker: Broker) -> None:
        """Read every table up to its present end. Blocks; raises EventLogError."""
        for topic in self.topics:
            start, end = broker.offsets(topic, 0)
            take = self.take if self.versions[topic] else self._fold
            for message in broker.read(topic, 0, max(start, self.versions[topic]), end):
                take(message)
            self.versions[topic] = max(end, self.versions[topic])

    def positions(self) -> dict[TopicPartition, int]:
        """Return where to go on reading."""
        return {TopicPartition(topic, 0): version for topic, version in self.versions.items()}

    def take(self, message: Message) -> bool:
        """Fold one record of a table; returns whether it changed anything: a row is there, or a tombstone removed one.

        A record that is broken or of another kind is logged and skipped: the row of before stays, so that one bad writer
        cannot take a policy or an executor away. If there is no row of before, or there may have been a later one, Kafka may have
        compacted it away: then the row is `Unreadable`, and whoever decides by it must do what is safe whatever it said.
        """
        if message.offset > self.versions[message.topic]:
            self.unread[message.topic] = message.offset
        return self._fold(message)

    def _fold(self, message: Message) -> bool:
        rows, key = self.rows[message.topic], (message.key or b"").decode("utf-8", "replace")
        self.versions[message.topic] = message.offset + 1
        if message.value is None:
            self.offsets[message.topic].pop(key, None)
            return rows.pop(key, None) is not None
        try:
            row = self._decode(message.value)
            if not isinstance(row, _ROWS.get(message.topic, object)):
                raise codec.DecodeError(f"a {type(row).__name__} has no place here")
        except codec.DecodeError as error:
            _log.error("table record skipped", topic=message.topic, offset=message.offset, key=key, error=str(error))
            if message.topic not in _KEEPS_UNREADABLE or self._is_latest(message.topic, key):
                return False
            row = Unreadable(message.topic, key, message.offset, str(error)[:MAX_PROBLEM])
        rows[key] = row
        self.offsets[message.topic][key] = message.offset
        return True

    def _is_latest(self, topic: str, key: str) -> bool:
        """Tell whether there is a row that was the latest of its key until now, for certain."""
        return (
            not isinstance(self.rows[topic].get(key), Unreadable | None)
            and self.offsets[topic][key] >= self.unread[topic]
        )
