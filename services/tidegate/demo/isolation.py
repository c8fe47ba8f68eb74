"""Functions that run apart from their executor, as docs/isolation.md says: to be tried, and tried by tests/e2e on a cluster.

`tidegate executor --app tidegate.demo.isolation:app --queue tools`, with Jobs set up.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

from tidegate import App, context, idempotency_key, report_cost

app = App("isolation", queue="tools")


def _whereabouts() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "key": idempotency_key(), "run": context().run_id}


@app.step(isolation="job", memory_mib=256, cpu_millis=20, timeout_s=60, retries=1)
def as_job() -> dict[str, Any]:
    """Say where it runs: in a pod of its own."""
    report_cost(5)
    return _whereabouts()


@app.step(timeout_s=60, retries=1)
def as_usual() -> dict[str, Any]:
    """Say where it runs: in its executor, unless a policy demands something else."""
    return _whereabouts()


@app.step(isolation="subprocess", timeout_s=60, retries=1)
def in_process() -> dict[str, Any]:
    """Say where it runs: beside its executor."""
    return _whereabouts()


@app.step(isolation="job", memory_mib=256, cpu_millis=20, timeout_s=3, retries=0)
def too_slow() -> None:
    """Be killed by the timeout."""
    sys.stdout.write("I shall not see the end of this\n")
    sys.stdout.flush()
    time.sleep(3600)


@app.step(isolation="job", memory_mib=256, cpu_millis=20, retries=0)
def failing() -> None:
    """Print something and fail."""
    sys.stdout.write("the disk is full\n")
    raise OSError("no space left")


@app.step(isolation="job", memory_mib=160, cpu_millis=20, retries=0)
def too_large() -> int:
    """Use more memory than its Job has."""
    return len(bytearray(1024 * 1024 * 1024))


@app.step(isolation="job", memory_mib=256, cpu_millis=20, timeout_s=600, retries=2)
def until_ended() -> None:
    """Sleep until somebody ends it."""
    time.sleep(3600)


for function in (as_job, as_usual, in_process, too_slow, failing, too_large, until_ended):
    app.graph(function.__name__.replace("_", "-")).chain(function)
