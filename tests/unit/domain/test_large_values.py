"""Expressions over large values: they see what they would see, and a large value is made once and not once for each of them."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate import App
from tidegate.domain import canonical, expressions
from tidegate.domain.expressions import ExpressionError, Values
from tidegate.testing import Rehearsal

LONG = "x" * 5000
SOURCES = (
    "input.c",
    "input.l.size() + item",
    "item",
    "nodes.a.v + input.c",
    "has(nodes.b) ? nodes.b : 'none'",
    "input.l.map(item, item + 1)",
    "hop == null",
    "output == nodes.a.v",
    "[input, nodes, item]",
    "index",
    "input.nothing",
)


def plain(source: str, variables: dict[str, Any]) -> tuple[str, Any]:
    try:
        return "gives", expressions.evaluate(source, variables)
    except ExpressionError as error:
        return "fails", str(error)


@pytest.mark.feature("G2")
@pytest.mark.parametrize("filling", ["", LONG])
def test_expressions_see_the_same_however_large_the_values_are(filling: str) -> None:
    run_input = {"c": "me", "l": [1, 2, 3], "filling": filling}
    nodes = {"a": {"v": "of a", "filling": filling}}
    contexts: dict[Any, Any] = {}
    for more in ({"item": 1}, {}, {"item": None, "index": 0}, {"hop": None}, {"item": 2}):
        for output in (None, "of a"):
            texts = {"input": canonical.dumps(run_input)} | (
                {} if output is None else {"output": canonical.dumps(output)}
            )
            values = Values(texts, {name: canonical.dumps(value) for name, value in nodes.items()}, more, contexts)
            variables = {"input": run_input, "nodes": nodes, **more} | ({} if output is None else {"output": output})
            for source in SOURCES:
                try:
                    found: tuple[str, Any] = "gives", values.evaluate(source)
                except ExpressionError as error:
                    found = "fails", str(error)
                assert found == plain(source, variables), (source, more)


@pytest.mark.feature("G2")
@pytest.mark.parametrize("template", ["${ input.customer }", "${ nodes.order.customer }", "${ item }"])
def test_a_large_value_is_not_made_for_each_item_of_a_map(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("x")

    @app.step
    def order(given: dict[str, Any]) -> dict[str, Any]:
        return given

    @app.step
    def pack(given: str) -> str:
        return given

    graph = (
        app.graph("g", max_steps=2000).node("order", order).map("pack", pack, over="nodes.order.lines", input=template)
    )
    graph.edge("order", "pack")
    made: list[int] = []
    loads = canonical.loads

    def counted(text: str | bytes) -> Any:
        made.append(len(text))
        return loads(text)

    monkeypatch.setattr(expressions.canonical, "loads", counted)
    with Rehearsal(app) as rehearsal:
        given = {"customer": "ann", "lines": [f"line {number} {'of many ' * 4}" for number in range(300)]}
        outcome = rehearsal.run("g", given)
        assert outcome.status == "succeeded"
        assert len(outcome.output) == 300
        # By whoever handles it once, and as what the items' inputs look at; not three hundred times.
        assert sum(size > 10_000 for size in made) < 20


@pytest.mark.feature("G2")
def test_a_large_output_is_made_once_for_all_conditions_that_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App("x")

    @app.step
    def classify(given: dict[str, Any]) -> dict[str, Any]:
        return given

    @app.step
    def act(given: Any) -> str:
        return "done"

    graph = app.graph("g", max_steps=2000).node("classify", classify)
    for number in range(50):
        graph.node(f"n{number}", act).edge("classify", f"n{number}", when=f"output.kind == 'k{number}'")
    made: list[int] = []
    context_of = expressions._context_of

    def counted(texts: Any, nodes: Any) -> Any:
        made.append(1)
        return context_of(texts, nodes)

    monkeypatch.setattr(expressions, "_context_of", counted)
    with Rehearsal(app) as rehearsal:
        outcome = rehearsal.run("g", {"kind": "k7", "filling": LONG})
        assert (outcome.status, list(outcome.steps)) == ("succeeded", ["classify", "n7"])
    assert len(made) == 1
