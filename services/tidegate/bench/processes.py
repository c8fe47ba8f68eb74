"""What processes cost: processor seconds and the most memory they held."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, NamedTuple, Self

import psutil

SAMPLE_EVERY_S: Final = 0.25
MIB: Final = 1024 * 1024


class Cost(NamedTuple):
    """Processor seconds (user and system) while it was metered, and the largest resident set seen, in MiB."""

    cpu_s: float
    peak_rss_mib: float


class Meter:
    """Looks at processes from time to time while it is entered; their costs are complete when it is left.

    pids: the present pid of each process by name, None for one that does not run. A process that is restarted meanwhile
    counts under its name with all its lives; of one that was killed the time since the last look is not seen.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int | None]]) -> None:
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="meter", daemon=True)
        self._known: dict[int, psutil.Process] = {}
        self._names: dict[int, str] = {}
        self._began_cpu_s: dict[int, float] = {}
        self._cpu_s: dict[int, float] = {}
        self._peak_rss: dict[str, int] = {}
        self._is_first = True

    def __enter__(self) -> Self:
        self._look()
        self._is_first = False
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def costs(self) -> dict[str, Cost]:
        """Return the cost of each process by name."""
        cpu_s: dict[str, float] = {}
        for pid, name in self._names.items():
            cpu_s[name] = cpu_s.get(name, 0.0) + self._cpu_s[pid] - self._began_cpu_s[pid]
        return {name: Cost(round(cpu_s[name], 2), round(self._peak_rss[name] / MIB, 1)) for name in sorted(cpu_s)}

    def resident_mib(self) -> dict[str, float]:
        """Return what each process holds in memory now, in MiB."""
        found = {}
        for name, pid in self._pids().items():
            try:
                found[name] = round(psutil.Process(pid).memory_info().rss / MIB, 1) if pid is not None else 0.0
            except psutil.Error:
                continue
        return found

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._look()

    def _look(self) -> None:
        for name, pid in self._pids().items():
            if pid is None:
                continue
            try:
                self._note(name, pid)
            except psutil.Error:  # it ended between the two looks
                continue

    def _note(self, name: str, pid: int) -> None:
        process = self._known.get(pid)
        if process is None:
            process = self._known[pid] = psutil.Process(pid)
        with process.oneshot():
            times, rss = process.cpu_times(), process.memory_info().rss
        used_s = times.user + times.system
        if pid not in self._names:
            self._names[pid] = name
            # What begins while we look has cost what it has cost; what was there before had a life before.
            self._began_cpu_s[pid] = used_s if self._is_first else 0.0
        self._cpu_s[pid] = used_s
        self._peak_rss[name] = max(rss, self._peak_rss.get(name, 0))
