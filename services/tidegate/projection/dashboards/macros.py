"""What Grafana and its ClickHouse plugin put into a query before they send it, for those who send it without Grafana."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

ALL: Final = "$__all"


class Range(NamedTuple):
    """The time that is looked at, in seconds since 1970, and the length of an interval of a time series."""

    from_s: int
    to_s: int
    interval_s: int = 60


def substituted(sql: str, shown: Range, variables: Mapping[str, str | Sequence[str]]) -> str:
    """Return a panel's query as ClickHouse gets it. Raises LookupError for a variable or macro that is not known."""
    text = _CONDITIONAL.sub(lambda found: _conditional(found, variables), sql)
    text = _VARIABLE.sub(lambda found: _variable(found, variables), text)
    text = _MACRO.sub(lambda found: _macro(found, shown), text)
    if "$" in text:
        raise LookupError(f"nothing is known of {text[text.index('$') :].split()[0]}")
    return text


_CONDITIONAL: Final = re.compile(r"\$__conditionalAll\((.+?\)), *\$(\w+)\)")
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::(\w+))?\}")
_MACRO: Final = re.compile(r"\$__(timeFilter|timeInterval)\(([\w.]+)\)|\$__(fromTime|toTime|interval_s)\b")


def _conditional(found: re.Match[str], variables: Mapping[str, str | Sequence[str]]) -> str:
    return "1=1" if ALL in variables[found[2]] else found[1]


def _variable(found: re.Match[str], variables: Mapping[str, str | Sequence[str]]) -> str:
    value = variables[found[1]]
    values = [value] if isinstance(value, str) else list(value)
    if found[2] == "singlequote":
        return ",".join("'" + one.replace("\\", "\\\\").replace("'", "\\'") + "'" for one in values)
    return ",".join(values)


def _macro(found: re.Match[str], shown: Range) -> str:
    name, column = found[1] or found[3], found[2]
    if name == "timeFilter":
        return f"{column} >= toDateTime({shown.from_s}) AND {column} <= toDateTime({shown.to_s})"
    if name == "timeInterval":
        return f"toStartOfInterval(toDateTime({column}), INTERVAL {shown.interval_s} second)"
    return {
        "fromTime": f"toDateTime({shown.from_s})",
        "toTime": f"toDateTime({shown.to_s})",
        "interval_s": str(shown.interval_s),
    }[name]
