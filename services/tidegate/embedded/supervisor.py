"""Keeps the services of one machine running as operating system processes: `tidegate dev`, tests and benchmarks."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tidegate.embedded.children import Child, spawn

State = Literal["starting", "running", "restarting", "crash-looping", "exited", "stopped"]

READY_POLL_S = 0.02
HEALTHY_AFTER_S = 3.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
QUICK_DEATHS_OF_A_LOOP = 3
LAST_LOG_LINES = 10
LAST_LOG_BYTES = 16 * 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to keep running.

    `env` is merged over our own environment. `ready` says whether it can do its work yet; it is asked often, from any
    thread, and must not block; what it raises counts as no. Without it a process is ready when it runs. With `restart`
    it is started again however it ended.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    ready: Callable[[], bool] | None = None
    restart: bool = True


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What a person wants to know of a process. `last_exit` is as in `subprocess`: negative for a signal."""

    name: str
    pid: int | None
    state: State
    restarts: int
    uptime_s: float
    last_exit: int | None
    log_path: Path
    last_lines: tuple[str, ...] = ()


class Supervisor:
    """Runs processes and starts again those that end.

    They die with us (SIGKILL) however we end, and Ctrl-C in our terminal does not reach them: `stop` ends them. Each
    writes to `log_dir/NAME.log`; the file of the previous supervisor is kept as `NAME.log.1`. What a process left
    running in its session is killed when it ends, so that its successor is alone.

    All methods may be called from any thread; `on_progress` is called from several. One that was stopped stays so.
    """

    def __init__(
        self, specs: Sequence[ProcessSpec], log_dir: Path, *, on_progress: Callable[[str], None] = _log.info
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"two processes have the same name: {', '.join(names)}")
        self._log_dir = log_dir
        self._on_progress = on_progress
        self._keepers = {spec.name: self._keeper(spec) for spec in specs}

    def _keeper(self, spec: ProcessSpec) -> _Keeper:
        return _Keeper(spec, self._log_dir / f"{spec.name}.log", self._on_progress)

    def start(self) -> None:
        """Start all processes, in order and without waiting until they are ready. Raises OSError."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            for keeper in self._keepers.values():
                keeper.start()
        except BaseException:
            self.stop(grace_s=0)
            raise

    def wait_ready(self, timeout_s: float) -> bool:
        """Block until all processes are ready, or until the time is over. Says which of the two."""
        deadline = time.monotonic() + timeout_s
        while not all(keeper.is_ready() for keeper in self._keepers.values()):
            if time.monotonic() > deadline:
                return False
            time.sleep(READY_POLL_S)
        return True

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM to all in reverse order; SIGKILL to those that are left after `grace_s`. Blocks until all are gone.

        Idempotent.
        """
        deadline = time.monotonic() + grace_s
        keepers = list(reversed(self._keepers.values()))
        for keeper in keepers:
            keeper.ask_to_stop()
        for keeper in keepers:
            keeper.finish(max(0.0, deadline - time.monotonic()))

    def add(self, spec: ProcessSpec) -> None:
        """Start one more process, in place of a stopped one of its name. Raises ValueError if that runs, OSError."""
        there = self._keepers.get(spec.name)
        if there is not None and there.status().state != "stopped":
            raise ValueError(f"there is a process named {spec.name}")
        keepers = dict(self._keepers)  # others may be looking at the old one
        keepers[spec.name] = keeper = self._keeper(spec)
        keeper.start()
        self._keepers = keepers

    def remove(self, name: str, grace_s: float = 10.0) -> None:
        """End one process for good: SIGTERM, and SIGKILL after `grace_s`; 0 kills it at once. Blocks until it is gone.

        Raises KeyError for an unknown name.
        """
        keeper = self._keepers[name]
        keeper.ask_to_stop(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        keeper.finish(grace_s)
        self._keepers = {other: kept for other, kept in self._keepers.items() if other != name}

    def terminate(self, name: str) -> int | None:
        """SIGTERM to one process, as a rolling restart would; it is started again if its spec says so.

        Returns the pid, or None if it was not running. Does not block. Raises KeyError for an unknown name.
        """
        return self._keepers[name].terminate()

    def kill(self, name: str) -> int | None:
        """SIGKILL to one process, as a crash would end it; it is started again at once if its spec says so.

        Returns the pid, or None if it was not running. Does not block. Raises KeyError for an unknown name.
        """
        return self._keepers[name].kill()

    def status(self) -> list[ProcessStatus]:
        """How all processes are, in the order of their specs. Does not block."""
        return [keeper.status() for keeper in self._keepers.values()]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


class _Keeper:
    """One process and the thread that waits for its end: no polling, so a successor starts within milliseconds."""

    def __init__(self, spec: ProcessSpec, log_path: Path, on_progress: Callable[[str], None]) -> None:
        self._spec = spec
        self._log_path = log_path
        self._on_progress = on_progress
        self._thread: threading.Thread | None = None
        # Guards what follows; never held while something blocks.
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._child: Child | None = None
        self._started_at = 0.0
        self._was_ready = False
        self._killed_by_us = False
        self._starts = 0
        self._quick_deaths = 0
        self._last_exit: int | None = None

    def start(self) -> None:
        if self._thread is not None:
            raise RuntimeError(f"{self._spec.name} was started already")
        if self._log_path.exists():
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        child = self._launch()
        self._thread = threading.Thread(target=self._keep, args=(child,), name=f"keeper-{self._spec.name}", daemon=True)
        self._thread.start()

    def _keep(self, child: Child | None) -> None:
        while child is not None:
            status = self._wait_for_end(child)
            if self._stopping.is_set() or not self._spec.restart:
                return
            self._stopping.wait(self._note_death(status))
            child = self._relaunch()

    def _launch(self) -> Child:
        env = {**os.environ, **(self._spec.env or {})}
        with self._log_path.open("ab") as log:
            child = spawn(self._spec.argv, output=log, env=env)
        with self._guard:
            self._child = child
            self._started_at = time.monotonic()
            self._was_ready = self._killed_by_us = False
            self._starts += 1
        return child

    def _relaunch(self) -> Child | None:
        """Start the successor, again and again if not even that works. None if we are to stop."""
        for failures in itertools.count(1):
            if self._stopping.is_set():
                break
            try:
                child = self._launch()
            except OSError as error:
                self._on_progress(f"{self._spec.name} could not be started: {error}")
                self._stopping.wait(_backoff_s(failures + 1))
                continue
            if self._stopping.is_set():
                # The wish came during the launch and found nobody to tell.
                self._signal(signal.SIGTERM)
            return child
        return None

    def _wait_for_end(self, child: Child) -> int:
        """Block until the process has ended, and end what it left behind."""
        with suppress(ChildProcessError, ProcessLookupError, PermissionError):
            # Look first and reap later: as long as it is not reaped, its pid cannot become that of another group.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            os.killpg(child.pid, signal.SIGKILL)
        with self._guard:
            self._child = None
            self._last_exit = child.wait()
        return self._last_exit

    def _note_death(self, status: int) -> float:
        """Return how long to wait before the next start."""
        with self._guard:
            long_lived = time.monotonic() - self._started_at >= HEALTHY_AFTER_S
            if self._killed_by_us:
                return 0.0
            self._quick_deaths = 1 if long_lived else self._quick_deaths + 1
            deaths = self._quick_deaths
        delay_s = _backoff_s(deaths)
        again = f"again in {delay_s:.1f} s" if delay_s else "starting it again"
        self._on_progress(f"{self._spec.name} ended with {_said_exit(status)}: {again}")
        return delay_s

    def ask_to_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._stopping.set()
        self._signal(number)

    def finish(self, grace_s: float) -> None:
        """Wait for the end that was asked for; force it after `grace_s`."""
        if self._thread is None:
            return
        self._thread.join(grace_s)
        while self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join(0.1)

    def kill(self) -> int | None:
        return self._end_child(signal.SIGKILL)

    def terminate(self) -> int | None:
        return self._end_child(signal.SIGTERM)

    def _end_child(self, number: signal.Signals) -> int | None:
        """End this life of the process, so that the next one begins at once."""
        with self._guard:
            self._killed_by_us = self._child is not None
        return self._signal(number)

    def _signal(self, number: signal.Signals) -> int | None:
        with self._guard:
            if self._child is None:
                return None
            os.kill(self._child.pid, number)  # it is not reaped yet, so the pid is still its own
            return self._child.pid

    def is_ready(self) -> bool:
        with self._guard:
            child, was_ready = self._child, self._was_ready
        if child is None:
            return False
        if was_ready or self._spec.ready is None:
            return True
        try:
            ready = self._spec.ready()
        except Exception:
            # Not up yet, in whatever way that shows.
            return False
        with self._guard:
            if self._child is child:
                self._was_ready = ready
        return ready

    def status(self) -> ProcessStatus:
        ready = self.is_ready()
        with self._guard:
            running = self._child is not None
            state = self._state(ready=ready)
            return ProcessStatus(
                name=self._spec.name,
                pid=self._child.pid if self._child is not None else None,
                state=state,
                restarts=max(0, self._starts - 1),
                uptime_s=time.monotonic() - self._started_at if running else 0.0,
                last_exit=self._last_exit,
                log_path=self._log_path,
                last_lines=_last_lines(self._log_path) if state in ("crash-looping", "exited") else (),
            )

    def _state(self, *, ready: bool) -> State:
        running = self._child is not None
        recently = time.monotonic() - self._started_at < HEALTHY_AFTER_S
        if self._quick_deaths >= QUICK_DEATHS_OF_A_LOOP and not self._stopping.is_set() and (recently or not running):
            return "crash-looping"
        if running:
            return "running" if ready else "starting"
        if self._stopping.is_set() or self._starts == 0:
            return "stopped"
        return "restarting" if self._spec.restart else "exited"


def _backoff_s(quick_deaths: int) -> float:
    """None for the first death: a crashed service is missed. Then 0.1, 0.2, 0.4 ... 5 s."""
    if quick_deaths <= 1:
        return 0.0
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(quick_deaths - 2, 10))


def _said_exit(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _last_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_LOG_BYTES))
            return tuple(file.read(LAST_LOG_BYTES).decode(errors="replace").splitlines()[-LAST_LOG_LINES:])
    except OSError:
        return ()
