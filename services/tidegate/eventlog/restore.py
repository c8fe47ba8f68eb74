"""How a new owner comes by the state of its partition: the last checkpoint's snapshots and the log after it, or the whole log.

A snapshot is a shortcut, never a source: what is doubtful about one makes us throw all of them away and fold the log.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import structlog

from tidegate import codec, metrics
from tidegate.domain.entry import Checkpoint, Entry, OwnerAnnounced, Snapshot, UnitState
from tidegate.eventlog.epochs import FIRST_SPAN, GROWTH, epoch_in
from tidegate.eventlog.interface import Broker, EventLogError, Message
from tidegate.eventlog.machine import CorruptLogError, Machine, RefusedToStartError
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.shelf import Shelved
from tidegate.eventlog.tail import Decode, Tail
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, TYPE_HEADER, EpochTracker
from tidegate.health import PULSE

PROGRESS_EVERY: Final = 20_000
LIVE, DONE, PART = "live", "done", "part"

_NUMBER: Final = rb"0|[1-9][0-9]*"
_KEY: Final = re.compile(
    rb"(?=(?P<kind>live|done|part):(?P<epoch>%(n)s):)"
    rb"(?:live:\d+:(?P<piece>%(n)s):(?P<unit>.+)|done:\d+:(?P<segment>%(n)s)|part:\d+:(?P<part>.+))" % {b"n": _NUMBER},
    re.DOTALL,
)

Alive = Callable[[], None]
T = TypeVar("T")

_log = structlog.get_logger()


class DoubtfulSnapshotError(EventLogError):
    """The snapshots are not what the checkpoint says, or cannot be read: the log must be folded instead."""


class Restored(NamedTuple):
    """A partition as its log says it is. untold: entries whose tells may not have been sent, oldest first. stale_keys: of
    the snapshot topic, what no checkpoint needs once there is one of the new owner."""

    part: OwnedPartition
    untold: list[tuple[int, Entry]]
    stale_keys: list[bytes]


def restore(
    broker: Broker,
    machine: Machine,
    partition: int,
    stop: int,
    check: Callable[[OwnerAnnounced], None],
    quiet_before_ms: int,
    alive: Alive = PULSE.beat,
) -> Restored:
    """Return the partition as it is at offset `stop` of its log. Blocks for reading.

    check: called with every announcement that is read; raises if the log is not the one that it was. quiet_before_ms:
    units that have waited since before that time are not brought into memory. alive: called again and again meanwhile, at
    least every PROGRESS_EVERY records. Raises CorruptLogError, RefusedToStartError, EventLogError.
    """
    tail = Tail(broker, machine.log_topic, partition, stop)
    found = _last_announcement(tail, stop)
    keys: list[bytes] = []
    checkpoint = None if found is None else found.checkpoint
    snapshots = _read_snapshots(broker, machine.snapshot_topic, partition, checkpoint, keys, alive)
    if found is not None and checkpoint is not None:
        part = OwnedPartition(machine, partition)
        try:
            untold = _from_snapshots(tail, part, found, checkpoint, snapshots, stop, check, quiet_before_ms, alive)
            needed = {f"{DONE}:{s.epoch}:{n}".encode() for s in checkpoint.segments for n in range(1, s.count + 1)}
            return Restored(part, untold, [key for key in keys if key not in needed])
        except RefusedToStartError:
            raise
        except (DoubtfulSnapshotError, CorruptLogError) as error:
            where = {"log": machine.log_topic, "partition": partition}
            _log.warning("snapshots thrown away: folding the whole log", **where, reason=str(error))
            part.shelf.close()
            machine.dropped(partition)
    part, untold = _fold_whole(tail, machine, partition, stop, check, alive)
    return Restored(part, untold, keys)


def fold_all(
    broker: Broker, machine: Machine, partition: int, stop: int, check: Callable[[OwnerAnnounced], None]
) -> tuple[OwnedPartition, list[tuple[int, Entry]]]:
    """Return the partition as it is at offset `stop` by its log alone, and the untold entries. Blocks; raises as `restore`."""
    return _fold_whole(Tail(broker, machine.log_topic, partition, stop), machine, partition, stop, check)


def _fold_whole(
    tail: Tail,
    machine: Machine,
    partition: int,
    stop: int,
    check: Callable[[OwnerAnnounced], None],
    alive: Alive = PULSE.beat,
) -> tuple[OwnedPartition, list[tuple[int, Entry]]]:
    part = OwnedPartition(machine, partition)
    untold = _fold(tail, part, EpochTracker(), tail.start, tail.start, stop, check, alive)
    if part.torn:
        raise CorruptLogError(part.torn)
    return part, untold


# --- finding the checkpoint ---------------------------------------------------------------


def _last_announcement(tail: Tail, stop: int) -> OwnerAnnounced | None:
    """Return the last valid repeated announcement before `stop`: it names the checkpoint, if there is one.

    Owners repeat it every so many entries, so looking back is bounded by that and by how often owners changed since.
    """
    span = FIRST_SPAN
    end = stop
    while end > tail.start:
        begin = max(tail.start, stop - span)
        candidates = [message for message in tail.read(begin, end) if _is_announcement(message)]
        for message in reversed(candidates):
            record = _record(message, tail.decode)
            if isinstance(record, OwnerAnnounced) and record.repeat and epoch_in(tail, message.offset) == record.epoch:
                return record
        end, span = begin, span * GROWTH
    return None


def _is_announcement(message: Message) -> bool:
    return message.value is not None and (TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()) in message.headers


# --- reading the snapshots ---------------------------------------------------------------


@dataclass(slots=True)
class _Live:
    """What the snapshot topic holds of a live unit. pieces: by their number."""

    number: int = 0
    first: int = 0
    as_of: int = -1
    count: int = 0
    pieces: dict[int, bytes] = field(default_factory=dict)

    def take(self, record: Snapshot) -> None:
        piece = record.units[0]
        if (record.number, piece.as_of) != (self.number, self.as_of):
            self.number, self.first, self.as_of, self.pieces = record.number, record.first, piece.as_of, {}
        self.count = record.pieces
        self.pieces[record.piece] = piece.state

    def state(self) -> bytes:
        if sorted(self.pieces) != list(range(self.count)):
            raise DoubtfulSnapshotError(f"{len(self.pieces)} of {self.count} pieces of a snapshot are there")
        return b"".join(self.pieces[number] for number in range(self.count))


@dataclass(slots=True)
class _Snapshots:
    """What the snapshot topic holds for a checkpoint. broken: why it cannot be used, if so."""

    live: dict[str, _Live] = field(default_factory=dict)
    done: dict[str, tuple[UnitState, ...] | None] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    broken: str = ""


def _read_snapshots(
    broker: Broker,
    topic: str,
    partition: int,
    checkpoint: Checkpoint | None,
    keys: list[bytes],
    alive: Alive = PULSE.beat,
) -> _Snapshots:
    """Read the snapshot topic's partition whole; adds to `keys` every key that still has a value.

    What stands under a key that no owner writes is passed over: no checkpoint refers to it, and it took no snapshot's place.
    """
    found = _Snapshots()
    decode = looking_up(broker, codec.decode)
    start, end = broker.offsets(topic, partition)
    certified = {} if checkpoint is None else {segment.epoch: segment.count for segment in checkpoint.segments}
    if checkpoint is not None and end < checkpoint.snapshots_end:
        # A broker that lost its tail may still hold older snapshots under the same keys.
        found.broken = f"{topic}-{partition} ends at offset {end}, and was written up to {checkpoint.snapshots_end}"
    present: dict[bytes, None] = {}
    foreign: list[int] = []
    for count, message in enumerate(broker.read(topic, partition, start, end), 1):
        if count % PROGRESS_EVERY == 0:
            _log.info("reading snapshots", topic=topic, partition=partition, at=message.offset, of=end)
            alive()
        key = message.key or b""
        if message.value is None:
            present.pop(key, None)
        else:
            present[key] = None
        place = _place(key)
        if place is None:
            foreign.append(message.offset)
        elif checkpoint is not None and not found.broken:
            try:
                _take_snapshot(found, place, message.value, checkpoint, certified, decode)
            except (ValueError, IndexError, AttributeError) as error:
                found.broken = f"{topic}-{partition} at offset {message.offset}: {error}"
    keys += present
    if foreign:
        where = {"topic": topic, "partition": partition, "offset": foreign[0], "count": len(foreign)}
        _log.warning("records passed over that no owner writes: let Kafka's ACLs keep others out", **where)
    return found


class _Place(NamedTuple):
    """What a key of the snapshot topic names. number: of a piece or a segment. name: of a unit or a part."""

    kind: str
    epoch: int
    number: int
    name: str


def _place(key: bytes) -> _Place | None:
    """Return what a key names; None if it is not as owners write it, to the letter: two keys never name the same."""
    found = _KEY.fullmatch(key)
    if found is None:
        return None
    try:
        name = (found["unit"] or found["part"] or b"").decode()
        return _Place(found["kind"].decode(), int(found["epoch"]), int(found["piece"] or found["segment"] or 0), name)
    except ValueError:  # no text, or a number of thousands of digits
        return None


def _take_snapshot(
    found: _Snapshots,
    place: _Place,
    value: bytes | None,
    checkpoint: Checkpoint,
    certified: dict[int, int],
    decode: Decode,
) -> None:
    """Take a record if the checkpoint can refer to it."""
    if place.kind == LIVE and place.epoch == checkpoint.epoch:
        unit = place.name
        if value is not None:
            found.live.setdefault(unit, _Live()).take(decode(value))
        elif unit in found.live:
            found.live[unit].pieces.pop(place.number, None)
            if not found.live[unit].pieces:
                del found.live[unit]
    elif place.kind == DONE and place.number <= certified.get(place.epoch, 0):
        found.done[f"{place.epoch}:{place.number}"] = None if value is None else decode(value).units
    elif place.kind == PART and value is not None and place.epoch == checkpoint.epoch:
        found.parts[place.name] = decode(value).units[0].state.decode()


# --- restoring from them ---------------------------------------------------------------


def _from_snapshots(
    tail: Tail,
    part: OwnedPartition,
    announced: OwnerAnnounced,
    checkpoint: Checkpoint,
    snapshots: _Snapshots,
    stop: int,
    check: Callable[[OwnerAnnounced], None],
    quiet_before_ms: int,
    alive: Alive,
) -> list[tuple[int, Entry]]:
    """Load what the checkpoint certifies and fold what came after it. Raises DoubtfulSnapshotError, CorruptLogError."""
    machine = part.machine
    if snapshots.broken:
        raise DoubtfulSnapshotError(snapshots.broken)
    _load_done(part, checkpoint, snapshots, alive)
    _load_live(part, checkpoint, snapshots, quiet_before_ms, alive)
    _take_announcement(part, announced)
    own = machine.own_subject(part.state)
    if own is not None:
        machine.set_head(part.state, own, checkpoint.seq, checkpoint.head)
    part.checkpoint = checkpoint
    begin = min(checkpoint.read_from, checkpoint.told + 1)
    epoch = epoch_in(tail, begin)
    try:
        untold = _fold(tail, part, EpochTracker(epoch), begin, checkpoint.read_from, stop, check, alive)
    except EventLogError:
        raise
    except Exception as error:  # an event that its state does not allow: many types
        raise DoubtfulSnapshotError(
            f"the log does not follow from the snapshots: {type(error).__name__}: {error}"
        ) from error
    if part.unconfirmed:
        raise DoubtfulSnapshotError(f"{len(part.unconfirmed)} snapshots say more than the log")
    return untold


def _load_done(part: OwnedPartition, checkpoint: Checkpoint, snapshots: _Snapshots, alive: Alive) -> None:
    for units in _segments(checkpoint, snapshots):
        part.shelf.put([Shelved(unit.unit, unit.as_of, unit.state, done=True) for unit in units], are_known=True)
        part.unconfirmed.update((unit.unit, unit.as_of) for unit in units if unit.as_of >= checkpoint.read_from)
        alive()


def _segments(checkpoint: Checkpoint, snapshots: _Snapshots) -> Iterator[Sequence[UnitState]]:
    """Yield all segments of units that are over. Raises DoubtfulSnapshotError if one is missing."""
    for segment in checkpoint.segments:
        for number in range(1, segment.count + 1):
            units = snapshots.done.get(f"{segment.epoch}:{number}")
            if units is None:
                raise DoubtfulSnapshotError(f"segment {number} of epoch {segment.epoch} is missing")
            yield units


def _heard(items: Iterable[T], alive: Alive) -> Iterator[T]:
    """Yield the items, and say in between that we live."""
    for number, item in enumerate(items, 1):
        if number % PROGRESS_EVERY == 0:
            alive()
        yield item


def _load_live(
    part: OwnedPartition, checkpoint: Checkpoint, snapshots: _Snapshots, quiet_before_ms: int, alive: Alive
) -> None:
    for name, text in snapshots.parts.items():
        part.machine.load_part(part.state, name, text)
    counted = 0
    for unit, live in _heard(snapshots.live.items(), alive):
        shelved = part.shelf.get(unit)
        if shelved is not None and shelved.as_of >= live.as_of:
            continue  # it is over since
        state = live.state()
        is_gone_since = not state and live.number > checkpoint.number
        if live.first <= checkpoint.number and (state or is_gone_since):
            counted += 1
        if live.as_of >= checkpoint.read_from:
            part.unconfirmed[unit] = live.as_of
        if not state:
            continue
        try:
            is_resting = unit not in part.unconfirmed and part.machine.load_resting(
                part.state, unit, state, quiet_before_ms
            )
            if not is_resting:
                part.machine.load(part.state, unit, state)
        except Exception as error:  # a format that changed, bytes that are broken: many types
            raise DoubtfulSnapshotError(
                f"the snapshot of {unit} cannot be read: {type(error).__name__}: {error}"
            ) from error
        if is_resting:
            part.shelf.put([Shelved(unit, live.as_of, state, done=False)])
        else:
            part.as_of[unit] = live.as_of
    if counted != checkpoint.live:
        raise DoubtfulSnapshotError(f"{counted} of {checkpoint.live} live units have a snapshot")
    part.dirty = set(part.as_of)  # our first checkpoint writes all of them anew, under our epoch
    try:
        part.machine.loaded(part.state)
    except Exception as error:
        raise DoubtfulSnapshotError(f"nothing can be made of the snapshots: {type(error).__name__}: {error}") from error


# --- folding ---------------------------------------------------------------


def _fold(
    tail: Tail,
    part: OwnedPartition,
    tracker: EpochTracker,
    begin: int,
    fold_from: int,
    stop: int,
    check: Callable[[OwnerAnnounced], None],
    alive: Alive,
) -> list[tuple[int, Entry]]:
    """Read the log from `begin` and fold its valid entries from `fold_from` on; returns the untold ones."""
    topic, partition = part.machine.log_topic, part.partition
    untold: deque[tuple[int, Entry]] = deque()
    began_s = time.monotonic()
    # Announcements have keys of their own and get no tombstones: compaction leaves the first one where it is.
    is_announced = begin > 0
    for count, (offset, record, value) in enumerate(_records(tail.read(begin, stop), tail.decode), 1):
        if count % PROGRESS_EVERY == 0:
            done = (offset - begin) / (stop - begin)
            left_s = (time.monotonic() - began_s) * (1 - done) / done
            _log.info("restoring", log=topic, partition=partition, at=offset, of=stop, seconds_left=round(left_s, 1))
            metrics.restore_progress.labels(partition).set(done)
            alive()
            part.put_away_all_over()
        if isinstance(record, OwnerAnnounced):
            is_announced = True
            check(record)
            tracker.announced(offset, record.epoch)
            if tracker.is_valid(record.epoch):
                _take_announcement(part, record)
        elif not is_announced:
            raise RefusedToStartError(
                f"{topic}-{partition} begins with an entry at offset {offset}, and owners announce themselves before they write "
                "one: it was deleted and made again while its owner was at work, which wrote its last in the new one. Restore it "
                "from a backup, with its offsets, or begin a new installation under another TIDEGATE_KAFKA_TOPIC_PREFIX."
            )
        elif tracker.is_valid(record.epoch):
            if offset >= fold_from:
                part.fold(record, value, offset)
            untold.append((offset, record))
            while untold and untold[0][0] <= part.told.told:
                untold.popleft()
    return [item for item in untold if item[0] > part.told.told]


def _take_announcement(part: OwnedPartition, record: OwnerAnnounced) -> None:
    part.inputs.update(record.inputs)
    part.marks.update(record.marks)
    if record.checkpoint is not None:
        part.told.told = max(part.told.told, record.checkpoint.told)
        part.now_ms = max(part.now_ms, record.checkpoint.now_ms)


def _records(messages: Iterable[Message], decode: Decode) -> Iterator[tuple[int, Entry | OwnerAnnounced, bytes]]:
    for message in messages:
        if message.value is not None:
            yield message.offset, _record(message, decode), message.value


def _record(message: Message, decode: Decode) -> Entry | OwnerAnnounced:
    """Return what a log holds. Raises CorruptLogError: it is not known what the log should say, so nobody may go on."""
    try:
        record = decode(message.value)
    except codec.DecodeError as error:
        record = error
    if isinstance(record, Entry) or (isinstance(record, OwnerAnnounced) and record.log == message.topic):
        return record
    what = record if isinstance(record, codec.DecodeError) else f"this {type(record).__name__}"
    raise CorruptLogError(
        f"{message.topic}-{message.partition} at offset {message.offset}: {what} has no place in a log. Somebody else than its "
        "owner wrote there: look at it with `tidegate verify`, and let Kafka's ACLs keep others out."
    )


# --- for those who check what owners certify ---------------------------------------------------------------


class Certified(NamedTuple):
    """What an owner has written of its state and certified in its log. states: by unit, each as of its own offset; empty
    bytes for a unit that was gone by then."""

    checkpoint: Checkpoint
    states: dict[str, UnitState]


def certified(broker: Broker, machine: Machine, partition: int) -> Certified | None:
    """Return the last certified checkpoint of a partition; None if there is none. Blocks for reading.

    Raises DoubtfulSnapshotError if what it certifies is not there; a newer one may have taken its place meanwhile.
    """
    end = broker.offsets(machine.log_topic, partition).end
    found = _last_announcement(Tail(broker, machine.log_topic, partition, end), end)
    if found is None or found.checkpoint is None:
        return None
    snapshots = _read_snapshots(broker, machine.snapshot_topic, partition, found.checkpoint, [])
    if snapshots.broken:
        raise DoubtfulSnapshotError(snapshots.broken)
    states = {unit.unit: unit for units in _segments(found.checkpoint, snapshots) for unit in units}
    for name, live in snapshots.live.items():
        if name not in states or states[name].as_of < live.as_of:
            states[name] = UnitState(name, live.as_of, live.state())
    return Certified(found.checkpoint, states)


def log_records(
    broker: Broker, topic: str, partition: int, begin: int, stop: int
) -> Iterator[tuple[int, Entry | OwnerAnnounced, bytes]]:
    """Yield offset, record and bytes of everything that a log holds. Raises CorruptLogError for what has no place there."""
    return _records(broker.read(topic, partition, begin, stop), looking_up(broker, codec.decode))
