"""Templates: JSON in which a string that is wholly `${ CEL }` stands for the value of that expression.

CEL is the Common Expression Language (github.com/google/cel-spec), side-effect free and always ending, which is why it may
be evaluated inside a decision. How long it takes is bounded by the expression's form only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any

# The package imports its interactive shell along with the evaluator: a quarter of a second of every process start, which an
# owner's partitions would wait for after each restart. An empty module in the shell's place leaves that out.
_shell = sys.modules.setdefault("cel.cli", ModuleType("cel.cli"))
import cel  # noqa: E402 - after the line above

if not hasattr(_shell, "__file__"):
    del sys.modules["cel.cli"]

from tidegate.domain import canonical  # noqa: E402 - as above

MAX_EXPRESSION_LENGTH = 4096
_MOST_CONTEXTS = 4  # that are kept at once: a large value takes many times its text
_LARGE = 4096  # characters of JSON: making less of it for each evaluation costs no more than keeping it
# Each macro over a list may multiply the work by the list's length, and an evaluation cannot be interrupted.
MAX_MACROS = 3
_LOCAL = re.compile(r"\.\s*(?:all|exists|exists_one|map|filter)\s*\(\s*([A-Za-z_][A-Za-z0-9_]*)\s*,")
_MACRO = re.compile(r"\.\s*(all|exists|exists_one|map|filter)\s*\(")
_TEXT = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_READ = re.compile(
    rf"(?<![\w.])nodes\b\s*(?:\[\s*(?P<quoted>{_TEXT})\s*\]|\.\s*(?P<name>[A-Za-z_]\w*)|(?P<all>))|{_TEXT}", re.DOTALL
)


class ExpressionError(ValueError):
    """An expression does not compile, or failed on the values it was given."""


def _expression_in(text: str) -> str | None:
    stripped = text.strip()
    if stripped.startswith("${") and stripped.endswith("}"):
        return stripped[2:-1].strip()
    return None


def is_expression(text: str) -> bool:
    """Tell whether a text of a template stands for the value of an expression."""
    return _expression_in(text) is not None


@lru_cache(maxsize=4096)
def compile_expression(source: str) -> cel.Program:
    """Compile a CEL expression; equal sources share a program. Raises ExpressionError."""
    if len(source) > MAX_EXPRESSION_LENGTH:
        raise ExpressionError(f"expression of {len(source)} characters (at most {MAX_EXPRESSION_LENGTH})")
    if len(_MACRO.findall(source)) > MAX_MACROS:
        raise ExpressionError(f"more than {MAX_MACROS} of all, exists, exists_one, map and filter in one expression")
    try:
        return cel.compile(source)
    except Exception as error:  # the parser reports with several exception types
        raise ExpressionError(f"{source!r} does not compile: {_one_line(error)}") from None


def evaluate(source: str, variables: Mapping[str, Any]) -> Any:
    """Evaluate a CEL expression over plain JSON values. Raises ExpressionError."""
    program = compile_expression(source)
    try:
        return program.execute(dict(variables))
    except Exception as error:  # unknown names, wrong types, custom failures: several exception types
        raise ExpressionError(f"{source!r} failed: {_one_line(error)}") from None


_Texts = tuple[tuple[str, str], ...]  # names and JSON texts


class Values:
    """What an expression looks at: variables whose values are JSON texts, `nodes`, and others.

    What it does not name is not made for it. Making a large value costs far more than most expressions do: it is made once for all
    expressions of a decision, which share `contexts`, and for those of other decisions, too, if they look at nothing else.
    """

    __slots__ = ("_contexts", "_more", "_nodes", "_texts")

    def __init__(
        self,
        texts: Mapping[str, str],
        nodes: Mapping[str, str],
        more: Mapping[str, Any],
        contexts: dict[Any, cel.Context],
    ) -> None:
        self._texts = tuple(texts.items())
        self._nodes = tuple(sorted(nodes.items()))
        self._more = more
        self._contexts = contexts

    def evaluate(self, source: str) -> Any:
        """Evaluate a CEL expression. Raises ExpressionError, NotJsonError."""
        named = variables_of(source)
        texts = tuple(item for item in self._texts if item[0] in named)
        nodes = self._nodes if "nodes" in named else None
        more = {name: value for name, value in self._more.items() if name in named}
        if sum(len(text) for _, text in (*texts, *(nodes or ()))) < _LARGE:
            return evaluate(source, _values_of(texts, nodes) | more)
        if not more:
            return evaluate_in(source, _shared_context(texts, nodes))
        key = (texts, nodes, tuple(more))
        if key not in self._contexts:
            if len(self._contexts) == _MOST_CONTEXTS:
                self._contexts.clear()
            self._contexts[key] = _context_of(texts, nodes)
        context = self._contexts[key]
        for name, value in more.items():
            context.add_variable(name, value)
        return evaluate_in(source, context)


def _values_of(texts: _Texts, nodes: _Texts | None) -> dict[str, Any]:
    found = {name: canonical.loads(text) for name, text in texts}
    if nodes is not None:
        found["nodes"] = {name: canonical.loads(text) for name, text in nodes}
    return found


def _context_of(texts: _Texts, nodes: _Texts | None) -> cel.Context:
    context = cel.Context()
    for name, value in _values_of(texts, nodes).items():
        context.add_variable(name, value)
    return context


@lru_cache(maxsize=_MOST_CONTEXTS)
def _shared_context(texts: _Texts, nodes: _Texts | None) -> cel.Context:
    """Return a context that nobody changes."""
    return _context_of(texts, nodes)


@lru_cache(maxsize=4096)
def variables_of(source: str) -> frozenset[str]:
    """Return the names that an expression looks at, those that its macros bind included. Raises ExpressionError."""
    return frozenset(compile_expression(source).variables())


def lazy_context(value_of: Callable[[str], Any]) -> cel.Context:
    """Return a context whose variables are asked for when an expression first needs them; None means there is none."""
    context = cel.Context()
    context.set_variable_resolver(value_of)
    return context


def evaluate_in(source: str, context: cel.Context) -> Any:
    """Evaluate a CEL expression in a context. Raises ExpressionError."""
    program = compile_expression(source)
    try:
        return program.execute(context)
    except Exception as error:
        raise ExpressionError(f"{source!r} failed: {_one_line(error)}") from None


def problems(template: Any, where: str) -> list[str]:
    """Return what is wrong with the expressions of a template, each with its place."""
    return list(_problems(template, where))


def _problems(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, str) and (source := _expression_in(value)) is not None:
        try:
            compile_expression(source)
        except ExpressionError as error:
            yield f"{path}: {error}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _problems(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, f"{path}[{index}]")


def source_of(text: str) -> str:
    """Return the expression that a field which is always one holds, with `${ }` around it or without."""
    found = _expression_in(text)
    return text.strip() if found is None else found


@lru_cache(maxsize=4096)
def nodes_read(source: str) -> frozenset[str] | None:
    """Return the nodes whose outputs an expression looks at; None if it looks at `nodes` as a whole, so at any of them."""
    if "nodes" not in source:
        return frozenset()
    names: set[str] = set()
    for found in _READ.finditer(source):
        if found["all"] is not None:
            return None
        if found["quoted"] is not None:
            names.add(found["quoted"][1:-1])
        elif found["name"] is not None:
            names.add(found["name"])
    return frozenset(names)


def reads(source: str, name: str) -> bool:
    """Tell whether an expression looks at a variable, such as `input`, by its text; what stands in quotes is no variable."""
    return any(found.group() == name for found in re.finditer(rf"(?<![\w.]){re.escape(name)}\b|{_TEXT}", source))


def nodes_read_by(template: Any) -> frozenset[str] | None:
    """Return the same for all expressions of a template together."""
    names: set[str] = set()
    for source in sources(template):
        read = nodes_read(source)
        if read is None:
            return None
        names |= read
    return frozenset(names)


@lru_cache(maxsize=64)
def _is_type(name: str) -> bool:
    """Tell whether a name that is no variable has a value of its own, as the names of types have."""
    try:
        compile_expression(name).execute({})
    except Exception:  # of several types
        return False
    return True


def unknown_variables(source: str, known: Collection[str]) -> list[str]:
    """Return the variables of an expression that are not among the known ones and that its macros do not bind.

    An expression that does not compile has none.
    """
    try:
        names = variables_of(source)
    except ExpressionError:
        return []
    unknown = names.difference(known, _LOCAL.findall(source))
    return sorted(name for name in unknown if not _is_type(name))


def sources(template: Any) -> Iterator[str]:
    """Yield the expressions of a template."""
    if isinstance(template, str):
        source = _expression_in(template)
        if source is not None:
            yield source
    elif isinstance(template, dict):
        for item in template.values():
            yield from sources(item)
    elif isinstance(template, list):
        for item in template:
            yield from sources(item)


def render(template: Any, value_of: Callable[[str], Any]) -> Any:
    """Return the template with every expression replaced by its value. Raises what `value_of` raises."""
    if isinstance(template, str):
        source = _expression_in(template)
        return template if source is None else value_of(source)
    if isinstance(template, dict):
        return {key: render(item, value_of) for key, item in template.items()}
    if isinstance(template, list):
        return [render(item, value_of) for item in template]
    return template


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
