"""`python -m tidegate.bench.profiled FOLDER MODULE ARGS...`: run a service with every thread of it under cProfile.

Processor time is measured, not time on the wall: a thread that waits costs nothing here. One file per thread, written when
the process ends in order: `FOLDER/INSTANCE.THREAD.prof`, for `pstats`. The profiler itself makes a service about twice as
slow, so figures that are measured with it count for nothing.
"""

from __future__ import annotations

import cProfile
import os
import pstats
import runpy
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any, Final

TOP_FUNCTIONS: Final = 20

_profiles: list[tuple[str, cProfile.Profile]] = []


def main() -> None:
    """Run the module named in the arguments; its exit is ours, after the profiles are written."""
    folder, module = Path(sys.argv[1]), sys.argv[2]
    sys.argv = [module, *sys.argv[3:]]
    threading.setprofile(_begin_in_thread)
    _begin("main")
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        _write(folder, os.environ.get("TIDEGATE_INSTANCE_ID", module))


def _begin_in_thread(_frame: Any, _event: str, _argument: Any) -> None:
    """Be called with a new thread's first event; from then on the profiler is called instead."""
    sys.setprofile(None)
    _begin(threading.current_thread().name)


def _begin(name: str) -> None:
    profile = cProfile.Profile(time.thread_time)
    _profiles.append((name, profile))
    profile.enable()


def _write(folder: Path, instance: str) -> None:
    threading.setprofile(None)
    sys.setprofile(None)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, profile) in enumerate(_profiles):
        if profile.getstats():
            safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
            profile.dump_stats(folder / f"{instance}.{number}-{safe}.prof")


def summary(folder: Path) -> str:
    """Return the most expensive functions of each service whose profiles are in the folder, all its threads together."""
    by_instance: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.prof")):
        by_instance.setdefault(path.name.partition(".")[0], []).append(path)
    parts = []
    for instance, paths in by_instance.items():
        text = StringIO()
        stats = pstats.Stats(*[str(path) for path in paths], stream=text)
        stats.sort_stats("tottime").print_stats(TOP_FUNCTIONS)
        parts.append(f"== {instance}: {len(paths)} threads ==\n{text.getvalue().strip()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
