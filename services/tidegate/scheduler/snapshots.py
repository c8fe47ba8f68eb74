"""Runs as bytes and back, for snapshots and for the shelf. Disposable: a format that changed only means to fold the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidegate.domain import states
from tidegate.domain.messages import Call
from tidegate.domain.run import RunState, StepState, graph_of
from tidegate.domain.workflow import Workflow, pinned_definition
from tidegate.scheduler import waits

# Counts up with every change of the fields of RunState and StepState, or of what they mean.
SNAPSHOT_FORMAT: Final = 10

NO_CALL: Final = Call(
    kind="", function="", queue="", arguments="", timeout_ms=0, reserve_micros=0, idempotent=True
)  # of a step whose run is over: nobody will ask for it again


class Outlook(msgspec.Struct, frozen=True, array_like=True):
    """What must be known of a run while it lies on the shelf. It stands before its state, to be read without it.

    quiet_since_ms: since when no attempt of it is out; null if one is. times: (due ms, step, attempt). queues: of held steps.
    definition_hash: of what its state cannot be read without; empty if there is no such thing.
    """

    quiet_since_ms: int | None
    times: tuple[tuple[int, str, int], ...]
    queues: tuple[str, ...]
    definition_hash: str


def quiet_since_ms(run: RunState) -> int | None:
    """Return since when nothing of the run is out at the gate or an executor; None if something is."""
    for step in run.steps.values():
        if step.status in (states.REQUESTED, states.DISPATCHED):
            return None
    return run.changed_ms


def _outlook_of(run: RunState) -> Outlook:
    if run.is_over:
        return Outlook(None, (), (), "")
    times = ((waits.due_ms(run, step), step) for step in run.steps.values())
    return Outlook(
        quiet_since_ms(run),
        tuple((due_ms, step.step_id, step.attempt) for due_ms, step in times if due_ms is not None),
        tuple({step.call.queue: None for step in run.held_steps()}),
        "" if run.workflow is None else run.workflow.definition_hash,
    )


def _definition_hash(value: Any) -> str:
    if not isinstance(value, Workflow):
        raise TypeError(f"a {type(value).__name__} in a run")
    return value.definition_hash


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_definition_hash)


def dump(run: RunState) -> bytes:
    """Return the run's state, definition by its hash. Of a run that is over, only what its further messages need."""
    state = _stub(run) if run.workflow is None or run.is_over else run
    return _encoder.encode((SNAPSHOT_FORMAT, _outlook_of(run), state))


def load(data: bytes, definitions: Mapping[str, str]) -> RunState:
    """Return the run. Raises ValueError on another format, KeyError for an unknown definition, msgspec.DecodeError."""

    def compiled(_: type, definition_hash: Any) -> Workflow:
        return pinned_definition(definitions[definition_hash])

    run = msgspec.msgpack.decode(_parts(data)[2], type=RunState, dec_hook=compiled)
    if run.changes:
        run.workflow = graph_of(run)
    return run


def outlook(data: bytes) -> Outlook:
    """Return what a run's bytes say without its state. Raises ValueError on another format, msgspec.DecodeError."""
    return _outlook_decoder.decode(_parts(data)[1])


def _parts(data: bytes) -> list[msgspec.Raw]:
    parts = _parts_decoder.decode(data)
    version = msgspec.msgpack.decode(parts[0])
    if version != SNAPSHOT_FORMAT:
        raise ValueError(f"a snapshot of format {version}, not {SNAPSHOT_FORMAT}")
    return parts


_parts_decoder: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_outlook_decoder: Final = msgspec.msgpack.Decoder(Outlook)


def _stub(run: RunState) -> RunState:
    """Return what deciding on a late message looks at: who it was, how it ended, which attempts have reported."""
    return RunState(
        run_id=run.run_id,
        account=run.account,
        status=run.status,
        seq=run.seq,
        head=run.head,
        changed_ms=run.changed_ms,
        content_hash=run.content_hash,
        command_ids=run.command_ids,
        steps={step_id: _step_stub(step) for step_id, step in run.steps.items()},
    )


def _step_stub(step: StepState) -> StepState:
    """What a late result is judged by: whether it is this attempt's, and what its tokens cost."""
    call = step.call
    return StepState(
        step_id=step.step_id,
        node_id="",
        wave=0,
        call=msgspec.structs.replace(NO_CALL, provider=call.provider, model=call.model) if call.model else NO_CALL,
        status=step.status,
        attempt=step.attempt,
        instance_id=step.instance_id,
        incarnation=step.incarnation,
        reported=step.reported,
    )
