"""JSON Schemas that people write: whether they are any, and that they refer to nothing but themselves. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import referencing
from referencing.jsonschema import DRAFT202012

# Only what a schema itself holds: nothing is ever fetched, because a decision has no inputs but those in the log.
NOTHING_ELSEWHERE: Final[referencing.Registry[Any]] = referencing.Registry()
_VALUES_NOT_SCHEMAS: Final = frozenset(("const", "default", "enum", "examples"))


def schema_problems(where: str, schema: Any) -> list[str]:
    """Return what is wrong with a schema; `where` is how each problem begins."""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        return [f"{where}: not a JSON Schema: {error.message[:300]}"]
    resolver = NOTHING_ELSEWHERE.resolver_with_root(DRAFT202012.create_resource(schema))
    found = []
    for reference in sorted(set(_references(schema))):
        try:
            resolver.lookup(reference)
        except Exception:  # of many types
            found.append(f"{where}: $ref {reference[:200]!r} names nothing in this schema")
    return found


def _references(schema: Any) -> Iterator[str]:
    """Yield what the schema refers to, wherever it does."""
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            elif key not in _VALUES_NOT_SCHEMAS:
                yield from _references(value)
