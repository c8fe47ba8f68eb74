"""Retry documents tried out without any Kafka: cases say how attempts failed, and what must become of the step. Pure.

The scheduler's own decision is asked (`domain/retries.py`), so what passes here is what happens there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field, field_validator

from tidegate.domain import retries
from tidegate.domain.identity import DEFAULT_ACCOUNT
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.retry_documents import Attempted, RetryDocuments, problems
from tidegate.domain.workflow import Function
from tidegate.gate.retries import Retry

_STRICT: Final = ConfigDict(extra="forbid", frozen=True, strict=True)
Next = Literal["again", "stop", "ask"]
ASKED: Final = "outcome_unknown"  # of a function that must not be repeated silently


class Failed(BaseModel):
    """Attempts that failed alike, one after the other. As in a result: outcome, retryable, retry_after_ms."""

    model_config = _STRICT

    error: str = Field(min_length=1, max_length=retries.MAX_ERROR_CLASS)
    times: int = Field(default=1, ge=1, le=1000)
    outcome: Literal["failed", "timed_out", "died"] = "failed"
    retryable: bool = True
    retry_after_ms: int = Field(default=0, ge=0)


class RetryExpectation(BaseModel):
    """What must become of the step after the last failure; what is not said may be anything. wait_ms: the shortest and the longest
    time that chance may make of it."""

    model_config = _STRICT

    next: Next
    wait_ms: list[int] | None = Field(default=None, min_length=2, max_length=2)
    document: str | None = None
    rule: str | None = None
    code: str | None = None


class RetryCase(BaseModel):
    """How the attempts of a step failed, the last one last. settings: what the function's definition says of its retries. retry:
    the document that it names. idempotent: whether it may be repeated when nobody knows what became of it. The others: what
    documents choose by."""

    model_config = _STRICT

    name: str = Field(min_length=1, max_length=200)
    failed: list[str | Failed] = Field(min_length=1, max_length=100)
    function: str = "step"
    retry: str = ""
    idempotent: bool = True
    settings: dict[str, Any] = {}
    account: str = DEFAULT_ACCOUNT
    workflow: str = "workflow"
    tags: dict[str, str] = {}
    expect: Next | RetryExpectation

    @field_validator("settings")
    @classmethod
    def _are_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value and (wrong := problems(value)):
            raise ValueError("; ".join(wrong))
        return value


class Ending(NamedTuple):
    """What becomes of a step. at: after which failure, from 1. least_ms, most_ms: how long the next attempt waits."""

    next: Next
    at: int
    least_ms: int
    most_ms: int
    document: str
    rule: str
    code: str

    def said(self) -> str:
        """Return it for people."""
        if self.next == "ask":
            return f"ask a human after failure {self.at} ({self.code})"
        by = "/".join(part for part in (self.document or "the function's own settings", self.rule) if part)
        if self.next == "stop":
            return f"stop after failure {self.at} ({self.code}) by {by}"
        return f"again in {self.least_ms} to {self.most_ms} ms by {by}"


def in_force(documents: Iterable[Retry]) -> RetryDocuments:
    """Return documents as the scheduler would hold them."""
    found = RetryDocuments()
    for document in documents:
        key, text = document.topic_key, document.to_json()
        found.take(key, PolicyPublished(policy_id=key, version=document.version, document=text, by="", at_ms=0))
    return found


def ending(case: RetryCase, documents: RetryDocuments) -> Ending:
    """Return what becomes of the step of a case: as soon as it stops, the failures that follow cannot happen."""
    function = msgspec.convert({"kind": "step", "retry": case.retry, **case.settings}, Function)
    chosen = documents.choose(function, Attempted(case.function, case.account, case.workflow, case.tags))
    counts: Counter[str] = Counter()
    failures = [item for item in map(_as_failed, case.failed) for _ in range(item.times)]
    for at, item in enumerate(failures, 1):
        if item.outcome in retries.OUTCOME_UNKNOWN and not case.idempotent:
            return Ending("ask", at, 0, 0, "", "", ASKED)
        failure = retries.Failure(item.error, item.retryable, item.retry_after_ms)
        least, most = (retries.judge(chosen.settings, failure, counts, at - 1, jitter) for jitter in (0.0, 1.0))
        if least.wait_ms is None or most.wait_ms is None or at == len(failures):
            break
        if least.rule:
            counts[least.rule] += 1
    following: Next = "stop" if least.wait_ms is None else "again"
    return Ending(following, at, least.wait_ms or 0, most.wait_ms or 0, chosen.document, least.rule, least.code)


def _as_failed(item: str | Failed) -> Failed:
    return Failed(error=item) if isinstance(item, str) else item


def difference(case: RetryCase, found: Ending) -> str:
    """Return what is otherwise than the case expects; empty if nothing is."""
    failures = sum(_as_failed(item).times for item in case.failed)
    if found.at < failures:
        return f"it {'asks' if found.next == 'ask' else 'stops'} after failure {found.at} of {failures}"
    wanted = RetryExpectation(next=case.expect) if isinstance(case.expect, str) else case.expect
    there = found._asdict() | {"wait_ms": [found.least_ms, found.most_ms]}
    return "; ".join(
        f"{name} {there[name]!r} instead of {value!r}"
        for name, value in wanted.model_dump(exclude_none=True).items()
        if there[name] != value
    )
