"""The graph builder. It collects all that is wrong with a graph, to say it at once when the graph is defined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol, TypedDict, Unpack

import pydantic

from tidegate.domain import waits
from tidegate.domain.workflow import DEFAULT_MAX_STEPS
from tidegate.sdk import json_form
from tidegate.sdk.errors import GraphError, NotJsonError

Reference = str | Callable[..., Any]
Resolve = Callable[[Reference], tuple[str, str] | None]
Join = Literal["all", "any"] | int
Schema = Mapping[str, Any] | bool | type[pydantic.BaseModel]


class _Unset:
    """Marks an argument that was not given, where None would mean the JSON value null."""


UNSET: Final = _Unset()


def schema_of(schema: Schema) -> Mapping[str, Any] | bool:
    """Return a JSON Schema: the one given, or that of a pydantic model."""
    return schema.model_json_schema() if isinstance(schema, type) else schema


class GraphOptions(TypedDict, total=False):
    """What a graph may say of its runs as a whole.

    max_steps (50), max_hops (50): how many steps a run may have, and how many routes it may take. failure_mode (`fail_fast`):
    with `continue`, what does not depend on a failed node goes on. success (`all`): with `any`, such a run has succeeded if one
    of its last nodes has. aggregate: of which last nodes the run's output is made: `latest`, `all` or `success_only`.
    """

    max_steps: int
    max_hops: int
    failure_mode: Literal["fail_fast", "continue"]
    success: Literal["all", "any"]
    aggregate: Literal["latest", "all", "success_only"]


class NodeOptions(TypedDict, total=False):
    """What any node may say.

    input: a template. join (`all`): how many of the edges that lead to it must be taken: `all`, `any` or a number. on_failure:
    `continue` if its failure does not count against the run, `fail` if it ends the run even where others go on.
    """

    input: Any
    join: Join
    on_failure: Literal["fail", "continue"]


class MapOptions(NodeOptions, total=False):
    """What a map may say besides.

    at_once (10): how many items are worked on at a time. max_items (1000): more are refused. on_item_failure (`fail`): with
    `continue`, a failed item does not fail the map. results (`all`): failed ones are null in the output; `success_only`: they
    are left out.
    """

    at_once: int
    max_items: int
    on_item_failure: Literal["fail", "continue"]
    results: Literal["all", "success_only"]


class EvolutionOptions(TypedDict, total=False):
    """How runs of a graph may change it.

    functions: what nodes of changes may run besides the functions of the graph's own nodes; workflows: of what they may have runs
    besides its own nodes of that kind. approval (False): a person decides on each change; expires_s: within so many seconds, or it
    is rejected. max_changes (50): of one run.
    """

    functions: Sequence[Reference]
    workflows: Sequence[Graph | Mapping[str, Any]]
    approval: bool
    expires_s: float
    max_changes: int


class ChildOptions(NodeOptions, total=False):
    """What a node that is a workflow may say besides. budget_micros: the most that its run may cost, if less than this one's."""

    budget_micros: int


class _Node(NamedTuple):
    kind: str  # empty for step or agent, as the function says
    function: Reference | None
    fields: dict[str, Any]


class Home(Protocol):
    """The app of a graph."""

    def resolve(self, reference: Reference) -> tuple[str, str] | None:
        """Return the kind and the name of a function; None if it has none."""


class Graph:
    """A graph of nodes and edges. The methods return the graph, so that calls can be chained.

    A node without `input` gets the run's input if nothing comes before it, the output of the one node before it, or
    an object of the outputs of the several nodes before it. A string in a template that is wholly `${ CEL }` is
    replaced by the value of the expression over `input` and `nodes`. docs/authoring.md shows everything with examples.
    """

    def __init__(self, name: str, version: str = "1", **options: Unpack[GraphOptions]) -> None:
        self.name = name
        self.version = version
        self.max_steps = options.get("max_steps", DEFAULT_MAX_STEPS)
        self.app: Home | None = None  # set when it is added to one
        self.children: dict[
            str, Graph | Mapping[str, Any]
        ] = {}  # by `name@version`: of nodes, and what changes may name
        self._options: dict[str, Any] = {**options, "max_steps": self.max_steps}
        self._nodes: dict[str, _Node] = {}
        self._waits: dict[str, dict[str, Any]] = {}
        self._edges: list[list[str] | dict[str, str]] = []
        self._start: list[str] = []
        self._evolution: dict[str, Any] = {}
        self.may_use: list[Reference] = []  # functions that only changes name
        self._output: Any = UNSET
        self._input_schema: Any = UNSET
        self._problems: list[str] = []

    @property
    def label(self) -> str:
        """Return `name@version`."""
        return f"{self.name}@{self.version}"

    # -- nodes ---------------------------------------------------------------

    def node(
        self, node_id: str, function: Reference, *, routes: Sequence[str] = (), **options: Unpack[NodeOptions]
    ) -> Graph:
        """Add a node that runs a step or an agent, given as a registered function or by name.

        routes: the nodes of which it may choose one to go on with, by returning `Goto` (an agent: `Plan(goto=…)`).
        """
        more = {"routes": list(routes)} if routes else {}
        return self._add(node_id, _Node("", function, {**options, **more}))

    def map(self, node_id: str, function: Reference, over: str, **options: Unpack[MapOptions]) -> Graph:
        """Add a node that runs a step or an agent for each item of the list that `over` (CEL) gives.

        Its output is the list of their outputs, in the same order. In the template `input`, `item` and `index` can be used;
        without it the item is the input.
        """
        return self._add(node_id, _Node("map", function, {"over": over, **options}))

    def router(
        self,
        node_id: str,
        choose: str,
        *,
        routes: Sequence[str],
        input: Any = UNSET,  # noqa: A002 - the word of the definition
        join: Join | None = None,
    ) -> Graph:
        """Add a node that goes on with the one of `routes` that `choose` (CEL) names, or with none if that is null.

        It runs nothing; its output is its input, which `choose` sees as `output`.
        """
        fields: dict[str, Any] = {"choose": choose, "routes": list(routes)}
        fields |= {} if input is UNSET else {"input": input}
        return self._add(node_id, _Node("router", None, fields | ({} if join is None else {"join": join})))

    def workflow(self, node_id: str, child: Graph | Mapping[str, Any], **options: Unpack[ChildOptions]) -> Graph:
        """Add a node that is a run of another workflow: a graph of this app, or a definition. Its output is that run's."""
        return self._add(node_id, _Node("workflow", None, {"workflow": self._hold(child), **options}))

    def _hold(self, child: Graph | Mapping[str, Any]) -> str:
        """Make a workflow part of the definition; return it as `name@version`."""
        label = child.label if isinstance(child, Graph) else f"{child.get('name')}@{child.get('version')}"
        self.children[label] = child
        return label

    def sleep(self, node_id: str, seconds: float | str, *, input: Any = UNSET, **timeout: Any) -> Graph:  # noqa: A002
        """Add a node that waits for so many seconds (or an expression) and hands on its input. `timeout`: see `ask`."""
        return self._wait(node_id, waits.SLEEP, timeout, input, seconds=seconds)

    def wait_until(self, node_id: str, at: str, *, input: Any = UNSET, **timeout: Any) -> Graph:  # noqa: A002
        """Add a node that waits for a time in RFC 3339 (or an expression) and hands on its input. `timeout`: see `ask`."""
        return self._wait(node_id, waits.UNTIL, timeout, input, at=at)

    def wait_event(self, node_id: str, event: str, *, key: Any = UNSET, **timeout: Any) -> Graph:
        """Add a node that waits for an event of that name and correlation key; its payload is the output.

        `key` may be an expression, such as `${ input.order_id }`. `timeout`: see `ask`.
        """
        return self._wait(node_id, waits.EVENT, timeout, UNSET, event=event, key=key)

    def ask(
        self,
        node_id: str,
        prompt: str,
        *,
        choices: Sequence[str] | str | _Unset = UNSET,
        free_text: bool | _Unset = UNSET,
        schema: Schema | _Unset = UNSET,
        **timeout: Any,
    ) -> Graph:
        """Add a node that asks a person; the answer is the output.

        choices: the texts that count as answers; free_text: whether others do (only without choices, if not said). schema: a
        JSON Schema, or a pydantic model, that every answer must fit. timeout: `timeout_s`, after which the wait is given up;
        then the run fails, or goes on with `timeout_value` if that is given.
        """
        fits = schema if isinstance(schema, _Unset) else schema_of(schema)
        given = list(choices) if isinstance(choices, tuple | list) else choices
        return self._wait(
            node_id, waits.ASK, timeout, UNSET, prompt=prompt, choices=given, free_text=free_text, schema=fits
        )

    def _wait(self, node_id: str, kind: str, timeout: dict[str, Any], value: Any, **settings: Any) -> Graph:
        self._notice_twice(node_id)
        unknown = sorted(timeout.keys() - {"timeout_s", "timeout_value"})
        self._problems += [f"nodes.{node_id}: {kind} has no setting {name!r}" for name in unknown]
        where = f"nodes.{node_id}"
        given = {
            name: _template(item, f"{where}.wait.{name}", self._problems)
            for name, item in {**settings, **timeout}.items()
            if item is not UNSET
        }
        if "timeout_value" in given:
            given["on_timeout"] = waits.VALUE
        node: dict[str, Any] = {"kind": kind, "wait": given}
        if value is not UNSET:
            node["input"] = _template(value, f"{where}.input", self._problems)
        self._waits[node_id] = node
        return self

    def _notice_twice(self, node_id: str) -> None:
        if node_id in self._nodes or node_id in self._waits:
            self._problems.append(f"nodes.{node_id}: there twice")

    def _add(self, node_id: str, node: _Node) -> Graph:
        self._notice_twice(node_id)
        self._nodes[node_id] = node
        return self

    # -- edges ---------------------------------------------------------------

    def edge(self, source: str, target: str, *, when: str = "") -> Graph:
        """Make `target` wait for `source`; with `when` (CEL over `input`, `nodes` and the source's `output`) only if true."""
        self._edges.append({"from": source, "to": target, "when": when} if when else [source, target])
        return self

    def chain(self, *nodes: Reference) -> Graph:
        """Make each node wait for the one before it; a function stands for a node of its name, added if need be."""
        ids = []
        for node in nodes:
            node_id = node if isinstance(node, str) else getattr(node, "__name__", repr(node))
            if not isinstance(node, str) and node_id not in self._nodes and node_id not in self._waits:
                self.node(node_id, node)
            ids.append(node_id)
        self._edges.extend([a, b] for a, b in itertools.pairwise(ids))
        return self

    def start(self, *node_ids: str) -> Graph:
        """Say what a run begins with, where it cannot be seen because routes lead back to it."""
        self._start.extend(node_ids)
        return self

    # -- the whole ---------------------------------------------------------------

    def output(self, template: Any) -> Graph:
        """Say what the run's output is; without it, it is the output of the node(s) that nothing waits for."""
        self._output = template
        return self

    def input_schema(self, schema: Schema) -> Graph:
        """Say what a run's input must look like: a JSON Schema, or a pydantic model that has one."""
        self._input_schema = schema_of(schema)
        return self

    def evolves(
        self, mode: Literal["disabled", "optional", "required"], /, **options: Unpack[EvolutionOptions]
    ) -> Graph:
        """Say whether steps of a run may propose changes of its graph by returning `Propose`.

        disabled: every proposal is rejected, as if this was never called. optional: one that is rejected changes nothing, and the
        run goes on. required: the step of a rejected one fails.
        """
        self.may_use = list(options.pop("functions", ()))
        for child in options.pop("workflows", ()):
            self._hold(child)
        self._evolution = {"mode": mode, **options}
        return self

    def to_definition(self, resolve: Resolve) -> tuple[dict[str, Any], list[str]]:
        """Return the definition without `functions` and `workflows`, and what is wrong with it as far as it is seen here.

        `resolve` maps a function to its kind and name, or to None if it has none.
        """
        problems = list(self._problems)
        nodes = {node_id: _to_node(node_id, node, resolve, problems) for node_id, node in self._nodes.items()}
        nodes |= self._waits
        definition: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "nodes": nodes,
            "edges": [edge.copy() for edge in self._edges],
            **self._options,
        }
        if self._evolution:
            definition["evolution"] = dict(self._evolution)
        if self._start:
            definition["start"] = list(self._start)
        for key, value in (("output", self._output), ("input_schema", self._input_schema)):
            if value is not UNSET:
                definition[key] = _template(value, key, problems)
        return definition, problems


class Change(Graph):
    """Nodes and edges that a step proposes to add to the graph of its run; made by `App.change`.

    The methods are those of a graph, but for `start`, `output`, `input_schema` and `evolves`. Edges may name nodes that the run's
    graph has. A node that no edge of the change leads to comes after the step that proposes it. because: said to whoever decides,
    and to whoever looks at the run later.
    """

    def __init__(self, because: str = "") -> None:
        super().__init__("change")
        self.because = because

    def to_change(self) -> dict[str, Any]:
        """Return the change as it is recorded. Raises GraphError listing what is wrong with it, as far as it is seen here."""
        if self.app is None:
            raise GraphError("change", ["it belongs to no app: make it with `app.change()`"])
        definition, problems = self.to_definition(self.app.resolve)
        foreign = sorted(definition.keys() & {"start", "output", "input_schema", "evolution"})
        problems += [f"{name}: a change has none" for name in foreign]
        if problems:
            raise GraphError("change", problems)
        return {"nodes": definition["nodes"], "edges": definition["edges"], "because": self.because}


def _to_node(node_id: str, node: _Node, resolve: Resolve, problems: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": node.kind}
    if node.function is not None:
        resolved = resolve(node.function)
        if resolved is None:
            name = getattr(node.function, "__name__", repr(node.function))
            problems.append(f"nodes.{node_id}: function {name!r} is not registered: decorate it with @step or @agent")
            resolved = "step", name
        found = {"kind": node.kind or resolved[0], "function": resolved[1]}
    for name, value in node.fields.items():
        if name == "input":
            found[name] = _template(value, f"nodes.{node_id}.input", problems)
        elif name == "join" and isinstance(value, int):
            found[name] = {"need": value}
        else:
            found[name] = value
    return found


def _template(value: Any, where: str, problems: list[str]) -> Any:
    try:
        return json_form.to_json(value, where)
    except NotJsonError as error:
        problems.append(str(error))
        return None
