"""Whether a process has ended."""

from __future__ import annotations

import psutil


def is_gone(process: psutil.Process) -> bool:
    """An orphan that has ended stays a zombie until the init process looks, and in a container nobody may look."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
