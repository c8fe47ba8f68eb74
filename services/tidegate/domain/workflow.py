"""Workflow definitions: what may be published, and the compiled form that scheduling works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import jsonschema
import msgspec
import referencing
from referencing.jsonschema import DRAFT202012

from tidegate.domain import canonical, expressions, waits
from tidegate.domain.identity import NAME_PATTERN

MAX_DEFINITION_BYTES: Final = 512 * 1024
DEFAULT_MAX_STEPS: Final = 50
# Only what a schema itself holds: nothing is ever fetched, because a decision has no inputs but those in the log.
_NOTHING_ELSEWHERE: Final[referencing.Registry[Any]] = referencing.Registry()
_VALUES_NOT_SCHEMAS: Final = frozenset(("const", "default", "enum", "examples"))
AGENT_PREFIX: Final = "agent:"

_name = {"type": "string", "pattern": NAME_PATTERN}
_label = {"type": "string", "maxLength": 128}
_count = {"type": "integer", "minimum": 0, "maximum": 2**53}
_error_classes = {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 200}, "maxItems": 100}

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
                    "kind": {"enum": ["step", "agent", *sorted(waits.KINDS)]},
                    "function": _name,
                    "input": {},
                    "wait": waits.SETTINGS_SCHEMA,
                },
            },
        },
        "edges": {
            "type": "array",
            "items": {"type": "array", "items": _name, "minItems": 2, "maxItems": 2},
        },
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
                    "kind": {"enum": ["step", "agent", "tool"]},
                    "queue": _name,
                    "timeout_ms": {"type": "integer", "minimum": 1, "maximum": 7 * 24 * 3_600_000},
                    "max_attempts": {"type": "integer", "minimum": 1, "maximum": 1000},
                    "backoff_ms": {"type": "integer", "minimum": 1, "maximum": 24 * 3_600_000},
                    "backoff_factor": {"type": "number", "minimum": 1, "maximum": 100},
                    "backoff_max_ms": {"type": "integer", "minimum": 1, "maximum": 7 * 24 * 3_600_000},
                    "retry_on": _error_classes,
                    "no_retry_on": _error_classes,
                    "reserve_micros": _count,
                    "idempotent": {"type": "boolean"},
                    "provider": _label,
                    "model": _label,
                    "operation": _label,
                    "prefer": _label,
                    "description": {"type": "string"},
                    "parameters": {"type": ["object", "boolean"]},
                    "tools": {"type": "array", "items": _name},
                },
            },
        },
        "max_steps": {"type": "integer", "minimum": 1, "maximum": 100_000},
    },
}

_validator = jsonschema.Draft202012Validator(DEFINITION_SCHEMA)


class DefinitionError(ValueError):
    """The definition cannot run; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Function(msgspec.Struct, frozen=True):
    """A function of an app as a workflow pins it. Times in milliseconds, money in micro-dollars.

    retry_on: names of the error classes after which it is repeated; none for all. no_retry_on: those after which it is not.
    """

    kind: str
    queue: str = "default"
    timeout_ms: int = 30_000
    max_attempts: int = 5
    backoff_ms: int = 200
    backoff_factor: float = 2.0
    backoff_max_ms: int = 60_000
    retry_on: tuple[str, ...] = ()
    no_retry_on: tuple[str, ...] = ()
    reserve_micros: int = 0
    idempotent: bool = True
    provider: str = ""
    model: str = ""
    operation: str = ""
    prefer: str = ""
    description: str = ""
    parameters: Any = True
    tools: tuple[str, ...] = ()


class Node(msgspec.Struct, frozen=True):
    """A vertex. `input` is a template; UNSET for the default binding. function: of a step or agent. wait: of the others."""

    kind: str
    function: str = ""
    input: Any = msgspec.UNSET
    wait: waits.Settings = waits.Settings()


class _Document(msgspec.Struct, frozen=True):
    name: str
    version: str
    nodes: dict[str, Node]
    functions: dict[str, Function]
    edges: tuple[tuple[str, str], ...] = ()
    output: Any = msgspec.UNSET
    input_schema: Any = True
    max_steps: int = DEFAULT_MAX_STEPS


class Workflow:
    """A compiled definition: immutable, shared by all runs of the same definition hash. `definition` is its text."""

    __slots__ = (
        "_input_validator",
        "_parameters",
        "definition",
        "definition_hash",
        "document",
        "predecessors",
        "roots",
        "sinks",
        "successors",
    )

    def __init__(self, document: _Document, definition: str) -> None:
        self.document = document
        self.definition = definition
        self.definition_hash = canonical.digest(definition)
        self.predecessors: dict[str, tuple[str, ...]] = dict.fromkeys(document.nodes, ())
        self.successors: dict[str, tuple[str, ...]] = dict.fromkeys(document.nodes, ())
        before: dict[str, list[str]] = {node: [] for node in document.nodes}
        after: dict[str, list[str]] = {node: [] for node in document.nodes}
        for source, target in document.edges:
            after[source].append(target)
            before[target].append(source)
        self.predecessors = {node: tuple(ids) for node, ids in before.items()}
        self.successors = {node: tuple(ids) for node, ids in after.items()}
        self.roots = tuple(node for node, ids in before.items() if not ids)
        self.sinks = tuple(node for node, ids in after.items() if not ids)
        self._input_validator = _schema_validator(document.input_schema)
        self._parameters: dict[str, jsonschema.Draft202012Validator | None] = {}

    @property
    def label(self) -> str:
        """Return `name@version`."""
        return f"{self.document.name}@{self.document.version}"

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


def _schema_validator(schema: Any) -> jsonschema.Draft202012Validator | None:
    return None if schema is True else jsonschema.Draft202012Validator(schema, registry=_NOTHING_ELSEWHERE)


def _problem(validator: jsonschema.Draft202012Validator | None, value: Any, name: str) -> str | None:
    if validator is None:
        return None
    try:
        found = [
            f"{name}{''.join(f'[{part!r}]' for part in error.absolute_path)}: {error.message[:300]}"
            for error in validator.iter_errors(value)
        ]
    except Exception as error:  # endless references, numbers that do not fit its arithmetic: many types
        return f"{name} cannot be checked: {type(error).__name__}: {error}"[:300]
    return "; ".join(sorted(found)[:10]) or None


def validate_definition(definition: Any) -> list[str]:
    """Return everything that is wrong with a definition, in one go; an empty list means that it can run."""
    shape = [
        f"{'.'.join(map(str, error.absolute_path)) or 'definition'}: {error.message[:300]}"
        for error in _validator.iter_errors(definition)
    ]
    if shape:
        return sorted(shape)
    # The `$` of a pattern also matches before a line feed at the end.
    names = (definition["name"], definition["version"], *definition["nodes"], *definition["functions"])
    if broken := [name for name in names if name.endswith("\n")]:
        return [f"definition: {name!r} ends with a line feed" for name in sorted(broken)]
    found = _schema_problems(definition) + _graph_problems(definition) + _function_problems(definition)
    found += [
        problem
        for node_id, node in definition["nodes"].items()
        for problem in expressions.problems(node.get("input"), f"nodes.{node_id}.input")
    ]
    found += expressions.problems(definition.get("output"), "output")
    size = len(canonical.dumps(definition).encode())
    if size > MAX_DEFINITION_BYTES:
        found.append(f"definition: {size} bytes, at most {MAX_DEFINITION_BYTES}")
    return found


def _schema_problems(definition: Mapping[str, Any]) -> list[str]:
    schemas = {"input_schema": definition.get("input_schema", True), **waits.schemas(definition)}
    for name, function in definition["functions"].items():
        schemas[f"functions.{name}.parameters"] = function.get("parameters", True)
    found = []
    for where, schema in schemas.items():
        try:
            jsonschema.Draft202012Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            found.append(f"{where}: not a JSON Schema: {error.message[:300]}")
            continue
        resolver = _NOTHING_ELSEWHERE.resolver_with_root(DRAFT202012.create_resource(schema))
        for reference in sorted(set(_references(schema))):
            try:
                resolver.lookup(reference)
            except Exception:
                found.append(f"{where}: $ref {reference[:200]!r} names nothing in this schema")
    return found


def _references(schema: Any) -> Iterator[str]:
    """Yield what the schema refers to, wherever it does."""
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key in {"$ref", "$dynamicRef"} and isinstance(value, str):
                yield value
            elif key not in _VALUES_NOT_SCHEMAS:
                yield from _references(value)


def _function_problems(definition: Mapping[str, Any]) -> list[str]:
    functions = definition["functions"]
    found = []
    for node_id, node in definition["nodes"].items():
        if node["kind"] in waits.KINDS:
            found += waits.definition_problems(node_id, node)
            continue
        if "wait" in node:
            found.append(f"nodes.{node_id}.wait: a {node['kind']} does not wait")
        if "function" not in node:
            found.append(f"nodes.{node_id}: a {node['kind']} must name its `function`")
            continue
        function = functions.get(node["function"])
        if function is None:
            found.append(
                f"nodes.{node_id}: unknown function {node['function']!r} (known: {', '.join(functions) or 'none'})"
            )
        elif function["kind"] != node["kind"]:
            found.append(f"nodes.{node_id}: {node['function']!r} is a {function['kind']}, not a {node['kind']}")
    for name, function in functions.items():
        for tool in function.get("tools", ()):
            if functions.get(tool, {}).get("kind") != "tool":
                found.append(f"functions.{name}.tools: {tool!r} is not a tool of this definition")
    return found


def _graph_problems(definition: Mapping[str, Any]) -> list[str]:
    nodes = definition["nodes"]
    edges = [tuple(edge) for edge in definition.get("edges", ())]
    found = [f"edges: {a} -> {b} names an unknown node" for a, b in edges if a not in nodes or b not in nodes]
    found += (
        [f"edges: {a} -> {b} is there twice" for a, b in sorted({e for e in edges if edges.count(e) > 1})]
        if len(set(edges)) != len(edges)
        else []
    )
    if found:
        return found
    waiting_for = dict.fromkeys(nodes, 0)
    after: dict[str, list[str]] = {node: [] for node in nodes}
    for source, target in edges:
        waiting_for[target] += 1
        after[source].append(target)
    free = [node for node, count in waiting_for.items() if count == 0]
    while free:
        for target in after[free.pop()]:
            waiting_for[target] -= 1
            if waiting_for[target] == 0:
                free.append(target)
    stuck = sorted(node for node, count in waiting_for.items() if count > 0)
    return [f"edges: a cycle keeps these nodes from ever starting: {', '.join(stuck)}"] if stuck else []


@lru_cache(maxsize=1024)
def compile_definition(definition: str) -> Workflow:
    """Compile a definition's canonical JSON text; equal texts share one Workflow. Raises DefinitionError."""
    try:
        value = canonical.loads(definition)
    except canonical.NotJsonError as error:
        raise DefinitionError([f"definition: not JSON: {error}"]) from None
    problems = validate_definition(value)
    if problems:
        raise DefinitionError(problems)
    return Workflow(msgspec.convert(value, _Document), definition)
