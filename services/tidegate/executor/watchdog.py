"""Notices that the event loop hangs: a function that blocks it can only be ended together with the process."""

from __future__ import annotations

import gc
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Final

CHECK_S: Final = 0.5


class Watchdog:
    """Pings the event loop from a thread of its own.

    It barks when pings stayed unanswered for `grace_s` and an attempt is beyond its deadline by as much. Pings are counted,
    not clocked, so that a process that was stopped as a whole is not taken for one whose loop hangs.
    """

    def __init__(
        self,
        *,
        ping: Callable[[Callable[[], None]], None],
        latest_overdue_s: Callable[[], float],
        grace_s: float,
        bark: Callable[[str], None],
        check_s: float = CHECK_S,
    ) -> None:
        """`ping(pong)` has the loop call `pong`; `latest_overdue_s` says how far the oldest deadline lies behind.

        `bark(stack)` gets what the loop's thread is doing.
        """
        self._ping = ping
        self._latest_overdue_s = latest_overdue_s
        self._grace_s = grace_s
        self._bark = bark
        self._check_s = min(check_s, grace_s / 2)
        self._unanswered = 0
        self._loop_thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; call it on the loop's thread."""
        self._loop_thread_id = threading.get_ident()
        self._thread.start()

    def stop(self) -> None:
        """Stop watching. Blocks for a moment."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._check_s):
            self._unanswered += 1
            self._ping(self._pong)
            hung = self._unanswered * self._check_s > self._grace_s and self._latest_overdue_s() > self._grace_s
            if hung:
                self._bark(_stack_of(self._loop_thread_id))
                return

    def _pong(self) -> None:
        self._unanswered = 0


def _stack_of(thread_id: int) -> str:
    # A collection that begins inside of this call may wait for ever for a lock that the call holds (CPython gh-106883), and then
    # the process that is to be ended could not even end itself.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        frame = sys._current_frames().get(thread_id)
    finally:
        if was_enabled:
            gc.enable()
    return "" if frame is None else "".join(traceback.format_stack(frame))


def overdue_s(deadlines_s: list[float]) -> float:
    """Return how far the oldest of the deadlines (monotonic clock) lies behind; negative if none does."""
    return time.monotonic() - min(deadlines_s) if deadlines_s else -1.0
