"""What rules and limits may look at: the variables of a step. The names are documented in docs/policy.md and never change
their meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import cel

from tidegate.domain import canonical, expressions
from tidegate.domain.messages import Call
from tidegate.gate.state import AttemptKey


class Money(Protocol):
    """What is needed of a run."""

    budget_micros: int | None
    reserved_micros: int
    settled_micros: int
    workflow: str
    tags: dict[str, str]


class Subject(NamedTuple):
    """An attempt of a run. plain: the values of the PLAIN variables. spent: returns what budgets counted for the run, by name."""

    key: AttemptKey
    account: str
    call: Call
    run: Money
    plain: tuple[str, ...]
    spent: Callable[[], dict[str, Any]]

    @classmethod
    def of(
        cls, key: AttemptKey, account: str, call: Call, run: Money, spent: Callable[[], dict[str, Any]] = dict
    ) -> Subject:
        """Return an attempt with what is plain of it."""
        plain = (
            call.kind,
            call.function,
            call.function if call.kind == "tool" else "",
            call.agent,
            call.queue,
            call.provider,
            call.model,
            call.operation,
            key.step_id.partition("/")[0],
            account,
            run.workflow.partition("@")[0],
        )
        return cls(key, account, call, run, plain, spent)


# Texts that many steps share: what follows from them alone is found once, and not for every step.
PLAIN: Final = (
    "kind",
    "name",
    "tool",
    "agent",
    "queue",
    "provider",
    "model",
    "operation",
    "node",
    "account",
    "workflow",
)


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


VARIABLES: Final = frozenset(MAKERS)


class Variables:
    """What rules look at, made when it is first looked at: most rules look at little."""

    __slots__ = ("_context", "_made", "_makers", "_subject", "plain")

    def __init__(self, makers: Mapping[str, Callable[[Any], Any]], subject: Any, plain: tuple[Any, ...]) -> None:
        """`makers`: name -> what makes its value of the subject. plain: the values of PLAIN."""
        self.plain = plain
        self._makers = makers
        self._subject = subject
        self._made: dict[str, Any] = {}
        self._context: cel.Context | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Variables:
        """Return variables that are all there already; what is not given is empty."""
        plain = tuple(values.get(name, "") for name in PLAIN)
        return cls({name: partial(_value_of, name) for name in VARIABLES}, values, plain)

    @classmethod
    def of_step(cls, subject: Subject) -> Variables:
        """Return the variables of an attempt of a run."""
        return cls(MAKERS, subject, subject.plain)

    def get(self, name: str) -> Any:
        """Return a variable's value; None if there is none of that name."""
        value = self._made.get(name)
        if value is None and (maker := self._makers.get(name)) is not None:
            value = self._made[name] = maker(self._subject)
        return value

    def evaluate(self, source: str) -> Any:
        """Evaluate a CEL expression over them. Raises ExpressionError."""
        if self._context is None:
            self._context = expressions.lazy_context(self.get)
        return expressions.evaluate_in(source, self._context)


def _value_of(name: str, values: Mapping[str, Any]) -> Any:
    return values.get(name, "")
