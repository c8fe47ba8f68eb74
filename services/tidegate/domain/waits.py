"""Waits: nodes that run nothing and hold their branch until an event, a time or a person comes. Pure.

A node of one of these kinds has its settings under `wait`. What they say may be templates; they are bound when the wait
begins, and the bound values are recorded, so that nothing that happens later changes what is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from tidegate.domain import canonical, expressions
from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.schemas import NOTHING_ELSEWHERE, schema_problems
from tidegate.domain.strict_schema import StrictValidator, Validator, first_problems, shape_problem

EVENT: Final = "wait_event"
UNTIL: Final = "wait_until"
SLEEP: Final = "sleep"
ASK: Final = "ask"
OUTSIDE: Final = "outside"  # a tool that somebody outside does: no node, but what an agent's call of it becomes
KINDS: Final = frozenset({EVENT, UNTIL, SLEEP, ASK})
TIMES: Final = frozenset({UNTIL, SLEEP})  # they end by themselves, and hand on their input

FAIL: Final = "fail"
VALUE: Final = "value"

MAX_KEY: Final = 512
MAX_PROMPT: Final = 8_192
MAX_CHOICES: Final = 100
MAX_CHOICE: Final = 512
MAX_SECONDS: Final = 20 * 366 * 24 * 3600
LATEST_MS: Final = 4_102_444_800_000  # the year 2100: what databases can show

SETTINGS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "event": {"type": "string", "pattern": NAME_PATTERN},
        "key": {"type": ["string", "number"]},
        "at": {"type": "string", "minLength": 1},
        "seconds": {"type": ["number", "string"], "minimum": 0, "maximum": MAX_SECONDS},
        "prompt": {"type": "string", "minLength": 1},
        "choices": {
            "type": ["array", "string"],
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_CHOICE},
            "minItems": 1,
            "maxItems": MAX_CHOICES,
        },
        "free_text": {"type": "boolean"},
        "schema": {"type": ["object", "boolean"]},
        "timeout_s": {"type": ["number", "string"], "minimum": 0, "maximum": MAX_SECONDS},
        "on_timeout": {"enum": [FAIL, VALUE]},
        "timeout_value": {},
    },
}
_settings: Final = StrictValidator(SETTINGS_SCHEMA)
_OF_ALL: Final = frozenset({"timeout_s", "on_timeout", "timeout_value"})
_OF_KIND: Final[dict[str, tuple[frozenset[str], frozenset[str]]]] = {  # kind -> what it must have, what it may have
    EVENT: (frozenset({"event"}), frozenset({"key"})),
    UNTIL: (frozenset({"at"}), frozenset()),
    SLEEP: (frozenset({"seconds"}), frozenset()),
    ASK: (frozenset({"prompt"}), frozenset({"choices", "free_text", "schema"})),
}


class Settings(msgspec.Struct, frozen=True):
    """The settings of a wait as a definition has them; `KINDS` use those that concern them.

    event, key: name and correlation key of the event. at: a time in RFC 3339, with its offset. seconds: how long.
    prompt, choices, free_text, schema: what is asked, and what counts as an answer (see `answer_problem`).
    timeout_s: after how long it is given up; on_timeout: `fail`, or `value` for going on with `timeout_value`.
    """

    event: str = ""
    key: Any = ""
    at: Any = ""
    seconds: Any = 0
    prompt: Any = ""
    choices: Any = ()
    free_text: bool | None = None
    schema: Any = True
    timeout_s: Any = None
    on_timeout: str = FAIL
    timeout_value: Any = None


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A wait with its templates filled in.

    due_ms: when it ends by itself, if that is a time; after_ms: if that is so long after its beginning. timeout_ms: after how
    long it is given up. schema, timeout_value: JSON texts; an empty schema is none.
    """

    event: str = ""
    key: str = ""
    prompt: str = ""
    choices: tuple[str, ...] = ()
    free_text: bool = False
    schema: str = ""
    due_ms: int | None = None
    after_ms: int | None = None
    timeout_ms: int | None = None
    on_timeout: str = FAIL
    timeout_value: str = "null"


class WaitError(ValueError):
    """What a template of a wait gave is nothing that could be waited for."""


# --- definitions ---------------------------------------------------------------


def definition_problems(node_id: str, node: Mapping[str, Any]) -> list[str]:
    """Return everything that is wrong with a wait node whose form `SETTINGS_SCHEMA` has checked."""
    where, kind, given = f"nodes.{node_id}", node["kind"], node.get("wait", {})
    found = _settings_problems(f"{where}.wait", kind, given)
    if "function" in node:
        found.append(f"{where}: {kind} runs no function")
    if "input" in node and kind not in TIMES:
        found.append(f"{where}: {kind} has no input: its output is what it waits for")
    for name in ("seconds", "timeout_s", "choices"):
        if isinstance(given.get(name), str) and not expressions.is_expression(given[name]):
            found.append(f"{where}.wait.{name}: a text here must be an expression: ${{ … }}")
    at = given.get("at", "")
    if at and not expressions.is_expression(at):
        found += _problem_of(lambda: _moment_ms(at, f"{where}.wait.at"))
    templates = {name: value for name, value in given.items() if name != "schema"}
    return found + expressions.problems(templates, f"{where}.wait")


def _settings_problems(where: str, kind: str, given: Mapping[str, Any]) -> list[str]:
    wanted, allowed = _OF_KIND[kind]
    found = [f"{where}: {kind} must say `{name}`" for name in sorted(wanted - given.keys())]
    foreign = sorted(given.keys() - wanted - allowed - _OF_ALL)
    found += [f"{where}.{name}: {kind} has no such setting" for name in foreign]
    if given.get("on_timeout") == VALUE and "timeout_s" not in given:
        found.append(f"{where}.on_timeout: it needs `timeout_s`")
    if "timeout_value" in given and given.get("on_timeout") != VALUE:
        found.append(f"{where}.timeout_value: it needs `on_timeout: value`")
    is_closed = given.get("free_text") is False and "choices" not in given and "schema" not in given
    if kind == ASK and is_closed:
        found.append(f"{where}.free_text: without it the question needs `choices` or a `schema`")
    return found


def call_problem(kind: str, given: Any) -> str | None:
    """Return what is wrong with the settings of a wait that a flow calls for, or None. They are values: no part is a template."""
    found = sorted(
        f"{kind}{''.join(f'.{part}' for part in error.absolute_path)}: {shape_problem(error)}"
        for error in _settings.iter_errors(given)
    )
    found = found or _settings_problems(kind, kind, given)
    found = found or _problem_of(lambda: bind_values(kind, given))
    if not found and "schema" in given:
        found = schema_problems(f"{kind}.schema", given["schema"])
    return "; ".join(found[:10]) or None


def bind_values(kind: str, given: Mapping[str, Any]) -> Bound:
    """Return the wait that settings without templates say. Raises WaitError."""
    return bind(kind, Settings(**given), kind, lambda value: value)


def schemas(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON Schemas of a definition's questions by their place."""
    return {
        f"nodes.{node_id}.wait.schema": node["wait"]["schema"]
        for node_id, node in definition["nodes"].items()
        if "schema" in node.get("wait", {})
    }


def _problem_of(act: Callable[[], object]) -> list[str]:
    try:
        act()
    except WaitError as error:
        return [str(error)]
    return []


# --- binding ---------------------------------------------------------------


def bind(kind: str, settings: Settings, where: str, render: Callable[[Any], Any]) -> Bound:
    """Return the wait with its templates filled in by `render`. Raises WaitError, and what `render` raises."""
    is_ask = kind == ASK
    # None at all is no choices; a template that gives none was meant to give some.
    choices = _choices(render(_listed(settings.choices)), f"{where}: choices") if is_ask and settings.choices else ()
    free_text = settings.free_text if settings.free_text is not None else not choices
    has_timeout, has_value = settings.timeout_s is not None, settings.on_timeout == VALUE
    return Bound(
        event=settings.event,
        key=_key(render(settings.key), f"{where}: key"),
        prompt=_text(render(settings.prompt), f"{where}: prompt", MAX_PROMPT),
        choices=choices,
        free_text=is_ask and free_text,
        schema="" if settings.schema is True else canonical.dumps(settings.schema),
        due_ms=_moment_ms(render(settings.at), f"{where}: at") if kind == UNTIL else None,
        after_ms=_duration_ms(render(settings.seconds), f"{where}: seconds") if kind == SLEEP else None,
        timeout_ms=_duration_ms(render(settings.timeout_s), f"{where}: timeout_s") if has_timeout else None,
        on_timeout=settings.on_timeout,
        timeout_value=canonical.dumps(render(settings.timeout_value)) if has_value else "null",
    )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any, where: str, most: int) -> str:
    if not isinstance(value, str):
        raise WaitError(f"{where}: must be a text, is {_shown(value)}")
    if len(value) > most:
        raise WaitError(f"{where}: {len(value)} characters, at most {most}")
    return value


def _key(value: Any, where: str) -> str:
    """Return a correlation key as a text: whole numbers as they are written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = canonical.dumps(value)
    return _text(value, where, MAX_KEY)


def _choices(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_CHOICES or "" in value:
        raise WaitError(f"{where}: must be a list of 1 to {MAX_CHOICES} texts that are not empty, is {_shown(value)}")
    return tuple(_text(choice, where, MAX_CHOICE) for choice in value)


def _duration_ms(value: Any, where: str) -> int:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or not 0 <= seconds <= MAX_SECONDS:
        raise WaitError(f"{where}: must be a number of seconds from 0 to {MAX_SECONDS}, is {_shown(value)}")
    return int(seconds * 1000)


def _moment_ms(value: Any, where: str) -> int:
    """Return Unix milliseconds of an RFC 3339 text, or of what CEL's `timestamp` gives."""
    moment = value
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise WaitError(f"{where}: must be a time such as 2030-01-31T09:00:00Z, with its offset, is {_shown(value)}")
    at_ms = int(moment.timestamp() * 1000)
    if not 0 <= at_ms < LATEST_MS:
        raise WaitError(f"{where}: must be between 1970 and 2100, is {_shown(value)}")
    return at_ms


def _shown(value: Any) -> str:
    return repr(value)[:100]


# --- answers ---------------------------------------------------------------


def answer_problem(value: Any, choices: tuple[str, ...], free_text: bool, schema: str) -> str | None:
    """Return why a value is no answer to a question, or None.

    Every answer must fit the schema, if there is one. A text must be one of the choices, unless free text is taken; another
    value is taken only if a schema says what it must be, and there are no choices.
    """
    if schema and (problem := _schema_problem(value, schema)) is not None:
        return problem
    if isinstance(value, str):
        if value in choices or (free_text and value.strip()) or (schema and not choices):
            return None
        return f"must be one of {', '.join(map(repr, choices))}" if choices else "must not be empty"
    if schema and not choices:
        return None
    return f"must be {'one of ' + ', '.join(map(repr, choices)) if choices else 'a text'}, is {_shown(value)}"


def output_problem(value: Any, schema: str) -> str | None:
    """Return why a value is no output of an outside tool, or None. schema: what it declares; empty if that is nothing."""
    return _schema_problem(value, schema) if schema else None


def _schema_problem(value: Any, schema: str) -> str | None:
    return first_problems(Validator(canonical.loads(schema), registry=NOTHING_ELSEWHERE), value, "answer")
