"""What Kafka's client library says, said seldom: while a broker is away it tries many times a second, with a line each time."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Final

SAID_AGAIN_AFTER_S: Final = 30.0
MAX_KINDS: Final = 1_000
# In what lines of one kind differ: which of our clients, which of its connections to that broker, after how long.
_VARYING: Final = re.compile(
    r"\[[^\]]*\]|GroupCoordinator(?:/\d+)?: |[^\s:]+:\d+(?:/\w+)?: |\(after .*\)|\d+ ?ms",
)


class Sparing(logging.Filter):
    """Lets the first line of a kind pass, and every `again_after_s` another one that says how many there were. Thread-safe."""

    def __init__(
        self, again_after_s: float = SAID_AGAIN_AFTER_S, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._again_after_s = again_after_s
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._said: dict[str, tuple[float, int]] = {}  # kind -> when it was said last, how many were held back since

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the line is to be written."""
        text = record.getMessage()
        kind = _VARYING.sub("", text)
        now_s = self._monotonic_s()
        with self._lock:
            if len(self._said) > MAX_KINDS:
                self._said.clear()
            said_s, held_back = self._said.get(kind, (float("-inf"), 0))
            if now_s - said_s < self._again_after_s:
                self._said[kind] = (said_s, held_back + 1)
                return False
            self._said[kind] = (now_s, 0)
        if held_back:
            record.msg, record.args = f"{text} (and {held_back} more like it in {now_s - said_s:.0f} s)", ()
        return True
