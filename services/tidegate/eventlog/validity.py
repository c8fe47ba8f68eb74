"""Rule 6: which entries of a log partition count. Every reader uses this one function.

The epoch in force is the highest announced so far; an entry is valid only if it carries it.
"""

from __future__ import annotations

EPOCH_HEADER = "epoch"
TYPE_HEADER = "type"
ANNOUNCEMENT_TYPE = "OwnerAnnounced"
NO_EPOCH = -1


def possible_epoch(epoch: int, offset: int) -> int:
    """Return an epoch that a record at `offset` states; NO_EPOCH if there cannot be such a one.

    An epoch is an offset that was written before: what claims a later one is nobody's, and must not void all others.
    """
    return epoch if epoch < offset else NO_EPOCH


def announced_epoch(epoch: int, offset: int) -> int:
    """Return the epoch that an announcement at `offset` announces; `epoch` is -1 in an owner's first one, whose offset it is."""
    return offset if epoch == NO_EPOCH else possible_epoch(epoch, offset)


class EpochTracker:
    """Folds the announcements of one log partition and judges its entries."""

    __slots__ = ("epoch",)

    def __init__(self, epoch: int = NO_EPOCH) -> None:
        self.epoch = epoch

    def announced(self, offset: int, epoch: int) -> None:
        """Take note of an announcement; `epoch` as it stands there."""
        self.epoch = max(self.epoch, announced_epoch(epoch, offset))

    def is_valid(self, epoch: int) -> bool:
        """Tell whether an entry of that epoch counts at this point of the log."""
        return epoch == self.epoch
