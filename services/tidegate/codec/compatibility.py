"""Whether records written with one schema can be read as another, by the rules of `compiled.py`.

They are narrower than Avro's: a reader goes by the writer's schema and takes over fields by name, without converting values.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Final

import fastavro

from tidegate.codec.compiled import short_name

_PRIMITIVES: Final = frozenset(("null", "boolean", "int", "long", "float", "double", "string", "bytes"))
_WIDER: Final = {("int", "long")}  # all whole numbers are read alike


def history_problems(history: Sequence[dict[str, Any]]) -> list[str]:
    """Return why records of some version in a history (oldest first) could not be read by a later one. Transitive."""
    return [
        f"version {older + 1} as version {newer + 1}: {problem}"
        for older, newer in combinations(range(len(history)), 2)
        for problem in problems(history[older], history[newer])
    ]


def problems(writer: dict[str, Any], reader: dict[str, Any]) -> list[str]:
    """Return why records of `writer` cannot be read as `reader`; empty if they can. Both are raw Avro schemas."""
    parsed_writer, parsed_reader = fastavro.parse_schema(writer), fastavro.parse_schema(reader)
    comparison = _Comparison(_types(parsed_writer), _types(parsed_reader))
    comparison.compare(parsed_writer, parsed_reader, short_name(parsed_reader))
    return comparison.found


def contradictions(writer: Any, reader: Any) -> list[str]:
    """Return where records of two parsed schemas of one name hold values of other types under the same names.

    Fields and records that only one of them has do not matter: either may be the newer.
    """
    comparison = _Comparison(_types(writer), _types(reader), shared_only=True)
    comparison.compare(writer, reader, short_name(reader))
    return comparison.found


class _Comparison:
    """Walks two schemas side by side. `path` says where, as `RunEntry.events[](StepReady).call`."""

    def __init__(
        self, writer_types: dict[str, Any], reader_types: dict[str, Any], *, shared_only: bool = False
    ) -> None:
        self.found: list[str] = []
        self._shared_only = shared_only
        self._writer_types = writer_types
        self._reader_types = reader_types

    def compare(self, writer: Any, reader: Any, path: str) -> None:
        writer, reader = _resolved(writer, self._writer_types), _resolved(reader, self._reader_types)
        if isinstance(writer, list) or isinstance(reader, list):
            self._unions(writer, reader, path)
        elif not _fits(writer, reader):
            self.found.append(f"{path}: was {_kind(writer)}, is {_kind(reader)}")
        elif isinstance(writer, dict) and writer["type"] == "record":
            self._records(writer, reader, path)
        elif isinstance(writer, dict) and writer["type"] in ("array", "map"):
            part = "items" if writer["type"] == "array" else "values"
            self.compare(writer[part], reader[part], f"{path}[]")
        elif isinstance(writer, dict):
            self.found.append(f"{path}: {writer['type']} is not used in records of Tidegate")

    def _records(self, writer: Any, reader: Any, path: str) -> None:
        written = {field["name"]: field["type"] for field in writer["fields"]}
        for field in reader["fields"]:
            inner = f"{path}.{field['name']}"
            if field["name"] in written:
                self.compare(written[field["name"]], field["type"], inner)
            elif "default" not in field and not self._shared_only:
                self.found.append(f"{inner}: is new and has no default")

    def _unions(self, writer: Any, reader: Any, path: str) -> None:
        """Every branch that may have been written must be one that can be read."""
        branches = [
            _resolved(branch, self._reader_types) for branch in (reader if isinstance(reader, list) else [reader])
        ]
        for branch in writer if isinstance(writer, list) else [writer]:
            written = _resolved(branch, self._writer_types)
            match = next((other for other in branches if _fits(written, other)), None)
            if match is None and self._shared_only and isinstance(written, dict) and written["type"] == "record":
                continue
            if match is None:
                self.found.append(f"{path}: may have been {_kind(written)}, which is not read any more")
            elif isinstance(written, dict):
                is_record = written["type"] == "record"
                self.compare(written, match, f"{path}({short_name(written)})" if is_record else path)


def _fits(written: Any, read: Any) -> bool:
    """Tell whether two types are of one kind; records are if they have one name."""
    if isinstance(written, str) and isinstance(read, str) and (written, read) in _WIDER:
        return True
    return _kind(written) == _kind(read)


def _kind(schema: Any) -> str:
    if isinstance(schema, list):
        return " or ".join(_kind(branch) for branch in schema)
    if isinstance(schema, str):
        return schema.rpartition(".")[2]
    return f"record {short_name(schema)}" if schema["type"] == "record" else str(schema["type"])


def _types(parsed: Any) -> dict[str, Any]:
    types: dict[str, Any] = parsed["__named_schemas"]
    return types


def _resolved(schema: Any, types: dict[str, Any]) -> Any:
    """Return a type's definition: a primitive's name, a list of branches, or a dict that is no primitive."""
    if isinstance(schema, dict) and schema["type"] in _PRIMITIVES:
        return schema["type"]
    if isinstance(schema, str) and schema not in _PRIMITIVES:
        return types[schema]
    return schema
