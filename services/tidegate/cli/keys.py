"""Single keys, read from the terminal while something else goes on."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty
from types import TracebackType
from typing import Any, Self


class Keys:
    """A context in which `pressed` returns what was typed since it was last asked. Without a terminal nothing ever is.

    Ctrl-C goes on to interrupt; the terminal is put back as it was at the end.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[Any] = []

    @property
    def are_there(self) -> bool:
        """Tell whether anybody can press a key."""
        return self._fd >= 0

    def __enter__(self) -> Self:
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def pressed(self) -> str:
        """Return the characters typed since the last call. Never blocks."""
        found = ""
        while self._fd >= 0 and select.select([self._fd], [], [], 0.0)[0]:
            data = os.read(self._fd, 64)
            if not data:
                break
            found += data.decode("utf-8", "replace")
        return found
