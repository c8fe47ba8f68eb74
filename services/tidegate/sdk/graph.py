"""The graph builder. It collects all that is wrong with a graph, to say it at once when the graph is defined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import pydantic

from tidegate.domain import waits
from tidegate.domain.workflow import DEFAULT_MAX_STEPS
from tidegate.sdk import json_form
from tidegate.sdk.errors import NotJsonError

if TYPE_CHECKING:
    from tidegate.sdk.app import App

Reference = str | Callable[..., Any]
Resolve = Callable[[Reference], tuple[str, str] | None]


class _Unset:
    """Marks an argument that was not given, where None would mean the JSON value null."""


UNSET: Final = _Unset()


class Graph:
    """A graph of nodes and edges, without cycles. The methods return the graph, so that calls can be chained.

    A node without `input` gets the run's input if nothing comes before it, the output of the one node before it, or
    an object of the outputs of the several nodes before it. A string in a template that is wholly `${ CEL }` is
    replaced by the value of the expression over `input` and `nodes`.
    """

    def __init__(self, name: str, version: str = "1", *, max_steps: int = DEFAULT_MAX_STEPS) -> None:
        self.name = name
        self.version = version
        self.max_steps = max_steps
        self.app: App | None = None  # set when it is added to one
        self._nodes: dict[str, tuple[Reference, Any]] = {}
        self._waits: dict[str, dict[str, Any]] = {}
        self._edges: list[tuple[str, str]] = []
        self._output: Any = UNSET
        self._input_schema: Any = UNSET
        self._problems: list[str] = []

    @property
    def label(self) -> str:
        """Return `name@version`."""
        return f"{self.name}@{self.version}"

    def node(self, node_id: str, function: Reference, *, input: Any = UNSET) -> Graph:  # noqa: A002 - the word of the definition
        """Add a node that runs a step or an agent, given as a registered function or by name."""
        self._notice_twice(node_id)
        self._nodes[node_id] = (function, input)
        return self

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
        schema: Mapping[str, Any] | bool | type[pydantic.BaseModel] | _Unset = UNSET,
        **timeout: Any,
    ) -> Graph:
        """Add a node that asks a person; the answer is the output.

        choices: the texts that count as answers; free_text: whether others do (only without choices, if not said). schema: a
        JSON Schema, or a pydantic model, that every answer must fit. timeout: `timeout_s`, after which the wait is given up;
        then the run fails, or goes on with `timeout_value` if that is given.
        """
        is_model = isinstance(schema, type) and issubclass(schema, pydantic.BaseModel)
        fits = schema.model_json_schema() if is_model else schema  # type: ignore[union-attr]  # narrowed by is_model
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

    def edge(self, source: str, target: str) -> Graph:
        """Make `target` wait for `source`."""
        self._edges.append((source, target))
        return self

    def chain(self, *nodes: Reference) -> Graph:
        """Make each node wait for the one before it; a function stands for a node of its name, added if need be."""
        ids = []
        for node in nodes:
            node_id = node if isinstance(node, str) else getattr(node, "__name__", repr(node))
            if not isinstance(node, str) and node_id not in self._nodes and node_id not in self._waits:
                self.node(node_id, node)
            ids.append(node_id)
        self._edges.extend(itertools.pairwise(ids))
        return self

    def output(self, template: Any) -> Graph:
        """Say what the run's output is; without it, it is the output of the node(s) that nothing waits for."""
        self._output = template
        return self

    def input_schema(self, schema: Mapping[str, Any] | bool | type[pydantic.BaseModel]) -> Graph:
        """Say what a run's input must look like: a JSON Schema, or a pydantic model that has one."""
        is_model = isinstance(schema, type) and issubclass(schema, pydantic.BaseModel)
        self._input_schema = schema.model_json_schema() if is_model else schema  # type: ignore[union-attr]  # narrowed by is_model
        return self

    def to_definition(self, resolve: Resolve) -> tuple[dict[str, Any], list[str]]:
        """Return the definition without `functions`, and what is wrong with it as far as it can be seen here.

        `resolve` maps a function to its kind and name, or to None if it has none.
        """
        problems = list(self._problems)
        nodes = {node_id: self._node(node_id, *node, resolve, problems) for node_id, node in self._nodes.items()}
        nodes |= self._waits
        definition: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "nodes": nodes,
            "edges": [list(edge) for edge in self._edges],
            "max_steps": self.max_steps,
        }
        for key, value in (("output", self._output), ("input_schema", self._input_schema)):
            if value is not UNSET:
                definition[key] = _template(value, key, problems)
        return definition, problems

    def _node(
        self, node_id: str, function: Reference, template: Any, resolve: Resolve, problems: list[str]
    ) -> dict[str, Any]:
        resolved = resolve(function)
        if resolved is None:
            name = getattr(function, "__name__", repr(function))
            problems.append(f"nodes.{node_id}: function {name!r} is not registered: decorate it with @step or @agent")
            resolved = "step", name
        node = {"kind": resolved[0], "function": resolved[1]}
        if template is not UNSET:
            node["input"] = _template(template, f"nodes.{node_id}.input", problems)
        return node


def _template(value: Any, where: str, problems: list[str]) -> Any:
    try:
        return json_form.to_json(value, where)
    except NotJsonError as error:
        problems.append(str(error))
        return None
