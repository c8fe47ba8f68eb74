"""The scheduler as a machine of the owner loop: routes inputs to runs, keeps timers, derives tells."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Final

import structlog

from tidegate.domain import progress, states
from tidegate.domain import run_events as ev
from tidegate.domain.controls import Controls
from tidegate.domain.entry import Entry, Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Allowed, GateDecision, RunCommand, StepResult
from tidegate.domain.retry_documents import RetryDocuments
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import Decision, Retirement, Standing, Tell
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables, Unreadable
from tidegate.scheduler import commands, decide, holding, snapshots, waits
from tidegate.scheduler.tells import TELLING, tells

_log = structlog.get_logger()


CONTROLS: Final = "controls"
POLICIES: Final = "policies"


class RunsOfPartition:
    """The runs of one log partition.

    Runs that are over, or that wait for long, lie on the shelf. What may wake those that wait is in memory for all of them:
    timers: (due ms, run, step, attempt), a heap. held: queue -> the runs with steps that were held back, in that order. Both
    may name what is of no interest any more. definitions: by hash, what runs of this partition pinned. pinned: which of them the
    loaded runs need, until all are loaded.

    The run that was read from the shelf last is kept: whoever decides on it asks for it several times.
    """

    __slots__ = ("_absent", "_read", "definitions", "held", "partition", "pinned", "runs", "shelf", "timers")

    def __init__(self, partition: int, shelf: Shelf) -> None:
        self.partition = partition
        self.shelf = shelf
        self.runs: dict[str, RunState] = {}
        self.timers: list[tuple[int, str, str, int]] = []
        self.held: dict[str, dict[str, None]] = {}
        self._read: RunState | None = None
        self._absent = ""  # the run that was looked for last in vain
        self.definitions: dict[str, str] = {}
        self.pinned: set[str] = set()

    def find(self, run_id: str) -> RunState | None:
        """Return a run, wherever it is; one from the shelf stays there."""
        run = self.runs.get(run_id)
        if run is not None:
            return run
        if run_id == self._absent:
            return None
        if self._read is None or self._read.run_id != run_id:
            shelved = self.shelf.get(run_id)
            self._absent = run_id if shelved is None else ""
            self._read = None if shelved is None else snapshots.load(shelved.state, self.definitions)
        return self._read

    def take(self, run_id: str) -> RunState:
        """Return a run that changes, in memory from now on: the one there, the one on the shelf, or a new one."""
        run = self.runs.get(run_id)
        if run is not None:
            return run
        run = self.find(run_id)
        if run is None:
            run = RunState(run_id)
        else:
            self.shelf.forget_resting(run_id)
            self._read = None  # it is about to change
        self.runs[run_id] = run
        return run

    def leave(self, run_id: str) -> None:
        """Forget a run that was put on the shelf."""
        del self.runs[run_id]
        self._read, self._absent = None, ""

    def watch(self, run_id: str, times: Iterable[tuple[int, str, int]], queues: Iterable[str]) -> None:
        """Note when a run is to be looked at, and which queues it has held steps for."""
        for due_ms, step_id, attempt in times:
            heapq.heappush(self.timers, (due_ms, run_id, sys.intern(step_id), attempt))
        for queue in queues:
            self.held.setdefault(queue, {})[run_id] = None


class MisroutedError(ValueError):
    """A message lies in another partition than its run's: its writer computed the partition wrongly."""


def _decide(
    run: RunState, record: RunCommand | GateDecision | StepResult, now_ms: int, documents: RetryDocuments
) -> list[Any]:
    if isinstance(record, StepResult):
        return decide.on_result(run, record, now_ms, documents)
    if isinstance(record, GateDecision):
        return decide.on_decision(run, record)
    return commands.on_command(run, record)


def _on_error(run: RunState, record: RunCommand | GateDecision | StepResult, error: Exception) -> list[Any]:
    if isinstance(record, RunCommand):
        return commands.on_error(run, record, decide.error_reason(type(record).__name__, error))
    return decide.on_error(run, record, error)


class SchedulerMachine:
    """See `eventlog.owner.Machine`."""

    service: Final = "scheduler"
    entry_kind: Final = "RunEntry"
    log_topic: Final = "run-events"
    lead_topic: Final = "run-commands"
    other_topics: Final = ("gate-decisions", "step-results")
    snapshot_topic: Final = "run-snapshots"
    table_topics: Final = (CONTROLS, POLICIES)
    marked_topics: Final = {"gate-decisions": "gate-ledger"}
    patient_topic: Final = "gate-decisions"

    def __init__(self, run_partitions: int, account_partitions: int) -> None:
        self._run_partitions = run_partitions
        self._account_partitions = account_partitions
        self._controls = Controls()
        self._retries = RetryDocuments()

    def new_state(self, partition: int, shelf: Shelf) -> RunsOfPartition:
        """Return a partition without runs."""
        return RunsOfPartition(partition, shelf)

    def may_wait(self, state: RunsOfPartition, record: Any) -> bool:
        """Allows may: their attempts run already, and a result that comes soon says so too. One entry then holds both.

        Those of outside calls may not: no executor answers for them, and people are told of the wait that begins now.
        """
        if not isinstance(record, GateDecision):
            return False
        run = state.runs.get(record.run_id)
        for item in record.items:
            if not isinstance(item, Allowed):
                return False
            step = None if run is None else run.steps.get(item.step_id)
            if step is not None and step.call.is_outside:
                return False
        return True

    def subject_of(self, record: Any) -> str:
        """Return the run."""
        return record.run_id if isinstance(record, _INPUTS) else ""

    def decide(
        self, state: RunsOfPartition, record: Any, message: Message, now_ms: int, tables: Tables
    ) -> Decision | None:
        """Return what an input causes. Raises MisroutedError for a message of another partition's run."""
        run = state.find(record.run_id)
        if run is None:
            if partition_of(record.run_id, self._run_partitions) != state.partition:
                raise MisroutedError(f"run {record.run_id} belongs to another partition than {state.partition}")
            run = RunState(record.run_id)
        if not isinstance(record, _INPUTS):
            raise TypeError(f"a {type(record).__name__} has no business in {message.topic}")
        try:
            events = holding.finished(run, _decide(run, record, now_ms, self._retries), self._controls, now_ms)
        except Exception as error:
            _log.exception("decision failed: the run is told", run_id=run.run_id, input=type(record).__name__)
            events = _on_error(run, record, error)
            if not events:
                raise
        account = record.account if isinstance(record, RunCommand) and not run.account else run.account
        return Decision(run.run_id, account, events) if events else None

    def may_be_followed(self, events: Sequence[Any]) -> bool:
        """What tells somebody ends its entry: a scheduler of before, which knows no parts, makes one message of all of them. With
        one part that tells it is the same message, so it may take over from us."""
        return TELLING.isdisjoint(map(type, events))

    def instead(self, state: RunsOfPartition, record: Any, refused: Decision, error: Exception) -> Decision | None:
        """Return the end of a run that cannot go on, since what it should go on with is too large. A command is a dead letter."""
        run = state.find(refused.subject)
        if run is None or run.is_over or isinstance(record, RunCommand):
            return None
        if record is None:
            return Decision(run.run_id, run.account, progress.broken(run, None, decide.error_reason(_TIMER, error)))
        events = _on_error(run, record, error)
        return Decision(run.run_id, run.account, events) if events else None

    def due(self, state: RunsOfPartition, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return what the next timer causes, or the next release of held steps."""
        while state.timers and state.timers[0][0] <= now_ms:
            due_ms, run_id, step_id, attempt = state.timers[0]
            run = state.find(run_id)
            events = [] if run is None else self._on_timer(run, step_id, attempt, now_ms)
            if events and run is not None:
                return f"timer:{due_ms}:{step_id}:{attempt}", Decision(run_id, run.account, events)
            heapq.heappop(state.timers)
        return self._release(state, tables)

    def _on_timer(self, run: RunState, step_id: str, attempt: int, now_ms: int) -> list[Any]:
        """Return what a timer causes. What cannot be decided ends its run: raised, it would end every owner that comes to it."""
        try:
            events = decide.on_timer(run, step_id, attempt, now_ms)
            return holding.finished(run, events, self._controls, now_ms)
        except Exception as error:
            _log.exception("decision failed: the run is told", run_id=run.run_id, step_id=step_id)
            return progress.broken(run, None, f"step {step_id}: {decide.error_reason(_TIMER, error)}")

    def _release(self, state: RunsOfPartition, tables: Tables) -> tuple[str, Decision] | None:
        for run_ids in self._releasable(state):
            while run_ids:
                run_id = next(iter(run_ids))
                run = state.find(run_id)
                events = [] if run is None else holding.released(run, self._controls)
                if events and run is not None:
                    return f"table:{CONTROLS}:{tables.versions.get(CONTROLS, 0)}", Decision(run_id, run.account, events)
                del run_ids[run_id]
        return None

    def _releasable(self, state: RunsOfPartition) -> list[dict[str, None]]:
        return [run_ids for queue, run_ids in state.held.items() if run_ids and not self._controls.is_paused(queue)]

    def dropped(self, partition: int) -> None:
        """Nothing outside the state is kept per partition."""

    def next_due_ms(self, state: RunsOfPartition) -> int | None:
        """Return when the next timer ends; at once if held steps may go on."""
        if self._releasable(state):
            return 0
        return state.timers[0][0] if state.timers else None

    def apply(
        self,
        state: RunsOfPartition,
        subject: str,
        account: str,
        event: Any,
        seq: int,
        now_ms: int,
        covered: Container[str] = (),
    ) -> None:
        """Change the run by one event, which changes nothing else; note what may wake it, and its definition."""
        run = state.take(subject)
        if not run.account:
            run.account = account
        apply(run, event, now_ms)
        if type(event) not in _NOTED:
            return  # as most are
        if isinstance(event, _TIMED):
            step = run.steps[event.step_id]
            due_ms = waits.due_ms(run, step)
            if due_ms is not None:
                state.watch(subject, [(due_ms, step.step_id, step.attempt)], ())
        elif isinstance(event, _HOLDING):
            step = run.steps[event.step_id]
            if step.status == states.HELD:
                state.watch(subject, (), [step.call.queue])
        elif isinstance(event, ev.RunResumed):
            state.watch(subject, (), (step.call.queue for step in run.held_steps()))
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

    def units_of(self, subject: str, event: Any) -> Sequence[str]:
        """Return the run."""
        return (subject,)

    def standing(self, state: RunsOfPartition, unit: str) -> Standing:
        """Return whether the run goes on. One that was only ever sent commands, but no start, has nothing to go on with."""
        status = state.runs[unit].status
        return Standing.DONE if status == states.ABSENT or status in states.RUN_TERMINAL else Standing.ACTIVE

    def quiet_since_ms(self, state: RunsOfPartition, unit: str) -> int | None:
        """Return since when the run waits for a person, an event or a time: no attempt of it is out."""
        return snapshots.quiet_since_ms(state.runs[unit])

    def dump(self, state: RunsOfPartition, unit: str) -> bytes:
        """Return the run as bytes."""
        return snapshots.dump(state.runs[unit])

    def load(self, state: RunsOfPartition, unit: str, data: bytes) -> None:
        """Take a run, with what may wake it."""
        state.runs[unit] = snapshots.load(data, state.definitions)
        self._loaded(state, unit, snapshots.outlook(data))

    def load_resting(self, state: RunsOfPartition, unit: str, data: bytes, quiet_before_ms: int) -> bool:
        """Take only what may wake a run that has been quiet since then; the rest of its bytes is not looked at.

        Raises KeyError if its definition is not there: whoever wants the run later could not read it.
        """
        outlook = snapshots.outlook(data)
        if outlook.quiet_since_ms is None or outlook.quiet_since_ms > quiet_before_ms:
            return False
        if outlook.definition_hash and outlook.definition_hash not in state.definitions:
            raise KeyError(outlook.definition_hash)
        self._loaded(state, unit, outlook)
        return True

    def _loaded(self, state: RunsOfPartition, unit: str, outlook: snapshots.Outlook) -> None:
        state.watch(unit, outlook.times, outlook.queues)
        state.pinned.add(outlook.definition_hash)

    def loaded(self, state: RunsOfPartition) -> None:
        """Forget the definitions that no run needs any more: those that had pinned them are over."""
        state.definitions = {name: text for name, text in state.definitions.items() if name in state.pinned}
        state.pinned = set()

    def unload(self, state: RunsOfPartition, unit: str) -> None:
        """Forget a run that lies on the shelf now. Its timers stay."""
        state.leave(unit)

    def parts(self, state: RunsOfPartition) -> Mapping[str, str]:
        """Return the definitions, which many runs share. Those of runs that are over are there until the next owner has loaded."""
        return state.definitions

    def load_part(self, state: RunsOfPartition, name: str, text: str) -> None:
        """Take a definition."""
        state.definitions[name] = text

    def carries(self, entry: Entry) -> bool:
        """Runs have chains of their own: none carries another forward."""
        return False

    def load_carried(self, state: RunsOfPartition, entry: Entry) -> list[str]:
        """Never called: no entry carries runs forward."""
        raise TypeError(f"{entry.subject}: no entry carries runs forward")

    def retirement(self, state: RunsOfPartition) -> Retirement | None:
        """Runs are not retired."""

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry."""
        return tells(entry, at, self._account_partitions, self._run_partitions)

    def tables_loaded(self) -> None:
        """What was paused before counts as what is paused from now on."""

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """Take note of what is paused, and of how attempts are repeated. Of workflows nothing is read: the commands carry what is
        needed."""
        if topic == POLICIES:
            problem = self._retries.take(key, row)
            if problem:
                _log.error("retry document ignored", document=key, offset=offset, error=problem)
            return
        self._controls.take(key, row, is_unknown=isinstance(row, Unreadable))


_TIMER: Final = "timer"
_INPUTS: Final = (RunCommand, GateDecision, StepResult)
_TIMED: Final = (ev.AttemptEnded, ev.ApprovalRequested, ev.WaitStarted)
_HOLDING: Final = (ev.AttemptHeld, ev.StepReady)
_NOTED: Final = frozenset((*_TIMED, *_HOLDING, ev.RunResumed, ev.RunStarted))
