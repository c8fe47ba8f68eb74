"""Inputs that were read and wait a moment for another of their subject, as if they were unread. Why: docs/adr/0040."""

from __future__ import annotations

from collections import deque
from typing import Any, Final, NamedTuple

from tidegate.eventlog.interface import Message

PATIENCE_S: Final = 0.1
MAX_WAITING: Final = 500


class Waiting(NamedTuple):
    """An input, what it holds, whom it is about, and since when it waits by a clock that never jumps."""

    message: Message
    record: Any
    subject: str
    since_s: float


class WaitingInputs:
    """The inputs of a partition that wait, all of one topic, in the order in which they were read and will be taken."""

    def __init__(self) -> None:
        self._inputs: deque[Waiting] = deque()
        self._about: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._inputs)

    def add(self, waiting: Waiting) -> None:
        """Let an input wait, behind all that do."""
        self._inputs.append(waiting)
        self._about[waiting.subject] = self._about.get(waiting.subject, 0) + 1

    def next(self) -> Waiting:
        """Return the input that waits longest, which waits no longer. Raises IndexError if none does."""
        waiting = self._inputs.popleft()
        left = self._about.pop(waiting.subject) - 1
        if left:
            self._about[waiting.subject] = left
        return waiting

    def is_about(self, subject: str) -> bool:
        """Tell whether an input that waits is about that subject."""
        return subject in self._about

    def since_s(self) -> float:
        """Return since when the first one waits; infinity if none does."""
        return self._inputs[0].since_s if self._inputs else float("inf")
