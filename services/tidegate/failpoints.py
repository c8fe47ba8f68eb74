"""Named crash points at commit edges: inert unless armed, so that tests can kill a process exactly there.

    TIDEGATE_FAILPOINTS="executor.before-enter=kill,owner.after-log=sleep:0.5@3"

Each item is `name=action[@n]`: the action happens at the n-th time the point is reached (default: the first), once.
Actions: `kill` (SIGKILL to this process: nothing is flushed, no handler runs), `stop` (SIGSTOP: frozen until somebody
sends SIGCONT), `sleep:SECONDS` (the calling thread sleeps).

    TIDEGATE_FAILPOINTS="@/folder/gate-0"

reads them from a file: at start, if it is there, and whenever SIGUSR1 comes, so that a process can be armed while it works.
Who reads the file removes it first: a process that is killed comes back unarmed, and who wrote it sees that it was heard.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

ENVIRONMENT_VARIABLE: Final = "TIDEGATE_FAILPOINTS"


class FailpointSyntaxError(ValueError):
    """The specification of failpoints cannot be read. Raised at start-up: a typo must not make a test pass."""


class _Armed:
    """One failpoint: what happens, and how many passes are left until it does."""

    __slots__ = ("act", "passes_left")

    def __init__(self, act: Callable[[], None], passes_left: int) -> None:
        self.act = act
        self.passes_left = passes_left


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()
_observer: Callable[[str], None] | None = None


def failpoint(name: str) -> None:
    """Mark an edge. Does nothing unless a failpoint of that name is armed; then it may kill, freeze or delay us."""
    if _observer is not None:
        _observer(name)
    if not _armed:
        return
    with _lock:
        point = _armed.get(name)
        if point is None:
            return
        point.passes_left -= 1
        if point.passes_left:
            return
        del _armed[name]
    point.act()


def arm(specification: str) -> None:
    """Replace what is armed by the specification; an empty one disarms everything. Raises FailpointSyntaxError."""
    points = dict(_parse(item.strip()) for item in specification.split(",") if item.strip())
    with _lock:
        _armed.clear()
        _armed.update(points)


def observe(observer: Callable[[str], None] | None) -> None:
    """Have every failpoint that is passed told to the observer, which may raise; None ends it. For the simulation."""
    global _observer  # noqa: PLW0603 - inert in production: one look at a module's variable
    _observer = observer


def _parse(item: str) -> tuple[str, _Armed]:
    name, equals, rest = item.partition("=")
    action, _, count = rest.partition("@")
    if not name or not equals or (count and not (count.isdecimal() and int(count) > 0)):
        raise FailpointSyntaxError(f"{item!r}: expected name=action or name=action@n with n from 1")
    return name, _Armed(_action(item, action), int(count or 1))


def _action(item: str, action: str) -> Callable[[], None]:
    if action == "kill":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        # To this very thread, which so stops here and now: sent to the process, another thread might take the signal,
        # and this one run on for a moment.
        return lambda: signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    kind, _, amount = action.partition(":")
    try:
        seconds = float(amount)
    except ValueError:
        seconds = -1.0
    if kind != "sleep" or not 0 <= seconds < float("inf"):
        raise FailpointSyntaxError(f"{item!r}: the action must be kill, stop or sleep:SECONDS")
    return lambda: time.sleep(seconds)


def _arm_from_file(path: Path) -> None:
    try:
        specification = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    path.unlink()
    arm(specification)


def _arm_from_environment(specification: str) -> None:
    if not specification.startswith("@"):
        arm(specification)
        return
    path = Path(specification[1:])
    signal.signal(signal.SIGUSR1, lambda *_: _arm_from_file(path))
    _arm_from_file(path)


_arm_from_environment(os.environ.get(ENVIRONMENT_VARIABLE, ""))
