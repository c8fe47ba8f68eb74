"""What operators have paused: the rows of the global table `controls`. Pure."""

from __future__ import annotations

import re
from typing import Final

from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.messages import Control

EVERYTHING: Final = "*"
_is_name: Final = re.compile(NAME_PATTERN).fullmatch


def is_control_key(key: str) -> bool:
    """Tell whether a row under this key means anything: a queue's name, or `*`."""
    return key == EVERYTHING or (_is_name(key) is not None and not key.endswith("\n"))


class Controls:
    """Which queues are paused. A queue is if its own row says so, or the one for everything: each is taken back by itself."""

    def __init__(self) -> None:
        self._paused: set[str] = set()

    def take(self, key: str, row: Control | None, *, is_unknown: bool = False) -> None:
        """Note a changed row; None: it was removed. A row under a key that names nothing is ignored.

        is_unknown: there is one, and nobody can tell what it says. It may be a pause after an incident, so it is one.
        """
        if not is_control_key(key):
            return
        if is_unknown or (row is not None and row.paused):
            self._paused.add(key)
        else:
            self._paused.discard(key)

    def __bool__(self) -> bool:
        """Tell whether anything is paused."""
        return bool(self._paused)

    def is_paused(self, queue: str) -> bool:
        """Tell whether nothing of this queue may begin."""
        return EVERYTHING in self._paused or queue in self._paused
