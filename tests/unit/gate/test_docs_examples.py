"""Every YAML block of the pages about the gate is a document that it accepts, or a file of cases that pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tidegate.gate.budgets import Budget, Limits, TopUp
from tidegate.gate.carrying import Retention
from tidegate.gate.kinds import Document, read, read_as
from tidegate.gate.limits import Breaker, Limit, Queue
from tidegate.gate.policy import VARIABLES, Policy, Rule
from tidegate.gate.policy_cases import Cases, tried
from tidegate.gate.retries import Retry
from tidegate.gate.retry_cases import Failed, RetryCase, RetryExpectation

DOCS = Path(__file__).resolve().parents[3] / "docs"
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def test_every_document_is_accepted() -> None:
    texts = [
        text for page in ("policy.md", "budgets.md", "retries.md") for text in blocks(page) if "cases:" not in text
    ]
    assert len(texts) >= 8
    for text in texts:
        read(text)


@pytest.mark.feature("P1")
def test_every_case_comes_out_as_the_page_says() -> None:
    """Cases are about the documents before them on the page, by the names of their files."""
    known: dict[str, Document] = {}
    run = 0
    for text in (*blocks("policy.md"), *blocks("retries.md")):
        if "cases:" not in text:
            known.update({f"{document.name}.yaml": document for document in read(text)})
            continue
        cases = read_as(text, Cases)
        outcomes = list(tried(cases, [known[name] for name in cases.policies]))
        assert [(outcome.case.name, outcome.problem) for outcome in outcomes if outcome.problem] == []
        run += len(outcomes)
    assert run >= 16


def test_the_page_names_every_variable_and_every_field_of_a_rule() -> None:
    text = (DOCS / "policy.md").read_text(encoding="utf-8")
    missing: list[Any] = [name for name in VARIABLES if not re.search(rf"`{name}[`.]", text)]
    missing += [name for name in Rule.model_fields if f"`{name}`" not in text]
    assert missing == []


PAGES: list[tuple[type[BaseModel], str]] = [
    (Policy, "policy.md"),
    (Budget, "budgets.md"),
    (Limits, "budgets.md"),
    (TopUp, "budgets.md"),
    (Limit, "limits.md"),
    (Breaker, "limits.md"),
    (Queue, "limits.md"),
    (Retry, "retries.md"),
    (RetryCase, "retries.md"),
    (Failed, "retries.md"),
    (RetryExpectation, "retries.md"),
    (Retention, "operations.md"),
]


@pytest.mark.feature("P1", "P2", "P3")
@pytest.mark.parametrize(("kind", "page"), PAGES)
def test_every_field_of_every_kind_of_document_is_on_its_page(kind: type[BaseModel], page: str) -> None:
    """In words, or in an example. What all documents have is said once, for all of them."""
    text = (DOCS / page).read_text(encoding="utf-8")
    common = (DOCS / "policy.md").read_text(encoding="utf-8")
    shown = re.compile(r"`[^`\n]*`|^[\s-]*\w+:|[{,]\s*\w+:", re.MULTILINE)
    words = {word for said in shown.findall(text) for word in re.findall(r"\w+", said)}
    words |= {word for word in ("kind", "version", "description") if f"`{word}`" in common}
    assert [name for name in kind.model_fields if name not in words] == []
