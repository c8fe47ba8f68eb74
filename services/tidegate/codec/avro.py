"""Avro single-object encoding: `C3 01`, the schema's CRC-64-AVRO fingerprint (little endian), the Avro body.

Format: Avro specification 1.12, "Single object encoding". A reader finds the writer's schema by the fingerprint, among the
schemas it ships with or those that were registered from the `schemas` topic, so a log explains itself for ever.
"""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import fastavro
import msgspec
from fastavro.schema import fingerprint, to_parsing_canonical_form

from tidegate.domain import entry, messages
from tidegate.domain.entry import TAG_FIELD, Entry

MAGIC: Final = b"\xc3\x01"
HEADER_LENGTH: Final = 10

_RECORDS: Final[dict[str, type[msgspec.Struct]]] = {
    cls.__name__: cls
    for cls in (
        messages.RunCommand,
        messages.GateRequest,
        messages.GateDecision,
        messages.StepTask,
        messages.StepResult,
        messages.Instance,
        messages.DeadLetter,
        messages.WorkflowPublished,
        messages.PolicyPublished,
        entry.OwnerAnnounced,
    )
}


class DecodeError(ValueError):
    """The bytes are not a record of ours: wrong marker, broken body, or values that do not fit the type."""


class UnknownSchemaError(DecodeError):
    """The bytes name a schema that this process does not know; `fingerprint` (hex) is its key in the `schemas` topic."""

    def __init__(self, fingerprint_hex: str) -> None:
        super().__init__(f"unknown schema fingerprint {fingerprint_hex}")
        self.fingerprint = fingerprint_hex


def schemas_dir() -> Path:
    """Return the folder that holds `avro/` and `topics/`: inside the installed package, or in the source tree."""
    installed = Path(__file__).resolve().parents[1] / "_schemas"
    return installed if installed.is_dir() else Path(__file__).resolve().parents[3] / "schemas"


class _Schema:
    """A parsed schema with its name, its single-object header and what its records become."""

    __slots__ = ("header", "name", "parsed", "text", "to_record")

    def __init__(self, text: str) -> None:
        raw = json.loads(text)
        self.text = text
        self.name: str = raw["name"]
        # fastavro prints the fingerprint's bytes in the order in which the single-object header holds them.
        self.header = MAGIC + bytes.fromhex(fingerprint(to_parsing_canonical_form(raw), "CRC-64-AVRO"))
        self.parsed = fastavro.parse_schema(raw)
        self.to_record = _entry_from if self.name in _ENTRY_EVENTS else _record_from


@cache
def _schemas_by_name() -> dict[str, _Schema]:
    """Return the newest shipped schema of every record name."""
    newest: dict[str, tuple[int, _Schema]] = {}
    for path in sorted((schemas_dir() / "avro").glob("*.avsc")):
        version = int(path.stem.rpartition(".v")[2])
        schema = _Schema(path.read_text(encoding="utf-8"))
        _by_header[schema.header] = schema
        if version >= newest.get(schema.name, (0, schema))[0]:
            newest[schema.name] = (version, schema)
    return {name: schema for name, (_, schema) in newest.items()}


_by_header: dict[bytes, _Schema] = {}


def _unions(cls: Any) -> dict[str, type[msgspec.Struct]]:
    return {member.__name__: member for member in cls.__args__}


def _load_entry_events() -> dict[str, dict[str, type[msgspec.Struct]]]:
    from tidegate.domain import ledger_events, run_events

    return {"RunEntry": _unions(run_events.RunEvent), "LedgerEntry": _unions(ledger_events.LedgerEvent)}


_ENTRY_EVENTS: Final = _load_entry_events()
_ITEMS: Final = {"GateRequest": _unions(messages.GateItem), "GateDecision": _unions(messages.DecisionItem)}


def encode(record: msgspec.Struct) -> bytes:
    """Return the single-object encoding of a record by the newest schema of its class. Raises ValueError on bad values."""
    return _encode(type(record).__name__, record)


def encode_entry(kind: str, value: Entry) -> bytes:
    """Return the encoding of a log entry; `kind` is `RunEntry` or `LedgerEntry`."""
    return _encode(kind, value)


def _encode(name: str, record: msgspec.Struct) -> bytes:
    schema = _schemas_by_name()[name]
    out = io.BytesIO()
    out.write(schema.header)
    fastavro.schemaless_writer(out, schema.parsed, msgspec.to_builtins(record, builtin_types=(bytes,)))
    return out.getvalue()


def decode(data: bytes | None) -> Any:
    """Return the record that the bytes hold: a struct of `tidegate.domain`, an `Entry` for both kinds of entry.

    Raises UnknownSchemaError if the schema is not known, DecodeError for anything else that is wrong. Never blocks.
    """
    schema, raw = _read(data)
    try:
        return schema.to_record(schema.name, raw)
    except Exception as error:
        raise _broken(schema, error) from error


def decode_raw(data: bytes | None) -> tuple[str, dict[str, Any]]:
    """Return a record's name and its fields as plain values, as its writer's schema has them; a union's are (name, fields).

    For readers of very many records who need no structs: a third faster than `decode`. Raises like it. Never blocks.
    """
    schema, raw = _read(data)
    return schema.name, raw


def _read(data: bytes | None) -> tuple[_Schema, dict[str, Any]]:
    if data is None or data[:2] != MAGIC or len(data) < HEADER_LENGTH:
        raise DecodeError("not an Avro single-object record (the first two bytes must be C3 01)")
    _schemas_by_name()
    schema = _by_header.get(data[:HEADER_LENGTH])
    if schema is None:
        raise UnknownSchemaError(data[2:HEADER_LENGTH].hex())
    try:
        body = io.BytesIO(data)
        body.seek(HEADER_LENGTH)
        raw: Any = fastavro.schemaless_reader(
            body, schema.parsed, None, return_record_name=True, return_record_name_override=True
        )
    except Exception as error:  # fastavro reports broken bodies with whatever its reader stumbled over
        raise _broken(schema, error) from error
    if body.tell() != len(data):
        raise DecodeError(f"{len(data) - body.tell()} bytes left over after a {schema.name}")
    return schema, raw


def _broken(schema: _Schema, error: Exception) -> DecodeError:
    return DecodeError(f"broken {schema.name}: {type(error).__name__}: {error}")


def _entry_from(name: str, raw: dict[str, Any]) -> Entry:
    classes = _ENTRY_EVENTS[name]
    raw["events"] = tuple([_tagged(classes, branch) for branch in raw["events"]])
    return msgspec.convert(raw, Entry)


def _record_from(name: str, raw: dict[str, Any]) -> msgspec.Struct:
    classes = _ITEMS.get(name)
    if classes is not None:
        for branch, item in raw["items"]:
            item[TAG_FIELD] = branch
        raw["items"] = [item for _, item in raw["items"]]
    return msgspec.convert(raw, _RECORDS[name])


def _tagged(classes: dict[str, type[msgspec.Struct]], branch: tuple[str, dict[str, Any]]) -> msgspec.Struct:
    name, fields = branch
    fields[TAG_FIELD] = name
    return msgspec.convert(fields, classes[name])


def schema_texts() -> dict[str, str]:
    """Return every shipped schema as fingerprint (hex) -> text: what the `schemas` topic must hold."""
    _schemas_by_name()
    return {header[2:].hex(): schema.text for header, schema in _by_header.items()}


def register_schema(text: str) -> None:
    """Make a schema from the `schemas` topic known to `decode`. Idempotent. Raises DecodeError if it is not one of ours."""
    schema = _Schema(text)
    if schema.name not in _RECORDS and schema.name not in _ENTRY_EVENTS:
        raise DecodeError(f"schema {schema.name!r} is not a record of Tidegate")
    _by_header.setdefault(schema.header, schema)
