"""Which SQL the read-only endpoint runs. Pure: it judges a query that the engine itself has parsed and formatted.

The engine's own `readonly` refuses what changes data, tables or settings. It still lets a query read and write files of the
machine (`INTO OUTFILE`, `file('/etc/passwd')`, `DESCRIBE TABLE file(...)`), kill others' queries and send several statements.
So the query is formatted by the engine first (`formatQuery`), judged in that one notation, without comments, and with one kind
of quotes each for strings and names, and run in exactly that form: nothing can hide in how it was written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

READONLY_CODE: Final = 164

_STATEMENTS: Final = frozenset({"SELECT", "WITH", "SHOW", "DESCRIBE", "EXPLAIN", "EXISTS"})
# Table functions that reach nothing outside the query and the database.
_HARMLESS_TABLE_FUNCTIONS: Final = frozenset(
    {
        "format",
        "generate_series",
        "generaterandom",
        "generateseries",
        "merge",
        "null",
        "numbers",
        "numbers_mt",
        "primes",
        "values",
        "view",
        "zeros",
        "zeros_mt",
    }
)
# Ordinary functions that read files of the machine or talk to other services: `aiGenerate` and its like among them.
_REACHING_FUNCTIONS: Final = re.compile(r"file|catboostEvaluate|showCertificate|(ai|AI)[A-Z].*")
_FORBIDDEN_TABLES: Final = frozenset({"stack_trace"})  # interrupts every thread of this process
# Formats that exist inside a Python process only.
_FOREIGN_FORMATS: Final = frozenset({"arrowtable", "dataframe", "datastore"})

_TOKEN: Final = re.compile(
    r"""
    (?P<string>'(?:[^'\\]|\\.|'')*')
    | (?P<name>`(?:[^`\\]|\\.|``)*` | "(?:[^"\\]|\\.|"")*")
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<number>[0-9][0-9A-Za-z_.]*)
    | (?P<space>\s+)
    | (?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)


class RefusedError(ValueError):
    """The endpoint does not run this; `code` is ClickHouse's number for the reason."""

    def __init__(self, message: str, code: int = READONLY_CODE) -> None:
        super().__init__(message)
        self.code = code


class _Token(NamedTuple):
    kind: str
    text: str


class Refused(NamedTuple):
    """Names, in lower case. `called`: table functions, which need their parentheses. `named`: ordinary functions, which also
    work where only their name stands, as in `* APPLY(file)` or `arrayMap(file, ...)`: no such name may occur at all."""

    called: frozenset[str]
    named: frozenset[str]


def refused_functions(functions: Iterable[str], table_functions: Iterable[str]) -> Refused:
    """Return what must not be used of the functions that the engine has. Table functions not known as harmless are refused."""
    return Refused(
        frozenset(name.lower() for name in table_functions) - _HARMLESS_TABLE_FUNCTIONS,
        frozenset(name.lower() for name in functions if _REACHING_FUNCTIONS.fullmatch(name)),
    )


def check(formatted: str, refused: Refused) -> str:
    """Judge a query as the engine formats it; returns the format that it asks for, "" for none. Raises RefusedError."""
    tokens = _tokens(formatted)
    first = next((token for token in tokens if token.text != "("), None)
    if first is None or first.kind != "word" or first.text.upper() not in _STATEMENTS:
        raise RefusedError(f"only SELECT, SHOW, DESCRIBE, EXPLAIN and EXISTS are served here, not {_shown(first)}")
    asked_format, depth = "", 0
    for index, token in enumerate(tokens):
        following = tokens[index + 1] if index + 1 < len(tokens) else None
        if token.kind == "sign":
            depth += {"(": 1, ")": -1}.get(token.text, 0)
            if token.text == ";":
                raise RefusedError("one statement at a time")
        elif token.kind in ("word", "name"):
            _check_name(token, following, refused)
            if depth > 0 and token == _SETTINGS and "=" in (after.text for after in tokens[index + 2 : index + 3]):
                # The engine does not apply them there, and does not say so.
                raise RefusedError("SETTINGS can only stand at the end of the whole query")
            if depth == 0 and token == _FORMAT and following is not None and following.kind == "word":
                asked_format = following.text
    check_format(asked_format)
    return asked_format


def check_format(name: str) -> None:
    """Raise RefusedError if a result cannot be sent in this format; "" is fine."""
    if name.lower() in _FOREIGN_FORMATS or not re.fullmatch(r"[A-Za-z0-9]*", name):
        raise RefusedError(f"there is no format {name!r} here", code=73)


_FORMAT: Final = _Token("word", "FORMAT")
_SETTINGS: Final = _Token("word", "SETTINGS")


def _tokens(formatted: str) -> list[_Token]:
    found = (_Token(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(formatted))
    return [token for token in found if token.kind != "space"]


def _check_name(token: _Token, following: _Token | None, refused: Refused) -> None:
    name = (token.text if token.kind == "word" else token.text[1:-1]).lower()
    if token.kind == "word" and name == "outfile":
        raise RefusedError("INTO OUTFILE is not served here")
    if name in _FORBIDDEN_TABLES:
        raise RefusedError(f"system.{name} is not served here")
    is_called = following is not None and following.text == "("
    if name in refused.named or (is_called and name in refused.called):
        raise RefusedError(f"{name} reaches outside the database and is not served here")


def _shown(token: _Token | None) -> str:
    return "an empty query" if token is None else token.text[:40]
