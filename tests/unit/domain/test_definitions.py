"""Definitions and expressions that somebody hostile, or in a hurry, would publish."""

from __future__ import annotations

import http.server
import threading
from typing import Any

import pytest

from tidegate.domain import canonical, expressions
from tidegate.domain.workflow import compile_definition, validate_definition


def definition(**changes: Any) -> dict[str, Any]:
    return {
        "name": "w",
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "f"}},
        "functions": {"f": {"kind": "step"}},
        **changes,
    }


@pytest.mark.feature("G1")
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Order"},
        {"properties": {"lines": {"items": {"$ref": "other.json"}}}},
        {"$dynamicRef": "#nowhere"},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"b": True}},
    ],
)
def test_a_schema_that_refers_to_nothing_is_not_published(schema: dict[str, Any]) -> None:
    assert any("names nothing" in problem for problem in validate_definition(definition(input_schema=schema)))
    tool = {"f": {"kind": "step"}, "t": {"kind": "tool", "parameters": schema}}
    assert any("functions.t.parameters" in problem for problem in validate_definition(definition(functions=tool)))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/Order", "$defs": {"Order": {"type": "object"}}},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"const": {"$ref": "only a value"}},
        {"properties": {"x": {"$ref": "#here"}}, "$defs": {"x": {"$anchor": "here"}}},
    ],
)
def test_a_schema_may_refer_to_itself(schema: dict[str, Any]) -> None:
    assert validate_definition(definition(input_schema=schema)) == []


def test_nothing_is_ever_fetched() -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        schema = {"$ref": f"http://127.0.0.1:{server.server_port}/schema.json"}
        assert validate_definition(definition(input_schema=schema))
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"$ref": "#"}, 1),
        ({"properties": {"price": {"multipleOf": 0.01}}}, {"price": 10**400}),
    ],
)
def test_a_value_that_cannot_be_checked_does_not_fit(schema: dict[str, Any], value: Any) -> None:
    workflow = compile_definition(canonical.dumps(definition(input_schema=schema)))
    assert "cannot be checked" in (workflow.input_problem(value) or "")


@pytest.mark.parametrize(
    "changes", [{"name": "w\n"}, {"version": "1\n"}, {"nodes": {"a\n": {"kind": "step", "function": "f"}}}]
)
def test_names_do_not_end_with_a_line_feed(changes: dict[str, Any]) -> None:
    assert any("line feed" in problem for problem in validate_definition(definition(**changes)))


def test_an_expression_may_not_go_over_lists_in_lists_in_lists() -> None:
    inner = "1"
    for depth in range(9):
        inner = f"[1, 2, 3].map(x{depth}, {inner})"
    with pytest.raises(expressions.ExpressionError, match="more than 3"):
        expressions.compile_expression(inner)
    assert expressions.evaluate("[1, 2].filter(x, x > 1).map(x, x * 2)", {}) == [4]


@pytest.mark.feature("G1")
def test_one_report_has_all_that_is_wrong_wherever_it_is() -> None:
    """A misspelled field, or an edge to nowhere, does not hide a cycle or an unknown function."""
    nodes = {
        "a": {"function": "nobody"},
        "b": {"kind": "step", "function": "f", "join": 5},
        "c": {"kind": "ask", "wait": {"choices": []}},
        "d": {"kind": "workflow", "workflow": "none@1"},
        "e": {"kind": "wait_until", "wait": {"at": "soon"}},
        "f": {"kind": "step", "functoin": "f"},
        "g": 7,
    }
    edges = [["a", "b"], ["b", "a"], ["b", "nowhere"], ["a", "b"]]
    found = validate_definition(definition(nodes=nodes, edges=edges, failure_mode="never"))
    for problem in (
        "failure_mode: 'never' is not one of",
        "nodes.a: 'kind' is a required property",
        "nodes.a: unknown function 'nobody' (known: f)",
        "nodes.b.join: 5 is not valid",
        "nodes.c.wait.choices: [] should be non-empty",
        "nodes.d: workflow 'none@1' is not among",
        "nodes.e.wait.at: must be a time",
        "nodes.f: Additional properties are not allowed ('functoin' was unexpected)",
        "nodes.g: 7 is not of type 'object'",
        "edges: b -> nowhere names an unknown node",
        "edges: a -> b is there twice",
        "edges: a cycle keeps these nodes from ever starting: a, b",
    ):
        assert any(one.startswith(problem) for one in found), (problem, found)
    assert len(found) == len(set(found))
    assert not any("needs `prompt`" in one or "must say `prompt`" in one for one in found), (
        "that follows from the damage"
    )


@pytest.mark.feature("G1")
@pytest.mark.parametrize(
    "value", [None, 1, "x", [], {}, [[]], {"a": None}, {"a": []}, {"kind": []}, {"a": {"kind": {}}}]
)
@pytest.mark.parametrize("place", ["nodes", "functions", "edges", "workflows", "start", "name", "evolution", "output"])
def test_what_has_no_shape_at_all_is_reported_too(place: str, value: Any) -> None:
    for found in (validate_definition(definition(**{place: value})), validate_definition(value)):
        assert all(isinstance(problem, str) for problem in found)
    node = {"kind": "step", "function": "f", place: value}
    assert validate_definition(definition(nodes={"a": {**node, "function": value}}))
