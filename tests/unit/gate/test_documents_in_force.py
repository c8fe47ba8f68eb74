"""The sets of documents that decisions are made with: made once for rows that come together, anew for a change of their kind."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.domain import canonical
from tidegate.domain.messages import PolicyPublished
from tidegate.gate import in_force
from tidegate.gate.in_force import DocumentsInForce
from tidegate.gate.kinds import parse

pytestmark = pytest.mark.feature("P1")


def take(documents: DocumentsInForce, offset: int, document: dict[str, Any]) -> None:
    row = PolicyPublished(policy_id="", version="1", document=canonical.dumps(document), by="ann", at_ms=1)
    documents.take(parse(document).topic_key, row, offset)


def policy(number: int) -> dict[str, Any]:
    return {"policy": f"p{number}", "version": "1", "rules": [{"name": "r", "when": "true", "then": "deny"}]}


def limit(number: int) -> dict[str, Any]:
    return {"kind": "limit", "limit": f"l{number}", "version": "1", "at_once": 3}


def test_a_thousand_documents_that_come_together_make_each_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that makes a set for every row is not ready for minutes where tenants have documents of their own."""
    made: list[int] = []
    real = in_force.PolicySet

    def noted(policies: dict[str, Any]) -> Any:
        made.append(len(policies))
        return real(policies)

    monkeypatch.setattr(in_force, "PolicySet", noted)
    documents = DocumentsInForce(2)
    for number in range(300):
        take(documents, number, policy(number))
    assert documents.policies is documents.policies
    assert made == [300]
    take(documents, 300, limit(1))
    assert documents.policies is documents.policies
    take(documents, 301, policy(301))
    assert documents.policies is documents.policies
    assert made == [300, 301]


def test_limits_are_of_the_version_of_their_last_change() -> None:
    documents = DocumentsInForce(2)
    take(documents, 4, limit(1))
    take(documents, 5, policy(1))
    assert documents.limits.version == 5
    take(documents, 9, limit(1))
    assert documents.limits.version == 10
    documents.take("limit:l1", None, 12)
    assert documents.limits.version == 13
