"""The rule by which outputs become JSON: everything is either declared or refused."""

import dataclasses
import datetime
import decimal
import enum
import json
import math
import typing
import uuid

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.sdk.errors import NotJsonError
from tidegate.sdk.json_form import to_json, to_text

pytestmark = pytest.mark.feature("G3")


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Order(pydantic.BaseModel):
    id: str
    at: datetime.datetime
    items: tuple[int, ...] = ()


@dataclasses.dataclass
class Line:
    article: str
    price: decimal.Decimal
    next: "Line | None" = None


class Point(typing.NamedTuple):
    x: int
    y: int


NOON = datetime.datetime(2026, 1, 2, 12, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (0, 0),
        (2**80, 2**80),
        (1.5, 1.5),
        ("ü", "ü"),
        ((1, (2,)), [1, [2]]),
        (Point(1, 2), [1, 2]),
        ({"a": [1], "b": {}}, {"a": [1], "b": {}}),
        ({Colour.RED: 1}, {"red": 1}),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (NOON, "2026-01-02T12:00:00+01:00"),
        (NOON.date(), "2026-01-02"),
        (decimal.Decimal("1.10"), "1.10"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Order(id="A", at=NOON, items=(1,)), {"id": "A", "at": "2026-01-02T12:00:00+01:00", "items": [1]}),
        (
            Line("pen", decimal.Decimal(2), Line("ink", decimal.Decimal(3))),
            {"article": "pen", "price": "2", "next": {"article": "ink", "price": "3", "next": None}},
        ),
    ],
)
def test_declared(value, expected):
    made = to_json(value)
    assert made == expected
    assert json.loads(to_text(value)) == expected
    assert type(made) in (type(None), bool, int, float, str, list, dict)


def looped():
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "output: nan is not a JSON number"),
        ([1, -math.inf], r"output\[1\]: -inf"),
        (decimal.Decimal("NaN"), "output: Decimal"),
        ({"a": {"b": {1}}}, "output.a.b: set: it has no order"),
        (b"x", "output: bytes: encode it as text"),
        (NOON.replace(tzinfo=None), "output: .* has no time zone"),
        (datetime.time(12), "output: time has no JSON form"),
        ({1: 2}, "output: key 1 is int, keys must be text"),
        ("\ud800", "output: text with a lone surrogate at 0"),
        ({"\ud800": 1}, "lone surrogate"),
        (object(), "output: object has no JSON form"),
        (Order, "output: ModelMetaclass has no JSON form"),
        (Line, "output: type has no JSON form"),
        (looped(), "nested deeper than 100 levels, or contains itself"),
    ],
)
def test_refused(value, message):
    with pytest.raises(NotJsonError, match=message):
        to_text(value)


def test_a_model_is_checked_like_everything_else():
    class Reading(pydantic.BaseModel):
        value: float

    with pytest.raises(NotJsonError, match=r"output.value: nan|output: Reading"):
        to_text(Reading(value=math.nan))


def test_a_model_whose_serialiser_raises_is_refused():
    class Broken(pydantic.BaseModel):
        value: int

        @pydantic.field_serializer("value")
        def refuse(self, value: int) -> int:
            raise RuntimeError("not today")

    with pytest.raises(NotJsonError, match=r"output: Broken: .*not today"):
        to_text(Broken(value=1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(json_values)
def test_json_stays_as_it_is(value):
    assert to_json(value) == value
    assert json.loads(to_text(value)) == value
