"""Every YAML block of the pages about the gate is a document that it accepts, or a file of cases that pass."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tidegate.gate.kinds import Document, read, read_values
from tidegate.gate.policy import VARIABLES, Rule
from tidegate.gate.policy_cases import checked, tried

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
        cases = checked(read_values(text)[0])
        outcomes = list(tried(cases, [known[name] for name in cases.policies]))
        assert [(outcome.case.name, outcome.problem) for outcome in outcomes if outcome.problem] == []
        run += len(outcomes)
    assert run >= 16


def test_the_page_names_every_variable_and_every_field_of_a_rule() -> None:
    text = (DOCS / "policy.md").read_text(encoding="utf-8")
    missing: list[Any] = [name for name in VARIABLES if not re.search(rf"`{name}[`.]", text)]
    missing += [name for name in Rule.model_fields if f"`{name}`" not in text]
    assert missing == []
