"""What consecutive inputs caused of one subject, until it is sealed into an entry. Why: docs/adr/0040."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidegate import codec
from tidegate.domain.entry import Entry, InputRange, causes_text
from tidegate.eventlog.interface import Message

MAX_EVENTS: Final = 500  # of more than one input; one may cause more
MAX_BYTES: Final = 256 * 1024  # of their events
MAX_RANGES: Final = 4  # of inputs that an entry names as its cause


class Draft:
    """An entry to be: its events are applied already, and their bytes made, so that nothing can refuse it any more.

    It records the positions after its last input. That holds all that was decided up to there, because a draft is sealed
    before anything that another subject's input caused is noted.
    """

    __slots__ = (
        "_blocks",
        "_due",
        "_inputs",
        "_is_open",
        "_marks",
        "_parts",
        "_ranges",
        "_size",
        "account",
        "events",
        "first_seq",
        "now_ms",
        "prev_hash",
        "subject",
        "tables",
    )

    def __init__(
        self, subject: str, account: str, first_seq: int, prev_hash: bytes, now_ms: int, tables: Mapping[str, int]
    ) -> None:
        """All of it is as in `Entry`."""
        self.subject, self.account = subject, account
        self.first_seq, self.prev_hash = first_seq, prev_hash
        self.now_ms = now_ms
        self.tables = dict(tables)
        self.events: list[Any] = []
        self._blocks: list[bytes] = []
        self._size = 0
        self._parts: list[int] = []
        self._ranges: list[InputRange] = []
        self._due = ""
        self._is_open = True
        self._inputs: dict[str, int] = {}
        self._marks: dict[str, int] = {}

    def has_room(self, subject: str, account: str, cause: Message | str, events: int, size: int) -> bool:
        """Tell whether so many events more, of so many bytes, may go into the same entry. What no input caused stands alone."""
        if subject != self.subject or account != self.account or not self._is_open or isinstance(cause, str):
            return False
        if len(self.events) + events > MAX_EVENTS or self._size + size > MAX_BYTES:
            return False
        ranges = self._ranges
        return len(ranges) < MAX_RANGES or (cause.topic == ranges[-1].topic and cause.offset == ranges[-1].last + 1)

    def add(
        self,
        events: Sequence[Any],
        block: bytes,
        cause: Message | str,
        inputs: Mapping[str, int],
        marks: Mapping[str, int],
    ) -> None:
        """Add what one cause led to. block: the events' bytes; inputs, marks: the positions after it, and which marks changed."""
        self.events += events
        self._parts.append(len(events))
        self._blocks.append(block)
        self._size += len(block)
        self._inputs = dict(inputs)
        if marks:
            self._marks.update(marks)
        if isinstance(cause, str):
            self._due, self._is_open = cause, False
            return
        ranges, offset = self._ranges, cause.offset
        if ranges and offset == ranges[-1].last + 1 and cause.topic == ranges[-1].topic:
            ranges[-1].last = offset
        else:
            ranges.append(InputRange(cause.topic, cause.partition, offset, offset))

    def close(self) -> None:
        """Take nothing more."""
        self._is_open = False

    def entry(self, epoch: int, told: int, events: Sequence[Any]) -> Entry:
        """Return the entry that this is with these events."""
        return Entry(
            subject=self.subject,
            account=self.account,
            first_seq=self.first_seq,
            epoch=epoch,
            now_ms=self.now_ms,
            prev_hash=self.prev_hash,
            inputs=self._inputs,
            marks=self._marks,
            told=told,
            tables=self.tables,
            cause=self._due or causes_text(self._ranges),
            parts=tuple(self._parts) if len(self._parts) > 1 else (),
            events=tuple(events),
        )

    def bytes_of(self, kind: str, entry: Entry) -> bytes:
        """Return the bytes of the entry that this is. Raises ValueError if it cannot be written, which its owner has ruled out."""
        blocks = self._blocks
        return codec.encode_entry(kind, entry, blocks[0] if len(blocks) == 1 else b"".join(blocks))
