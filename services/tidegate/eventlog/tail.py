"""The end of a log partition, looked back into as far as needed, and read only once.

Whoever takes over looks back for the last checkpoint, for the epoch before it, and then folds what came after: three readings of
much the same records otherwise, each of which has to be asked for, fetched and unpacked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, Final

from tidegate import codec
from tidegate.eventlog.interface import Broker, Message
from tidegate.eventlog.schemas import looking_up

# Of what was read: more than owners leave behind between two checkpoints. What lies further back is read again.
MAX_KEPT_RECORDS: Final = 10_000
MAX_KEPT_BYTES: Final = 16 * 1024 * 1024
Decode = Callable[[bytes | None], Any]
_OFFSET: Final = attrgetter("offset")


class Tail:
    """The records of a log partition below an offset. start: the first offset that the log has kept.

    decode: as codec.decode, and finds out about schemas of a newer version, whose owner may have had the partition for a while.
    """

    def __init__(self, broker: Broker, topic: str, partition: int, stop: int) -> None:
        """Blocks for a round trip. Raises UnknownTopicError."""
        self.decode: Final[Decode] = looking_up(broker, codec.decode)
        self.start = broker.offsets(topic, partition).start
        self._broker, self._topic, self._partition = broker, topic, partition
        self._kept: list[Message] = []  # everything from `_kept_from` to `stop`
        self._kept_from = stop
        self._kept_bytes = 0

    def read(self, begin: int, end: int) -> Iterator[Message]:
        """Yield the records with begin <= offset < end that compaction has left; `end` must not be beyond ours.

        Blocks for what was not read before. Raises EventLogError, OffsetOutOfRangeError.
        """
        boundary = self._kept_from
        if begin < boundary:
            yield from self._older(begin, min(end, boundary))
        first = bisect_left(self._kept, max(begin, boundary), key=_OFFSET)
        last = bisect_left(self._kept, end, key=_OFFSET)
        yield from self._kept[first:last]

    def _older(self, begin: int, end: int) -> Iterator[Message]:
        """Yield what lies below that which is kept; keep it, with what lies between, unless that is too much."""
        boundary = self._kept_from
        room = MAX_KEPT_BYTES - self._kept_bytes if boundary - begin <= MAX_KEPT_RECORDS - len(self._kept) else -1
        read, size = [], 0
        for message in self._broker.read(self._topic, self._partition, begin, boundary if room >= 0 else end):
            size += len(message.value or b"")
            if size <= room:
                read.append(message)
            if message.offset < end:
                yield message
            elif size > room:
                return
        if size <= room:
            self._kept[:0] = read
            self._kept_from = begin
            self._kept_bytes += size
