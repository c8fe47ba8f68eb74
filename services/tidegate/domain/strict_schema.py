"""JSON Schema for values that become fields of ours: an integer is one as it is written.

The standard takes 3.0 for an integer; what is made of the value afterwards does not, and would fail at its first use.
"""

from __future__ import annotations

from typing import Any, Final

import jsonschema


def _is_integer(_: Any, value: Any) -> bool:
    return type(value) is int


StrictValidator: Final = jsonschema.validators.extend(  # type: ignore[no-untyped-call] # the library says no types
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
