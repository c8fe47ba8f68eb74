"""The generated references: `docs/configuration.md`, `.env.example`, `docs/metrics.md`. `python -m tidegate.reference` writes.

They are made of the settings classes and of the metrics' declarations, and a test compares them: neither can be forgotten.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args, get_origin

import annotated_types
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

import tidegate
from tidegate import metrics, metrics_use

ROOT: Final = Path(__file__).resolve().parents[2]

_UNITS: Final = {
    "_s": "s",
    "_ms": "ms",
    "_h": "h",
    "_minutes": "min",
    "_bytes": "bytes",
    "_mb": "MiB",
    "_mib": "MiB",
    "_millis": "1/1000 of a processor",
    "_rows": "rows",
    "_entries": "entries",
    "_micros": "micro-dollars",
}
# Read without a settings class: by the command line, by development, or by Kubernetes for us.
OTHER_VARIABLES: Final = {
    "TIDEGATE_GATEWAY_URL": (
        "",
        "Where `tidegate runs` and `tidegate figures` ask the live view; without it `gateway.json` in the data folder.",
    ),
    "TIDEGATE_SQL_URL": ("", "Where `tidegate sql` asks; without it the ClickHouse server, or `sql.json`."),
    "TIDEGATE_EXECUTOR_APP": ("", "The app of `tidegate executor`: `module:attribute` or `file.py:attribute`."),
    "TIDEGATE_SMOKE_QUEUE": ("smoke", "The queue that the app of `tidegate smoke` is on; set by that command."),
    "TIDEGATE_CACHE_DIR": ("~/.cache/tidegate", "Where the embedded Kafka's jars and start-up cache are kept."),
    "TIDEGATE_STATEFUL_POD": (
        "",
        "`NAMESPACE/NAME` of this process's pod of a StatefulSet: proof that its predecessor is dead. The chart sets it.",
    ),
    "TIDEGATE_FAILPOINTS": ("", "For tests: where this process is to be killed, stopped or delayed."),
}
# Not settings: beginnings of names, what demos tell their own processes, and executors their Jobs.
NOT_SETTINGS: Final = frozenset(
    {
        "TIDEGATE_FAUST",
        "TIDEGATE_DEMO_PROVIDER_DELAY_S",
        "TIDEGATE_DEMO_CALL_S",
        "TIDEGATE_KAFKA_",
        "TIDEGATE_CLICKHOUSE_",
        "TIDEGATE_ERRAND_",
        "TIDEGATE_ERRAND_NAME",
    }
)


class Setting(NamedTuple):
    """A variable as the reference shows it."""

    variable: str
    default: str
    unit: str
    values: str
    text: str


class Group(NamedTuple):
    """The settings of one class."""

    title: str
    text: str
    settings: tuple[Setting, ...]


def settings_classes() -> list[type[BaseSettings]]:
    """Return every settings class of the package, by module and name. Imports the modules that hold them."""
    found: dict[str, type[BaseSettings]] = {}
    names = [name for _, name, _ in pkgutil.walk_packages(tidegate.__path__, "tidegate.") if name.endswith(".settings")]
    for name in ["tidegate.process", *sorted(names)]:
        for value in vars(importlib.import_module(name)).values():
            if isinstance(value, type) and issubclass(value, BaseSettings) and value.__module__ == name:
                found[f"{name}.{value.__name__}"] = value
    return list(found.values())


def groups() -> Iterator[Group]:
    """Yield all settings, class by class."""
    for one in settings_classes():
        prefix = one.model_config.get("env_prefix", "")
        title = one.__name__.removesuffix("Settings")
        text = " ".join((one.__doc__ or "").split())
        fields = tuple(_setting(f"{prefix}{name}".upper(), name, field) for name, field in one.model_fields.items())
        yield Group(title, text, fields)


def _setting(variable: str, name: str, field: FieldInfo) -> Setting:
    unit = next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")
    return Setting(variable, _default(field), unit, _values(field), " ".join((field.description or "").split()))


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | tuple):
        return json.dumps(value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _values(field: FieldInfo) -> str:
    """Return what is allowed, in few words."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if get_origin(kind) is Literal:
            return ", ".join(f"`{value}`" for value in get_args(kind))
        if kind is bool:
            return "`true`, `false`"
    bounds: dict[str, Any] = {}
    for item in field.metadata:
        for name in ("gt", "ge", "lt", "le"):
            if isinstance(item, (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le)):
                bound = getattr(item, name, None)
                bounds.update({} if bound is None else {name: bound})
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    return ", ".join(f"{words[name]} {bounds[name]}" for name in words if name in bounds)


# --- pages --------------------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Return the text of docs/configuration.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `make docs` from the settings classes. Changes belong there. -->",
        "",
        "Every setting is an environment variable. All services read the groups *Process* and *Kafka*; a process reads the other",
        "groups that concern it and ignores the rest, so one set of variables serves all. A value that makes no sense ends the",
        "process, or the command, with a line that names the variable. `.env.example` has all of them, commented out.",
        "",
        "Time limits, retries and steps of single functions are not settings: they stand in the app",
        "(`@tool(timeout_s=30, retries=4)`) and are pinned with the workflow by every run.",
    ]
    for group in groups():
        lines += ["", f"## {group.title}", "", group.text, ""]
        lines += ["| variable | default | unit | allowed | meaning |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{s.variable}` | {_code(s.default)} | {s.unit} | {_cell(s.values)} | {_cell(s.text)} |"
            for s in group.settings
        ]
    lines += ["", "## Others", "", "Read by commands and by development.", ""]
    lines += ["| variable | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {_code(default)} | {_cell(text)} |" for name, (default, text) in OTHER_VARIABLES.items()]
    return "\n".join(lines) + "\n"


def env_example() -> str:
    """Return the text of .env.example: every setting with its default, commented out."""
    lines = ["# Written by `make docs`. Every setting with its default; docs/configuration.md says what they mean."]
    for group in groups():
        lines += ["", f"# --- {group.title}: {group.text}"]
        for s in group.settings:
            unit = f" [{s.unit}]" if s.unit else ""
            lines += [f"# {s.text}{unit}", f"# {s.variable}={s.default}"]
    lines += ["", "# --- Others"]
    for name, (default, text) in OTHER_VARIABLES.items():
        lines += [f"# {text}", f"# {name}={default}"]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Return the text of docs/metrics.md."""
    lines = [
        "# Metrics and health",
        "",
        "<!-- Written by `make docs` from services/tidegate/metrics.py. Changes belong there. -->",
        "",
        "Every service answers on `TIDEGATE_HTTP_PORT`, if it is set (`TIDEGATE_HTTP_HOST` says on which address):",
        "",
        "| path | answer |",
        "| --- | --- |",
        "| `/health/live` | 200 while every loop of the process advances. A Kafka or a ClickHouse that is away does not change",
        "that: killing a process would not bring them back. 503 when a loop has stood still for `TIDEGATE_HTTP_STUCK_AFTER_S`. |",
        "| `/health/ready` | 200 when state is restored and work is taken: a scheduler or gate has taken over every partition that",
        "is its own, an executor is registered and not draining, a projection has its partitions, a gateway's view is complete.",
        "Who is without its share of its group, before it was given one or since it was taken, is not ready. |",
        "| `/metrics` | what follows, and the process's own (`process_resident_memory_bytes` and the like), for Prometheus |",
        "",
        "No label holds anything that users send but queues and account-free codes, and of queues at most",
        f"{metrics.MAX_LABEL_VALUES}; the rest is summed up as `{metrics.OTHER}`. Counting costs the hot path some additions per",
        "message; the owners hand over what they counted every two seconds.",
    ]
    lines = _joined_rows(lines)
    lines += ["", "## What to ask", ""]
    lines += [
        "Every metric answers one of these questions. Those that must never wait for somebody to ask are the chart's alerts",
        "([alerts.yaml](../charts/tidegate/files/alerts.yaml)). Questions about single runs, accounts and functions are for the",
        "[dashboards](dashboards.md).",
        "",
        "| question | PromQL |",
        "| --- | --- |",
    ]
    lines += [
        f"| {_cell(question)} | {'<br>'.join(f'`{_cell(asked)}`' for asked in asks)} |"
        for question, asks in metrics_use.USES.items()
    ]
    for service in metrics.SERVICES:
        lines += ["", f"## {service}", "", "| metric | kind | labels | meaning |", "| --- | --- | --- | --- |"]
        lines += [
            f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {_cell(one.text)} |"
            for one in metrics.DECLARED
            if service in one.services
        ]
    return "\n".join(lines) + "\n"


def _joined_rows(lines: list[str]) -> list[str]:
    """Return the lines with rows of tables that were broken for the reader of this file made whole."""
    joined: list[str] = []
    for line in lines:
        if joined and joined[-1].startswith("|") and not joined[-1].endswith("|"):
            joined[-1] += f" {line}"
        else:
            joined.append(line)
    return joined


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def pages() -> dict[Path, str]:
    """Return every generated page of a checkout, by path."""
    return {
        ROOT / "docs/configuration.md": configuration_page(),
        ROOT / "docs/metrics.md": metrics_page(),
        ROOT / ".env.example": env_example(),
    }


def main() -> int:
    """Write the pages of the checkout that this package lies in."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path}: written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
