"""A function that forks, in the process that an executor is: its child is no second executor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.feature("T4")

# One function forks while another is at work on the same loop. Every line says which process wrote it.
EXECUTOR = """
import asyncio, concurrent.futures, json, os, sys, time
import msgspec
from tidegate import App
from tidegate.executor.__main__ import run_to_its_end
from tidegate.executor.attempt import Attempt
from unit.executor.test_taking_tasks import task

way = where = ""
app = App("forks")

def say(what, **more):
    os.write(1, (json.dumps({"case": [way, where], "what": what, "pid": os.getpid(), **more}) + chr(10)).encode())

def fork():
    pid = os.fork()
    say("forked")
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

@app.tool
async def on_loop():
    await asyncio.sleep(0.05)
    if pid := fork():
        await asyncio.sleep(0.2)  # time for a child that is not stopped
        return ended(pid)
    if way == "raises":
        raise OSError("I am the child")
    if way == "exits":
        sys.exit(7)
    if way == "waits":
        await asyncio.get_running_loop().create_future()
    if way == "yields":
        await asyncio.sleep(0)
    return 0

@app.tool
async def in_task():
    async def body():
        if pid := fork():
            return pid
        if way == "exits":
            sys.exit(7)
        return 0
    pid = await asyncio.create_task(body())
    say("after the task")
    await asyncio.sleep(0.2)
    return ended(pid)

@app.tool
def in_thread():
    if pid := fork():
        return ended(pid)
    if way == "raises":
        raise OSError("I am the child")
    if way == "exits":
        sys.exit(7)
    return 0

@app.tool
async def bystander():
    for _ in range(40):
        say("bystander")
        await asyncio.sleep(0.01)

async def main():
    left = set()
    ending = asyncio.Event()

    def release(attempt):
        say("released")
        left.discard(attempt)
        if not left:
            ending.set()

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        for name in ("bystander", where):
            wanted = task()
            call = msgspec.structs.replace(wanted.call, function=name, arguments="{}", timeout_ms=60_000)
            attempt = Attempt(
                wanted,
                call,
                lease_held=lambda: True,
                output_max_bytes=1000,
                answer=lambda attempt, result: say("answer", output=result.output, outcome=result.outcome),
                release=release,
            )
            left.add(attempt)
            attempt.begin(app.functions[name], threads)
        await ending.wait()
    say("end")

for way, where in json.loads(sys.argv[1]):
    run_to_its_end(main())
    say("left")
"""


CASES = [
    ("returns", "on_loop", 1),
    ("raises", "on_loop", 1),
    ("exits", "on_loop", 7),
    ("waits", "on_loop", 1),
    ("yields", "on_loop", 1),
    ("returns", "in_task", 1),
    ("exits", "in_task", 7),
    ("returns", "in_thread", 1),
    ("raises", "in_thread", 1),
    ("exits", "in_thread", 7),
]


@pytest.fixture(scope="module")
def said() -> list[dict[str, Any]]:
    """What all cases have said, one after the other in one process, which takes its time to begin."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", EXECUTOR, json.dumps([[way, where] for way, where, _ in CASES])],
        env={"PYTHONPATH": f"{root / 'services'}:{root / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("came back") == sum(status == 1 for _, _, status in CASES)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("way", "where", "status"), CASES)
def test_a_child_that_a_function_forks_runs_nothing_else_of_the_executor(
    said: list[dict[str, Any]], way: str, where: str, status: int
) -> None:
    lines = [line for line in said if line["case"] == [way, where]]
    (parent,) = {line["pid"] for line in lines if line["what"] == "left"}
    (child,) = {line["pid"] for line in lines} - {parent}
    assert [line["what"] for line in lines if line["pid"] == child] == ["forked"]
    answers = [line["output"] for line in lines if line["what"] == "answer"]
    assert sorted(answers) == sorted([str(status), "null"])
