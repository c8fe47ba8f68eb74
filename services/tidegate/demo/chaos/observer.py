"""Watches the runs from outside, as any reader of `run-events` may, and answers for the humans that runs ask."""

from __future__ import annotations

import heapq
import itertools
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final, TypeVar

from tidegate import codec
from tidegate.demo.chaos.plan import Question, Wish, answer
from tidegate.domain import states
from tidegate.domain.entry import OwnerAnnounced
from tidegate.domain.run import RunState, apply
from tidegate.domain.run_events import AttemptEnded
from tidegate.eventlog.interface import Broker, EventLogError, Inbox, Message, Record, TopicPartition, Writer
from tidegate.eventlog.validity import EpochTracker

T = TypeVar("T")
RUN_EVENTS: Final = "run-events"
RUN_REQUESTS: Final = "run-requests"
POLL_S: Final = 0.1
AGAIN_S: Final = 0.5
WRITE_S: Final = 10.0
MAX_BATCH: Final = 1_000


class Observer:
    """A thread that folds the log as it grows. It outlives every outage of the broker: it goes on where it was."""

    def __init__(self, broker: Broker) -> None:
        """Blocks for some round trips. Raises EventLogError."""
        self._broker = broker
        count = broker.describe([RUN_EVENTS])[RUN_EVENTS].partition_count
        self._positions = {TopicPartition(RUN_EVENTS, n): broker.offsets(RUN_EVENTS, n).start for n in range(count)}
        self._trackers = {number: EpochTracker() for number in range(count)}
        self._lock = threading.Lock()
        self._runs: dict[str, RunState] = {}
        self._seen: Counter[str] = Counter()
        self._failure = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading. Blocks for a moment."""
        self._stop.set()
        self._thread.join()

    @property
    def failure(self) -> str:
        """Return why the log cannot be followed any more; empty while it can."""
        return self._failure

    def statuses(self) -> Counter[str]:
        """Return how many runs are in which state."""
        with self._lock:
            return Counter(run.status for run in self._runs.values() if run.status != states.ABSENT)

    def unfinished(self, run_ids: Iterable[str]) -> list[str]:
        """Return those of the runs that are not over, or of which the log has nothing."""
        with self._lock:
            return [run_id for run_id in run_ids if run_id not in self._runs or not self._runs[run_id].is_over]

    def questions(self) -> list[Question]:
        """Return what runs ask humans at this moment."""
        with self._lock:
            return [
                Question(run.run_id, step.step_id, step.attempt, "" if step.approval is None else step.approval.why)
                for run in self._runs.values()
                for step in run.open_approvals()
                if not run.is_over
            ]

    def look(self, at: Callable[[dict[str, RunState]], T]) -> T:
        """Return what `at` makes of all runs, which stand still meanwhile: it must neither keep nor change them."""
        with self._lock:
            return at(self._runs)

    def seen(self) -> Counter[str]:
        """Return how many events of which type there are; of attempts that ended without success, by outcome."""
        with self._lock:
            return Counter(self._seen)

    def _run(self) -> None:
        inbox: Inbox | None = None
        while not self._stop.is_set():
            try:
                if inbox is None:
                    inbox = self._broker.plain_inbox()
                    inbox.read_from(self._positions)
                for message in inbox.poll(MAX_BATCH, POLL_S):
                    self._take(message)
            except EventLogError:
                if inbox is not None:
                    inbox.close()
                inbox = None
                self._stop.wait(AGAIN_S)
            except Exception as error:  # a log that does not fold is what the demo looks for
                self._failure = f"{type(error).__name__}: {error}"
                break
        if inbox is not None:
            inbox.close()

    def _take(self, message: Message) -> None:
        self._positions[TopicPartition(message.topic, message.partition)] = message.offset + 1
        if message.value is None:
            return
        record, tracker = codec.decode(message.value), self._trackers[message.partition]
        if isinstance(record, OwnerAnnounced):
            tracker.announced(message.offset, record.epoch)
        elif tracker.is_valid(record.epoch):
            with self._lock:
                run = self._runs.setdefault(record.subject, RunState(record.subject))
                for event in record.events:
                    apply(run, event, record.now_ms)
                    self._seen[event.outcome if isinstance(event, AttemptEnded) else type(event).__name__] += 1


class Customers:
    """A thread that sends what customers wish when they do, and answers questions after some thought.

    Every request is sent until the broker has it: one that was written and not acknowledged is written again, and counts once.
    """

    def __init__(
        self, broker: Broker, seed: int, wishes: Iterable[Wish], questions: Callable[[], list[Question]]
    ) -> None:
        self._broker = broker
        self._seed = seed
        self._partitions = broker.describe([RUN_REQUESTS])[RUN_REQUESTS].partition_count
        self._due: list[tuple[float, int, dict[str, Any]]] = []
        self._numbers = itertools.count()
        self._questions = questions
        self._answered: set[Question] = set()
        self._writer: Writer | None = None
        self.sent: Counter[str] = Counter()
        self.wanted: defaultdict[str, set[str]] = defaultdict(set)  # run id -> types of the requests about it
        for wish in wishes:
            self._add(wish.at_s, wish.request)
        self._stop = threading.Event()
        self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="customers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering. Blocks for a moment, or until the request under way is written."""
        self._stop.set()
        self._thread.join()
        if self._writer is not None:
            self._writer.close()

    def _add(self, at_s: float, request: dict[str, Any]) -> None:
        self.wanted[request["run_id"]].add(request["type"])
        heapq.heappush(self._due, (at_s, next(self._numbers), request))

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            now_s = time.monotonic() - self._began_s
            for question in self._questions():
                if question not in self._answered:
                    self._answered.add(question)
                    after_s, request = answer(self._seed, question)
                    self._add(now_s + after_s, request)
            while self._due and self._due[0][0] <= now_s and not self._stop.is_set():
                _, number, request = heapq.heappop(self._due)
                self._send(request, number)

    def _send(self, request: dict[str, Any], number: int) -> None:
        """Write until it is acknowledged, to any partition: the inbox does not care."""
        record = Record(RUN_REQUESTS, number % self._partitions, b"any", json.dumps(request).encode())
        while not self._stop.is_set():
            try:
                self._writer = self._writer or self._broker.writer()
                self._writer.send(record)
                self._writer.flush(WRITE_S)
                self.sent[request["type"]] += 1
                return
            except EventLogError:
                with suppress(EventLogError):
                    if self._writer is not None:
                        self._writer.close()
                self._writer = None
                self._stop.wait(AGAIN_S)
