"""Definitions and expressions that somebody hostile, or in a hurry, would publish."""

from __future__ import annotations

import copy
import http.server
import threading
from typing import Any

import pytest

from tidegate.domain import canonical, expressions, routes, strict_schema, waits
from tidegate.domain.workflow import DefinitionError, compile_definition, validate_definition, with_children


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
    # What follows from the damage alone is not said; that there is no prompt was so before its choices were wrong.
    assert [one for one in found if "choices" in one] == ["nodes.c.wait.choices: [] should be non-empty"]
    assert "nodes.c.wait: ask must say `prompt`" in found


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "name": ({"name": "not a name"}, ["name: 'not a name' does not match"]),
    "no version": ({"version": ...}, ["definition: 'version' is a required property"]),
    "version": ({"version": None}, ["version: None is not of type 'string'"]),
    "no such field": ({"nodez": {}}, ["definition: Additional properties are not allowed ('nodez' was unexpected)"]),
    "mode": ({"failure_mode": 3}, ["failure_mode: 3 is not one of"]),
    "name of a node": ({"nodes": {"a b": {"kind": "step", "function": "f"}}}, ["nodes: 'a b' does not match"]),
    "field of a node": (
        {"nodes": {"odd": {"kind": "step", "function": "f", "colour": "red"}}},
        ["nodes.odd: Additional properties are not allowed ('colour' was unexpected)"],
    ),
    "kind of a node": (
        {"nodes": {"odd": {"kind": "stepp", "function": "f"}}},
        ["nodes.odd.kind: 'stepp' is not one of"],
    ),
    "no node": ({"nodes": {"odd": 7}}, ["nodes.odd: 7 is not of type 'object'"]),
    "join": ({"nodes": {"odd": {"kind": "step", "function": "f", "join": 5}}}, ["nodes.odd.join: 5 is not valid"]),
    "field of a wait": (
        {"nodes": {"odd": {"kind": "sleep", "wait": {"seconds": 1, "until": 2}}}},
        ["nodes.odd.wait: Additional properties are not allowed ('until' was unexpected)"],
    ),
    "routes": (
        {"nodes": {"odd": {"kind": "router", "choose": "'fine'", "routes": ["fine", 5]}}},
        ["nodes.odd.routes.1: 5 is not of type 'string'"],
    ),
    "field of an edge": (
        {"edges": [{"from": "fine", "to": "ring", "wehn": "true"}]},
        ["edges.4: Additional properties are not allowed ('wehn' was unexpected)"],
    ),
    "end of an edge": ({"edges": [{"from": "fine"}]}, ["edges.4: 'to' is a required property"]),
    "condition of an edge that leads nowhere": (
        {"edges": [{"from": 5, "to": "ring", "when": "output +"}]},
        ["edges.4: `from`: 5 is not of type 'string'", "edges.4.when: 'output +' does not compile"],
    ),
    "three ends": ({"edges": [["fine", "ring", "ring2"]]}, ["edges.4: ['fine', 'ring', 'ring2'] is too long"]),
    "no edge": ({"edges": [5]}, ["edges.4: 5 is not valid under any of the given schemas"]),
    "unknown end": ({"edges": [["fine", "nowhere"]]}, ["edges: fine -> nowhere names an unknown node"]),
    "edge twice": ({"edges": [["fine", "reads"], ["fine", "reads"]]}, ["edges: fine -> reads is there twice"]),
    "first": ({"start": ["nowhere"]}, ["start: there is no node 'nowhere'"]),
    "kind of a function": ({"functions": {"odd": {"kind": "stepp"}}}, ["functions.odd.kind: 'stepp' is not one of"]),
    "no function": ({"functions": {"odd": []}}, ["functions.odd: [] is not of type 'object'"]),
    "setting of a function": (
        {"functions": {"odd": {"kind": "step", "timeout": 3}}},
        ["functions.odd: Additional properties are not allowed ('timeout' was unexpected)"],
    ),
    "retry rule": (
        {"functions": {"odd": {"kind": "step", "retry_rules": [{"on": []}, {"on": ["A"], "name": "n"}]}}},
        ["functions.odd.retry_rules.0.on: [] should be non-empty"],
    ),
    "workflows": ({"workflows": {"in@1": 5}}, ["workflows.in@1: 5 is not of type 'object'"]),
    "line feed": (
        {"nodes": {"fed\n": {"kind": "step", "function": "f"}}},
        ["definition: 'fed\\n' ends with a line feed"],
    ),
}
ALWAYS = [
    "nodes.lost: unknown function 'nobody'",
    "nodes.alone: workflow 'none@1' is not among the `workflows`",
    "nodes.soon.wait.at: must be a time",
    "nodes.reads.input: reads nodes.nothing, and there is no such node",
    "nodes.fine.input: reads nodes.reads, which does not come before fine",
    "nodes.typo.input: 'inputt.x': unknown: inputt; there are hop, input, nodes",
    "edges.fine -> typo.when: '1 +' does not compile",
    "edges: a cycle keeps these nodes from ever starting: ring, ring2",
    "functions.t.parameters: not a JSON Schema",
    "functions.g.tools: 'f' is not a tool",
    "workflows.inner@1.nodes.x: unknown function 'y'",
    "output: reads nodes.never, and there is no such node",
]


@pytest.mark.feature("G1")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_hides_another_one(mistake: str) -> None:
    """Each of these, whatever its kind, leaves everything else in the report, and brings nothing but itself."""
    changes, said = MISTAKES[mistake]
    nodes = {
        "fine": {"kind": "step", "function": "f", "input": "${ nodes.reads }"},
        "reads": {"kind": "step", "function": "f", "input": {"x": "${ nodes.nothing }"}},
        "typo": {"kind": "step", "function": "f", "input": "${ inputt.x }"},
        "lost": {"kind": "step", "function": "nobody"},
        "alone": {"kind": "workflow", "workflow": "none@1"},
        "soon": {"kind": "wait_until", "wait": {"at": "soon"}},
        "ring": {"kind": "step", "function": "f"},
        "ring2": {"kind": "step", "function": "f"},
    }
    edges: list[Any] = [
        ["ring", "ring2"],
        ["ring2", "ring"],
        {"from": "fine", "to": "typo", "when": "1 +"},
        ["fine", "soon"],
    ]
    if mistake != "edge twice":
        edges = [["fine", "reads"] if edge == ["fine", "soon"] else edge for edge in edges]
    functions: dict[str, Any] = {
        "f": {"kind": "step"},
        "g": {"kind": "agent", "tools": ["f"]},
        "t": {"kind": "tool", "parameters": {"type": "objectt"}},
    }
    inner = {"name": "inner", "version": "1", "nodes": {"x": {"kind": "step", "function": "y"}}, "functions": {}}
    whole = definition(
        nodes=nodes, edges=edges, functions=functions, workflows={"inner@1": inner}, output="${ nodes.never }"
    )
    for name, value in changes.items():
        there = whole.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            whole[name] = {**there, **value}
        elif name == "edges":
            whole[name] = [*edges, *value]
        elif value is ...:
            del whole[name]
        else:
            whole[name] = value
    before = copy.deepcopy(whole)
    found = validate_definition(whole)
    assert whole == before
    for problem in [*ALWAYS, *said]:
        assert any(one.startswith(problem) for one in found), (problem, found)
    assert len(found) == len(ALWAYS) + len(said), found


@pytest.mark.feature("G1")
def test_what_may_be_right_once_the_damage_is_mended_is_not_reported() -> None:
    """An edge that cannot be read may be the one that a join counts, or that brings what an input reads."""
    nodes = {
        "a": {"kind": "step", "function": "f"},
        "b": {"kind": "step", "function": "f"},
        "c": {"kind": "step", "function": "f", "join": {"need": 2}, "input": "${ nodes.b }"},
    }
    edges: list[Any] = [["a", "c"], ["b"]]
    assert validate_definition(definition(nodes=nodes, edges=edges)) == ["edges.1: ['b'] is too short"]
    nodes["c"]["join"] = {"need": 3}
    nodes["a"]["input"] = "${ nodes.c }"
    assert validate_definition(definition(nodes=nodes, edges=edges)) == [
        "edges.1: ['b'] is too short",
        "nodes.c.join: needs 3 of the 1 edges that lead there",
        "nodes.a.input: reads nodes.c, which does not come before a",
    ]
    routed = {"r": {"kind": "router", "choose": "'x'", "routes": ["a", "a"]}, "a": nodes["b"]}
    (problem,) = validate_definition(definition(nodes=routed))
    assert problem.startswith("nodes.r.routes: ['a', 'a'] has non-unique elements")
    assert validate_definition(definition(functions={"f": {}})) == ["functions.f: 'kind' is a required property"]
    assert validate_definition(definition(functions=[])) == ["functions: [] is not of type 'object'"]


def test_what_was_published_when_less_was_looked_at_goes_on_being_started() -> None:
    old = definition(nodes={"a": {"kind": "step", "function": "f", "input": "${ true ? 1 : inputt.x }"}})
    assert "unknown: inputt" in validate_definition(old)[0]
    assert compile_definition(canonical.dumps(old)).label == "w@1"
    kinds = "${ type(input) == string ? input.filter(x, x > 1).map(y, y) : [int(hop.visit)] }"
    assert validate_definition(definition(nodes={"a": {"kind": "step", "function": "f", "input": kinds}})) == []


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


@pytest.mark.feature("G1")
def test_small_definitions_that_hold_each_other_over_and_over_are_refused_at_once() -> None:
    """Nine levels of ten that each have runs of all ten of the next: a billion definitions if they were written out."""
    levels = [[f"w{level}_{number}" for number in range(10)] for level in range(9)]
    listed = [
        {
            "name": name,
            "version": "1",
            "nodes": {child: {"kind": "workflow", "workflow": f"{child}@1"} for child in below},
        }
        for level, below in zip(levels, [*levels[1:], []], strict=True)
        for name in level
    ]
    with pytest.raises(DefinitionError, match="all that one holds"):
        with_children(listed)
    few = with_children(listed[-20:])
    assert list(few[0]["workflows"]) == [f"{name}@1" for name in levels[-1]]


@pytest.mark.feature("G1")
def test_the_work_for_a_hostile_definition_grows_with_its_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by what would be done for each pair of things: lists in reports, comparisons of items, walks through the graph."""
    many = 2_000
    nodes: dict[str, Any] = {f"n{i}": {"kind": "step", "function": "nobody"} for i in range(many)}
    functions = {f"f{i}": {"kind": "step"} for i in range(many)}
    found = validate_definition(definition(nodes=nodes, functions=functions))
    assert sum(map(len, found)) < 300 * many

    mixed = [item for i in range(many) for item in (i, str(i))]
    monkeypatch.setattr("jsonschema._utils.uniq", _never)
    monkeypatch.setattr("jsonschema._keywords.uniq", _never)
    found = validate_definition(definition(start=mixed, input_schema={"required": mixed}))
    assert len(found) > many

    walks: list[str] = []
    walk = routes.reached

    def counted(*arguments: Any, without: str = "") -> set[str]:
        walks.append(without)
        return walk(*arguments, without=without)

    monkeypatch.setattr(routes, "reached", counted)
    loops: dict[str, Any] = {"s": {"kind": "step", "function": "f"}, "e": {"kind": "step", "function": "f"}}
    rounds = 100
    for i in range(rounds):
        further = f"r{i + 1}" if i + 1 < rounds else "e"
        loops[f"r{i}"] = {"kind": "router", "choose": "'s'", "routes": ["s", further, f"x{i}"]}
        loops[f"x{i}"] = loops["s"]
    assert not [
        one
        for one in validate_definition(definition(nodes=loops, edges=[["s", "r0"]], start=["s"]))
        if "loop" not in one
    ]
    assert len(walks) < 12 * rounds


def _never(*_: Any) -> bool:
    raise AssertionError("each item would be compared with each")


@pytest.mark.feature("T2")
def test_hostile_values_are_checked_in_time_that_grows_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `set` in a tool's signature becomes `uniqueItems`: what a model sends for it may be long and of several types."""
    monkeypatch.setattr("jsonschema._keywords.uniq", _never)
    workflow = compile_definition(canonical.dumps(definition(input_schema={"type": "array", "uniqueItems": True})))
    mixed: list[Any] = [item for i in range(1000) for item in (i, str(i), [i], {"i": i}, True, None, i + 0.5)]
    assert (workflow.input_problem(mixed) or "").endswith("has non-unique elements")
    assert workflow.input_problem([1, True, "1", [1], {"a": 1}, {"a": True}, None, 0, False]) is None
    for twice in ([1, 1.0], [[1], [1.0]], [{"a": 1, "b": 2}, {"b": 2, "a": 1}], [None, None], [2**60, float(2**60)]):
        assert "non-unique" in (workflow.input_problem(twice) or ""), twice
    assert waits.answer_problem(["a", "a", 1], (), False, '{"uniqueItems": true}') is not None


@pytest.mark.feature("T2")
def test_a_deep_value_is_not_checked_for_ever() -> None:
    """Schemas of trees refer to themselves in several branches: each level of a value that fits none doubles the work."""
    branches = [{"properties": {"left": {"$ref": "#/$defs/tree"}}, "required": [leaf]} for leaf in ("a", "b")]
    schema = {"$defs": {"tree": {"anyOf": branches}}, "$ref": "#/$defs/tree"}
    workflow = compile_definition(canonical.dumps(definition(input_schema=schema)))
    value: dict[str, Any] = {"a": 1}
    assert workflow.input_problem(value) is None
    for _ in range(60):
        value = {"left": value}
    assert "is not valid under any of the given schemas" in (workflow.input_problem(value) or "")
    good: dict[str, Any] = {"b": 1}
    for number in range(60):
        good = {"left": good, "ab"[number % 2]: 1}
    assert workflow.input_problem(good) is None
    assert workflow.input_problem({**good, "left": {"left": good}}) is not None


@pytest.mark.feature("T2")
def test_of_many_mistakes_in_a_value_only_some_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    shown = strict_schema.shape_problem

    def counted(error: Any) -> str:
        looked.append(error.message)
        return shown(error)

    monkeypatch.setattr(strict_schema, "shape_problem", counted)
    workflow = compile_definition(canonical.dumps(definition(input_schema={"items": {"enum": [1, 2]}})))
    assert (workflow.input_problem(list(range(3, 1000))) or "").count("is not one of [1, 2]") == 10
    assert len(looked) == 10
