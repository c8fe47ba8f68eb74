"""The live view, folded: a status row per run, and beside them the tallies of `figures.py`. Pure.

A row is guarded by `seq`: an entry that the row already holds changes nothing, so reading any part of the log again is
harmless.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from tidegate import codec
from tidegate.domain import run_events as ev
from tidegate.domain import states, waits
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.domain.questions import question_id
from tidegate.eventlog.validity import NO_EPOCH, EpochTracker
from tidegate.gateway.figures import MAX_SPENT, MINUTE_MS, Tallies, Tally, learn

DEFAULT_KEEP_MINUTES: Final = 24 * 60
MAX_STEP_LINES: Final = 64
MAX_OUTPUT_CHARS: Final = 4096
MAX_TEXT_CHARS: Final = 1024


class StepLine(msgspec.Struct, array_like=True):
    """A step as people want to see it. `error` is that of its latest attempt that ended badly; `waits_for` says why the
    gate lets it wait, while it does."""

    status: str
    attempt: int = 1
    error: str = ""
    waits_for: str = ""


class OpenApproval(msgspec.Struct, kw_only=True):
    """A question that waits for a human, since `since_ms` (Unix milliseconds), until `expires_at_ms` (0: whenever).

    question: names it in an answer.
    """

    step_id: str
    attempt: int
    why: str
    rule: str
    policy: str
    reason: str
    since_ms: int
    expires_at_ms: int = 0
    arguments_hash: str = ""
    question: str = ""


class OpenWait(msgspec.Struct, kw_only=True):
    """What a step waits for, since `since_ms`. Times are Unix milliseconds, 0 for never; the texts are cut."""

    step_id: str
    kind: str
    prompt: str
    choices: list[str]
    event: str
    key: str
    due_ms: int
    timeout_at_ms: int
    since_ms: int
    function: str = ""
    arguments: str = ""


class RunRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A run's status: a fold of its valid entries up to `seq`.

    status: as in `domain.states`; `absent` if only refused commands named the run. Counts of steps are exact; `steps` has
    a line for at most MAX_STEP_LINES of them, and leaves out finished ones first; so has `waits`, of which `waiting_count` is the
    true number. output: JSON text, cut to
    MAX_OUTPUT_CHARS (`output_cut`). functions: what its nodes call, as `figures.learn` notes it.
    incomplete: earlier entries are missing, so that what is summed up may be too little.
    """

    run_id: str
    account: str = ""
    workflow: str = ""
    status: str = states.ABSENT
    seq: int = 0
    incomplete: bool = False
    step_count: int = 0
    succeeded_count: int = 0
    failed_count: int = 0
    cancelled_count: int = 0
    steps: dict[str, StepLine] = {}
    approvals: dict[str, OpenApproval] = {}
    waits: dict[str, OpenWait] = {}
    waiting_count: int = 0
    paused: bool = False
    cancel_requested: bool = False
    output: str = ""
    output_cut: bool = False
    code: str = ""
    error: str = ""
    started_ms: int = 0
    finished_ms: int = 0
    updated_ms: int = 0
    budget_micros: int | None = None
    spent_micros: int = 0
    functions: dict[str, str] = {}

    def is_older_than(self, other: RunRow) -> bool:
        """Tell whether the other one has more of the run's entries."""
        return self.seq < other.seq

    @property
    def is_over(self) -> bool:
        """Tell whether nothing further will happen."""
        return self.status in states.RUN_TERMINAL

    @property
    def is_paused(self) -> bool:
        """Tell whether somebody has paused it, so that it will not go on by itself."""
        return self.paused and not self.is_over


def apply(row: RunRow, entry: Entry) -> bool:
    """Fold an entry into its run's row, in place. Returns False, and changes nothing, if the row holds it already.

    Never raises: a view of a log that cannot be explained shows what it can, and says that it is `incomplete`.
    """
    if entry.first_seq <= row.seq:
        return False
    row.incomplete |= entry.first_seq != row.seq + 1
    for event in entry.events:
        apply_event(row, event, entry.now_ms)
    row.account = entry.account or row.account
    return True


def apply_event(row: RunRow, event: Any, now_ms: int) -> None:
    """Fold the event that follows on the row's seq. Events of types that this version does not know only count."""
    row.seq += 1
    row.updated_ms = now_ms
    handler = _HANDLERS.get(type(event))
    if handler is not None:
        handler(row, event, now_ms)
    micros = getattr(event, "actual_micros", 0)
    if micros > 0:
        row.spent_micros = min(row.spent_micros + micros, MAX_SPENT)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}…"


def _set_step(row: RunRow, step_id: str, status: str, attempt: int | None = None) -> StepLine | None:
    """Return the step's line with its new status; None if it has no line."""
    line = row.steps.get(step_id)
    if line is not None:
        line.status = status
        line.waits_for = ""
        if attempt is not None:
            line.attempt = attempt
    return line


def _settle(row: RunRow, step_id: str) -> None:
    """Close the question that the step has asked, if it has; the run goes on when none is left."""
    if row.approvals.pop(step_id, None) is not None:
        _leave_waiting(row)


def _leave_waiting(row: RunRow) -> None:
    if not row.approvals and not row.waiting_count and row.status == states.WAITING:
        row.status = states.RUNNING


def _end_wait(row: RunRow, step_id: str) -> None:
    row.waits.pop(step_id, None)
    row.waiting_count = max(0, row.waiting_count - 1)
    _leave_waiting(row)


def _run_started(row: RunRow, event: ev.RunStarted, now_ms: int) -> None:
    row.status = states.RUNNING
    row.workflow = event.workflow
    row.budget_micros = event.budget_micros
    row.started_ms = now_ms


def _run_refused(row: RunRow, event: ev.RunRefused, now_ms: int) -> None:
    row.status = states.REFUSED
    row.code, row.error = event.code, _cut(event.reason)
    row.started_ms = row.finished_ms = now_ms


def _step_ready(row: RunRow, event: ev.StepReady, now_ms: int) -> None:
    _add_step(row, event.step_id, StepLine(states.HELD, 0) if event.held else StepLine(states.REQUESTED))


def _add_step(row: RunRow, step_id: str, line: StepLine) -> None:
    row.step_count += 1
    if len(row.steps) >= MAX_STEP_LINES:
        finished = next((key for key, line in row.steps.items() if line.status in states.STEP_TERMINAL), None)
        if finished is None:
            return
        del row.steps[finished]
    row.steps[step_id] = line


def _wait_started(row: RunRow, event: ev.WaitStarted, now_ms: int) -> None:
    # A call of an outside tool was a step before it waited, but in older runs; it may have no line any more.
    was_step = event.kind == waits.OUTSIDE and (
        _set_step(row, event.step_id, states.WAITING) is not None or len(row.steps) >= MAX_STEP_LINES
    )
    if not was_step:
        _add_step(row, event.step_id, StepLine(states.WAITING, 0))
    row.waiting_count += 1
    row.status = states.WAITING
    if len(row.waits) < MAX_STEP_LINES:
        row.waits[event.step_id] = OpenWait(
            step_id=event.step_id,
            kind=event.kind,
            prompt=_cut(event.prompt),
            choices=list(event.choices),
            event=event.event,
            key=event.key,
            due_ms=event.due_ms or 0,
            timeout_at_ms=event.timeout_at_ms or 0,
            since_ms=now_ms,
            function=event.function,
            arguments=_cut(event.input) if event.function else "",
        )


def _wait_ended(row: RunRow, event: ev.WaitEnded, now_ms: int) -> None:
    _set_step(row, event.step_id, states.ENDED)
    _end_wait(row, event.step_id)


def _attempt_held(row: RunRow, event: ev.AttemptHeld, now_ms: int) -> None:
    _set_step(row, event.step_id, states.HELD)


def _approval_expired(row: RunRow, event: ev.ApprovalExpired, now_ms: int) -> None:
    _set_step(row, event.step_id, states.ENDED)
    _settle(row, event.step_id)


def _run_paused(row: RunRow, event: ev.RunPaused, now_ms: int) -> None:
    row.paused = True


def _run_resumed(row: RunRow, event: ev.RunResumed, now_ms: int) -> None:
    row.paused = False


def _attempt_requested(row: RunRow, event: ev.AttemptRequested, now_ms: int) -> None:
    _set_step(row, event.step_id, states.REQUESTED, event.attempt)


def _attempt_dispatched(row: RunRow, event: ev.AttemptDispatched, now_ms: int) -> None:
    _set_step(row, event.step_id, states.DISPATCHED, event.attempt)


def _let_wait(row: RunRow, event: ev.AttemptAwaitsBudget | ev.StepThrottled, now_ms: int) -> None:
    line = row.steps.get(event.step_id)
    if line is not None:
        line.waits_for = _cut(event.reason)


def _approval_requested(row: RunRow, event: ev.ApprovalRequested, now_ms: int) -> None:
    _set_step(row, event.step_id, states.AWAITING_APPROVAL, event.attempt)
    row.approvals[event.step_id] = OpenApproval(
        step_id=event.step_id,
        attempt=event.attempt,
        why=event.why,
        rule=event.rule,
        policy=event.policy,
        reason=_cut(event.reason),
        since_ms=now_ms,
        expires_at_ms=event.expires_at_ms,
        arguments_hash=event.arguments_hash,
        question=question_id(event),
    )
    row.status = states.WAITING


def _approval_resolved(row: RunRow, event: ev.ApprovalResolved, now_ms: int) -> None:
    resumes = event.approved and event.why == "policy"
    _set_step(row, event.step_id, states.REQUESTED if resumes else states.ENDED)
    _settle(row, event.step_id)


def _attempt_ended(row: RunRow, event: ev.AttemptEnded, now_ms: int) -> None:
    status = states.ENDED if event.retry_at_ms is None else states.BACKING_OFF
    line = _set_step(row, event.step_id, status, event.attempt)
    if line is not None:
        line.error = _cut(": ".join(part for part in (event.error_class, event.error_message) if part) or event.outcome)


def _step_succeeded(row: RunRow, event: ev.StepSucceeded, now_ms: int) -> None:
    row.succeeded_count += 1
    line = _set_step(row, event.step_id, states.SUCCEEDED)
    if line is not None:
        line.error = ""
    _settle(row, event.step_id)


def _step_failed(row: RunRow, event: ev.StepFailed, now_ms: int) -> None:
    row.failed_count += 1
    line = _set_step(row, event.step_id, states.FAILED)
    if line is not None:
        line.error = _cut(event.reason)
    _settle(row, event.step_id)


def _step_cancelled(row: RunRow, event: ev.StepCancelled, now_ms: int) -> None:
    row.cancelled_count += 1
    _set_step(row, event.step_id, states.CANCELLED)
    _settle(row, event.step_id)
    if event.step_id in row.waits:
        _end_wait(row, event.step_id)


def _child_started(row: RunRow, event: ev.ChildStarted, now_ms: int) -> None:
    _add_step(row, event.step_id, StepLine(states.IN_CHILD))


def _child_ended(row: RunRow, event: ev.ChildEnded, now_ms: int) -> None:
    has_succeeded = event.status == states.SUCCEEDED
    row.succeeded_count += has_succeeded
    row.failed_count += not has_succeeded
    line = _set_step(row, event.step_id, states.SUCCEEDED if has_succeeded else states.FAILED)
    if line is not None:
        line.error = _cut(event.reason)


def _cancel_requested(row: RunRow, event: ev.RunCancelRequested, now_ms: int) -> None:
    row.cancel_requested = True


def _run_finished(row: RunRow, event: ev.RunFinished, now_ms: int) -> None:
    row.status = event.status
    row.output, row.output_cut = event.output[:MAX_OUTPUT_CHARS], len(event.output) > MAX_OUTPUT_CHARS
    row.code, row.error = event.code, _cut(event.reason)
    row.finished_ms = now_ms
    row.approvals, row.waits, row.waiting_count = {}, {}, 0


_HANDLERS: Final[dict[type, Callable[[RunRow, Any, int], None]]] = {
    ev.RunStarted: _run_started,
    ev.RunRefused: _run_refused,
    ev.StepReady: _step_ready,
    ev.AttemptRequested: _attempt_requested,
    ev.AttemptDispatched: _attempt_dispatched,
    ev.AttemptAwaitsBudget: _let_wait,
    ev.StepThrottled: _let_wait,
    ev.ApprovalRequested: _approval_requested,
    ev.ApprovalResolved: _approval_resolved,
    ev.AttemptEnded: _attempt_ended,
    ev.StepSucceeded: _step_succeeded,
    ev.StepFailed: _step_failed,
    ev.StepCancelled: _step_cancelled,
    ev.ChildStarted: _child_started,
    ev.ChildEnded: _child_ended,
    ev.RunCancelRequested: _cancel_requested,
    ev.RunFinished: _run_finished,
    ev.WaitStarted: _wait_started,
    ev.WaitEnded: _wait_ended,
    ev.AttemptHeld: _attempt_held,
    ev.ApprovalExpired: _approval_expired,
    ev.RunPaused: _run_paused,
    ev.RunResumed: _run_resumed,
}


# --- rows and tallies ---------------------------------------------------------------------------------------------------


Place = tuple[int, str]  # when a run was started (Unix milliseconds), and its id


def _place(row: RunRow) -> Place:
    return row.started_ms, row.run_id


class Changed(NamedTuple):
    """What an entry changed: its run's row, if it was not known, and tallies."""

    row: RunRow | None
    tallies: list[Tally]


class LiveView:
    """Rows by run id, and tallies, of the partitions that are ours."""

    def __init__(
        self,
        rows: Iterable[RunRow] = (),
        tallies: Iterable[Tally] = (),
        *,
        log: str = "",
        keep_minutes: int = DEFAULT_KEEP_MINUTES,
    ) -> None:
        """`log`: id of the topic that is read; tallies of another one are left out."""
        self.rows = {row.run_id: row for row in rows}
        self._order = sorted(map(_place, self.rows.values()))
        self.tallies = Tallies(tallies, log)
        self._keep_minutes = keep_minutes

    def take(self, entry: Entry, partition: int, offset: int) -> Changed:
        """Fold the entry of an offset. What is known of it already, by its row or by a tally, is not counted there again."""
        row = self.rows.get(entry.subject) or RunRow(run_id=entry.subject)
        # Whether the row holds the entry or not: rows of an earlier version have no notes.
        has_learned = learn(row.functions, entry.events)
        before = _place(row)
        is_new = apply(row, entry)
        if is_new:
            if before != _place(row) or row.run_id not in self.rows:
                self._unplace(before)
                bisect.insort(self._order, _place(row))
            self.rows[row.run_id] = row
        tallies = self.tallies.take(entry, row.functions, partition, offset)
        return Changed(row if is_new or (has_learned and row.seq) else None, tallies)

    def forget(self, run_id: str) -> None:
        """Remove a row."""
        row = self.rows.pop(run_id, None)
        if row is not None:
            self._unplace(_place(row))

    def newest_first(self, before: Place) -> Iterator[RunRow]:
        """Yield the rows that lie before a place, those started last first. What is asked for must not wait in between."""
        for index in reversed(range(bisect.bisect_left(self._order, before))):
            yield self.rows[self._order[index][1]]

    def _unplace(self, place: Place) -> None:
        index = bisect.bisect_left(self._order, place)
        if index < len(self._order) and self._order[index] == place:
            del self._order[index]

    def outdated(self, now_ms: int) -> list[str]:
        """Return the runs that are over, or never were, and have not changed for as long as they are kept."""
        since_ms = now_ms - self._keep_minutes * MINUTE_MS
        return [
            row.run_id
            for row in self.rows.values()
            if row.updated_ms < since_ms and (row.is_over or row.status == states.ABSENT)
        ]

    def outdated_tallies(self, now_ms: int) -> list[str]:
        """Return the keys of tallies of hours that are over for as long as they are kept."""
        return self.tallies.outdated(self.kept_since(now_ms // MINUTE_MS))

    def kept_since(self, now_minute: int) -> int:
        """Return the first minute that figures are kept of; what is older is forgotten hour by hour."""
        return now_minute - self._keep_minutes


# --- the log ------------------------------------------------------------------------------------------------------------


class PartitionReader:
    """Reads one partition of `run-events` in order and gives the entries that count. `next_offset` is what comes next."""

    def __init__(self, next_offset: int, epoch: int = NO_EPOCH) -> None:
        """`epoch`: the one in force at `next_offset`."""
        self.next_offset = next_offset
        self.void_count = 0
        self._tracker = EpochTracker(epoch)

    def take(self, offset: int, value: bytes | None) -> Entry | None:
        """Return the record's entry; None for tombstones, announcements and void entries. Raises DecodeError."""
        self.next_offset = offset + 1
        if value is None:
            return None
        record = codec.decode(value)
        if isinstance(record, OwnerAnnounced):
            self._tracker.announced(offset, record.epoch)
            return None
        if not isinstance(record, Entry):
            raise codec.DecodeError(f"a {type(record).__name__} has no business in run-events")
        if not self._tracker.is_valid(record.epoch):
            self.void_count += 1
            return None
        return record
