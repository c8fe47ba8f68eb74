"""Which rules can match at all: rules found by the literals that they compare variables with. Pure.

`tool == "refund" && args.amount > 100` can only hold where the tool is `refund`. CEL's `&&` is false if any part is, whatever
the other parts do (errors included), so a rule whose literal part does not hold need not be looked at: 200 rules about as many
tools cost as much as one. Comparisons with literals are also made here and not by CEL, wherever both must come to the same: a
rule of which CEL is asked is one that has another part, or that meets a value of another type than its literal's.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")
Get = Callable[[str], Any]

# The most telling first: by the first that a rule compares, it is found. All are texts.
INDEXED: Final = (
    "tool",
    "agent",
    "name",
    "model",
    "operation",
    "provider",
    "step",
    "node",
    "workflow",
    "queue",
    "account",
    "version",
    "kind",
)
EQUAL, AMONG, BEGINS = "==", "in", "startsWith"
# How telling a comparison is, the most telling first; what is not here finds no rule.
_TELLING: Final = (EQUAL, AMONG, BEGINS)
_COMPARE: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    EQUAL: operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    AMONG: lambda value, texts: value in texts,
    BEGINS: str.startswith,
}
_PATH: Final = r"(?P<path>[a-z_]+(?:\.[A-Za-z_][A-Za-z0-9_]*)*?)"
_TEXT: Final = r"\"[^\"\\\n]*\"|'[^'\\\n]*'"
_TEXTS: Final = re.compile(_TEXT)
_NUMBER: Final = r"-?(?:0|[1-9][0-9]{0,17})"  # of more digits, not all are 64 bits
_FORMS: Final = (
    re.compile(rf"\s*{_PATH}\s*(?P<operator>==|!=)\s*(?P<text>{_TEXT})\s*"),
    re.compile(rf"\s*{_PATH}\s*(?P<operator>==|!=|<=|>=|<|>)\s*(?P<number>{_NUMBER})\s*"),
    re.compile(rf"\s*{_PATH}\s+(?P<operator>in)\s*\[\s*(?P<texts>(?:{_TEXT})(?:\s*,\s*(?:{_TEXT}))*)\s*\]\s*"),
    re.compile(rf"\s*{_PATH}\.(?P<operator>startsWith)\(\s*(?P<text>{_TEXT})\s*\)\s*"),
)
MAX_KNOWN: Final = 10_000  # combinations of what rules, or limits, look at
_MOST: Final = 2**63  # beyond 64 bits CEL has rules of its own
_OPENING, _CLOSING = "([{", ")]}"


class Comparison(NamedTuple):
    """A part of a rule that compares a variable, or a member of one, with a literal of type `kind`."""

    name: str
    members: tuple[str, ...]
    operator: str
    literal: Any
    kind: type[Any]

    def holds(self, get: Get) -> bool | None:
        """Return whether it holds; None if CEL must say: the member is not there, or is of another type than the literal."""
        value = get(self.name)
        for member in self.members:
            if type(value) is not dict or member not in value:
                return None
            value = value[member]
        if type(value) is not self.kind or (self.kind is int and not -_MOST <= value < _MOST):
            return None
        return _COMPARE[self.operator](value, self.literal)

    @property
    def rank(self) -> tuple[int, int] | None:
        """Return how well a rule can be found by it, less is better; None if not at all."""
        if self.members or self.operator not in _TELLING or self.name not in INDEXED:
            return None
        return INDEXED.index(self.name), _TELLING.index(self.operator)


def comparison_of(source: str) -> Comparison | None:
    """Return the comparison with a literal that a CEL expression is; None if it is something else."""
    found = next((match for form in _FORMS if (match := form.fullmatch(source))), None)
    if found is None:
        return None
    parts = found.groupdict()
    name, *members = found["path"].split(".")
    literal: Any
    if parts.get("number") is not None:
        return Comparison(name, tuple(members), found["operator"], int(found["number"]), int)
    if parts.get("texts") is not None:
        literal = frozenset(text[1:-1] for text in _TEXTS.findall(found["texts"]))
    else:
        literal = found["text"][1:-1]
    return Comparison(name, tuple(members), found["operator"], literal, str)


class Conditions(NamedTuple):
    """What a rule asks, all of which must hold. is_whole: it asks nothing else."""

    comparisons: tuple[Comparison, ...]
    is_whole: bool

    @classmethod
    def of(cls, source: str) -> Conditions:
        """Return those of a CEL expression."""
        found = [comparison_of(part) for part in parts_of(source)]
        comparisons = tuple(comparison for comparison in found if comparison is not None)
        return cls(comparisons, len(comparisons) == len(found))

    def hold(self, get: Get) -> bool | None:
        """Return whether they hold; None if CEL must say."""
        answer: bool | None = True if self.is_whole else None
        for comparison in self.comparisons:
            holds = comparison.holds(get)
            if holds is False:
                return False
            if holds is None:
                answer = None
        return answer

    def decided(self, get: Get, names: Set[str]) -> Conditions | None:
        """Return what is left to ask when the values of these variables are known; None if they do not hold whatever it is."""
        left = []
        for comparison in self.comparisons:
            holds = comparison.holds(get) if comparison.name in names else None
            if holds is False:
                return None
            if holds is None:
                left.append(comparison)
        return self._replace(comparisons=tuple(left))

    def found_by(self, names: Set[str] = frozenset(INDEXED)) -> Comparison | None:
        """Return the most telling comparison of one of these variables; None if there is none."""
        ranked = [
            (rank, comparison)
            for comparison in self.comparisons
            if comparison.name in names and (rank := comparison.rank) is not None
        ]
        return min(ranked, key=lambda item: item[0])[1] if ranked else None

    def without(self, found: Comparison | None) -> Conditions:
        """Return the others."""
        return self._replace(comparisons=tuple(each for each in self.comparisons if each is not found))


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


class _Numbered(NamedTuple, Generic[T]):
    """A rule at its place among all. conditions: those that do not hold already because the rule was found."""

    number: int
    rule: T
    conditions: Conditions


class RuleIndex(Generic[T]):
    """Rules in their order, each with its expression. `candidates` returns those that may match, in that order."""

    __slots__ = ("_always", "_by_beginning", "_by_text", "_known", "_plain")

    def __init__(self, rules: Iterable[tuple[str, T]], plain: Iterable[str] = ()) -> None:
        """`plain`: names of variables with texts that many steps share. By these alone are rules found: what is found is remembered
        by their values, and `step == "pay"` must not be missing, or hold, because another step was there first.
        """
        self._plain = frozenset(plain)
        self._known: dict[tuple[Any, ...], list[_Numbered[T]]] = {}  # by the values of these
        self._always: list[_Numbered[T]] = []
        self._by_text: dict[str, dict[str, list[_Numbered[T]]]] = {}
        # By the variable and the length of the beginning, so that a text is looked up once for each length.
        self._by_beginning: dict[tuple[str, int], dict[str, list[_Numbered[T]]]] = {}
        for number, (source, rule) in enumerate(rules):
            self._add(number, rule, Conditions.of(source))

    def _add(self, number: int, rule: T, conditions: Conditions) -> None:
        by = conditions.found_by(self._plain)
        item = _Numbered(number, rule, conditions.without(by))
        if by is None:
            self._always.append(item)
        elif by.operator == BEGINS:
            self._by_beginning.setdefault((by.name, len(by.literal)), {}).setdefault(by.literal, []).append(item)
        else:
            for text in by.literal if by.operator == AMONG else (by.literal,):
                self._by_text.setdefault(by.name, {}).setdefault(text, []).append(item)

    def candidates(self, get: Get, plain: tuple[Any, ...]) -> list[tuple[T, bool | None]]:
        """Return the rules that may match a step described by `get`, each with True if it does, None if CEL must say.

        plain: the values of the plain variables, in an order that is always the same.
        """
        found = self._known.get(plain)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[plain] = self._among(get)
        return [(item.rule, answer) for item in found if (answer := item.conditions.hold(get)) is not False]

    def _among(self, get: Get) -> list[_Numbered[T]]:
        """Return the rules that steps with the same plain variables may match, without the conditions that these decide on."""
        found = list(self._always)
        for name, by_text in self._by_text.items():
            found += by_text.get(get(name), ())
        for (name, length), by_beginning in self._by_beginning.items():
            found += by_beginning.get(get(name)[:length], ())
        found.sort(key=_number)
        return [
            item._replace(conditions=left)
            for item in found
            if (left := item.conditions.decided(get, self._plain)) is not None
        ]


def _number(item: _Numbered[Any]) -> int:
    return item.number
