"""Functions that are run in a process of their own, and behave badly there."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tidegate import App, NonRetryable, Propose, context, idempotency_key, report_cost, report_usage

app = App("isolated")


@app.tool(isolation="subprocess")
def who() -> dict[str, Any]:
    """Say where this runs, and make noise."""
    sys.stdout.write("noise on standard output\n")
    os.write(1, b"and more of it\n")
    now = context()
    return {
        "pid": os.getpid(),
        "key": idempotency_key(),
        "run": now.run_id,
        "step": now.step_id,
        "attempt": now.attempt,
        "account": now.account,
        "function": now.function,
        "left_s": now.remaining_s(),
        "kafka": [name for name in os.environ if name.startswith(("TIDEGATE_KAFKA_", "TIDEGATE_ERRAND_"))],
    }


@app.tool(isolation="subprocess", timeout_s=60)
def add(a: int, b: int) -> int:
    report_cost(7)
    report_usage(calls=1)
    return a + b


@app.tool(isolation="subprocess")
def fork(way: str) -> dict[str, Any]:
    """Fork, and have the child come back as a child must not; return which process this is, and how the child ended."""
    pid = os.fork()
    if pid:
        return {"pid": os.getpid(), "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}
    if way == "raises":
        raise OSError("I am the child")
    if way == "exits":
        sys.exit(7)
    return {"pid": os.getpid(), "status": "I am the child"}


@app.step(isolation="subprocess")
async def doubled(text: str) -> str:
    await asyncio.sleep(0)
    return text * 2


@app.tool(isolation="subprocess", idempotent=False)
def refuse(text: str) -> None:
    raise NonRetryable(text)


@app.tool(isolation="subprocess")
def fail(text: str) -> None:
    sys.stdout.write("about to fail\n")
    raise OSError(text)


@app.tool(isolation="subprocess", memory_mib=200)
def eat(mib: int) -> int:
    return len(bytearray(mib * 1024 * 1024))


@app.tool(isolation="subprocess")
def leave(status: int) -> None:
    report_cost(3)
    os._exit(status)


@app.tool(isolation="subprocess")
def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@app.tool(isolation="subprocess")
def sleep_with_child(seconds: float, pids: str) -> None:
    """Sleep, as does a process that this one has started; their numbers are written down before."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    report_cost(11)
    Path(pids).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(seconds)


@app.tool(isolation="subprocess")
def leave_child(pids: str) -> str:
    """Return while a process that holds everything open goes on."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    Path(pids).write_text(str(child.pid))
    return "done"


@app.tool(isolation="subprocess", output_max_bytes=1000)
def talk(characters: int) -> str:
    return "x" * characters


@app.step(isolation="subprocess", output_max_bytes=1000)
def propose(value: Any) -> Propose:
    nodes = {f"b{number}": {"kind": "step", "function": "doubled", "input": "y" * 2500} for number in range(80)}
    return Propose({"nodes": nodes}, output=1)


@app.tool
def here() -> int:
    return os.getpid()


@app.tool(isolation="job", memory_mib=96, cpu_millis=50, image="registry.example/tools:1")
def as_job(text: str) -> str:
    return text
