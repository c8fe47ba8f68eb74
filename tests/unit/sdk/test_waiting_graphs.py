"""Waits in the graph builder, and which errors a function lets be tried again."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from tidegate import App, GraphError
from tidegate.sdk.errors import AppError


class Amount(pydantic.BaseModel):
    """An answer with a form."""

    cents: int


@pytest.fixture
def app() -> App:
    made = App("shop")

    @made.step
    def ship(order: Any) -> None: ...

    return made


@pytest.mark.feature("D3")
def test_waits_become_nodes(app: App) -> None:
    graph = (
        app.graph("g")
        .wait_event("paid", "paid", key="${ input.id }", timeout_s=5)
        .wait_until("open", "${ input.at }", input="x")
        .sleep("rest", 1.5)
        .ask("sure", "Sure?", choices=("yes", "no"), timeout_s=9, timeout_value="no")
        .ask("much", "How much?", schema=Amount, free_text=False)
        .chain("paid", "open", "rest", "sure", "much", "ship")
        .node("ship", "ship")
    )
    nodes = app.definition(graph)["nodes"]
    assert nodes["paid"] == {
        "kind": "wait_event",
        "wait": {"event": "paid", "key": "${ input.id }", "timeout_s": 5},
    }
    assert nodes["open"] == {"kind": "wait_until", "wait": {"at": "${ input.at }"}, "input": "x"}
    assert nodes["rest"] == {"kind": "sleep", "wait": {"seconds": 1.5}}
    assert nodes["sure"]["wait"] == {
        "prompt": "Sure?",
        "choices": ["yes", "no"],
        "timeout_s": 9,
        "timeout_value": "no",
        "on_timeout": "value",
    }
    assert nodes["much"]["wait"]["schema"]["required"] == ["cents"]
    assert list(app.definition(graph)["functions"]) == ["ship"]


def test_everything_wrong_with_waits_is_said_at_once(app: App) -> None:
    graph = app.graph("g").sleep("a", -1).sleep("a", 1).ask("b", "?", patience=5)
    with pytest.raises(GraphError) as error:
        app.definition(graph)
    assert "nodes.a: there twice" in str(error.value)
    assert "nodes.b: ask has no setting 'patience'" in str(error.value)


@pytest.mark.feature("D2")
def test_error_classes_are_named_and_left_out_if_there_are_none(app: App) -> None:
    @app.step(retry_on=[ConnectionError, "RateLimited"], no_retry_on=(ValueError,))
    def charge(order: Any) -> None: ...

    pinned = {name: function.to_definition() for name, function in app.functions.items()}
    assert pinned["charge"]["retry_on"] == ["ConnectionError", "RateLimited"]
    assert pinned["charge"]["no_retry_on"] == ["ValueError"]
    assert not {"retry_on", "no_retry_on"} & pinned["ship"].keys(), "hashes of older definitions would change"


@pytest.mark.parametrize("wrong", ["ValueError", [5], [""], None])
def test_what_names_no_error_class_is_refused(app: App, wrong: Any) -> None:
    if wrong is None:
        app.step(name="fine", retry_on=None)(lambda x: None)  # as if it had not been said
        return
    with pytest.raises(AppError, match="retry_on must be a list"):
        app.step(name="wrong", retry_on=wrong)(lambda x: None)
