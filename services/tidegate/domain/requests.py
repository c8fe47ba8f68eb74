"""What users may ask: the requests of the public topic `run-requests`, as JSON or as Avro.

This is an edge where people make mistakes and deserve good answers, so it is the one module of `domain` that uses pydantic.
Both forms become the same models, and equal requests have equal `content_hash`es, whichever form they came in.

JSON is taken strictly. Refused: NaN and Infinity (JSON does not have them), lone surrogates (they have no UTF-8), nesting
beyond `MAX_DEPTH`, and an object that names a key twice: parsers disagree which one counts, so what a person or a policy
read in the request could differ from what would run.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Final, Literal, NoReturn

import msgspec
import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.json_schema import GenerateJsonSchema

from tidegate.domain import canonical
from tidegate.domain.identity import (
    ACCOUNT_PATTERN,
    DEFAULT_ACCOUNT,
    INSTANCE_ID_PATTERN,
    MAX_MICROS,
    NAME_PATTERN,
    RUN_ID_PATTERN,
)
from tidegate.domain.questions import QUESTION_PATTERN
from tidegate.domain.waits import MAX_KEY

DEFAULT_MAX_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 128
MAX_TAGS: Final = 32
DEFAULT_PRIORITY: Final = 5
AVRO_MARK: Final = b"\xc3\x01"  # no JSON text begins like this: it is not even UTF-8
WORKFLOW_PATTERN: Final = r"^(agent:)?[A-Za-z_][A-Za-z0-9_.-]{0,63}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?$"
STEP_ID_PATTERN: Final = r"^[A-Za-z0-9_][A-Za-z0-9_.:/#-]{0,511}$"
TAG_PATTERN: Final = r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,63}$"

Decode = Callable[[bytes], Any]

_run_id = re.compile(RUN_ID_PATTERN)
_made_run_id = re.compile(r"run-requests-\d+-\d+")  # see identity.run_id_of_request


class RequestError(ValueError):
    """A request that cannot be taken.

    code: `malformed` (not JSON, or not a RunRequest in Avro), `too_large`, or `invalid` (understood, but wrong). reason: a
    line per problem, each saying what to do. run_id: the run that the request wanted to start, if that much can be read of
    it, so that whoever waits for the run can be told; None otherwise, and always None for requests that start nothing.
    """

    def __init__(self, code: str, reason: str, run_id: str | None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.run_id = run_id


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The Avro form (`schemas/avro/RunRequest.v*.avsc`): the fields of all requests; a type's own may be set, no others.

    input, value, payload: JSON text. Where the others are null or at their default, they count as absent.
    """

    type: str = "start"
    run_id: str | None = None
    workflow: str | None = None
    agent: str | None = None
    input: str = "null"
    account: str = DEFAULT_ACCOUNT
    budget_micros: int | None = None
    tags: dict[str, str] = {}
    command_id: str | None = None
    step_id: str | None = None
    by: str | None = None
    reason: str | None = None
    attempt: int | None = None
    why: str | None = None
    value: str | None = None
    event: str | None = None
    key: str | None = None
    payload: str | None = None
    priority: int = DEFAULT_PRIORITY
    failure_mode: str | None = None
    question: str | None = None
    prefer: str | None = None


def _none_if_empty(text: str | None) -> str | None:
    return text or None


RunId = Annotated[str, Field(pattern=RUN_ID_PATTERN)]
StepId = Annotated[str, Field(pattern=STEP_ID_PATTERN)]
Person = Annotated[str | None, Field(max_length=256), AfterValidator(_none_if_empty)]
Attempt = Annotated[int, Field(ge=1, le=2**31)]
Reason = Annotated[str | None, Field(max_length=4096), AfterValidator(_none_if_empty)]
TagName = Annotated[str, Field(pattern=TAG_PATTERN)]
TagValue = Annotated[str, Field(max_length=256)]

# No colon: `topic:partition:offset` is the command id of requests that name none, and nobody may claim another's.
CommandId = Annotated[str, Field(pattern=RUN_ID_PATTERN)]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: str
    command_id: CommandId | None = Field(
        default=None,
        description="Name of this very request. Sent twice under one name it counts once. Not part of the request's content.",
    )

    def content_hash(self) -> str:
        """Return the SHA-256 (hex) of what is asked for: equal for JSON and Avro, with defaults spelled out or not.

        `command_id` names the sending, not the wish, and is left out. So are defaults: a field that a later version adds
        does not make old requests look different.
        """
        fields = {
            name: value for name, default in _defaults(type(self)).items() if (value := getattr(self, name)) != default
        }
        return canonical.digest(canonical.dumps({"type": self.type, **fields}))


@cache
def _defaults(model: type[_Request]) -> dict[str, Any]:
    """Return the fields that make up what is asked for, each with its default, which must not be changed."""
    return {
        name: field.get_default() for name, field in model.model_fields.items() if name not in ("type", "command_id")
    }


def _one_target(schema: dict[str, Any]) -> None:
    """Say in JSON Schema that exactly one of `workflow` and `agent` is given."""
    null = {"type": "null"}
    schema["oneOf"] = [
        {"required": ["workflow"], "properties": {"workflow": {"type": "string"}, "agent": null}},
        {"required": ["agent"], "properties": {"agent": {"type": "string"}, "workflow": null}},
    ]


class StartRequest(_Request):
    """Start a run of a workflow, or of an agent alone."""

    model_config = ConfigDict(json_schema_extra=_one_target)

    type: Literal["start"] = "start"
    run_id: RunId | None = Field(
        default=None,
        description="Id of the run. Without one it is made of the topic, partition and offset of the request. The same id "
        "with the same content again changes nothing; with other content it is refused.",
    )
    workflow: Annotated[str, Field(pattern=WORKFLOW_PATTERN)] | None = Field(
        default=None, description="`name` for the latest published version, or `name@version`."
    )
    agent: Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(
        default=None, description="Name of an agent to run alone, instead of a workflow."
    )
    input: Any = Field(default=None, description="Any JSON value; the workflow's `input_schema` may narrow it.")
    account: Annotated[str, Field(pattern=ACCOUNT_PATTERN)] = Field(
        default=DEFAULT_ACCOUNT, description="Slash path of the account that is billed, such as `acme/support`."
    )
    budget_micros: Annotated[int, Field(ge=0, le=MAX_MICROS)] | None = Field(
        default=None, description="The most that the run may cost, in micro-dollars; absent for no limit of its own."
    )
    tags: Annotated[dict[TagName, TagValue], Field(max_length=MAX_TAGS)] = Field(
        default={},
        description="Words to find the run by; policies can look at them too.",
        json_schema_extra={"additionalProperties": False},
    )
    priority: Annotated[int, Field(ge=0, le=9)] = Field(
        default=DEFAULT_PRIORITY,
        description="From 0 to 9. Where work waits for a slot or a limit, more goes first among the runs of the same account "
        "root; ten seconds of waiting make up for one level.",
    )
    failure_mode: Literal["fail_fast", "continue"] | None = Field(
        default=None,
        description="What a failed node means for the others in this run, instead of what the workflow says.",
    )
    prefer: Annotated[str, Field(pattern=INSTANCE_ID_PATTERN)] | None = Field(
        default=None,
        description="An executor, as `tidegate instances` lists it, that should run the steps of this run and of the runs below "
        "it. A wish: where it is not there, has no free slot or does not have the function, another one does.",
    )

    @pydantic.field_validator("run_id")
    @classmethod
    def _is_not_made(cls, value: str | None) -> str | None:
        if value is not None and _made_run_id.fullmatch(value):
            raise ValueError("`run_id`: ids like `run-requests-0-17` are kept for requests that name none")
        return value

    @pydantic.model_validator(mode="after")
    def _names_one_target(self) -> StartRequest:
        if problem := _target_problem(self.workflow, self.agent):
            raise ValueError(problem)
        return self


class CancelRequest(_Request):
    """Cancel a run: what runs is aborted, nothing further starts."""

    type: Literal["cancel"]
    run_id: RunId = Field(description="The run.")
    reason: Reason = Field(default=None, description="Why; recorded.")
    by: Person = Field(default=None, description="Who; recorded.")


class _Answer(_Request):
    run_id: RunId = Field(description="The run.")
    step_id: StepId | None = Field(
        default=None, description="The step that waits for approval; may be left out if exactly one does."
    )
    by: Person = Field(default=None, description="Who; recorded.")
    reason: Reason = Field(default=None, description="Why; recorded.")
    attempt: Attempt | None = Field(
        default=None,
        description="The attempt that the question is about. If the open question is about another: refused.",
    )
    why: Literal["policy", "outcome_unknown", "change"] | None = Field(
        default=None, description="Why it was asked. If the open question was asked for another reason: refused."
    )
    question: str | None = Field(
        default=None,
        pattern=QUESTION_PATTERN,
        description="The id of the question that is meant, as lists of approvals show it. If another one is open: refused.",
    )


class ApproveRequest(_Answer):
    """Approve the attempt of a step that waits for it."""

    type: Literal["approve"]


class RejectRequest(_Answer):
    """Reject the attempt of a step that waits for approval."""

    type: Literal["reject"]


class RespondRequest(_Answer):
    """Answer what a run waits for: a question, an event, or what became of an attempt whose outcome nobody knows."""

    type: Literal["respond"]
    step_id: StepId | None = Field(
        default=None, description="The step that waits; may be left out if exactly one does that can be answered."
    )
    value: Any = Field(
        default=None,
        description='The answer, as the question wants it; for an unknown outcome "again", "fail" or {"done": its result}.',
    )


class SignalRequest(_Request):
    """Send a run an event. If nothing waits for it yet, it is kept for what will."""

    type: Literal["signal"]
    run_id: RunId = Field(description="The run.")
    event: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(description="The event's name.")
    key: Annotated[str, Field(max_length=MAX_KEY)] | None = Field(
        default=None, description="Its correlation key; without one it fits every wait for the name."
    )
    payload: Any = Field(default=None, description="Any JSON value; becomes the output of the wait.")
    by: Person = Field(default=None, description="Who; recorded.")


class PauseRequest(_Request):
    """Pause a run: nothing further starts until it is resumed; what runs may end."""

    type: Literal["pause"]
    run_id: RunId = Field(description="The run.")
    reason: Reason = Field(default=None, description="Why; recorded.")
    by: Person = Field(default=None, description="Who; recorded.")


class ResumeRequest(_Request):
    """Resume a paused run."""

    type: Literal["resume"]
    run_id: RunId = Field(description="The run.")
    reason: Reason = Field(default=None, description="Why; recorded.")
    by: Person = Field(default=None, description="Who; recorded.")


Request = (
    StartRequest
    | CancelRequest
    | ApproveRequest
    | RejectRequest
    | RespondRequest
    | SignalRequest
    | PauseRequest
    | ResumeRequest
)

_MODELS: Final[dict[str, type[Request]]] = {
    "start": StartRequest,
    "cancel": CancelRequest,
    "approve": ApproveRequest,
    "reject": RejectRequest,
    "respond": RespondRequest,
    "signal": SignalRequest,
    "pause": PauseRequest,
    "resume": ResumeRequest,
}

_ID_RULE = "must be 1 to 128 letters, digits, dots, dashes and underscores, the first one a letter or digit"
_RULES: Final = {
    "run_id": f"{_ID_RULE}; ids like `run-requests-0-17` are kept for requests that name none",
    "command_id": _ID_RULE,
    "workflow": "must be `name` or `name@version`, such as `refunds@3`",
    "agent": "must be an agent's name: up to 64 letters, digits, dots, dashes and underscores, no digit first",
    "account": "must be up to 8 names joined by slashes, such as `acme/support`",
    "budget_micros": f"must be a whole number of micro-dollars from 0 to {MAX_MICROS} (a dollar is 1000000)",
    "tags": f"must be an object of at most {MAX_TAGS} tags",
    "priority": "must be a whole number from 0 to 9",
    "failure_mode": "must be `fail_fast` or `continue`",
    "prefer": "must be the name of an executor, such as `executor-default-0`: up to 120 letters, digits, dots, dashes and "
    "underscores",
    "step_id": "must be a step's id, such as `triage/2/tool:lookup_order`",
    "by": "must be a string of at most 256 characters",
    "reason": "must be a string of at most 4096 characters",
    "attempt": "must be a whole number from 1",
    "why": "must be `policy`, `outcome_unknown` or `change`",
    "question": "must be the id of a question, as `tidegate approvals list` shows it",
    "event": "must be an event's name: up to 64 letters, digits, dots, dashes and underscores, no digit first",
    "key": f"must be a string of at most {MAX_KEY} characters",
}
_TAG_NAME_RULE = "a tag's name must be up to 64 letters, digits, dots, dashes, slashes and underscores"
_TAG_VALUE_RULE = "must be a string of at most 256 characters"


def parse_request(data: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES, decode: Decode | None = None) -> Request:
    """Return the request in a record's value: JSON, or Avro if it begins like that. Raises RequestError; never blocks.

    decode: `codec.decode`, which reads Avro (the domain does not know the codec); without it only JSON is taken.
    """
    if len(data) > max_bytes:
        reason = f"the request has {len(data)} bytes, {max_bytes} are allowed: keep large input elsewhere and pass where it is"
        raise RequestError("too_large", reason, _run_to_start(data, decode))
    return validate(_from_avro(data, decode) if data.startswith(AVRO_MARK) else _from_json(data))


def validate(fields: Any) -> Request:
    """Return the request that a parsed JSON value is. Raises RequestError (`invalid`) with a line for every problem."""
    if not isinstance(fields, dict):
        raise RequestError("invalid", f"a request is a JSON object, not {_shown(fields)}", None)
    kind = fields.get("type", "start")
    model = _MODELS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise RequestError("invalid", f"`type`: must be one of {', '.join(_MODELS)} (is {_shown(kind)})", None)
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        problems = [_line(model, problem) for problem in error.errors(include_url=False)]
        target = _target_problem(fields.get("workflow"), fields.get("agent")) if model is StartRequest else None
        if target and target not in problems:  # pydantic looks at fields together only if each is fine alone
            problems.append(target)
        raise RequestError("invalid", "\n".join(problems), _usable_start(kind, fields.get("run_id"))) from None


def request_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of requests in JSON: what `schemas/json/run-request.v1.json` holds."""
    schema = pydantic.TypeAdapter(Request).json_schema(schema_generator=_WithoutTitles)
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Tidegate run request",
        "description": "A record of the topic run-requests, in JSON. Made from tidegate.domain.requests.",
        **schema,
    }


class _WithoutTitles(GenerateJsonSchema):
    """Leaves out the titles, which only repeat the names of fields."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


# --- from bytes ---------------------------------------------------------------------------------------------------------


def _from_json(data: bytes) -> Any:
    try:
        return parse_json(data)
    except canonical.NotJsonError as error:
        raise RequestError("malformed", f"the request is not JSON: {error}", None) from None


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON as strictly as the module says. Raises canonical.NotJsonError."""
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_constant=_no_constant)
        if "\\u" in text:
            canonical.dumps(value).encode()
    except UnicodeDecodeError as error:
        raise canonical.NotJsonError(f"it is not UTF-8 (byte {error.start})") from None
    except UnicodeEncodeError:
        raise canonical.NotJsonError("it has half of a surrogate pair (\\ud800 to \\udfff) in a string") from None
    except RecursionError:
        raise canonical.NotJsonError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        what = f"{error.msg} (line {error.lineno}, column {error.colno})" if text.strip() else "it is empty"
        raise canonical.NotJsonError(what) from None
    except canonical.NotJsonError:
        raise
    except ValueError:  # from Python's bound on the digits of a whole number
        raise canonical.NotJsonError("it has a whole number of too many digits") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise canonical.NotJsonError(_TOO_DEEP)
    return value


_TOO_DEEP: Final = f"it is nested deeper than {MAX_DEPTH} levels"


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise canonical.NotJsonError(f"it has the number {_cut(text)}, which is out of range")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise canonical.NotJsonError(f"an object has the key {_shown(name)} twice: leave one out")
            seen.add(name)
    return made


def _no_constant(name: str) -> NoReturn:
    raise canonical.NotJsonError(f"it has {name}, which JSON does not know")


def _is_deeper(value: Any, levels: int) -> bool:
    """Tell whether a value is nested deeper than that, without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for item in layer if isinstance(item, dict | list)]
        if not layer:
            return False
        layer = [item for outer in layer for item in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def _from_avro(data: bytes, decode: Decode | None) -> dict[str, Any]:
    record = _avro_record(data, decode)
    fields = {
        name: value
        for name, default in _AVRO_DEFAULTS.items()
        if (value := getattr(record, name)) is not None and value != default
    }
    for name in _JSON_TEXTS & fields.keys():
        try:
            fields[name] = parse_json(fields[name].encode())
        except canonical.NotJsonError as error:
            run_id = _usable_start(record.type, record.run_id)
            raise RequestError("invalid", f"`{name}`: must be JSON text: {error}", run_id) from None
    return fields


def _avro_record(data: bytes, decode: Decode | None) -> RunRequest:
    """Return the Avro form as it is. Raises RequestError (`malformed`)."""
    if decode is None:
        raise RequestError("malformed", "the request is in Avro: only JSON is taken here", None)
    try:
        record = decode(data)
    except ValueError as error:
        raise RequestError("malformed", f"the request is not a RunRequest in Avro: {error}", None) from None
    if not isinstance(record, RunRequest):
        raise RequestError("malformed", f"the request is a {type(record).__name__}, not a RunRequest", None)
    return record


_JSON_TEXTS: Final = frozenset({"input", "value", "payload"})
_AVRO_DEFAULTS: Final = {name: getattr(RunRequest(), name) for name in RunRequest.__struct_fields__}


# --- what can be said about a request that is wrong -----------------------------------------------------------------------


class _Head(msgspec.Struct):
    """The fields by which a run can be told that its request was refused. Everything else is skipped, not built."""

    type: Any = "start"
    run_id: Any = None


_head_decoder = msgspec.json.Decoder(_Head)


def _run_to_start(data: bytes, decode: Decode | None) -> str | None:
    """Return the run id of a start request that is too large to be looked at closely."""
    try:
        head = _avro_record(data, decode) if data.startswith(AVRO_MARK) else _head_decoder.decode(data)
    except (ValueError, RecursionError):
        return None
    return _usable_start(head.type, head.run_id)


def _usable_start(kind: Any, run_id: Any) -> str | None:
    return run_id if kind == "start" and isinstance(run_id, str) and _run_id.fullmatch(run_id) else None


def _target_problem(workflow: Any, agent: Any) -> str | None:
    if workflow is None and agent is None:
        return "name what to run: a `workflow` (`name` or `name@version`) or an `agent`"
    if workflow is not None and agent is not None:
        return "`workflow` and `agent` exclude each other: leave one out"
    return None


def _line(model: type[Request], problem: Any) -> str:
    """Return what to tell a person about one problem that pydantic found."""
    path = [str(part) for part in problem["loc"]]
    if not path:
        return str(problem["ctx"]["error"])
    name = path[0]
    if problem["type"] == "extra_forbidden":
        return f"`{_cut(name)}`: {_unknown_field(model, name)}"
    if problem["type"] == "missing":
        return f"`{name}`: is missing; it {_RULES[name]}"
    if name == "tags" and len(path) > 1:
        return (
            f"`tags`: {_TAG_NAME_RULE} (is {_shown(path[1])})"
            if path[-1] == "[key]"
            else f"`tags.{_cut(path[1])}`: {_TAG_VALUE_RULE} (is {_shown(problem['input'])})"
        )
    return f"`{name}`: {_RULES[name]} (is {_shown(problem['input'])})"


def _unknown_field(model: type[Request], name: str) -> str:
    fields = list(model.model_fields)
    kind = next(kind for kind, known in _MODELS.items() if known is model)
    close = difflib.get_close_matches(name, fields, 1) or [known for known in fields if known.startswith(name + "_")]
    hint = f"did you mean `{close[0]}`?" if close else f"it may have {', '.join(fields)}"
    return f"a {kind} request has no such field; {hint}"


def _shown(value: Any) -> str:
    """Return a value as JSON, short enough for a line."""
    if isinstance(value, dict | list):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    try:
        return _cut(canonical.dumps(value))
    except canonical.NotJsonError:
        return _cut(repr(value))


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
