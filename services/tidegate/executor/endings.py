"""How a function ended: what it returned or raised as data, the same whether it ran in this process, in another, or in a Job."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from tidegate.domain import canonical
from tidegate.domain.graph_changes import MAX_CHANGE_BYTES
from tidegate.domain.retries import MAX_RETRY_AFTER_MS
from tidegate.executor import results
from tidegate.sdk import json_form
from tidegate.sdk.binding import AGENT, TOOL
from tidegate.sdk.context import Meter
from tidegate.sdk.errors import BadArgumentsError, NonRetryable, NotJsonError
from tidegate.sdk.plan import Given, given_by, plan_of

T = TypeVar("T")


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a function ended. outcome: as in a result. output: canonical JSON.

    goto: the node that it chose; change: what it proposes to add to the graph of its run; both may be empty.
    error_class, error_message, retryable: of a failure. retry_after_ms: for how long it asks to be left alone.
    """

    outcome: str
    output: str = ""
    goto: str = ""
    change: str = ""
    error_class: str = ""
    error_message: str = ""
    retryable: bool = True
    retry_after_ms: int = 0


class LeaseLapsedError(RuntimeError):
    """The lease was not held at the very moment of entering: the function was not entered."""


class UnknownFunctionError(LookupError):
    """The app has no function of that kind and name."""


class UnsupportedIsolationError(RuntimeError):
    """The function is to be run in a way that this executor does not have."""


class ErrandTooLargeError(ValueError):
    """The arguments are larger than what the place where the function is to run can be given."""


class OutputTooLargeError(ValueError):
    """What the function returned is larger than what a result may hold."""


# What repeating cannot mend. The names are part of the results, and so of the log.
_ERROR_CLASSES: Final[dict[type[BaseException], str]] = {
    UnknownFunctionError: "UnknownFunction",
    UnsupportedIsolationError: "UnsupportedIsolation",
    BadArgumentsError: "BadArguments",
    NotJsonError: "NotJson",
    canonical.NotJsonError: "NotJson",
    ErrandTooLargeError: "ErrandTooLarge",
    OutputTooLargeError: "OutputTooLarge",
    LeaseLapsedError: "LeaseLapsed",
}


def returned(kind: str, value: Any, meter: Meter, output_max_bytes: int) -> Ending:
    """The function of that kind returned. Raises what `raised` makes a failure of, if the value cannot be used."""
    if inspect.isawaitable(value):
        raise NotJsonError("output: an awaitable; declare the function with `async def`")
    given = Given(value) if kind == TOOL else given_by(value)
    if kind == AGENT:
        plan = plan_of(value)
        if plan.cost_micros is not None:
            meter.add_cost(plan.cost_micros)
        meter.add_usage(plan.usage)
        text = canonical.dumps(plan.to_json())
    else:
        text = json_form.to_text(given.output)
    size = len(text.encode())
    if size > output_max_bytes:
        raise OutputTooLargeError(
            f"the output has {size} bytes as JSON, at most {output_max_bytes} are taken "
            "(TIDEGATE_EXECUTOR_OUTPUT_MAX_BYTES, or the function's output_max_bytes); keep it elsewhere and return where"
        )
    if (size := len(given.change.encode())) > MAX_CHANGE_BYTES:
        raise OutputTooLargeError(f"the change has {size} bytes as JSON, at most {MAX_CHANGE_BYTES} are taken")
    goto = "" if kind == AGENT else given.goto
    return Ending(outcome=results.SUCCEEDED, output=text, goto=goto, change=given.change)


def raised(error: BaseException, *, has_returned: bool) -> Ending:
    """The function raised, or could not be called, or what it returned cannot be used: then repeating it cannot help."""
    return Ending(
        outcome=results.FAILED,
        error_class=_ERROR_CLASSES.get(type(error)) or _name_of(error),
        error_message=results.bounded(
            _asked(lambda: str(error), lambda broken: f"(its message cannot be read: {_name_of(broken)})")
        ),
        retryable=not (has_returned or isinstance(error, (NonRetryable, *_ERROR_CLASSES))),
        retry_after_ms=_asked(lambda: _retry_after_ms(error), lambda _: 0),
    )


def not_started(reason: str) -> Ending:
    """The function was not entered, and it is certain that it will not be: it may be tried again, idempotent or not."""
    return Ending(outcome=results.FAILED, error_class="NotStarted", error_message=results.bounded(reason))


def died(reason: str, *, idempotent: bool) -> Ending:
    """Where the function ran ended without an answer. It may have had its effect."""
    if not idempotent:
        reason += "; it may have had its effect, and is not idempotent"
    return Ending(outcome=results.DIED, error_class="Died", error_message=results.bounded(reason), retryable=idempotent)


def _name_of(error: BaseException) -> str:
    """Return the name of an exception's class, whatever its metaclass says."""
    return str(type.__dict__["__name__"].__get__(type(error)))


def _asked(ask: Callable[[], T], instead: Callable[[BaseException], T]) -> T:
    """Return what an exception says of itself, or something instead: asking runs somebody's code, which may raise anything."""
    try:
        return ask()
    except BaseException as broken:  # the attempt must be answered all the same
        return instead(broken)


def _retry_after_ms(error: BaseException) -> int:
    """Return for how long an exception asks to be left alone: its `retry_after_s`, if that is a number of seconds."""
    after_s = getattr(error, "retry_after_s", None)
    if not isinstance(after_s, int | float) or isinstance(after_s, bool) or not 0 < after_s < MAX_RETRY_AFTER_MS:
        return 0
    return min(math.ceil(after_s * 1000), MAX_RETRY_AFTER_MS)
