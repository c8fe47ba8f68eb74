"""Admission, decided: one public request in, a command and perhaps a dead letter out. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog

from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.identity import DEFAULT_ACCOUNT, run_id_of_request
from tidegate.domain.messages import DeadLetter, RunCommand, WorkflowPublished
from tidegate.domain.requests import (
    ApproveRequest,
    CancelRequest,
    PauseRequest,
    RejectRequest,
    RequestError,
    RespondRequest,
    ResumeRequest,
    SignalRequest,
    StartRequest,
    parse_request,
)
from tidegate.domain.workflow import AGENT_PREFIX, DefinitionError, compile_definition
from tidegate.eventlog.interface import EventLogError, Message
from tidegate.eventlog.letters import MAX_ORIGINAL_BYTES, MAX_REASON_CHARACTERS, dead_letter
from tidegate.eventlog.tables import Unreadable

_log = structlog.get_logger()

MAX_REASON: Final = 500
Lookup = Callable[[str], WorkflowPublished | Unreadable | None]
Command = CancelRequest | ApproveRequest | RejectRequest | RespondRequest | SignalRequest | PauseRequest | ResumeRequest


class Admitted(NamedTuple):
    """What a request becomes. A refused start becomes both a dead letter and a `refuse` command, if it has a run id."""

    command: RunCommand | None
    letter: DeadLetter | None


def admit(message: Message, lookup: Lookup, now_ms: int, *, max_bytes: int, horizon_ms: int) -> Admitted:
    """Judge a request by its form and by the workflows that are published. `lookup` takes `name` or `name@version`.

    Raises EventLogError if the lookup does.
    """
    data = message.value or b""
    request = None
    try:
        if now_ms - message.timestamp_ms > horizon_ms:
            raise RequestError(
                "too_old", f"the request is older than {horizon_ms // 1000} s and was not admitted", None
            )
        request = parse_request(data, max_bytes=max_bytes, decode=codec.decode)
        if isinstance(request, StartRequest):
            return Admitted(_start(message, request, lookup, now_ms), None)
    except RequestError as error:
        return _refused(message, error, now_ms)
    except EventLogError:
        raise  # the workflow could not be looked up: that is no fault of the request, which is read again
    except Exception as error:  # nothing that somebody sends may stop admission for everybody
        _log.exception("request not judged", partition=message.partition, offset=message.offset)
        run_id = getattr(request, "run_id", None)
        if request is not None and run_id is None:
            run_id = run_id_of_request(message.topic, message.partition, message.offset)
        reason = f"the request could not be judged: {type(error).__name__}: {error}"[:MAX_REASON]
        return _refused(message, RequestError("internal_error", reason, run_id), now_ms)
    source = _source(message)
    return Admitted(
        RunCommand(
            run_id=request.run_id,
            command_id=request.command_id or source,
            type=request.type,
            source=source,
            content_hash=request.content_hash(),
            original=data[:MAX_ORIGINAL_BYTES],
            by=request.by or "",
            at_ms=now_ms,
            **_fields(request),
        ),
        None,
    )


def _fields(request: Command) -> dict[str, Any]:
    """Return what a type of command has besides what all have."""
    if isinstance(request, SignalRequest):
        return {"event": request.event, "key": request.key, "value": canonical.dumps(request.payload)}
    fields: dict[str, Any] = {"reason": request.reason or ""}
    if isinstance(request, ApproveRequest | RejectRequest | RespondRequest):
        fields |= {"step_id": request.step_id or "", "attempt": request.attempt or 0, "why": request.why or ""}
        fields["question"] = request.question or ""
    if isinstance(request, RespondRequest):
        fields["value"] = canonical.dumps(request.value)
    return fields


def _source(message: Message) -> str:
    return f"{message.topic}:{message.partition}:{message.offset}"


def _start(message: Message, request: StartRequest, lookup: Lookup, now_ms: int) -> RunCommand:
    run_id = request.run_id or run_id_of_request(message.topic, message.partition, message.offset)
    wanted = request.workflow or f"{AGENT_PREFIX}{request.agent}"
    published = lookup(wanted)
    if published is None:
        raise RequestError("unknown_workflow", f"there is no workflow {wanted!r}; publish it first", run_id)
    if isinstance(published, Unreadable):
        raise RequestError("unknown_workflow", f"workflow {wanted!r}: {published}; publish it again", run_id)
    try:
        workflow = compile_definition(published.definition)
    except DefinitionError as error:
        raise RequestError("invalid_definition", str(error), run_id) from None
    problem = workflow.input_problem(request.input)
    if problem is not None:
        raise RequestError("invalid_input", problem, run_id)
    source = _source(message)
    return RunCommand(
        run_id=run_id,
        command_id=request.command_id or source,
        type="start",
        source=source,
        content_hash=request.content_hash(),
        original=(message.value or b"")[:MAX_ORIGINAL_BYTES],
        account=request.account or DEFAULT_ACCOUNT,
        workflow=workflow.label,
        definition_hash=workflow.definition_hash,
        definition=published.definition,
        input=canonical.dumps(request.input),
        budget_micros=request.budget_micros,
        tags=request.tags,
        at_ms=now_ms,
        priority=request.priority,
        failure_mode=request.failure_mode or "",
        prefer=request.prefer or "",
    )


def _refused(message: Message, error: RequestError, now_ms: int) -> Admitted:
    data = message.value or b""
    letter = dead_letter(
        message, service="scheduler", code=error.code, reason=error.reason, run_id=error.run_id or "", at_ms=now_ms
    )
    if not error.run_id:
        return Admitted(None, letter)
    source = _source(message)
    command = RunCommand(
        run_id=error.run_id,
        command_id=source,
        type="refuse",
        source=source,
        content_hash=hashlib.sha256(data).hexdigest(),
        original=b"",
        account=DEFAULT_ACCOUNT,
        code=error.code,
        reason=error.reason[:MAX_REASON_CHARACTERS],
        at_ms=now_ms,
    )
    return Admitted(command, letter)
