"""What a function logs names its run, step and attempt."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import msgspec
import pytest
import structlog

from tidegate import App
from tidegate.domain.entry import Position
from tidegate.domain.messages import Call, StepTask
from tidegate.executor.attempt import Attempt

app = App("logs")
seen: list[dict[str, Any]] = []


@app.tool()
def in_a_thread() -> None:
    seen.append(structlog.contextvars.get_contextvars())


@app.tool()
async def on_the_loop() -> None:
    seen.append(structlog.contextvars.get_contextvars())


CALL = Call(kind="tool", function="", queue="q", arguments="{}", timeout_ms=5000, reserve_micros=0, idempotent=True)


@pytest.mark.feature("O5")
@pytest.mark.parametrize("name", ["in_a_thread", "on_the_loop"])
def test_lines_of_functions_name_the_attempt(name: str) -> None:
    call = msgspec.structs.replace(CALL, function=name)
    task = StepTask(
        type="run",
        run_id="run-1",
        step_id="a/1",
        attempt=2,
        account="acme",
        instance_id="me",
        incarnation=7,
        source=Position(partition=0, offset=1, index=0),
        result_partition=3,
        idempotency_key="k",
        call=call,
    )

    async def run() -> str:
        answered = asyncio.get_running_loop().create_future()
        attempt = Attempt(
            task,
            call,
            lease_held=lambda: True,
            output_max_bytes=1000,
            answer=lambda _, result: answered.set_result(result.outcome),
            release=lambda _: None,
        )
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            attempt.begin(app.functions[name], threads)
            return str(await answered)

    seen.clear()
    assert asyncio.run(run()) == "succeeded"
    assert {key: seen[0][key] for key in ("run_id", "step_id", "attempt")} == {
        "run_id": "run-1",
        "step_id": "a/1",
        "attempt": 2,
    }
    assert "run_id" not in structlog.contextvars.get_contextvars()
