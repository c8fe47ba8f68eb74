"""Canonical JSON: one byte sequence per value, so that hashes of equal values are equal.

Keys sorted, no white space, UTF-8 unescaped. Inside Tidegate a JSON value travels as this text (`str`), and is parsed only
where somebody looks into it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

_decoder = msgspec.json.Decoder()
# Made once: `json.dumps` makes an encoder for every call that asks for anything special.
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class NotJsonError(ValueError):
    """The value has no JSON form (not a number, infinite, or a type that JSON does not know)."""


def dumps(value: Any) -> str:
    """Return the canonical JSON text of `value`. Raises NotJsonError; never blocks."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from None


def loads(text: str | bytes) -> Any:
    """Parse JSON text. Raises NotJsonError on malformed text, also on NaN and Infinity, which JSON does not have."""
    try:
        return _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotJsonError(str(error)) from None


def digest(text: str) -> str:
    """Return the SHA-256 of a text as lower-case hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
