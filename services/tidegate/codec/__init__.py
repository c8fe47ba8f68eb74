"""Bytes to records and back: Avro single-object encoding over the schemas in `schemas/avro`."""

from tidegate.codec.avro import (
    DecodeError,
    UnknownSchemaError,
    decode,
    decode_facts,
    decode_raw,
    encode,
    encode_entry,
    encode_events,
    register_schema,
    schema_texts,
    schemas_dir,
)

__all__ = [
    "DecodeError",
    "UnknownSchemaError",
    "decode",
    "decode_facts",
    "decode_raw",
    "encode",
    "encode_entry",
    "encode_events",
    "register_schema",
    "schema_texts",
    "schemas_dir",
]
