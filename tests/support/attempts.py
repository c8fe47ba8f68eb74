"""One attempt of a function, as an executor runs it, without a broker."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import msgspec

from tidegate import App
from tidegate.domain.messages import StepResult
from tidegate.executor.attempt import Attempt
from tidegate.executor.isolation import NOWHERE, Apart
from unit.executor.test_taking_tasks import task


def attempted(
    app: App,
    function: str,
    arguments: Any = None,
    *,
    apart: Apart = NOWHERE,
    demanded: str = "",
    timeout_s: float = 60.0,
    idempotent: bool = True,
    lease_held: Callable[[], bool] = lambda: True,
    meanwhile: Callable[[Attempt], Any] | None = None,
) -> list[StepResult]:
    """Run a function to its end and return what was answered: one result, or none. meanwhile: awaited beside it."""
    wanted = task()
    assert wanted.call is not None
    call = msgspec.structs.replace(
        wanted.call,
        kind=app.functions[function].kind,
        function=function,
        arguments=msgspec.json.encode({} if arguments is None else arguments).decode(),
        timeout_ms=round(timeout_s * 1000),
        idempotent=idempotent,
    )
    answers: list[StepResult] = []

    async def main() -> None:
        released = asyncio.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            attempt = Attempt(
                msgspec.structs.replace(wanted, call=call, isolation=demanded),
                call,
                lease_held=lease_held,
                output_max_bytes=100_000,
                answer=lambda _, result: answers.append(result),
                release=lambda _: released.set(),
                apart=apart,
            )
            attempt.begin(app.functions[function], threads)
            if meanwhile is not None:
                await meanwhile(attempt)
            await released.wait()

    asyncio.run(main())
    return answers


async def until(holds: Callable[[], object]) -> None:
    """Wait until something holds that no event tells of: what another process has done, say."""
    while not holds():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.02)
