"""The scheduler as a machine of the owner loop: routes inputs to runs, keeps timers, derives tells."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any, Final

import structlog

from tidegate.domain import run_events as ev
from tidegate.domain.entry import Entry, Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import GateDecision, RunCommand, StepResult
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.interface import Message
from tidegate.eventlog.owner import Decision, Tell
from tidegate.eventlog.tables import Tables
from tidegate.scheduler import decide
from tidegate.scheduler.tells import tells

_log = structlog.get_logger()


class RunsOfPartition:
    """The runs of one log partition, and when their steps are to be tried again: (due ms, run, step, attempt)."""

    __slots__ = ("partition", "runs", "timers")

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.runs: dict[str, RunState] = {}
        self.timers: list[tuple[int, str, str, int]] = []


class MisroutedError(ValueError):
    """A message lies in another partition than its run's: its writer computed the partition wrongly."""


def _decide(run: RunState, record: RunCommand | GateDecision | StepResult, now_ms: int) -> list[Any]:
    if isinstance(record, StepResult):
        return decide.on_result(run, record, now_ms)
    if isinstance(record, GateDecision):
        return decide.on_decision(run, record)
    return decide.on_command(run, record)


class SchedulerMachine:
    """See `eventlog.owner.Machine`."""

    service: Final = "scheduler"
    entry_kind: Final = "RunEntry"
    log_topic: Final = "run-events"
    lead_topic: Final = "run-commands"
    other_topics: Final = ("gate-decisions", "step-results")
    table_topics: Final[tuple[str, ...]] = ()
    marked_topics: Final = {"gate-decisions": "gate-ledger"}

    def __init__(self, run_partitions: int, account_partitions: int) -> None:
        self._run_partitions = run_partitions
        self._account_partitions = account_partitions

    def new_state(self, partition: int) -> RunsOfPartition:
        """Return a partition without runs."""
        return RunsOfPartition(partition)

    def decide(
        self, state: RunsOfPartition, record: Any, message: Message, now_ms: int, tables: Tables
    ) -> Decision | None:
        """Return what an input causes. Raises MisroutedError for a message of another partition's run."""
        run = state.runs.get(record.run_id)
        if run is None:
            if partition_of(record.run_id, self._run_partitions) != state.partition:
                raise MisroutedError(f"run {record.run_id} belongs to another partition than {state.partition}")
            run = RunState(record.run_id)
        if not isinstance(record, RunCommand | GateDecision | StepResult):
            raise TypeError(f"a {type(record).__name__} has no business in {message.topic}")
        try:
            events = _decide(run, record, now_ms)
        except Exception as error:
            _log.exception("decision failed: the run is told", run=run.run_id, input=type(record).__name__)
            events = decide.on_error(run, record, error)
            if not events:
                raise
        account = record.account if isinstance(record, RunCommand) and not run.account else run.account
        return Decision(run.run_id, account, events) if events else None

    def due(self, state: RunsOfPartition, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return the next attempt whose back-off is over."""
        while state.timers and state.timers[0][0] <= now_ms:
            due_ms, run_id, step_id, attempt = state.timers[0]
            run = state.runs.get(run_id)
            events = decide.on_timer(run, step_id, attempt, now_ms) if run is not None else []
            if events and run is not None:
                return f"timer:{due_ms}:{step_id}:{attempt}", Decision(run_id, run.account, events)
            heapq.heappop(state.timers)
        return None

    def dropped(self, partition: int) -> None:
        """Nothing outside the state is kept per partition."""

    def next_due_ms(self, state: RunsOfPartition) -> int | None:
        """Return when the next back-off ends."""
        return state.timers[0][0] if state.timers else None

    def apply(self, state: RunsOfPartition, subject: str, account: str, event: Any, now_ms: int) -> None:
        """Change the run by one event; note its timer."""
        run = state.runs.get(subject)
        if run is None:
            run = state.runs[subject] = RunState(subject)
        if not run.account:
            run.account = account
        apply(run, event, now_ms)
        if isinstance(event, ev.AttemptEnded) and event.retry_at_ms is not None:
            heapq.heappush(state.timers, (event.retry_at_ms, subject, event.step_id, event.attempt))

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry."""
        return tells(entry, at, self._account_partitions)

    def tables_loaded(self) -> None:
        """The scheduler reads no table."""

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """The scheduler reads no table: its commands carry what it needs."""
