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
        "_marks",
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
        self._ranges: list[InputRange] = []
        self._due = ""
        self._inputs: dict[str, int] = {}
        self._marks: dict[str, int] = {}

    def has_room(self, subject: str, account: str, cause: Message | str, events: int, size: int) -> bool:
        """Tell whether so many events more, of so many bytes, may go into the same entry. What no input caused stands alone."""
        if subject != self.subject or account != self.account or self._due or isinstance(cause, str):
            return False
        if len(self.events) + events > MAX_EVENTS or self._size + size > MAX_BYTES:
            return False
        return len(self._ranges) < MAX_RANGES or _follows(self._ranges[-1], cause)

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
        self._blocks.append(block)
        self._size += len(block)
        self._inputs = dict(inputs)
        if marks:
            self._marks.update(marks)
        if isinstance(cause, str):
            self._due = cause
        elif self._ranges and _follows(self._ranges[-1], cause):
            self._ranges[-1] = self._ranges[-1]._replace(last=cause.offset)
        else:
            self._ranges.append(InputRange(cause.topic, cause.partition, cause.offset, cause.offset))

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
            events=tuple(events),
        )

    def sealed(self, kind: str, epoch: int, told: int) -> tuple[Entry, bytes]:
        """Return the entry and its bytes. Raises ValueError if it cannot be written, which its owner has ruled out."""
        entry = self.entry(epoch, told, self.events)
        return entry, codec.encode_entry(kind, entry, b"".join(self._blocks))


def _follows(last: InputRange, cause: Message) -> bool:
    return cause.topic == last.topic and cause.offset == last.last + 1
