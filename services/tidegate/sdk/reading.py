"""What `run-events` says of a run: void entries left out, folded by the one function that folds runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from tidegate import codec
from tidegate.domain import canonical, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.graph_changes import FLOW, merged
from tidegate.domain.questions import question_id
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.epochs import stated_epoch
from tidegate.eventlog.interface import EventLogError, Message
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER, EpochTracker

RUN_EVENTS: Final = "run-events"
ANSWERS: Final = (
    ev.ApprovalResolved,
    ev.CommandRefused,
    ev.RunCancelRequested,
    ev.RunPaused,
    ev.RunResumed,
    ev.SignalReceived,
    ev.WaitEnded,
)


class Event(NamedTuple):
    """A fact about a run. `type` is the name of its record, `data` the record itself; `at_ms` Unix milliseconds."""

    seq: int
    at_ms: int
    type: str
    data: Any


class Approval(NamedTuple):
    """A question that waits for a human: may this attempt run? `arguments` is what it would be called with.

    why: `policy`; `outcome_unknown`: it may have had its effect already; or `change`: the step has run and wants to change the
    graph of its run, by `arguments`. expires_at_ms: 0 for never. rule, policy: who asks, and the version of its document, empty if
    it is no rule. arguments_hash: SHA-256 of the arguments that are asked about. question: names this very question in an answer.
    """

    step_id: str
    function: str
    arguments: Any
    why: str
    reason: str
    rule: str
    attempt: int
    expires_at_ms: int
    policy: str = ""
    arguments_hash: str = ""
    question: str = ""


class Wait(NamedTuple):
    """What a step waits for. kind: `ask`, `wait_event`, `wait_until`, `sleep`, or `outside`: a tool that somebody outside does.

    prompt, choices, free_text, schema: of a question; schema is JSON, None for none. event, key: of an event. function,
    arguments: of an outside tool, with its description as prompt, the model's id of the call as key (empty if a flow calls it),
    and as schema what the answer must fit. due_ms: when a time comes; timeout_at_ms: when it is given up. Both are Unix
    milliseconds, 0 for never.
    """

    step_id: str
    kind: str
    prompt: str
    choices: tuple[str, ...]
    free_text: bool
    schema: Any
    event: str
    key: str
    due_ms: int
    timeout_at_ms: int
    function: str = ""
    arguments: Any = None


class Run(NamedTuple):
    """A run as the log has it up to event `seq`.

    status: `running`, `waiting` (for the `approvals` or `waits`), `succeeded`, `failed`, `cancelled` or `refused`; code and
    reason say why it ended badly. paused: by somebody, so that nothing further starts. held: steps that would start if nothing
    was paused. changes: the steps whose changes of the graph were accepted, in that order. spent_micros: what its attempts have
    cost so far, in micro-dollars.
    """

    run_id: str
    status: str
    workflow: str
    account: str
    output: Any
    code: str
    reason: str
    approvals: tuple[Approval, ...]
    spent_micros: int
    seq: int
    started_ms: int
    finished_ms: int
    waits: tuple[Wait, ...] = ()
    paused: bool = False
    held: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def is_over(self) -> bool:
        """Tell whether nothing further will happen."""
        return self.status in states.RUN_TERMINAL

    @property
    def needs_human(self) -> bool:
        """Tell whether it waits for somebody to approve, reject or answer."""
        return bool(self.approvals) or any(wait.kind in (waits.ASK, waits.OUTSIDE) for wait in self.waits)


class ValidEntries:
    """Tells the valid entries of a partition from announcements and from what zombies wrote. Messages come in order."""

    def __init__(self) -> None:
        self._tracker = EpochTracker()

    def admits(self, message: Message) -> bool:
        """Take a message into account; returns whether it is a valid entry. What nobody of ours wrote is not."""
        if message.value is None:
            return False
        headers = dict(message.headers)
        stated = headers.get(EPOCH_HEADER)
        if headers.get(TYPE_HEADER) == ANNOUNCEMENT_TYPE.encode():
            is_first = stated == b"%d" % NO_EPOCH
            epoch = NO_EPOCH if is_first else stated_epoch(stated or b"", message.offset)
            if is_first or epoch != NO_EPOCH:
                self._tracker.announced(message.offset, epoch)
            return False
        epoch = stated_epoch(stated or b"", message.offset)
        # An owner writes nothing before its announcement: a higher epoch in an entry proves an announcement that lies
        # before the place where the reading began.
        if epoch > self._tracker.epoch:
            self._tracker.announced(message.offset, epoch)
        return epoch != NO_EPOCH and self._tracker.is_valid(epoch)


class GapError(EventLogError):
    """Entries of a run are missing before those that were read."""


class RunReader:
    """Folds a run from its valid entries, in order."""

    def __init__(self, run_id: str, decode: Callable[[bytes | None], Any] = codec.decode) -> None:
        self._decode = decode
        self._state = RunState(run_id)
        self._account = ""
        self._spent_micros = 0
        self._calls: dict[str, str] = {}  # of flows: by turn, the change that its calls are
        self.answered: set[str] = set()
        """The ids of the commands that the run has answered."""

    @property
    def state(self) -> RunState:
        """Return the folded run, which goes on changing as more is read."""
        return self._state

    @property
    def exists(self) -> bool:
        """Tell whether the run was found."""
        return self._state.status != states.ABSENT

    def read(self, entries: Iterable[Message]) -> list[Event]:
        """Fold entries; return their events. Raises GapError, DecodeError, IllegalTransitionError."""
        return [event for message in entries for event in self._fold(self._decode(message.value))]

    def _fold(self, entry: Any) -> list[Event]:
        if entry.first_seq != self._state.seq + 1:
            raise GapError(f"run {entry.subject}: event {entry.first_seq} follows {self._state.seq}")
        self._account = entry.account
        events = []
        for number, event in enumerate(entry.events):
            apply(self._state, event, entry.now_ms)
            self._spent_micros += getattr(event, "actual_micros", 0)
            if isinstance(event, ANSWERS):
                self.answered.add(event.command_id)
            if isinstance(event, ev.GraphChangeProposed) and event.kind == FLOW:
                self._calls[event.step_id] = event.change
            events.append(Event(entry.first_seq + number, entry.now_ms, type(event).__name__, event))
        return events

    def run(self) -> Run:
        """Return the run as far as it was read."""
        state = self._state
        return Run(
            run_id=state.run_id,
            status=state.status,
            workflow=state.workflow_label,
            account=self._account,
            output=canonical.loads(state.output) if state.output else None,
            code=state.code,
            reason=state.reason,
            approvals=tuple(
                Approval(
                    step.step_id,
                    step.call.function,
                    canonical.loads(step.proposal.change if step.proposal else step.call.arguments),
                    step.approval.why,
                    step.approval.reason,
                    step.approval.rule,
                    step.approval.attempt,
                    step.approval.expires_at_ms,
                    step.approval.policy,
                    step.approval.arguments_hash,
                    question_id(step.approval),
                )
                for step in state.open_approvals()
                if step.approval is not None
            ),
            spent_micros=self._spent_micros,
            seq=state.seq,
            started_ms=state.started_ms,
            finished_ms=state.finished_ms,
            waits=tuple(_wait(step.wait) for step in state.open_waits() if step.wait is not None),
            paused=state.paused is not None and not state.is_over,
            held=tuple(step.step_id for step in state.held_steps()),
            changes=tuple(change.step_id for change in state.changes),
        )

    def graph(self, *, calls: bool = False) -> dict[str, Any]:
        """Return the definition that the run has pinned, with the changes that its graph has had since.

        calls: with those that its flows have made, as nodes named like their steps. That is a picture, and no definition.
        """
        state = self._state
        if state.workflow is None:
            return {}
        made = self._calls.values() if calls else ()
        changes = [*(change.change for change in state.changes), *made]
        return merged(canonical.loads(state.workflow.definition), changes)


def _wait(started: ev.WaitStarted) -> Wait:
    return Wait(
        step_id=started.step_id,
        kind=started.kind,
        prompt=started.prompt,
        choices=started.choices,
        free_text=started.free_text,
        schema=canonical.loads(started.schema) if started.schema else None,
        event=started.event,
        key=started.key,
        due_ms=started.due_ms or 0,
        timeout_at_ms=started.timeout_at_ms or 0,
        function=started.function,
        arguments=canonical.loads(started.input) if started.kind == waits.OUTSIDE else None,
    )
