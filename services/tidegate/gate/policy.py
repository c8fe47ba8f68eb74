"""Policies: CEL rules over what a step is about to do. Pure: documents in, a verdict that explains itself out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tidegate.domain import expressions
from tidegate.domain.isolation import strongest
from tidegate.gate.documents import DEFAULT_KIND, Document, name_field
from tidegate.gate.rule_index import MAX_KNOWN, RuleIndex
from tidegate.gate.variables import PLAIN, VARIABLES, Variables

Effect = Literal["allow", "deny", "require_approval"]
Isolation = Literal["subprocess", "job"]
_PLAIN: Final = frozenset(PLAIN)
_STRENGTH: Final[dict[str, int]] = {"allow": 0, "require_approval": 1, "deny": 2}
DEFAULT_RULE: Final = "default"
MAX_REASON: Final = 500  # it is repeated with every attempt that the rule decides on
MAX_VALUES: Final = 2_000  # as is what the rule looked at
MAX_EXPIRES_S: Final = 366 * 24 * 3600
REDACTED: Final = "(redacted)"
EVERY: Final = "*"  # in a path of what is hidden: every member
ARGUMENT_PATH: Final = re.compile(r"[^.\[\]]+(\.[^.\[\]]+)*")


class Rule(BaseModel):
    """When `when` (CEL, a boolean) holds, `then` is the effect. `reason` is shown to people.

    expires_s: how long an approval may take. redact: paths of arguments (`card.number`) that projections hide. isolation: how
    the function must be run at least.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = name_field()
    when: str
    then: Effect
    reason: str = Field(default="", max_length=MAX_REASON)
    expires_s: int | None = Field(default=None, ge=1, le=MAX_EXPIRES_S)
    redact: list[str] = Field(default_factory=list, max_length=50)
    isolation: Isolation | Literal[""] = ""

    @field_validator("when")
    @classmethod
    def _compiles(cls, value: str) -> str:
        expressions.compile_expression(value)
        return value

    @field_validator("redact")
    @classmethod
    def _are_paths(cls, value: list[str]) -> list[str]:
        for path in value:
            if len(path) > 200 or not ARGUMENT_PATH.fullmatch(path):
                raise ValueError(f"{path!r} is no path of an argument, such as `card.number`")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Rule:
        if self.expires_s is not None and self.then != "require_approval":
            raise ValueError("expires_s belongs to `then: require_approval`: nothing else waits for an answer")
        return self


class Policy(Document):
    """A named, versioned list of rules. `default`: what happens to a step that no rule of any policy matches."""

    KIND = DEFAULT_KIND
    NAME_FIELD = "policy"

    policy: str = name_field()
    default: Effect | None = None
    rules: list[Rule] = Field(default_factory=list, max_length=1000)

    @field_validator("rules")
    @classmethod
    def _names_differ(cls, value: list[Rule]) -> list[Rule]:
        names = [rule.name for rule in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rule names must differ; there twice: {', '.join(twice)}")
        return value

    @model_validator(mode="after")
    def _says_something(self) -> Policy:
        if not self.rules and self.default is None:
            raise ValueError("a policy needs rules or a default")
        return self

    def misgivings(self) -> list[tuple[tuple[int | str, ...], str]]:
        """Return the rules that look at what there is not: they could not be evaluated, and would deny everything."""
        return [
            (("rules", index, "when"), f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(VARIABLES))}")
            for index, rule in enumerate(self.rules)
            if (unknown := expressions.unknown_variables(rule.when, VARIABLES))
        ]


class Verdict(NamedTuple):
    """An effect and the rule (of `policy@version`) that brought it about.

    values: what the rule looked at, canonical JSON, empty if none matched. redact, isolation: what the matching rules demand
    together. expires_s: how long an approval may take, 0 for ever.
    """

    effect: Effect
    rule: str
    policy: str
    reason: str
    values: str = ""
    redact: tuple[str, ...] = ()
    isolation: str = ""
    expires_s: int = 0


class _Bound(NamedTuple):
    """A rule with all that judging by it needs. matched: the verdict if it holds, without what it looked at. is_plain: it
    refers to plain variables only."""

    rule: Rule
    references: tuple[str, ...]
    matched: Verdict
    is_plain: bool

    @classmethod
    def of(cls, rule: Rule, label: str) -> _Bound:
        matched = Verdict(
            rule.then,
            rule.name,
            label,
            (rule.reason or rule.when)[:MAX_REASON],
            "",
            tuple(rule.redact),
            rule.isolation,
            rule.expires_s or 0,
        )
        references = _references(rule.when)
        return cls(rule, references, matched, _PLAIN.issuperset(references))


class PolicySet:
    """All policies in force. The strongest effect wins (deny, then require_approval, then allow); of equals, the first by
    policy id and place in the document. If no rule matches, the strongest `default` of any policy does, else allow. A rule
    that cannot be evaluated denies."""

    __slots__ = ("_default", "_index", "_is_empty", "_values")

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        bound: list[_Bound] = []
        self._default = Verdict("allow", DEFAULT_RULE, "", "no rule matched")
        for key in sorted(policies):
            policy = policies[key]
            bound += [_Bound.of(rule, policy.label) for rule in policy.rules]
            if policy.default is not None and (
                not self._default.policy or _STRENGTH[policy.default] > _STRENGTH[self._default.effect]
            ):
                self._default = Verdict(policy.default, DEFAULT_RULE, policy.label, "no rule matched")
        self._index: RuleIndex[_Bound] = RuleIndex(((item.rule.when, item) for item in bound), PLAIN)
        self._values: dict[tuple[Any, ...], str] = {}  # of plain rules, by policy, rule and what they look at
        self._is_empty = not policies

    def __bool__(self) -> bool:
        return not self._is_empty

    def judge(self, variables: Variables) -> Verdict:
        """Return the verdict on a step described by `variables` (see docs/policy.md)."""
        best: Verdict | None = None
        decisive: _Bound | None = None
        redact: tuple[str, ...] = ()
        isolation = ""
        for bound, answer in self._index.candidates(variables.get, variables.plain):
            verdict = bound.matched if answer else _judge_rule(bound, variables)
            if verdict is None:
                continue
            if verdict.redact:
                redact += tuple(path for path in verdict.redact if path not in redact)
            if verdict.isolation:
                isolation = strongest(isolation, verdict.isolation)
            if best is None or _STRENGTH[verdict.effect] > _STRENGTH[best.effect]:
                best, decisive = verdict, bound
        if best is None or decisive is None:
            return self._default
        values = _without(self._values_of(decisive, variables), redact)
        return Verdict(best.effect, best.rule, best.policy, best.reason, values, redact, isolation, best.expires_s)

    def _values_of(self, bound: _Bound, variables: Variables) -> str:
        if not bound.is_plain:
            return _values(bound, variables)
        name = (bound.matched.policy, bound.rule.name, variables.plain)
        values = self._values.get(name)
        if values is None:
            if len(self._values) >= MAX_KNOWN:
                self._values.clear()
            values = self._values[name] = _values(bound, variables)
        return values


def _judge_rule(bound: _Bound, variables: Variables) -> Verdict | None:
    try:
        holds = variables.evaluate(bound.rule.when)
    except expressions.ExpressionError as error:
        return _broken(bound, f"the rule could not be evaluated, which denies: {error}")
    if holds is False:
        return None
    if holds is not True:
        return _broken(bound, f"the rule gave {type(holds).__name__}, not true or false, which denies")
    return bound.matched


def _broken(bound: _Bound, reason: str) -> Verdict:
    """Deny, and hide what the rule would have hidden: whether it would have matched nobody knows."""
    return bound.matched._replace(effect="deny", reason=reason[:MAX_REASON], expires_s=0)


# --- what a rule looked at ---------------------------------------------------------------

_REFERENCE: Final = re.compile(r"(?<![A-Za-z0-9_.\"'])([a-z_]+(?:\.[A-Za-z_][A-Za-z0-9_]*(?![A-Za-z0-9_]*\s*\())*)")
_STRING: Final = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")
_ABSENT: Final = object()
_encode: Final = msgspec.json.Encoder(order="sorted").encode


def _references(source: str) -> tuple[str, ...]:
    """Return the paths (`args.amount`) of variables in an expression, each once, in order."""
    known = expressions.variables_of(source)
    found = dict.fromkeys(match[1] for match in _REFERENCE.finditer(_STRING.sub('""', source)))
    return tuple(path for path in found if path.partition(".")[0] in known)


def _values(bound: _Bound, variables: Variables) -> str:
    """Return the values of all that a rule refers to, JSON of bounded size."""
    found: dict[str, Any] = {}
    for path in bound.references:
        name, _, rest = path.partition(".")
        value = _at(variables.get(name), rest.split(".") if rest else ())
        if value is not _ABSENT:
            found[path] = value
    for path in _hidden_paths(found, bound.rule.redact):
        found[path] = REDACTED
    text = _encode(found)
    if len(text) > MAX_VALUES:
        text = _encode(_shortened(found))
    return text.decode()


def _shortened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return as much of the values as there is room for; what is left out is shown as cut off."""
    left, found = MAX_VALUES, {}
    for path, value in values.items():
        size = len(path) + len(_encode(value)) + 4
        found[path] = value if size <= left else "…"
        left -= size if size <= left else len(path) + 7
        if left < 100:
            break
    return found


def _at(value: Any, path: Iterable[str]) -> Any:
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _hidden_paths(values: Mapping[str, Any], redact: Iterable[str]) -> list[str]:
    """Return the paths among `values` that lie in, or hold, an argument that is to be hidden."""
    if not redact:
        return []
    hidden = [("args", *path.split(".")) for path in redact]
    return [path for path in values if any(_lead_together(path.split("."), parts) for parts in hidden)]


def _lead_together(path: Iterable[str], hidden: Iterable[str]) -> bool:
    """Tell whether one of the paths begins with the other; `*` in what is hidden is any name."""
    return all(part in (name, EVERY) for name, part in zip(path, hidden, strict=False))


def _without(values: str, redact: tuple[str, ...]) -> str:
    """Return the values without what other rules that match want hidden."""
    if not values or not redact:
        return values
    known: dict[str, Any] = msgspec.json.decode(values)
    hidden = _hidden_paths(known, redact)
    return _encode(known | dict.fromkeys(hidden, REDACTED)).decode() if hidden else values
