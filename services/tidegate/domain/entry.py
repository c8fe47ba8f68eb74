"""An entry: one record of a log, all events that consecutive inputs of one subject caused: they stand or fall together."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

TAG_FIELD = "-type"  # the key by which fastavro picks the branch of a union
POSITION_INDEX_BITS = 12
MAX_TELLS_PER_ENTRY = 1 << POSITION_INDEX_BITS
MAX_OFFSET = 2**50  # so that a rank fits into a record's 64 bits; no log gets there
MAX_SOURCE_PARTITIONS = 10_000  # a mark is kept for each that somebody names


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One record of `run-events` (`RunEntry`) or `gate-ledger` (`LedgerEntry`).

    subject: the run id, or the ledger partition as `ledger-N`: what `first_seq` and `prev_hash` count and chain.
    account: the account path that the run is billed to; empty in the ledger, whose events name theirs.
    first_seq: seq of the first event; seqs of one subject are contiguous from 1.
    epoch: offset of the owner's announcement in this log partition.
    now_ms: the owner's clock at the decision, Unix milliseconds; never goes back within a partition.
    prev_hash: SHA-256 of the subject's previous entry as written, empty for its first.
    inputs: next offset to read of every input topic of this partition, after the last input that caused this entry.
    marks: highest position consumed per source (`gate-ledger-3`), only those that changed since the last entry.
    told: own offset up to and including which all tells are acknowledged; -1 for none.
    tables: next offset of every global table at the decision.
    cause: `topic:partition:offset` of the input, or `topic:partition:first..last` of inputs that follow each other, several of
    them in the order in which they were decided on, a blank between; or `timer:…`, `table:…`.
    parts: how many of the events each of these inputs caused, in order; empty if all follow from one cause. What is told follows
    from each part, as if it were an entry of its own.
    """

    subject: str
    account: str
    first_seq: int
    epoch: int
    now_ms: int
    prev_hash: bytes
    inputs: dict[str, int]
    marks: dict[str, int]
    told: int
    tables: dict[str, int]
    cause: str
    parts: tuple[int, ...] = ()
    events: tuple[Any, ...]


class InputRange(msgspec.Struct, gc=False):
    """Inputs that follow each other in a partition: the offsets of the first and of the last."""

    topic: str
    partition: int
    first: int
    last: int


def causes_text(ranges: Iterable[InputRange]) -> str:
    """Return how an entry names the inputs that caused it."""
    return " ".join(
        [
            f"{one.topic}:{one.partition}:{one.first}"
            if one.first == one.last
            else f"{one.topic}:{one.partition}:{one.first}..{one.last}"
            for one in ranges
        ]
    )


def causes_in(text: str, most: int = sys.maxsize) -> list[str]:
    """Return each cause that an entry names, in order: `topic:partition:offset`, or the one timer or table. Raises ValueError.

    most: how many are wanted. A few bytes that are no entry of ours may name more than any memory holds.
    """
    if (".." not in text and " " not in text) or text.startswith(("timer:", "table:")):
        return [text]
    found: list[str] = []
    for inputs in text.split():
        place, _, offsets = inputs.rpartition(":")
        first, _, last = offsets.partition("..")
        found += [
            f"{place}:{offset}" for offset in islice(range(int(first), int(last or first) + 1), most - len(found))
        ]
    return found


def causes_of(entry: Entry) -> list[str]:
    """Return the cause of each part of an entry. Raises ValueError if there are not as many, or they do not make it up."""
    if not entry.parts:
        return [entry.cause]
    causes = causes_in(entry.cause, len(entry.parts) + 1)
    if len(causes) != len(entry.parts) or sum(entry.parts) != len(entry.events):
        raise ValueError(f"{len(entry.parts)} parts of {entry.cause!r} do not make up {len(entry.events)} events")
    return causes


class Part(msgspec.Struct, frozen=True, gc=False):
    """What one of the causes of an entry led to; what is told follows from it. All is as in `Entry`."""

    subject: str
    account: str
    first_seq: int
    epoch: int
    now_ms: int
    events: tuple[Any, ...]


def parts_of(entry: Entry) -> list[Part]:
    """Return what each cause of an entry led to, in order. Raises ValueError if its parts do not make it up."""
    subject, account, epoch, now_ms = entry.subject, entry.account, entry.epoch, entry.now_ms
    if not entry.parts:
        return [Part(subject, account, entry.first_seq, epoch, now_ms, entry.events)]
    found, end = [], 0
    for count in entry.parts:
        begin, end = end, end + count
        found.append(Part(subject, account, entry.first_seq + begin, epoch, now_ms, entry.events[begin:end]))
    if end != len(entry.events):
        raise ValueError(f"parts of {end} events in all do not make up {len(entry.events)} events")
    return found


class DoneSegments(msgspec.Struct, frozen=True, gc=False):
    """The first `count` segments of finished units that the owner of this epoch wrote."""

    epoch: int
    count: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a restore may begin with instead of the beginning of the log.

    epoch, number: whose snapshots, and of which of its checkpoints, counted from 1. read_from: own offset; every entry before
    it is in a snapshot, what is at it and after it must be folded on top. told, now_ms: as in an entry. seq, head: of the
    partition's own chain at `read_from` (0 and empty where every unit has a chain of its own). live: how many units were not
    over. segments: where those that were are found. snapshots_end: the snapshot topic's partition must reach up to here.
    """

    epoch: int
    number: int
    read_from: int
    told: int
    now_ms: int
    seq: int
    head: bytes
    live: int
    segments: tuple[DoneSegments, ...]
    snapshots_end: int


class OwnerAnnounced(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An owner's claim on a log partition. Its first announcement has `epoch` -1: the epoch is that record's offset.

    Repeats (`repeat` > 0) name the epoch, so that a reader who starts in the middle looks back a bounded distance. They also
    record positions and marks as an entry does, for inputs that cause none, and the last checkpoint.

    topic_id is the log's; input_topics are those of its inputs: positions mean nothing in other topics of the same names.
    """

    log: str
    partition: int
    epoch: int
    repeat: int
    topic_id: str
    partition_count: int
    instance_id: str
    at_ms: int
    inputs: dict[str, int] = {}
    marks: dict[str, int] = {}
    checkpoint: Checkpoint | None = None
    input_topics: dict[str, str] = {}


class UnitState(msgspec.Struct, frozen=True, gc=False):
    """The folded state of one unit (a run, or a run's money) as its service writes it; as_of: own offset of its last entry.

    An empty state says that the unit is gone.
    """

    unit: str
    as_of: int
    state: bytes


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A record of `run-snapshots` or `gate-snapshots`: one live unit, a piece of a large one, or many that are over.

    epoch, number: the owner and its checkpoint that this was written for. first: the number of the first checkpoint of this
    epoch that held this unit. piece, pieces: a state too large for one record is cut.
    """

    epoch: int
    number: int
    first: int
    piece: int
    pieces: int
    units: tuple[UnitState, ...]


class Position(msgspec.Struct, frozen=True, gc=False):
    """Where a tell comes from: the entry's log partition and offset, and the tell's index within the entry."""

    partition: int
    offset: int
    index: int

    def rank(self) -> int:
        """Return one integer that orders the positions of one source partition."""
        return (self.offset << POSITION_INDEX_BITS) | self.index
