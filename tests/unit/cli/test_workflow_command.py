"""`tidegate workflow validate` and `graph`, on files and apps: nothing here needs Kafka."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
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


WRONG = """\
# a comment
name: wrong
version: "1"
nodes:
  a: {kind: step, function: refund}
  b:
    kind: step
    function: nobody
    join: {need: 9}
  c:
    kind: map
    function: refund
    over: >-
      [1,
      2
    input:
      deep: ["${ nodes.nothing }"]
  r: {kind: router, choose: "'a'", routes: [b, nowhere]}
  when: {kind: wait_until, wait: {at: 2030-01-31T09:00:00Z, on_timeout: value}}
edges:
  - [a, b]
  - {from: a, to: c, when: "output +"}
  - [a]
  - [c, when]
  - [when, c]
  - [a, b]
"""


@pytest.mark.feature("G1")
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_each_mistake_of_a_file_is_reported_with_its_line(folder: Path, suffix: str) -> None:
    text = WRONG
    if suffix == ".json":
        text = json.dumps(yaml.safe_load(WRONG.replace("2030-01-31T09:00:00Z", "'2030-01-31T09:00:00Z'")), indent="\t")
    (folder / f"wrong{suffix}").write_text(text)
    lines = text.splitlines()
    code, report = tidegate("validate", f"wrong{suffix}", "--app", "shop_of_tests.py:app", "--json")
    assert code == 2
    (found,) = json.loads(report).values()
    wanted = {
        "nodes.b: unknown function 'nobody'": '  b:\n    kind: step|"b": {',
        "nodes.b.join: needs 9 of the 2": "join",
        "nodes.c.over: '[1, 2' does not compile": "over",
        "nodes.c.input: reads nodes.nothing": "input",
        "nodes.r.routes: r -> nowhere names an unknown node": "nowhere",
        "nodes.when.wait.on_timeout: it needs `timeout_s`": "on_timeout",
        "edges.a -> c.when: 'output +' does not compile": None,
        "edges.2: ['a'] is too short": None,
        "edges: a -> b is there twice": None,
        "edges: a cycle keeps these nodes from ever starting": "edges",
    }
    for problem in wanted:
        assert any(one.startswith(problem) for one in found), (problem, found)
    assert len(found) == len(wanted)
    for problem in found:
        said = re.fullmatch(r".* \(line (\d+)\)", problem)
        assert said, problem
        part = next(part for place, part in wanted.items() if problem.startswith(place))
        if part and "|" not in part:
            assert part in lines[int(said[1]) - 1], problem


@pytest.mark.feature("G1")
def test_what_a_file_of_definitions_may_not_hold(folder: Path) -> None:
    """Nothing is lost silently, and nothing small becomes endless."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text, problem in (
        ("name: w\nnodes:\n  a: {}\n  a: {}\n", "line 4: a: is there twice"),
        ("name: w\nnodes:\n  1: {}\n", "line 3: 1: a key must be a text"),
        ("name: w\noutput: .nan\n", "line 2: .nan: JSON has no such number"),
        ("name: w\noutput: &x [*x]\n", "line 2: an alias of what it lies in itself"),
        ("name: [", "line 1: no YAML"),
        (bomb, "more than 1000000 values"),
        ("5", "a definition is an object"),
        ("[" * 3000, "no YAML"),
    ):
        (folder / "odd.yaml").write_text(text)
        code, report = tidegate("validate", "odd.yaml")
        assert code == 2, text[:50]
        assert problem in " ".join(report.split()), report[:500]
    (folder / "odd.json").write_text('{"name": "w",\n "nodes": {"a": {}, "a": {}}}')
    code, report = tidegate("validate", "odd.json")
    assert code == 2
    assert '"a"' in report
    assert "twice" in report


@pytest.mark.feature("G1")
def test_words_that_yaml_takes_for_true_and_false(folder: Path) -> None:
    (folder / "odd.yaml").write_text("""\
name: w
version: "1"
nodes:
  a: {kind: step, function: f}
  b: {kind: ask, wait: {prompt: fine, choices: [yes, "no"]}}
functions:
  f: {kind: step, retry_rules: [{on: [RateLimited], max_attempts: 9}]}
""")
    code, report = tidegate("validate", "odd.yaml", "--json")
    assert code == 2
    (found,) = json.loads(report)["w@1"]
    assert found.startswith("nodes.b.wait.choices.0: True is not of type 'string'; in YAML, yes, no")


@pytest.mark.feature("G1")
def test_two_definitions_of_one_name_are_both_looked_at(folder: Path) -> None:
    (folder / "two.yaml").write_text(
        "- {name: w, nodes: {a: {function: nobody}}, functions: {}}\n- {name: w, nodes: {b: {function: none}}, functions: {}}\n"
    )
    code, report = tidegate("validate", "two.yaml", "--json")
    assert code == 2
    (found,) = json.loads(report).values()
    assert "nodes.a: unknown function 'nobody' (known: none) (line 1)" in found
    assert "nodes.b: unknown function 'none' (known: none) (line 2)" in found
    assert "definition: w@None is there twice" in found
