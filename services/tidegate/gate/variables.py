"""What rules and limits may look at: the variables of a step. The names are documented in docs/policy.md and never change
their meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from tidegate.domain import canonical
from tidegate.domain.messages import Call
from tidegate.gate.ledger import AttemptKey


class Money(Protocol):
    """What is needed of a run."""

    budget_micros: int | None
    reserved_micros: int
    settled_micros: int
    workflow: str
    tags: dict[str, str]


class Subject(NamedTuple):
    """An attempt of a run. spent: returns what budgets counted for the run, by name."""

    key: AttemptKey
    account: str
    call: Call
    run: Money
    spent: Callable[[], dict[str, Any]] = dict


MAKERS: Final[dict[str, Callable[[Subject], Any]]] = {
    "kind": lambda step: step.call.kind,
    "name": lambda step: step.call.function,
    "tool": lambda step: step.call.function if step.call.kind == "tool" else "",
    "agent": lambda step: step.call.agent,
    "args": lambda step: canonical.loads(step.call.arguments),
    "queue": lambda step: step.call.queue,
    "provider": lambda step: step.call.provider,
    "model": lambda step: step.call.model,
    "operation": lambda step: step.call.operation,
    "step": lambda step: step.key.step_id,
    "node": lambda step: step.key.step_id.partition("/")[0],
    "attempt": lambda step: step.key.attempt,
    "reserve_micros": lambda step: step.call.reserve_micros,
    "account": lambda step: step.account,
    "workflow": lambda step: step.run.workflow.partition("@")[0],
    "version": lambda step: step.run.workflow.partition("@")[2],
    "tags": lambda step: step.run.tags,
    "run": lambda step: {
        "id": step.key.run_id,
        "settled_micros": step.run.settled_micros,
        "reserved_micros": step.run.reserved_micros,
        "budget_micros": -1 if step.run.budget_micros is None else step.run.budget_micros,
    },
    "spent": lambda step: {"run_micros": step.run.settled_micros, "budgets": step.spent()},
}


def step_variables(key: AttemptKey, account: str, call: Call, run: Money) -> dict[str, Any]:
    """Return all variables of an attempt of a run; to limits, budgets have counted nothing."""
    subject = Subject(key, account, call, run)
    return {name: make(subject) for name, make in MAKERS.items()}
