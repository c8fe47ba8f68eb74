"""What came of a rehearsed run, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tidegate.domain import canonical
from tidegate.domain.run import StepState
from tidegate.sdk.bound_inputs import BoundInput
from tidegate.sdk.reading import Approval, Event, Run, Wait


class Step(NamedTuple):
    """A step as it stands. attempts: how many were asked for. held_up: why the gate lets it wait, while it does. bound: how its
    input came about.
    """

    step_id: str
    node_id: str
    function: str
    status: str
    attempts: int
    arguments: Any
    output: Any
    error: str
    held_up: str
    bound: tuple[BoundInput, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run when nothing moved any more: it is over, or it waits for somebody, or for a time that was not let pass.

    run: as the client returns it. events: what the log has of it. steps: by step id, in the order in which they came to be.
    ledger: what the gate decided about it. at_ms: the rehearsal's clock. children: the runs that do steps of it.
    """

    run: Run
    events: tuple[Event, ...]
    steps: Mapping[str, Step]
    ledger: tuple[Any, ...]
    at_ms: int
    children: tuple[str, ...]

    @property
    def status(self) -> str:
        """Return the run's status; `waiting` if a person, an event or a time is waited for."""
        return self.run.status

    @property
    def output(self) -> Any:
        """Return the run's output, None as long as there is none."""
        return self.run.output

    @property
    def code(self) -> str:
        """Return why it ended badly, as a word."""
        return self.run.code

    @property
    def reason(self) -> str:
        """Return why it ended badly, for people."""
        return self.run.reason

    @property
    def approvals(self) -> tuple[Approval, ...]:
        """Return the open approvals."""
        return self.run.approvals

    @property
    def waits(self) -> tuple[Wait, ...]:
        """Return the open waits."""
        return self.run.waits

    @property
    def spent_micros(self) -> int:
        """Return what its attempts have cost, in micro-dollars."""
        return self.run.spent_micros

    def seen(self, *types: str) -> list[Any]:
        """Return the events of these types (names such as `AttemptEnded`), all if none is named: their records."""
        return [event.data for event in self.events if not types or event.type in types]

    def decided(self, *types: str) -> list[Any]:
        """Return the gate's events of these types (names such as `AttemptGranted`), all if none is named."""
        return [event for event in self.ledger if not types or type(event).__name__ in types]


def step_of(state: StepState, bound: Sequence[BoundInput]) -> Step:
    """Return a step for people to look at."""
    return Step(
        step_id=state.step_id,
        node_id=state.node_id,
        function=state.call.function,
        status=state.status,
        attempts=state.attempt,
        arguments=canonical.loads(state.call.arguments),
        output=None if state.output is None else canonical.loads(state.output),
        error=state.error,
        held_up=state.waits_for,
        bound=tuple(bound),
    )
