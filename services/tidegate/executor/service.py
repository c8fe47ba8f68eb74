"""The executor: registers, takes what is addressed to it, runs it, answers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Final

import structlog
from prometheus_client import Counter, Histogram

from tidegate import metrics
from tidegate.domain.messages import StepResult, StepTask
from tidegate.eventlog.interface import Broker
from tidegate.executor import results
from tidegate.executor.attempt import Attempt
from tidegate.executor.decide import Verdict
from tidegate.executor.feed import TaskFeed
from tidegate.executor.holdings import AttemptKey, Holdings, key_of
from tidegate.executor.isolation import NOWHERE, Apart
from tidegate.executor.sender import ResultSender
from tidegate.executor.settings import ExecutorSettings
from tidegate.executor.watchdog import Watchdog, overdue_s
from tidegate.failpoints import failpoint
from tidegate.registry import Registration, boottime_s
from tidegate.registry import TaskFeed as RegisteredFeed
from tidegate.registry.listing import bounded
from tidegate.sdk.app import App, details_of, functions_of

EXIT_DRAINED: Final = 0
EXIT_LEASE_LAPSED: Final = 70
EXIT_LOOP_HUNG: Final = 71
EXIT_LOG_FAILED: Final = 74

RELEASE_LINGER_S: Final = 0.3  # how long tasks that were already under way when draining began are waited for
FLUSH_S: Final = 5.0
APART_S: Final = 5.0  # for processes and Jobs of aborted attempts to be gone
LAST_WORDS_S: Final = 2.0  # after a lapse: for what had ended before it

_log = structlog.get_logger()


@functools.cache
def _meters(outcome: str) -> tuple[Counter, Histogram]:
    """Return what counts the answers with an outcome and what measures their attempts; there are six outcomes."""
    return metrics.executor_attempts.labels(outcome), metrics.executor_attempt_seconds.labels(outcome)


class Executor:
    """One incarnation: from registration to farewell or to the loss of its lease. `run` once.

    What is entered ends in exactly one of: a result, or silence. Silence means that the outcome is not known (the lease
    lapsed, the drain took too long, the process died): the gate then finds the attempt lost, and the scheduler repeats it
    only if that is harmless.
    """

    def __init__(
        self,
        broker: Broker,
        app: App,
        settings: ExecutorSettings,
        *,
        instance_id: str,
        apart: Apart = NOWHERE,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        """`instance_id`: the same after a restart, and of no other running process. `apart`: where functions can run besides
        in this process.

        `end_process(code)` ends the process at once: called when the event loop no longer answers.
        """
        self.instance_id = instance_id
        self._app = app
        self._settings = settings
        self._apart = apart
        self._end_process = end_process
        self._holdings = Holdings(instance_id, settings.slots)
        self._attempts: dict[AttemptKey, Attempt] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(settings.slots, thread_name_prefix="function")
        self._sender = ResultSender(broker, self._on_log_failure)
        self._broker = broker
        self.registration = Registration(
            broker,
            service="executor",
            instance_id=instance_id,
            feed=RegisteredFeed(settings.queue, settings.slots, tuple(functions_of(app)), bounded(details_of(app))),
            load=self._holdings.load,
            heartbeat_s=settings.heartbeat_s,
            lease_s=settings.lease_s,
            on_lapse=self._on_lapse,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._exit_code = EXIT_DRAINED
        self._last_resort: threading.Timer | None = None

    async def run(self) -> int:
        """Work until told to end; return the exit code. Raises EventLogError if it cannot register."""
        self._loop = asyncio.get_running_loop()
        # The lease may lapse, and tasks may wait, from the moment of registration on.
        self._holdings.incarnation = await asyncio.to_thread(self.registration.start)
        feed_from = self.registration.feed_from
        assert feed_from is not None  # noqa: S101 - we registered with a feed
        feed = TaskFeed(self._broker, feed_from, self._deliver, self._on_log_failure)
        watchdog = self._watchdog()
        for part in (self._sender, watchdog, feed):
            part.start()
        try:
            await self._ending.wait()
            if self._exit_code == EXIT_DRAINED:
                await self._drain()
        finally:
            watchdog.stop()
            await self._close(feed)
            if self._last_resort is not None:
                self._last_resort.cancel()
        return self._exit_code

    def why_not_ready(self) -> str:
        """Return what is missing until tasks are taken; empty if nothing is. Any thread may ask."""
        if self._holdings.incarnation < 0:
            return "not registered yet"
        if self._ending.is_set():
            return "draining"
        return "" if self.registration.lease_held() else "the lease has run out"

    def measure(self) -> None:
        """Set the gauges."""
        load = self._holdings.load()
        metrics.executor_slots.set(self._settings.slots if load.slots is None else load.slots)
        metrics.executor_free_slots.set(load.free_slots)
        metrics.executor_unanswered.set(len(load.running))
        until_s = self.registration.lease.until_s
        if until_s != float("inf"):
            metrics.executor_lease.set(max(0.0, until_s - boottime_s()))

    @property
    def has_stuck_functions(self) -> bool:
        """Tell whether functions still run that cannot be aborted: nothing but the end of the process ends them."""
        return bool(self._attempts)

    def drain(self) -> None:
        """End in order; a second call does not wait for what runs. Belongs to the loop's thread (a signal handler, say)."""
        if self._ending.is_set():
            self._idle.set()
        self._ending.set()

    # --- taking work ---

    def _deliver(self, tasks: list[StepTask]) -> None:
        """Hand tasks to the loop; called on the feed's thread."""
        self._in_loop(lambda: self._take(tasks))

    def _take(self, tasks: list[StepTask]) -> None:
        for task in tasks:
            failpoint("executor.task-received")
            verdict = self._holdings.take(task)
            if verdict is Verdict.RUN:
                self._begin(task)
            elif verdict is Verdict.CANCEL and (attempt := self._attempts.get(key_of(task))) is not None:
                attempt.cancel()
            elif verdict is Verdict.ANSWER_BUSY:
                self._send(task, key_of(task), results.busy(task))
            elif verdict is Verdict.ANSWER_RELEASED:
                self._send(task, key_of(task), results.released(task))

    def _begin(self, task: StepTask) -> None:
        failpoint("executor.task-taken")
        if task.call is None:
            self._free_slot()
            self._send(
                task, key_of(task), results.failed(task, "BadTask", "the task names no function", retryable=False)
            )
            return
        function = self._app.functions.get(task.call.function)
        attempt = Attempt(
            task,
            task.call,
            lease_held=self.registration.lease_held,
            output_max_bytes=self._settings.output_max_bytes,
            answer=self._answer,
            release=self._release,
            apart=self._apart,
            code_version=self._settings.code_version or ("" if function is None else function.file_version),
        )
        self._attempts[attempt.key] = attempt
        self._idle.clear()
        attempt.begin(function, self._threads)

    def _answer(self, attempt: Attempt, result: StepResult) -> None:
        if attempt.is_stuck:
            self._holdings.stick()
            self.registration.beat_soon()
        self._send(attempt.task, attempt.key, result)

    def _release(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.key, None)
        self._free_slot(stuck=attempt.is_stuck)
        if not self._attempts:
            self._idle.set()

    def _free_slot(self, *, stuck: bool = False) -> None:
        if self._holdings.free_slot(stuck=stuck):
            self.registration.beat_soon()

    def _send(self, task: StepTask, key: AttemptKey, result: StepResult) -> None:
        answered, seconds = _meters(result.outcome)
        answered.inc()
        if result.started_ms:
            seconds.observe(max(0, result.finished_ms - result.started_ms) / 1000)
        self._sender.send(results.to_record(task, result), lambda: self._holdings.answered(key))

    # --- ending ---

    async def _drain(self) -> None:
        """Stop taking, let what runs end, hand back what comes."""
        _log.info("draining", running=len(self._attempts), at_most_s=self._settings.drain_s)
        self._holdings.drain()
        self.registration.drain()
        failpoint("executor.draining")
        await asyncio.sleep(RELEASE_LINGER_S)
        try:
            await asyncio.wait_for(self._idle.wait(), self._settings.drain_s)
        except TimeoutError:
            _log.warning("drained for long enough, aborting", running=[str(key) for key in self._attempts])

    async def _close(self, feed: TaskFeed) -> None:
        """Abort what still runs, send what had ended, say farewell unless the lease is gone."""
        aborted = list(self._attempts.values())
        for attempt in aborted:
            attempt.abort()
        await asyncio.sleep(0)
        if apart := [attempt.apart for attempt in aborted if attempt.apart is not None]:
            await asyncio.wait(apart, timeout=APART_S)
        lapsed = self._exit_code == EXIT_LEASE_LAPSED
        failpoint("executor.before-close")
        await asyncio.to_thread(feed.stop)
        # What ended by itself is told even after a lapse: a result names its placement, so the scheduler knows whether it
        # still counts, and what it cost is spent either way. What was aborted is not: nobody knows how far it came.
        if not await asyncio.to_thread(self._sender.flush, LAST_WORDS_S if lapsed else FLUSH_S):
            _log.error("some results were not acknowledged")
        failpoint("executor.after-last-results")
        await asyncio.to_thread(self._sender.stop)
        await asyncio.to_thread(self.registration.stop, farewell=not lapsed)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _on_lapse(self, reason: str) -> None:
        """The lease ran out; called on whatever thread noticed it."""
        _log.error(
            "lease lapsed: this incarnation is over, aborting everything",
            instance_id=self.instance_id,
            incarnation=self._holdings.incarnation,
            reason=reason,
        )
        self._end_soon(EXIT_LEASE_LAPSED)

    def _on_log_failure(self, reason: str) -> None:
        """Tasks cannot be read or results not be written; called on the thread of the feed or the sender."""
        _log.error("ending, because the log is out of reach", reason=reason)
        self._end_soon(EXIT_LOG_FAILED)

    def _end_soon(self, code: int) -> None:
        """End with a code other than 0; the process does not outlive a loop that does not listen."""
        if self._last_resort is None:
            self._last_resort = threading.Timer(LAST_WORDS_S + FLUSH_S, self._end_process, [code])
            self._last_resort.daemon = True
            self._last_resort.start()

        def end() -> None:
            self._exit_code = code
            self._ending.set()
            self._idle.set()

        self._in_loop(end)

    def _watchdog(self) -> Watchdog:
        def bark(stack: str) -> None:
            _log.critical("the event loop hangs in a function, ending the process", stack=stack)
            self._end_process(EXIT_LOOP_HUNG)

        return Watchdog(
            ping=self._in_loop,
            latest_overdue_s=lambda: overdue_s([attempt.deadline_s for attempt in list(self._attempts.values())]),
            grace_s=self._settings.hang_grace_s,
            bark=bark,
        )

    def _in_loop(self, callback: Callable[[], None]) -> None:
        """Have the loop's thread call back; nothing happens if the loop is closed. Thread-safe."""
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(callback)
