"""Files of workflow definitions, JSON or YAML: their definitions, and in which line each part of them stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from tidegate.cli.endings import usage
from tidegate.domain.canonical import NotJsonError
from tidegate.domain.definition_damage import places_of, written
from tidegate.domain.requests import parse_json
from tidegate.sdk.judging import label_of
from tidegate.yaml_lines import TextError, parts_of, values_of

YAML_SUFFIXES: Final = frozenset({".yaml", ".yml"})
_DEPTH: Final = 8  # levels of a definition whose lines are known; what lies deeper is in the line of what it lies in
_TRUTH: Final = re.compile(r": (True|False) is not of type 'string'")
_NAMED_EDGE: Final = re.compile(r"(?P<where>edges|nodes\.[^:]*\.routes): (?P<edge>\S+ -> [^\s:]+)")


class Lines:
    """Where the parts of definitions stand, which are known by their number. Knows nothing of definitions from an app."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, int]] = {}
        self._numbers: dict[str, int] = {}

    def add(self, number: int, label: str, node: yaml.Node) -> None:
        """Note the lines of a definition."""
        self._numbers.setdefault(label, number)
        lines = self._lines[number] = {"definition": node.start_mark.line + 1}
        for place, inner, line in parts_of(node, _DEPTH):
            lines[written(place)] = line
            if place[:1] == ("edges",) and len(place) == 2:
                lines[f"edges: {_edge(inner)}"] = lines[f"edges.{_edge(inner)}"] = line
            elif len(place) == 4 and place[0] == "nodes" and place[2] == "routes":
                lines[f"{written(place[:3])}: {place[1]} -> {inner.value}"] = line

    def located(self, number: int, problem: str) -> str:
        """Return a problem of a definition with its line, if that is known."""
        line = self._line(number, problem)
        if line and _TRUTH.search(problem):
            problem += "; in YAML, yes, no, on and off are true and false without quotes"
        return f"{problem} (line {line})" if line else problem

    def _line(self, number: int, problem: str) -> int:
        lines = self._lines.get(number, {})
        edge = _NAMED_EDGE.match(problem)
        places = [] if edge is None else [f"{edge['where']}: {edge['edge']}"]
        found = next((lines[place] for place in [*places, *places_of(problem)] if place in lines), 0)
        if found:
            return found
        inner = next((one for one in self._numbers if problem.startswith(f"workflows.{one}.")), "")
        return self._line(self._numbers[inner], problem.removeprefix(f"workflows.{inner}.")) if inner else 0


def read_definitions(command: str, file: Path) -> tuple[list[dict[str, Any]], Lines]:
    """Return the definitions of a file, which is one or a list of them, and their lines. Exits if it holds something else."""
    try:
        data = file.read_bytes()
        found = _yaml(data) if file.suffix in YAML_SUFFIXES else [(parse_json(data), None)]
    except OSError as error:
        usage(command, f"{file} cannot be read: {error.strerror or error}")
    except TextError as error:
        usage(command, "\n".join(f"{file}: {problem}" for problem in error.problems))
    except (UnicodeDecodeError, NotJsonError) as error:
        usage(command, f"{file}: {error}")
    if file.suffix not in YAML_SUFFIXES:
        found = _with_lines(data, found[0][0])
    parts = [part for value, node in found for part in _each(value, node)]
    if not parts or not all(isinstance(definition, dict) for definition, _ in parts):
        usage(command, f"{file}: a definition is an object; the file holds one, or a list of them")
    lines = Lines()
    for number, (definition, node) in enumerate(parts):
        if node is not None:
            lines.add(number, label_of(definition), node)
    return [definition for definition, _ in parts], lines


def _yaml(data: bytes) -> list[tuple[Any, yaml.Node | None]]:
    return list(values_of(data.decode()))


def _with_lines(data: bytes, value: Any) -> list[tuple[Any, yaml.Node | None]]:
    """Return what a JSON text holds with its lines: JSON is YAML but for tabs, which no text of it has in it."""
    try:
        return [(value, node) for _, node in values_of(data.decode().replace("\t", " "))]
    except TextError:  # keys longer than YAML's, say: then without lines
        return [(value, None)]


def _each(value: Any, node: yaml.Node | None) -> Sequence[tuple[Any, yaml.Node | None]]:
    if not isinstance(value, list):
        return [(value, node)]
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [None] * len(value)
    return list(zip(value, nodes, strict=True))


def _edge(node: yaml.Node) -> str:
    """Return how problems name an edge."""
    if isinstance(node, yaml.MappingNode):
        ends = {key.value: end.value for key, end in node.value}
        return f"{ends.get('from')} -> {ends.get('to')}"
    values = [end.value for end in node.value] if isinstance(node, yaml.SequenceNode) else []
    return " -> ".join(map(str, values))
