"""The lease of an incarnation: the time during which others rely on it, and after which it must do nothing more."""

from __future__ import annotations

import threading
from collections.abc import Callable

from tidegate.registry.process import boottime_s


class Lease:
    """Runs out `length_s` after the sending of the last heartbeat whose acknowledgement was accepted in time.

    A lapse is final: nothing revives a lease that was once found lapsed, whoever found it. The clock goes on while the
    process is stopped, so a process that slept through its lease finds out before it acts. Thread-safe.
    """

    def __init__(
        self,
        length_s: float | None,
        on_lapse: Callable[[str], None] | None = None,
        clock: Callable[[], float] = boottime_s,
    ) -> None:
        """`length_s` None: it never runs out. `on_lapse(reason)` is called once, by the thread that notices."""
        self._length_s = length_s
        self._on_lapse = on_lapse
        self._clock = clock
        self._lock = threading.Lock()
        self._until: float | None = None
        self._lapsed = False

    @property
    def lapsed(self) -> bool:
        """Tell whether a lapse was noticed. Reads no clock: see `held`."""
        return self._lapsed

    @property
    def until_s(self) -> float:
        """Return when the lease runs out on the boot-time clock; infinity if it never does or has not begun."""
        return float("inf") if self._length_s is None or self._until is None else self._until

    def acknowledged(self, sent_at_s: float) -> bool:
        """Take the acknowledgement of what was sent at `sent_at_s` into account; returns whether the lease is held.

        The lapse is looked for first: an acknowledgement that is read too late extends nothing.
        """
        with self._lock:
            if self._length_s is None:
                return True
            until = sent_at_s + self._length_s
            # The first acknowledgement, the registration's, begins the lease; it too can come too late.
            found_lapsed = self._clock() >= (until if self._until is None else self._until)
            if not found_lapsed and not self._lapsed:
                self._until = until if self._until is None else max(self._until, until)
                return True
        self._lapse()
        return False

    def held(self) -> bool:
        """Read the clock and tell whether the lease is held. Noticing a lapse here ends it for good."""
        if self._lapsed:
            return False
        if self._clock() < self.until_s:
            return True
        self._lapse()
        return False

    def _lapse(self) -> None:
        with self._lock:
            if self._lapsed:
                return
            self._lapsed = True
            until = self._until
        if self._on_lapse is not None:
            reason = (
                "the registration was acknowledged too late"
                if until is None
                else "no heartbeat was acknowledged in time"
            )
            self._on_lapse(f"{reason} (lease of {self._length_s:g} s)")
