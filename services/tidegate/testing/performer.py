"""The executor of a rehearsal: enters functions the way executors do, one after the other, and answers their tasks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import canonical
from tidegate.domain.isolation import IN_PROCESS
from tidegate.domain.messages import Call, StepResult, StepTask
from tidegate.executor import results
from tidegate.executor.attempt import Attempt
from tidegate.executor.settings import ExecutorSettings
from tidegate.sdk.binding import FLOW
from tidegate.sdk.functions import Function
from tidegate.testing.stubs import Stub, standing_in

_OUTPUT_MAX_BYTES: Final[int] = ExecutorSettings.model_fields["output_max_bytes"].default


class Performed(NamedTuple):
    """How an attempt ended, and how long it took on the rehearsal's clock. result: None if its executor died with it."""

    result: StepResult | None
    took_ms: int


class Performer:
    """Functions run on a loop, and in threads, of their own, as they do in an executor. `perform` blocks until one ended."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._threads = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="rehearsal")
        self._thread = threading.Thread(target=self._loop.run_forever, name="rehearsal", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the loop. Idempotent."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._loop.close()

    def perform(
        self, task: StepTask, functions: Mapping[str, Function], stubs: Mapping[str, Stub], now_ms: int
    ) -> Performed:
        """Do a task, with a stand-in if its function has one. Times in the result are those of the rehearsal's clock."""
        call = task.call
        if call is None:
            return Performed(results.failed(task, "BadTask", "the task names no function", retryable=False), 0)
        function, stub = functions.get(call.function), stubs.get(call.function)
        took_ms = 0
        if stub is not None and function is not None:
            arguments = canonical.loads(call.arguments)
            act = stub.called(arguments["input"] if call.kind == FLOW else arguments)
            if act.is_lost:
                return Performed(None, 0)
            took_ms = min(round(act.takes_s * 1000), call.timeout_ms)
            if act.takes_s * 1000 > call.timeout_ms:
                spent = results.Spent(None, {}, now_ms, now_ms + took_ms)
                return Performed(results.timed_out(task, call.timeout_ms / 1000, spent), took_ms)
            function = standing_in(function, act)
        entered = self._entered(msgspec.structs.replace(task, isolation=IN_PROCESS), call, _here(function))
        return Performed(_at(entered, now_ms, took_ms), took_ms)

    def _entered(self, task: StepTask, call: Call, function: Function | None) -> StepResult:
        return asyncio.run_coroutine_threadsafe(self._attempt(task, call, function), self._loop).result()

    async def _attempt(self, task: StepTask, call: Call, function: Function | None) -> StepResult:
        answer: asyncio.Future[StepResult] = self._loop.create_future()

        def answered(_: Any, result: StepResult) -> None:
            answer.set_result(result)

        attempt = Attempt(
            task,
            call,
            lease_held=lambda: True,
            output_max_bytes=_OUTPUT_MAX_BYTES,
            answer=answered,
            release=lambda _: None,
        )
        attempt.begin(function, self._threads)
        return await answer


def _here(function: Function | None) -> Function | None:
    """Return the function without the isolation that it declares: whatever is demanded, a rehearsal runs it in this process."""
    if function is None or function.settings.isolation == IN_PROCESS:
        return function
    made = copy.copy(function)
    made.settings = dataclasses.replace(function.settings, isolation=IN_PROCESS)
    return made


def _at(result: StepResult, now_ms: int, took_ms: int) -> StepResult:
    """Return the result with times of the rehearsal, so that it is the same whenever it is played."""
    if not result.started_ms:
        return result
    return msgspec.structs.replace(result, started_ms=now_ms, finished_ms=now_ms + took_ms)
