"""Avro single-object encoding: `C3 01`, the schema's CRC-64-AVRO fingerprint (little endian), the Avro body.

Format: Avro specification 1.12, "Single object encoding". A reader finds the writer's schema by the fingerprint, among the
schemas it ships with or those that were registered from the `schemas` topic, so a log explains itself for ever.
"""

from __future__ import annotations

import inspect
import json
import struct
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

import fastavro
import msgspec
from fastavro.schema import fingerprint, to_parsing_canonical_form

from tidegate.codec.compatibility import contradictions
from tidegate.codec.compiled import (
    Decoder,
    Encoder,
    make_decoder,
    make_encoder,
    make_piecewise_encoder,
    short_name,
)
from tidegate.domain import entry, ledger_events, messages, requests, run_events
from tidegate.domain.entry import Entry

MAGIC: Final = b"\xc3\x01"
HEADER_LENGTH: Final = 10
# Of an entry: where its owner stood, which tables it knew, and the chain. Nobody makes rows of them.
OWNERS_FIELDS: Final = frozenset(("prev_hash", "inputs", "marks", "told", "tables"))


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
    """A parsed schema with its name and its single-object header. Its functions are made when they are first needed."""

    def __init__(self, text: str) -> None:
        raw = json.loads(text)
        self.text = text
        # fastavro prints the fingerprint's bytes in the order in which the single-object header holds them.
        self.header = MAGIC + bytes.fromhex(fingerprint(to_parsing_canonical_form(raw), "CRC-64-AVRO"))
        self.parsed = fastavro.parse_schema(raw)
        self.name = short_name(self.parsed)

    @cached_property
    def write(self) -> Encoder:
        return make_encoder(self.parsed, _structs(), self.header)

    @cached_property
    def write_in_pieces(self) -> tuple[Callable[[Any, bytes], bytes], Encoder]:
        return make_piecewise_encoder(self.parsed, _structs(), self.header, "events")

    @cached_property
    def read(self) -> Decoder:
        return make_decoder(self.parsed, _structs(), HEADER_LENGTH, raw=False)

    @cached_property
    def read_raw(self) -> Decoder:
        return make_decoder(self.parsed, _structs(), HEADER_LENGTH, raw=True)

    @cached_property
    def read_facts(self) -> Decoder:
        without = OWNERS_FIELDS if _structs().get(self.name) is Entry else frozenset[str]()
        return make_decoder(self.parsed, _structs(), HEADER_LENGTH, raw=True, without=without)


_by_header: dict[bytes, _Schema] = {}


@cache
def _structs() -> dict[str, type[msgspec.Struct]]:
    """Return what a record of each name is read into."""
    found: dict[str, type[msgspec.Struct]] = {"RunEntry": Entry, "LedgerEntry": Entry}
    for module in (entry, messages, run_events, ledger_events, requests):
        for name, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, msgspec.Struct) and found.setdefault(name, member) is not member:
                raise TypeError(f"two records are named {name}")
    return found


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


def encode(record: msgspec.Struct) -> bytes:
    """Return the single-object encoding of a record by the newest schema of its class. Raises ValueError on bad values."""
    name = type(record).__name__
    try:
        return _schemas_by_name()[name].write(record)
    except _BAD_VALUES as error:
        raise _bad(name, error) from error


def encode_events(kind: str, events: Sequence[Any]) -> bytes:
    """Return a block of events, at least one, for an entry of the kind. Raises ValueError on bad values."""
    try:
        return _schemas_by_name()[kind].write_in_pieces[1](events)
    except _BAD_VALUES as error:
        raise _bad(kind, error) from error


def encode_entry(kind: str, value: Entry, blocks: bytes | None = None) -> bytes:
    """Return the encoding of a log entry; `kind` is `RunEntry` or `LedgerEntry`. Raises ValueError on bad values.

    blocks: what `encode_events` made of the entry's events, in order; made here if it was not before.
    """
    if blocks is None:
        blocks = encode_events(kind, value.events) if value.events else b""
    try:
        return _schemas_by_name()[kind].write_in_pieces[0](value, blocks)
    except _BAD_VALUES as error:
        raise _bad(kind, error) from error


_BAD_VALUES: Final = (AttributeError, KeyError, OverflowError, TypeError, struct.error)


def _bad(name: str, error: Exception) -> ValueError:
    return ValueError(f"not a good {name}: {type(error).__name__}: {error}")


def decode(data: bytes | None) -> Any:
    """Return the record that the bytes hold: a struct of `tidegate.domain`, an `Entry` for both kinds of entry.

    Raises UnknownSchemaError if the schema is not known, DecodeError for anything else that is wrong. Never blocks.
    """
    schema = _schema_of(data)
    try:
        return schema.read(data)
    except Exception as error:  # broken bodies show in many ways
        raise _broken(schema, error) from error


def decode_raw(data: bytes | None) -> tuple[str, dict[str, Any]]:
    """Return a record's name and its fields as plain values, as its writer's schema has them; a union's are (name, fields).

    For readers who want to see what was written rather than what it means to this version. Raises like `decode`.
    """
    schema = _schema_of(data)
    try:
        return schema.name, schema.read_raw(data)
    except Exception as error:
        raise _broken(schema, error) from error


def decode_facts(data: bytes | None) -> tuple[str, dict[str, Any]]:
    """Return what `decode_raw` does, but of an entry without what only its owner and verifiers need (OWNERS_FIELDS)."""
    schema = _schema_of(data)
    try:
        return schema.name, schema.read_facts(data)
    except Exception as error:
        raise _broken(schema, error) from error


def _schema_of(data: bytes | None) -> _Schema:
    if data is None or data[:2] != MAGIC or len(data) < HEADER_LENGTH:
        raise DecodeError("not an Avro single-object record (the first two bytes must be C3 01)")
    schema = _by_header.get(data[:HEADER_LENGTH])
    if schema is None:
        _schemas_by_name()  # the first call of the process loads them
        schema = _by_header.get(data[:HEADER_LENGTH])
    if schema is None:
        raise UnknownSchemaError(data[2:HEADER_LENGTH].hex())
    return schema


def _broken(schema: _Schema, error: Exception) -> DecodeError:
    return DecodeError(f"broken {schema.name}: {type(error).__name__}: {error}")


def schema_texts() -> dict[str, str]:
    """Return every known schema as fingerprint (hex) -> text: those shipped, and those registered since."""
    _schemas_by_name()
    known = list(_by_header.items())  # at once: another thread may register one
    return {header[2:].hex(): schema.text for header, schema in known}


def register_schema(text: str) -> None:
    """Make a schema from the `schemas` topic known to `decode`. Idempotent. Raises DecodeError if it is not one of ours."""
    try:
        schema = _Schema(text)
        if schema.name not in _schemas_by_name():
            raise DecodeError(f"schema {schema.name!r} is not a record of Tidegate")
        schema.read  # noqa: B018 - makes the function now, so that a schema we cannot read is refused here
        # Whoever decides trusts that fields are of their types: what is read is not checked again.
        if problems := contradictions(schema.parsed, _schemas_by_name()[schema.name].parsed):
            raise DecodeError(f"schema {schema.name!r} contradicts ours: {problems[0][:300]}")
    except DecodeError:
        raise
    except Exception as error:  # fastavro's complaints have no common base
        raise DecodeError(f"not a schema that can be read: {type(error).__name__}: {error}") from error
    _by_header.setdefault(schema.header, schema)
