"""Folding a log from its beginning and comparing with what its running owner says of its own state.

An owner publishes its state without being asked: every checkpoint writes each run as it is in the owner's memory, with the
offset of the run's last entry. So folding up to that offset must give the same bytes, run by run. Nothing is written, and the
owner notices nothing.

Bytes of another version's snapshot format cannot be compared. Of those, what every format says is: whether the unit lives, whether
the log has a valid entry there, and, where each unit has a hash chain of its own, the hash that it ends with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from tidegate.domain.entry import OwnerAnnounced, UnitState
from tidegate.eventlog.interface import Broker
from tidegate.eventlog.machine import CorruptLogError, Machine, Standing
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.restore import Certified, DoubtfulSnapshotError, certified, log_records
from tidegate.eventlog.validity import EpochTracker

TRIES: Final = 3
TIDY_EVERY: Final = 20_000
MAX_DIFFERENCES: Final = 100
MAX_PLACES: Final = 8


class Difference(msgspec.Struct, kw_only=True):
    """A unit (a run; a whole ledger's chain is `chain`) of which owner and log do not say the same. places: which elements
    of the state differ, by position."""

    unit: str
    offset: int
    why: str
    owner: str = ""
    folded: str = ""
    places: list[int] = []


class StateReport(msgspec.Struct, kw_only=True):
    """What was found in a partition. read_from: where its last checkpoint began; -1 if there is none to compare with.

    compared: states that were, in_part: of them those of other snapshot formats, of which only a part could be. formats: those
    formats. own_format: the one that this version writes.
    """

    log: str
    partition: int
    epoch: int = -1
    read_from: int = -1
    entries: int = 0
    compared: int = 0
    in_part: int = 0
    formats: list[int] = []
    own_format: int | None = None
    difference_count: int = 0
    differences: list[Difference] = []

    @property
    def ok(self) -> bool:
        """Tell whether nothing differs."""
        return not self.difference_count

    def note(self, difference: Difference) -> None:
        """Add a difference; only the first ones are told in full."""
        self.difference_count += 1
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(difference)


def check_state(
    broker: Broker, machine: Machine, partition: int, progress: Callable[[int, int], None] = lambda at, of: None
) -> StateReport:
    """Compare a partition's state, as its owner has certified it, with the fold of its log. Blocks for reading all of it.

    machine: one of the service's own, used for folding only. progress: called now and then with the offset and the last one.
    Raises EventLogError.
    """
    report = StateReport(log=machine.log_topic, partition=partition)
    found: Certified | None = None
    for left in reversed(range(TRIES)):
        try:
            found = certified(broker, machine, partition)
            break
        except DoubtfulSnapshotError as error:
            if not left:  # a newer checkpoint in between would explain one or two
                report.note(Difference(unit="checkpoint", offset=-1, why=str(error)))
                return report
    if found is not None:
        report.epoch, report.read_from = found.checkpoint.epoch, found.checkpoint.read_from
        try:
            _Fold(broker, machine, partition, found, report).run(progress)
        except CorruptLogError as error:
            report.note(Difference(unit="log", offset=-1, why=str(error)))
    return report


class _Fold:
    """One pass over a log."""

    def __init__(self, broker: Broker, machine: Machine, partition: int, found: Certified, report: StateReport) -> None:
        self._broker = broker
        self._part = OwnedPartition(machine, partition)
        self._found = found
        self._report = report
        self._wanted: dict[int, list[UnitState]] = {}
        for state in found.states.values():
            self._wanted.setdefault(state.as_of, []).append(state)
        self._is_before_checkpoint = True

    def run(self, progress: Callable[[int, int], None]) -> None:
        topic, partition = self._part.machine.log_topic, self._part.partition
        start, end = self._broker.offsets(topic, partition)
        tracker = EpochTracker()
        try:
            records = log_records(self._broker, topic, partition, start, end)
            for count, (offset, record, value) in enumerate(records, 1):
                if self._is_before_checkpoint and offset >= self._found.checkpoint.read_from:
                    self._at_checkpoint()
                if isinstance(record, OwnerAnnounced):
                    tracker.announced(offset, record.epoch)
                elif tracker.is_valid(record.epoch):
                    self._part.fold(record, value, offset)
                    self._report.entries += 1
                    if self._part.begun_at == offset:
                        self._compare_carried(offset)
                    if not self._part.torn:
                        for state in self._wanted.pop(offset, ()):
                            self._compare(state)
                if count % TIDY_EVERY == 0:
                    self._part.put_away_all_over()
                    progress(offset, end)
            if self._is_before_checkpoint:
                self._at_checkpoint()
        finally:
            self._part.shelf.close()
            self._part.machine.dropped(partition)
        for _, states in sorted(self._wanted.items()):
            for state in states:
                self._differs(state, "the log has no valid entry there")

    def _compare_carried(self, offset: int) -> None:
        """Compare what changed last in entries that were retired: it still is what the entry that carries them forward says."""
        for earlier in [at for at in self._wanted if at < offset]:
            for state in self._wanted.pop(earlier):
                self._compare(state)

    def _at_checkpoint(self) -> None:
        """Compare what a checkpoint says of the partition as a whole, and whether it leaves out something that lives."""
        self._is_before_checkpoint = False
        part, checkpoint = self._part, self._found.checkpoint
        own = part.machine.own_subject(part.state)
        if own is not None and part.machine.head(part.state, own) != (checkpoint.seq, checkpoint.head):
            seq, head = part.machine.head(part.state, own)
            self._report.note(
                Difference(
                    unit="chain",
                    offset=checkpoint.read_from,
                    why=f"the owner's chain ends with seq {checkpoint.seq}, the log's with {seq}",
                    owner=checkpoint.head.hex(),
                    folded=head.hex(),
                )
            )
        for unit, as_of in part.as_of.items():
            if unit not in self._found.states and part.machine.standing(part.state, unit) is not Standing.GONE:
                why = "the log has it, and the checkpoint does not"
                self._report.note(Difference(unit=unit, offset=as_of, why=why))

    def _compare(self, state: UnitState) -> None:
        self._report.compared += 1
        machine, folded = self._part.machine, self._part.state
        standing = machine.standing(folded, state.unit)
        if not state.state or standing is Standing.GONE:
            if bool(state.state) != (standing is not Standing.GONE):
                self._differs(state, f"the owner has {'something' if state.state else 'nothing'} of it, the log not so")
            return
        ours = machine.dump(folded, state.unit)
        if ours == state.state:
            return
        here, there = _format_of(ours), _format_of(state.state)
        if here is not None and there is not None and here != there:
            self._compare_in_part(state, here, there, ours)
        elif _normal(ours) != _normal(state.state):
            self._differs(state, "the states differ", ours)

    def _compare_in_part(self, state: UnitState, here: int, there: int, ours: bytes) -> None:
        report = self._report
        report.in_part += 1
        report.own_format, report.formats = here, sorted({*report.formats, there})
        machine, folded = self._part.machine, self._part.state
        if machine.own_subject(folded) is None and machine.head(folded, state.unit)[1] not in state.state:
            self._differs(state, "the owner's chain ends with another entry", ours)

    def _differs(self, state: UnitState, why: str, ours: bytes = b"") -> None:
        self._report.note(
            Difference(
                unit=state.unit,
                offset=state.as_of,
                why=why,
                owner=hashlib.sha256(state.state).hexdigest(),
                folded=hashlib.sha256(ours).hexdigest() if ours else "",
                places=_places(state.state, ours),
            )
        )


def _format_of(data: bytes) -> int | None:
    """Return the snapshot format that a state begins with; None if it is no state."""
    first = next(iter(_elements(_normal(data))), None)
    return first if isinstance(first, int) else None


def _places(one: bytes, other: bytes) -> list[int]:
    """Return which elements of two states differ, as far as they can be told apart."""
    left, right = (_elements(_normal(data)) for data in (one, other))
    places = [number for number, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]]
    return places[:MAX_PLACES]


def _normal(data: bytes) -> Any:
    """Return a state with its sets of names in order: they are written in any. Bytes that are no state stay what they are."""
    try:
        return _sorted(msgspec.msgpack.decode(data))
    except msgspec.DecodeError:
        return data


def _sorted(value: Any) -> Any:
    if isinstance(value, list):
        items = [_sorted(item) for item in value]
        return sorted(items) if items and all(isinstance(item, str) for item in items) else items
    return {key: _sorted(item) for key, item in value.items()} if isinstance(value, dict) else value


def _elements(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
