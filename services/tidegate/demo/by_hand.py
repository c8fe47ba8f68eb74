"""What keys do while a demo runs: p pauses its queue, r resumes it, c cancels the runs that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from tidegate.sdk.client import Client

KEYS_SAID: Final = "keys: p pauses, r resumes, c cancels what is left"
PAUSED: Final = "PAUSED    the queue, by hand: nothing new starts until r"
RESUMED: Final = "RESUMED   the queue, by hand"
CANCELLED: Final = "CANCELLED by hand: what is set aside comes back"


class ByHand:
    """Takes note of what somebody did, so that the demo does not expect what cannot come any more."""

    def __init__(self, keys: Callable[[], str], queue: str) -> None:
        """keys: returns what was typed since it was last asked."""
        self._keys = keys
        self._queue = queue
        self.is_paused = False
        self.was_cancelled = False

    def obey(self, client: Client, left: Iterable[str]) -> list[str]:
        """Do what was typed, the last one of pause and resume counting; returns lines that say what was done.

        left: the runs that are not over. Raises EventLogError.
        """
        typed = self._keys()
        said: list[str] = []
        switch = [key for key in typed if key in "pr"]
        if switch and switch[-1] == "p":
            client.pause_queue(self._queue, reason="key p of the demo")
            said.append(PAUSED)
        elif switch:
            client.resume_queue(self._queue, reason="key r of the demo")
            said.append(RESUMED)
        self.is_paused = switch[-1] == "p" if switch else self.is_paused
        if "c" in typed and not self.was_cancelled:
            self.was_cancelled, self.is_paused = True, False
            client.resume_queue(self._queue, reason="key c of the demo")
            for run_id in left:
                client.cancel(run_id, reason="key c of the demo")
            said.append(CANCELLED)
        return said
