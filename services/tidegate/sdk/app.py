"""An app: the functions that an executor offers, and the graphs made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeVar, Unpack, overload

from tidegate.domain import canonical
from tidegate.domain.messages import FunctionDetail
from tidegate.domain.workflow import AGENT_PREFIX, DEFAULT_MAX_STEPS, validate_definition
from tidegate.sdk.binding import AGENT, FLOW, STEP, TOOL, Binder
from tidegate.sdk.errors import AppError, FlowFailedError, GraphError, NonRetryable
from tidegate.sdk.flow import Player, path_here, playing
from tidegate.sdk.flow_calls import Child, FlowCalls, OutsideTool
from tidegate.sdk.functions import (
    DEFAULT_QUEUE,
    Function,
    Options,
    Settings,
    checked_name,
    file_version,
    made_settings,
)
from tidegate.sdk.graph import Change, Graph, GraphOptions, Reference, Schema, schema_of

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_OUTSIDE_TIMEOUT_S: Final = 24 * 3600.0
MAX_OUTSIDE_TIMEOUT_S: Final = 7 * 24 * 3600.0


class FlowOptions(Options, total=False):
    """What `@flow` may be given. timeout_s, retries and so on are those of a turn, which only plays what is recorded.

    steps: what it may call: steps, agents and tools, or their names. workflows: of what it may have runs: graphs, other flows of
    the app, or definitions. max_steps: bounds a run of the flow alone (50); turns do not count.
    """

    steps: Sequence[Reference]
    workflows: Sequence[Child]
    max_steps: int


class AgentOptions(Options, total=False):
    """What `@agent` may be given; `timeout_s` is 120 if not said.

    tools: what it may call, functions or names. max_steps: bounds a run that names the agent alone (50).
    """

    tools: Sequence[Reference]
    max_steps: int


class FlowFunction(Function):
    """A flow. Its `call` plays a turn, given the record of those before; `coroutine` is what the author wrote.

    children: the workflows of which it has runs, by name.
    """

    def __init__(
        self,
        name: str,
        coroutine: Callable[..., Any],
        settings: Settings,
        *,
        children: Mapping[str, Child] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        self.children = children
        if not inspect.iscoroutinefunction(coroutine):
            raise AppError(f"flow {name!r} must be declared with `async def`")
        super().__init__(FLOW, name, self._turn, settings, **options)
        self.coroutine = coroutine
        self.file_version = file_version(coroutine)

    @functools.cached_property
    def inputs(self) -> Binder:
        """Return what binds the flow's input to its signature. Raises AppError."""
        try:
            return Binder(STEP, self.coroutine)
        except AppError as error:
            raise AppError(f"flow {self.name!r}: {error}") from None

    def _turn(self, state: Mapping[str, Any]) -> dict[str, Any]:
        bound = self.inputs.bind(canonical.dumps(state["input"]))
        player = Player(self.name, self.tools, path_here(self.name), tuple(self.children))
        try:
            return player.play(lambda: self.coroutine(*bound.args, **bound.kwargs), state["turns"])
        except NonRetryable:
            raise
        except Exception as error:  # played again it would do the same again
            raise FlowFailedError(f"{type(error).__name__}: {error}") from error


class App(FlowCalls):
    """A set of named functions and graphs, made once when its module is imported.

    What the decorators return can be called as the function itself, in a test for instance. Only while a flow is played a call of
    it is one that the log has: see `flow`.
    """

    def __init__(self, name: str, *, queue: str = DEFAULT_QUEUE) -> None:
        """`queue`: where functions run that name none. Raises AppError on a bad name."""
        self.name = checked_name("app", name)
        self.queue = checked_name("queue", queue)
        self._functions: dict[str, Function] = {}
        self._outside: dict[str, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        self._graphs: list[Graph] = []

    @overload
    def tool(self, function: F, /) -> F: ...
    @overload
    def tool(self, /, **options: Unpack[Options]) -> Callable[[F], F]: ...
    def tool(self, function: Any = None, /, **options: Any) -> Any:
        """Register a function that agents may call; see `Options`.

        Its arguments are checked against its signature; its docstring describes it to the model.
        """
        return self._decorate(TOOL, function, options)

    @overload
    def step(self, function: F, /) -> F: ...
    @overload
    def step(self, /, **options: Unpack[Options]) -> Callable[[F], F]: ...
    def step(self, function: Any = None, /, **options: Any) -> Any:
        """Register a function that nodes of graphs may run; see `Options`.

        With one parameter it gets the node's whole input; with several the input must be an object of them.
        """
        return self._decorate(STEP, function, options)

    @overload
    def agent(self, function: F, /) -> F: ...
    @overload
    def agent(self, /, **options: Unpack[AgentOptions]) -> Callable[[F], F]: ...
    def agent(self, function: Any = None, /, **options: Any) -> Any:
        """Register a function State -> Plan; a returned value that is no Plan is its final output. See `AgentOptions`."""
        return self._decorate(AGENT, function, options)

    @overload
    def flow(self, function: F, /) -> F: ...
    @overload
    def flow(self, /, **options: Unpack[FlowOptions]) -> Callable[[F], F]: ...
    def flow(self, function: Any = None, /, **options: Any) -> Any:
        """Register an async function that makes calls: each is a step of the run, recorded and never repeated.

        It awaits steps, agents, tools, and what `FlowCalls` has. It is played from its beginning whenever a call has brought
        something, so it must depend on nothing but its input and what its calls give. docs/flows.md shows it. See `FlowOptions`.
        """
        return self._decorate(FLOW, function, options)

    def outside_tool(
        self,
        name: str,
        *,
        description: str = "",
        parameters: Schema = True,
        output: Schema = True,
        timeout_s: float = DEFAULT_OUTSIDE_TIMEOUT_S,
        cost_micros: int = 0,
    ) -> OutsideTool:
        """Declare a tool that agents and flows may call and that is done elsewhere: a call waits until its answer is posted.

        parameters, output: JSON Schemas, or pydantic models, that the arguments and the answer must fit. timeout_s: how long an
        answer is waited for (a day); then whoever called is told that none came. cost_micros: what an answered call costs; it
        is set aside while the answer is waited for. Returns its name, for `tools` and `steps`; a flow can call it. Raises AppError.
        """
        checked_name(TOOL, name)
        if not 0.001 <= timeout_s <= MAX_OUTSIDE_TIMEOUT_S:
            raise AppError(f"tool {name!r}: timeout_s must be from 0.001 to {MAX_OUTSIDE_TIMEOUT_S}")
        if cost_micros < 0:
            raise AppError(f"tool {name!r}: cost_micros must not be negative")
        schemas = {"parameters": schema_of(parameters), "output": schema_of(output)}
        self._refuse_taken(TOOL, name)
        self._outside[name] = {
            "kind": TOOL,
            "outside": True,
            "timeout_ms": round(timeout_s * 1000),
            "description": description,
            **({"reserve_micros": cost_micros} if cost_micros else {}),
            **{field: schema for field, schema in schemas.items() if schema is not True},
        }
        return OutsideTool(name, schemas["parameters"])

    @property
    def outside_tools(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the tools that are done elsewhere, as definitions pin them, by name."""
        return self._outside

    def _decorate(self, kind: str, function: F | None, options: dict[str, Any]) -> F | Callable[[F], F]:
        named = options.pop("steps" if kind == FLOW else "tools", ())
        tools = tuple(self._name_here(reference, "step" if kind == FLOW else "tool") for reference in named)
        children = {self.child_name(child): child for child in options.pop("workflows", ())}
        max_steps = options.pop("max_steps", DEFAULT_MAX_STEPS)

        def register(call: F) -> F:
            name = checked_name(kind, str(options.get("name") or getattr(call, "__name__", "")))
            given = {key: value for key, value in options.items() if key != "name" and value is not None}
            settings = made_settings(kind, name, {"queue": self.queue, **given})
            more: dict[str, Any] = {"tools": tools, "max_steps": max_steps}
            if kind == FLOW:
                return self._add(FlowFunction(name, call, settings, children=children, **more), call)
            return self._add(Function(kind, name, call, settings, **more), call)

        return register if function is None else register(function)

    def _add(self, function: Function, call: F) -> F:
        """Register a function; return what stands in its place: the same, but in flows."""
        self._refuse_taken(function.kind, function.name)
        self._functions[function.name] = function
        public = call if function.kind == FLOW or not inspect.isroutine(call) else _seen_by_flows(function, call)
        function.public = public
        for reference in (call, public):
            self._names[id(reference)] = function.name
        return public

    def _refuse_taken(self, kind: str, name: str) -> None:
        there = self._functions[name].kind if name in self._functions else TOOL if name in self._outside else ""
        if there:
            raise AppError(f"{kind} {name!r}: app {self.name!r} has a {there} of that name already")

    def _name_here(self, reference: Reference, kind: str) -> str:
        name = str(reference) if isinstance(reference, str) else self.name_of(reference)
        if name is None:
            raise AppError(f"{reference!r} is not a {kind} of app {self.name!r}: decorate it with @{kind} first")
        return name

    @property
    def functions(self) -> Mapping[str, Function]:
        """Return the registered functions by name."""
        return self._functions

    @property
    def graphs(self) -> Sequence[Graph]:
        """Return the graphs that belong to the app."""
        return self._graphs

    def name_of(self, call: Callable[..., Any]) -> str | None:
        """Return the name under which a function is registered here, None if it is not."""
        return self._names.get(id(call))

    def graph(self, name: str, version: str = "1", **options: Unpack[GraphOptions]) -> Graph:
        """Begin a graph of this app; see `GraphOptions`."""
        return self.add(Graph(name, version, **options))

    def change(self, because: str = "") -> Change:
        """Begin a change of the graph of a run, for a function to return within `Propose`."""
        made = Change(because)
        made.app = self
        return made

    def add(self, graph: Graph) -> Graph:
        """Make a graph belong to this app, so that it is published with it."""
        graph.app = self
        self._graphs.append(graph)
        return graph

    def check(self) -> None:
        """Look at the signatures of all functions. Raises AppError naming every one that cannot be used."""
        found = []
        for function in self._functions.values():
            try:
                function.to_definition()
            except AppError as error:
                found.append(str(error))
        if found:
            raise AppError("\n".join(found))

    def definition(self, graph: Graph) -> dict[str, Any]:
        """Return the graph's definition, functions and workflows included.

        Raises GraphError listing all that is wrong with it.
        """
        definition, problems = self._definition(graph, ())
        problems += validate_definition(definition)
        if problems:
            raise GraphError(graph.label, problems)
        return definition

    def _definition(self, graph: Graph, around: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
        """Return what the graph says, with its children. around: the graphs that it is a child of."""
        if graph.label in around:
            return {}, [_held_by_itself(graph.label, around)]
        definition, problems = graph.to_definition(self.resolve)
        named = [self.resolve(reference) for reference in graph.may_use]
        problems += [
            f"evolution.functions: {getattr(reference, '__name__', reference)!r} is no step or agent of app {self.name!r}"
            for reference, found in zip(graph.may_use, named, strict=True)
            if found is None or found[1] not in self._functions
        ]
        pinned = self._pinned([found[1] for found in named if found is not None], (*around, graph.label))
        definition |= pinned.parts()
        definition, more = self._completed(definition, (*around, graph.label))
        problems += pinned.problems + more
        for label, child in graph.children.items():
            inner, more = self._inner(child, (*around, graph.label))
            problems += more
            definition.setdefault("workflows", {})[label] = inner
        return definition, problems

    def _inner(self, child: Child, around: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
        """Return the definition of a child, and what is wrong with it as far as it is seen here."""
        if isinstance(child, Graph):
            home = child.app if isinstance(child.app, App) else self
            return home._definition(child, around)
        if isinstance(child, Mapping):
            return dict(child), []
        name = self.child_name(child)
        graph = next((graph for graph in reversed(self._graphs) if graph.name == name), None)
        return self._alone_within(FLOW, name, name, around) if graph is None else self._definition(graph, around)

    def completed(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        """Return a definition with the functions of this app that its nodes name and that it does not hold itself.

        A node with a function and without a kind is what its function is. So a file can say the graph alone.
        """
        made, _ = self._completed(definition, ())
        return made

    def _completed(self, definition: Mapping[str, Any], around: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
        made = dict(definition)
        nodes = {}
        for node_id, node in made.get("nodes", {}).items():
            function = self._functions.get(node.get("function", "")) if isinstance(node, Mapping) else None
            nodes[node_id] = {"kind": function.kind, **node} if function is not None else node
        used = [node["function"] for node in nodes.values() if isinstance(node, Mapping) and "function" in node]
        pinned = self._pinned(used, around)
        parts = {name: {**part, **made.get(name, {})} for name, part in pinned.parts().items()}
        return made | {"nodes": nodes, **parts}, pinned.problems

    def agent_definition(self, agent: str) -> dict[str, Any]:
        """Return the implicit workflow of an agent: one node, so that a run can name the agent alone.

        Its version is made of its content: a changed agent is another version of it. Raises GraphError, AppError.
        """
        return self._alone(AGENT, agent, f"{AGENT_PREFIX}{agent}")

    def flow_definition(self, flow: str) -> dict[str, Any]:
        """Return the workflow that a flow is alone, named like it; its version is made of its content.

        Raises GraphError, AppError.
        """
        if any(graph.name == flow for graph in self._graphs):
            raise AppError(f"flow {flow!r}: app {self.name!r} has a graph of that name; a flow is a workflow by itself")
        return self._alone(FLOW, flow, flow)

    def _alone(self, kind: str, name: str, label: str) -> dict[str, Any]:
        definition, problems = self._alone_within(kind, name, label, ())
        problems += validate_definition(definition)
        if problems:
            raise GraphError(label, problems)
        return definition

    def _alone_within(
        self, kind: str, name: str, label: str, around: tuple[str, ...]
    ) -> tuple[dict[str, Any], list[str]]:
        if label in around:
            return {}, [_held_by_itself(label, around)]
        function = self._functions.get(name)
        if function is None or function.kind != kind:
            raise AppError(f"app {self.name!r} has no {kind} {name!r}")
        definition: dict[str, Any] = {
            "name": label,
            "nodes": {name: {"kind": kind, "function": name}},
            "edges": [],
            "max_steps": function.max_steps,
        }
        pinned = self._pinned([name], (*around, label))
        definition |= pinned.parts()
        definition["version"] = canonical.digest(canonical.dumps(definition))[:12]
        return definition, pinned.problems

    def definitions(self) -> list[dict[str, Any]]:
        """Return the definitions of all graphs, and of every agent and every flow alone. Raises GraphError, AppError."""
        return [*map(self.definition, self._graphs), *self.alone()]

    def alone(self) -> list[dict[str, Any]]:
        """Return the definitions of every agent and every flow as a workflow by itself. Raises GraphError, AppError."""
        made = {AGENT: self.agent_definition, FLOW: self.flow_definition}
        return [made[function.kind](function.name) for function in self._functions.values() if function.kind in made]

    def resolve(self, reference: Reference) -> tuple[str, str] | None:
        """Return (kind, name) of a function; None if a callable is not registered. An unknown name counts as a step."""
        name = reference if isinstance(reference, str) else self.name_of(reference)
        if name is None:
            return None
        function = self._functions.get(name)
        return (function.kind if function is not None and function.kind in (AGENT, FLOW) else STEP), name

    def _pinned(self, names: Sequence[str], around: tuple[str, ...]) -> _Pinned:
        """Return what definitions pin of these functions, and of what they call or have runs of. around: as of `_definition`."""
        made = _Pinned({}, {}, [])
        ahead = list(names)
        while ahead:
            name = ahead.pop()
            function = self._functions.get(name)
            if name in self._outside:
                made.functions[name] = self._outside[name]
            if function is None or name in made.functions:
                continue
            made.functions[name] = function.to_definition()
            ahead += function.tools
            if isinstance(function, FlowFunction) and function.children:
                made.functions[name] |= {"workflows": self._children_of(function, made, around)}
        return made

    def _children_of(self, flow: FlowFunction, made: _Pinned, around: tuple[str, ...]) -> list[str]:
        """Add the definitions of what a flow has runs of; return them as `name@version`."""
        labels = []
        for child in flow.children.values():
            inner, problems = self._inner(child, around)
            made.problems.extend(problems)
            if inner:
                labels.append(f"{inner.get('name')}@{inner.get('version')}")
                made.workflows[labels[-1]] = inner
        return labels


class _Pinned(NamedTuple):
    """Functions and workflows that a definition holds, and what is wrong with them."""

    functions: dict[str, Any]
    workflows: dict[str, Any]
    problems: list[str]

    def parts(self) -> dict[str, Any]:
        """Return the parts of the definition. One that no flow puts there is left out: the hashes of older ones stay."""
        functions = {"functions": dict(sorted(self.functions.items()))}
        return functions | ({"workflows": self.workflows} if self.workflows else {})


def _held_by_itself(label: str, around: tuple[str, ...]) -> str:
    return f"workflows.{label}: {' -> '.join((*around, label))}: a workflow cannot hold itself"


def _seen_by_flows(function: Function, call: F) -> F:
    """Return the function itself for everybody but a flow that is being played: its call is noted and not made."""

    @functools.wraps(call)
    def public(*args: Any, **kwargs: Any) -> Any:
        player = playing()
        return call(*args, **kwargs) if player is None else player.call(function, args, kwargs)

    return public  # type: ignore[return-value]  # it is called as the function is


def functions_of(app: App) -> list[str]:
    """Return what an executor of the app offers, as `kind:name`."""
    return sorted(function.label for function in app.functions.values())


def details_of(app: App) -> tuple[FunctionDetail, ...]:
    """Return what an executor says of the app's functions. version: the hash of what a definition would pin of the function,
    so it changes with its settings, parameters and description; empty if its signature cannot be pinned."""
    found = []
    for function in sorted(app.functions.values(), key=lambda one: one.label):
        try:
            definition = function.to_definition()
        except AppError:
            found.append(FunctionDetail(name=function.label))
            continue
        schema = definition.get("parameters")
        found.append(
            FunctionDetail(
                name=function.label,
                version=canonical.digest(canonical.dumps(definition))[:12],
                description=inspect.getdoc(function.call) or "",
                schema="" if schema is None else canonical.dumps(schema),
            )
        )
    return tuple(found)


default_app: Final = App("default")
tool = default_app.tool
step = default_app.step
agent = default_app.agent
flow = default_app.flow
