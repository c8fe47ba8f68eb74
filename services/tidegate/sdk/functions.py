"""Functions of an app, and how their calls are run."""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypedDict

from tidegate.domain import retries
from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.isolation import IN_PROCESS, ISOLATIONS, SUBPROCESS
from tidegate.domain.strict_schema import Validator, shape_problem
from tidegate.domain.workflow import DEFAULT_MAX_STEPS
from tidegate.sdk.binding import AGENT, FLOW, TOOL, Binder
from tidegate.sdk.errors import AppError

DEFAULT_QUEUE: Final = "default"
DEFAULT_TIMEOUT_S: Final = 30.0
DEFAULT_AGENT_TIMEOUT_S: Final = 120.0
DEFAULT_RETRIES: Final = 4
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
        self.file_version = file_version(call)
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


def file_version(call: Callable[..., Any]) -> str:
    """Return the first digits of the SHA-256 of the file with a function, as it is when the function is registered."""
    made = inspect.unwrap(call)
    code = getattr(made, "__code__", None) or getattr(type(made).__call__, "__code__", None)
    try:
        return hashlib.sha256(Path(code.co_filename).read_bytes()).hexdigest()[:12] if code is not None else ""
    except OSError:  # made by `exec`, say
        return ""


def checked_name(what: str, name: str) -> str:
    if not isinstance(name, str) or not _name.fullmatch(name):
        raise AppError(f"{what} name {name!r}: a letter or underscore, then letters, digits, _ . or -, at most 64")
    return name


def made_settings(kind: str, name: str, options: dict[str, Any]) -> Settings:
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
    checked_name("queue", settings.queue)
    return settings


def _retry_problems(settings: Settings) -> list[str]:
    """Return what is wrong with the lists and rules of error classes, by the schema that definitions are judged by."""
    said = {name: found for name, found in settings.to_definition().items() if name in retries.PROPERTIES}
    schema = {"type": "object", "properties": retries.PROPERTIES}
    shape = [
        f"{'.'.join(map(str, error.absolute_path))}: {shape_problem(error)}"
        for error in Validator(schema).iter_errors(said)
    ]
    return shape or [problem.lstrip(".") for problem in retries.problems(said, "")]


def _class_names(where: str, classes: ErrorClasses) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise AppError(f"{where} must be a list of exceptions or of names of their classes")
    names = tuple(item.__name__ if isinstance(item, type) else item for item in classes)
    if not all(isinstance(name, str) and name for name in names):
        raise AppError(f"{where} must be a list of exceptions or of names of their classes")
    return names
