"""Retirement: entries that a later one carries forward are tombstoned, a bit in every turn.

Nothing is retired before the entry that carries it forward is durable, is held by a certified checkpoint, and has been told. What
is left to do is what the log still holds before that entry, so an owner that dies in between leaves nothing to be mended: the
next one looks again. What has its tombstone, and lies there until compaction takes it, gets no second one: a new owner first
looks which there are, and from then on goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog

from tidegate.eventlog.interface import Broker, Message, Record
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.failpoints import failpoint

OFFSETS_PER_TURN: Final = 2_000
MAX_KNOWN: Final = 200_000  # tombstones that are remembered; what has another gets a second one, which does no harm
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
        self._look_until = NOTHING  # tombstones of earlier owners are looked for before this
        self._looked = NOTHING
        self._known: dict[bytes, int] = {}  # key -> an entry of it before this offset has its tombstone
        self._done = NOTHING
        self._at = NOTHING
        self._first_kept = NOTHING
        self._known_behind: dict[bytes, int] = {}  # those of `_known` that the next round meets again
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
        if not self._has_looked():
            return
        topic, partition = part.machine.log_topic, part.partition
        begin = max(self._at, self._broker.offsets(topic, partition).start)
        end = min(begin + OFFSETS_PER_TURN, carried_at)
        entries = part.machine.entry_kind.encode()
        for message in self._broker.read(topic, partition, begin, end):
            if message.value is not None and (TYPE_HEADER, entries) in message.headers:
                self._entry(message, is_old=message.timestamp_ms + wanted.keep_ms <= now_ms)
            self._at = message.offset + 1
        self._at = end
        if end >= carried_at:
            _log.info("ledger entries retired", log=topic, partition=partition, count=self._retired, before=carried_at)
            self._done, self._retired = carried_at, 0
            self._at = end if self._first_kept == NOTHING else self._first_kept
            self._first_kept = NOTHING
            self._known, self._known_behind = self._known_behind, {}

    def _entry(self, message: Message, is_old: bool) -> None:
        key = message.key or b""
        if self._known.get(key, NOTHING) <= message.offset:
            if not is_old:
                self._first_kept = message.offset if self._first_kept == NOTHING else self._first_kept
                return
            failpoint("retention.before-tombstone")
            self._send(Record(self._part.machine.log_topic, self._part.partition, key, None, ()))
            self._retired += 1
        if self._first_kept != NOTHING and len(self._known_behind) < MAX_KNOWN:
            self._known_behind[key] = message.offset + 1

    def _has_looked(self) -> bool:
        """Look for tombstones that are in the log already, a turn's worth; tell whether all are found."""
        topic, partition = self._part.machine.log_topic, self._part.partition
        if self._look_until == NOTHING:
            self._looked, self._look_until = self._broker.offsets(topic, partition)
        if self._looked >= self._look_until:
            return True
        begin = max(self._looked, self._broker.offsets(topic, partition).start)
        end = min(begin + OFFSETS_PER_TURN, self._look_until)
        for message in self._broker.read(topic, partition, begin, end):
            if message.value is None and message.key is not None and len(self._known) < MAX_KNOWN:
                self._known[message.key] = message.offset
        self._looked = end
        return False

    def _is_safe(self, carried_at: int) -> bool:
        part = self._part
        return (
            carried_at != NOTHING
            and part.checkpoint is not None
            and part.checkpoint.epoch == part.epoch
            and part.checkpoint.read_from > carried_at
            and part.told.told >= carried_at
        )
