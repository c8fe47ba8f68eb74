"""An entry: one record of a log, all events that one input caused, so that they stand or fall together."""

from __future__ import annotations

from typing import Any

import msgspec

TAG_FIELD = "-type"  # the key by which fastavro picks the branch of a union
POSITION_INDEX_BITS = 12
MAX_TELLS_PER_ENTRY = 1 << POSITION_INDEX_BITS


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One record of `run-events` (`RunEntry`) or `gate-ledger` (`LedgerEntry`).

    subject: the run id, or the ledger partition as `ledger-N`: what `first_seq` and `prev_hash` count and chain.
    account: the account path that the run is billed to; empty in the ledger, whose events name theirs.
    first_seq: seq of the first event; seqs of one subject are contiguous from 1.
    epoch: offset of the owner's announcement in this log partition.
    now_ms: the owner's clock at the decision, Unix milliseconds; never goes back within a partition.
    prev_hash: SHA-256 of the subject's previous entry as written, empty for its first.
    inputs: next offset to read of every input topic of this partition, after the input that caused this entry.
    marks: highest position consumed per source (`gate-ledger-3`), only those that changed since the last entry.
    told: own offset up to and including which all tells are acknowledged; -1 for none.
    tables: next offset of every global table at the decision.
    cause: `topic:partition:offset` of the input, or `timer:…`, `table:…`.
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
    events: tuple[Any, ...]


class OwnerAnnounced(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An owner's claim on a log partition. Its first announcement has `epoch` -1: the epoch is that record's offset.

    Repeats (`repeat` > 0) name the epoch, so that a reader who starts in the middle looks back a bounded distance. They also
    record positions and marks as an entry does, for inputs that cause none.
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


class Position(msgspec.Struct, frozen=True, gc=False):
    """Where a tell comes from: the entry's log partition and offset, and the tell's index within the entry."""

    partition: int
    offset: int
    index: int

    def rank(self) -> int:
        """Return one integer that orders the positions of one source partition."""
        return (self.offset << POSITION_INDEX_BITS) | self.index
