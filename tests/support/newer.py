"""Records as a newer version writes them: by a schema that this one does not ship, which has a field more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tidegate import codec
from tidegate.codec import avro
from tidegate.eventlog.interface import Broker, Record
from tidegate.eventlog.schemas import SCHEMAS_TOPIC


@contextmanager
def own_schemas() -> Iterator[None]:
    """Forget afterwards what is registered inside the block."""
    codec.schema_texts()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(avro, "_by_header", dict(avro._by_header))
        yield


def of_a_newer_version(record: Any, kind: str = "") -> tuple[str, bytes]:
    """Return the schema's text and the record's bytes. kind: its name in Avro, if that is not the one of its class."""
    schema = json.loads(avro._schemas_by_name()[kind or type(record).__name__].text)
    schema["fields"].append({"name": "of_tomorrow", "type": "string", "default": ""})
    text = json.dumps(schema)
    body = avro.encode_entry(kind, record) if kind else avro.encode(record)
    return text, avro._Schema(text).header + body[avro.HEADER_LENGTH :] + b"\x00"


def publish(broker: Broker, text: str) -> None:
    """Write a schema as whoever uses it does before."""
    writer = broker.writer()
    writer.send(Record(SCHEMAS_TOPIC, 0, avro._Schema(text).header[2:].hex().encode(), text.encode()))
    writer.flush(10)
    writer.close()
