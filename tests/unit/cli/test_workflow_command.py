"""`tidegate workflow validate` and `graph`, on files and apps: nothing here needs Kafka."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate.cli import drawing
from tidegate.cli.workflow import app

SHOP = """
from tidegate import App, Goto

app = App("shop")

@app.step
def classify(order: dict) -> dict:
    return order

@app.step
def refund(order: dict) -> dict:
    return order

@app.step
def review(order: dict) -> Goto:
    return Goto("refund", order)

inner = app.graph("inner").chain(refund)
shop = app.graph("shop", failure_mode="continue")
shop.node("classify", classify).node("review", review, routes=["refund", "close"]).node("refund", refund)
shop.map("close", refund, over="[1, 2]", join="any").workflow("book", inner)
shop.edge("classify", "review", when="output.amount > 100").edge("close", "book")
"""

GRAPH = """
name: small
version: "1"
nodes:
  classify: {function: classify}
  refund: {function: refund, input: "${ nodes.nothing }"}
  again: {kind: router, choose: output, routes: [classify]}
  lost: {kind: map, function: nobody}
edges: [[classify, refund], {from: refund, to: again, when: "output +"}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop_of_tests.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tidegate(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.feature("G1")
def test_a_file_says_the_graph_and_an_app_the_functions(folder: Path) -> None:
    good = (
        GRAPH.replace("nodes.nothing", "nodes.classify")
        .replace("output +", "true")
        .replace("{kind: map, function: nobody}", "{kind: map, function: refund, over: '[1]'}")
    )
    (folder / "small.yaml").write_text(good)
    assert tidegate("validate", "small.yaml", "--app", "shop_of_tests.py:app") == (0, "small@1: can run\n")
    code, text = tidegate("validate", "small.yaml")
    assert code == 2
    assert "nodes.classify: 'kind' is a required property" in text


@pytest.mark.feature("G1")
def test_everything_that_is_wrong_comes_in_one_report_with_its_place(folder: Path) -> None:
    (folder / "small.yaml").write_text(GRAPH)
    code, text = tidegate("validate", "small.yaml", "--app", "shop_of_tests.py:app", "--json")
    assert code == 2
    (problems,) = json.loads(text).values()
    for place in (
        "nodes.lost: unknown function 'nobody'",
        "nodes.lost: a node of kind map needs `over`",
        "nodes.refund.input: reads nodes.nothing, and there is no such node",
        "edges.refund -> again.when: 'output +' does not compile",
    ):
        assert any(problem.startswith(place) for problem in problems), (place, problems)


@pytest.mark.feature("G1")
def test_definitions_of_one_file_may_name_each_other(folder: Path) -> None:
    inner = {"name": "in", "version": "1", "nodes": {"a": {"function": "refund"}}}
    outer = {"name": "out", "version": "1", "nodes": {"b": {"kind": "workflow", "workflow": "in@1"}}}
    (folder / "both.json").write_text(json.dumps([outer, inner]))
    assert tidegate("validate", "both.json", "--app", "shop_of_tests.py")[0] == 0
    inner["nodes"] = {"a": {"kind": "workflow", "workflow": "out@1"}}  # type: ignore[dict-item]
    (folder / "both.json").write_text(json.dumps([outer, inner]))
    code, text = tidegate("validate", "both.json", "--app", "shop_of_tests.py")
    assert code == 2
    assert "'out@1' is not among the `workflows`" in text


@pytest.mark.feature("G1")
def test_an_app_is_validated_and_drawn(folder: Path) -> None:
    assert tidegate("validate", "shop_of_tests.py:app") == (0, "inner@1: can run\nshop@1: can run\n")
    code, text = tidegate("graph", "shop_of_tests.py:app")
    assert code == 0
    assert '    n2["refund"]' in text.splitlines()
    assert '    n3[["close<br/>refund for each of #91;1, 2#93;<br/>any branch"]]' in text.splitlines()
    assert '    n0 -->|"output.amount #62; 100"| n1' in text.splitlines()
    assert "    n1 -.-> n3" in text.splitlines()
    code, text = tidegate("graph", "shop_of_tests.py:app", "--format", "dot")
    assert code == 0
    assert '    "classify" -> "review" [label="output.amount > 100"];' in text.splitlines()
    assert '    "book" [label="book\\ninner@1", shape=folder];' in text.splitlines()
    assert '    "review" -> "close" [style=dashed];' in text.splitlines()


def test_what_cannot_run_is_not_drawn(folder: Path) -> None:
    (folder / "small.yaml").write_text(GRAPH)
    code, text = tidegate("graph", "small.yaml", "--app", "shop_of_tests.py:app")
    assert code == 2
    assert "nodes.nothing" in text


def test_a_name_cannot_break_out_of_a_picture() -> None:
    nasty = 'a"];x-->y%%{init}'
    definition = {
        "name": "w",
        "nodes": {"a": {"kind": "router", "choose": nasty, "routes": ["a"]}},
        "edges": [{"from": "a", "to": "a", "when": nasty}],
    }
    for line in drawing.mermaid(definition).splitlines()[1:]:
        assert line.count('"') in (0, 2)
    assert json.dumps(nasty) in drawing.dot(definition)
