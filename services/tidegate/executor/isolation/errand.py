"""What is sent to where a function runs apart from its executor, and what comes back: one JSON line each."""

from __future__ import annotations

import datetime
from typing import Final

import msgspec

from tidegate.domain.graph_changes import MAX_CHANGE_BYTES
from tidegate.domain.messages import Call, StepTask
from tidegate.executor.endings import Ending
from tidegate.sdk.context import StepContext
from tidegate.sdk.functions import Settings

CONTROL_BYTES: Final = 128 * 1024  # more than any line holds besides an output and a change
MAX_LINE_FACTOR: Final = 2  # JSON text within JSON text at most doubles


def context_of(task: StepTask, call: Call, deadline: datetime.datetime) -> StepContext:
    """Return what a function can ask of its attempt."""
    return StepContext(
        run_id=task.run_id,
        step_id=task.step_id,
        attempt=task.attempt,
        account=task.account,
        function=call.function,
        idempotency_key=task.idempotency_key,
        deadline=deadline,
        provider=call.provider,
        model=call.model,
        operation=call.operation,
        agent=call.agent,
        rule=task.rule,
        policy=task.policy,
        reserved_micros=task.reserved_micros,
    )


def deadline_after(timeout_ms: int) -> datetime.datetime:
    """Return the deadline of a function that is entered now."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(milliseconds=timeout_ms)


class Errand(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, for a process that knows nothing else. app: as on the command line of the executor.

    context: of the attempt, but for its deadline, which begins when the function is entered. memory_mib: the most that the
    process may use, 0 for no limit of its own. enter_before_ms: not to be entered after this moment (Unix milliseconds), 0 if
    somebody is asked right before. instance_id: whose name log lines bear.
    """

    app: str
    kind: str
    function: str
    arguments: str
    timeout_ms: int
    idempotent: bool
    context: StepContext
    output_max_bytes: int
    instance_id: str
    memory_mib: int = 0
    enter_before_ms: int = 0

    @property
    def line_max_bytes(self) -> int:
        """Return how long a line of the answer may be."""
        return (self.output_max_bytes + MAX_CHANGE_BYTES) * MAX_LINE_FACTOR + CONTROL_BYTES


def errand_of(task: StepTask, call: Call, settings: Settings, *, app: str, output_max_bytes: int) -> Errand:
    """Return the errand of a task whose function has these settings. output_max_bytes: what the executor takes."""
    return Errand(
        app=app,
        kind=call.kind,
        function=call.function,
        arguments=call.arguments,
        timeout_ms=call.timeout_ms,
        idempotent=call.idempotent,
        context=context_of(task, call, deadline_after(call.timeout_ms)),
        output_max_bytes=output_max_bytes,
        instance_id=task.instance_id,
        memory_mib=settings.memory_mib,
    )


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The app is loaded and the arguments fit: the function can be entered."""


class Reported(msgspec.Struct, frozen=True, tag=True):
    """All that the function has reported to have cost and used so far."""

    cost_micros: int | None
    usage: dict[str, int]


class Ended(msgspec.Struct, frozen=True, tag=True):
    """How the function ended, and when it ran (Unix milliseconds; 0 if it was not entered). Nothing comes after it."""

    ending: Ending
    started_ms: int = 0
    finished_ms: int = 0


Line = Ready | Reported | Ended

_decode_line: Final = msgspec.json.Decoder(Ready | Reported | Ended).decode
_decode_errand: Final = msgspec.json.Decoder(Errand).decode


def to_line(value: Errand | Line) -> bytes:
    """Return a value as one line, its end included."""
    return msgspec.json.encode(value) + b"\n"


def errand_in(line: bytes) -> Errand:
    """Return the errand of a line. Raises ValueError."""
    return _decode_errand(line)


def line_in(line: bytes) -> Line:
    """Return what a line of the answer says. Raises ValueError."""
    said: Line = _decode_line(line)
    return said
