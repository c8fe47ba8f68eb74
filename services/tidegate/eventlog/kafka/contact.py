"""Whether a group still knows us: a client that lost its place now and then tries for ever, and nobody hears of it.

A member that is without its group for long is not ill by itself: the brokers may be away, or another member may keep all others
waiting, for as long as it may go without polling. When both have had their time and brokers answer a new client, ours is the
one that is stuck: only beginning again helps. Liveness does not see it, because the loop goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tidegate.eventlog.interface import EventLogError

ASK_EVERY_S: Final = 30.0
SESSIONS: Final = 3


class GroupContact:
    """How long one client has been without its group while brokers answered. Belongs to the thread that polls the client, but
    for `has_share`."""

    def __init__(
        self,
        name: str,
        *,
        session_timeout_s: float,
        max_poll_interval_s: float,
        is_answered: Callable[[], bool],
        monotonic_s: Callable[[], float],
    ) -> None:
        """name: of what is shared, for people. is_answered: asks the brokers with a new client; may block for seconds."""
        self._name = name
        self._limit_s = max_poll_interval_s + SESSIONS * session_timeout_s
        self._is_answered = is_answered
        self._monotonic_s = monotonic_s
        self._without_since_s: float | None = None
        self._ask_at_s = 0.0
        self.lost()

    @property
    def has_share(self) -> bool:
        """Tell whether the group's last word was our share. Any thread may ask."""
        return self._without_since_s is None

    def gained(self) -> None:
        """The group gave us our share, be it nothing."""
        self._without_since_s = None

    def lost(self) -> None:
        """The group took our share, or the client gave it up."""
        if self._without_since_s is None:
            self._without_since_s = self._monotonic_s()
            self._ask_at_s = self._without_since_s + ASK_EVERY_S

    def check(self) -> None:
        """Raise EventLogError if we are without the group for too long and it is only us. Blocks seldom, for seconds."""
        if self._without_since_s is None or self._monotonic_s() < self._ask_at_s:
            return
        is_answered = self._is_answered()
        now_s = self._monotonic_s()
        self._ask_at_s = now_s + ASK_EVERY_S
        if not is_answered:
            self._without_since_s = now_s  # once they are back, our client has all its time again
        without_s = now_s - self._without_since_s
        if without_s > self._limit_s:
            raise EventLogError(
                f"the group of {self._name} has given us no share for {without_s:.0f} s, although brokers answer: our client is "
                "stuck, and only beginning again helps"
            )
