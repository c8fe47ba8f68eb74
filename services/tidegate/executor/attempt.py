"""One attempt: entering a function, its deadline, its cancellation, and what is said about it in the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import datetime
import inspect
import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from tidegate.domain import canonical
from tidegate.domain.messages import Call, StepResult, StepTask
from tidegate.executor import results
from tidegate.failpoints import failpoint
from tidegate.sdk import json_form
from tidegate.sdk.app import Function
from tidegate.sdk.binding import AGENT, STEP, Bound
from tidegate.sdk.context import Meter, StepContext, answer_for
from tidegate.sdk.errors import BadArgumentsError, NonRetryable, NotJsonError
from tidegate.sdk.plan import Goto, plan_of

ISOLATIONS: Final = frozenset(("",))  # how functions can be run here; empty: in this process
CANCEL_GRACE_S: Final = 5.0  # how long an async function may clean up after its deadline before the answer is given

_log = structlog.get_logger()


class LeaseLapsedError(RuntimeError):
    """The lease was not held at the very moment of entering: the function was not entered."""


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
    ) -> None:
        self.task = task
        self.is_stuck = False  # the answer is given, the function goes on
        self.deadline_s = time.monotonic() + call.timeout_ms / 1000
        self._call = call
        self._lease_held = lease_held
        self._output_max_bytes = output_max_bytes
        self._answer = answer
        self._release = release
        self._meter = Meter()
        self._started_ms = 0
        self._future: asyncio.Future[StepResult] | None = None
        self._timer: asyncio.TimerHandle | None = None
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
            bound = self._bind(function)
        except Exception as error:  # a validator of the user's may raise anything
            self._end(self._from_error(error))
            return
        assert function is not None  # noqa: S101 - an unknown function cannot be bound to
        self._is_async = function.is_async
        if self._is_async:
            self._future = loop.create_task(self._run_async(function, bound))
        else:
            in_context = contextvars.copy_context().run
            self._future = loop.run_in_executor(threads, in_context, self._run_sync, function, bound)
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

    def _bind(self, function: Function | None) -> Bound:
        if function is None or function.kind != self._call.kind:
            raise UnknownFunctionError(f"this executor has no {self._call.kind} {self._call.function!r}")
        if self.task.isolation not in ISOLATIONS:
            raise UnsupportedIsolationError(
                f"a policy demands isolation {self.task.isolation!r}, which this executor does not have: it was not run"
            )
        return function.binder.bind(self._call.arguments)

    async def _run_async(self, function: Function, bound: Bound) -> StepResult:
        try:
            self._introduce()
            self._enter()
            return self._success(await function.call(*bound.args, **bound.kwargs))
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
            return self._success(function.call(*bound.args, **bound.kwargs))
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
        timeout = datetime.timedelta(milliseconds=self._call.timeout_ms)
        context = StepContext(
            run_id=task.run_id,
            step_id=task.step_id,
            attempt=task.attempt,
            account=task.account,
            function=self._call.function,
            idempotency_key=task.idempotency_key,
            deadline=datetime.datetime.now(datetime.UTC) + timeout,
        )
        answer_for(context, self._meter)

    def _success(self, value: Any) -> StepResult:
        self._returned = True
        failpoint("executor.after-function")
        if inspect.isawaitable(value):
            raise NotJsonError("output: an awaitable; declare the function with `async def`")
        goto = ""
        if self._call.kind == AGENT:
            plan = plan_of(value)
            if plan.cost_micros is not None:
                self._meter.add_cost(plan.cost_micros)
            self._meter.add_usage(plan.usage)
            text = canonical.dumps(plan.to_json())
        else:
            if isinstance(value, Goto) and self._call.kind == STEP:
                goto, value = value.node, value.output
            text = json_form.to_text(value)
        size = len(text.encode())
        if size > self._output_max_bytes:
            raise OutputTooLargeError(
                f"the output has {size} bytes as JSON, at most {self._output_max_bytes} are taken "
                "(TIDEGATE_EXECUTOR_OUTPUT_MAX_BYTES); keep it elsewhere and return where"
            )
        return results.succeeded(self.task, text, self._spent(), goto)

    def _from_error(self, error: BaseException) -> StepResult:
        """Return the failure that an exception means. Once the function has returned, repeating it cannot help."""
        error_class = _ERROR_CLASSES.get(type(error), type(error).__name__)
        retryable = not (self._returned or isinstance(error, (NonRetryable, *_ERROR_CLASSES)))
        message = _message_of(error)
        _log.warning(
            "attempt failed",
            run_id=self.task.run_id,
            step_id=self.task.step_id,
            attempt=self.task.attempt,
            function=self._call.function,
            error_class=error_class,
            error=message,
            exc_info=error if retryable else None,
        )
        if isinstance(error, LeaseLapsedError):
            self._aborted = self._answered = True
        return results.failed(self.task, error_class, message, retryable=retryable, spent=self._spent())

    def _spent(self) -> results.Spent:
        finished_ms = _now_ms() if self._started_ms else 0
        return results.Spent(self._meter.cost_micros, self._meter.usage, self._started_ms, finished_ms)

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
        self._give(results.timed_out(self.task, self._call.timeout_ms / 1000, self._spent()))

    def _on_done(self, future: asyncio.Future[StepResult]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        result = None if future.cancelled() else future.result()
        if result is None or (self._is_async and result.outcome == results.FAILED and not self._returned):
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


class UnknownFunctionError(LookupError):
    """The app has no function of that kind and name."""


class UnsupportedIsolationError(RuntimeError):
    """A policy demands that the function be run in a way that this executor does not know."""


class OutputTooLargeError(ValueError):
    """What the function returned is larger than what a result may hold."""


# What repeating cannot mend. The names are part of the results, and so of the log.
_ERROR_CLASSES: Final[dict[type[BaseException], str]] = {
    UnknownFunctionError: "UnknownFunction",
    UnsupportedIsolationError: "UnsupportedIsolation",
    BadArgumentsError: "BadArguments",
    NotJsonError: "NotJson",
    canonical.NotJsonError: "NotJson",
    OutputTooLargeError: "OutputTooLarge",
    LeaseLapsedError: "LeaseLapsed",
}


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # an exception that cannot even say what it is
        return f"(its message cannot be read: {type(broken).__name__})"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
