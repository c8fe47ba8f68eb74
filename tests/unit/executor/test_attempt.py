"""One attempt: what it was given up for must not be entered any more."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import msgspec
import pytest

from tidegate import App
from tidegate.domain.messages import StepResult
from tidegate.executor.__main__ import run_to_its_end
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


class UnaskableError(Exception):
    """As of a client whose exceptions look into a response that they may not have."""

    @property
    def retry_after_s(self) -> float:
        raise RuntimeError("there is no response")


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class _Nameless(type):
    @property
    def __name__(cls) -> NoReturn:  # type: ignore[override]  # it is nonsense, and possible
        raise LookupError("a class without a name")


class NamelessError(Exception, metaclass=_Nameless):
    pass


async def _answered(app: App, function: str) -> list[StepResult]:
    """Run an attempt until its slot is free; returns its answers."""
    wanted, answers, released = task(), list[StepResult](), asyncio.Event()
    assert wanted.call is not None
    call = msgspec.structs.replace(wanted.call, timeout_ms=60_000)  # writing down what was raised takes its time
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        attempt = Attempt(
            wanted,
            call,
            lease_held=lambda: True,
            output_max_bytes=1000,
            answer=lambda attempt, result: answers.append(result),
            release=lambda attempt: released.set(),
        )
        attempt.begin(app.functions[function], threads)
        await asyncio.wait_for(released.wait(), 60)
    return answers


@pytest.mark.feature("D2")
@pytest.mark.parametrize("name", ["UnaskableError", "UnspeakableError", "NamelessError"])
@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_that_cannot_be_asked_what_it_is_is_a_failure_like_any_other(name: str, is_async: bool) -> None:
    """Unanswered, its attempt would be listed as running, and its slot be taken, as long as the executor lives."""
    app, error = App("odd"), globals()[name]

    async def on_loop() -> None:
        raise error("odd")

    def in_thread() -> None:
        raise error("odd")

    f: Callable[[], Any] = on_loop if is_async else in_thread
    app.tool(f)
    (answer,) = run_to_its_end(_answered(app, f.__name__))
    assert (answer.outcome, answer.error_class, answer.retryable) == ("failed", name, True)
    assert answer.retry_after_ms == 0


@pytest.mark.feature("D2")
@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("is_awaited", [False, True])
def test_what_a_functions_own_task_raises_to_end_the_process_does_not_end_it(
    end: type[BaseException], is_awaited: bool
) -> None:
    """The loop passes these two on to whoever runs it, and with it everything else that runs here would end."""
    app = App("exits")
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as when the executor has its handlers

    @app.tool
    async def f() -> int:
        async def child() -> None:
            raise end

        gone = asyncio.gather(child())
        if is_awaited:
            await gone
        else:
            await asyncio.sleep(0.05)
        return 1

    try:
        (answer,) = run_to_its_end(_answered(app, "f"))
    finally:
        signal.signal(signal.SIGINT, before)
    expected = ("failed", end.__name__) if is_awaited else ("succeeded", "")
    assert (answer.outcome, answer.error_class) == expected


def test_what_the_executor_itself_ends_with_ends_it() -> None:
    async def main() -> int:
        sys.exit(3)

    with pytest.raises(SystemExit, match="3"):
        run_to_its_end(main())


def test_ctrl_c_before_the_executor_has_its_handlers_ends_it() -> None:
    async def main() -> int:
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        await asyncio.sleep(60)
        return 0

    # Whoever starts the tests in the background of a script has the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_to_its_end(main())
    finally:
        signal.signal(signal.SIGINT, before)
