"""One attempt: entering a function, its deadline, its cancellation, and what is said about it in the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import structlog

from tidegate.domain.messages import Call, StepResult, StepTask
from tidegate.executor import endings, results
from tidegate.executor.endings import Ending, LeaseLapsedError, UnknownFunctionError
from tidegate.executor.forks import ChildrenEndHere
from tidegate.executor.holdings import key_of
from tidegate.executor.isolation import NOWHERE, Apart, Isolation
from tidegate.executor.isolation.errand import Ended, context_of, deadline_after, errand_of
from tidegate.failpoints import failpoint
from tidegate.sdk.binding import Bound
from tidegate.sdk.context import Meter, answer_for
from tidegate.sdk.functions import Function

CANCEL_GRACE_S: Final = 5.0  # how long an async function may clean up after its deadline before the answer is given

_log = structlog.get_logger()


class Attempt:
    """Runs one task. All methods belong to the event loop's thread.

    `answer(attempt, result)` is called at most once, `release(attempt)` exactly once: when the function has really ended.
    A sync function cannot be stopped from outside: after its deadline the answer is given, but its slot stays taken until
    it returns.
    """

    def __init__(
        self,
        task: StepTask,
        call: Call,
        *,
        lease_held: Callable[[], bool],
        output_max_bytes: int,
        answer: Callable[[Attempt, StepResult], None],
        release: Callable[[Attempt], None],
        apart: Apart = NOWHERE,
        code_version: str = "",
    ) -> None:
        self.task = task
        self.key = key_of(task)
        self.is_stuck = False  # the answer is given, the function goes on
        self.deadline_s = time.monotonic() + call.timeout_ms / 1000
        self._call = call
        self._lease_held = lease_held
        self._output_max_bytes = output_max_bytes
        self._answer = answer
        self._release = release
        self._apart = apart
        self._code_version = code_version
        self._meter = Meter()
        self._started_ms = 0
        self._finished_ms = 0  # if somebody else knows it
        self._future: asyncio.Future[StepResult] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.apart: asyncio.Future[StepResult] | None = None  # what runs elsewhere, until it is over there
        self._is_async = False
        self._answered = False
        self._expired = False
        self._cancel_wanted = False
        self._aborted = False
        self._returned = False

    def begin(self, function: Function | None, threads: concurrent.futures.Executor) -> None:
        """Bind the arguments and start the function: on the loop if it is async, else in a thread."""
        loop = asyncio.get_running_loop()
        try:
            bound, way = self._bind(function)
        except Exception as error:  # a validator of the user's may raise anything
            self._end(self._from_error(error))
            return
        assert function is not None  # noqa: S101 - an unknown function cannot be bound to
        self._is_async = function.is_async or way is not None
        if way is not None:
            self.apart = self._future = loop.create_task(self._run_apart(way, function))
        elif self._is_async:
            self._future = loop.create_task(self._run_async(function, bound))
        else:
            in_context = contextvars.copy_context().run
            self._future = loop.run_in_executor(threads, in_context, self._run_sync, function, bound)
        if way is None:  # elsewhere time begins when the function is entered
            self._timer = loop.call_later(self._call.timeout_ms / 1000, self._expire)
        self._future.add_done_callback(self._on_done)

    def cancel(self) -> None:
        """Abort the function because its outcome is not wanted any more; a sync one goes on and reports when it ends."""
        self._cancel_wanted = True
        if self._is_async and self._future is not None:
            self._future.cancel()

    def abort(self) -> None:
        """Abort the function without an answer: how far it came is not known, so nobody is told that it failed."""
        self._aborted = self._answered = True
        if self._is_async and self._future is not None:
            self._future.cancel()

    def _bind(self, function: Function | None) -> tuple[Bound, Isolation | None]:
        """Return the arguments, and where the function is to run if not here."""
        if function is None or function.kind != self._call.kind:
            raise UnknownFunctionError(f"this executor has no {self._call.kind} {self._call.function!r}")
        self._output_max_bytes = min(self._output_max_bytes, function.settings.output_max_bytes or sys.maxsize)
        way = self._apart.way(function.settings.isolation, self.task.isolation)
        return function.binder.bind(self._call.arguments), way

    async def _run_apart(self, way: Isolation, function: Function) -> StepResult:
        errand = errand_of(
            self.task, self._call, function.settings, app=self._apart.app, output_max_bytes=self._output_max_bytes
        )
        try:
            self._introduce()
            ended = await way.run(
                errand,
                function.settings,
                enter=self._enter,
                reported=lambda report: self._meter.take_over(report.cost_micros, report.usage),
            )
        except LeaseLapsedError as error:
            return self._from_error(error)
        except Exception as error:
            if not self._started_ms:
                return self._from_error(error)
            why = f"it is not known how it ended: {type(error).__name__}: {error}"
            ended = Ended(endings.died(why, idempotent=self._call.idempotent), self._started_ms)
        if ended.ending.outcome == results.SUCCEEDED:
            self._note_return()
        self._started_ms, self._finished_ms = ended.started_ms, ended.finished_ms
        if not self._returned:
            self._log_failure(ended.ending)
        return self._result(ended.ending)

    async def _run_async(self, function: Function, bound: Bound) -> StepResult:
        try:
            self._introduce()
            self._enter()
            with ChildrenEndHere():
                value = await function.call(*bound.args, **bound.kwargs)
            return self._success(value)
        except asyncio.CancelledError:
            if self._expired or self._cancel_wanted or self._aborted:
                raise
            return self._from_error(RuntimeError("cancelled from within"))
        except BaseException as error:  # whatever it raises, SystemExit included, is its failure and not ours
            return self._from_error(error)

    def _run_sync(self, function: Function, bound: Bound) -> StepResult:
        try:
            self._introduce()
            self._enter()
            with ChildrenEndHere():
                value = function.call(*bound.args, **bound.kwargs)
            return self._success(value)
        except BaseException as error:
            return self._from_error(error)

    def _enter(self) -> None:
        """The last thing before the function: beyond this line it may have an effect."""
        self._started_ms = _now_ms()
        failpoint("executor.before-enter")
        # A function may have waited for a thread until after our farewell, when the gate gives its attempt to another.
        if self._aborted or not self._lease_held():
            raise LeaseLapsedError("the attempt was given up before the function was entered")

    def _introduce(self) -> None:
        """Tell the function what it runs for, and have all that it logs with structlog name its run, step and attempt.

        The context belongs to this attempt alone (its task's, or the copy that its thread runs in), so it ends with it.
        """
        task = self.task
        structlog.contextvars.bind_contextvars(run_id=task.run_id, step_id=task.step_id, attempt=task.attempt)
        # Made when the function asks, which few do; of nothing that refers back to this attempt and its future.
        answer_for(partial(context_of, task, self._call, deadline_after(self._call.timeout_ms)), self._meter)

    def _note_return(self) -> None:
        """The function has had its effect, here or elsewhere, and nobody knows of it yet."""
        self._returned = True
        failpoint("executor.after-function")

    def _success(self, value: Any) -> StepResult:
        self._note_return()
        return self._result(endings.returned(self._call.kind, value, self._meter, self._output_max_bytes))

    def _from_error(self, error: BaseException) -> StepResult:
        """Return the failure that an exception means. Once the function has returned, repeating it cannot help."""
        ending = endings.raised(error, has_returned=self._returned)
        try:
            self._log_failure(ending, error if ending.retryable else None)
        except BaseException:  # what shows it asks it what it is, and so runs somebody's code
            self._log_failure(ending)
        if isinstance(error, LeaseLapsedError):
            self._aborted = self._answered = True
        return self._result(ending)

    def _log_failure(self, ending: Ending, error: BaseException | None = None) -> None:
        shown: Any = error
        if error is not None and len(ending.error_message) >= results.MAX_MESSAGE_CHARACTERS:
            # What lays out tracebacks for a terminal may take minutes for one long message, and the attempt's time with them.
            shown = (type(error), Exception(ending.error_message), error.__traceback__)
        _log.warning(
            "attempt failed",
            run_id=self.task.run_id,
            step_id=self.task.step_id,
            attempt=self.task.attempt,
            function=self._call.function,
            error_class=ending.error_class or ending.outcome,
            error=ending.error_message,
            exc_info=shown,
        )

    def _result(self, ending: Ending) -> StepResult:
        if ending.outcome == results.SUCCEEDED:
            return results.succeeded(self.task, ending.output, self._spent(), ending.goto, ending.change)
        if ending.outcome == results.TIMED_OUT:
            return results.timed_out(self.task, self._call.timeout_ms / 1000, self._spent(), ending.error_message)
        if ending.outcome == results.DIED:
            return results.died(self.task, ending.error_message, retryable=ending.retryable, spent=self._spent())
        return results.failed(
            self.task,
            ending.error_class,
            ending.error_message,
            retryable=ending.retryable,
            spent=self._spent(),
            retry_after_ms=ending.retry_after_ms,
        )

    def _spent(self) -> results.Spent:
        meter = self._meter
        if not self._started_ms:
            return results.Spent(meter.cost_micros, meter.usage, 0, self._finished_ms)
        finished_ms = self._finished_ms or _now_ms()
        return results.Spent(meter.cost_micros, meter.usage, self._started_ms, finished_ms, self._code_version)

    def _expire(self) -> None:
        self._expired = True
        if self._is_async and self._future is not None:
            self._future.cancel()
            self._timer = asyncio.get_running_loop().call_later(CANCEL_GRACE_S, self._give_answer_timed_out)
        else:
            self._give_answer_timed_out()

    def _give_answer_timed_out(self) -> None:
        _log.warning(
            "attempt timed out and goes on, its slot stays taken",
            run_id=self.task.run_id,
            step_id=self.task.step_id,
            attempt=self.task.attempt,
            function=self._call.function,
        )
        self.is_stuck = not self._answered
        self._give(results.timed_out(self.task, self._call.timeout_ms / 1000, self._spent(), "it may still be running"))

    def _on_done(self, future: asyncio.Future[StepResult]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        result = None if future.cancelled() else future.result()
        may_be_aborted = self._is_async and not self._returned
        if result is None or (may_be_aborted and result.outcome in (results.FAILED, results.DIED)):
            # However an aborted function ends, with an exception of its own for instance: it was aborted.
            if self._cancel_wanted:
                result = results.cancelled(self.task, self._spent())
            elif self._expired or result is None:
                result = results.timed_out(self.task, self._call.timeout_ms / 1000, self._spent())
        self._end(result)

    def _end(self, result: StepResult) -> None:
        # First the slot, then the answer: who reads the answer may send the next task.
        self._release(self)
        self._give(result)

    def _give(self, result: StepResult) -> None:
        if not self._answered:
            self._answered = True
            self._answer(self, result)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
