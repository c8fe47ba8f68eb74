"""Which documents are in force, as the `policies` topic has them, and the sets that decisions are made with."""

from __future__ import annotations

import re
from typing import Final

import structlog

from tidegate.domain import canonical
from tidegate.domain.identity import NAME_PATTERN
from tidegate.domain.messages import PolicyPublished
from tidegate.eventlog.tables import Unreadable
from tidegate.gate.budgets import Budget, Budgets, TopUp
from tidegate.gate.carrying import Retention
from tidegate.gate.kinds import Document, DocumentError, Retry, parse
from tidegate.gate.limits import Limit, LimitSet, Queue
from tidegate.gate.policy import MAX_REASON, Policy, PolicySet, Rule

_log = structlog.get_logger()
_is_name: Final = re.compile(NAME_PATTERN).fullmatch

POLICIES: Final = "policies"

# A top-up could only have allowed more; retries are no matter of the gate's, and what is retired none of a decision's.
_DENIES_NOTHING: Final = (TopUp.KIND, Retry.KIND, Retention.KIND)


class DocumentsInForce:
    """The documents by key. A set of them is made anew when it is asked for and one of its kind has changed: thousands of rows that
    come together, as they do at the start, make each set once.

    retention, retention_by: the document about the ledger's retention, if there is one, and who applied it.
    """

    def __init__(self, account_partitions: int) -> None:
        self._account_partitions = account_partitions
        self._documents: dict[str, Document] = {}
        self._offsets: dict[str, int] = {}
        self._end = 0  # up to where they were read
        self._gap = 0  # the record after the last one that was missing when its turn came
        self._policies: PolicySet | None = None
        self._budgets: Budgets | None = None
        self._limits: LimitSet | None = None
        self._limits_version = 0
        self.retention: Retention | None = None
        self.retention_by = ""

    @property
    def policies(self) -> PolicySet:
        """Return the policies' rules, in the order in which they are asked."""
        if self._policies is None:
            self._policies = PolicySet({k: d for k, d in self._documents.items() if isinstance(d, Policy)})
        return self._policies

    @property
    def budgets(self) -> Budgets:
        """Return the budgets, with their top-ups."""
        if self._budgets is None:
            documents = self._documents.values()
            budgets = [d for d in documents if isinstance(d, Budget)]
            self._budgets = Budgets(budgets, [d for d in documents if isinstance(d, TopUp)])
        return self._budgets

    @property
    def limits(self) -> LimitSet:
        """Return the limits and queues; their version is where the last of them was read."""
        if self._limits is None:
            limits = [d for d in self._documents.values() if isinstance(d, Limit | Queue)]
            self._limits = LimitSet(limits, self._account_partitions, self._limits_version)
        return self._limits

    def take(self, key: str, row: PolicyPublished | Unreadable | None, offset: int) -> None:
        """Put a document in force. A broken one is ignored loudly: the one of before stays, since dropping it would allow more.

        After a restart the one of before is not known any more, nor after a gap in what was read: Kafka may have compacted it
        away before this gate came to read it. Then what it may have been about is denied, and the reason says which document is
        broken.
        """
        if offset > self._end:
            self._gap = offset
        self._end = max(self._end, offset + 1)
        before = self._documents.pop(key, None)
        known = before if self._offsets.get(key, offset) >= self._gap else None
        self._offsets[key] = offset
        now = None if row is None else _read(key, row) or known or _unreadable(key, row, offset)
        if now is not None:
            self._documents[key] = now
        if now is not before:
            self._changed(before, offset)
            self._changed(now, offset)
            if isinstance(now, Retention) or isinstance(before, Retention):
                self.retention = now if isinstance(now, Retention) else None
                self.retention_by = row.by if isinstance(row, PolicyPublished) else ""

    def _changed(self, document: Document | None, offset: int) -> None:
        if isinstance(document, Policy):
            self._policies = None
        elif isinstance(document, Budget | TopUp):
            self._budgets = None
        elif isinstance(document, Limit | Queue):
            self._limits, self._limits_version = None, offset + 1

    def __len__(self) -> int:
        return len(self._documents)


def _read(key: str, row: PolicyPublished | Unreadable) -> Document | None:
    """Return a published document, or None if this version cannot read it."""
    if isinstance(row, Unreadable):
        return None  # the table has said so
    try:
        return parse(canonical.loads(row.document))
    except (DocumentError, canonical.NotJsonError) as error:
        _log.error("document ignored, the one of before stays in force", document=key, error=str(error))
        return None


def _unreadable(key: str, row: PolicyPublished | Unreadable, offset: int) -> Policy | None:
    """Return what stands in for a document that this version cannot read and whose earlier text is not known; None if nothing
    need be denied, because it could only have allowed more."""
    kind, _, name = key.rpartition(":")
    if not _is_name(name) or name.endswith("\n") or kind in _DENIES_NOTHING:
        return None  # nothing can be hidden under a key that no document has
    about = f'queue == "{name}"' if kind == Queue.KIND else "true"
    cause = row if isinstance(row, Unreadable) else f"{POLICIES}-0@{offset}"
    reason = f"document {key!r} cannot be read by this gate; apply it again, or remove it ({cause})"
    rule = Rule(name="unreadable", when=about, then="deny", reason=reason[:MAX_REASON])
    return Policy(policy="unreadable", version="0", rules=[rule])
