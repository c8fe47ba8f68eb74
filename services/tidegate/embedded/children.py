"""Child processes that cannot outlive us and that Ctrl-C in our terminal does not reach."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_TETHER = str(Path(__file__).with_name("tether.py"))

Child = subprocess.Popen[bytes]


@dataclass(slots=True)
class _Order:
    argv: Sequence[str]
    env: Mapping[str, str] | None
    output: BinaryIO
    made: Future[Child] = field(default_factory=Future)


class _Spawner:
    """One thread that creates all children, and lives as long as the process.

    The kernel ties a child's parent-death signal to the thread that created it, not to the process: a child that was
    started from a worker thread would be killed as soon as that thread ends.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def spawn(self, order: _Order) -> Child:
        with self._starting:
            if self._thread is None:
                # A daemon, so that it neither holds up our exit nor is ended before the atexit functions have run.
                self._thread = threading.Thread(target=self._run, name="tidegate-spawner", daemon=True)
                self._thread.start()
        self._orders.put(order)
        return order.made.result()

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            try:
                child = subprocess.Popen(
                    order.argv,
                    env=order.env,
                    stdin=subprocess.DEVNULL,
                    stdout=order.output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except BaseException as error:  # whatever it is belongs to the caller, and this thread must go on
                order.made.set_exception(error)
            else:
                order.made.set_result(child)


_spawner = _Spawner()


def _after_fork() -> None:
    """A forked copy of this process has no thread but one: let it make its own spawner."""
    global _spawner  # noqa: PLW0603 - one per process by nature
    _spawner = _Spawner()


os.register_at_fork(after_in_child=_after_fork)


def spawn(argv: Sequence[str], *, output: BinaryIO, env: Mapping[str, str] | None = None, idle: bool = False) -> Child:
    """Start a process in a session of its own that the kernel kills (SIGKILL) when this process ends, however it ends.

    Its input is empty, its output and errors go to `output`. With `idle` it only gets processor time that nobody else
    wants. A program that cannot be run ends with status 127 and says why in `output`.
    Blocks for the fork. Raises OSError if that fails. May be called from any thread.
    """
    return _spawner.spawn(_Order(tethered(argv, idle=idle), env, output))


def tethered(argv: Sequence[str], *, idle: bool = False) -> list[str]:
    """Return the command line that makes of itself the given program, which then dies with this process.

    More exactly with the thread that starts it: start it from one that lives as long as the process.
    """
    scheduling = ["--idle"] if idle else []
    return [sys.executable, "-I", "-S", _TETHER, *scheduling, str(os.getpid()), *argv]
