"""The simulated executor: its real registration, lease, holdings, results and sender, without threads or an event loop.

What its threads do (heartbeats, reading tasks, running functions, sending results) happens in turns, one of them a turn, in
any order. Functions are entered through one door, `World.entered`, which the judge watches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulation.processes import Life
from simulation.wires import ProcessInbox, ProcessWriter
from tidegate.domain.messages import StepResult, StepTask
from tidegate.eventlog.interface import EventLogError, TopicPartition
from tidegate.executor import results
from tidegate.executor.decide import Verdict
from tidegate.executor.feed import _task_in
from tidegate.executor.holdings import AttemptKey, Holdings, key_of
from tidegate.executor.sender import ResultSender
from tidegate.failpoints import failpoint
from tidegate.registry import Lease, ProcessIdentity, Registration
from tidegate.registry import TaskFeed as RegisteredFeed
from tidegate.registry.registration import _Heart

if TYPE_CHECKING:
    from simulation.world import World

HEARTBEAT_S = 1.0
DRAIN_S = 3.0
LAST_WORDS_TURNS = 20


@dataclass(slots=True)
class Outcome:
    """What a function will do: for how long, how it ends, what it reports to have cost, the change that it proposes, and the
    route that it chooses.

    error: class of what it raises; `results.DIED` if the place where it runs ends instead.
    """

    runs_ms: int
    value: Any = None
    error: str = ""
    retryable: bool = True
    cost_micros: int | None = None
    change: str = ""
    goto: str = ""


@dataclass(slots=True, eq=False)
class Running:
    """An attempt from the moment it is taken; see `executor.attempt.Attempt`, whose rules these are."""

    task: StepTask
    is_async: bool
    outcome: Outcome | None = None  # None: not entered yet
    ends_at_s: float = 0.0
    deadline_s: float = 0.0
    is_answered: bool = False
    is_aborted: bool = False
    is_stuck: bool = False
    is_cancelled: bool = False


class WatchedLease(Lease):
    """The real lease on the simulated clock; what it ought to say is kept a second time, for the judge."""

    def __init__(self, life: ExecutorLife) -> None:
        self._life = life
        length_s = life.world.lease_ms / 1000
        super().__init__(length_s, lambda _: life._end_soon("lapsed"), clock=life.lease_clock_s)

    def acknowledged(self, sent_at_s: float) -> bool:
        life, now_s = self._life, self._life.boottime_s()
        until_s = sent_at_s + life.world.lease_ms / 1000
        if now_s < (life.lease_until_s or until_s):
            life.lease_until_s = max(life.lease_until_s, until_s)
        return super().acknowledged(sent_at_s)


class ExecutorLife(Life):
    service = "executor"

    def __init__(self, world: World, name: str, queue: str, slots: int) -> None:
        super().__init__(world, name)
        self.queue = queue
        self.slots = slots
        self.attempts: dict[AttemptKey, Running] = {}
        self.ending = ""  # why it ends
        self.ending_since_s = 0.0
        self.last_words = 0
        self.result_writer: ProcessWriter | None = None
        self.identity = world.identity_of(self)
        self.inbox: ProcessInbox | None = None
        self.registration: Any = None
        self.lease_until_s = 0.0  # as this file knows it, for the judge

    def lease_clock_s(self) -> float:
        return self.boottime_s()

    def start(self) -> None:
        self.holdings = Holdings(self.name, self.slots)
        self.registration = Registration(
            self.broker,
            service="executor",
            instance_id=self.name,
            feed=RegisteredFeed(self.queue, self.slots, self.world.functions),
            load=self.holdings.load,
            heartbeat_s=HEARTBEAT_S,
            lease_s=self.world.lease_ms / 1000,
            on_lapse=lambda reason: self._end_soon("lapsed"),
            process=self.identity,
        )
        self.registration.lease = WatchedLease(self)
        self.heart = _Heart(HEARTBEAT_S)
        self.sender = ResultSender(self.broker, lambda reason: self._end_soon("log failed"))
        self.holdings.incarnation = self.registration.start()
        assert self.registration.feed_from is not None
        inbox = self.broker.plain_inbox()
        inbox.read_from(dict([self.registration.feed_from]))
        self.inbox = inbox

    def positions(self) -> dict[TopicPartition, int]:
        """Return from where tasks are still to be read."""
        if self.inbox is not None:
            return dict(self.inbox.positions)
        return dict([self.registration.feed_from]) if self.registration and self.registration.feed_from else {}

    def turn(self) -> None:
        """Let one of the threads go on; in calm times each of them."""
        threads = (self._beat, self._take, self._run, self._send)
        for part in threads if self.world.is_calm else (self.world.rng.choice(threads),):
            part()
        if self.ending:
            self._end()

    # -- the heartbeat's thread ------------------------------------------------------------

    def beat_now(self) -> None:
        """Send a heartbeat, if none is under way, and hear of its acknowledgement."""
        self.registration.beat_soon()
        self._beat()

    def _beat(self) -> None:
        registration = self.registration
        if registration._stopping or not registration.lease.held():
            return
        try:
            if registration._writer is None:
                registration._writer = self.broker.writer()
            if self.heart.is_due(registration._beat_wanted):
                registration._beat_wanted = False
                registration._send_heartbeat(registration._writer, self.heart)
            registration._writer.poll()
        except EventLogError:
            if registration._writer is not None:
                registration._writer.close()
                registration._writer = None
            self.heart.failed()

    # -- the feed's thread and the loop's -----------------------------------------------------

    def _take(self) -> None:
        assert self.inbox is not None
        if self.last_words:
            return
        try:
            messages = self.inbox.poll(50, 0.0)
        except EventLogError:
            self._end_soon("log failed")
            return
        for message in messages:
            task = _task_in(message, self.world.run_partitions)
            if task is not None:
                self._judge(task)

    def _judge(self, task: StepTask) -> None:
        failpoint("executor.task-received")
        verdict = self.holdings.take(task)
        if verdict is Verdict.RUN:
            failpoint("executor.task-taken")
            self.attempts[key_of(task)] = Running(task, is_async=self.world.rng.random() < 0.5)
        elif verdict is Verdict.CANCEL and (attempt := self.attempts.get(key_of(task))) is not None:
            attempt.is_cancelled = True
        elif verdict is Verdict.ANSWER_BUSY:
            self._answer(task, results.busy(task))
        elif verdict is Verdict.ANSWER_RELEASED:
            self._answer(task, results.released(task))

    # -- functions ------------------------------------------------------------------------

    def _run(self) -> None:
        for attempt in list(self.attempts.values()):
            if attempt.outcome is None:
                self._enter(attempt)
            else:
                self._progress(attempt)

    def _enter(self, attempt: Running) -> None:
        """As `Attempt._enter`: the lease is looked at last, and what was aborted before is not begun."""
        if attempt.is_aborted or (attempt.is_async and attempt.is_cancelled):
            self._finish(attempt, results.cancelled(attempt.task, results.NOTHING_SPENT))
            return
        failpoint("executor.before-enter")
        if attempt.is_aborted or not self.registration.lease_held():
            attempt.is_answered = True
            self._finish(attempt, None)
            return
        attempt.outcome = self.world.entered(self, attempt.task)
        assert attempt.task.call is not None
        attempt.deadline_s = self.monotonic_s() + attempt.task.call.timeout_ms / 1000
        attempt.ends_at_s = self.monotonic_s() + attempt.outcome.runs_ms / 1000

    def _progress(self, attempt: Running) -> None:
        now_s, outcome, task = self.monotonic_s(), attempt.outcome, attempt.task
        assert outcome is not None
        assert task.call is not None
        spent = results.Spent(outcome.cost_micros, {}, 1, 2)
        if attempt.is_async and (attempt.is_cancelled or attempt.is_aborted):
            self._finish(attempt, results.cancelled(task, spent))
        elif now_s >= attempt.ends_at_s and (attempt.is_stuck or attempt.ends_at_s <= attempt.deadline_s):
            failpoint("executor.after-function")
            self._finish(attempt, _result(task, outcome, spent))
        elif now_s >= attempt.deadline_s and not attempt.is_stuck:
            timed_out = results.timed_out(task, task.call.timeout_ms / 1000, spent)
            if attempt.is_async:
                self._finish(attempt, timed_out)
            else:  # it cannot be stopped: the answer is given, its slot stays taken
                attempt.is_stuck = not attempt.is_answered
                if attempt.is_stuck:
                    self.holdings.stick()
                    self.registration.beat_soon()
                self._give(attempt, timed_out)

    def _finish(self, attempt: Running, result: StepResult | None) -> None:
        self.attempts.pop(key_of(attempt.task), None)
        if self.holdings.free_slot(stuck=attempt.is_stuck):
            self.registration.beat_soon()
        if result is not None:
            self._give(attempt, result)

    def _give(self, attempt: Running, result: StepResult) -> None:
        if not attempt.is_answered:
            attempt.is_answered = True
            self._answer(attempt.task, result)

    def _answer(self, task: StepTask, result: StepResult) -> None:
        key = key_of(task)
        self.sender.send(results.to_record(task, result), lambda: self.holdings.answered(key))

    # -- the sender's thread -----------------------------------------------------------------

    def _send(self) -> None:
        sender = self.sender
        try:
            if self.result_writer is None:
                self.result_writer = self.broker.writer()
                for number in list(sender._unacked):
                    sender._write(self.result_writer, number)
            if not sender._waiting.empty():
                for number in sender._take_over():
                    sender._write(self.result_writer, number)
            self.result_writer.poll()
        except EventLogError as error:
            sender._give_up(self.result_writer, error)
            self.result_writer = None

    # -- ending -----------------------------------------------------------------------------

    def drain(self) -> None:
        if not self.ending:
            self.holdings.drain()
            self.registration.drain()
            failpoint("executor.draining")
            self._end_soon("draining")

    def _end_soon(self, why: str) -> None:
        if self.ending in ("", "draining"):
            self.ending = why
            self.ending_since_s = self.monotonic_s()

    def _end(self) -> None:
        """Abort what still runs, send what had ended, say farewell unless the lease is gone; then the process ends."""
        if self.ending == "draining" and self.attempts and self.monotonic_s() < self.ending_since_s + DRAIN_S:
            return
        for attempt in self.attempts.values():
            attempt.is_aborted = attempt.is_answered = True
        self.last_words += 1
        self._send()
        has_unsent = bool(self.sender._unacked) or not self.sender._waiting.empty()
        if has_unsent and self.last_words < LAST_WORDS_TURNS:
            return
        failpoint("executor.after-last-results")
        farewell = self.ending != "lapsed"
        self.registration.stop(farewell=farewell)
        self.world.end(self, self.ending)


def _result(task: StepTask, outcome: Outcome, spent: results.Spent) -> StepResult:
    if outcome.error == results.DIED:
        assert task.call is not None
        return results.died(task, "as it was made to", retryable=task.call.idempotent, spent=spent)
    if outcome.error:
        return results.failed(task, outcome.error, "as it was made to", retryable=outcome.retryable, spent=spent)
    return results.succeeded(task, outcome.value, spent, goto=outcome.goto, change=outcome.change)


__all__ = ["ExecutorLife", "Outcome", "ProcessIdentity"]
