"""Who this process is, and what can be proven about another process that used the same instance id.

A proof of death must never be wrong: with it the gate gives the work of the old incarnation to others at once, without
waiting for its lease. So whatever cannot be seen for certain is `UNKNOWN`.
"""

from __future__ import annotations

import enum
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from tidegate.domain.messages import Instance

STATEFUL_POD_VARIABLE: Final = "TIDEGATE_STATEFUL_POD"
_POD_PREFIX: Final = "pod:"
# The inode of the machine's own process namespace, fixed by the kernel (PROC_PID_INIT_INO).
_MACHINE_PID_NAMESPACE: Final = "pid:[4026531836]"


def boottime_s() -> float:
    """Return seconds since boot, counted on while the process is stopped and while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ProcessIdentity(NamedTuple):
    """What tells this process from every other one, before and after it.

    host: the host name; inside a container also its process namespace, because a pid means nothing outside of it; for a
    pod of a StatefulSet `pod:NAMESPACE/NAME`. boot_id: changes at each boot. pid_started: seconds after that boot.
    """

    host: str
    boot_id: str
    pid: int
    pid_started: float


class Seen(NamedTuple):
    """What the process table says of a pid. `started` is None if there is no such process (or only its zombie)."""

    started: float | None


class Verdict(enum.Enum):
    """What is known about the process of an older registration."""

    DEAD = "dead"
    ALIVE = "alive"
    UNKNOWN = "unknown"


class Judgement(NamedTuple):
    """A verdict and what it rests on, for people and for the ledger."""

    verdict: Verdict
    evidence: str


def this_process() -> ProcessIdentity:
    """Return the identity of the calling process. Reads /proc."""
    pod = os.environ.get(STATEFUL_POD_VARIABLE, "")
    seen = look_at(os.getpid())
    return ProcessIdentity(
        host=f"{_POD_PREFIX}{pod}" if pod else _host_name(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        pid=os.getpid(),
        pid_started=0.0 if seen is None or seen.started is None else seen.started,
    )


def _host_name() -> str:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = "pid:[unknown]"
    host = socket.gethostname()
    return host if namespace == _MACHINE_PID_NAMESPACE else f"{host}/{namespace}"


def look_at(pid: int) -> Seen | None:
    """Return what the process table says of a pid, or None if it cannot be known. Never raises.

    A zombie whose other threads have ended too counts as gone: it can run no more code.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return Seen(None)
    except PermissionError:
        pass  # somebody else's process: it exists
    try:
        # The command name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, thread_count, start_ticks = fields[0], int(fields[17]), int(fields[19])
    if state in "ZX" and thread_count <= 1:
        return Seen(None)
    return Seen(start_ticks / os.sysconf("SC_CLK_TCK"))


def judge(older: Instance, me: ProcessIdentity, look: Callable[[int], Seen | None] = look_at) -> Judgement:
    """Say what became of the process that wrote `older`, an earlier record of our own instance id.

    Proof is: same host and boot, and that pid is gone or belongs to a process with another start time; or the same pod
    of a StatefulSet, an identity that Kubernetes gives to one process at a time.
    """
    same_boot = older.host == me.host and older.boot_id == me.boot_id
    seen = look(older.pid) if same_boot else None
    if seen is not None and seen.started == older.pid_started:
        if older.pid == me.pid:
            return Judgement(Verdict.UNKNOWN, "it was registered by this very process")
        return Judgement(Verdict.ALIVE, f"pid {older.pid} of {older.host} is running")
    if me.host.startswith(_POD_PREFIX) and older.host == me.host:
        return Judgement(Verdict.DEAD, f"{me.host} belongs to pid {me.pid} of boot {me.boot_id} now")
    if seen is None:
        return Judgement(
            Verdict.UNKNOWN, f"pid {older.pid} of {older.host}, boot {older.boot_id}, cannot be seen from here"
        )
    found = "is gone" if seen.started is None else f"started at {seen.started:.2f}, not {older.pid_started:.2f}"
    return Judgement(Verdict.DEAD, f"pid {older.pid} {found} (host {older.host}, boot {older.boot_id})")
