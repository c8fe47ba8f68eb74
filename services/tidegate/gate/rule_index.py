"""Which rules can match at all: rules found by the literals that they compare variables with. Pure.

`tool == "refund" && args.amount > 100` can only hold where the tool is `refund`. CEL's `&&` is false if any part is, whatever
the other parts do (errors included), so a rule whose literal part does not hold need not be looked at: 200 rules about as many
tools cost as much as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

# The most telling first: by the first that a rule compares, it is found.
INDEXED: Final = (
    "tool",
    "agent",
    "name",
    "model",
    "operation",
    "provider",
    "step",
    "workflow",
    "queue",
    "account",
    "kind",
)
_LITERAL: Final = re.compile(r"^\s*([a-z_]+)\s*==\s*(?:\"([^\"\\]*)\"|'([^'\\]*)')\s*$")
_OPENING, _CLOSING = "([{", ")]}"


def parts_of(source: str) -> list[str]:
    """Return what a CEL expression joins with `&&` at its outside; the expression itself if it does not, or if in doubt."""
    if "//" in source:
        return [source]  # a comment may hide anything
    parts: list[str] = []
    depth, begin, at, quote = 0, 0, 0, ""
    while at < len(source):
        char = source[at]
        if quote:
            at += 1 if char == "\\" else 0
            quote = "" if char == quote else quote
        elif source.startswith(('"""', "'''"), at) or (char in "rRbB" and source[at + 1 : at + 2] in ('"', "'")):
            return [source]  # raw strings, bytes and long strings have rules of their own
        elif char in "\"'":
            quote = char
        elif char in _OPENING:
            depth += 1
        elif char in _CLOSING:
            depth -= 1
        elif depth == 0 and (char == "?" or source.startswith("||", at)):
            return [source]  # it may hold without its parts
        elif depth == 0 and source.startswith("&&", at):
            parts.append(source[begin:at])
            begin, at = at + 2, at + 1
        at += 1
    return [*parts, source[begin:]] if depth == 0 and not quote else [source]


def literal_of(source: str) -> tuple[str, str] | None:
    """Return the (variable, text) that must be equal for the expression to hold, by the most telling variable; else None."""
    found: dict[str, str] = {}
    for part in parts_of(source):
        match = _LITERAL.match(part)
        if match is not None:
            found.setdefault(match[1], match[2] if match[2] is not None else match[3])
    return next(((name, found[name]) for name in INDEXED if name in found), None)


class RuleIndex(Generic[T]):
    """Rules in their order, each with its expression. `candidates` returns those that may match, in that order."""

    __slots__ = ("_always", "_by_literal")

    def __init__(self, rules: Iterable[tuple[str, T]]) -> None:
        self._always: list[tuple[int, T]] = []
        self._by_literal: dict[str, dict[str, list[tuple[int, T]]]] = {}
        for number, (source, rule) in enumerate(rules):
            literal = literal_of(source)
            if literal is None:
                self._always.append((number, rule))
            else:
                self._by_literal.setdefault(literal[0], {}).setdefault(literal[1], []).append((number, rule))

    def candidates(self, variable: Callable[[str], Any]) -> list[T]:
        """Return the rules that the values of the indexed variables leave."""
        found = self._always
        for name, by_value in self._by_literal.items():
            more = by_value.get(variable(name))
            if more is not None:
                found = found + more
        if found is not self._always:
            found = sorted(found, key=_number)
        return [rule for _, rule in found]


def _number(item: tuple[int, Any]) -> int:
    return item[0]
