"""The declared rule by which what a function returns becomes JSON. What it does not name is refused, never guessed.

| Python | JSON |
| --- | --- |
| None, bool, int, str | as they are; text must be valid Unicode |
| float | a number; NaN and the infinities are refused, JSON has none |
| list, tuple | array |
| dict, other mappings | object; every key must be a string |
| pydantic model | as the model serialises itself: `model_dump(mode="json")`, checked by this table again |
| dataclass | object of its fields |
| Enum | its value |
| datetime | ISO 8601 text with its UTC offset; one without a time zone is refused: nobody could tell what it means |
| date | ISO 8601 text |
| Decimal | text, exact; NaN and infinities refused |
| UUID | text |
| set, frozenset | refused: they have no order, so equal runs would differ |
| bytes | refused: encode them as text (base64, say), or keep them elsewhere and return where |
| anything else | refused |
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from collections.abc import Mapping
from typing import Any, Final

import pydantic

from tidegate.domain import canonical
from tidegate.sdk.errors import NotJsonError

MAX_DEPTH: Final = 100


def to_text(value: Any) -> str:
    """Return the canonical JSON text of a function's output. Raises NotJsonError."""
    return canonical.dumps(to_json(value))


def to_json(value: Any, where: str = "output") -> Any:
    """Return the value made of None, bool, int, float, str, list and dict only. Raises NotJsonError."""
    return _to_json(value, where, 0)


def _to_json(value: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise NotJsonError(f"{where}: nested deeper than {MAX_DEPTH} levels, or contains itself")
    if value is None or value is True or value is False:
        return value
    if (known := _PLAIN.get(type(value))) is not None:
        return known(value, where, depth)
    for kinds, convert in _CONVERTERS:
        if isinstance(value, kinds):
            return convert(value, where, depth)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _object(fields, where, depth)
    raise NotJsonError(f"{where}: {_type_name(value)} has no JSON form; return numbers, text, lists or objects")


def _text(value: str, where: str, _depth: int) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NotJsonError(f"{where}: text with a lone surrogate at {error.start}") from None
    return str(value)


def _number(value: float, where: str, _depth: int) -> float:
    if not math.isfinite(value):
        raise NotJsonError(f"{where}: {value!r} is not a JSON number")
    return float(value)


def _array(value: list[Any] | tuple[Any, ...], where: str, depth: int) -> list[Any]:
    return [_to_json(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]


def _object(value: Mapping[Any, Any], where: str, depth: int) -> dict[str, Any]:
    members = {}
    for key, member in value.items():
        name = key.value if isinstance(key, enum.Enum) else key
        if not isinstance(name, str):
            raise NotJsonError(f"{where}: key {key!r} is {_type_name(key)}, keys must be text")
        members[_text(name, where, depth)] = _to_json(member, f"{where}.{name}", depth + 1)
    return members


def _model(value: pydantic.BaseModel, where: str, depth: int) -> Any:
    try:
        dumped = value.model_dump(mode="json")
    except Exception as error:  # a model's own serialisers may raise anything
        raise NotJsonError(f"{where}: {_type_name(value)}: {error}") from error
    return _to_json(dumped, where, depth + 1)


def _datetime(value: datetime.datetime, where: str, _depth: int) -> str:
    if value.utcoffset() is None:
        raise NotJsonError(f"{where}: {value!r} has no time zone; use datetime.now(UTC), say")
    return value.isoformat()


def _decimal(value: decimal.Decimal, where: str, _depth: int) -> str:
    if not value.is_finite():
        raise NotJsonError(f"{where}: {value!r} is not a number")
    return str(value)


def _refused(reason: str) -> Any:
    def refuse(value: Any, where: str, _depth: int) -> Any:
        raise NotJsonError(f"{where}: {_type_name(value)}: {reason}")

    return refuse


def _type_name(value: Any) -> str:
    return type(value).__name__


# Most values; by their very type, so that no subclass is taken for one of them.
_PLAIN: Final[dict[type, Any]] = {
    str: _text,
    int: lambda value, _where, _depth: value,
    float: _number,
    dict: _object,
    list: _array,
    tuple: _array,
}
# In this order: an Enum may also be a str or an int, a datetime is a date.
_CONVERTERS: Final[tuple[tuple[Any, Any], ...]] = (
    (enum.Enum, lambda value, where, depth: _to_json(value.value, where, depth + 1)),
    (str, _text),
    (int, lambda value, _where, _depth: int(value)),
    (float, _number),
    (Mapping, _object),
    ((list, tuple), _array),
    (pydantic.BaseModel, _model),
    (datetime.datetime, _datetime),
    (datetime.date, lambda value, _where, _depth: value.isoformat()),
    (decimal.Decimal, _decimal),
    (uuid.UUID, lambda value, _where, _depth: str(value)),
    ((set, frozenset), _refused("it has no order; return a sorted list")),
    ((bytes, bytearray, memoryview), _refused("encode it as text, or keep it elsewhere and return where")),
)
