"""The scheduler as a machine of the owner loop: routes inputs to runs, keeps timers, derives tells."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from typing import Any, Final

import structlog

from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.entry import Entry, Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import GateDecision, RunCommand, StepResult
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import Decision, Standing, Tell
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables
from tidegate.scheduler import decide, snapshots
from tidegate.scheduler.tells import tells

_log = structlog.get_logger()


class RunsOfPartition:
    """The runs of one log partition, and when their steps are to be tried again: (due ms, run, step, attempt).

    Runs that are over, or that wait for long, lie on the shelf. definitions: by hash, what runs of this partition pinned.
    """

    __slots__ = ("definitions", "partition", "runs", "shelf", "timers")

    def __init__(self, partition: int, shelf: Shelf) -> None:
        self.partition = partition
        self.shelf = shelf
        self.runs: dict[str, RunState] = {}
        self.timers: list[tuple[int, str, str, int]] = []
        self.definitions: dict[str, str] = {}

    def find(self, run_id: str) -> RunState | None:
        """Return a run, wherever it is; one from the shelf stays there."""
        run = self.runs.get(run_id)
        if run is not None:
            return run
        shelved = self.shelf.get(run_id)
        return None if shelved is None else snapshots.load(shelved.state, self.definitions)

    def take(self, run_id: str) -> RunState:
        """Return a run that changes, in memory from now on: the one there, the one on the shelf, or a new one."""
        run = self.runs.get(run_id)
        if run is not None:
            return run
        shelved = self.shelf.get(run_id)
        if shelved is None:
            run = RunState(run_id)
        else:
            run = snapshots.load(shelved.state, self.definitions)
            self.shelf.forget_resting(run_id)
        self.runs[run_id] = run
        return run


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
    snapshot_topic: Final = "run-snapshots"
    table_topics: Final[tuple[str, ...]] = ()
    marked_topics: Final = {"gate-decisions": "gate-ledger"}

    def __init__(self, run_partitions: int, account_partitions: int) -> None:
        self._run_partitions = run_partitions
        self._account_partitions = account_partitions

    def new_state(self, partition: int, shelf: Shelf) -> RunsOfPartition:
        """Return a partition without runs."""
        return RunsOfPartition(partition, shelf)

    def decide(
        self, state: RunsOfPartition, record: Any, message: Message, now_ms: int, tables: Tables
    ) -> Decision | None:
        """Return what an input causes. Raises MisroutedError for a message of another partition's run."""
        run = state.find(record.run_id)
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
            run = state.find(run_id)
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

    def apply(self, state: RunsOfPartition, subject: str, account: str, event: Any, seq: int, now_ms: int) -> None:
        """Change the run by one event; note its timer and its definition."""
        run = state.take(subject)
        if not run.account:
            run.account = account
        apply(run, event, now_ms)
        if isinstance(event, ev.AttemptEnded):
            if event.retry_at_ms is not None:
                heapq.heappush(state.timers, (event.retry_at_ms, subject, event.step_id, event.attempt))
        elif isinstance(event, ev.RunStarted):
            # By its true hash, whatever the event says: that is what snapshots name it by.
            assert run.workflow is not None  # noqa: S101 - it has just been compiled from this event
            state.definitions.setdefault(run.workflow.definition_hash, event.definition)

    # -- units: a run is one, and is chained by itself ---------------------------------------

    def head(self, state: RunsOfPartition, subject: str) -> tuple[int, bytes]:
        """Return the end of the run's chain."""
        run = state.find(subject)
        return (0, b"") if run is None else (run.seq, run.head)

    def set_head(self, state: RunsOfPartition, subject: str, seq: int, digest: bytes) -> None:
        """Note the end of the run's chain; the run counts its events itself."""
        state.runs[subject].head = digest

    def own_subject(self, state: RunsOfPartition) -> None:
        """Every run has its own chain."""

    def unit_of(self, subject: str, event: Any) -> str:
        """Return the run."""
        return subject

    def standing(self, state: RunsOfPartition, unit: str) -> Standing:
        """Return whether the run goes on. One that was only ever sent commands, but no start, has nothing to go on with."""
        status = state.runs[unit].status
        return Standing.DONE if status == states.ABSENT or status in states.RUN_TERMINAL else Standing.ACTIVE

    def quiet_since_ms(self, state: RunsOfPartition, unit: str) -> int | None:
        """Return since when the run waits for a person or for a back-off to end: no attempt of it is out."""
        run = state.runs[unit]
        is_out = any(step.status in (states.REQUESTED, states.DISPATCHED) for step in run.steps.values())
        return None if is_out else run.changed_ms

    def dump(self, state: RunsOfPartition, unit: str) -> bytes:
        """Return the run as bytes."""
        return snapshots.dump(state.runs[unit])

    def load(self, state: RunsOfPartition, unit: str, data: bytes) -> None:
        """Take a run, with its timers."""
        run = state.runs[unit] = snapshots.load(data, state.definitions)
        for step in run.steps.values():
            if step.status == states.BACKING_OFF and step.retry_at_ms is not None:
                heapq.heappush(state.timers, (step.retry_at_ms, unit, step.step_id, step.attempt))

    def loaded(self, state: RunsOfPartition) -> None:
        """Runs have nothing to do with each other."""

    def unload(self, state: RunsOfPartition, unit: str) -> None:
        """Forget a run that lies on the shelf now. Its timers stay."""
        del state.runs[unit]

    def parts(self, state: RunsOfPartition) -> Mapping[str, str]:
        """Return the definitions, which many runs share."""
        return state.definitions

    def load_part(self, state: RunsOfPartition, name: str, text: str) -> None:
        """Take a definition."""
        state.definitions[name] = text

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry."""
        return tells(entry, at, self._account_partitions)

    def tables_loaded(self) -> None:
        """The scheduler reads no table."""

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """The scheduler reads no table: its commands carry what it needs."""
