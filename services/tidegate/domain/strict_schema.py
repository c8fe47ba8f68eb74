"""JSON Schema as it is applied here: in time that grows with the value, and strictly to values that become fields of ours."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Final

import jsonschema

MAX_SAID: Final = 300
_LAST: Final = 120


def _is_integer(_: Any, value: Any) -> bool:
    return type(value) is int


def _unique_items(validator: Any, is_wanted: Any, items: Any, _: Any) -> Iterator[jsonschema.ValidationError]:
    """Say that a list has an item twice. The library's own rule compares each with each if they are of several types."""
    if is_wanted and validator.is_type(items, "array") and len(set(map(_mark, items))) < len(items):
        yield jsonschema.ValidationError(f"{items!r} has non-unique elements")


def _mark(value: Any) -> Hashable:
    """Return what is equal of values that JSON Schema takes for equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return dict, frozenset((name, _mark(member)) for name, member in value.items())
    if isinstance(value, list | tuple):
        return list, tuple(map(_mark, value))
    return isinstance(value, bool), value


def shape_problem(error: jsonschema.ValidationError) -> str:
    """Return what is wrong in at most some 300 characters. The value stands first in what the library says, the rule last."""
    text = str(error.message)
    return text if len(text) <= MAX_SAID else f"{text[: MAX_SAID - _LAST]} … {text[-_LAST:]}"


_RULES: Final = {"uniqueItems": _unique_items}

Validator: Final = jsonschema.validators.extend(  # type: ignore[no-untyped-call] # the library says no types
    jsonschema.Draft202012Validator, _RULES
)
# The standard takes 3.0 for an integer; what is made of the value afterwards does not, and would fail at its first use.
StrictValidator: Final = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    Validator, type_checker=Validator.TYPE_CHECKER.redefine("integer", _is_integer)
)
