"""JSON Schema as it is applied here: in time that grows with the value, and strictly to values that become fields of ours."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any, Final

import jsonschema

MAX_PROBLEMS: Final = 10  # that are said of one value: who sends a thousand gets to know these
_fitting: Final[ContextVar[dict[tuple[int, int], bool]]] = ContextVar("fitting")
_REFERENCE: Final = jsonschema.Draft202012Validator.VALIDATORS["$ref"]
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


def _reference(validator: Any, reference: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """Look at each value once for each place that refers to a schema: trees that refer to themselves in several branches would
    else be looked at twice as often on each level.
    """
    fitting, key = _fitting.get(None), (id(schema), id(value))  # both live as long as the value is checked
    known = None if fitting is None else fitting.get(key)
    if known is not None:
        if not known:
            yield jsonschema.ValidationError(f"does not fit {reference}, as was said")
        return
    fits = True
    for error in _REFERENCE(validator, reference, value, schema):
        fits = False
        if fitting is not None:
            fitting[key] = False
        yield error
    if fits and fitting is not None:
        fitting[key] = True


def first_problems(validator: Any, value: Any, where: str) -> str | None:
    """Return what is wrong with a value by its schema, at most ten things, each with its place in `where`; None if nothing is.

    Never raises: what cannot be checked does not fit.
    """
    remembering = _fitting.set({})
    try:
        found = [
            f"{where}{''.join(f'[{part!r}]' for part in error.absolute_path)}: {shape_problem(error)}"
            for error in itertools.islice(validator.iter_errors(value), MAX_PROBLEMS)
        ]
    except Exception as error:  # endless references, numbers that do not fit its arithmetic: many types
        return f"{where} cannot be checked: {type(error).__name__}: {error}"[:300]
    finally:
        _fitting.reset(remembering)
    return "; ".join(sorted(found)) or None


_RULES: Final = {"uniqueItems": _unique_items, "$ref": _reference}

Validator: Final = jsonschema.validators.extend(  # type: ignore[no-untyped-call] # the library says no types
    jsonschema.Draft202012Validator, _RULES
)
# The standard takes 3.0 for an integer; what is made of the value afterwards does not, and would fail at its first use.
StrictValidator: Final = jsonschema.validators.extend(  # type: ignore[no-untyped-call]
    Validator, type_checker=Validator.TYPE_CHECKER.redefine("integer", _is_integer)
)
