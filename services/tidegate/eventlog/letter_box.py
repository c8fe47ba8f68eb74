"""The dead letters as people handle them: read from their topic itself, looked at, sent again."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.messages import DeadLetter
from tidegate.domain.requests import parse_json
from tidegate.eventlog.interface import Broker, Message, Record, UnknownTopicError
from tidegate.eventlog.letters import DELETED_UNREAD, MAX_HEADERS_BYTES, MAX_ORIGINAL_BYTES
from tidegate.eventlog.validity import TYPE_HEADER

DEAD_LETTERS: Final = "dead-letters"
RUN_REQUESTS: Final = "run-requests"
WRITE_DEADLINE_S: Final = 30.0
# On a record that is sent again: the letter that it was. On its letter: where it was sent, comma-separated.
REDRIVES_HEADER: Final = "tidegate-redrives"
REDRIVEN_HEADER: Final = "tidegate-redriven"
_NO_KEY: Final = b"redriven"  # a letter from a run's log does not know the key, and the topic takes no null


class Stored(NamedTuple):
    """A letter as it lies in the topic; `key` is `topic:partition:offset` of what died, by which people name it."""

    key: str
    offset: int
    letter: DeadLetter

    @property
    def redriven(self) -> tuple[str, ...]:
        """Return where its original was sent again."""
        return tuple(filter(None, self.letter.headers.get(REDRIVEN_HEADER, b"").decode("utf-8", "replace").split(",")))


class CannotRedriveError(ValueError):
    """Sending the original again makes no sense; the message says why, and what does."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant; what is empty does not matter. since_ms: Unix milliseconds at the earliest."""

    since_ms: int = 0
    code: str = ""
    topic: str = ""
    run_id: str = ""

    def admits(self, letter: DeadLetter) -> bool:
        """Tell whether a letter is meant."""
        return (
            letter.at_ms >= self.since_ms
            and self.code in ("", letter.code)
            and self.topic in ("", letter.topic)
            and self.run_id in ("", letter.run_id)
        )


def read_letters(broker: Broker, wanted: Filter) -> list[Stored]:
    """Return the last letter under every key that is meant, in the order of their writing, without their originals' bytes.

    Letters are many and large; what is kept of each is small. Records that are no letters are passed over. Blocks.
    """
    found: dict[str, Stored] = {}
    for message in _messages(broker):
        key = (message.key or b"").decode("utf-8", "replace")
        found.pop(key, None)
        letter = _letter_in(message)
        if letter is not None and wanted.admits(letter):
            noted = {name: value for name, value in letter.headers.items() if name == REDRIVEN_HEADER}
            slim = msgspec.structs.replace(letter, original=b"", original_key=b"", headers=noted)
            found[key] = Stored(key, message.offset, slim)
    return list(found.values())


def find_letters(broker: Broker, keys: frozenset[str]) -> dict[str, Stored]:
    """Return the letters under these keys, whole. Blocks for reading the topic."""
    found: dict[str, Stored] = {}
    for message in _messages(broker):
        key = (message.key or b"").decode("utf-8", "replace")
        if key in keys:
            found.pop(key, None)
            letter = _letter_in(message)
            if letter is not None:
                found[key] = Stored(key, message.offset, letter)
    return found


def _messages(broker: Broker) -> Iterator[Message]:
    described = broker.describe([DEAD_LETTERS]).get(DEAD_LETTERS)
    if described is None:
        raise UnknownTopicError(f"topic {DEAD_LETTERS} does not exist; create the topics with `tidegate topics apply`")
    for partition in range(described.partition_count):
        start, end = broker.offsets(DEAD_LETTERS, partition)
        yield from broker.read(DEAD_LETTERS, partition, start, end)


def _letter_in(message: Message) -> DeadLetter | None:
    try:
        record = codec.decode(message.value)
    except codec.DecodeError:
        return None
    return record if isinstance(record, DeadLetter) else None


# --- sending again ---------------------------------------------------------------


def redrive_record(stored: Stored, partition_count: int, *, new_id: bool, again: bool) -> Record:
    """Return the record that sends a letter's original again, to the partition where it lay.

    new_id: give the request an id that was never used, where it names its own. again: although it was sent again before.
    Raises CannotRedriveError.
    """
    letter = stored.letter
    if letter.topic != RUN_REQUESTS:
        raise CannotRedriveError(
            f"it comes from {letter.topic}, whose messages follow from logs: only {RUN_REQUESTS} takes what was sent by hand. "
            "What it was about has to be asked for anew, with a request."
        )
    if letter.code == DELETED_UNREAD:
        raise CannotRedriveError("its original was deleted before anybody read it: only its producer can send it again")
    if letter.original_size > len(letter.original) or len(letter.original) >= MAX_ORIGINAL_BYTES:
        raise CannotRedriveError(
            f"a letter keeps {MAX_ORIGINAL_BYTES} bytes of its original, and this one had more: the rest is not here. "
            f"The record itself is at {stored.key}, as long as the topic keeps it."
        )
    if stored.redriven and not again:
        raise CannotRedriveError(
            f"it was sent again before, as {', '.join(stored.redriven)}; --again does it once more"
        )
    headers = {name: value for name, value in letter.headers.items() if name not in (REDRIVEN_HEADER, REDRIVES_HEADER)}
    headers[REDRIVES_HEADER] = stored.key.encode()
    return Record(
        letter.topic,
        letter.partition if 0 <= letter.partition < partition_count else 0,
        letter.original_key or _NO_KEY,
        _with_usable_id(letter, new_id=new_id),
        tuple(headers.items()),
    )


def _with_usable_id(letter: DeadLetter, *, new_id: bool) -> bytes:
    """Return the original, or a copy of it under a new id. Raises CannotRedriveError if its own id is used up."""
    request = _request_in(letter.original)
    field = "run_id" if request.get("type", "start") == "start" else "command_id"
    if not request.get(field) or not letter.run_id:
        return letter.original  # it gets its id from where it lies, so the same bytes are a new request
    if not new_id:
        what = "run" if field == "run_id" else "command"
        raise CannotRedriveError(
            f"its {field} {request[field]!r} is used up: the log has refused that {what}, and knows it for ever. "
            "--new-id sends it under another."
        )
    return canonical.dumps({**request, field: uuid.uuid4().hex}).encode()


def _request_in(original: bytes) -> dict[str, Any]:
    """Return the request as JSON object; empty if it is none."""
    try:
        value = parse_json(original)
    except canonical.NotJsonError:
        return {}
    return value if isinstance(value, dict) else {}


def redrive(broker: Broker, stored: Stored, record: Record) -> str:
    """Send the original again, then note in its letter where; return where. Blocks. Raises WriteFailedError.

    Killed between the two, it is sent and not noted. A request with a run id may be sent twice without harm.
    """
    offsets: list[int] = []
    writer = broker.writer()
    try:
        writer.send(record, offsets.append)
        writer.flush(WRITE_DEADLINE_S)
        source = f"{record.topic}:{record.partition}:{offsets[0]}"
        noted = ",".join((*stored.redriven, source)).encode()[-MAX_HEADERS_BYTES:]
        letter = msgspec.structs.replace(stored.letter, headers={**stored.letter.headers, REDRIVEN_HEADER: noted})
        writer.send(Record(DEAD_LETTERS, 0, stored.key.encode(), codec.encode(letter), ((TYPE_HEADER, b"DeadLetter"),)))
        writer.flush(WRITE_DEADLINE_S)
    finally:
        writer.close()
    return source
