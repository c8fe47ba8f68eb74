"""Policies and retry documents tried out without any Kafka: cases say what a step is like, and what must be made of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from tidegate.domain.identity import DEFAULT_ACCOUNT
from tidegate.domain.retry_documents import RetryDocuments
from tidegate.gate import retry_cases
from tidegate.gate.documents import Document
from tidegate.gate.policy import Effect, Policy, PolicySet, Verdict
from tidegate.gate.retries import Retry
from tidegate.gate.retry_cases import RetryCase
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


_OF_STEP, _OF_FAILURE = "a case of a step", "a case of failures"


def _form(value: Any) -> str:
    return _OF_FAILURE if isinstance(value, RetryCase) or (isinstance(value, dict) and "failed" in value) else _OF_STEP


AnyCase = Annotated[Annotated[Case, Tag(_OF_STEP)] | Annotated[RetryCase, Tag(_OF_FAILURE)], Discriminator(_form)]


class Cases(BaseModel):
    """A file of cases. policies: files that are read, relative to this one."""

    model_config = _STRICT

    policies: list[str] = Field(min_length=1)
    cases: list[AnyCase] = Field(min_length=1)


class Outcome(NamedTuple):
    """What came of a case. said: for people; values: what the rule looked at. problem: empty if it is what was expected."""

    case: Case | RetryCase
    said: str
    values: str
    problem: str
    fields: dict[str, Any]


def tried(cases: Cases, documents: list[Document]) -> Iterator[Outcome]:
    """Yield what policies and retry documents make of every case; other documents are passed over."""
    rules = PolicySet({document.topic_key: document for document in documents if isinstance(document, Policy)})
    retries = retry_cases.in_force(document for document in documents if isinstance(document, Retry))
    for case in cases.cases:
        yield _retry_outcome(case, retries) if isinstance(case, RetryCase) else _outcome(case, rules)


def _outcome(case: Case, rules: PolicySet) -> Outcome:
    verdict = rules.judge(Variables.of(_completed(case.step)))
    by = f"{verdict.policy}/{verdict.rule}" if verdict.policy else verdict.rule
    problem = _difference(case.expect, verdict)
    return Outcome(case, f"{verdict.effect} by {by}", verdict.values, problem, verdict._asdict())


def _retry_outcome(case: RetryCase, retries: RetryDocuments) -> Outcome:
    found = retry_cases.ending(case, retries)
    return Outcome(case, found.said(), "", retry_cases.difference(case, found), found._asdict())


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
