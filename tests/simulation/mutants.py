"""The code with one of its rules taken out: each must make the simulation fail, or the simulation does not see that rule.

A mutant is a context manager that patches the code; all of them are entered before the world is made and left after it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec

from simulation.executor import ExecutorLife
from tidegate import codec
from tidegate.domain import canonical, ledger_events, states
from tidegate.domain import run_events as ev
from tidegate.domain.messages import Approve, Void
from tidegate.domain.run import RunState
from tidegate.eventlog import owned, owner, restore
from tidegate.eventlog.checkpoints import Checkpointer
from tidegate.eventlog.draft import Draft
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.owner import OwnerLoop
from tidegate.eventlog.validity import EpochTracker
from tidegate.executor import decide as executor_decide
from tidegate.executor import holdings
from tidegate.gate import decide as gate_decide
from tidegate.gate import family, leasing
from tidegate.gate import tells as gate_tells
from tidegate.gate.placement import Executors
from tidegate.gate.policy import PolicySet, Verdict
from tidegate.gate.state import HELD, Bucket
from tidegate.registry.lease import Lease
from tidegate.scheduler import attempts as scheduler_attempts
from tidegate.scheduler import commands as scheduler_commands
from tidegate.scheduler import decide as scheduler_decide
from tidegate.scheduler import holding
from tidegate.scheduler import tells as scheduler_tells
from tidegate.scheduler import waits as scheduler_waits
from tidegate.scheduler.service import SchedulerMachine

Patch = Callable[[], Any]


def _replaced(target: Any, name: str, value: Any) -> Patch:
    return lambda: mock.patch.object(target, name, value)


@contextmanager
def _several(*patches: Patch) -> Iterator[None]:
    with patches[0](), _several(*patches[1:]) if len(patches) > 1 else mock.patch.dict({}):
        yield


# --- rules of the log (1, 3, 4, 6, 7, 10) ---


def _acknowledged_anywhere(part: OwnedPartition, slot: list[int], offset: int) -> None:
    part.next_offset = offset + 1
    slot.append(offset)


_fold = OwnedPartition.fold


def _fold_unchecked(part: OwnedPartition, entry: Any, value: bytes, offset: int) -> None:
    if part.unconfirmed and entry.subject in part._covered(entry, offset):
        _fold(part, entry, value, offset)
        return
    with mock.patch.object(part.machine, "head", return_value=(entry.first_seq - 1, entry.prev_hash)):
        _fold(part, entry, value, offset)


_restore = restore.restore


def _restore_told(*arguments: Any) -> Any:
    return _restore(*arguments)._replace(untold=[])


def _told_at_once(told: Any, offset: int, count: int) -> list[int]:
    told.told = offset
    return [offset, count + 1]


def _positions_unchecked(loop: OwnerLoop, part: OwnedPartition) -> dict[Any, int]:
    positions = {}
    for topic in loop._input_topics:
        start, end = loop._broker.offsets(topic, part.partition)
        part.inputs[topic] = min(max(part.inputs.get(topic, start), start), end)
        positions[TopicPartition(topic, part.partition)] = part.inputs[topic]
    return positions


# --- rules of checkpoints (8) ---


def _write_uncounted(checkpointer: Checkpointer, key: str, snapshot: Any) -> None:
    part = checkpointer._part
    value = codec.encode(snapshot)
    checkpointer._send(Record(part.machine.snapshot_topic, part.partition, key.encode(), value, ()), None)


_fold_log = restore._fold


def _fold_nothing_after(broker: Any, part: Any, tracker: Any, begin: int, fold_from: int, stop: int, check: Any) -> Any:
    return _fold_log(broker, part, tracker, begin, stop if begin else fold_from, stop, check)


# --- rules of executors ---


_judge_task = executor_decide.judge_task


def _judge_any_incarnation(task: Any, *, incarnation: int, **rest: Any) -> Any:
    return _judge_task(task, incarnation=task.incarnation, **rest)


def _judge_without_marks(task: Any, *, marks: Any, **rest: Any) -> Any:
    return _judge_task(task, marks={}, **rest)


def _held_always(lease: Lease) -> bool:
    return True


def _acknowledged_always(lease: Lease, sent_at_s: float) -> bool:
    lease._until = sent_at_s + (lease._length_s or 0.0)
    return True


_expire = Executors.expire


def _expire_whatever_was_read(executors: Executors, table_version: int, unread: int) -> None:
    _expire(executors, table_version)


# --- rules of the scheduler and the gate ---


_on_command = scheduler_commands.on_command


def _command_always_new(run: Any, command: Any) -> Any:
    known, run.command_ids = run.command_ids, set()
    try:
        return _on_command(run, command)
    finally:
        run.command_ids = known


_on_lost = scheduler_decide._on_lost


def _lost_is_repeated(run: Any, step: Any, item: Any) -> Any:
    events = _on_lost(run, step, item)
    if events and isinstance(events[-1], ev.ApprovalRequested):
        return [events[0], scheduler_attempts.next_attempt(step)]
    return events


def _open_waits_and_some_that_ended(run: RunState) -> list[Any]:
    return [step for step in run.steps.values() if step.wait is not None and step.status != states.CANCELLED]


_on_due = scheduler_waits.on_due


def _kept_signal_stays(run: Any, step: Any, now_ms: int) -> Any:
    return [
        msgspec.structs.replace(event, signal_seq=0) if isinstance(event, ev.WaitEnded) else event
        for event in _on_due(run, step, now_ms)
    ]


_given_back = leasing.given_back


def _leases_kept(*arguments: Any) -> Any:
    return [event for event in _given_back(*arguments) if not isinstance(event, ledger_events.LeasesReturned)]


def _lacking_without_reserved(bucket: Bucket, amounts: tuple[int, ...]) -> int | None:
    return _lacking(msgspec.structs.replace(bucket, reserved=(0,) * len(amounts)), amounts)


_lacking = Bucket.lacking
_void = gate_decide._void


def _expired_is_approved(draft: Any, item: Any) -> None:
    attempt = draft.open_attempt(item)
    if attempt is None or attempt.status != HELD or not 0 < attempt.expires_at_ms <= draft.now_ms:
        _void(draft, item)
        return
    digest = canonical.digest(attempt.call.arguments)
    approve = Approve(step_id=item.step_id, attempt=item.attempt, by="nobody", arguments_hash=digest)
    gate_decide._approve(draft, approve)


_items_without_late_results = {k: v for k, v in scheduler_tells._GATE_ITEMS.items() if k is not ev.ResultIgnored}
_key_counter = itertools.count()


def _key_of_its_own(run_id: str, step_id: str) -> str:
    return f"{run_id}/{step_id}/{next(_key_counter)}"


_draft_add = Draft.add


def _positions_of_the_turn(draft: Draft, events: Any, block: Any, cause: Any, inputs: Any, marks: Any) -> None:
    """Record the positions as they are when the draft is sealed, the input included that another subject's entry will hold."""
    _draft_add(draft, events, block, cause, inputs, marks)
    draft._inputs = inputs


MUTANTS: dict[str, Patch] = {
    "epoch-rule": _replaced(EpochTracker, "is_valid", lambda tracker, epoch: True),
    "offset-gap": _replaced(OwnedPartition, "acknowledged", _acknowledged_anywhere),
    "receiver-marks": _replaced(OwnedPartition, "is_stale", lambda part, topic, record: False),
    "tell-again": _replaced(owner, "restore", _restore_told),
    "chain-check": _replaced(OwnedPartition, "fold", _fold_unchecked),
    "incarnation": _replaced(holdings, "judge_task", _judge_any_incarnation),
    "lapse": functools.partial(
        _several,
        _replaced(Lease, "held", _held_always),
        _replaced(Lease, "acknowledged", _acknowledged_always),
    ),
    "lease-clock": _replaced(ExecutorLife, "lease_clock_s", lambda life: life.monotonic_s()),
    "told-too-early": _replaced(owned._Told, "expect", _told_at_once),
    "refuse-lost-input": _replaced(OwnerLoop, "_checked_positions", _positions_unchecked),
    "checkpoint-too-early": _replaced(Checkpointer, "_write", _write_uncounted),
    "log-after-snapshots": _replaced(restore, "_fold", _fold_nothing_after),
    "task-marks": _replaced(holdings, "judge_task", _judge_without_marks),
    "timers": _replaced(SchedulerMachine, "due", lambda machine, state, now_ms, tables: None),
    "command-ids": _replaced(scheduler_commands, "on_command", _command_always_new),
    "once": _replaced(scheduler_decide, "_on_lost", _lost_is_repeated),
    "unknown-outcomes-ask": _replaced(scheduler_decide, "OUTCOME_UNKNOWN", frozenset()),
    "late-results": _replaced(scheduler_tells, "_GATE_ITEMS", _items_without_late_results),
    "idempotency-key": _replaced(gate_tells, "idempotency_key", _key_of_its_own),
    "budget": _replaced(family, "without_room", lambda ledger, run_id, run, micros: None),
    "policy": _replaced(PolicySet, "judge", lambda policies, variables: Verdict("allow", "default", "", "")),
    "gate-lease": _replaced(Executors, "expire", lambda executors, table_version, unread: None),
    "gate-lease-and-holes": _replaced(Executors, "expire", _expire_whatever_was_read),
    "gate-watch": _replaced(Executors, "watch", lambda executors, lives: None),
    "wait-ends-once": _replaced(RunState, "open_waits", _open_waits_and_some_that_ended),
    "kept-signals": _replaced(scheduler_waits, "on_due", _kept_signal_stays),
    "pause-of-runs": _replaced(holding, "_held", lambda event, why: event),
    "pause-at-the-gate": _replaced(Executors, "pause", lambda executors, is_paused: None),
    "leases-come-back": _replaced(leasing, "given_back", _leases_kept),
    "budgets-count-reserved": _replaced(Bucket, "lacking", _lacking_without_reserved),
    "expiry-is-no-yes": functools.partial(
        _several,
        _replaced(gate_decide, "lapses", lambda ledger, now_ms: []),
        lambda: mock.patch.dict(gate_decide._ITEMS, {Void: _expired_is_approved}),
    ),
    "draft-positions": _replaced(Draft, "add", _positions_of_the_turn),
    "parts-tell": _replaced(gate_tells, "tells_of_parts", lambda entry, at, tells: tells(entry, at)),
    "entry-keys": _replaced(owner, "entry_key", lambda subject, first_seq, epoch: f"{subject}:{first_seq}"),
}
