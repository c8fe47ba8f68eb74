"""The published schemas: they fit the structs, released ones never change, new versions can read old records, and the
published example messages are what the codec writes.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import jsonschema
import msgspec
import pytest

from tidegate import codec
from tidegate.codec import avro
from tidegate.codec.compatibility import history_problems, problems
from tidegate.domain import ledger_events, run_events
from tidegate.domain.entry import Entry
from tidegate.domain.requests import RequestError, RunRequest, parse_request, request_json_schema
from tidegate.topics.declaration import QUEUE_PLACE, TopicFile, read_topic_files

ROOT = Path(__file__).resolve().parents[2]
AVRO = ROOT / "schemas/avro"
EXAMPLES = ROOT / "schemas/examples"
RELEASED = AVRO / "released.json"
FILES = sorted(AVRO.glob("*.avsc"))
EXAMPLE_FILES = sorted(EXAMPLES.glob("*/*/*.json"))
TOPICS = read_topic_files()
EVENTS = {"RunEntry": run_events.RunEvent, "LedgerEntry": ledger_events.LedgerEvent}


def raw(path: Path) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(path.read_text())
    return schema


def version(path: Path) -> int:
    return int(path.stem.rpartition(".v")[2])


def newest() -> dict[str, dict[str, Any]]:
    return {path.stem.partition(".")[0]: raw(path) for path in sorted(FILES, key=version)}


# --- schemas and structs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_schema_parses_and_is_named_like_its_file(path: Path) -> None:
    fastavro.parse_schema(raw(path))
    assert path.stem == f"{raw(path)['name']}.v{version(path)}"
    assert raw(path).get("doc"), "say what the record is for"


PRIMITIVES = {
    "string": msgspec.inspect.StrType,
    "bytes": msgspec.inspect.BytesType,
    "long": msgspec.inspect.IntType,
    "boolean": msgspec.inspect.BoolType,
    "double": msgspec.inspect.FloatType,
    "null": msgspec.inspect.NoneType,
}


def mismatches(schema: Any, kind: Any, path: str, named: dict[str, Any]) -> Iterator[str]:
    """Yield where a schema and a struct's type (as msgspec sees it) do not say the same."""
    schema = named.get(schema, schema) if isinstance(schema, str) else schema
    if isinstance(schema, str):
        if not isinstance(kind, PRIMITIVES[schema]):
            yield f"{path}: {schema} in the schema, {type(kind).__name__} in the struct"
    elif isinstance(schema, list):
        members = kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)
        branches = {branch if isinstance(branch, str) else branch["name"]: branch for branch in schema}
        structs = {m.cls.__name__ if isinstance(m, msgspec.inspect.StructType) else None: m for m in members}
        if len(schema) == 2 and "null" in schema:
            yield from mismatches(
                "null", next((m for m in members if type(m) is PRIMITIVES["null"]), None), path, named
            )
            other = next(branch for branch in schema if branch != "null")
            yield from mismatches(other, next(m for m in members if type(m) is not PRIMITIVES["null"]), path, named)
        elif set(branches) != set(structs):
            yield f"{path}: branches of the schema and the union differ by {sorted(set(branches) ^ set(structs), key=str)}"
        else:
            for name, branch in branches.items():
                yield from mismatches(branch, structs[name], f"{path}({name})", named)
    elif schema["type"] == "record":
        yield from record_mismatches(schema, kind, path, named)
    elif schema["type"] == "array":
        yield from mismatches(schema["items"], kind.item_type, f"{path}[]", named)
    else:
        assert schema["type"] == "map"
        yield from mismatches(schema["values"], kind.value_type, f"{path}[]", named)


def record_mismatches(schema: Any, kind: Any, path: str, named: dict[str, Any]) -> Iterator[str]:
    fields = {field.name: field for field in kind.fields}
    if list(fields) != [field["name"] for field in schema["fields"]]:
        yield f"{path}: fields differ: {list(fields)} in the struct, {[f['name'] for f in schema['fields']]} in the schema"
        return
    for field in schema["fields"]:
        declared = fields[field["name"]]
        inner = f"{path}.{field['name']}"
        if ("default" in field) != (not declared.required):
            yield f"{inner}: has a default in one of schema and struct only"
        elif "default" in field:
            default = declared.default_factory() if declared.default is msgspec.NODEFAULT else declared.default
            if json.loads(msgspec.json.encode(default)) != field["default"]:
                yield f"{inner}: the defaults are {field['default']!r} and {default!r}"
        if not (kind.cls is Entry and field["name"] == "events"):
            yield from mismatches(field["type"], declared.type, inner, named)


@pytest.mark.parametrize("name", newest())
def test_schema_and_struct_say_the_same(name: str) -> None:
    """All records, nested ones too; the reader takes defaults from the struct, so they must be those of the schema."""
    parsed: Any = fastavro.parse_schema(newest()[name])
    named = parsed["__named_schemas"]
    cls = avro._structs()[name]
    found = list(mismatches(parsed, msgspec.inspect.type_info(cls), name, named))
    if name in EVENTS:
        events = next(field for field in newest()[name]["fields"] if field["name"] == "events")
        kind = msgspec.inspect.type_info(EVENTS[name])
        found += mismatches(events["type"]["items"], kind, f"{name}.events", named)
    assert not found, "\n".join(found)


def test_a_mismatch_of_a_nested_field_is_noticed() -> None:
    schema = newest()["StepTask"]
    call = next(field for field in schema["fields"] if field["name"] == "call")["type"][1]
    call["fields"][4]["type"] = "string"
    parsed: Any = fastavro.parse_schema(schema)
    kind = msgspec.inspect.type_info(avro._structs()["StepTask"])
    found = list(mismatches(parsed, kind, "StepTask", parsed["__named_schemas"]))
    assert found == ["StepTask.call.timeout_ms: string in the schema, IntType in the struct"]


# --- released schemas -------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    canonical = fastavro.schema.to_parsing_canonical_form(raw(path))
    return str(fastavro.schema.fingerprint(canonical, "CRC-64-AVRO"))


def test_released_schemas_are_unchanged() -> None:
    released = json.loads(RELEASED.read_text())
    now = {path.stem: fingerprint(path) for path in FILES}
    changed = [name for name in released if name in now and now[name] != released[name]]
    gone = [name for name in released if name not in now]
    new = [f'"{name}": "{now[name]}"' for name in now if name not in released]
    assert not changed, (
        f"released schemas were changed: {', '.join(changed)}. Logs hold records written with them. Put the file back as it "
        "was and make the change in a new file NAME.v(N+1).avsc, with a default for every new field."
    )
    assert not gone, (
        f"released schemas were removed: {', '.join(gone)}. Put them back: logs hold records written with them."
    )
    assert not new, f"add the new schemas to {RELEASED.relative_to(ROOT)}: {', '.join(new)}"


@pytest.mark.feature("K5")
@pytest.mark.parametrize("name", newest())
def test_every_version_can_be_read_as_every_later_one(name: str) -> None:
    history = [raw(path) for path in sorted(FILES, key=version) if path.stem.partition(".")[0] == name]
    assert history_problems(history) == []


def record(*fields: dict[str, Any], name: str = "R") -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": list(fields)}


def field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


INNER = record(field("x", "long"), name="Inner")
OTHER = record(field("y", "long"), name="Other")


@pytest.mark.parametrize(
    ("writer", "reader", "problem"),
    [
        (record(field("a", "long")), record(field("a", "long"), field("b", "string", default="")), None),
        (
            record(field("a", "long")),
            record(field("a", "long"), field("b", "string")),
            "R.b: is new and has no default",
        ),
        (record(field("a", "long"), field("b", "string")), record(field("a", "long")), None),
        (record(field("a", "long")), record(field("a", "string")), "R.a: was long, is string"),
        (record(field("a", "int")), record(field("a", "long")), None),
        (record(field("a", "long")), record(field("a", "int")), "R.a: was long, is int"),
        (record(field("a", "long")), record(field("a", "double")), "R.a: was long, is double"),
        (record(field("a", "string")), record(field("a", "bytes")), "R.a: was string, is bytes"),
        (record(field("a", "long")), record(field("a", ["null", "long"])), None),
        (
            record(field("a", ["null", "long"])),
            record(field("a", "long")),
            "R.a: may have been null, which is not read any more",
        ),
        (
            record(field("a", {"type": "map", "values": "long"})),
            record(field("a", {"type": "map", "values": "string"})),
            "R.a[]: was long, is string",
        ),
        (
            record(field("a", {"type": "array", "items": "long"})),
            record(field("a", {"type": "map", "values": "long"})),
            "R.a: was array, is map",
        ),
        (record(field("a", INNER)), record(field("a", OTHER)), "R.a: was record Inner, is record Other"),
        (record(name="R"), record(name="S"), "S: was record R, is record S"),
        (
            record(field("a", {"type": "array", "items": [INNER]})),
            record(field("a", {"type": "array", "items": [INNER, OTHER]})),
            None,
        ),
        (
            record(field("a", {"type": "array", "items": [INNER, OTHER]})),
            record(field("a", {"type": "array", "items": [OTHER]})),
            "R.a[]: may have been record Inner, which is not read any more",
        ),
        (
            record(field("a", {"type": "array", "items": [INNER, OTHER]})),
            record(field("a", {"type": "array", "items": [OTHER, record(field("z", "long"), name="Inner")]})),
            "R.a[](Inner).z: is new and has no default",
        ),
        # A type that is named for the first time in a part that the other side does not have.
        (
            record(field("a", "long"), field("b", INNER)),
            record(field("c", ["null", INNER], default=None), field("b", "Inner")),
            None,
        ),
    ],
)
def test_compatibility_by_the_rules_of_the_reader(writer: Any, reader: Any, problem: str | None) -> None:
    assert problems(writer, reader) == ([] if problem is None else [problem])


def test_compatibility_is_transitive() -> None:
    # Each version can be read as the next one, but the first not as the last: a field went and came back as another type.
    history = [
        record(field("a", "long")),
        record(),
        record(field("a", "string", default="")),
    ]
    assert problems(history[0], history[1]) == problems(history[1], history[2]) == []
    assert history_problems(history) == ["version 1 as version 3: R.a: was long, is string"]


# --- examples ---------------------------------------------------------------------------------------------------------


def topic_file(example: Path) -> TopicFile:
    topic = example.parents[1].name
    return next(file for file in TOPICS if file.name.removesuffix(f".{QUEUE_PLACE}") == topic)


def struct_of(name: str, value: Any) -> msgspec.Struct:
    """Return the record that an example's value shows: bytes as base64, branches of unions named by `-type`."""
    if name not in EVENTS:
        made: msgspec.Struct = msgspec.convert(value, avro._structs()[name])
        return made
    entry = msgspec.convert(value, Entry)
    return msgspec.structs.replace(entry, events=msgspec.convert(value["events"], tuple[EVENTS[name], ...]))  # type: ignore[valid-type]


def avro_examples() -> list[Path]:
    return [path for path in EXAMPLE_FILES if "type" in raw(path)["headers"] and "value" in raw(path)]


def example_id(path: Path) -> str:
    return f"{path.parents[1].name}/{path.stem}"


@pytest.mark.parametrize("path", avro_examples(), ids=example_id)
def test_example_is_what_the_codec_writes_and_reads(path: Path) -> None:
    example = raw(path)
    name = example["headers"]["type"]
    shown = struct_of(name, example["value"])
    data = codec.encode_entry(name, shown) if isinstance(shown, Entry) else codec.encode(shown)
    decoded = codec.decode(data)
    assert decoded == shown
    assert json.loads(msgspec.json.encode(decoded)) == example["value"], (
        "an example shows every field, defaults included"
    )
    assert codec.decode_raw(data)[0] == name


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=example_id)
def test_example_belongs_to_its_topic(path: Path) -> None:
    example, topic = raw(path), topic_file(path)
    assert set(example) <= {"description", "key", "headers", "value", "text", "error"}
    assert example["description"]
    assert example["key"]
    name = example["headers"].get("type")
    assert name in topic.value or (name, topic.name) == ("Schema", "schemas") or topic.name == "run-requests"
    if topic.kind == "log":
        epoch = int(example["headers"]["epoch"])
        assert epoch == example["value"]["epoch"]
        if name in EVENTS:
            value = example["value"]
            assert example["key"] == f"{value['subject']}:{value['first_seq']}:{value['epoch']}"


@pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
def test_every_record_of_every_topic_has_an_example(topic: TopicFile) -> None:
    folder = EXAMPLES / topic.name.removesuffix(f".{QUEUE_PLACE}")
    shown = {raw(path)["headers"].get("type") for path in folder.glob("*/*.json")}
    assert set(topic.value) <= shown


def test_every_event_is_in_some_example() -> None:
    for name, union in EVENTS.items():
        shown = {
            event["-type"]
            for path in EXAMPLE_FILES
            if raw(path)["headers"].get("type") == name
            for event in raw(path)["value"]["events"]
        }
        assert shown == {member.__name__ for member in union.__args__}


def test_example_of_a_schema_has_its_fingerprint_as_key() -> None:
    example = raw(EXAMPLES / "schemas/v1/owner-announced.json")
    canonical = fastavro.schema.to_parsing_canonical_form(json.loads(example["text"]))
    assert example["key"] == fastavro.schema.fingerprint(canonical, "CRC-64-AVRO")
    assert example["key"] in codec.schema_texts()


REQUESTS = [path for path in EXAMPLE_FILES if path.parents[1].name == "run-requests"]


def request_bytes(example: dict[str, Any]) -> bytes:
    if example["headers"].get("type") == "RunRequest":
        return codec.encode(struct_of("RunRequest", example["value"]))
    text: str = example["text"] if "text" in example else json.dumps(example["value"])
    return text.encode()


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: path.stem)
def test_example_request_is_judged_as_it_says(path: Path) -> None:
    example = raw(path)
    if "error" not in example:
        assert not path.stem.startswith("bad-")
        parse_request(request_bytes(example), decode=codec.decode)
        return
    with pytest.raises(RequestError) as error:
        parse_request(request_bytes(example), decode=codec.decode)
    assert {"code": error.value.code, "run_id": error.value.run_id} == example["error"]
    assert error.value.reason


JSON_REQUESTS = [path for path in REQUESTS if "value" in raw(path) and not raw(path)["headers"]]


@pytest.mark.parametrize("path", JSON_REQUESTS, ids=lambda path: path.stem)
def test_json_schema_of_requests_judges_the_examples_alike(path: Path) -> None:
    example = raw(path)
    schema = json.loads((ROOT / "schemas/json/run-request.v1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert jsonschema.Draft202012Validator(schema).is_valid(example["value"]) == ("error" not in example)


def test_the_same_request_in_three_forms_has_one_content() -> None:
    names = ("start-workflow", "start-defaults-spelled-out", "start-avro")
    examples = [raw(EXAMPLES / f"run-requests/v1/{name}.json") for name in names]
    assert len({parse_request(request_bytes(e), decode=codec.decode).content_hash() for e in examples}) == 1
    assert isinstance(codec.decode(request_bytes(examples[2])), RunRequest)


def test_bytes_in_examples_are_base64() -> None:
    example = raw(EXAMPLES / "dead-letters/v1/malformed-request.json")
    assert base64.b64decode(example["value"]["original"]) == b'{"workflow": refunds}'


def test_json_schema_of_requests_is_up_to_date() -> None:
    text = (ROOT / "schemas/json/run-request.v1.json").read_text(encoding="utf-8")
    assert json.loads(text) == request_json_schema(), "run `tidegate topics docs`"
