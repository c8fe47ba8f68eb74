"""Which question of a run an answer means. Pure."""

from __future__ import annotations

from typing import Final

from tidegate.domain import canonical
from tidegate.domain import run_events as ev

QUESTION_PATTERN: Final = "^[0-9a-f]{16}$"
LACK_RULE: Final = "budget:"  # before a budget's name: what is named as the rule when a budget asks, or refuses


def question_id(asked: ev.ApprovalRequested) -> str:
    """Return what names this very question: its step, attempt and cause, the rule and version that asks, and the arguments.

    A step that asks again, for another rule, by another version or about other arguments, asks another question.
    """
    about = [asked.step_id, asked.attempt, asked.why, asked.rule, asked.policy, asked.arguments_hash]
    return canonical.digest(canonical.dumps(about))[:16]


def is_answered_by_room(asked: ev.ApprovalRequested) -> bool:
    """Tell whether a budget asks: then the gate may let the attempt run without an answer, as soon as there is room."""
    return asked.why == "policy" and asked.rule.startswith(LACK_RULE)


def asks_by(rule: str, policy: str, why: str) -> str:
    """Return who asks, for people: the rule and the version of its document, or why there is none."""
    return f"rule {rule} of {policy}" if policy else f"rule {rule}" if rule else why
