"""The `schemas` topic: every schema ever used, by its fingerprint, so that the log explains itself for ever."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Final, ParamSpec, TypeVar

import structlog

from tidegate import codec
from tidegate.eventlog.interface import Broker, Record
from tidegate.eventlog.validity import TYPE_HEADER

SCHEMAS_TOPIC: Final = "schemas"
SCHEMA_TYPE: Final = b"Schema"
WRITE_DEADLINE_S: Final = 30.0

P = ParamSpec("P")
T = TypeVar("T")
_log = structlog.get_logger()


def exchange_schemas(broker: Broker) -> None:
    """Do what `publish_schemas` and `load_schemas` do, with one reading of the topic. Blocks. Raises EventLogError."""
    there = _published(broker)
    _publish(broker, there)
    _load(there)


def publish_schemas(broker: Broker) -> list[str]:
    """Write every schema that this version ships and the `schemas` topic does not have; return their fingerprints.

    Done before anything is written with them, so that whoever reads the log can read it. Blocks. Raises EventLogError.
    """
    return _publish(broker, _published(broker))


def _publish(broker: Broker, there: Container[str]) -> list[str]:
    missing = {name: text for name, text in codec.schema_texts().items() if name not in there}
    if not missing:
        return []
    writer = broker.writer()
    try:
        for name, text in missing.items():
            headers = ((TYPE_HEADER, SCHEMA_TYPE),)
            writer.send(Record(SCHEMAS_TOPIC, 0, name.encode(), text.encode(), headers))
        writer.flush(WRITE_DEADLINE_S)
    finally:
        writer.close()
    return sorted(missing)


def load_schemas(broker: Broker) -> list[str]:
    """Make the schemas in the `schemas` topic known to the codec; return the fingerprints of those that were new.

    One that cannot be used (not a record of ours, or of a form that this version does not know) is logged and left out.
    Blocks. Raises EventLogError.
    """
    return _load(_published(broker))


def looking_up(broker: Broker, decode: Callable[P, T]) -> Callable[P, T]:
    """Return a decoder that reads the topic when it meets a schema that this process does not know, once for each schema.

    A newer version publishes its schemas before the first record of them, so whoever runs while others are upgraded finds them.
    The decoder blocks for that reading. It raises as `decode`, and EventLogError.
    """
    sought: set[str] = set()

    def decoded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return decode(*args, **kwargs)
        except codec.UnknownSchemaError as error:
            if error.fingerprint in sought:
                raise
            fingerprint = error.fingerprint
        load_schemas(broker)
        sought.add(fingerprint)
        return decode(*args, **kwargs)

    return decoded


def _load(published: Mapping[str, str]) -> list[str]:
    known = codec.schema_texts()
    loaded = []
    for name, text in published.items():
        if name in known:
            continue
        try:
            codec.register_schema(text)
            loaded.append(name)
        except codec.DecodeError as error:
            _log.error("schema skipped", fingerprint=name, error=str(error))
    return loaded


def _published(broker: Broker) -> dict[str, str]:
    start, end = broker.offsets(SCHEMAS_TOPIC, 0)
    found: dict[str, str] = {}
    for message in broker.read(SCHEMAS_TOPIC, 0, start, end):
        name = (message.key or b"").decode("utf-8", "replace")
        if message.value is None:
            found.pop(name, None)
        else:
            found[name] = message.value.decode("utf-8", "replace")
    return found
