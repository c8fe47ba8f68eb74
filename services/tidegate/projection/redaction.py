"""Values that a policy wants nobody to see in the projections. The logs keep them; what is here is pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

MARK: Final = "(redacted)"
EVERY: Final = "*"


def redact(text: str, paths: Sequence[str]) -> str:
    """Return JSON with MARK in the place of every value that a path leads to.

    A path is names or indexes with dots between them, `card.number` or `orders.*.address`; `*` stands for every member of an
    object or list, and for a value that has none. A path that leads nowhere changes nothing. Text that is no JSON is hidden as a
    whole: it cannot be told what is in it.
    """
    if not paths:
        return text
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return MARK
    for path in paths:
        value = _without(value, path.split("."))
    return msgspec.json.encode(value).decode()


def _without(value: Any, path: Sequence[str]) -> Any:
    if not path:
        return MARK
    name, rest = path[0], path[1:]
    if isinstance(value, dict):
        return {key: _without(item, rest) if name in (EVERY, key) else item for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, rest) if name in (EVERY, str(index)) else item for index, item in enumerate(value)]
    return MARK if name == EVERY else value


def redact_call(event: dict[str, Any]) -> dict[str, Any]:
    """Return the event without what its own `redact` paths name in the arguments of its `call`; as it is if it has none."""
    paths, call = event.get("redact"), event.get("call")
    if not paths or not isinstance(call, dict) or not isinstance(call.get("arguments"), str):
        return event
    return {**event, "call": {**call, "arguments": redact(call["arguments"], paths)}}
