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
