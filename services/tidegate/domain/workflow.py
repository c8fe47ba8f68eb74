"""Workflow definitions: what may be published, and the compiled form that scheduling works on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import msgspec

from tidegate.domain import canonical, expressions, retries, waits
from tidegate.domain.definition_damage import SURE, Unsure, explanation, without_damage, written
from tidegate.domain.definition_problems import binding_problems, function_problems, graph_problems, node_problems
from tidegate.domain.graph_changes import EVOLUTION_SCHEMA, Evolution, graph_hash, merged
from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.retries import Retries
from tidegate.domain.routes import Ancestry, form_of
from tidegate.domain.schemas import NOTHING_ELSEWHERE, schema_problems
from tidegate.domain.strict_schema import StrictValidator, Validator, first_problems

MAX_DEFINITION_BYTES: Final = 512 * 1024
MAX_LOOKED_AT_BYTES: Final = 4 * MAX_DEFINITION_BYTES  # of what is larger, only that is said
DEFAULT_MAX_STEPS: Final = 50
AGENT_PREFIX: Final = "agent:"

FAIL_FAST: Final = "fail_fast"
CONTINUE: Final = "continue"
FAILURE_MODES: Final = (FAIL_FAST, CONTINUE)
DEFAULT_MAX_HOPS: Final = 50
MAX_NESTING: Final = 8  # of workflows in workflows
ALL: Final = 0  # as `needs`: every edge that leads here

_expression = {"type": "string", "minLength": 1}
_workflow_label = {
    "type": "string",
    "pattern": r"^(agent:)?[A-Za-z_][A-Za-z0-9_.-]{0,63}@[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
}
_name = {"type": "string", "pattern": NAME_PATTERN}
_label = {"type": "string", "maxLength": 128}
_count = {"type": "integer", "minimum": 0, "maximum": 2**53}

DEFINITION_SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Tidegate workflow definition",
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "version", "nodes", "functions"],
    "properties": {
        "name": {"type": "string", "pattern": r"^(agent:)?[A-Za-z_][A-Za-z0-9_.-]{0,63}$"},
        "version": {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
        "nodes": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 10_000,
            "propertyNames": _name,
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["kind"],
                "properties": {
                    "kind": {"enum": ["step", "agent", "map", "router", "workflow", "flow", *sorted(waits.KINDS)]},
                    "function": _name,
                    "input": {},
                    "wait": waits.SETTINGS_SCHEMA,
                    "join": {
                        "anyOf": [
                            {"enum": ["all", "any"]},
                            {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["need"],
                                "properties": {"need": {"type": "integer", "minimum": 1, "maximum": 10_000}},
                            },
                        ]
                    },
                    "on_failure": {"enum": ["fail", "continue"]},
                    "routes": {"type": "array", "items": _name, "minItems": 1, "uniqueItems": True},
                    "choose": _expression,
                    "over": _expression,
                    "at_once": {"type": "integer", "minimum": 1, "maximum": 1000},
                    "max_items": {"type": "integer", "minimum": 1, "maximum": 10_000},
                    "on_item_failure": {"enum": ["fail", "continue"]},
                    "results": {"enum": ["all", "success_only"]},
                    "workflow": _workflow_label,
                    "budget_micros": _count,
                },
            },
        },
        "edges": {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "array", "items": _name, "minItems": 2, "maxItems": 2},
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["from", "to"],
                        "properties": {"from": _name, "to": _name, "when": _expression},
                    },
                ]
            },
        },
        "start": {"type": "array", "items": _name, "minItems": 1, "uniqueItems": True},
        "failure_mode": {"enum": list(FAILURE_MODES)},
        "success": {"enum": ["all", "any"]},
        "aggregate": {"enum": ["latest", "all", "success_only"]},
        "max_hops": {"type": "integer", "minimum": 0, "maximum": 10_000},
        "evolution": EVOLUTION_SCHEMA,
        "workflows": {"type": "object", "propertyNames": _workflow_label, "additionalProperties": {"type": "object"}},
        "output": {},
        "input_schema": {"type": ["object", "boolean"]},
        "functions": {
            "type": "object",
            "propertyNames": _name,
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["kind"],
                "properties": {
                    "kind": {"enum": ["step", "agent", "tool", "flow"]},
                    "queue": _name,
                    "timeout_ms": {"type": "integer", "minimum": 1, "maximum": 7 * 24 * 3_600_000},
                    **retries.PROPERTIES,
                    "retry": _name,
                    "reserve_micros": _count,
                    "idempotent": {"type": "boolean"},
                    "provider": _label,
                    "model": _label,
                    "operation": _label,
                    "prefer": _label,
                    "max_input_tokens": _count,
                    "max_output_tokens": _count,
                    "description": {"type": "string"},
                    "parameters": {"type": ["object", "boolean"]},
                    "tools": {"type": "array", "items": _name},
                    "workflows": {"type": "array", "items": _workflow_label},
                    "outside": {"type": "boolean"},
                    "output": {"type": ["object", "boolean"]},
                },
            },
        },
        "max_steps": {"type": "integer", "minimum": 1, "maximum": 100_000},
    },
}

_validator = StrictValidator(DEFINITION_SCHEMA)


class DefinitionError(ValueError):
    """The definition cannot run; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Function(Retries, frozen=True, kw_only=True):
    """A function of an app as a workflow pins it, and how it is repeated. Times in milliseconds, money in micro-dollars.

    outside: a tool that no executor has: somebody outside answers each call, within `timeout_ms`. output: what the answer must
    fit, a JSON Schema. tools: what an agent, or a flow, may call. workflows: of what a flow may start runs, as `name@version`.
    """

    kind: str
    queue: str = "default"
    timeout_ms: int = 30_000
    reserve_micros: int = 0
    idempotent: bool = True
    provider: str = ""
    model: str = ""
    operation: str = ""
    prefer: str = ""
    max_input_tokens: int = 0
    max_output_tokens: int = 0
    description: str = ""
    parameters: Any = True
    tools: tuple[str, ...] = ()
    workflows: tuple[str, ...] = ()
    outside: bool = False
    output: Any = True
    retry: str = ""  # the retry document that says how it is repeated, if that is in force


class Node(msgspec.Struct, frozen=True):
    """A vertex. `input` is a template; UNSET for the default binding. What the other fields mean: docs/authoring.md."""

    kind: str
    function: str = ""
    input: Any = msgspec.UNSET
    wait: waits.Settings = waits.Settings()
    join: Any = "all"
    on_failure: str = ""
    routes: tuple[str, ...] = ()
    choose: str = ""
    over: str = ""
    at_once: int = 10
    max_items: int = 1000
    on_item_failure: str = "fail"
    results: str = "all"
    workflow: str = ""
    budget_micros: int | None = None


class Edge(msgspec.Struct, frozen=True):
    """An edge with a condition: CEL over `input`, `nodes` and `output`, the output of the node that it comes from."""

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    when: str = ""


class _Document(msgspec.Struct, frozen=True):
    name: str
    version: str
    nodes: dict[str, Node]
    functions: dict[str, Function]
    edges: tuple[tuple[str, str] | Edge, ...] = ()
    start: tuple[str, ...] = ()
    output: Any = msgspec.UNSET
    input_schema: Any = True
    max_steps: int = DEFAULT_MAX_STEPS
    max_hops: int = DEFAULT_MAX_HOPS
    failure_mode: str = FAIL_FAST
    success: str = "all"
    aggregate: str = ""
    workflows: dict[str, Any] = {}
    evolution: Evolution = Evolution()


class Workflow:
    """A compiled definition: immutable, shared by all runs of the same definition hash. `definition` is its text.

    Of a run that has changed its graph, `document` and what follows from it are those of the graph as it is now, `definition`
    and its hash those that the run has pinned; graph_hash: of the nodes and edges as changed, empty if nothing was.

    conditions: by node, (target, expression) of its edges that have one. needs: by node, how many of the edges that lead to it
    must be taken; only of nodes that do not wait for all. is_straight: without conditions, routes and such nodes, so that
    whatever comes before a node has led to it. flow_nodes: those that are flows.
    reads: by node, what its input's expressions look at (None: at anything).
    """

    __slots__ = (
        "_children",
        "_input_validator",
        "_parameters",
        "conditions",
        "definition",
        "definition_hash",
        "document",
        "flow_nodes",
        "form",
        "graph_hash",
        "is_straight",
        "needs",
        "output_reads",
        "predecessors",
        "reads",
        "roots",
        "routes",
        "sinks",
        "successors",
    )

    def __init__(self, document: _Document, definition: str, graph_hash: str = "") -> None:
        self.document = document
        self.graph_hash = graph_hash
        self.definition = definition
        self.definition_hash = canonical.digest(definition)
        edges: list[tuple[str, str]] = []
        self.conditions: dict[str, tuple[tuple[str, str], ...]] = {}
        for edge in document.edges:
            if isinstance(edge, Edge):
                edges.append((edge.source, edge.target))
                if edge.when:
                    known = self.conditions.get(edge.source, ())
                    self.conditions[edge.source] = (*known, (edge.target, expressions.source_of(edge.when)))
            else:
                edges.append(edge)
        self.routes = {node_id: node.routes for node_id, node in document.nodes.items() if node.routes}
        self.form, _ = form_of(document.nodes, edges, self.routes, document.start)
        self.predecessors, self.successors = self.form.predecessors, self.form.successors
        self.roots = self.form.roots
        self.sinks = tuple(node for node, ids in self.successors.items() if not ids)
        self.needs = {
            node_id: 1 if node.join == "any" else node.join["need"]
            for node_id, node in document.nodes.items()
            if node.join != "all"
        }
        self.flow_nodes = frozenset(node_id for node_id, node in document.nodes.items() if node.kind == "flow")
        self.is_straight = not (self.conditions or self.routes or self.needs)
        self.reads = {
            node_id: expressions.nodes_read_by([node.input, *msgspec.structs.astuple(node.wait)])
            for node_id, node in document.nodes.items()
            if node.input is not msgspec.UNSET or node.kind in waits.KINDS
        }
        self.output_reads = expressions.nodes_read_by(document.output)
        self._input_validator = _schema_validator(document.input_schema)
        self._parameters: dict[str, Any] = {}
        self._children: dict[str, str] = {}

    def child_definition(self, label: str) -> str:
        """Return the canonical text of a workflow that this one holds and starts runs of."""
        if label not in self._children:
            self._children[label] = canonical.dumps(self.document.workflows[label])
        return self._children[label]

    @property
    def label(self) -> str:
        """Return `name@version`."""
        return f"{self.document.name}@{self.document.version}"

    @property
    def mark(self) -> str:
        """Return what a run's fingerprint names its graph by: the pinned definition and what changes have made of it."""
        return self.definition_hash + self.graph_hash

    def function(self, name: str) -> Function:
        """Return a function's pinned settings."""
        return self.document.functions[name]

    def input_problem(self, value: Any) -> str | None:
        """Return why the run input does not fit the input schema, or None."""
        return _problem(self._input_validator, value, "input")

    def arguments_problem(self, tool: str, arguments: Any) -> str | None:
        """Return why the arguments do not fit the tool's parameters, or None."""
        if tool not in self._parameters:
            self._parameters[tool] = _schema_validator(self.document.functions[tool].parameters)
        return _problem(self._parameters[tool], arguments, "arguments")


def arguments_problem(parameters: Any, arguments: Any) -> str | None:
    """Return why arguments do not fit a tool's parameters, a JSON Schema, or None."""
    return _problem(_schema_validator(parameters), arguments, "arguments")


def _schema_validator(schema: Any) -> Any:
    return None if schema is True else Validator(schema, registry=NOTHING_ELSEWHERE)


def _problem(validator: Any, value: Any, name: str) -> str | None:
    return None if validator is None else first_problems(validator, value, name)


def validate_definition(definition: Any, nesting: int = 0, *, is_new: bool = True) -> list[str]:
    """Return everything that is wrong with a definition, in one go; an empty list means that it can run.

    nesting: how many definitions this one lies in. is_new: somebody is about to publish it.
    """
    try:
        size = len(canonical.dumps(definition).encode("utf-8", "surrogatepass"))
        if size > MAX_LOOKED_AT_BYTES:
            return [f"definition: {size} bytes, at most {MAX_DEFINITION_BYTES}; nothing else of it was looked at"]
        found = _all_problems(definition, nesting, is_new=is_new)
    except canonical.NotJsonError as error:
        return [f"definition: it has no JSON form: {error}"]
    except RecursionError:
        return ["definition: it is nested too deeply"]
    too_large = [f"definition: {size} bytes, at most {MAX_DEFINITION_BYTES}"] if size > MAX_DEFINITION_BYTES else []
    return list(dict.fromkeys([*found, *too_large]))  # the expressions of waits are looked at twice


def _all_problems(definition: Any, nesting: int, *, is_new: bool) -> list[str]:
    errors = list(_validator.iter_errors(definition))
    if not errors:
        return _problems(definition, SURE, nesting, is_new=is_new)
    shape = sorted(f"{written(error.absolute_path) or 'definition'}: {explanation(error)}" for error in errors)
    found = without_damage(definition, _validator)
    if found is None:
        return shape
    rest, unsure = found
    more = _problems(rest, unsure, nesting, is_new=is_new)
    return shape + [problem for problem in more if not unsure.explains(problem)]


def _problems(definition: Mapping[str, Any], unsure: Unsure, nesting: int, *, is_new: bool) -> list[str]:
    """Return what is wrong with a definition whose shape is right, as far as it is known."""
    # The `$` of a pattern also matches before a line feed at the end.
    names = (definition["name"], definition["version"], *definition["nodes"], *definition["functions"])
    found = [f"definition: {name!r} ends with a line feed" for name in sorted(names) if name.endswith("\n")]
    found += _schema_problems(definition) + node_problems(definition, unsure) + function_problems(definition, unsure)
    graph, order = graph_problems(definition, unsure)
    found += graph + binding_problems(definition, order, is_new=is_new)
    for where, condition in unsure.conditions.items():
        found += expressions.problems(f"${{ {expressions.source_of(condition)} }}", where)
    return found + _nested_problems(definition, nesting, is_new=is_new)


def _schema_problems(definition: Mapping[str, Any]) -> list[str]:
    schemas = {"input_schema": definition.get("input_schema", True), **waits.schemas(definition)}
    for name, function in definition["functions"].items():
        schemas[f"functions.{name}.parameters"] = function.get("parameters", True)
        schemas[f"functions.{name}.output"] = function.get("output", True)
    return [problem for where, schema in schemas.items() for problem in schema_problems(where, schema)]


def with_children(definitions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return definitions that hold what their nodes of kind workflow name, as far as it is among them.

    What would hold itself is not put in: that it is lacking is what is then wrong. Raises DefinitionError if one would become
    far larger than a definition may be.
    """
    known = {f"{definition.get('name')}@{definition.get('version')}": definition for definition in definitions}
    named = {label: [one for one in _children_of(definition) if one in known] for label, definition in known.items()}
    order = Ancestry(named)
    made: dict[tuple[str, int], tuple[dict[str, Any], int]] = {}  # by label and depth: with its children, and its size

    def child(label: str, depth: int) -> tuple[dict[str, Any], int]:
        if (label, depth) not in made:
            made[label, depth] = completed(known[label], depth)
        return made[label, depth]

    def completed(definition: dict[str, Any], depth: int) -> tuple[dict[str, Any], int]:
        there = definition.get("workflows", {})
        missing = dict.fromkeys(one for one in _children_of(definition) if one in known and one not in there)
        lacking = [label for label in missing if not order.is_before(label, label)] if depth <= MAX_NESTING else []
        children = {label: child(label, depth + 1) for label in lacking}
        size = _size(definition) + sum(size for _, size in children.values())
        if size > MAX_LOOKED_AT_BYTES and lacking:
            raise DefinitionError([f"workflows: all that one holds is {size} bytes, at most {MAX_DEFINITION_BYTES}"])
        if not lacking:
            return definition, size
        return definition | {"workflows": {**there, **{label: inner for label, (inner, _) in children.items()}}}, size

    return [completed(definition, 1)[0] for definition in definitions]


def _size(definition: Mapping[str, Any]) -> int:
    try:
        return len(canonical.dumps(definition))
    except canonical.NotJsonError:  # said when it is judged
        return 0


def _children_of(definition: Mapping[str, Any]) -> list[str]:
    """Return the workflows that a definition, right or wrong, has runs of."""
    nodes = definition.get("nodes")
    listed = nodes.values() if isinstance(nodes, dict) else ()
    labels = [node.get("workflow") for node in listed if isinstance(node, dict)]
    return [label for label in [*labels, *_started_by_flows(definition)] if isinstance(label, str)]


def _started_by_flows(definition: Mapping[str, Any]) -> list[Any]:
    functions = definition.get("functions", {})
    listed: Iterable[Any] = functions.values() if isinstance(functions, Mapping) else ()
    named = [function.get("workflows", ()) for function in listed if isinstance(function, Mapping)]
    return [label for labels in named if isinstance(labels, Sequence) for label in labels]


def _nested_problems(definition: Mapping[str, Any], nesting: int, *, is_new: bool) -> list[str]:
    nested = definition.get("workflows", {})
    if nested and nesting >= MAX_NESTING:
        return [f"workflows: nested more than {MAX_NESTING} deep"]
    found = []
    for label, inner in nested.items():
        where = f"workflows.{label}"
        found += [f"{where}.{problem}" for problem in validate_definition(inner, nesting + 1, is_new=is_new)]
        own = f"{inner.get('name')}@{inner.get('version')}"
        if label != own and isinstance(inner.get("name"), str) and isinstance(inner.get("version"), str):
            found.append(f"{where}: is {own}")
    return found


@lru_cache(maxsize=1024)
def compile_definition(definition: str) -> Workflow:
    """Compile a definition's canonical JSON text; equal texts share one Workflow. Raises DefinitionError."""
    try:
        value = canonical.loads(definition)
    except canonical.NotJsonError as error:
        raise DefinitionError([f"definition: not JSON: {error}"]) from None
    problems = validate_definition(value, is_new=False)
    if problems:
        raise DefinitionError(problems)
    return pinned_definition(definition)


@lru_cache(maxsize=1024)
def pinned_definition(definition: str) -> Workflow:
    """Compile a definition that a log holds: it was judged when its run began, by the rules of that time."""
    return Workflow(msgspec.json.decode(definition, type=_Document), definition)


@lru_cache(maxsize=256)
def evolved(definition: str, changes: tuple[str, ...]) -> Workflow:
    """Return the graph that accepted changes, canonical JSON in order, have made of a pinned definition."""
    if not changes:
        return pinned_definition(definition)
    made = merged(canonical.loads(definition), changes)
    return Workflow(msgspec.json.decode(canonical.dumps(made), type=_Document), definition, graph_hash(made))
