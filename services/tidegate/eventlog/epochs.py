"""Which epoch is in force where reading starts in the middle of a log partition (rule 6)."""

from __future__ import annotations

from typing import Final

from tidegate import codec
from tidegate.domain.entry import OwnerAnnounced
from tidegate.eventlog.interface import Broker, Message
from tidegate.eventlog.tail import Decode, Tail
from tidegate.eventlog.validity import (
    ANNOUNCEMENT_TYPE,
    EPOCH_HEADER,
    NO_EPOCH,
    TYPE_HEADER,
    announced_epoch,
    possible_epoch,
)

# More than a zombie can write in the one turn before it notices, and 1,000 entries of the owner in force, which repeats itself
# that often. tests/unit/test_epochs.py holds it against the owner loop's bounds.
FIRST_SPAN: Final = 2_500
GROWTH: Final = 4
MAX_EPOCH_DIGITS: Final = 19


def epoch_before(broker: Broker, topic: str, partition: int, offset: int) -> int:
    """Return the epoch in force for a record at `offset`; see `epoch_in`. Blocks for reading. Raises EventLogError."""
    return epoch_in(Tail(broker, topic, partition, offset), offset)


def epoch_in(tail: Tail, offset: int) -> int:
    """Return the epoch in force for a record at `offset`: the highest announced before it; NO_EPOCH if there is none.

    Looks back a bounded distance, and further as long as the highest epoch seen might not be the highest there is: an
    entry tells that its epoch was announced, and the epoch is the offset of that announcement, so nothing before it can
    matter. A repeated announcement of the highest epoch seen ends the search too; a dead owner's last entries alone do not.
    Blocks for reading. Raises EventLogError.
    """
    span = FIRST_SPAN
    while True:
        start = max(tail.start, offset - span)
        highest, announced = NO_EPOCH, NO_EPOCH
        for message in tail.read(start, offset):
            epoch, is_announcement = _epoch_of(message, tail.decode)
            highest = max(highest, epoch)
            if is_announcement:
                announced = max(announced, epoch)
        seen_since_claimed = highest != NO_EPOCH and start <= highest
        if start == tail.start or seen_since_claimed or announced == highest != NO_EPOCH:
            return highest
        span *= GROWTH


def stated_epoch(text: bytes, offset: int) -> int:
    """Return the epoch that the header of a record at `offset` states; NO_EPOCH if there cannot be such a one: it is nobody's."""
    if not text.isdigit() or len(text) > MAX_EPOCH_DIGITS:
        return NO_EPOCH
    return possible_epoch(int(text), offset)


def _epoch_of(message: Message, decode: Decode) -> tuple[int, bool]:
    """Return the epoch that a record proves announced, and whether it is the announcement; NO_EPOCH if it proves none."""
    if message.value is None:
        return NO_EPOCH, False
    headers = dict(message.headers)
    if headers.get(TYPE_HEADER) != ANNOUNCEMENT_TYPE.encode() and EPOCH_HEADER in headers:
        return stated_epoch(headers[EPOCH_HEADER], message.offset), False
    try:
        record = decode(message.value)
    except codec.DecodeError:
        return NO_EPOCH, False
    epoch: int = getattr(record, "epoch", NO_EPOCH)
    if isinstance(record, OwnerAnnounced):
        return announced_epoch(epoch, message.offset), True
    return possible_epoch(epoch, message.offset), False
