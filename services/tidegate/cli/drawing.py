"""Definitions as pictures: Mermaid and DOT text. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from tidegate.domain import expressions, waits

MAX_LABEL: Final = 60


class _Arrow(NamedTuple):
    source: str
    target: str
    label: str
    is_route: bool


def mermaid(definition: Mapping[str, Any]) -> str:
    """Return a Mermaid flowchart: routes are dotted, conditions stand on their edges."""
    names = {node_id: f"n{number}" for number, node_id in enumerate(definition["nodes"])}
    lines = ["flowchart TD"]
    for node_id, node in definition["nodes"].items():
        left, right = _MERMAID_SHAPES[node["kind"]]
        text = "<br/>".join(map(_escaped, _lines_of(node_id, node)))
        lines.append(f'    {names[node_id]}{left}"{text}"{right}')
    for arrow in _arrows(definition):
        line = "-.->" if arrow.is_route else "-->"
        label = f'|"{_escaped(arrow.label)}"|' if arrow.label else ""
        lines.append(f"    {names[arrow.source]} {line}{label} {names[arrow.target]}")
    return "\n".join(lines) + "\n"


def dot(definition: Mapping[str, Any]) -> str:
    """Return a Graphviz digraph of the same."""
    lines = [f"digraph {json.dumps(definition['name'])} {{"]
    for node_id, node in definition["nodes"].items():
        text = json.dumps("\n".join(_lines_of(node_id, node)), ensure_ascii=False)
        lines.append(f"    {json.dumps(node_id)} [label={text}, shape={_DOT_SHAPES[node['kind']]}];")
    for arrow in _arrows(definition):
        fields = [f"label={json.dumps(arrow.label, ensure_ascii=False)}"] if arrow.label else []
        fields += ["style=dashed"] if arrow.is_route else []
        suffix = f" [{', '.join(fields)}]" if fields else ""
        lines.append(f"    {json.dumps(arrow.source)} -> {json.dumps(arrow.target)}{suffix};")
    return "\n".join([*lines, "}"]) + "\n"


FORMATS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {"mermaid": mermaid, "dot": dot}

_MERMAID_SHAPES: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(waits.KINDS, ("((", "))")),
    "step": ("[", "]"),
    "agent": ("([", "])"),
    "map": ("[[", "]]"),
    "flow": ("[(", ")]"),
    "tool": ("[", "]"),  # only flows call tools: no definition has such a node
    "router": ("{", "}"),
    "workflow": ("[/", "/]"),
}
_DOT_SHAPES: Final[Mapping[str, str]] = {
    **dict.fromkeys(waits.KINDS, "circle"),
    "step": "box",
    "agent": "ellipse",
    "map": "box3d",
    "flow": "component",
    "tool": "box",
    "router": "diamond",
    "workflow": "folder",
}


def _lines_of(node_id: str, node: Mapping[str, Any]) -> Iterator[str]:
    yield node_id
    what = node.get("function") or node.get("workflow") or _cut(node.get("choose", ""))
    if node["kind"] == "map":
        what = f"{what} for each of {_cut(expressions.source_of(node['over']))}"
    if node["kind"] in waits.KINDS:
        what = f"{node['kind']} {node.get('wait', {}).get('event', '')}".strip()
    if what and what != node_id:
        yield what
    join = node.get("join", "all")
    if join != "all":
        yield "any branch" if join == "any" else f"{join['need']} branches"


def _arrows(definition: Mapping[str, Any]) -> Iterator[_Arrow]:
    for edge in definition.get("edges", ()):
        if isinstance(edge, Mapping):
            yield _Arrow(edge["from"], edge["to"], _cut(expressions.source_of(edge.get("when", ""))), False)
        else:
            yield _Arrow(edge[0], edge[1], "", False)
    for node_id, node in definition["nodes"].items():
        for target in node.get("routes", ()):
            yield _Arrow(node_id, target, "", True)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def _escaped(text: str) -> str:
    """Return text that Mermaid shows as it is: entities for what it would read as markup."""
    return "".join(f"#{ord(letter)};" if letter in '"#&<>`|;{}[]' else letter for letter in text)
