"""What to do with a task: pure, so that every interleaving can be tried in a test."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from tidegate.domain.messages import StepTask
from tidegate.registry.registration import mark_name

RUN_TASK: Final = "run"
CANCEL_TASK: Final = "cancel"
NO_MARK: Final = -1


class Verdict(enum.Enum):
    """What becomes of a task. Only the two that ignore it leave no trace in the marks."""

    NOT_OURS = "not_ours"  # addressed to another instance or incarnation
    SEEN_BEFORE = "seen_before"  # doubled, or older than what was taken already
    RUN = "run"
    CANCEL = "cancel"
    ANSWER_BUSY = "answer_busy"
    ANSWER_RELEASED = "answer_released"


IGNORED: Final = (Verdict.NOT_OURS, Verdict.SEEN_BEFORE)


def judge_task(
    task: StepTask,
    *,
    instance_id: str,
    incarnation: int,
    marks: Mapping[str, int],
    free_slots: int,
    draining: bool,
) -> Verdict:
    """Return what to do with a task.

    Only what is addressed to this very incarnation and above the highest position seen from that ledger partition is
    taken: so an attempt is dispatched here at most once, however often and by whomever it is told.
    """
    if task.instance_id != instance_id or task.incarnation != incarnation:
        return Verdict.NOT_OURS
    source = task.source
    if source.rank() <= marks.get(mark_name(source.partition), NO_MARK):
        return Verdict.SEEN_BEFORE
    if task.type == CANCEL_TASK:
        return Verdict.CANCEL
    if draining:
        return Verdict.ANSWER_RELEASED
    return Verdict.RUN if free_slots > 0 else Verdict.ANSWER_BUSY
