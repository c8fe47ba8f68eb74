"""A log partition in the hands of its owner: state, positions, chain and epoch, and how they change."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Final

from tidegate import codec
from tidegate.domain.entry import MAX_TELLS_PER_ENTRY, Checkpoint, Entry, Position
from tidegate.eventlog.draft import Draft
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import CorruptLogError, Decision, EntryRefusedError, Machine, Standing
from tidegate.eventlog.patience import WaitingInputs
from tidegate.eventlog.shelf import Shelf, Shelved
from tidegate.eventlog.validity import NO_EPOCH

MAX_ENTRY_BYTES: Final = 15 * 1024 * 1024  # of its events; a record may have 16 MiB with all that is around them
MAX_DONE_BYTES: Final = 8 * 1024 * 1024
MANY_EVENTS: Final = 1_000  # an event has a few tells at the most


class _Told:
    """Which entries' tells are all acknowledged: `told` is the own offset up to which that is so."""

    __slots__ = ("_waiting", "told")

    def __init__(self, told: int) -> None:
        self.told = told
        self._waiting: deque[list[int]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def expect(self, offset: int, count: int) -> list[int]:
        slot = [offset, count]
        self._waiting.append(slot)
        if not count:
            self.advance()
        return slot

    def advance(self) -> None:
        while self._waiting and self._waiting[0][1] == 0:
            self.told = self._waiting.popleft()[0]


class OwnedPartition:
    """A log partition that this process owns: its state, positions and epoch. Thrown away on any doubt.

    as_of: own offset of the last entry of every unit in memory. dirty: units whose latest state no snapshot of this epoch
    holds. unconfirmed: units whose snapshot is newer than the place where folding began, until the entry that it ends with is
    met (a snapshot that the log does not bear out is none). draft: what this turn decided last; sealed before the turn ends.
    waiting: inputs that were read and do not count as read yet. turn: the owner's turn of which `now_ms` is the time, if it
    decided on an input in it. torn: what is missing between the entries that were folded, until
    one comes that carries everything forward; begun_at: the offset of that one, -1 if the log was folded from its beginning.
    """

    def __init__(self, machine: Machine, partition: int) -> None:
        self.machine = machine
        self.partition = partition
        self.shelf = Shelf()
        self.state: Any = machine.new_state(partition, self.shelf)
        self._is_chained_by_unit = machine.own_subject(self.state) is None
        self.epoch = NO_EPOCH
        self.now_ms = 0
        self._base_ms = 0  # see `set_time`
        self._base_s = 0.0
        self.inputs: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.changed_marks: dict[str, int] = {}
        self.next_offset = 0
        self.doubt = ""
        self.told = _Told(-1)
        self.since_announcement = 0
        self.recorded_inputs: dict[str, int] = {}
        self.recorded_s = 0.0
        self.repeats = 0
        self.draft: Draft | None = None
        self.unacknowledged: list[tuple[Entry, list[int]]] = []
        self.waiting = WaitingInputs()
        self.turn = -1
        self.as_of: dict[str, int] = {}
        self.dirty: set[str] = set()
        self.unconfirmed: dict[str, int] = {}
        self.checkpoint: Checkpoint | None = None
        self.since_checkpoint = 0
        self.torn = ""
        self.begun_at = -1

    # -- reading the log back ---------------------------------------------------------------

    def fold(self, entry: Entry, value: bytes, offset: int) -> None:
        """Fold a valid entry of the log, but for what the loaded snapshots hold of it already.

        Raises CorruptLogError if it does not continue its subject's chain. In a log that is one chain, a missing entry may
        have been retired: `torn` says so, and nothing is folded until an entry comes that carries everything forward.
        """
        covered = self._covered(entry, offset) if self.unconfirmed else ()
        if entry.subject in covered and self._is_chained_by_unit:  # a run may be named like a ledger
            self._compare_head(entry, value, offset)
        else:
            seq, head = self.machine.head(self.state, entry.subject)
            if self.torn or entry.first_seq != seq + 1 or entry.prev_hash != head:
                self._bridge(entry, offset, seq, head)
            if not self.torn:
                self._take(entry, value, covered)
                self.logged(entry, offset, covered)
        for unit in covered:
            if self.unconfirmed.get(unit) == offset:
                del self.unconfirmed[unit]
        self.now_ms = entry.now_ms
        self.inputs.update(entry.inputs)
        self.marks.update(entry.marks)
        self.told.told = max(self.told.told, entry.told)

    def _bridge(self, entry: Entry, offset: int, seq: int, head: bytes) -> None:
        """Begin anew with an entry that does not continue the chain but carries everything forward; else the log is torn."""
        machine = self.machine
        if not self.torn:
            self.torn = (
                f"{machine.log_topic}-{self.partition} at offset {offset}: entry of {entry.subject} starts at seq "
                f"{entry.first_seq} after {seq}, and its previous hash "
                f"{'fits' if entry.prev_hash == head else 'does not fit'}"
            )
        if machine.own_subject(self.state) is None or self.checkpoint is not None:
            raise CorruptLogError(self.torn)
        if machine.carries(entry):
            self.state = machine.new_state(self.partition, self.shelf)
            units = machine.load_carried(self.state, entry)
            machine.loaded(self.state)
            self.as_of = dict.fromkeys(units, offset)
            self.dirty = set(units)
            self.torn, self.begun_at = "", offset

    def _covered(self, entry: Entry, offset: int) -> set[str]:
        """Return the units of the entry whose loaded state includes it: only unconfirmed ones can be ahead of the log."""
        return {unit for unit in self._units(entry) if self.unconfirmed.get(unit, -1) >= offset}

    def _units(self, entry: Entry) -> Iterable[str]:
        """Return whose state the entry's events change."""
        subject, units_of = entry.subject, self.machine.units_of
        return {unit: None for event in entry.events for unit in units_of(subject, event)}

    def _compare_head(self, entry: Entry, value: bytes, offset: int) -> None:
        if self.unconfirmed[entry.subject] != offset:
            return
        seq, head = self.machine.head(self.state, entry.subject)
        if seq != entry.first_seq + len(entry.events) - 1 or head != hashlib.sha256(value).digest():
            raise CorruptLogError(f"the snapshot of {entry.subject} is not what the log says at offset {offset}")

    def _take(self, entry: Entry, value: bytes, covered: Container[str] = ()) -> None:
        machine, state, seq = self.machine, self.state, entry.first_seq
        subject, account, now_ms = entry.subject, entry.account, entry.now_ms
        for event in entry.events:
            if not covered:
                machine.apply(state, subject, account, event, seq, now_ms)
            elif not all(unit in covered for unit in machine.units_of(subject, event)):
                machine.apply(state, subject, account, event, seq, now_ms, covered)
            seq += 1
        machine.set_head(state, entry.subject, seq - 1, hashlib.sha256(value).digest())

    # -- units ---------------------------------------------------------------

    def logged(self, entry: Entry, offset: int, covered: Container[str] = ()) -> None:
        """Note that the log holds an entry at `offset`, and whose state it changed."""
        self.since_checkpoint += len(entry.parts) or 1
        for unit in (entry.subject,) if self._is_chained_by_unit else self._units(entry):
            if unit not in covered:
                self.as_of[unit] = offset
                self.dirty.add(unit)

    def put_away_over(self, units: Iterable[str]) -> dict[str, Standing]:
        """Take those of the units, which changed, out of memory that are over (onto the shelf) or gone; returns how each stands.

        One that is over and too large for a record counts as active: only the state of those is cut into pieces.
        """
        machine, state = self.machine, self.state
        standings: dict[str, Standing] = {}
        over: list[Shelved] = []
        size = 0
        for unit in units:
            standing = machine.standing(state, unit)
            if standing is Standing.DONE:
                dumped = machine.dump(state, unit)
                if len(dumped) > MAX_DONE_BYTES:
                    standing = Standing.ACTIVE
                else:
                    over.append(Shelved(unit, self.as_of[unit], dumped, done=True))
                    size += len(dumped)
            standings[unit] = standing
            if standing is not Standing.ACTIVE:
                del self.as_of[unit]
            if size > MAX_DONE_BYTES:
                self._put_away(over)
                over, size = [], 0
        self._put_away(over)
        return standings

    def _put_away(self, over: Sequence[Shelved]) -> None:
        self.shelf.put(over)
        for shelved in over:
            self.machine.unload(self.state, shelved.unit)

    def put_away_all_over(self) -> None:
        """Take every changed unit out of memory that is over: while a long log is folded, they would fill it."""
        self.dirty = {unit for unit, standing in self.put_away_over(self.dirty).items() if standing is Standing.ACTIVE}

    # -- deciding ---------------------------------------------------------------

    def set_time(self, now_ms: int, monotonic_s: float) -> None:
        """Remember a time, and when it was by a clock that never jumps: from there it runs on."""
        self._base_ms, self._base_s = now_ms, monotonic_s

    def time_ms(self, clock_ms: int, monotonic_s: float) -> int:
        """Return the time for a decision. It never goes back, but goes on while the clock is behind what the log has seen:
        a clock that was ahead for a moment, here or at the owner before, must not stop the back-offs of now."""
        running_ms = self._base_ms + int((monotonic_s - self._base_s) * 1000)
        if clock_ms >= running_ms:
            self.set_time(clock_ms, monotonic_s)
        return max(self.now_ms, clock_ms, running_ms)

    def is_stale(self, topic: str, record: Any) -> bool:
        """Tell whether a told message is not above the mark of its source (rule 7); notes its position if it is."""
        source_log = self.machine.marked_topics.get(topic)
        if source_log is None:
            return False
        position: Position = record.source
        name, rank = f"{source_log}-{position.partition}", position.rank()
        if rank <= self.marks.get(name, -1):
            return True
        self.marks[name] = self.changed_marks[name] = rank
        return False

    def add(self, decision: Decision, cause: Message | str, tables: Mapping[str, int]) -> tuple[Entry, bytes] | None:
        """Apply a decision and put it into the draft; returns what the draft before became, if this one had no room there.

        cause: the input, or a timer or table, whose entry stands alone. tables: as in `Entry`. Raises EntryRefusedError, with
        nothing applied, if it cannot be written or its tells would be too many: once in the log, it would stop every owner for
        good.
        """
        machine, events = self.machine, decision.events
        block = self._block(decision, cause)
        if len(events) >= MANY_EVENTS:
            self._refuse_many_tells(decision)
        draft, sealed = self.draft, None
        if draft is None or not draft.has_room(decision.subject, decision.account, cause, len(events), len(block)):
            sealed = self.seal()
            seq, head = machine.head(self.state, decision.subject)
            draft = Draft(decision.subject, decision.account, seq + 1, head, self.now_ms, tables)
            self.draft = draft
        seq = draft.first_seq + len(draft.events)
        draft.add(events, block, cause, self.inputs, self.marks if decision.is_complete else self.changed_marks)
        self.changed_marks = {}
        if not machine.may_be_followed(events):
            draft.close()
        for event in events:
            machine.apply(self.state, decision.subject, decision.account, event, seq, self.now_ms)
            seq += 1
        return sealed

    def seal(self) -> tuple[Entry, bytes] | None:
        """Return the draft as the next entry of its subject, with its bytes; None if there is none."""
        draft, self.draft = self.draft, None
        if draft is None:
            return None
        entry = draft.entry(self.epoch, self.told.told, draft.events)
        value = draft.bytes_of(self.machine.entry_kind, entry)
        last_seq = entry.first_seq + len(entry.events) - 1
        self.machine.set_head(self.state, entry.subject, last_seq, hashlib.sha256(value).digest())
        return entry, value

    def _block(self, decision: Decision, cause: Message | str) -> bytes:
        try:
            f"{decision.subject}{decision.account}{cause if isinstance(cause, str) else ''}".encode()
            block = codec.encode_events(self.machine.entry_kind, decision.events)
        except ValueError as error:
            raise EntryRefusedError(f"an entry of {decision.subject}: {error}") from error
        if len(block) > MAX_ENTRY_BYTES:
            raise EntryRefusedError(f"an entry of {decision.subject} would have {len(block)} bytes")
        return block

    def _refuse_many_tells(self, decision: Decision) -> None:
        draft = Draft(decision.subject, decision.account, 1, b"", self.now_ms, {})
        entry = draft.entry(self.epoch, self.told.told, decision.events)
        if len(self.machine.tells(entry, self.position(0))) > MAX_TELLS_PER_ENTRY:
            raise EntryRefusedError(f"an entry of {decision.subject} would have more than {MAX_TELLS_PER_ENTRY} tells")

    def acknowledged(self, slot: list[int], offset: int) -> None:
        """Check rule 3: an offset that is not our last one + 1 means that somebody else wrote."""
        if offset != self.next_offset and not self.doubt:
            self.doubt = (
                f"own record acknowledged at {offset} where {self.next_offset} was expected: another owner wrote"
            )
        self.next_offset = offset + 1
        slot.append(offset)

    @property
    def told_distance(self) -> int:
        """Return how many entries at the end of the log have tells that are not acknowledged."""
        return self.told.waiting

    def position(self, offset: int) -> Callable[[int], Position]:
        """Return the function that numbers the tells of the entry at `offset`."""
        return lambda index: Position(self.partition, offset, index)
