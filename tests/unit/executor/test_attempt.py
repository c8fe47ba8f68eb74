"""One attempt: what it was given up for must not be entered any more."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import msgspec
import pytest

from tidegate import App
from tidegate.domain.messages import StepResult
from tidegate.executor.attempt import Attempt
from unit.executor.test_taking_tasks import task


@pytest.mark.feature("D1")
@pytest.mark.parametrize("gives_up", [False, True])
def test_a_function_that_waits_for_a_thread_is_not_entered_after_its_attempt_was_given_up(gives_up: bool) -> None:
    """After a farewell the gate may have given the attempt to another executor, although our lease would still hold."""
    app = App("entered")
    entered: list[int] = []

    @app.tool
    def f() -> int:
        entered.append(1)
        return 1

    async def main() -> None:
        thread_is_free = threading.Event()
        released = asyncio.Event()
        wanted = task()
        assert wanted.call is not None
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            threads.submit(thread_is_free.wait)
            attempt = Attempt(
                wanted,
                wanted.call,
                lease_held=lambda: True,
                output_max_bytes=1000,
                answer=lambda attempt, result: None,
                release=lambda attempt: released.set(),
            )
            attempt.begin(app.functions["f"], threads)
            if gives_up:
                attempt.abort()
            thread_is_free.set()
            await released.wait()

    asyncio.run(main())
    assert entered == ([] if gives_up else [1])


@pytest.mark.feature("P1")
def test_an_isolation_that_nobody_here_can_give_is_refused_and_the_function_not_entered() -> None:
    app = App("isolated")
    entered: list[int] = []
    answers: list[StepResult] = []

    @app.tool
    async def f() -> None:
        entered.append(1)

    async def main() -> None:
        wanted = msgspec.structs.replace(task(), isolation="job")
        assert wanted.call is not None
        attempt = Attempt(
            wanted,
            wanted.call,
            lease_held=lambda: True,
            output_max_bytes=1000,
            answer=lambda attempt, result: answers.append(result),
            release=lambda attempt: None,
        )
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            attempt.begin(app.functions["f"], threads)

    asyncio.run(main())
    assert entered == []
    assert [(r.outcome, r.error_class, r.retryable) for r in answers] == [("failed", "UnsupportedIsolation", False)]
