"""Checkpoints: the state of a partition written beside its log, a bit in every turn, so that a restore need not read it all.

A checkpoint begins at an offset of the log. From there on every unit that has changed since the last one is written as it
then is, or, if it is over, goes to the shelf and into a segment. When all of that is acknowledged, an announcement in the log
certifies it: whoever restores loads those snapshots and folds the log from that offset, passing over what a snapshot holds
already. Until then the checkpoint before is in force; nothing that it needs is overwritten by something older or removed.

Snapshots are taken between turns, when every entry of the state is acknowledged at the offset where it must be. So those of an
owner that was replaced without knowing it are old, but never wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from tidegate import codec
from tidegate.domain.entry import Checkpoint, DoneSegments, Snapshot, UnitState
from tidegate.eventlog.interface import Record
from tidegate.eventlog.machine import Standing
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.restore import DONE, LIVE, PART
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.shelf import Shelved
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.failpoints import failpoint

MAX_PIECE_BYTES: Final = 8 * 1024 * 1024
MAX_SEGMENT_UNITS: Final = 200
MAX_TOMBSTONES_PER_TURN: Final = 500
# Where nothing has come for so long, writing what changed is in nobody's way, and a restart folds less.
QUIET_S: Final = 0.25
QUIET_SHARE: Final = 32

_log = structlog.get_logger()
_HEADERS: Final = ((TYPE_HEADER, b"Snapshot"),)


class Checkpointer:
    """Makes the checkpoints of one owned partition. `work` is called once a turn and never blocks.

    send: writes a record and calls back when it is acknowledged. announce: writes an announcement that carries the
    checkpoint and waits for it; returns whether it stands where it must. stale_keys: what earlier owners left in the snapshot
    topic and nobody needs after the first checkpoint.
    """

    def __init__(
        self,
        part: OwnedPartition,
        settings: CheckpointSettings,
        send: Callable[[Record, Callable[[int], None] | None], None],
        announce: Callable[[Checkpoint], bool],
        stale_keys: list[bytes],
        now_s: float,
    ) -> None:
        self._part = part
        self._settings = settings
        self._send = send
        self._announce = announce
        self._stale_keys = stale_keys
        self._last_s = self._rested_s = self._grew_s = now_s
        self._size_seen = 0
        self._number = 0
        self._segments = 0
        self._carried = () if part.checkpoint is None else part.checkpoint.segments
        self._written: dict[
            str, tuple[int, int]
        ] = {}  # live unit -> its first checkpoint, and how many pieces it ever had
        self._parts: set[str] = set()
        self._tombstones: deque[bytes] = deque()  # keys
        self._under_way = 0
        self._written_up_to = 0 if part.checkpoint is None else part.checkpoint.snapshots_end
        # Of the checkpoint that is being made:
        self._is_busy = False
        self._read_from = 0
        self._own_head = (0, b"")
        self._queue: deque[str] = deque()
        self._ended: set[str] = set()
        self._ended_before: set[str] = set()  # in the one before, whose snapshots it may still need

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being made."""
        return self._is_busy

    def work(self, now_s: float, now_ms: int) -> None:
        """Do a turn's worth: begin a checkpoint if it is time, write some of it, or certify it. Call when all is logged."""
        if not self._is_busy:
            self._bury()
            if now_s - self._rested_s >= self._settings.every_s:
                self._put_to_rest(now_s, now_ms)
            # A key that is written again must not be removed after that.
            if self._tombstones or not self._is_due(now_s):
                return
            self._begin(now_s)
        if self._queue:
            self._write_units()
        elif not self._write_segment() and not self._under_way:
            self._certify(now_s)
            self._put_to_rest(now_s, now_ms)

    def _is_due(self, now_s: float) -> bool:
        part = self._part
        if part.since_checkpoint != self._size_seen:
            self._size_seen, self._grew_s = part.since_checkpoint, now_s
        if not part.dirty:
            return False
        # A checkpoint costs as much as there is alive: it must not come more often than that many entries.
        enough = max(self._settings.every_entries, len(part.as_of), len(self._written))
        if now_s - self._grew_s >= QUIET_S:
            enough //= QUIET_SHARE
        return part.since_checkpoint >= enough or now_s - self._last_s >= self._settings.every_s

    def _begin(self, now_s: float) -> None:
        part = self._part
        self._is_busy = True
        self._number += 1
        self._last_s = now_s
        self._read_from = part.next_offset
        own = part.machine.own_subject(part.state)
        self._own_head = (0, b"") if own is None else part.machine.head(part.state, own)
        self._queue = deque(sorted(part.dirty))  # the same order in every process, so that a simulation can be repeated
        if self._number == 1:
            self._queue.extend(part.shelf.resting())
        part.dirty = set()
        part.since_checkpoint = 0
        failpoint("checkpoint.begun")

    # -- writing ---------------------------------------------------------------

    def _write_units(self) -> None:
        part = self._part
        for name, text in part.machine.parts(part.state).items():
            if name not in self._parts:
                self._parts.add(name)
                self._write(f"{PART}:{part.epoch}:{name}", self._snapshot((UnitState(name, -1, text.encode()),)))
        units = [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.units_per_turn))]
        in_memory = {unit: as_of for unit in units if (as_of := part.as_of.get(unit)) is not None}
        standings = part.put_away_over(in_memory)
        for unit in units:
            if unit in in_memory:
                self._write_unit(unit, in_memory[unit], standings[unit])
            else:
                self._write_resting(unit)

    def _write_resting(self, unit: str) -> None:
        shelved = self._part.shelf.get(unit)
        if shelved is not None and not shelved.done:
            self._write_live(unit, shelved.as_of, shelved.state)

    def _write_unit(self, unit: str, as_of: int, standing: Standing) -> None:
        part = self._part
        if standing is Standing.ACTIVE:
            if unit in self._ended_before:  # it is back; the checkpoint that is in force does not count it
                self._ended_before.discard(unit)
                self._written[unit] = (self._number, self._written[unit][1])
            self._write_live(unit, as_of, part.machine.dump(part.state, unit))
            return
        if standing is Standing.GONE and (unit in self._written or as_of >= self._read_from):
            # The log from `read_from` on says how it went; without the beginning that can only be passed over.
            if unit in self._ended_before:  # gone already in the checkpoint that is in force, which does not count it
                self._written[unit] = (self._number, self._written[unit][1])
            self._write_live(unit, as_of, b"")
        if unit in self._written:
            self._ended.add(unit)

    def _write_live(self, unit: str, as_of: int, state: bytes) -> None:
        first, most = self._written.get(unit, (self._number, 0))
        pieces = [state[at : at + MAX_PIECE_BYTES] for at in range(0, len(state), MAX_PIECE_BYTES)] or [b""]
        self._written[unit] = (first, max(most, len(pieces)))
        for number, piece in enumerate(pieces):
            record = self._snapshot((UnitState(unit, as_of, piece),), first=first, piece=number, pieces=len(pieces))
            self._write(_live_key(self._part.epoch, number, unit), record)

    def _write_segment(self) -> bool:
        """Write one segment of units that are over; returns whether there was one to write."""
        rows = self._part.shelf.take_fresh(MAX_SEGMENT_UNITS, MAX_PIECE_BYTES)
        if not rows:
            return False
        self._segments += 1
        units = tuple(UnitState(row.unit, row.as_of, row.state) for row in rows)
        self._write(f"{DONE}:{self._part.epoch}:{self._segments}", self._snapshot(units))
        return True

    def _snapshot(
        self, units: tuple[UnitState, ...], *, first: int | None = None, piece: int = 0, pieces: int = 1
    ) -> Snapshot:
        return Snapshot(
            epoch=self._part.epoch,
            number=self._number,
            first=self._number if first is None else first,
            piece=piece,
            pieces=pieces,
            units=units,
        )

    def _write(self, key: str, snapshot: Snapshot) -> None:
        part, value = self._part, codec.encode(snapshot)
        self._under_way += 1
        self._send(Record(part.machine.snapshot_topic, part.partition, key.encode(), value, _HEADERS), self._acked)

    def _acked(self, offset: int) -> None:
        self._under_way -= 1
        self._written_up_to = max(self._written_up_to, offset + 1)

    # -- certifying ---------------------------------------------------------------

    def _certify(self, now_s: float) -> None:
        """Everything is durable: say so in the log. Then what only the checkpoint before needed may go."""
        part = self._part
        failpoint("checkpoint.before-certify")
        gone = sorted(self._ended_before - self._ended)
        pieces = {unit: self._written.pop(unit)[1] for unit in gone}
        own = DoneSegments(part.epoch, self._segments)
        checkpoint = Checkpoint(
            epoch=part.epoch,
            number=self._number,
            read_from=self._read_from,
            told=part.told.told,
            now_ms=part.now_ms,
            seq=self._own_head[0],
            head=self._own_head[1],
            live=len(self._written) - len(self._ended),
            segments=(*self._carried, own) if self._segments else self._carried,
            snapshots_end=self._written_up_to,
        )
        if not self._announce(checkpoint):
            return  # somebody else owns the partition: it is dropped, and nothing of ours is removed
        failpoint("checkpoint.after-certify")
        self._is_busy = False
        for unit, count in pieces.items():
            self._tombstones.extend(_live_key(part.epoch, piece, unit).encode() for piece in range(count))
        self._ended, self._ended_before = set(), self._ended
        self._tombstones.extend(self._stale_keys)
        self._stale_keys = []
        _log.info(
            "checkpoint",
            log=part.machine.log_topic,
            partition=part.partition,
            live=checkpoint.live,
            seconds=round(now_s - self._last_s, 3),
        )

    def _put_to_rest(self, now_s: float, now_ms: int) -> None:
        """Take units out of memory that have been quiet for long and whose latest state is certified."""
        part, machine = self._part, self._part.machine
        self._rested_s = now_s
        if self._is_busy:
            return
        for unit in [unit for unit in part.as_of if unit in self._written and unit not in part.dirty]:
            since_ms = machine.quiet_since_ms(part.state, unit)
            if since_ms is not None and now_ms - since_ms >= self._settings.rest_after_s * 1000:
                part.shelf.put([Shelved(unit, part.as_of.pop(unit), machine.dump(part.state, unit), done=False)])
                machine.unload(part.state, unit)

    def _bury(self) -> None:
        for _ in range(min(len(self._tombstones), MAX_TOMBSTONES_PER_TURN)):
            key = self._tombstones.popleft()
            self._send(Record(self._part.machine.snapshot_topic, self._part.partition, key, None, ()), None)


def _live_key(epoch: int, piece: int, unit: str) -> str:
    return f"{LIVE}:{epoch}:{piece}:{unit}"
