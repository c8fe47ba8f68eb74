"""Public requests: what is taken, what is refused with which words, and that equal requests have equal contents."""

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate import codec
from tidegate.domain import requests
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.requests import (
    ApproveRequest,
    CancelRequest,
    RejectRequest,
    Request,
    RequestError,
    RunRequest,
    StartRequest,
    parse_request,
    request_json_schema,
)

TYPES = "start, cancel, approve, reject, respond, signal, pause, resume"
PREFER_RULE = (
    "must be the name of an executor, such as `executor-default-0`: "
    "up to 120 letters, digits, dots, dashes and underscores"
)
EVENT_RULE = "must be an event's name: up to 64 letters, digits, dots, dashes and underscores, no digit first"
START = {"workflow": "refunds@3", "run_id": "r-1"}


def parse(request: Any) -> Request:
    """Parse a request given as value, text, bytes or Avro record."""
    if isinstance(request, RunRequest):
        data = codec.encode(request)
    elif isinstance(request, bytes):
        data = request
    else:
        data = (request if isinstance(request, str) else json.dumps(request)).encode()
    return parse_request(data, decode=codec.decode)


def refusal(request: Any) -> RequestError:
    """Return the error with which a request is refused."""
    with pytest.raises(RequestError) as caught:
        parse(request)
    error = caught.value
    assert error.code in {"malformed", "too_large", "invalid"}
    assert error.reason
    return error


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.feature("T1")
def test_defaults_of_a_start() -> None:
    request = parse({"agent": "triage"})
    assert isinstance(request, StartRequest)
    assert (request.type, request.agent, request.workflow) == ("start", "triage", None)
    assert (request.run_id, request.input, request.account) == (None, None, "default")
    assert (request.budget_micros, request.tags, request.command_id) == (None, {}, None)


@pytest.mark.feature("G3")
@pytest.mark.parametrize("value", [None, True, 0, -1.5, "", "text", [], [1, [2]], {}, {"a": {"b": None}}, 10**30])
def test_any_json_value_is_an_input(value: Any) -> None:
    request = parse({**START, "input": value})
    assert isinstance(request, StartRequest)
    assert request.input == value
    assert type(request.input) is type(value)


@pytest.mark.parametrize(
    ("kind", "model"), [("cancel", CancelRequest), ("approve", ApproveRequest), ("reject", RejectRequest)]
)
def test_other_types(kind: str, model: type[Request]) -> None:
    request = parse({"type": kind, "run_id": "r-1", "by": "ada", "reason": "because", "command_id": "c"})
    assert isinstance(request, model)
    assert (request.run_id, request.by, request.reason, request.command_id) == ("r-1", "ada", "because", "c")


@pytest.mark.parametrize("workflow", ["refunds", "refunds@3", "a.b-c_d@2026-01-01", "agent:triage", "agent:triage@2"])
def test_names_of_workflows(workflow: str) -> None:
    request = parse({"workflow": workflow})
    assert isinstance(request, StartRequest)
    assert request.workflow == workflow


# --- what is refused, and how -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({}, "name what to run: a `workflow` (`name` or `name@version`) or an `agent`"),
        ({"workflow": "a", "agent": "b"}, "`workflow` and `agent` exclude each other: leave one out"),
        ({"workflow": "a", "budget": 5}, "`budget`: a start request has no such field; did you mean `budget_micros`?"),
        (
            {"type": "cancel", "run_id": "r", "input": 1},
            "`input`: a cancel request has no such field; it may have type, command_id, run_id, reason, by",
        ),
        ({"type": "dance"}, f'`type`: must be one of {TYPES} (is "dance")'),
        ({"type": 5}, f"`type`: must be one of {TYPES} (is 5)"),
        ({"type": None, "workflow": "a"}, f"`type`: must be one of {TYPES} (is null)"),
        ({"type": "signal", "run_id": "r"}, f"`event`: is missing; it {EVENT_RULE}"),
        ({"type": "signal", "run_id": "r", "event": "no name"}, f'`event`: {EVENT_RULE} (is "no name")'),
        ({"type": "respond", "run_id": "r", "attempt": 0}, "`attempt`: must be a whole number from 1 (is 0)"),
        (
            {"type": "approve", "run_id": "r", "why": "x"},
            '`why`: must be `policy`, `outcome_unknown` or `change` (is "x")',
        ),
        ([], "a request is a JSON object, not an array of 0"),
        ("5", "a request is a JSON object, not 5"),
        (
            {"workflow": "a", "budget_micros": "5"},
            '`budget_micros`: must be a whole number of micro-dollars from 0 to 9007199254740992 (a dollar is 1000000) (is "5")',
        ),
        (
            {"workflow": "a", "prefer": "here, there"},
            f'`prefer`: {PREFER_RULE} (is "here, there")',
        ),
        ({"workflow": "a", "tags": {"a": 1}}, "`tags.a`: must be a string of at most 256 characters (is 1)"),
    ],
)
def test_refusals_say_what_to_do(request_: Any, line: str) -> None:
    error = refusal(request_)
    assert (error.code, error.reason) == ("invalid", line)


def test_all_problems_are_told_at_once_a_line_each() -> None:
    error = refusal(
        {
            "workflow": "a b",
            "agent": "b",
            "run_id": "r",
            "account": "/",
            "budget_micros": -1,
            "tags": {"?": "x"},
            "x": 1,
        }
    )
    told = [line.partition(":")[0] for line in error.reason.splitlines()]
    assert told[:5] == ["`workflow`", "`account`", "`budget_micros`", "`tags`", "`x`"]
    assert len(told) == 6
    assert "exclude" in error.reason.splitlines()[5]


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("run_id", ["", "a b", "a/b", "a:b", "-a", "a\n", "a" * 129, 5, "é", ["a"]]),
        ("command_id", ["", "run-requests:0:5", "a" * 129, 1]),
        ("workflow", ["", "a@", "@1", "a@b@c", "1a", "a\n", "a" * 65, 1, {"name": "a"}]),
        ("account", ["", "/", "a//b", "a/", "a" * 65, "/".join("abcdefghi"), "a\n", None, 1]),
        ("budget_micros", [-1, 1.5, 1.0, True, "1", 2**53 + 1, 10**40]),
        (
            "tags",
            [None, [], "a", {"": "x"}, {"a b": "x"}, {"a": None}, {"a": "x" * 257}, {str(i): "" for i in range(33)}],
        ),
    ],
)
def test_values_out_of_bounds(field: str, bad: list[Any]) -> None:
    schema = jsonschema.Draft202012Validator(request_json_schema())
    for value in bad:
        request = {**START, field: value}
        assert f"`{field}" in refusal(request).reason
        # The published schema agrees; a float without fraction is an integer to it, and `$` is not to all of its readers.
        if value not in (1.0,) and not (isinstance(value, str) and value.endswith("\n")):
            assert not schema.is_valid(request), value


@pytest.mark.parametrize("field", ["by", "reason", "step_id"])
def test_words_about_answers_are_bounded(field: str) -> None:
    refusal({"type": "approve", "run_id": "r", field: "x" * 5000})
    refusal({"type": "approve", "run_id": "r", field: 5})


@pytest.mark.parametrize("kind", ["cancel", "approve", "reject"])
def test_a_run_must_be_named(kind: str) -> None:
    assert refusal({"type": kind}).reason.startswith("`run_id`: is missing")
    assert refusal({"type": kind, "run_id": None}).reason.startswith("`run_id`: must be")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"workflow": "a"} x', "Extra data"),
        (b'{"workflow": "a", "input": NaN}', "NaN"),
        (b'{"workflow": "a", "input": -Infinity}', "Infinity"),
        (b'{"workflow": "a", "input": 1e999}', "1e999"),
        (b'{"workflow": "a", "input": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"workflow": "a", "input": "\\ud800"}', "surrogate"),
        (b'{"workflow": "a", "\\udc00": 1}', "surrogate"),
        (b'{"workflow": "a", "workflow": "b"}', '"workflow" twice'),
        (b'{"workflow": "a", "input": [{"x": 1, "x": 1}]}', '"x" twice'),
        (b'{"workflow": "\xff"}', "UTF-8 (byte 14)"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"workflow": "a"}'.encode("utf-16"), "UTF-8"),
        (b"\xc3\x01", "Avro"),
        (b"\xc3\x01" + bytes(8), "unknown schema"),
        (b"\x00" * 100, "not JSON"),
    ],
)
def test_malformed(text: bytes, words: str) -> None:
    error = refusal(text)
    assert (error.code, error.run_id) == ("malformed", None)
    assert words in error.reason


@pytest.mark.parametrize("depth", [129, 1_000, 10_000, 100_000])
@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]"), ("[", "")])
def test_nesting_bombs_are_refused_like_anything_else(depth: int, before: str, after: str) -> None:
    error = refusal('{"workflow": "a", "input": ' + before * depth + "1" + after * depth + "}")
    assert error.code == "malformed"


def test_nesting_within_bounds_is_taken() -> None:
    value: Any = 1
    for _ in range(requests.MAX_DEPTH - 1):  # the request itself is one level
        value = [value]
    request = parse({"workflow": "a", "input": value})
    assert request.content_hash()
    assert refusal({"workflow": "a", "input": [value]}).code == "malformed"
    # Breadth is not depth.
    assert parse({"workflow": "a", "input": [[i] for i in range(1000)]})


def test_surrogate_pairs_are_fine() -> None:
    request = parse(b'{"workflow": "a", "input": "\\ud83d\\ude00"}')
    assert isinstance(request, StartRequest)
    assert request.input == "\U0001f600"


def test_size_is_bounded() -> None:
    data = json.dumps(START).encode()
    assert parse_request(data, max_bytes=len(data))
    with pytest.raises(RequestError) as caught:
        parse_request(data, max_bytes=len(data) - 1)
    assert (caught.value.code, caught.value.run_id) == ("too_large", "r-1")
    assert str(len(data)) in caught.value.reason
    assert refusal(b'{"workflow": "a", "input": "' + b"x" * requests.DEFAULT_MAX_BYTES + b'"}').code == "too_large"


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused_with_a_request_error(data: bytes) -> None:
    with pytest.raises(RequestError):
        parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*RunRequest.__struct_fields__, "other"])
PLAUSIBLE = st.sampled_from(["start", "cancel", "approve", "r-1", "refunds", "acme/x", 1000, None, {"a": "b"}]) | JSON


@given(st.dictionaries(FIELDS, PLAUSIBLE))
def test_whatever_is_asked_the_answer_is_a_request_or_a_readable_refusal(fields: dict[str, Any]) -> None:
    request: Request | None = None
    try:
        request = parse(fields)
    except RequestError as error:
        reason = error.reason
    if request is None:
        assert all(line.strip() for line in reason.splitlines())
        assert len(reason) < 4000
    else:
        assert request.content_hash() == parse(json.dumps(fields, sort_keys=True, indent=1)).content_hash()
        assert jsonschema.Draft202012Validator(request_json_schema()).is_valid(fields)


# --- the run that is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        {"run_id": "r-1", "workflow": "a", "nonsense": 1},
        {"run_id": "r-1", "type": "start"},
        RunRequest(run_id="r-1", workflow="a", input="{"),
        RunRequest(run_id="r-1", workflow="a", agent="b"),
    ],
)
def test_a_refused_start_names_its_run(request_: Any) -> None:
    error = refusal(request_)
    assert (error.code, error.run_id) == ("invalid", "r-1")


@pytest.mark.parametrize(
    "request_",
    [
        {"run_id": "r-1", "type": "cancel", "nonsense": 1},
        {"run_id": "r 1", "workflow": "a"},
        {"run_id": "r-1\n", "workflow": "a"},
        {"run_id": 5, "workflow": "a"},
        {"run_id": "r-1", "type": "dance"},
        RunRequest(run_id="r-1", type="cancel", workflow="a"),
        RunRequest(run_id="r 1", workflow="a"),
    ],
)
def test_other_refusals_name_none(request_: Any) -> None:
    assert refusal(request_).run_id is None


@pytest.mark.parametrize(
    ("data", "run_id"),
    [
        (b'{"run_id": "r-1", "input": [' + b"[]," * 1000 + b"[]]}", "r-1"),
        (b'{"run_id": "r-1", "type": "cancel", "input": "' + b"x" * 1000 + b'"}', None),
        (b'{"run_id": "r-1", "input": "' + b"x" * 1000, None),
        (b'{"run_id": 7, "input": "' + b"x" * 1000 + b'"}', None),
        (b'{"run_id": "r-1", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b"[" * 5000, None),
        (b"\xff" * 1000, None),
        (b"\xc3\x01" + b"x" * 1000, None),
        (codec.encode(RunRequest(run_id="r-1", workflow="a", input="x" * 1000)), "r-1"),
        (codec.encode(PolicyPublished(policy_id="r-1", version="", document="x" * 1000, by="", at_ms=0)), None),
    ],
)
def test_a_start_that_is_too_large_names_its_run_if_that_can_be_read(data: bytes, run_id: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(data, max_bytes=500, decode=codec.decode)
    assert (caught.value.code, caught.value.run_id) == ("too_large", run_id)


# --- Avro -------------------------------------------------------------------------------------------------------------


def test_avro_is_taken_only_with_a_decoder() -> None:
    data = codec.encode(RunRequest(workflow="a"))
    assert parse_request(data, decode=codec.decode)
    with pytest.raises(RequestError, match="only JSON"):
        parse_request(data)


def test_other_records_are_not_requests() -> None:
    error = refusal(codec.encode(PolicyPublished(policy_id="p", version="1", document="{}", by="", at_ms=0)))
    assert (error.code, error.reason) == ("malformed", "the request is a PolicyPublished, not a RunRequest")


def test_a_field_of_another_type_is_refused_in_avro_too() -> None:
    assert "`workflow`" in refusal(RunRequest(type="cancel", run_id="r", workflow="a")).reason
    assert "`step_id`" in refusal(RunRequest(workflow="a", step_id="s")).reason


def test_input_in_avro_is_json_as_strict_as_elsewhere() -> None:
    for text in ("", "{", "NaN", '{"a":1,"a":2}', "[" * 100_000):
        error = refusal(RunRequest(workflow="a", input=text))
        assert error.code == "invalid"
        assert error.reason.startswith("`input`: must be JSON text:")


# --- content ----------------------------------------------------------------------------------------------------------


@given(JSON, st.dictionaries(st.from_regex(requests.TAG_PATTERN, fullmatch=True), st.text(max_size=50), max_size=3))
def test_content_is_the_same_in_json_and_avro(value: Any, tags: dict[str, str]) -> None:
    as_json = parse({**START, "input": value, "tags": tags, "command_id": "x"})
    as_avro = parse(RunRequest(workflow="refunds@3", run_id="r-1", input=json.dumps(value, indent=2), tags=tags))
    assert as_json.content_hash() == as_avro.content_hash()


@pytest.mark.parametrize(
    "same",
    [
        {"type": "start"},
        {"command_id": "c-1"},
        {"agent": None},
        {"input": None},
        {"account": "default"},
        {"budget_micros": None},
        {"tags": {}},
    ],
)
def test_defaults_spelled_out_and_command_ids_are_not_content(same: dict[str, Any]) -> None:
    assert parse({**START, **same}).content_hash() == parse(START).content_hash()


@pytest.mark.parametrize(
    "other",
    [
        {"run_id": "r-2"},
        {"workflow": "refunds"},
        {"input": 0},
        {"input": False},
        {"input": ""},
        {"account": "acme"},
        {"budget_micros": 0},
        {"tags": {"a": "b"}},
    ],
)
def test_everything_else_is_content(other: dict[str, Any]) -> None:
    assert parse({**START, **other}).content_hash() != parse(START).content_hash()


def test_types_differ_in_content() -> None:
    kinds = ("cancel", "approve", "reject")
    assert len({parse({"type": kind, "run_id": "r"}).content_hash() for kind in kinds}) == len(kinds)


def test_content_hash_is_the_hash_of_the_canonical_json() -> None:
    # Recorded in logs for ever: a repeated start is recognised by it. It is never right to adapt this value.
    text = '{"input":{"a":[1,2.5],"é":"ü"},"run_id":"r-1","type":"start","workflow":"refunds@3"}'
    assert requests.canonical.digest(text) == parse({**START, "input": {"é": "ü", "a": [1, 2.5]}}).content_hash()


def test_python_callers_get_the_same_judgement() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        StartRequest(workflow="a", agent="b")
    assert StartRequest(workflow="a").content_hash() == parse({"workflow": "a"}).content_hash()
    assert requests.validate({"workflow": "a"}) == StartRequest(workflow="a")


# --- answers, events, control -----------------------------------------------------------------------------------------------


@pytest.mark.feature("D3")
@pytest.mark.parametrize(
    ("as_json", "as_avro"),
    [
        (
            {"type": "respond", "run_id": "r", "step_id": "w", "value": {"a": [1]}, "attempt": 2, "why": "policy"},
            RunRequest(type="respond", run_id="r", step_id="w", value='{"a":[1]}', attempt=2, why="policy"),
        ),
        (
            {"type": "signal", "run_id": "r", "event": "paid", "key": "", "payload": 5},
            RunRequest(type="signal", run_id="r", event="paid", key="", payload="5"),
        ),
        ({"type": "pause", "run_id": "r", "by": "ann"}, RunRequest(type="pause", run_id="r", by="ann")),
        ({"type": "resume", "run_id": "r"}, RunRequest(type="resume", run_id="r")),
    ],
)
def test_a_command_is_the_same_in_json_and_in_avro(as_json: Any, as_avro: RunRequest) -> None:
    assert parse(as_json) == parse(as_avro)
    assert parse(as_json).content_hash() == parse(as_avro).content_hash()


def test_an_answer_in_avro_must_be_json() -> None:
    error = refusal(RunRequest(type="respond", run_id="r", value="{"))
    assert error.reason.startswith("`value`: must be JSON text: ")
    assert error.run_id is None
