"""Become another program that the kernel kills when our parent is gone.

Run as a script in the child, between fork and exec: `python -I -S tether.py [--idle] PARENT_PID PROGRAM ARGS...`.
It imports next to nothing, so that it costs some 20 ms, and nothing of ours.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask for SIGKILL when the thread that created this process ends, and end now if the parent is gone already.

    The wish survives exec. Elsewhere than on Linux there is no such thing: there the children of a killed parent stay.
    """
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - needed nowhere else

        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(1)


def main(arguments: list[str]) -> None:
    if arguments[0] == "--idle":
        arguments = arguments[1:]
        if sys.platform == "linux":
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        os.nice(19)
    parent_pid, program = int(arguments[0]), arguments[1:]
    die_with_parent(parent_pid)
    # Python ignores these, and what is ignored stays so across exec.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(program[0], program)  # noqa: S606 - the very purpose: no shell
    except OSError as error:
        sys.stderr.write(f"cannot run {program[0]}: {error}\n")
        raise SystemExit(127) from error


if __name__ == "__main__":
    main(sys.argv[1:])
