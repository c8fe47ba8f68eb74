"""What follows from a run entry: one message to the gate, commands to other runs, dead letters for refusals.

Pure; sending again is the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from tidegate.domain import run_events as ev
from tidegate.domain.canonical import digest
from tidegate.domain.entry import Entry, Part, Position
from tidegate.domain.identity import account_root, entry_key, partition_of, source_of
from tidegate.domain.messages import (
    Amounts,
    Approve,
    Authorise,
    CloseRun,
    DeadLetter,
    GateItem,
    GateRequest,
    OpenRun,
    Release,
    RunCommand,
    Settle,
    Void,
)
from tidegate.domain.workflow import pinned_definition
from tidegate.eventlog.machine import Tell, tells_of_parts

GATE_REQUESTS: Final = "gate-requests"
RUN_COMMANDS: Final = "run-commands"
RUN_EVENTS: Final = "run-events"
DEAD_LETTERS: Final = "dead-letters"
MAX_REASON: Final = 4_000  # what a command may hold of one
_REFUSALS: Final = (ev.CommandRefused, ev.RunRefused)
_UNPAID: Final = frozenset({"busy", "released", "lost"})
_NEVER_RESERVED: Final = frozenset({"denied", "expired"})


def tells(entry: Entry, at: Callable[[int], Position], account_partitions: int, run_partitions: int) -> list[Tell]:
    """Return the messages that an entry of `run-events` causes, in the order in which they must be sent."""
    return tells_of_parts(entry, at, lambda part, at: _tells(part, at, account_partitions, run_partitions))


def _tells(part: Part, at: Callable[[int], Position], account_partitions: int, run_partitions: int) -> list[Tell]:
    events = part.events
    if TELLING.isdisjoint(map(type, events)):
        return []  # as of what allows an attempt
    items = [
        item
        for event in events
        if (make_item := _GATE_ITEMS.get(type(event))) is not None and (item := make_item(event)) is not None
    ]
    items = _without_what_is_taken_back(items)
    found: list[Tell] = []
    if items:
        request = GateRequest(run_id=part.subject, account=part.account, source=at(0), items=tuple(items))
        partition = partition_of(account_root(part.account), account_partitions)
        key = entry_key(part.subject, part.first_seq, part.epoch)
        found.append(Tell(GATE_REQUESTS, partition, key, request))
    found += [
        _command(make(part, event, at(0)), run_partitions)
        for event in events
        if (make := _COMMANDS.get(type(event))) is not None
    ]
    found += [
        Tell(DEAD_LETTERS, 0, event.source, _dead_letter(part, event))
        for event in events
        if isinstance(event, _REFUSALS) and event.original
    ]
    return found


def _without_what_is_taken_back(items: list[GateItem]) -> list[GateItem]:
    """Leave out attempts that one entry asks for and cancels: the gate would ask, reserve and wait for what nobody wants."""
    void = {(item.step_id, item.attempt) for item in items if type(item) is Void}
    if not void:
        return items
    both = {(item.step_id, item.attempt) for item in items if type(item) is Authorise} & void
    return [
        item for item in items if not (isinstance(item, (Authorise, Void)) and (item.step_id, item.attempt) in both)
    ]


def _open(event: ev.RunStarted) -> GateItem:
    return OpenRun(
        budget_micros=event.budget_micros,
        workflow=event.workflow,
        tags=event.tags,
        priority=event.priority,
        request_id=event.command_id,
        parent_run_id=event.parent_run_id,
        has_children=bool(pinned_definition(event.definition).document.workflows),
    )


def _authorise_first(event: ev.StepReady) -> GateItem | None:
    return None if event.held else Authorise(step_id=event.step_id, attempt=1, call=event.call)


def _authorise_next(event: ev.AttemptRequested) -> GateItem:
    return Authorise(step_id=event.step_id, attempt=event.attempt, call=event.call)


def _resolve(event: ev.ApprovalResolved) -> GateItem | None:
    if event.why != "policy" or not event.command_id:
        return None  # the gate holds nothing: it was the run that asked, or the gate that answered
    if not event.approved:
        return Void(step_id=event.step_id, attempt=event.attempt)
    return Approve(step_id=event.step_id, attempt=event.attempt, by=event.by, arguments_hash=event.arguments_hash)


def _settle(event: ev.StepSucceeded) -> GateItem | None:
    if not event.attempt:
        return None  # a wait, or an output that a human gave: no attempt of it is to be paid
    return _settlement(event, "succeeded")


def _settlement(event: ev.StepSucceeded | ev.AttemptEnded | ev.ResultIgnored, outcome: str) -> Settle:
    """Return what an attempt that ran cost and used. One call, if the executor counted none."""
    usage = event.usage
    used = Amounts(
        input_tokens=usage.get("input_tokens", 0),
        output_tokens=usage.get("output_tokens", 0),
        calls=max(1, usage.get("calls", 1)),
        wall_ms=max(0, event.finished_ms - event.started_ms),
    )
    return Settle(
        step_id=event.step_id,
        attempt=event.attempt,
        actual_micros=event.actual_micros,
        outcome=outcome,
        used=used,
    )


def _end(event: ev.AttemptEnded | ev.ResultIgnored) -> GateItem | None:
    if event.outcome in _NEVER_RESERVED:
        return None
    if event.outcome in _UNPAID and not event.actual_micros:
        return Release(step_id=event.step_id, attempt=event.attempt, reason=event.outcome)
    return _settlement(event, "succeeded" if event.outcome == "proposed" else event.outcome)


def _void(event: ev.StepCancelled) -> GateItem | None:
    return Void(step_id=event.step_id, attempt=event.attempt) if event.attempt else None


def _close(_: ev.RunFinished) -> GateItem:
    return CloseRun()


_GATE_ITEMS: Final[dict[type, Callable[[Any], GateItem | None]]] = {
    ev.RunStarted: _open,
    ev.StepReady: _authorise_first,
    ev.AttemptRequested: _authorise_next,
    ev.ApprovalResolved: _resolve,
    ev.StepSucceeded: _settle,
    ev.AttemptEnded: _end,
    ev.ResultIgnored: _end,
    ev.StepCancelled: _void,
    ev.RunFinished: _close,
}


# --- to other runs ---------------------------------------------------------------


def _command(command: RunCommand, run_partitions: int) -> Tell:
    """Address a command. It has one id for ever: however often it is told, the run takes it once (rule 7)."""
    partition = partition_of(command.run_id, run_partitions)
    return Tell(RUN_COMMANDS, partition, f"{command.run_id}:{command.command_id}", command)


def _start_child(part: Part, event: ev.ChildStarted, at: Position) -> RunCommand:
    return RunCommand(
        run_id=event.child_run_id,
        command_id=f"start:{event.child_run_id}",
        type="start",
        source=_source(at),
        content_hash=digest("\n".join((part.subject, event.step_id, event.definition_hash, event.input))),
        original=b"",
        account=part.account,
        workflow=event.workflow,
        definition_hash=event.definition_hash,
        definition=event.definition,
        input=event.input,
        budget_micros=event.budget_micros,
        tags=event.tags,
        at_ms=part.now_ms,
        failure_mode=event.failure_mode,
        priority=event.priority,
        prefer=event.prefer,
        parent_run_id=part.subject,
        parent_step_id=event.step_id,
        paused=event.paused,
    )


def _pause_child(part: Part, event: ev.ChildPaused, at: Position) -> RunCommand:
    kind = "pause" if event.paused else "resume"
    return RunCommand(
        run_id=event.child_run_id,
        command_id=f"{kind}:{_source(at)}",
        type=kind,
        source=_source(at),
        content_hash="",
        original=b"",
        by=f"run {part.subject}",
        at_ms=part.now_ms,
    )


def _cancel_child(part: Part, event: ev.ChildCancelled, at: Position) -> RunCommand:
    return RunCommand(
        run_id=event.child_run_id,
        command_id=f"cancel:{event.child_run_id}",
        type="cancel",
        source=_source(at),
        content_hash="",
        original=b"",
        by=f"run {part.subject}",
        reason=event.reason[:MAX_REASON],
        at_ms=part.now_ms,
    )


def _tell_parent(part: Part, event: ev.EndReported, at: Position) -> RunCommand:
    output = next((other.output for other in part.events if isinstance(other, ev.RunFinished)), "")
    return RunCommand(
        run_id=event.parent_run_id,
        command_id=f"ended:{part.subject}",
        type="child_ended",
        source=_source(at),
        content_hash="",
        original=b"",
        step_id=event.parent_step_id,
        status=event.status,
        output=output,
        code=event.code,
        reason=event.reason[:MAX_REASON],
        at_ms=part.now_ms,
    )


def _source(at: Position) -> str:
    return f"{RUN_EVENTS}:{at.partition}:{at.offset}"


_COMMANDS: Final[dict[type, Callable[[Part, Any, Position], RunCommand]]] = {
    ev.ChildStarted: _start_child,
    ev.ChildCancelled: _cancel_child,
    ev.ChildPaused: _pause_child,
    ev.EndReported: _tell_parent,
}


TELLING: Final = frozenset((*_GATE_ITEMS, *_COMMANDS, *_REFUSALS))


def _dead_letter(part: Part, event: ev.CommandRefused | ev.RunRefused) -> DeadLetter:
    source = source_of(event.source)
    return DeadLetter(
        topic=source.topic,
        partition=source.partition,
        offset=source.offset,
        service="scheduler",
        code=event.code,
        reason=event.reason,
        run_id=part.subject,
        original=event.original,
        original_size=len(event.original),
        original_key=b"",
        headers={},
        at_ms=part.now_ms,
    )
