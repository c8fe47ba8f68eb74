"""Errors of models by name: what the clients of providers raise becomes a few classes that retry rules can be written for.

    with model_errors():
        reply = await client.chat.completions.create(...)

No client is imported: errors are told by their status, their code and the names of their classes.
"""

# ruff: noqa: N818 - the names are words of the log, and of retry rules

from __future__ import annotations

import contextlib
import datetime
import email.utils
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tidegate.sdk.errors import NonRetryable
from tidegate.sdk.functions import RetryRule

MAX_DEPTH: Final = 5  # of objects in which a code is looked for
MAX_MESSAGE: Final = 2_000


class ModelError(Exception):
    """A call of a model failed. `retry_after_s`: for how long the provider wants to be left alone; None if it did not say."""

    def __init__(self, message: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimited(ModelError):
    """The provider takes no more calls or tokens for now."""


class Overloaded(ModelError):
    """The provider has too much to do, or is broken."""


class ModelTimedOut(ModelError):
    """No answer came in time."""


class ModelUnreachable(ModelError):
    """There was no connection, or it broke."""


class ContextTooLong(ModelError, NonRetryable):
    """The prompt has more tokens than the model takes: the same prompt will not fit next time either."""


class ContentFiltered(ModelError, NonRetryable):
    """The provider refuses the prompt or its own answer for what it says."""


class NotAuthorized(ModelError, NonRetryable):
    """The key is missing, wrong, or not allowed to do this."""


class QuotaExhausted(ModelError, NonRetryable):
    """The provider's account has no money left, or has reached its monthly limit."""


class BadModelRequest(ModelError, NonRetryable):
    """The provider does not understand the call, or has no such model."""


TRANSIENT: Final[tuple[type[ModelError], ...]] = (RateLimited, Overloaded, ModelTimedOut, ModelUnreachable)
MODEL_RETRIES: Final = (
    RetryRule(on=TRANSIENT, retries=12, backoff_s=1.0, backoff_factor=2.0, backoff_max_s=60.0, name="model"),
)
"""Patience for some minutes with a provider that is busy, away or slow: `@agent(retry_rules=MODEL_RETRIES)`."""

# Codes first: they say more than a status, which several causes share.
_BY_CODE: Final[dict[str, type[ModelError]]] = {
    **dict.fromkeys(("context_length_exceeded", "request_too_large", "string_above_max_length"), ContextTooLong),
    **dict.fromkeys(("content_filter", "content_policy_violation", "responsibleaipolicyviolation"), ContentFiltered),
    **dict.fromkeys(("insufficient_quota", "billing_hard_limit_reached", "billing_error"), QuotaExhausted),
    **dict.fromkeys(("rate_limit_exceeded", "rate_limit_error", "throttlingexception"), RateLimited),
    **dict.fromkeys(("toomanyrequestsexception", "resource_exhausted"), RateLimited),
    **dict.fromkeys(("overloaded_error", "serviceunavailableexception", "unavailable"), Overloaded),
    **dict.fromkeys(("modelnotreadyexception", "internalserverexception", "server_error"), Overloaded),
    **dict.fromkeys(("modeltimeoutexception", "deadline_exceeded", "timeout_error"), ModelTimedOut),
    **dict.fromkeys(("invalid_api_key", "authentication_error", "permission_error"), NotAuthorized),
    **dict.fromkeys(("accessdeniedexception", "unauthenticated", "permission_denied"), NotAuthorized),
    **dict.fromkeys(("invalid_request_error", "validationexception", "not_found_error"), BadModelRequest),
}
_BY_STATUS: Final[dict[int, type[ModelError]]] = {
    400: BadModelRequest,
    401: NotAuthorized,
    402: QuotaExhausted,
    403: NotAuthorized,
    404: BadModelRequest,
    408: ModelTimedOut,
    413: ContextTooLong,
    422: BadModelRequest,
    429: RateLimited,
    504: ModelTimedOut,
}
# Ends of class names, longest meaning first.
_BY_NAME: Final[tuple[tuple[str, type[ModelError]], ...]] = (
    ("ContextWindowExceededError", ContextTooLong),
    ("ContentPolicyViolationError", ContentFiltered),
    ("RateLimitError", RateLimited),
    ("OverloadedError", Overloaded),
    ("ServiceUnavailableError", Overloaded),
    ("InternalServerError", Overloaded),
    ("AuthenticationError", NotAuthorized),
    ("PermissionDeniedError", NotAuthorized),
    ("BadRequestError", BadModelRequest),
    ("TimeoutError", ModelTimedOut),
    ("TimeoutException", ModelTimedOut),
    ("Timeout", ModelTimedOut),
    ("APIConnectionError", ModelUnreachable),
    ("ConnectError", ModelUnreachable),
    ("ConnectionError", ModelUnreachable),
    ("RemoteProtocolError", ModelUnreachable),
)
_TOO_LONG: Final = ("context length", "context window", "too many tokens", "prompt is too long", "maximum context")


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Raise what is known of a model's error as one of the classes of this module; the original is its cause.

    Other exceptions, and those of this module, pass as they are.
    """
    try:
        yield
    except (ModelError, NonRetryable):
        raise
    except Exception as error:
        found = classified(error)
        if found is None:
            raise
        raise found from error


def classified(error: BaseException) -> ModelError | None:
    """Return the error of this module that an exception of a client means; None if that cannot be told."""
    kind = _kind_of(error)
    if kind is None:
        return None
    message = f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    return kind(message, retry_after_s=_retry_after_s(error) if issubclass(kind, TRANSIENT) else None)


def _kind_of(error: BaseException) -> type[ModelError] | None:
    codes = list(_codes(error, 0))
    found = next((_BY_CODE[code] for code in _BY_CODE if code in codes), None)
    status = _status(error)
    if found is None and status is not None:
        found = _BY_STATUS.get(status) or (Overloaded if 500 <= status < 600 else None)
    if found is None:
        names = [base.__name__ for base in type(error).__mro__]
        found = next((kind for end, kind in _BY_NAME if any(name.endswith(end) for name in names)), None)
    if found is BadModelRequest and any(words in str(error).lower() for words in _TOO_LONG):
        return ContextTooLong
    return found


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, under one of the names that clients give it."""
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, Mapping) else {}
    places = (
        getattr(error, "status_code", None),
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
        metadata.get("HTTPStatusCode") if isinstance(metadata, Mapping) else None,
    )
    return next((status for status in places if type(status) is int and 400 <= status < 600), None)


def _codes(where: Any, depth: int) -> Iterator[str]:
    """Yield the words, in lower case, by which an error or a part of its body calls itself."""
    if depth > MAX_DEPTH:
        return
    for name in ("code", "type", "status", "Code"):
        word = _part(where, name)
        if isinstance(word, str):
            yield word.lower()
    for name in ("body", "error", "Error", "innererror", "response"):
        inner = _part(where, name)
        if isinstance(inner, Mapping):
            yield from _codes(inner, depth + 1)


def _part(where: Any, name: str) -> Any:
    return where.get(name) if isinstance(where, Mapping) else getattr(where, name, None)


def _retry_after_s(error: BaseException) -> float | None:
    """Return what the headers of an answer say about coming again; None if they do not, or nothing that can be read."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None)
    if headers is None and isinstance(response, Mapping):
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
    if not isinstance(headers, Mapping):
        headers = getattr(error, "headers", None)
    if not isinstance(headers, Mapping):
        return None
    said = {str(name).lower(): str(value).strip() for name, value in headers.items()}
    seconds = _number(said.get("retry-after"))
    milliseconds = _number(said.get("retry-after-ms"))
    if milliseconds is not None:
        seconds = milliseconds / 1000
    if seconds is None and "retry-after" in said:
        seconds = _seconds_until(said["retry-after"])
    return seconds if seconds is not None and seconds > 0 else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _seconds_until(date: str) -> float | None:
    try:
        at = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=datetime.UTC)
    return (at - datetime.datetime.now(datetime.UTC)).total_seconds()
