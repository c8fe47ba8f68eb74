"""A function that forks: its child is a copy of the executor, and would run other functions' coroutines and answer for them.

The child may do what the function does in it. Where it would come back to us, by returning, raising or waiting, it ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

EXIT_CAME_BACK: Final = 1
_CAME_BACK: Final = (
    b'{"event": "a child that a function forked came back to the executor and is ended; end it with os._exit", '
    b'"level": "warning", "service": "executor", "pid": %d, "parent": %d}\n'
)

_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by the thread that runs them


class ChildrenEndHere:
    """A block that children of this process do not leave, however they would: each of them ends at its end."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if os.getpid() != self._pid:
            _end(self._pid, error)


@contextmanager
def children_do_not_run(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have children that are forked on this thread, which runs the loop, end before they run anything else of it."""
    _loops[threading.get_ident()] = loop
    try:
        yield
    finally:
        del _loops[threading.get_ident()]


def _in_child() -> None:
    loop = _loops.get(threading.get_ident())
    if loop is not None:
        # Before what is ready: the parent runs that. There is no public way to be first.
        ready: Any = loop._ready  # type: ignore[attr-defined]  # private, as just said
        ready.appendleft(asyncio.Handle(_end, (os.getppid(), None), loop))


def _end(parent: int, error: BaseException | None) -> None:
    """End this process at once: threads that it does not have may hold locks, and what was buffered is the parent's."""
    if isinstance(error, SystemExit):
        os._exit(error.code if isinstance(error.code, int) else int(error.code is not None))
    os.write(2, _CAME_BACK % (os.getpid(), parent))
    os._exit(EXIT_CAME_BACK)


os.register_at_fork(after_in_child=_in_child)
