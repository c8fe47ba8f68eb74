"""From recorded arguments to Python arguments, checked against the signature."""

import datetime
import functools

import pydantic
import pytest

from tidegate.sdk.binding import AGENT, STEP, TOOL, Binder
from tidegate.sdk.errors import AppError, BadArgumentsError
from tidegate.sdk.plan import State

pytestmark = pytest.mark.feature("T2")


class Address(pydantic.BaseModel):
    street: str
    number: int = 1


def ship(order_id: str, to: Address, *, on: datetime.date, copies: int = 2, note=None):
    return order_id, to, on, copies, note


def test_members_become_typed_arguments():
    bound = Binder(TOOL, ship).bind('{"order_id": "A", "to": {"street": "Quay"}, "on": "2026-01-02"}')
    assert ship(*bound.args, **bound.kwargs) == ("A", Address(street="Quay"), datetime.date(2026, 1, 2), 2, None)


def test_parameters_are_a_json_schema():
    schema = Binder(TOOL, ship).parameters()
    assert schema["type"] == "object"
    assert schema["required"] == ["order_id", "to", "on"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["copies"] == {"default": 2, "title": "Copies", "type": "integer"}
    assert schema["properties"]["to"] == {"$ref": "#/$defs/Address"}


def test_names_that_pydantic_models_could_not_have():
    def odd(schema: int, json: int, model_config: int, copy: int, self_: int):
        return schema, json, model_config, copy, self_

    bound = Binder(TOOL, odd).bind('{"schema": 1, "json": 2, "model_config": 3, "copy": 4, "self_": 5}')
    assert odd(*bound.args, **bound.kwargs) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            '{"to": {"street": 1}, "on": "soon"}',
            "order_id: is missing; to.street: Input should be a valid string, not 1; on: ",
        ),
        ('{"order_id": "A", "to": {"street": "Q"}, "on": "2026-01-02", "x": 1}', "x: there is no such parameter"),
        ('["A"]', "expected an object with the members order_id, to, on, copies, note"),
        ("null", "expected an object"),
        ("{", "Invalid JSON"),
    ],
)
def test_all_that_is_wrong_is_said(arguments, message):
    with pytest.raises(BadArgumentsError) as failure:
        Binder(TOOL, ship).bind(arguments)
    assert message in str(failure.value)


def test_messages_are_bounded():
    def many(numbers: list[int]): ...

    with pytest.raises(BadArgumentsError, match="and 90 more") as failure:
        Binder(TOOL, many).bind('{"numbers": [' + ",".join(['"' + "x" * 1000 + '"'] * 100) + "]}")
    assert len(str(failure.value)) < 2500


def test_a_step_with_one_parameter_gets_the_whole_input():
    def one(order: dict[str, int]): ...

    def untyped(order): ...

    assert Binder(STEP, one).bind('{"order": 1}').args == ({"order": 1},)
    assert Binder(STEP, untyped).bind("[null]").args == ([None],)
    with pytest.raises(BadArgumentsError):
        Binder(STEP, one).bind("[1]")


def test_a_step_with_several_parameters_gets_members_and_one_with_none_gets_nothing():
    def two(a: int, b: int = 7): ...

    def nothing(): ...

    assert Binder(STEP, two).bind('{"a": 1}').kwargs == {"a": 1, "b": 7}
    assert Binder(STEP, nothing).bind('{"a": 1}') == ((), {})


def test_a_tool_without_parameters_takes_none():
    def nothing(): ...

    assert Binder(TOOL, nothing).bind("{}") == ((), {})
    with pytest.raises(BadArgumentsError, match="a: there is no such parameter"):
        Binder(TOOL, nothing).bind('{"a": 1}')


def test_an_agent_gets_its_state():
    def plan(state): ...

    text = '{"input": {"q": 1}, "turn": 2, "history": [{"content": "c", "calls": []}]}'
    (state,) = Binder(AGENT, plan).bind(text).args
    assert isinstance(state, State)
    assert (state.input, state.turn, state.history[0].content) == ({"q": 1}, 2, "c")
    with pytest.raises(BadArgumentsError, match="not the State of an agent"):
        Binder(AGENT, plan).bind('{"turn": 1}')


def test_annotations_that_cannot_be_imported_here_only_matter_if_they_are_needed():
    def result_only(a: int) -> "NotImported": ...  # noqa: F821 - the point of the test

    def needed(a: "NotImported", b: int): ...  # noqa: F821 - the point of the test

    Binder(TOOL, result_only)
    with pytest.raises(AppError, match="NotImported"):
        Binder(TOOL, needed)


def test_partials_and_callable_objects():
    class Shop:
        def __call__(self, order: int) -> int:
            return order

    assert (
        Binder(TOOL, functools.partial(ship, copies=5))
        .bind('{"order_id": "A", "to": {"street": "Q"}, "on": "2026-01-02"}')
        .kwargs["copies"]
        == 5
    )
    assert Binder(TOOL, Shop()).bind('{"order": "4"}').kwargs == {"order": 4}


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        (TOOL, lambda *args: None, "no \\*args"),
        (TOOL, lambda **options: None, "no \\*args, \\*\\*kwargs"),
        (TOOL, lambda _secret: None, "underscore"),
        (AGENT, lambda: None, "takes one parameter, its State; this takes 0"),
        (AGENT, lambda state, tools: None, "this takes 2"),
    ],
)
def test_signatures_that_cannot_be_called(kind, function, message):
    with pytest.raises(AppError, match=message):
        Binder(kind, function)


def test_an_annotation_that_is_no_type_for_json_is_refused():
    class Plain: ...

    def tool(thing: Plain): ...

    with pytest.raises(AppError, match="annotations cannot be checked"):
        Binder(TOOL, tool)
