"""Where a function runs that does not run in its executor: `python -m tidegate.executor.isolation.runner`.

With the number of a socket it is the process of one function (`process.py`); with `--job` it is the main process of a Job,
which runs the function in a process of its own in turn, and says how it ended on standard output (`job_log.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import structlog

from tidegate.executor import endings
from tidegate.executor.endings import UnknownFunctionError
from tidegate.executor.forks import ChildrenEndHere
from tidegate.executor.isolation import job_log
from tidegate.executor.isolation.errand import (
    Ended,
    Errand,
    Line,
    Ready,
    Reported,
    deadline_after,
    errand_in,
    to_line,
)
from tidegate.executor.isolation.process import GO, run_in_process
from tidegate.process import EXIT_OK, EXIT_USAGE, ProcessSettings, configure_logging
from tidegate.sdk.binding import Bound
from tidegate.sdk.context import Meter, running
from tidegate.sdk.errors import BadArgumentsError
from tidegate.sdk.functions import Function
from tidegate.sdk.loading import load_app

_MIB: Final = 1024 * 1024

Say = Callable[[Line], None]


class _ToldMeter(Meter):
    """A meter that says what it holds whenever that changes."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def add_cost(self, micros: int) -> None:
        super().add_cost(micros)
        self._tell()

    def add_usage(self, counts: Mapping[str, int]) -> None:
        super().add_usage(counts)
        self._tell()

    def _tell(self) -> None:
        self._say(Reported(self.cost_micros, self.usage))


def run_errand(errand: Errand, say: Say, may_enter: Callable[[], bool]) -> None:
    """Load the app and run the function, in this very process; all that comes of it is said. Blocks."""
    _limit(errand.memory_mib)
    configure_logging("executor", errand.instance_id, ProcessSettings().log_level)
    try:
        function, bound = _bound(errand)
    except (BadArgumentsError, UnknownFunctionError) as error:
        say(Ended(endings.raised(error, has_returned=False)))
        return
    except BaseException as error:  # the app's module may raise anything, and exit
        say(Ended(endings.not_started(f"the app cannot be loaded: {type(error).__name__}: {error}")))
        return
    say(Ready())
    if not may_enter():
        return
    meter = _ToldMeter(say)
    named = {"run_id": errand.context.run_id, "step_id": errand.context.step_id, "attempt": errand.context.attempt}
    context = replace(errand.context, deadline=deadline_after(errand.timeout_ms))
    started_ms = _now_ms()
    has_returned = False
    try:
        with running(context, meter), structlog.contextvars.bound_contextvars(**named):
            with ChildrenEndHere():
                value = _called(function, bound)
            has_returned = True
            ending = endings.returned(errand.kind, value, meter, errand.output_max_bytes)
    except BaseException as error:  # whatever it raises, SystemExit included, is its failure
        ending = endings.raised(error, has_returned=has_returned)
    _flush()  # with the answer this process ends
    say(Ended(ending, started_ms, _now_ms()))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whatever the function has done to them
            stream.flush()


def _bound(errand: Errand) -> tuple[Function, Bound]:
    function = load_app(errand.app).functions.get(errand.function)
    if function is None or function.kind != errand.kind:
        raise UnknownFunctionError(f"the app has no {errand.kind} {errand.function!r} in this image")
    return function, function.binder.bind(errand.arguments)


def _called(function: Function, bound: Bound) -> Any:
    if not function.is_async:
        return function.call(*bound.args, **bound.kwargs)

    async def call() -> Any:
        return await function.call(*bound.args, **bound.kwargs)

    return asyncio.run(call())


def _limit(memory_mib: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is in its memory is nobody's business
    if memory_mib:
        # Data, not address space: what is only mapped or set aside, as by threads and allocators, uses no memory.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_mib * _MIB, memory_mib * _MIB))


def run_process(number: int) -> int:
    """Be the process of one function, whose errand comes over the socket of that number."""
    line = socket.socket(fileno=number)
    line.set_inheritable(False)
    talk = line.makefile("rwb")
    speaking = threading.Lock()

    def say(what: Line) -> None:
        with speaking:
            talk.write(to_line(what))
            talk.flush()

    errand = talk.readline()
    if errand.endswith(b"\n"):
        run_errand(errand_in(errand), say, lambda: talk.readline() == GO)
    os._exit(EXIT_OK)  # threads that the function has left behind are not waited for


def run_job() -> int:
    """Be the main process of a Job: its errand is in the environment, and how it ended goes to standard output."""
    errand, name = job_log.errand_from(os.environ)
    # From here on standard output is ours alone: what the function prints goes to standard error.
    ours = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    voice = job_log.Voice(name, ours.write)
    start_s = errand.enter_before_ms / 1000 - time.time()

    def enter() -> None:
        if _now_ms() > errand.enter_before_ms:
            raise TimeoutError

    try:
        ended = asyncio.run(run_in_process(errand, start_s=max(0.0, start_s), enter=enter, reported=voice.say))
    except TimeoutError:
        ended = Ended(endings.not_started("it could only have been entered after the executor had given it up"))
    voice.say(ended)
    return EXIT_OK


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main(arguments: list[str]) -> int:
    """Run one errand and return the exit code."""
    if arguments == ["--job"]:
        return run_job()
    if len(arguments) == 1 and arguments[0].isdigit():
        return run_process(int(arguments[0]))
    sys.stderr.write(f"{__doc__}\n")
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
