"""Records of the topics -> rows of the fact tables. Pure: a row is a function of its record and nothing else.

A row is a tuple in the order of its table's columns, and whole batches become one text by `encode`, in C: this is the
hot path of a rebuild. A `body` is JSON already and goes into that text as it is, an object where others have a string: nobody
has to write its quotes with backslashes, nor to read them, and ClickHouse keeps it letter by letter (see INSERT_SETTINGS).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain.entry import causes_in
from tidegate.domain.identity import NOWHERE, source_of
from tidegate.eventlog.interface import Message
from tidegate.projection.redaction import redact_call

Row = tuple[Any, ...]
Fields = dict[str, Any]

EVENTS: Final = "event_facts"
LEDGER: Final = "ledger_facts"
INSTANCES: Final = "instance_facts"
DEAD_LETTERS: Final = "dead_letter_facts"
UNREADABLE: Final = "unreadable_facts"
FRESHNESS: Final = "freshness_facts"
WHOLE: Final = "whole_facts"


class Reach(NamedTuple):
    """What a process has of a partition: everything from `since` on. log_start: what lies before is in no log any more."""

    since: int
    log_start: int

    def whole_to(self, known: int, next_offset: int) -> int:
        """Return up to where tables lack nothing that lacked nothing up to `known`, and have got what we have."""
        known = max(known, self.log_start)
        return max(known, next_offset) if self.since <= known else known


LATEST_MS: Final = 4_102_444_800_000  # the year 2100
INSERT_FORMAT: Final = "JSONCompactEachRow"
# The server's own default, unless its operators want it otherwise.
INSERT_SETTINGS: Final = {"input_format_json_read_objects_as_strings": 1}

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    EVENTS: (
        "run_id",
        "seq",
        "partition",
        "offset",
        "epoch",
        "at_ms",
        "account",
        "type",
        "step_id",
        "attempt",
        "actual_micros",
        "cause",
        "body",
    ),
    LEDGER: (
        "ledger",
        "seq",
        "offset",
        "epoch",
        "at_ms",
        "type",
        "account",
        "run_id",
        "step_id",
        "attempt",
        "budget_micros",
        "reserved_micros",
        "actual_micros",
        "overshoot_micros",
        "cause",
        "body",
    ),
    INSTANCES: (
        "instance_id",
        "offset",
        "removed",
        "service",
        "incarnation",
        "state",
        "host",
        "pid",
        "queue",
        "slots",
        "free_slots",
        "running",
        "functions",
        "version",
        "started_ms",
        "at_ms",
        "body",
    ),
    DEAD_LETTERS: (
        "topic",
        "partition",
        "offset",
        "letter_offset",
        "removed",
        "service",
        "code",
        "reason",
        "run_id",
        "original_base64",
        "original_size",
        "key_base64",
        "headers",
        "at_ms",
    ),
    UNREADABLE: ("topic", "partition", "offset", "reason", "size", "at_ms"),
    FRESHNESS: ("topic", "partition", "next_offset", "end_offset", "last_event_ms", "written_ms", "whole_to"),
    WHOLE: ("topic", "partition", "whole_to"),
}

_encoder: Final = msgspec.json.Encoder()
_json: Final[Callable[[Any], bytes]] = _encoder.encode
_raw: Final = msgspec.Raw


def encode(rows: list[Row]) -> bytes:
    """Return the rows of one table in INSERT_FORMAT: one JSON array a line."""
    return _encoder.encode_lines(rows)


def add_run_events(rows: list[Row], entry: Fields, partition: int, offset: int) -> None:
    """Append one row per event of a valid `RunEntry`. `body` is the event's fields as JSON, bytes in base64."""
    run_id, account, epoch = entry["subject"], entry["account"], entry["epoch"]
    at_ms = _moment(entry["now_ms"])
    seq: int = entry["first_seq"]
    for (name, event), cause in zip(entry["events"], _causes(entry), strict=False):
        get = event.get
        rows.append(
            (
                run_id,
                seq,
                partition,
                offset,
                epoch,
                at_ms,
                account,
                name,
                get("step_id", ""),
                get("attempt", 0),
                get("actual_micros", 0),
                cause,
                _raw(_json(event)),
            )
        )
        seq += 1


def add_ledger_events(rows: list[Row], entry: Fields, partition: int, offset: int) -> None:
    """Append one row per event of a valid `LedgerEntry`, without what a decision wants redacted."""
    epoch, at_ms = entry["epoch"], _moment(entry["now_ms"])
    seq: int = entry["first_seq"]
    for (name, event), cause in zip(entry["events"], _causes(entry), strict=False):
        get = event.get
        rows.append(
            (
                partition,
                seq,
                offset,
                epoch,
                at_ms,
                name,
                get("account", ""),
                get("run_id", ""),
                get("step_id", ""),
                get("attempt", 0),
                get("budget_micros"),
                get("reserved_micros", 0),
                get("actual_micros", 0),
                get("overshoot_micros", 0),
                cause,
                _raw(_json(_shown(name, event))),
            )
        )
        seq += 1


def _causes(entry: Fields) -> Iterable[str]:
    """Return what each event of an entry follows from."""
    parts = entry.get("parts")
    if not parts:
        return repeat(entry["cause"])
    return chain(chain.from_iterable(map(repeat, causes_in(entry["cause"], len(parts)), parts)), repeat(entry["cause"]))


def _shown(name: str, event: Fields) -> Fields:
    """Return a ledger event for people: without what is to be hidden, and without an owner's own form of its state."""
    if name == "LedgerCarried":
        return event | {"units": len(event["units"])}
    return redact_call(event) if "redact" in event else event


def instance_row(instance: Fields, offset: int) -> Row:
    """Return the row of an instance's latest line; a registration's own offset is its incarnation."""
    return (
        instance["instance_id"],
        offset,
        False,
        instance["service"],
        offset if instance["incarnation"] < 0 else instance["incarnation"],
        instance["state"],
        instance["host"],
        instance["pid"],
        instance["queue"],
        instance["slots"],
        instance["free_slots"],
        len(instance["running"]),
        instance["functions"],
        instance["version"],
        _moment(instance["started_ms"]),
        _moment(instance["at_ms"]),
        _raw(_json(instance)),
    )


def removed_instance_row(key: bytes, offset: int) -> Row:
    """Return the row that a tombstone in `instances` leaves."""
    return (_text(key), offset, True, "", -1, "", "", 0, "", 0, 0, 0, (), "", 0, 0, "")


def dead_letter_row(letter: Fields, letter_offset: int) -> Row:
    """Return the row of a dead letter, named by where its original lies."""
    return (
        letter["topic"],
        letter["partition"],
        letter["offset"],
        letter_offset,
        False,
        letter["service"],
        letter["code"],
        letter["reason"],
        letter["run_id"],
        letter["original"],
        letter["original_size"],
        letter["original_key"],
        _json(letter["headers"]).decode(),
        _moment(letter["at_ms"]),
    )


def removed_dead_letter_row(key: bytes, letter_offset: int) -> Row | None:
    """Return the row that a tombstone in `dead-letters` leaves; None if its key is not `topic:partition:offset`."""
    source = source_of(_text(key))
    if source is NOWHERE:
        return None
    return (*source, letter_offset, True, "", "", "", "", b"", 0, b"", "{}", 0)


def unreadable_row(message: Message, reason: str) -> Row:
    """Return the note that a record of ours could not be read."""
    size = len(message.value or b"")
    return (message.topic, message.partition, message.offset, reason, size, _moment(message.timestamp_ms))


def _moment(at_ms: int) -> int:
    """Return a time that ClickHouse and its clients can show; 0 for one that nobody of ours writes.

    Months are partitions: times from everywhere would be more partitions than one insert may touch, and it would fail for ever.
    """
    return at_ms if 0 <= at_ms < LATEST_MS else 0


def _text(key: bytes) -> str:
    return key.decode("utf-8", "replace")
