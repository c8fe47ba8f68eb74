"""Stand-ins for functions: what they do each time they are called, and what they were called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tidegate.sdk.app import FlowFunction
from tidegate.sdk.functions import Function

_NOTHING: Final = object()


@dataclass(frozen=True, slots=True)
class Act:
    """What a stand-in does once. takes_s: on the rehearsal's clock. is_lost: its executor dies before it answers."""

    call: Callable[..., Any]
    takes_s: float
    is_lost: bool


class Stub:
    """Stands in for a function. `calls`: the arguments of each call so far, as JSON values; of an agent its State, of a flow its
    input."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[Any] = []
        self._acts: list[Act] = []
        self._next = 0

    def then(
        self,
        *,
        returns: Any = _NOTHING,
        raises: BaseException | type[BaseException] | None = None,
        calls: Callable[..., Any] | None = None,
        takes_s: float = 0.0,
        lost: bool = False,
    ) -> Stub:
        """Say what it does the next time; the last one said is repeated. Returns the stub.

        returns: any value that the function could return (null if nothing is said). raises: an exception. calls: a function
        that gets the arguments, already checked. takes_s: how long it takes on the clock of the rehearsal; longer than the
        function's `timeout_s`, and it times out. lost: the executor dies while it runs, so nobody knows how far it came.
        Raises ValueError if more than one of returns, raises, calls and lost is given.
        """
        if (returns is not _NOTHING) + (raises is not None) + (calls is not None) + lost > 1:
            raise ValueError(f"stub {self.name!r}: give one of returns, raises, calls and lost")

        def act(*args: Any, **kwargs: Any) -> Any:
            if raises is not None:
                raise raises
            return calls(*args, **kwargs) if calls is not None else None if returns is _NOTHING else returns

        self._acts.append(Act(act, takes_s, lost))
        return self

    def called(self, arguments: Any) -> Act:
        """Note a call; return what it does."""
        self.calls.append(arguments)
        act = self._acts[min(self._next, len(self._acts) - 1)]
        self._next += 1
        return act


def standing_in(function: Function, act: Act) -> Function:
    """Return the function with what the stand-in does in its place. Arguments are checked as those of the real one.

    Of a flow it does all that the flow does, in one turn.
    """
    if isinstance(function, FlowFunction):

        async def flow(*args: Any, **kwargs: Any) -> Any:
            return act.call(*args, **kwargs)

        played = FlowFunction(function.name, flow, function.settings, tools=function.tools)
        played.inputs = function.inputs
        return played
    made = Function(function.kind, function.name, act.call, function.settings, tools=function.tools)
    made.binder = function.binder
    return made
