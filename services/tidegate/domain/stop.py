"""What makes it impossible for a run to go on, and the bounds on what one input may make it hand out."""

from __future__ import annotations

from typing import Final

# What one input may make a run hand out, or end with. Every entry and every message that follows from it must fit into a
# record (16 MiB) together with the output that caused it: an entry that cannot be written would stop its owner for good.
MAX_CALLS_BYTES: Final = 6 * 1024 * 1024
# How many steps of a run may be open at once: one input can end them all, or ask for them all, in one entry with one message
# for each.
MAX_OPEN_STEPS: Final = 2_000


class Stop(Exception):  # noqa: N818 - control flow inside decisions: the run cannot go on
    """The run ends as failed, whatever its failure mode: its definition cannot be followed."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def check_size(texts: list[str], what: str) -> None:
    """Raise Stop if the texts together are more than a record can hold."""
    if sum(map(len, texts)) * 4 <= MAX_CALLS_BYTES:  # no character takes more than four bytes
        return
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_CALLS_BYTES:
        raise Stop(
            "too_large", f"{what} has {size} bytes, at most {MAX_CALLS_BYTES} are allowed: keep large values elsewhere"
        )
