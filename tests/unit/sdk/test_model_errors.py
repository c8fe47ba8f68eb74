"""Errors of models: what clients raise becomes a few named classes, by what they carry and not by who made them."""

from __future__ import annotations

import datetime
import email.utils
from types import SimpleNamespace
from typing import Any

import pytest

from tidegate import App, AppError, NonRetryable, RetryRule
from tidegate.domain.workflow import validate_definition
from tidegate.sdk import model_errors as m


def made(name: str, message: str = "no", base: type[BaseException] = Exception, **fields: Any) -> BaseException:
    """Return an exception as some client would raise it."""
    error = type(name, (base,), {})(message)
    for field, value in fields.items():
        setattr(error, field, value)
    return error


def answer(status: int, **headers: str) -> SimpleNamespace:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(status_code=status, headers=named)


THROTTLED = {"Error": {"Code": "ThrottlingException"}, "ResponseMetadata": {"HTTPStatusCode": 400}}


@pytest.mark.feature("T5")
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (made("RateLimitError", status_code=429), m.RateLimited),
        (made("RateLimitError", status_code=429, code="insufficient_quota"), m.QuotaExhausted),
        (made("APIStatusError", status_code=529), m.Overloaded),
        (made("APIStatusError", status_code=200, body={"error": {"type": "overloaded_error"}}), m.Overloaded),
        (made("InternalServerError"), m.Overloaded),
        (made("HTTPStatusError", response=answer(503)), m.Overloaded),
        (made("ServerError", code=500), m.Overloaded),
        (made("ClientError", response=THROTTLED), m.RateLimited),
        (made("APITimeoutError"), m.ModelTimedOut),
        (made("ReadTimeout"), m.ModelTimedOut),
        (TimeoutError("late"), m.ModelTimedOut),
        (made("APIStatusError", status_code=504), m.ModelTimedOut),
        (made("APIConnectionError"), m.ModelUnreachable),
        (ConnectionResetError("gone"), m.ModelUnreachable),
        (made("BadRequestError", status_code=400, code="context_length_exceeded"), m.ContextTooLong),
        (made("BadRequestError", "prompt is too long: 210000 tokens", status_code=400), m.ContextTooLong),
        (made("ContextWindowExceededError"), m.ContextTooLong),
        (made("BadRequestError", status_code=400, code="content_filter"), m.ContentFiltered),
        (made("AuthenticationError", status_code=401), m.NotAuthorized),
        (made("PermissionDenied", status_code=403), m.NotAuthorized),
        (made("NotFoundError", status_code=404), m.BadModelRequest),
        (made("UnprocessableEntityError", status_code=422), m.BadModelRequest),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_errors_of_clients_have_names(error: BaseException, kind: type[m.ModelError]) -> None:
    found = m.classified(error)
    assert type(found) is kind
    assert isinstance(found, NonRetryable) == (kind not in m.TRANSIENT)


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("y"), made("Odd", status_code=200), made("Odd", code="E1")]
)
def test_what_is_no_error_of_a_model_stays_what_it_is(error: Exception) -> None:
    assert m.classified(error) is None
    with pytest.raises(type(error)), m.model_errors():
        raise error


def test_the_original_is_the_cause_and_a_name_is_not_given_twice() -> None:
    original = made("RateLimitError", "slow down", status_code=429)
    with pytest.raises(m.RateLimited, match="RateLimitError: slow down") as found, m.model_errors(), m.model_errors():
        raise original
    assert found.value.__cause__ is original
    with pytest.raises(NonRetryable, match="mine"), m.model_errors():
        raise NonRetryable("mine")


@pytest.mark.feature("T5")
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry_after": "20"}, 20.0),
        ({"Retry_After": "0.5"}, 0.5),
        ({"retry_after": "20", "retry_after_ms": "1500"}, 1.5),
        ({"retry_after": "-3"}, None),
        ({"retry_after": "soon"}, None),
        ({}, None),
    ],
)
def test_the_time_that_a_provider_names_is_kept(headers: dict[str, str], seconds: float | None) -> None:
    found = m.classified(made("RateLimitError", response=answer(429, **headers)))
    assert found is not None
    assert found.retry_after_s == seconds


def test_a_date_is_a_time_too() -> None:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    found = m.classified(made("E", response=answer(429, retry_after=email.utils.format_datetime(at, usegmt=True))))
    assert found is not None
    assert found.retry_after_s is not None
    assert 60 < found.retry_after_s <= 90


@pytest.mark.feature("D2")
def test_rules_are_pinned_into_the_definition() -> None:
    app = App("a")

    @app.agent(retry_rules=[*m.MODEL_RETRIES, RetryRule(on=[KeyError], retries=0)])
    def clerk(state: Any) -> str:
        return ""

    definition = app.agent_definition("clerk")
    assert validate_definition(definition) == []
    assert definition["functions"]["clerk"]["retry_rules"] == [
        {
            "on": ["RateLimited", "Overloaded", "ModelTimedOut", "ModelUnreachable"],
            "name": "model",
            "max_attempts": 13,
            "backoff_ms": 1000,
            "backoff_factor": 2.0,
            "backoff_max_ms": 60_000,
        },
        {"on": ["KeyError"], "max_attempts": 1},
    ]


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ("RateLimited", "retry_rules must be a list of RetryRule"),
        ([RetryRule(on=[])], "retry_rules.0.on: "),
        ([RetryRule(on="RateLimited")], "a list of exceptions or of names"),
        ([RetryRule(on=["A"], retries=-1)], "retry_rules.0.max_attempts: "),
        ([RetryRule(on=["A"], backoff_s=0)], "retry_rules.0.backoff_ms: "),
        ([RetryRule(on=["A"]), RetryRule(on=["A"])], "several rules name 'A'"),
    ],
)
def test_a_wrong_rule_is_refused_when_the_function_is_declared(rules: Any, problem: str) -> None:
    def function() -> None: ...

    with pytest.raises(AppError, match=problem):
        App("a").step(retry_rules=rules)(function)
