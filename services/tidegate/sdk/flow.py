"""Flows: plain Python that makes calls, played from its beginning in each turn on an event loop that knows nothing but calls.

`await look_up(order)` inside a flow asks for a step and gives its `Result`. So do agents, tools, waits and child runs. A turn
ends when nothing can go on without a result that is not there yet. The loop runs what is ready in order, one thing after the
other, and results come in the order that the log has; so the same log plays the same way. Anything else that could be awaited,
such as a timer or a socket, is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from tidegate.domain import canonical, waits
from tidegate.domain.workflow import arguments_problem
from tidegate.sdk import json_form
from tidegate.sdk.context import context
from tidegate.sdk.errors import BadArgumentsError, CallFailedError, FlowChangedError, FlowError, OutsideStepError
from tidegate.sdk.plan import Goto, Propose

if TYPE_CHECKING:
    from tidegate.sdk.functions import Function

T = TypeVar("T")
MAX_READY: Final = 1_000_000  # what one turn may run through: a flow that never waits would never end

TAKEN: Final = (
    "In a flow, asyncio takes calls, such as `price(item)`, and coroutines: `asyncio.gather(*calls)`, with the star, "
    "`asyncio.create_task(call)`, and `asyncio.wait([call, other])`"
)

_playing: contextvars.ContextVar[Player | None] = contextvars.ContextVar("tidegate_flow", default=None)


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What a call gave to a flow, and where it comes from.

    node_id: the call, in the run's graph. producer: the function or workflow, or the kind of the wait. artifact_id: SHA-256 of the
    value's canonical JSON, so equal values have equal ones. parents: node ids of the results that it was made of. A result can be
    an argument of another call, or lie in one: the call gets the value, and the graph an edge.
    """

    value: T
    node_id: str
    producer: str
    artifact_id: str
    parents: tuple[str, ...] = ()


def merge(value: T, *parents: Result[Any]) -> Result[T]:
    """Return a value that the flow itself has made of results, as a result that says so: its parents are theirs' node ids.

    Without it a value that was computed from results comes from nowhere, and a call with it has no edges from them.
    """
    text = canonical.dumps(json_form.to_json(value, "merge"))
    names = tuple(dict.fromkeys(parent for result in parents for parent in _sources(result)))
    return Result(value, "", "", canonical.digest(text), names)


def _sources(result: Result[Any]) -> tuple[str, ...]:
    return (result.node_id,) if result.node_id else result.parents


def playing() -> Player | None:
    """Return the flow that is being played, if this is called from one."""
    return _playing.get()


class Player:
    """Plays one turn of a flow. allowed: the functions that it may call. children: the names of the workflows that it may have
    runs of. path: what the node ids of its calls begin with.
    """

    def __init__(self, flow: str, allowed: tuple[str, ...], path: str, children: tuple[str, ...] = ()) -> None:
        self._flow = flow
        self._allowed = allowed
        self._children = children
        self._recorded: frozenset[str] = frozenset()
        self._path = path
        self._loop = _Loop()
        self._calls: dict[str, _Call] = {}
        self._new: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}
        self._is_over = False

    def play(self, begin: Callable[[], Coroutine[Any, Any, Any]], turns: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what the turn after these says. Raises FlowChangedError if the code does not make the calls that they have.

        Raises FlowError for what a flow cannot do, and whatever the flow raises.
        """
        return contextvars.copy_context().run(self._play, begin, turns)

    def _play(self, begin: Callable[[], Coroutine[Any, Any, Any]], turns: list[dict[str, Any]]) -> dict[str, Any]:
        _playing.set(self)
        self._recorded = frozenset(call["id"] for turn in turns for call in turn["calls"])
        asyncio._set_running_loop(self._loop)
        try:
            main = self._loop.create_task(begin())
            self._loop.run_ready()
            for number, turn in enumerate(turns, 1):
                self._check(number, turn["calls"], is_over=main.done())
                for result in turn["results"]:
                    self._calls[result["id"]].come(result)
                self._loop.run_ready()
            return self._said(main)
        finally:
            self._is_over = True
            self._loop.close()
            asyncio._set_running_loop(None)

    def _check(self, number: int, recorded: list[dict[str, Any]], *, is_over: bool) -> None:
        """Compare the calls that the code makes in a turn with those that the log has."""
        made, self._new = self._new, []
        for place in range(max(len(made), len(recorded))):
            now = made[place] if place < len(made) else None
            then = recorded[place] if place < len(recorded) else None
            if now is not None and then is not None and now["id"] == then["id"]:
                if canonical.digest(canonical.dumps(now["arguments"])) == then["hash"]:
                    continue
                what = (
                    f"the log has call {then['id']} with other arguments than {canonical.dumps(now['arguments'])[:200]}"
                )
            elif then is None:
                what = f"the code calls {now['id'] if now else ''}, and the log has no such call there"
            else:
                what = f"the log has call {then['id']}, and the code " + (
                    f"calls {now['id']}" if now else "does not make it"
                )
            raise FlowChangedError(
                f"flow {self._flow} does not do what its log says it did: in turn {number}, {what}. Its code has changed, or it "
                "depends on something else than its input and the results of its calls; publish it under another name instead"
            )
        if is_over:
            raise FlowChangedError(f"flow {self._flow} ends in turn {number}, and the log has another turn after it")

    def _said(self, main: asyncio.Future[Any]) -> dict[str, Any]:
        if self._loop.refused is not None:
            raise self._loop.refused
        if main.done():
            returned = self._returned_by(main)
            if isinstance(returned, Goto | Propose):
                raise FlowError(
                    f"flow {self._flow} returns {type(returned).__name__}: a flow gives its output and nothing else; "
                    "only steps and agents choose the next node or change the graph"
                )
            value, _ = self._unwrapped(returned)
            return {"output": json_form.to_json(value)}
        groups: dict[Any, list[str]] = {}
        for call in self._calls.values():
            if not call.done():
                for waiter in call.waiters:
                    groups.setdefault(_identity(waiter), []).append(call.name)
        if not groups:
            raise FlowError(f"flow {self._flow} awaits something that is no call: it would wait for ever")
        return {"calls": self._new, "waits": list(groups.values())}

    def _returned_by(self, main: asyncio.Future[Any]) -> Any:
        """Return what the flow returned. Raises what it raised; what asyncio itself raised of what it was given, as FlowError."""
        try:
            return main.result()
        except TypeError as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("asyncio."):
                raise
            raise FlowError(f"flow {self._flow}: {error}. {TAKEN}") from error

    def call(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> asyncio.Future[Result[Any]]:
        """Take note that the flow calls a step, an agent or a tool; what that gives can be awaited.

        Raises FlowError, NotJsonError, TypeError and BadArgumentsError for arguments that do not fit the signature.
        """
        self._may_call(function.kind, function.name)

        def check(arguments: Any) -> None:
            try:
                if function.kind != "agent":
                    function.binder.bind(canonical.dumps(arguments))
            except BadArgumentsError as error:
                raise BadArgumentsError(f"arguments of {function.kind} {function.name}: {error}") from None

        return self._made(function.kind, function.name, _input_of(function, args, kwargs), check)

    def outside(self, tool: str, arguments: dict[str, Any], parameters: Any) -> asyncio.Future[Result[Any]]:
        """Take note that the flow calls a tool that is done outside. parameters: the JSON Schema that its arguments must fit.

        Raises FlowError, NotJsonError, and BadArgumentsError for arguments that do not.
        """
        self._may_call("tool", tool)

        def check(arguments: Any) -> None:
            if problem := arguments_problem(parameters, arguments):
                raise BadArgumentsError(f"arguments of tool {tool}: {problem}")

        return self._made("tool", tool, arguments, check)

    def wait(self, kind: str, settings: dict[str, Any]) -> asyncio.Future[Result[Any]]:
        """Take note that the flow waits; what that gives can be awaited. Raises FlowError, NotJsonError."""
        self._must_play()

        def check(arguments: Any) -> None:
            if problem := waits.call_problem(kind, arguments):
                raise FlowError(f"flow {self._flow}: {problem}")

        if "timeout_value" in settings:
            settings = {**settings, "on_timeout": waits.VALUE}
        return self._made(kind, kind, settings, check)

    def child(self, name: str, value: Any, budget_micros: int | None) -> asyncio.Future[Result[Any]]:
        """Take note that the flow has a run of another workflow; its output can be awaited. Raises FlowError, NotJsonError."""
        self._must_play()
        if name not in self._children:
            raise FlowError(f"flow {self._flow} starts workflow {name!r}: its `workflows` do not name it")
        if budget_micros is not None and (type(budget_micros) is not int or budget_micros < 0):
            raise FlowError(
                f"flow {self._flow}: budget_micros of {name!r} must be a whole number, is {budget_micros!r}"
            )
        said = {"input": value} | ({} if budget_micros is None else {"budget_micros": budget_micros})
        return self._made("workflow", name, said, lambda arguments: None)

    def _may_call(self, kind: str, name: str) -> None:
        self._must_play()
        if name not in self._allowed:
            raise FlowError(f"flow {self._flow} calls {kind} {name!r}: its `steps` do not name it")

    def _must_play(self) -> None:
        if self._is_over:
            raise FlowError(f"flow {self._flow} is not being played any more")

    def _made(self, kind: str, function: str, said: Any, check: Callable[[Any], None]) -> asyncio.Future[Result[Any]]:
        """Note a call. What the log has is not checked again: what it came to is known."""
        count = self._counts[function] = self._counts.get(function, 0) + 1
        name = function if count == 1 else f"{function}#{count}"
        value, parents = self._unwrapped(said)
        arguments = json_form.to_json(value, f"arguments of {name}")
        if name not in self._recorded:
            check(arguments)
        made = {
            "id": name,
            "function": function,
            "arguments": arguments,
            "parents": [parent[len(self._path) + 1 :] for parent in dict.fromkeys(parents)],
        }
        self._new.append(made if kind == "step" else {**made, "kind": kind})
        call = self._calls[name] = _Call(name, f"{self._path}/{name}", function, tuple(parents), self._loop)
        return call

    def _unwrapped(self, value: Any) -> tuple[Any, list[str]]:
        """Return a value with the results in it replaced by their values, and where these come from."""
        parents: list[str] = []

        def visit(part: Any) -> Any:
            if isinstance(part, Result):
                parents.extend(_sources(part))
                return part.value
            if isinstance(part, asyncio.Future) or inspect.iscoroutine(part):
                raise FlowError(f"flow {self._flow} hands on something that it has not awaited")
            if isinstance(part, Mapping):
                return {key: visit(member) for key, member in part.items()}
            if isinstance(part, list | tuple):
                return [visit(member) for member in part]
            return part

        return visit(value), parents


def _input_of(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a step gets as its input: its one argument, or an object of several. An agent has one, a tool any number."""
    bound = inspect.signature(function.call).bind(*args, **kwargs)
    if function.kind == "tool":
        return dict(bound.arguments)
    if len(bound.signature.parameters) == 1:
        bound.apply_defaults()
        return next(iter(bound.arguments.values()))
    return dict(bound.arguments) or None


def _identity(waiter: Any) -> Any:
    """Return what is the same for a callback wherever it was added. A method is made anew each time that it is asked for."""
    return (id(waiter.__self__), waiter.__func__) if inspect.ismethod(waiter) else id(waiter)


class _Call(asyncio.Future[Result[Any]]):
    """A call. waiters: what goes on when it is done; what waits for several calls is the same for all of them.

    It is a task of its own as well: `asyncio.create_task(call)` is the call.
    """

    def __init__(self, name: str, node_id: str, producer: str, parents: tuple[str, ...], loop: _Loop) -> None:
        super().__init__(loop=loop)
        self.name = name
        self.waiters: list[Any] = []
        self._node_id = node_id
        self._producer = producer
        self._parents = tuple(dict.fromkeys(parents))
        self._task_name = name
        self._number = loop.next_number()

    def __hash__(self) -> int:
        return self._number

    def get_name(self) -> str:
        """Return the name that it has as a task."""
        return self._task_name

    def set_name(self, value: object) -> None:
        """Give it another name as a task; the step keeps its own."""
        self._task_name = str(value)

    def add_done_callback(self, function: Any, *, context: contextvars.Context | None = None) -> None:
        self.waiters.append(function)
        super().add_done_callback(function, context=context)

    def come(self, result: Mapping[str, Any]) -> None:
        """Take what the step gave."""
        if self.done():
            return  # its branch was cancelled meanwhile
        if result["ok"]:
            value = result["output"]
            artifact = canonical.digest(canonical.dumps(value))
            self.set_result(Result(value, self._node_id, self._producer, artifact, self._parents))
        else:
            self.set_exception(CallFailedError(self._node_id, str(result["error"])))


class _Task(asyncio.Task[Any]):
    """A branch. asyncio keeps what it waits for in sets, whose order is that of addresses unless a hash says otherwise: results
    of `asyncio.wait` would come in another order in the next turn."""

    def __init__(self, coro: Any, *, loop: _Loop, **options: Any) -> None:
        self._number = loop.next_number()
        super().__init__(coro, loop=loop, **options)
        self._log_destroy_pending = False  # what waits when a turn ends is meant to

    def __hash__(self) -> int:
        return self._number


_AnyLoop: Any = asyncio.AbstractEventLoop


class _Loop(_AnyLoop):  # type: ignore[misc]  # what it does not have is refused, see below: no part of it is missing
    """Runs what is ready, first come first served. refused: that the flow tried something else than calls."""

    def __init__(self) -> None:
        self._ready: list[asyncio.Handle] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._numbers = itertools.count()
        self._is_closed = False
        self.refused: FlowError | None = None

    def run_ready(self) -> None:
        """Run until nothing is ready. Raises FlowError if that does not come to an end."""
        for _ in range(MAX_READY):
            if not self._ready:
                return
            handle = self._ready.pop(0)
            if not handle.cancelled():
                handle._run()
        raise FlowError("a turn of a flow does not come to an end: it goes on without waiting for any call")

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self._is_closed:
            self._ready.append(handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def next_number(self) -> int:
        """Return the number of the next call or task: the same in every turn."""
        return next(self._numbers)

    def create_task(self, coro: Any, *, name: str | None = None, **options: Any) -> asyncio.Future[Any]:
        """Return a task for a coroutine. A call is one already. Raises FlowError for what is neither."""
        if isinstance(coro, _Call):
            if name is not None:
                coro.set_name(name)
            return coro
        if not inspect.iscoroutine(coro):
            raise FlowError(f"a task of a flow cannot be made of {type(coro).__name__}. {TAKEN}")
        task = _Task(coro, loop=self, name=name, **options)
        self._tasks.append(task)
        return task

    def close(self) -> None:
        """Leave what has not ended; nothing of it runs any more."""
        self._is_closed = True
        self._ready.clear()

    def is_running(self) -> bool:
        return not self._is_closed

    def is_closed(self) -> bool:
        return self._is_closed

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that nobody fetches is a branch that nobody waits for."""

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """As above."""

    def refuse(self, what: str) -> FlowError:
        """Note and return that the flow wants something that a loop can do and this one does not."""
        self.refused = self.refused or FlowError(
            f"a flow awaits calls, and asyncio.gather of them, and nothing else: it used `{what}` of the event loop. "
            "Do that in a step; to wait, use `sleep`, `wait_until`, `wait_event` or `ask` of the app"
        )
        return self.refused


def _refusing(name: str) -> Any:
    def refuse(loop: _Loop, *args: Any, **kwargs: Any) -> Any:
        raise loop.refuse(name)

    return refuse


def _foreign() -> Iterator[str]:
    for name, member in vars(asyncio.AbstractEventLoop).items():
        if not name.startswith("_") and callable(member) and name not in vars(_Loop):
            yield name


for _name in list(_foreign()):
    setattr(_Loop, _name, _refusing(_name))


def path_here(flow: str) -> str:
    """Return what the node ids of the calls of the flow's turn begin with that runs here."""
    try:
        return context().step_id.rpartition("/")[0] or flow
    except OutsideStepError:
        return flow
