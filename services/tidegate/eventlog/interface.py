"""What Tidegate needs of a log: the whole surface, small enough that an in-memory one can keep the same promises.

Two implementations pass one contract suite (`tests/contract`): `kafka`, the real thing, and `memory.py`, for simulation.
Nothing here knows what the bytes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import msgspec

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    """A topic's partition."""

    topic: str
    partition: int


class Record(msgspec.Struct, frozen=True, gc=False):
    """A record to be written, to an explicit partition. `value` None is a tombstone."""

    topic: str
    partition: int
    key: bytes
    value: bytes | None
    headers: Headers = ()


class Message(msgspec.Struct, frozen=True, gc=False):
    """A record as read. `timestamp_ms` is the broker's create time."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


class Offsets(NamedTuple):
    """First offset kept (`start`) and the offset that the next record will get (`end`) of a partition."""

    start: int
    end: int


class TopicDescription(NamedTuple):
    """What the broker says of a topic. `topic_id` changes when a topic is deleted and made again."""

    name: str
    topic_id: str
    partition_count: int
    replication_factor: int
    config: Mapping[str, str]


class OwnershipChange(NamedTuple):
    """Partitions of the lead topic that the group gave to us (`gained`) or took from us (`lost`) since the last call."""

    gained: frozenset[int]
    lost: frozenset[int]


class EventLogError(RuntimeError):
    """Something about the log failed and cannot be repaired in memory: take over afresh, or exit."""


class WriteFailedError(EventLogError):
    """A record was not acknowledged: refused, timed out or fenced. What became of it is unknown."""


class UnknownTopicError(EventLogError):
    """The topic or partition does not exist."""


class GroupInUseError(EventLogError):
    """A consumer group has members: only they can say where it reads on."""


class OffsetOutOfRangeError(EventLogError):
    """A position lies below the first offset kept or beyond the end."""


class Writer(Protocol):
    """An idempotent producer: all in-sync replicas acknowledge, order per partition is kept, nothing is skipped.

    Not thread-safe. After WriteFailedError the writer is dead: every further call raises it again.
    """

    def send(self, record: Record, acked: Callable[[int], None] | None = None) -> None:
        """Buffer a record. `acked(offset)` is called from a later `poll` or `flush` of this thread, in order per partition.

        Blocks only while the local buffer is full. Raises WriteFailedError.
        """

    def poll(self) -> None:
        """Run the callbacks of what was acknowledged. Does not block. Raises WriteFailedError."""

    def flush(self, timeout_s: float) -> None:
        """Block until everything sent is acknowledged. Raises WriteFailedError if not so within `timeout_s`."""

    def close(self) -> None:
        """Give up what is not acknowledged and free the connection. Does not raise."""


NO_SHARE: Final = "the group of {} has given us no share of its partitions"  # why a member of a group is not ready


class Inbox(Protocol):
    """A consumer whose group decides who owns the partitions of one lead topic; everything else is assigned by hand.

    Not thread-safe. The group's committed offsets are for people and dashboards: where reading starts is said by
    `read_from`, from what the log itself records.
    """

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return messages of the partitions in `read_from`, in order per partition; waits for the first one only.

        Blocks up to `timeout_s`. Also keeps the group membership alive. Raises EventLogError on fatal errors and
        OffsetOutOfRangeError for a position that is not there (it never jumps silently).
        """

    def stay(self) -> None:
        """Keep the group membership alive and read nothing: for whoever is busy for longer than the group waits for a poll.

        Does not block. `take_changes` tells what the group changed meanwhile. Raises EventLogError when shut out.
        """

    def take_changes(self) -> OwnershipChange:
        """Return what the group changed since the last call. A lost partition is read no more from the moment of loss."""

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        """Replace what is read by these partitions, at these numeric offsets. Buffered messages of before are dropped."""

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read these partitions too, from these offsets, without disturbing the others."""

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        """Stop reading these partitions; messages of them that are buffered are dropped."""

    @property
    def has_share(self) -> bool:
        """Tell whether we have our share of the group's partitions, be it none of them: not before the group has given it, nor
        from its loss until the next is given. Any thread may ask."""

    def ends(self) -> dict[TopicPartition, int]:
        """Return the next offset to be written of each partition being read, as far as it is known. Does not block."""

    def commit(self, positions: Mapping[int, int]) -> None:
        """Note next offsets of lead partitions in the group, without waiting. Failure is harmless and silent."""

    def close(self) -> None:
        """Leave. A static member keeps its place until its session ends, so that a restart finds it again."""


class Broker(Protocol):
    """The way in: makes readers and writers. Thread-safe."""

    def writer(self) -> Writer:
        """Return a new idempotent producer."""

    def inbox(self, group: str, instance_id: str, lead_topic: str) -> Inbox:
        """Return a new member of a group that shares `lead_topic`. `instance_id` is its static membership."""

    def plain_inbox(self) -> Inbox:
        """Return an inbox without a group: only `poll`, `read_from`, `add`, `remove` and `close` make sense."""

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        """Yield the records with start <= offset < stop that compaction has left. Blocks until `stop` is reached.

        Raises EventLogError if the broker does not answer for long, OffsetOutOfRangeError if `stop` is beyond the end.
        """

    def offsets(self, topic: str, partition: int) -> Offsets:
        """Return the partition's first and next offset. Blocks for a round trip. Raises UnknownTopicError."""

    def describe(self, topics: Sequence[str]) -> dict[str, TopicDescription]:
        """Return the descriptions of those of the topics that exist. Blocks for a round trip."""
