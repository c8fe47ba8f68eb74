"""YAML, or JSON, that people write, as plain JSON values, with the line of each part. Pure: text in, values or problems out.

Stricter than YAML where that lets mistakes pass: nothing is there twice, keys are texts, and what JSON has no form for is
refused. A date is the text that was written. Aliases may not make a small text into a huge value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import yaml

MAX_PARTS: Final = 1_000_000  # of one value, aliases counted as often as they are used


class Problem(NamedTuple):
    """What is wrong with a text, and the line it stands in (from 1; 0 if there is none to name)."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}" if self.line else self.text


class TextError(ValueError):
    """A text is wrong; `problems` lists everything, in the order of lines."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(problems)
        super().__init__("; ".join(map(str, self.problems)))


class _Loader(yaml.SafeLoader):
    """Makes plain values only."""


def _text_of(loader: Any, node: Any) -> Any:
    return loader.construct_scalar(node)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text_of)


def values_of(text: str) -> Iterator[tuple[Any, yaml.Node]]:
    """Yield the value of each document of a text that is not empty, and where its parts stand. Raises TextError."""
    loader = _Loader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            if problems := _Judge().problems(node):
                raise TextError(problems)
            value = loader.construct_document(node)
            if value is not None:
                yield value, node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise TextError([Problem(0 if mark is None else mark.line + 1, f"no YAML: {what}")]) from None
    except (ValueError, RecursionError) as error:  # a number that is none; a thousand brackets
        if isinstance(error, TextError):
            raise
        raise TextError([Problem(0, f"no YAML: {error}")]) from None
    finally:
        loader.dispose()


class _Judge:
    """Looks at each node once, however often it is used."""

    def __init__(self) -> None:
        self._parts: dict[int, int] = {}  # how many parts the value of a node has; 0 while it is looked at
        self._found: list[Problem] = []

    def problems(self, node: yaml.Node) -> list[Problem]:
        if self._count(node) > MAX_PARTS and not self._found:
            self._say(node, f"more than {MAX_PARTS} values, aliases counted as often as they are used")
        return self._found

    def _say(self, node: yaml.Node, text: str) -> None:
        self._found.append(Problem(node.start_mark.line + 1, text))

    def _count(self, node: yaml.Node) -> int:
        if id(node) in self._parts:
            if self._parts[id(node)] == 0:
                self._say(node, "an alias of what it lies in itself")
            return self._parts[id(node)]
        self._parts[id(node)] = 0
        count = 1
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                self._look_at_key(key, seen)
                count += self._count(value)
        elif isinstance(node, yaml.SequenceNode):
            count += sum(map(self._count, node.value))
        elif node.tag == "tag:yaml.org,2002:float" and not _is_finite(node.value):
            self._say(node, f"{node.value}: JSON has no such number")
        elif node.tag == "tag:yaml.org,2002:binary":
            self._say(node, "JSON has no bytes: write a text")
        self._parts[id(node)] = count
        return count

    def _look_at_key(self, key: yaml.Node, seen: set[str]) -> None:
        """YAML lets the last of equal keys win silently; here that is a mistake. And it takes the word `on` for true."""
        if key.tag == "tag:yaml.org,2002:bool" and key.value.lower() not in ("true", "false"):
            key.tag = "tag:yaml.org,2002:str"
        if not isinstance(key, yaml.ScalarNode):
            self._say(key, "a key must be a text")
            return
        if key.value in seen:
            self._say(key, f"{key.value}: is there twice")
        elif key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge"):
            self._say(key, f"{key.value}: a key must be a text: put it in quotes")
        seen.add(key.value)


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace("_", "")))
    except ValueError:
        return ":" in text  # 1:30.5 is a number in base 60; what else is none is infinite or not a number


def line_of(node: yaml.Node, path: tuple[int | str, ...]) -> int:
    """Return the line of what `path` leads to, or of the last thing on the way that is there."""
    line = int(node.start_mark.line) + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if getattr(k, "value", None) == str(part)), None)
            if found is None:
                continue  # pydantic also names what is not in the document: branches, validators
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def parts_of(node: yaml.Node, depth: int) -> Iterator[tuple[tuple[str | int, ...], yaml.Node, int]]:
    """Yield the place, the node and the line of each part of a value, down to so many levels."""
    ahead: list[tuple[tuple[str | int, ...], yaml.Node, int]] = [((), node, node.start_mark.line + 1)]
    while ahead:
        place, inner, line = ahead.pop()
        yield place, inner, line
        if len(place) == depth:
            continue
        if isinstance(inner, yaml.MappingNode):
            ahead += [((*place, str(key.value)), value, key.start_mark.line + 1) for key, value in inner.value]
        elif isinstance(inner, yaml.SequenceNode):
            ahead += [((*place, number), item, item.start_mark.line + 1) for number, item in enumerate(inner.value)]
