"""Runs that do a step of another run. Pure.

The parent's definition holds those of its children, so nothing that is published later changes them, and none can hold itself.
"""

from __future__ import annotations

from typing import NamedTuple

from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.canonical import digest
from tidegate.domain.identity import child_run_id
from tidegate.domain.run import RunState, StepState
from tidegate.domain.workflow import Workflow


class Child(NamedTuple):
    """What a step is that another run does. label: `name@version`. budget_micros: the most that it may cost."""

    label: str
    budget_micros: int | None = None


def started(
    run: RunState, workflow: Workflow, node_id: str, step_id: str, wave: int, value: str, child: Child
) -> ev.ChildStarted:
    """Return the event that begins a child: its id follows from its parent's and the step's.

    It has a budget of its own: the one that is said, but never more than the parent has.
    """
    label = child.label
    budgets = [micros for micros in (child.budget_micros, run.budget_micros) if micros is not None]
    definition = workflow.child_definition(label)
    return ev.ChildStarted(
        step_id=step_id,
        node_id=node_id,
        wave=wave,
        child_run_id=child_run_id(run.run_id, step_id),
        workflow=label,
        definition_hash=digest(definition),
        definition=definition,
        input=value,
        budget_micros=min(budgets, default=None),
        tags=run.tags,
        failure_mode=run.failure_mode,
        priority=run.priority,
        prefer=run.prefer,
    )


def cancelled(step: StepState, reason: str) -> ev.ChildCancelled:
    """Return the event that has a child cancelled."""
    return ev.ChildCancelled(step_id=step.step_id, child_run_id=step.child_run_id, reason=reason)


def paused(run: RunState, *, is_paused: bool) -> list[ev.ChildPaused]:
    """Return the events that have the children that are under way paused, or resumed."""
    return [
        ev.ChildPaused(step_id=step.step_id, child_run_id=step.child_run_id, paused=is_paused)
        for step in run.steps.values()
        if step.status == states.IN_CHILD
    ]


def end_reported(run: RunState, status: str, code: str, reason: str) -> list[ev.EndReported]:
    """Return what tells the parent that its child is over; nothing if the run has no parent."""
    if not run.parent_run_id:
        return []
    return [
        ev.EndReported(
            parent_run_id=run.parent_run_id,
            parent_step_id=run.parent_step_id,
            status=status,
            code=code,
            reason=reason,
        )
    ]
