"""Policies tried out without any Kafka: cases say what a step is like, and what the rules must make of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tidegate.domain.identity import DEFAULT_ACCOUNT
from tidegate.gate.documents import DocumentError, Problem
from tidegate.gate.policy import Effect, Policy, PolicySet, Verdict
from tidegate.gate.rule_index import INDEXED
from tidegate.gate.variables import VARIABLES, Variables

_STRICT: Final = ConfigDict(extra="forbid", frozen=True, strict=True)
# What a case need not say.
_USUAL: Final[dict[str, Any]] = {
    "kind": "step",
    "args": {},
    "queue": "default",
    "step": "step",
    "attempt": 1,
    "reserve_micros": 0,
    "account": DEFAULT_ACCOUNT,
    "workflow": "workflow",
    "version": "1",
    "tags": {},
    "run": {"id": "run", "settled_micros": 0, "reserved_micros": 0, "budget_micros": -1},
    "spent": {"run_micros": 0, "budgets": {}},
}


class Expectation(BaseModel):
    """What must come of a case; what is not said may be anything."""

    model_config = _STRICT

    effect: Effect
    rule: str | None = None
    policy: str | None = None
    redact: list[str] | None = None
    isolation: str | None = None


class Case(BaseModel):
    """A step, by the variables that rules look at, and what is expected."""

    model_config = _STRICT

    name: str = Field(min_length=1, max_length=200)
    step: dict[str, Any]
    expect: Effect | Expectation

    @field_validator("step")
    @classmethod
    def _are_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(value) - VARIABLES):
            raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(VARIABLES))}")
        if wrong := sorted(name for name in INDEXED if not isinstance(value.get(name, ""), str)):
            raise ValueError(f"must be a text: {', '.join(wrong)}")
        return value


class Cases(BaseModel):
    """A file of cases. policies: files that are read, relative to this one."""

    model_config = _STRICT

    policies: list[str] = Field(min_length=1)
    cases: list[Case] = Field(min_length=1)


class Outcome(NamedTuple):
    """What came of a case; `problem` is empty if it is what was expected."""

    case: Case
    verdict: Verdict
    problem: str


def checked(value: Any) -> Cases:
    """Return the cases that a file holds. Raises DocumentError."""
    try:
        return Cases.model_validate(value)
    except ValidationError as error:
        problems = [Problem(0, f"{'.'.join(map(str, e['loc'])) or 'cases'}: {e['msg']}") for e in error.errors()]
        raise DocumentError(problems) from None


def tried(cases: Cases, policies: list[Policy]) -> Iterator[Outcome]:
    """Yield what the policies make of every case."""
    rules = PolicySet({policy.topic_key: policy for policy in policies})
    for case in cases.cases:
        verdict = rules.judge(Variables.of(_completed(case.step)))
        yield Outcome(case, verdict, _difference(case.expect, verdict))


def _completed(step: dict[str, Any]) -> dict[str, Any]:
    """Return the variables of a step: who names a tool need not say that its kind is `tool`."""
    implied: dict[str, Any] = {}
    if tool := step.get("tool"):
        implied = {"kind": "tool", "name": tool}
    elif agent := step.get("agent"):
        implied = {"kind": "agent", "name": agent}
    known = _USUAL | implied | step
    for nested in ("run", "spent"):
        known[nested] = _USUAL[nested] | known[nested]
    return known


def _difference(expected: str | Expectation, verdict: Verdict) -> str:
    wanted = Expectation(effect=expected) if isinstance(expected, str) else expected  # type: ignore[arg-type] # checked
    there = {
        "effect": verdict.effect,
        "rule": verdict.rule,
        "policy": verdict.policy,
        "redact": list(verdict.redact),
        "isolation": verdict.isolation,
    }
    wrong = [
        f"{name} {there[name]!r} instead of {value!r}"
        for name, value in wanted.model_dump(exclude_none=True).items()
        if there[name] != value
    ]
    return "; ".join(wrong)
