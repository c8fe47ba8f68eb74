"""What an executor holds: marks, attempts and slots, kept together so that a heartbeat never shows one without the other.

The gate concludes from a heartbeat that an attempt is lost if the mark covers it, it is not listed as running and no result
came. So an attempt is listed from the moment the mark is raised until its answer is acknowledged.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from tidegate.domain.messages import Running, StepTask
from tidegate.executor.decide import IGNORED, Verdict, judge_task
from tidegate.registry.registration import Load, mark_name


class AttemptKey(NamedTuple):
    """Names an attempt."""

    run_id: str
    step_id: str
    attempt: int


def key_of(task: StepTask) -> AttemptKey:
    """Return the attempt that a task is about."""
    return AttemptKey(task.run_id, task.step_id, task.attempt)


class Holdings:
    """Thread-safe; no method blocks for longer than the others take."""

    def __init__(self, instance_id: str, slots: int) -> None:
        self.instance_id = instance_id
        self.incarnation = -1  # set once, when it is known
        self._slots = slots
        self._lock = threading.Lock()
        self._marks: dict[str, int] = {}
        self._unanswered: dict[AttemptKey, Running] = {}
        self._taken_slots = 0
        self._stuck_slots = 0  # of those taken: by functions that go on although their attempt is answered
        self._draining = False

    def take(self, task: StepTask) -> Verdict:
        """Judge a task; unless it is ignored raise the mark, and take a slot if it is to run."""
        with self._lock:
            verdict = judge_task(
                task,
                instance_id=self.instance_id,
                incarnation=self.incarnation,
                marks=self._marks,
                free_slots=self._slots - self._taken_slots,
                draining=self._draining,
            )
            if verdict in IGNORED:
                return verdict
            self._marks[mark_name(task.source.partition)] = task.source.rank()
            if verdict is not Verdict.CANCEL:
                self._unanswered[key_of(task)] = Running(
                    run_id=task.run_id,
                    step_id=task.step_id,
                    attempt=task.attempt,
                    ledger_partition=task.source.partition,
                )
            if verdict is Verdict.RUN:
                self._taken_slots += 1
            return verdict

    def drain(self) -> None:
        """Take nothing any more: what comes is handed back."""
        with self._lock:
            self._draining = True

    def stick(self) -> None:
        """A function goes on although its attempt is answered: its slot is out of use until it ends."""
        with self._lock:
            self._stuck_slots += 1

    def free_slot(self, *, stuck: bool = False) -> bool:
        """Give a slot back; returns whether others should hear of it soon: all were taken, or this one out of use."""
        with self._lock:
            self._taken_slots -= 1
            self._stuck_slots -= stuck
            return stuck or self._taken_slots == self._slots - 1

    def answered(self, key: AttemptKey) -> None:
        """The answer to an attempt is acknowledged: it is ours no more."""
        with self._lock:
            self._unanswered.pop(key, None)

    def load(self) -> Load:
        """Return what a heartbeat says."""
        with self._lock:
            return Load(
                slots=self._slots - self._stuck_slots,
                free_slots=0 if self._draining else self._slots - self._taken_slots,
                running=tuple(self._unanswered.values()),
                marks=dict(self._marks),
            )
