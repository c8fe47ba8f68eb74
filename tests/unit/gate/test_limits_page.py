"""Every document on docs/limits.md is one that the gate takes, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.limits import apply, pair
from support.pure import chain, step
from tidegate.gate.kinds import parse

PAGE = Path(__file__).resolve().parents[3] / "docs/limits.md"
EXAMPLES: dict[str, dict[str, Any]] = {
    document.get("limit") or document["queue"]: document
    for block in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for document in yaml.safe_load_all(block)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_document_of_the_page_is_taken(name: str) -> None:
    parse(EXAMPLES[name])


@pytest.mark.parametrize(
    ("name", "settings", "fields", "together"),
    [
        ("provider-calls", {"provider": "x"}, {}, 5),
        ("provider-calls", {}, {}, 30),
        ("openai-calls", {"provider": "openai", "model": "m"}, {}, 5),
        ("big-model-pace", {"provider": "anthropic", "model": "claude-opus"}, {}, 30),
        ("per-team", {}, {"account": "acme/support/chat"}, 20),
        ("one-per-tenant", {}, {}, 30),
        ("one-card", {}, {}, 30),
    ],
)
def test_a_recipe_lets_as_many_through_as_it_says(
    name: str, settings: dict[str, Any], fields: dict[str, Any], together: int
) -> None:
    p = pair()
    apply(p, EXAMPLES[name])
    for number in range(30):
        p.start(f"r{number}", chain("a", a=step(**settings)), {"tenant": "t"}, **fields)
    assert len(p.tasks) == together


def test_one_migration_of_a_tenant_at_a_time() -> None:
    p = pair()
    p.register("worker-0", 1, 100, ("step:migrate",))
    apply(p, EXAMPLES["one-per-tenant"])
    for number, tenant in enumerate(["x", "x", "y"]):
        p.start(f"r{number}", chain("migrate"), {"tenant": tenant})
    assert [task.run_id for task in p.tasks] == ["r0", "r2"]
