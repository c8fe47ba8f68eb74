"""How the recorded arguments of a call become the arguments of a Python function, checked against its signature.

- tool: an object whose members are the arguments.
- step with one parameter: that parameter is the whole input. With several: the input is an object whose members are
  the arguments. Without any: the input is ignored.
- agent: its one parameter is the State.
- flow: its input is bound as a step's, in each turn; what is bound here is the record of the turns before.

Annotations are enforced by pydantic as for JSON: a `date` is read from text, a model from an object; no annotation accepts
anything.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pydantic
import pydantic.errors

from tidegate.domain import canonical
from tidegate.sdk.errors import AppError, BadArgumentsError
from tidegate.sdk.plan import State

STEP: Final = "step"
AGENT: Final = "agent"
TOOL: Final = "tool"
FLOW: Final = "flow"
MAX_PROBLEMS: Final = 10


class Bound(NamedTuple):
    """Arguments, ready for the call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Binder:
    """Binds the arguments of one function; made once, used for every call. Thread-safe."""

    def __init__(self, kind: str, call: Callable[..., Any]) -> None:
        """Raises AppError if the signature cannot be called with the arguments of this kind."""
        self._kind = kind
        self._value: pydantic.TypeAdapter[Any] | None = None
        self._members: pydantic.TypeAdapter[Any] | None = None
        if kind == FLOW:
            return
        signature, hints = _signature(kind, call)
        self._names = tuple(signature.parameters)
        if kind == AGENT and len(self._names) != 1:
            raise AppError(f"an agent takes one parameter, its State; this takes {len(self._names)}")
        try:
            if kind == STEP and len(self._names) == 1:
                self._value = pydantic.TypeAdapter(hints.get(self._names[0], Any))
            elif kind == TOOL or (kind == STEP and self._names):
                captured: Any = _capture(call, signature, hints)
                self._members = pydantic.TypeAdapter(captured)
        except pydantic.errors.PydanticUserError as error:
            raise AppError(f"its annotations cannot be checked: {error.message}") from None

    def parameters(self) -> dict[str, Any]:
        """Return the JSON Schema of the arguments. Raises AppError if an annotation has none."""
        if self._members is None:
            return {"type": "object"}
        try:
            return self._members.json_schema()
        except pydantic.errors.PydanticUserError as error:
            raise AppError(f"its parameters have no JSON Schema: {error.message}") from None

    def bind(self, arguments: str) -> Bound:
        """Return the arguments for a call from their JSON text. Raises BadArgumentsError with a readable message."""
        try:
            if self._kind == FLOW:
                return Bound((canonical.loads(arguments),), {})
            if self._kind == AGENT:
                return Bound((State.from_json(canonical.loads(arguments)),), {})
            if self._value is not None:
                return Bound((self._value.validate_json(arguments),), {})
            if self._members is None:
                return Bound((), {})
            if not arguments.lstrip().startswith("{"):
                raise BadArgumentsError(f"expected an object with the members {', '.join(self._names)}")
            return Bound(*self._members.validate_json(arguments))
        except pydantic.ValidationError as error:
            raise BadArgumentsError(_readable(error)) from None
        except (KeyError, TypeError, canonical.NotJsonError) as error:
            raise BadArgumentsError(f"not the State of an agent: {type(error).__name__}: {error}") from None


def _signature(kind: str, call: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    try:
        signature = inspect.signature(call)
        hints = {} if kind == AGENT else _hints(call)
    except (NameError, TypeError, ValueError) as error:
        raise AppError(f"its signature cannot be read: {error}") from None
    for name, parameter in signature.parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise AppError(f"parameter {parameter} must have a name and be passed by it: no *args, **kwargs or /")
        if name.startswith("_"):
            raise AppError(f"parameter {name!r} must not begin with an underscore")
    return signature, hints


def _hints(call: Any) -> dict[str, Any]:
    """Return the resolved annotations of the parameters; that of the result does not matter."""
    while isinstance(call, functools.partial):
        call = call.func
    if not hasattr(call, "__annotations__"):
        call = type(call).__call__
    plain = inspect.unwrap(call)
    annotations = {name: hint for name, hint in call.__annotations__.items() if name != "return"}
    parameters = types.SimpleNamespace(__annotations__=annotations)
    return typing.get_type_hints(parameters, globalns=getattr(plain, "__globals__", {}), include_extras=True)


def _capture(call: Callable[..., Any], signature: inspect.Signature, hints: dict[str, Any]) -> Callable[..., Any]:
    """Return a function with the signature of `call` that only hands back what it was given, checked."""

    def captured(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    captured.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect and pydantic look for it
        parameters=[
            parameter.replace(annotation=hints.get(name, Any), kind=parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
        ],
        return_annotation=Any,
    )
    captured.__annotations__ = {name: hints.get(name, Any) for name in signature.parameters}
    captured.__module__ = getattr(call, "__module__", __name__)
    return captured


def _readable(error: pydantic.ValidationError) -> str:
    found = []
    for problem in error.errors(include_url=False, include_context=False)[:MAX_PROBLEMS]:
        where = ".".join(str(part) for part in problem["loc"]) or "input"
        if problem["type"].startswith("missing"):
            found.append(f"{where}: is missing")
        elif problem["type"] == "unexpected_keyword_argument":
            found.append(f"{where}: there is no such parameter")
        else:
            found.append(f"{where}: {problem['msg']}, not {problem['input']!r:.80}")
    if error.error_count() > MAX_PROBLEMS:
        found.append(f"and {error.error_count() - MAX_PROBLEMS} more")
    return "; ".join(found)
