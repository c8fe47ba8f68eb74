"""Whether an attempt that failed is followed by another, and when: settings, rules by error class, and the one decision. Pure.

The same shape stands in the functions of a definition and in retry documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

MAX_ERROR_CLASSES: Final = 100  # that one list may name
MAX_ERROR_CLASS: Final = 200
MAX_RULES: Final = 20
MAX_RETRY_AFTER_MS: Final = 24 * 3_600_000  # longer is no answer to wait for

OUTCOME_UNKNOWN: Final = frozenset({"timed_out", "died"})  # results of attempts that may have had their effect, or not

EXHAUSTED: Final = "attempts_exhausted"
NOT_RETRYABLE: Final = "not_retryable"

_error_classes: Final = {
    "type": "array",
    "items": {"type": "string", "minLength": 1, "maxLength": MAX_ERROR_CLASS},
    "maxItems": MAX_ERROR_CLASSES,
}
_TIMES: Final[dict[str, Any]] = {
    "max_attempts": {"type": "integer", "minimum": 1, "maximum": 1000},
    "backoff_ms": {"type": "integer", "minimum": 1, "maximum": 24 * 3_600_000},
    "backoff_factor": {"type": "number", "minimum": 1, "maximum": 100},
    "backoff_max_ms": {"type": "integer", "minimum": 1, "maximum": 7 * 24 * 3_600_000},
}
PROPERTIES: Final[dict[str, Any]] = {
    **_TIMES,
    "retry_on": _error_classes,
    "no_retry_on": _error_classes,
    "retry_rules": {
        "type": "array",
        "maxItems": MAX_RULES,
        "items": {
            "type": "object",
            "additionalProperties": False,
            "required": ["on"],
            "properties": {
                "on": {**_error_classes, "minItems": 1},
                "name": {"type": "string", "minLength": 1, "maxLength": MAX_ERROR_CLASS},
                **_TIMES,
            },
        },
    },
}


class Rule(msgspec.Struct, frozen=True):
    """How attempts are repeated that failed with one of these error classes. What it does not say is as without it.

    max_attempts: how many attempts of a step may fail under this rule; they are counted apart from all others. The step fails
    with the last of them.
    """

    on: tuple[str, ...]
    name: str = ""
    max_attempts: int | None = None
    backoff_ms: int | None = None
    backoff_factor: float | None = None
    backoff_max_ms: int | None = None

    @property
    def label(self) -> str:
        """Return what the log calls the rule, and its failures are counted by: its name, or its first error class."""
        return self.name or self.on[0]


_NO_RULE: Final = Rule(())


class Retries(msgspec.Struct, frozen=True):
    """How failed attempts are repeated. Times in milliseconds.

    max_attempts: how many attempts of a step may fail that no rule is about. retry_on: names of the error classes after which
    they are repeated; none for all. no_retry_on: those after which they are not. retry_rules: for classes that need other
    patience; the first that names the class counts, before retry_on and no_retry_on.
    """

    max_attempts: int = 5
    backoff_ms: int = 200
    backoff_factor: float = 2.0
    backoff_max_ms: int = 60_000
    retry_on: tuple[str, ...] = ()
    no_retry_on: tuple[str, ...] = ()
    retry_rules: tuple[Rule, ...] = ()


class Failure(NamedTuple):
    """How an attempt failed. retryable: false if it says itself that repeating cannot help. retry_after_ms: when whoever
    refused it lets it come again, counted from now; 0 if nothing was said.
    """

    error_class: str
    retryable: bool = True
    retry_after_ms: int = 0


class Verdict(NamedTuple):
    """What becomes of a step whose attempt failed.

    wait_ms: until the next attempt; None for none. rule: label of the rule that counts, empty for none. code: why there is
    none. failures, max_attempts: how many failed that count for the same, this one included, and how many may.
    """

    wait_ms: int | None
    rule: str
    code: str
    failures: int
    max_attempts: int


def judge(settings: Retries, failure: Failure, counts: Mapping[str, int], total: int, jitter: float) -> Verdict:
    """Return whether and when the next attempt comes.

    counts: attempts of the step that failed before under each rule, by label. total: all that failed before. jitter: 0 to 1,
    the same whenever this is decided again; half of a back-off is left to it.
    """
    rule = next((rule for rule in settings.retry_rules if failure.error_class in rule.on), None)
    own = _NO_RULE if rule is None else rule
    label = "" if rule is None else rule.label
    before = total - sum(counts.values()) if rule is None else counts.get(label, 0)
    most = settings.max_attempts if own.max_attempts is None else own.max_attempts
    if not failure.retryable or (rule is None and not _is_listed(settings, failure.error_class)):
        return Verdict(None, label, NOT_RETRYABLE, before + 1, most)
    if before + 1 >= most:
        return Verdict(None, label, EXHAUSTED, before + 1, most)
    first_ms = settings.backoff_ms if own.backoff_ms is None else own.backoff_ms
    factor = settings.backoff_factor if own.backoff_factor is None else own.backoff_factor
    longest_ms = settings.backoff_max_ms if own.backoff_max_ms is None else own.backoff_max_ms
    backoff_ms = min(_power(first_ms, factor, before), longest_ms)
    # Never before the time that was named, and spread after it, because others were told the same.
    asked_ms = min(max(failure.retry_after_ms, 0), MAX_RETRY_AFTER_MS)
    least_ms = max(asked_ms, backoff_ms * 0.5)
    return Verdict(int(least_ms + backoff_ms * jitter / 2), label, "", before + 1, most)


def _is_listed(settings: Retries, error_class: str) -> bool:
    """Tell whether the lists let an error of this class be tried again."""
    if error_class in settings.no_retry_on:
        return False
    return not settings.retry_on or error_class in settings.retry_on


def _power(first: int, factor: float, exponent: int) -> float:
    try:
        return first * factor**exponent
    except OverflowError:  # its maximum counts then
        return float("inf")


def problems(settings: Mapping[str, Any], where: str) -> list[str]:
    """Return what is wrong with settings whose form `PROPERTIES` has checked, each problem with its place."""
    rules = settings.get("retry_rules", ())
    listed = Counter(error_class for rule in rules for error_class in dict.fromkeys(rule["on"]))
    found = [f"{where}.retry_rules: several rules name {name!r}" for name, count in listed.items() if count > 1]
    both = [error_class for error_class in settings.get("no_retry_on", ()) if error_class in listed]
    found += [f"{where}.no_retry_on: {error_class!r} has a rule in retry_rules" for error_class in both]
    labels = Counter(rule.get("name") or rule["on"][0] for rule in rules)
    found += [f"{where}.retry_rules: several are called {label!r}" for label, count in labels.items() if count > 1]
    return found
