"""Policies: CEL rules over what a step is about to do. Pure: documents in, a verdict that explains itself out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidegate.domain import expressions
from tidegate.domain.identity import NAME_PATTERN

Effect = Literal["allow", "deny", "require_approval"]
_STRENGTH: Final[dict[str, int]] = {"allow": 0, "require_approval": 1, "deny": 2}
DEFAULT_RULE: Final = "default"
MAX_REASON: Final = 500  # it is repeated with every attempt that the rule decides on


class PolicyError(ValueError):
    """The policy document is wrong; `problems` lists everything."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Rule(BaseModel):
    """When `when` (CEL, a boolean) holds, `then` is the effect. `reason` is shown to people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    when: str
    then: Effect
    reason: str = Field(default="", max_length=MAX_REASON)

    @field_validator("when")
    @classmethod
    def _compiles(cls, value: str) -> str:
        expressions.compile_expression(value)
        return value


class Policy(BaseModel):
    """A named, versioned list of rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = Field(pattern=NAME_PATTERN)
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    rules: list[Rule] = Field(min_length=1, max_length=1000)

    @field_validator("rules")
    @classmethod
    def _names_differ(cls, value: list[Rule]) -> list[Rule]:
        names = [rule.name for rule in value]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rule names must differ; there twice: {', '.join(twice)}")
        return value


class Verdict(NamedTuple):
    """An effect and the rule (`policy@version/rule`) that brought it about."""

    effect: Effect
    rule: str
    policy: str
    reason: str


def parse(document: Any) -> Policy:
    """Check a policy document. Raises PolicyError with all problems."""
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        raise PolicyError(
            [f"{'.'.join(map(str, item['loc'])) or 'policy'}: {item['msg']}" for item in error.errors()]
        ) from None


class PolicySet:
    """All policies in force. The strongest effect wins (deny, then require_approval, then allow); of equals, the first by
    policy id and place in the document. If no rule matches, the answer is allow. A rule that cannot be evaluated denies."""

    __slots__ = ("_policies",)

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = tuple(policies[key] for key in sorted(policies))

    def __bool__(self) -> bool:
        return bool(self._policies)

    def judge(self, variables: Mapping[str, Any]) -> Verdict:
        """Return the verdict on a step described by `variables` (see docs/policy.md)."""
        best = Verdict("allow", DEFAULT_RULE, "", "no rule matched")
        matched = False
        for policy in self._policies:
            label = f"{policy.policy}@{policy.version}"
            for rule in policy.rules:
                verdict = _judge_rule(rule, label, variables)
                if verdict is None:
                    continue
                if not matched or _STRENGTH[verdict.effect] > _STRENGTH[best.effect]:
                    best, matched = verdict, True
                if verdict.effect == "deny":
                    return verdict
        return best


def _judge_rule(rule: Rule, label: str, variables: Mapping[str, Any]) -> Verdict | None:
    try:
        holds = expressions.evaluate(rule.when, variables)
    except expressions.ExpressionError as error:
        reason = f"the rule could not be evaluated, which denies: {error}"
        return Verdict("deny", rule.name, label, reason[:MAX_REASON])
    if not isinstance(holds, bool):
        reason = f"the rule gave {holds!r} instead of true or false, which denies"
        return Verdict("deny", rule.name, label, reason[:MAX_REASON])
    return Verdict(rule.then, rule.name, label, (rule.reason or rule.when)[:MAX_REASON]) if holds else None
