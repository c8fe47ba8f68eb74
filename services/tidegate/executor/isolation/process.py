"""Functions in processes of their own: one process for one attempt, which ends with it.

The two talk over a pair of sockets that nobody else holds, so what the function prints is in nobody's way:

1. we send the errand        it limits its memory, loads the app, binds the arguments
2. it says Ready             we look at the lease one last time
3. we say GO                 it enters the function, and says what that reports to have cost whenever it does
4. it says Ended             we kill its process group, so nothing that the function started runs on

It dies with us at any point: by the kernel (see `tidegate.embedded.tether`), and before GO by the end of the conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

from tidegate.embedded.children import tethered
from tidegate.executor import results
from tidegate.executor.endings import Ending, died, not_started
from tidegate.executor.isolation.errand import Ended, Errand, Line, Reported, line_in, to_line
from tidegate.sdk.functions import Settings

RUNNER: Final = "tidegate.executor.isolation.runner"
GO: Final = b"go\n"
LAST_LINES_S: Final = 1.0  # for what a process said before it ended
NOT_FOR_FUNCTIONS: Final = ("TIDEGATE_KAFKA_", "TIDEGATE_CLICKHOUSE_")


class _SilenceError(RuntimeError):
    """The process has ended, or says what makes no sense: nothing more will come."""


class Processes:
    """Runs functions in child processes. `start_s`: how long one may take until its function can be entered."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s

    async def run(
        self, errand: Errand, _settings: Settings, *, enter: Callable[[], None], reported: Callable[[Reported], None]
    ) -> Ended:
        """See `Isolation.run`."""
        return await run_in_process(errand, start_s=self._start_s, enter=enter, reported=reported)


async def run_in_process(
    errand: Errand, *, start_s: float, enter: Callable[[], None], reported: Callable[[Reported], None]
) -> Ended:
    """Run a function in a process of its own; see `Isolation.run`. Call it on the main thread's loop."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = tethered([sys.executable, "-m", RUNNER, str(theirs.fileno())])
        process = await asyncio.create_subprocess_exec(
            *program,
            stdin=asyncio.subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_FUNCTIONS)},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        try:
            theirs.close()
            reader, writer = await asyncio.open_connection(sock=ours, limit=errand.line_max_bytes)
            listening = asyncio.ensure_future(_hang_up_after(process, writer))
            try:
                return await _Talk(process, reader, writer).hold(errand, start_s, enter, reported)
            finally:
                listening.cancel()
                writer.transport.abort()
        finally:
            _kill(process)
            await process.wait()


class _Talk:
    """The conversation about one errand."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    async def hold(
        self, errand: Errand, start_s: float, enter: Callable[[], None], reported: Callable[[Reported], None]
    ) -> Ended:
        try:
            async with asyncio.timeout(start_s):
                await self._say(to_line(errand))
                first = await self._hear()
        except TimeoutError:
            return Ended(not_started(f"its process was not ready after {start_s:g} s"))
        except _SilenceError as silence:
            return Ended(not_started(f"its process {silence} before the function was entered"))
        if isinstance(first, Ended):
            return first
        enter()
        started_ms = time.time_ns() // 1_000_000
        try:
            async with asyncio.timeout(errand.timeout_ms / 1000):
                await self._say(GO)
                while not isinstance(line := await self._hear(), Ended):
                    if isinstance(line, Reported):
                        reported(line)
                return line
        except TimeoutError:
            ending = Ending(outcome=results.TIMED_OUT)
        except _SilenceError as silence:
            ending = died(f"its process {silence} before the function had answered", idempotent=errand.idempotent)
        return Ended(ending, started_ms, time.time_ns() // 1_000_000)

    async def _say(self, line: bytes) -> None:
        self._writer.write(line)
        try:
            await self._writer.drain()
        except ConnectionError:
            raise _SilenceError(await self._how_it_ended()) from None

    async def _hear(self) -> Line:
        try:
            line = await self._reader.readline()
        except ValueError:
            raise _SilenceError("said more than an answer may hold") from None
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise _SilenceError(await self._how_it_ended())
        try:
            return line_in(line)
        except ValueError:
            raise _SilenceError("said what makes no sense") from None

    async def _how_it_ended(self) -> str:
        try:
            status = await asyncio.wait_for(self._process.wait(), LAST_LINES_S)
        except TimeoutError:
            return "closed its end of the conversation"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"was ended by {name}" + (" (out of memory, perhaps)" if name == "SIGKILL" else "")


async def _hang_up_after(process: asyncio.subprocess.Process, writer: asyncio.StreamWriter) -> None:
    """End the conversation soon after the process has ended, even if what it left behind holds the line open."""
    await process.wait()
    await asyncio.sleep(LAST_LINES_S)
    writer.transport.abort()


def _kill(process: asyncio.subprocess.Process) -> None:
    # Its group outlives it if it has left something behind; its number is not given to others as long as the group lives.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
