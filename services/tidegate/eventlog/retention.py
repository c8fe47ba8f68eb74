"""Retirement: entries that a later one carries forward are tombstoned, a bit in every turn.

Nothing is retired before the entry that carries it forward is durable, is held by a certified checkpoint, and has been told. What
is left to do is what the log still holds before that entry, so an owner that dies in between leaves nothing to be mended: the
next one looks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from tidegate.eventlog.interface import Broker, Record
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.failpoints import failpoint

OFFSETS_PER_TURN: Final = 2_000
NOTHING: Final = -1

_log = structlog.get_logger()


class Retirer:
    """Retires entries of one owned partition. `work` is called once a turn; it blocks for reading a piece of the log.

    send: writes a record to the log as the owner, and notes where it was acknowledged.
    """

    def __init__(self, part: OwnedPartition, broker: Broker, send: Callable[[Record], None]) -> None:
        self._part = part
        self._broker = broker
        self._send = send
        self._done = NOTHING
        self._under_way = NOTHING
        self._at = NOTHING
        self._retired = 0

    def work(self, now_ms: int) -> None:
        """Do a turn's worth. Call when all that was decided is logged. Raises EventLogError."""
        part = self._part
        wanted = part.machine.retirement(part.state)
        if wanted is None:
            return
        carried_at = part.as_of.get(wanted.unit, NOTHING)
        if carried_at == self._done or not self._is_safe(carried_at):
            return
        if carried_at != self._under_way:
            self._under_way, self._at = carried_at, NOTHING
        topic, partition = part.machine.log_topic, part.partition
        begin = max(self._at, self._broker.offsets(topic, partition).start)
        end = min(begin + OFFSETS_PER_TURN, carried_at)
        entries = part.machine.entry_kind.encode()
        for message in self._broker.read(topic, partition, begin, end):
            is_entry = message.value is not None and (TYPE_HEADER, entries) in message.headers
            if is_entry and message.timestamp_ms + wanted.keep_ms <= now_ms:
                failpoint("retention.before-tombstone")
                self._send(Record(topic, partition, message.key or b"", None, ()))
                self._retired += 1
        self._at = end
        if end >= carried_at:
            _log.info("ledger entries retired", log=topic, partition=partition, count=self._retired, before=carried_at)
            self._done, self._retired = carried_at, 0

    def _is_safe(self, carried_at: int) -> bool:
        part = self._part
        return (
            carried_at != NOTHING
            and part.checkpoint is not None
            and part.checkpoint.epoch == part.epoch
            and part.checkpoint.read_from > carried_at
            and part.told.told >= carried_at
        )
