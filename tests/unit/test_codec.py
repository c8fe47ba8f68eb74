"""The codec: every record survives, nothing but DecodeError comes out of bad bytes, the wire format does not drift.

fastavro, which shares no code with the functions made in `codec/compiled.py`, is the judge of what is right.
"""

import contextlib
import io
import json
import math
import struct
from typing import Any

import fastavro
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate import codec
from tidegate.codec import avro
from tidegate.codec.avro import OWNERS_FIELDS
from tidegate.codec.compiled import UnsupportedSchemaError, make_decoder, make_encoder, read_long, write_long
from tidegate.domain import ledger_events, messages, run_events
from tidegate.domain.entry import TAG_FIELD, Entry, OwnerAnnounced, Snapshot
from tidegate.domain.requests import RunRequest

RECORDS: list[type[msgspec.Struct]] = [
    messages.RunCommand,
    messages.GateRequest,
    messages.GateDecision,
    messages.StepTask,
    messages.StepResult,
    messages.Instance,
    messages.DeadLetter,
    messages.WorkflowPublished,
    messages.PolicyPublished,
    messages.Control,
    messages.GateLeases,
    OwnerAnnounced,
    Snapshot,
    RunRequest,
]
EVENTS: dict[str, Any] = {"RunEntry": run_events.RunEvent, "LedgerEntry": ledger_events.LedgerEvent}
HEADER_LENGTH = 10
AVRO = codec.schemas_dir() / "avro"


@pytest.fixture(autouse=True)
def _forget_registered_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    codec.schema_texts()
    monkeypatch.setattr(avro, "_by_header", dict(avro._by_header))


# --- strategies, made from the structs' own types ---------------------------------------------------------------------

LONGS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [0, 1, -1, 63, 64, 127, 128, 8191, 8192, 16383, 16384, 2**40]
)
TEXTS = st.text(max_size=20) | st.sampled_from(["", "é", "🙂" * 70, "x" * 8191, "x" * 8192, "x" * 20_000])


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a type as msgspec sees it."""
    made: dict[type, st.SearchStrategy[Any]] = {
        msgspec.inspect.StrType: TEXTS,
        msgspec.inspect.BytesType: st.binary(max_size=40),
        msgspec.inspect.IntType: LONGS,
        msgspec.inspect.BoolType: st.booleans(),
        msgspec.inspect.FloatType: st.floats(allow_nan=False),
        msgspec.inspect.NoneType: st.none(),
    }
    if type(kind) in made:
        return made[type(kind)]
    if isinstance(kind, msgspec.inspect.StructType):
        return structs(kind.cls)
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return st.lists(values(kind.item_type), max_size=4).map(tuple)
    if isinstance(kind, msgspec.inspect.DictType):
        return st.dictionaries(TEXTS, values(kind.value_type), max_size=4)
    if isinstance(kind, msgspec.inspect.UnionType):
        return st.one_of([values(member) for member in kind.types])
    raise NotImplementedError(f"a struct has a field of type {kind}")


def structs(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Return a strategy for instances of a struct class."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    fields = {field.name: values(field.type) for field in info.fields if field.name != "events"}
    return st.builds(cls, **fields)


def entries(kind: str) -> st.SearchStrategy[Entry]:
    """Return a strategy for entries of a log."""
    events = st.lists(st.one_of([structs(cls) for cls in EVENTS[kind].__args__]), max_size=4).map(tuple)
    return st.builds(msgspec.structs.replace, structs_of_entry(), events=events)


def structs_of_entry() -> st.SearchStrategy[Entry]:
    info = msgspec.inspect.type_info(Entry)
    assert isinstance(info, msgspec.inspect.StructType)
    fields = {field.name: values(field.type) for field in info.fields if field.name != "events"}
    return st.builds(Entry, **fields, events=st.just(()))


def by_fastavro(name: str, record: msgspec.Struct) -> bytes:
    """Encode as fastavro does."""
    *_, newest = sorted(
        (codec.schemas_dir() / "avro").glob(f"{name}.v*.avsc"), key=lambda path: int(path.stem.rpartition(".v")[2])
    )
    text = newest.read_text(encoding="utf-8")
    out = io.BytesIO()
    plain = msgspec.to_builtins(record, builtin_types=(bytes,))
    for items in ("events", "items"):
        if items in plain:
            plain[items] = [(item.pop(TAG_FIELD), item) for item in plain[items]]
    fastavro.schemaless_writer(out, fastavro.parse_schema(json.loads(text)), plain)
    return out.getvalue()


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", RECORDS, ids=lambda cls: cls.__name__)
def test_every_record_comes_back_equal_and_is_written_as_fastavro_does(cls: type[msgspec.Struct]) -> None:
    @given(structs(cls))
    def check(record: msgspec.Struct) -> None:
        data = codec.encode(record)
        assert codec.decode(data) == record
        assert data[HEADER_LENGTH:] == by_fastavro(cls.__name__, record)

    check()


@pytest.mark.parametrize("kind", EVENTS)
def test_every_entry_comes_back_equal_and_is_written_as_fastavro_does(kind: str) -> None:
    @given(entries(kind))
    def check(entry: Entry) -> None:
        data = codec.encode_entry(kind, entry)
        assert codec.decode(data) == entry
        assert data[HEADER_LENGTH:] == by_fastavro(kind, entry)

    check()


def with_lists(value: Any) -> Any:
    """Return a plain value with lists for tuples: Avro has arrays only."""
    if isinstance(value, dict):
        return {key: with_lists(item) for key, item in value.items()}
    return [with_lists(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("kind", EVENTS)
def test_raw_decoding_shows_the_same_values(kind: str) -> None:
    @given(entries(kind))
    def check(entry: Entry) -> None:
        name, raw = codec.decode_raw(codec.encode_entry(kind, entry))
        assert name == kind
        plain = msgspec.to_builtins(entry, builtin_types=(bytes,))
        plain["events"] = [(item.pop(TAG_FIELD), item) for item in plain["events"]]
        assert with_lists(raw) == with_lists(plain)
        kept = {field: value for field, value in raw.items() if field not in OWNERS_FIELDS}
        assert codec.decode_facts(codec.encode_entry(kind, entry)) == (kind, kept)

    check()


def test_only_entries_are_read_without_what_owners_need() -> None:
    instance = next(sample for sample in SAMPLES if codec.decode_raw(sample)[0] == "Instance")
    assert codec.decode_facts(instance) == codec.decode_raw(instance)
    assert "marks" in codec.decode_raw(instance)[1], "a field of the same name, which is no entry's"


def test_every_shipped_record_is_tested_here() -> None:
    tested = {cls.__name__ for cls in RECORDS} | set(EVENTS)
    assert {json.loads(text)["name"] for text in codec.schema_texts().values()} == tested


@pytest.mark.parametrize(
    "number", [0, 1, -1, 63, -64, 64, 8191, 8192, 16383, -16384, 2**31, 2**62, 2**63 - 1, -(2**63)]
)
def test_numbers_are_written_as_the_specification_says(number: int) -> None:
    data = write_long(number)
    zigzag = (number << 1) ^ (number >> 63)
    assert data == bytes((zigzag >> 7 * i) & 127 | (128 if zigzag >> 7 * (i + 1) else 0) for i in range(len(data)))
    if len(data) > 1:
        assert read_long(data, 1, data[0]) == (number, len(data))


# --- the wire format --------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_one_of_the_specification() -> None:
    # The Rabin fingerprints that Avro's own test vectors give for the schemas "int" and "string".
    assert fastavro.schema.fingerprint('"int"', "CRC-64-AVRO") == struct.pack("<Q", 0x7275D51A3F395C8F).hex()
    assert fastavro.schema.fingerprint('"string"', "CRC-64-AVRO") == struct.pack("<Q", 0x8F014872634503C7).hex()


def crc_64_avro(data: bytes) -> int:
    """The reference algorithm, as printed in the Avro specification (Schema Fingerprints)."""
    empty = 0xC15D213AA4D7A795
    table = []
    for i in range(256):
        value = i
        for _ in range(8):
            value = (value >> 1) ^ (empty & -(value & 1))
        table.append(value)
    found = empty
    for byte in data:
        found = (found >> 8) ^ table[(found ^ byte) & 0xFF]
    return found


def test_header_is_the_mark_and_the_little_endian_fingerprint_of_the_canonical_schema() -> None:
    for fingerprint, text in codec.schema_texts().items():
        canonical = fastavro.schema.to_parsing_canonical_form(json.loads(text))
        assert bytes.fromhex(fingerprint) == crc_64_avro(canonical.encode()).to_bytes(8, "little")
    data = codec.encode(RunRequest())
    assert data[:2] == b"\xc3\x01"
    assert data[2:HEADER_LENGTH].hex() in codec.schema_texts()


GOLDEN_ENTRY = Entry(
    subject="r-1",
    account="acme",
    first_seq=3,
    epoch=9120,
    now_ms=1_790_000_000_000,
    prev_hash=bytes(range(4)),
    inputs={"run-commands": 88, "step-results": 290},
    marks={},
    told=-1,
    tables={},
    cause="step-results:5:289",
    events=(
        run_events.StepSucceeded(
            step_id="a",
            attempt=1,
            output='{"é":1}',
            actual_micros=1800,
            usage={"tokens": 900},
            instance_id="e-0",
            incarnation=70_000,
            started_ms=1,
            finished_ms=2,
        ),
        run_events.RunFinished(status="succeeded", output="null", code="", reason="", fingerprint="f"),
    ),
)
GOLDEN_BODY = (
    "06722d310861636d6506c08e0180b083c598680800010203041872756e2d636f6d6d616e6473b00118737465702d72657375"
    "6c7473c4040000010024737465702d726573756c74733a353a3238390412026102107b22c3a9223a317d901c020c746f6b65"
    "6e73880e0006652d30e0c50802041c12737563636565646564086e756c6c0000026600"
)


def test_bytes_of_an_entry_of_the_first_version_are_read_for_ever() -> None:
    """If this fails, logs that exist can no longer be read: it is never right to adapt it."""
    (fingerprint,) = [
        key for key, text in codec.schema_texts().items() if text == (AVRO / "RunEntry.v1.avsc").read_text("utf-8")
    ]
    data = b"\xc3\x01" + bytes.fromhex(fingerprint) + bytes.fromhex(GOLDEN_BODY)
    assert codec.decode(data) == GOLDEN_ENTRY


def test_blocks_with_a_size_are_read() -> None:
    # Other writers split maps and arrays into blocks, and give a block's size after a negative count.
    data = codec.encode(RunRequest(tags={"a": "b", "c": "d"}))
    block = b"\x04" + b"\x02a\x02b\x02c\x02d" + b"\x00"
    assert block in data
    split = b"\x01\x08\x02a\x02b" + b"\x02\x02c\x02d" + b"\x00"
    assert codec.decode(data.replace(block, split)) == RunRequest(tags={"a": "b", "c": "d"})


# --- bad bytes --------------------------------------------------------------------------------------------------------

SAMPLES = [
    codec.encode_entry("RunEntry", GOLDEN_ENTRY),
    codec.encode(RunRequest(run_id="x", tags={"a": "b"})),
    codec.encode(
        messages.GateRequest(
            run_id="r",
            account="a",
            source=messages.Position(1, 2, 3),
            items=(messages.CloseRun(), messages.Settle(step_id="s", attempt=1, actual_micros=2)),
        )
    ),
    codec.encode(
        messages.Instance(
            instance_id="i",
            service="executor",
            incarnation=-1,
            state="ready",
            host="h",
            boot_id="b",
            pid=1,
            pid_started=1.5,
            started_ms=1,
            at_ms=2,
            running=(messages.Running(run_id="r", step_id="s", attempt=1),),
            functions=("step:a",),
        )
    ),
]


@pytest.mark.parametrize("data", SAMPLES, ids=["RunEntry", "RunRequest", "GateRequest", "Instance"])
def test_every_truncation_and_extension_is_refused(data: bytes) -> None:
    for length in range(len(data)):
        for decode in (codec.decode, codec.decode_raw, codec.decode_facts):
            with pytest.raises(codec.DecodeError):
                decode(data[:length])
    with pytest.raises(codec.DecodeError):
        codec.decode(data + b"\x00")


@given(st.sampled_from(SAMPLES), st.data())
def test_bad_bytes_raise_nothing_but_decode_errors(sample: bytes, data: st.DataObject) -> None:
    """What is read from mutilated bytes may be wrong, but it is of the right type and nothing else can happen."""
    body = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    for decode in (codec.decode, codec.decode_raw, codec.decode_facts):
        with contextlib.suppress(codec.DecodeError):
            decode(bytes(body))
    with contextlib.suppress(codec.DecodeError):
        record = codec.decode(bytes(body))
        if isinstance(record, Entry):
            codec.encode_entry(codec.decode_raw(bytes(body))[0], record)
        else:
            codec.encode(record)


@given(st.sampled_from(SAMPLES), st.binary(max_size=100))
def test_garbage_behind_a_good_header_raises_nothing_but_decode_errors(sample: bytes, garbage: bytes) -> None:
    with contextlib.suppress(codec.DecodeError):
        codec.decode(sample[:HEADER_LENGTH] + garbage)


@given(st.none() | st.binary(max_size=40))
def test_garbage_is_not_a_record(garbage: bytes | None) -> None:
    with pytest.raises(codec.DecodeError):
        codec.decode(garbage)


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 100_000, b"\x80" * 100_000, b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01" + b"x" * 50, b"\x01" * 50],
    ids=["long varint", "endless zero", "huge length", "negative length"],
)
def test_hostile_lengths_are_refused_at_once(garbage: bytes) -> None:
    with pytest.raises(codec.DecodeError):
        codec.decode(SAMPLES[0][:HEADER_LENGTH] + garbage)


def test_unknown_fingerprint_is_told_apart_and_named() -> None:
    with pytest.raises(codec.UnknownSchemaError) as error:
        codec.decode(b"\xc3\x01" + bytes(range(8)) + b"body")
    assert error.value.fingerprint == "0001020304050607"


@pytest.mark.parametrize(
    "bad",
    [
        {"attempt": 2**63},
        {"attempt": "1"},
        {"attempt": None},
        {"attempt": 1.5},
        {"run_id": None},
        {"run_id": 5},
        {"run_id": "\ud800"},
        {"usage": {"a": "b"}},
        {"usage": {1: 2}},
        {"usage": [1]},
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(bad: dict[str, Any]) -> None:
    good = {
        "run_id": "r",
        "step_id": "s",
        "attempt": 1,
        "account": "a",
        "instance_id": "i",
        "incarnation": 1,
        "outcome": "succeeded",
    }
    codec.encode(messages.StepResult(**good))
    with pytest.raises(ValueError, match=r"StepResult|surrogates"):
        codec.encode(messages.StepResult(**good | bad))


def test_an_event_of_the_other_log_is_refused() -> None:
    event = ledger_events.RunClosed(account="a", run_id="r", settled_micros=1)
    with pytest.raises(ValueError, match="RunEntry"):
        codec.encode_entry("RunEntry", msgspec.structs.replace(GOLDEN_ENTRY, events=(event,)))


# --- other versions of a schema ---------------------------------------------------------------------------------------


def altered(name: str, change: Any) -> dict[str, Any]:
    """Return a shipped schema after `change`."""
    schema: dict[str, Any] = next(
        raw for text in codec.schema_texts().values() if (raw := json.loads(text))["name"] == name
    )
    change(schema)
    return schema


def written(schema: dict[str, Any], record: dict[str, Any]) -> bytes:
    """Encode by fastavro as another version of Tidegate would, header included."""
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    out = io.BytesIO()
    out.write(b"\xc3\x01" + bytes.fromhex(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO")))
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), record)
    return out.getvalue()


def test_records_of_a_registered_schema_are_read_with_defaults_and_without_unknown_fields() -> None:
    def change(schema: dict[str, Any]) -> None:
        schema["fields"] = [field for field in schema["fields"] if field["name"] not in ("tags", "by")]
        seen = {
            "type": "record",
            "name": "Seen",
            "fields": [{"name": "ids", "type": {"type": "array", "items": "long"}}],
        }
        schema["fields"].insert(1, {"name": "seen", "type": ["null", seen]})
        schema["fields"].insert(2, {"name": "before", "type": {"type": "map", "values": "Seen"}})

    schema = altered("RunRequest", change)
    fields = {
        "type": "cancel",
        "run_id": "r",
        "seen": {"ids": [1, 2]},
        "before": {"x": {"ids": [3]}},
        "reason": "because",
    }
    data = written(schema, fields)
    with pytest.raises(codec.UnknownSchemaError):
        codec.decode(data)
    codec.register_schema(json.dumps(schema))
    codec.register_schema(json.dumps(schema))
    assert codec.decode(data) == RunRequest(type="cancel", run_id="r", reason="because")
    name, raw = codec.decode_raw(data)
    assert (name, raw["before"], raw["seen"]) == ("RunRequest", {"x": {"ids": [3]}}, {"ids": [1, 2]})


def test_an_event_that_this_version_does_not_know_is_a_decode_error_only_where_it_occurs() -> None:
    def change(schema: dict[str, Any]) -> None:
        inner = {"type": "record", "name": "Inner", "fields": [{"name": "a", "type": "string"}]}
        branches = schema["fields"][-1]["type"]["items"]
        branches.insert(0, {"type": "record", "name": "RunTeleported", "fields": [{"name": "to", "type": inner}]})
        branches.append({"type": "record", "name": "RunReturned", "fields": [{"name": "from", "type": "Inner"}]})

    schema = altered("RunEntry", change)
    codec.register_schema(json.dumps(schema))
    plain = msgspec.to_builtins(GOLDEN_ENTRY, builtin_types=(bytes,))
    plain["events"] = [(item.pop(TAG_FIELD), item) for item in plain["events"]]
    assert codec.decode(written(schema, plain)) == GOLDEN_ENTRY
    plain["events"].append(("RunTeleported", {"to": {"a": "b"}}))
    with pytest.raises(codec.DecodeError, match="RunTeleported"):
        codec.decode(written(schema, plain))
    assert codec.decode_raw(written(schema, plain))[1]["events"][-1] == ("RunTeleported", {"to": {"a": "b"}})


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '"string"',
        '{"type": "record", "name": "Stranger", "fields": []}',
        '{"type": "record", "name": "RunRequest", "fields": [{"name": "type", "type": "nonsense"}]}',
        '{"type": "record", "name": "RunRequest", "fields": [{"name": "type", "type": ["long", "string"]}]}',
        '{"type": "record", "name": "RunRequest", "fields": [{"name": "x", "type": {"type": "fixed", "name": "F", "size": 4}}]}',
        '{"type": "record", "name": "RunRequest", "fields": [{"name": "x", "type": ["null", "RunRequest"]}]}',
    ],
)
def test_schemas_that_cannot_be_used_are_refused_with_a_decode_error(text: str) -> None:
    with pytest.raises(codec.DecodeError):
        codec.register_schema(text)


def test_a_hostile_schema_cannot_say_what_is_executed() -> None:
    fields = [{"name": name, "type": "string"} for name in ("type", "x'): __import__('os').abort() #", "class")]
    text = json.dumps({"type": "record", "name": "RunRequest", "fields": fields})
    schema = {"type": "record", "name": "RunRequest", "fields": fields}
    codec.register_schema(text)  # fastavro does not look at the names of fields
    for raw in (False, True):
        decoder = make_decoder(schema, {"RunRequest": RunRequest}, 0, raw=raw)
        found = decoder(b"\x02a\x02b\x02c")
        assert found == (
            dict(zip([field["name"] for field in fields], "abc", strict=True)) if raw else RunRequest(type="a")
        )
    with pytest.raises(UnsupportedSchemaError):
        make_encoder(schema, {"RunRequest": RunRequest}, b"")


def test_doubles_keep_every_bit() -> None:
    class Sample(msgspec.Struct):
        x: float

    schema = {"type": "record", "name": "Sample", "fields": [{"name": "x", "type": "double"}]}
    encode, decode = (
        make_encoder(schema, {"Sample": Sample}, b""),
        make_decoder(schema, {"Sample": Sample}, 0, raw=False),
    )
    for value in (0.0, -0.0, 5e-324, math.inf, -math.inf, 1 / 3):
        assert struct.pack("<d", decode(encode(Sample(value))).x) == struct.pack("<d", value)
    assert math.isnan(decode(encode(Sample(math.nan))).x)
