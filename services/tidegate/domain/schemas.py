"""JSON Schemas that people write: whether they are any, and that they refer to nothing but themselves. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import referencing
from referencing.jsonschema import DRAFT202012

from tidegate.domain.strict_schema import Validator, shape_problem

# Only what a schema itself holds: nothing is ever fetched, because a decision has no inputs but those in the log.
NOTHING_ELSEWHERE: Final[referencing.Registry[Any]] = referencing.Registry()
_of_schemas = Validator(Validator.META_SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
MAX_SCHEMA_PROBLEMS: Final = 20  # that are listed of one schema
_VALUES_NOT_SCHEMAS: Final = frozenset(("const", "default", "enum", "examples"))


def schema_problems(where: str, schema: Any) -> list[str]:
    """Return what is wrong with a schema; `where` is how each problem begins."""
    wrong = list(itertools.islice(_of_schemas.iter_errors(schema), MAX_SCHEMA_PROBLEMS))
    if wrong:
        return [f"{where}: not a JSON Schema: {_place(error)}{shape_problem(error)}" for error in wrong]
    resolver = NOTHING_ELSEWHERE.resolver_with_root(DRAFT202012.create_resource(schema))
    found = []
    for reference in sorted(set(_references(schema))):
        try:
            resolver.lookup(reference)
        except Exception:  # of many types
            found.append(f"{where}: $ref {reference[:200]!r} names nothing in this schema")
    return found


def _place(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path))}: " if error.absolute_path else ""


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
