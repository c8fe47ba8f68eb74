"""Failpoints of processes that run: armed at a moment of the test's choice, for one life of one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

from support.stack import WholeStack, eventually
from tidegate.failpoints import ENVIRONMENT_VARIABLE


class Arming:
    """The files from which the processes of a stack are armed. Give `process_env` to the stack."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        folder.mkdir(parents=True)
        self._files = {name: folder / name for name in names}
        self.process_env = {name: {ENVIRONMENT_VARIABLE: f"@{file}"} for name, file in self._files.items()}

    def at_start(self, name: str, specification: str) -> None:
        """Arm the process that is started next under this name."""
        file = self._files[name]
        partial = file.with_suffix(".partial")
        partial.write_text(specification, encoding="utf-8")
        partial.replace(file)

    def now(self, stack: WholeStack, name: str, specification: str) -> None:
        """Arm a process that runs, and wait until it is."""
        pid = stack.pids[name]
        eventually(lambda: _catches(pid, signal.SIGUSR1), f"{name} to listen to the signal")
        self.at_start(name, specification)
        os.kill(pid, signal.SIGUSR1)
        eventually(lambda: self.is_heard(name), f"{name} to be armed")

    def is_heard(self, name: str) -> bool:
        """Tell whether what was asked for last is armed."""
        return not self._files[name].exists()


def until_stopped(pid: int) -> None:
    """Wait until a failpoint has stopped the process."""
    eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, f"pid {pid} to be stopped")


def _catches(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal, which would end it else."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (number - 1))
    return False
