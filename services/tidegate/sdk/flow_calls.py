"""What a flow can await besides functions: times, events, people, and runs of other workflows. Named as the graph builder does."""

from __future__ import annotations

import abc
import datetime
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from tidegate.domain import waits
from tidegate.sdk.errors import FlowError
from tidegate.sdk.flow import Player, Result, playing
from tidegate.sdk.graph import Graph, Schema, schema_of

Child = Graph | Mapping[str, Any] | Callable[..., Any]


class Timeout(TypedDict, total=False):
    """When a wait is given up: after `timeout_s` seconds it gives `timeout_value`, or has failed if that is not said."""

    timeout_s: float
    timeout_value: Any


class FlowCalls(abc.ABC):
    """Calls that a flow makes with `await app.NAME(…)`: each is a step of the run and gives a `Result`.

    All of them raise FlowError outside flows, and for settings that are wrong. Where one that has failed is awaited, because its
    time was up for instance, CallFailedError is raised.
    """

    def sleep(self, seconds: float, **timeout: Unpack[Timeout]) -> Awaitable[Result[None]]:
        """Wait for so many seconds."""
        return _wait(waits.SLEEP, timeout, seconds=seconds)

    def wait_until(self, at: datetime.datetime | str, **timeout: Unpack[Timeout]) -> Awaitable[Result[None]]:
        """Wait for a time, with its offset: a datetime, or a text in RFC 3339."""
        return _wait(waits.UNTIL, timeout, at=at.isoformat() if isinstance(at, datetime.datetime) else at)

    def wait_event(
        self, event: str, *, key: str | float | None = None, **timeout: Unpack[Timeout]
    ) -> Awaitable[Result[Any]]:
        """Wait for an event of that name and correlation key; its payload is the value."""
        return _wait(waits.EVENT, timeout, event=event, key=key)

    def ask(
        self,
        prompt: str,
        *,
        choices: Sequence[str] | None = None,
        free_text: bool | None = None,
        schema: Schema | None = None,
        **timeout: Unpack[Timeout],
    ) -> Awaitable[Result[Any]]:
        """Ask a person; the answer is the value. choices, free_text, schema: as of `Graph.ask`."""
        fits = None if schema is None else schema_of(schema)
        given = list(choices) if isinstance(choices, tuple) else choices
        return _wait(waits.ASK, timeout, prompt=prompt, choices=given, free_text=free_text, schema=fits)

    def workflow(
        self,
        child: Child | str,
        input: Any = None,  # noqa: A002 - the word of the definition
        *,
        budget_micros: int | None = None,
    ) -> Awaitable[Result[Any]]:
        """Have a run of another workflow, one of the flow's `workflows`; its output is the value.

        child: it, or its name. budget_micros: the most that its run may cost, if less than this one's.
        """
        return _player("workflow").child(self.child_name(child), input, budget_micros)

    def child_name(self, child: Child | str) -> str:
        """Return the name of a workflow: of a graph, a definition, or a flow of this app. Raises FlowError if it is none."""
        if isinstance(child, str):
            return child
        name = child.name if isinstance(child, Graph) else child.get("name") if isinstance(child, Mapping) else None
        name = name or (self.name_of(child) if callable(child) else None)
        if not isinstance(name, str):
            raise FlowError(f"{child!r} is no graph, no definition and no flow of this app")
        return name

    @abc.abstractmethod
    def name_of(self, call: Callable[..., Any]) -> str | None:
        """Return the name under which a function is registered, None if it is not."""


class OutsideTool(str):
    """A tool that is done outside: the name that agents know it by, and for flows what calls it: `await quote(item="tea")`."""

    __slots__ = ("_parameters",)
    _parameters: Any

    def __new__(cls, name: str, parameters: Any) -> OutsideTool:
        """parameters: the JSON Schema that arguments must fit."""
        made = super().__new__(cls, name)
        made._parameters = parameters
        return made

    def __call__(self, **arguments: Any) -> Awaitable[Result[Any]]:
        """Have it done, by whoever posts the answer, which is the value. Raises FlowError outside flows, BadArgumentsError."""
        player = playing()
        if player is None:
            raise FlowError(f"tool {self!r} is done outside: flows call it, and agents in their plans")
        return player.outside(str(self), arguments, self._parameters)


def _wait(kind: str, timeout: Timeout, **settings: Any) -> Awaitable[Result[Any]]:
    said = {name: value for name, value in settings.items() if value is not None}
    return _player(kind).wait(kind, {**said, **timeout})


def _player(name: str) -> Player:
    player = playing()
    if player is None:
        raise FlowError(f"`{name}` of an app is for flows; in a graph, add a node of that kind")
    return player
