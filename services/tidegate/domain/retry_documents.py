"""Retry documents: how failed attempts are repeated, named and versioned apart from the definitions that runs pin. Pure.

They lie in the topic `policies`. The gate has nothing to do with them: whether an attempt is followed by another one is decided
by the scheduler, which reads them here. What form they have, and the checks that an author wants, is in `gate/retries.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import retries
from tidegate.domain.identity import account_fits
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.strict_schema import StrictValidator
from tidegate.domain.workflow import Function

KEY_PREFIX: Final = "retry:"
MAX_LABEL: Final = 256  # more than authors are allowed; it stands in events
SETTINGS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": False,
    "minProperties": 1,
    "properties": retries.PROPERTIES,
}
_validator = StrictValidator(SETTINGS_SCHEMA)


class Attempted(NamedTuple):
    """What documents choose by: a function that failed, and whose run it was."""

    function: str
    account: str
    workflow: str
    tags: Mapping[str, str]


class RetryDocument(msgspec.Struct, frozen=True):
    """A document as decisions need it. account, functions, workflow, tags: which attempts it is for, empty for any; one that says
    none of them is only for functions that name it. retries: the settings that it says, and no others."""

    retry: str
    version: str
    retries: dict[str, Any]
    account: str = ""
    functions: tuple[str, ...] = ()
    workflow: str = ""
    tags: dict[str, str] = {}

    @property
    def label(self) -> str:
        """Return `name@version`, as the log names it."""
        return f"{self.retry}@{self.version}"

    def is_for(self, attempted: Attempted) -> bool:
        """Tell whether it chooses such an attempt by itself."""
        if not (self.account or self.functions or self.workflow or self.tags):
            return False
        return (
            (not self.functions or attempted.function in self.functions)
            and (not self.workflow or attempted.workflow == self.workflow)
            and self.tags.items() <= attempted.tags.items()
            and (not self.account or account_fits(self.account, attempted.account))
        )

    def over(self, function: Function) -> Function:
        """Return a function's settings with those of the document in their place."""
        said = msgspec.convert(self.retries, retries.Retries)
        return msgspec.structs.replace(function, **{name: getattr(said, name) for name in self.retries})


class Chosen(NamedTuple):
    """The settings that an attempt is repeated by, and the document that they are of; empty if it is the function's own."""

    settings: retries.Retries
    document: str


class RetryDocuments:
    """All retry documents in force."""

    def __init__(self) -> None:
        self._by_name: dict[str, RetryDocument] = {}

    def take(self, key: str, row: Any | None) -> str:
        """Note a changed row of `policies`; returns what is wrong with it, empty if nothing is or it is another document's.

        One that cannot be read counts as none, also if there was one before: functions have settings of their own, and nothing
        is let through by repeating less or more.
        """
        if not key.startswith(KEY_PREFIX):
            return ""
        self._by_name.pop(key, None)
        if row is None:
            return ""
        if not isinstance(row, PolicyPublished):
            return str(row)
        try:
            document = msgspec.json.decode(row.document, type=RetryDocument)
        except (msgspec.MsgspecError, RecursionError) as error:
            return str(error)
        wrong = problems(document.retries)
        if key != KEY_PREFIX + document.retry or len(document.label) > MAX_LABEL:
            wrong.append(f"it calls itself {document.label[:MAX_LABEL]}")
        if not wrong:
            self._by_name = dict(sorted({**self._by_name, key: document}.items()))
        return "; ".join(wrong)

    def choose(self, function: Function, attempted: Attempted) -> Chosen:
        """Return by what an attempt of a function is repeated: the document that the function names, if it is in force; else the
        first one by name that is for such attempts; else the function's own settings."""
        named = self._by_name.get(f"{KEY_PREFIX}{function.retry}") if function.retry else None
        found = named or next((document for document in self._by_name.values() if document.is_for(attempted)), None)
        return Chosen(function, "") if found is None else Chosen(found.over(function), found.label)


NO_DOCUMENTS: Final = RetryDocuments()


def problems(settings: Any) -> list[str]:
    """Return what is wrong with the settings of a document, each problem with its place."""
    found = [
        f"{'.'.join(('retries', *map(str, error.absolute_path)))}: {error.message}"
        for error in sorted(_validator.iter_errors(settings), key=lambda error: list(map(str, error.absolute_path)))
    ]
    return found or retries.problems(settings, "retries")
