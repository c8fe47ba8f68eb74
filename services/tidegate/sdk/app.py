"""An app: the functions that an executor offers, and the graphs made of them."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypedDict, TypeVar, Unpack, overload

import jsonschema

from tidegate.domain import canonical, retries
from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.isolation import IN_PROCESS, ISOLATIONS, SUBPROCESS
from tidegate.domain.messages import FunctionDetail
from tidegate.domain.workflow import AGENT_PREFIX, DEFAULT_MAX_STEPS, validate_definition
from tidegate.sdk.binding import AGENT, FLOW, STEP, TOOL, Binder
from tidegate.sdk.errors import AppError, FlowFailedError, GraphError, NonRetryable
from tidegate.sdk.flow import Player, path_here, playing
from tidegate.sdk.flow_calls import Child, FlowCalls, OutsideTool
from tidegate.sdk.graph import Change, Graph, GraphOptions, Schema, schema_of

DEFAULT_QUEUE: Final = "default"
DEFAULT_TIMEOUT_S: Final = 30.0
DEFAULT_AGENT_TIMEOUT_S: Final = 120.0
DEFAULT_RETRIES: Final = 4

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_OUTSIDE_TIMEOUT_S: Final = 24 * 3600.0
MAX_OUTSIDE_TIMEOUT_S: Final = 7 * 24 * 3600.0

Reference = str | Callable[..., Any]
ErrorClasses = Sequence[str | type[BaseException]]

_name = re.compile(NAME_PATTERN)


_DEFAULTS: Final[dict[str, Any]] = {
    "retries": DEFAULT_RETRIES,
    "backoff_s": 0.2,
    "backoff_factor": 2.0,
    "backoff_max_s": 60.0,
    "idempotent": True,
    "cost_micros": 0,
    "retry_on": (),
    "no_retry_on": (),
    "retry_rules": (),
    "provider": "",
    "model": "",
    "operation": "",
    "prefer": "",
    "retry": "",
    "max_input_tokens": 0,
    "max_output_tokens": 0,
    "isolation": IN_PROCESS,
    "memory_mib": 0,
    "cpu_millis": 0,
    "image": "",
    "output_max_bytes": 0,
}


_COUNTS: Final = ("max_input_tokens", "max_output_tokens", "memory_mib", "cpu_millis", "output_max_bytes")
_MAX_IMAGE: Final = 512
_LABELS: Final = ("provider", "model", "operation", "prefer", "retry")
_PINNED_IF_SAID: Final = (*_LABELS, "max_input_tokens", "max_output_tokens")
_MAX_LABEL: Final = 128


class Options(TypedDict, total=False):
    """What `@tool` and `@step` may be given.

    name: instead of the function's own. timeout_s: how long one attempt may take (30). retries: how often it may be repeated
    after the first attempt failed (4), after `backoff_s` (0.2), then each time `backoff_factor` (2.0) times as long, at most
    `backoff_max_s` (60). retry_on, no_retry_on: exceptions, or names of their classes, after which alone, or after which never,
    it is repeated; a subclass must be named itself. retry_rules: other patience for some classes, see `RetryRule`. retry: name of
    a retry document, which says all this instead as long as it is in force. idempotent (True): if False, an attempt of unknown
    outcome is not repeated unless a human says so. cost_micros (0): what is set aside before it runs, in micro-dollars. queue:
    whose executors run it; the app's if not given. provider, model, operation: what it uses, for rules and limits to look at.
    prefer: an instance that should run it if it has a free slot. max_input_tokens, max_output_tokens (0): the most that one
    attempt uses of its model; with them, and without cost_micros, the price table says
    what is set aside. isolation (as usual): `subprocess` or `job`, to have it run in a process or in a Kubernetes Job of its
    own; a policy may demand more. memory_mib: the most memory that it may use there; cpu_millis, image: thousandths of a
    processor that a Job asks for, and its image; where not said, and for a Job without memory_mib, the executor's settings
    count. output_max_bytes: less than the executor takes anyway. These five say how this executor runs the function: no workflow
    pins them.
    """

    name: str
    timeout_s: float
    retries: int
    backoff_s: float
    backoff_factor: float
    backoff_max_s: float
    retry_on: ErrorClasses
    no_retry_on: ErrorClasses
    retry_rules: Sequence[RetryRule]
    idempotent: bool
    cost_micros: int
    queue: str | None
    provider: str
    model: str
    operation: str
    prefer: str
    retry: str
    max_input_tokens: int
    max_output_tokens: int
    isolation: str
    memory_mib: int
    cpu_millis: int
    image: str
    output_max_bytes: int


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


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How a function is repeated after errors of these classes (exceptions, or names), counted apart from all others.

    retries: how often; then the step fails. What is None is as the function itself says. name: what the log calls the rule; its
    first class if there is none. An error with `retry_after_s` is in any case left alone for so long.
    """

    on: ErrorClasses
    retries: int | None = None
    backoff_s: float | None = None
    backoff_factor: float | None = None
    backoff_max_s: float | None = None
    name: str = ""

    def to_definition(self) -> dict[str, Any]:
        """Return the rule as a definition names it. Raises AppError."""
        settings = {
            "name": self.name or None,
            "max_attempts": None if self.retries is None else self.retries + 1,
            "backoff_ms": None if self.backoff_s is None else round(self.backoff_s * 1000),
            "backoff_factor": self.backoff_factor,
            "backoff_max_ms": None if self.backoff_max_s is None else round(self.backoff_max_s * 1000),
        }
        said = {name: value for name, value in settings.items() if value is not None}
        return {"on": list(_class_names("a retry rule's `on`", self.on)), **said}


@dataclass(frozen=True, slots=True)
class Settings:
    """How calls of a function are run. They are pinned into the definitions of the workflows that use it, but for what only
    its executor needs: isolation, memory_mib, cpu_millis, image, output_max_bytes.
    """

    queue: str
    timeout_s: float
    retries: int
    backoff_s: float
    backoff_factor: float
    backoff_max_s: float
    idempotent: bool
    cost_micros: int
    provider: str = ""
    model: str = ""
    operation: str = ""
    prefer: str = ""
    retry: str = ""
    max_input_tokens: int = 0
    max_output_tokens: int = 0
    retry_on: tuple[str, ...] = ()
    no_retry_on: tuple[str, ...] = ()
    retry_rules: tuple[RetryRule, ...] = ()
    isolation: str = IN_PROCESS
    memory_mib: int = 0
    cpu_millis: int = 0
    image: str = ""
    output_max_bytes: int = 0

    def to_definition(self) -> dict[str, Any]:
        """Return the settings as a definition names them. What was not said is left out: the hashes of older ones stay."""
        lists = {
            "retry_on": list(self.retry_on),
            "no_retry_on": list(self.no_retry_on),
            "retry_rules": [rule.to_definition() for rule in self.retry_rules],
        }
        return {
            **{name: listed for name, listed in lists.items() if listed},
            "queue": self.queue,
            "timeout_ms": round(self.timeout_s * 1000),
            "max_attempts": self.retries + 1,
            "backoff_ms": round(self.backoff_s * 1000),
            "backoff_factor": self.backoff_factor,
            "backoff_max_ms": round(self.backoff_max_s * 1000),
            "reserve_micros": self.cost_micros,
            "idempotent": self.idempotent,
            **{name: said for name in _PINNED_IF_SAID if (said := getattr(self, name))},
        }


class Function:
    """A registered function. `tools`: what an agent may call, by name. file_version: of the file that it is in; or empty."""

    def __init__(
        self,
        kind: str,
        name: str,
        call: Callable[..., Any],
        settings: Settings,
        *,
        tools: tuple[str, ...] = (),
        max_steps: int = DEFAULT_MAX_STEPS,
    ) -> None:
        self.kind = kind
        self.name = name
        self.call = call
        self.settings = settings
        self.tools = tools
        self.max_steps = max_steps
        self.public: Any = call  # what the decorator returned
        self.file_version = _file_version(call)
        self.is_async = inspect.iscoroutinefunction(call) or (
            not inspect.isroutine(call) and inspect.iscoroutinefunction(type(call).__call__)
        )

    @property
    def label(self) -> str:
        """Return `kind:name`, as registrations list it."""
        return f"{self.kind}:{self.name}"

    @functools.cached_property
    def binder(self) -> Binder:
        """Return what binds arguments to the signature; made late, when its module is complete. Raises AppError."""
        try:
            return Binder(self.kind, self.call)
        except AppError as error:
            raise AppError(f"{self.kind} {self.name!r}: {error}") from None

    def to_definition(self) -> dict[str, Any]:
        """Return the function as a definition pins it. Raises AppError if its signature cannot be used."""
        definition: dict[str, Any] = {"kind": self.kind, **self.settings.to_definition()}
        binder = self.binder
        if self.kind == TOOL:
            definition["description"] = inspect.getdoc(self.call) or ""
            definition["parameters"] = binder.parameters()
        if self.kind in (AGENT, FLOW):
            definition["tools"] = list(self.tools)
        return definition


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
        self.file_version = _file_version(coroutine)

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
        self.name = _checked_name("app", name)
        self.queue = _checked_name("queue", queue)
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
        _checked_name(TOOL, name)
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
            name = _checked_name(kind, str(options.get("name") or getattr(call, "__name__", "")))
            given = {key: value for key, value in options.items() if key != "name" and value is not None}
            settings = _settings(kind, name, {"queue": self.queue, **given})
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
            return (child.app or self)._definition(child, around)
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


def _file_version(call: Callable[..., Any]) -> str:
    """Return the first digits of the SHA-256 of the file with a function, as it is when the function is registered."""
    made = inspect.unwrap(call)
    code = getattr(made, "__code__", None) or getattr(type(made).__call__, "__code__", None)
    try:
        return hashlib.sha256(Path(code.co_filename).read_bytes()).hexdigest()[:12] if code is not None else ""
    except OSError:  # made by `exec`, say
        return ""


def _seen_by_flows(function: Function, call: F) -> F:
    """Return the function itself for everybody but a flow that is being played: its call is noted and not made."""

    @functools.wraps(call)
    def public(*args: Any, **kwargs: Any) -> Any:
        player = playing()
        return call(*args, **kwargs) if player is None else player.call(function, args, kwargs)

    return public  # type: ignore[return-value]  # it is called as the function is


def _checked_name(what: str, name: str) -> str:
    if not isinstance(name, str) or not _name.fullmatch(name):
        raise AppError(f"{what} name {name!r}: a letter or underscore, then letters, digits, _ . or -, at most 64")
    return name


def _settings(kind: str, name: str, options: dict[str, Any]) -> Settings:
    for option in ("retry_on", "no_retry_on"):
        options[option] = _class_names(f"{kind} {name!r}: {option}", options.get(option, ()))
    rules = options.get("retry_rules", ())
    if not isinstance(rules, Sequence) or not all(isinstance(rule, RetryRule) for rule in rules):
        raise AppError(f"{kind} {name!r}: retry_rules must be a list of RetryRule")
    options["retry_rules"] = tuple(rules)
    defaults = {**_DEFAULTS, "timeout_s": DEFAULT_AGENT_TIMEOUT_S if kind == AGENT else DEFAULT_TIMEOUT_S}
    settings = Settings(**{**defaults, **options})
    problems = [
        text
        for wrong, text in (
            (not settings.timeout_s >= 0.001, "timeout_s must be at least 0.001"),
            (not settings.retries >= 0, "retries must be at least 0"),
            (not settings.backoff_s >= 0.001, "backoff_s must be at least 0.001"),
            (not settings.backoff_factor >= 1, "backoff_factor must be at least 1"),
            (not settings.backoff_max_s >= settings.backoff_s, "backoff_max_s must be at least backoff_s"),
            (not settings.cost_micros >= 0, "cost_micros must be at least 0"),
            *((not getattr(settings, count) >= 0, f"{count} must be at least 0") for count in _COUNTS),
            (settings.isolation not in ISOLATIONS, "isolation must be subprocess or job"),
            (settings.image and settings.isolation == SUBPROCESS, "image is for isolation job"),
            (not isinstance(settings.image, str) or len(settings.image) > _MAX_IMAGE, "image must be an image's name"),
            *(
                (
                    not isinstance(text, str) or len(text) > _MAX_LABEL,
                    f"{label} must be a text of at most {_MAX_LABEL} characters",
                )
                for label in _LABELS
                for text in (getattr(settings, label),)
            ),
        )
        if wrong
    ]
    problems = problems or _retry_problems(settings)
    if problems:
        raise AppError(f"{kind} {name!r}: {'; '.join(problems)}")
    _checked_name("queue", settings.queue)
    return settings


def _retry_problems(settings: Settings) -> list[str]:
    """Return what is wrong with the lists and rules of error classes, by the schema that definitions are judged by."""
    said = {name: found for name, found in settings.to_definition().items() if name in retries.PROPERTIES}
    schema = {"type": "object", "properties": retries.PROPERTIES}
    shape = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(said)
    ]
    return shape or [problem.lstrip(".") for problem in retries.problems(said, "")]


def _class_names(where: str, classes: ErrorClasses) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise AppError(f"{where} must be a list of exceptions or of names of their classes")
    names = tuple(item.__name__ if isinstance(item, type) else item for item in classes)
    if not all(isinstance(name, str) and name for name in names):
        raise AppError(f"{where} must be a list of exceptions or of names of their classes")
    return names


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
