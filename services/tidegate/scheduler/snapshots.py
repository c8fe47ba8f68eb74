"""Runs as bytes and back, for snapshots and for the shelf. Disposable: a format that changed only means to fold the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from tidegate.domain.messages import Call
from tidegate.domain.run import RunState, StepState
from tidegate.domain.workflow import Workflow, compile_definition

# Counts up with every change of the fields of RunState and StepState, or of what they mean.
SNAPSHOT_FORMAT: Final = 2

NO_CALL: Final = Call(
    kind="", function="", queue="", arguments="", timeout_ms=0, reserve_micros=0, idempotent=True
)  # of a step whose run is over: nobody will ask for it again


def _definition_hash(value: Any) -> str:
    if not isinstance(value, Workflow):
        raise TypeError(f"a {type(value).__name__} in a run")
    return value.definition_hash


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_definition_hash)


def dump(run: RunState) -> bytes:
    """Return the run's state, definition by its hash. Of a run that is over, only what its further messages need."""
    return _encoder.encode((SNAPSHOT_FORMAT, _stub(run) if run.workflow is None or run.is_over else run))


def load(data: bytes, definitions: Mapping[str, str]) -> RunState:
    """Return the run. Raises ValueError on another format, KeyError for an unknown definition, msgspec.DecodeError."""

    def compiled(_: type, definition_hash: Any) -> Workflow:
        return compile_definition(definitions[definition_hash])

    version, rest = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
    if version != SNAPSHOT_FORMAT:
        raise ValueError(f"a snapshot of format {version}, not {SNAPSHOT_FORMAT}")
    return msgspec.msgpack.decode(rest, type=RunState, dec_hook=compiled)


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
    return StepState(
        step_id=step.step_id,
        node_id="",
        wave=0,
        call=NO_CALL,
        status=step.status,
        attempt=step.attempt,
        instance_id=step.instance_id,
        incarnation=step.incarnation,
        reported=step.reported,
    )
