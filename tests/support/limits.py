"""Limits for tests: a scheduler and a gate wired together, and documents published to it."""

from __future__ import annotations

from typing import Any

from support.pure import Pair, chain, step
from tidegate.domain import canonical
from tidegate.domain.messages import PolicyPublished


def pair(slots: int = 100, **changes: Any) -> Pair:
    return Pair(slots=slots, functions=("step:a", "step:b"), **changes)


def apply(p: Pair, document: dict[str, Any] | None, name: str = "", offset: int = 1) -> None:
    """Publish a document of the gate, or remove one."""
    if document is not None:
        kind = document["kind"]
        name = f"{kind}:{document[kind]}"
    row = document and PolicyPublished(policy_id=name, version="1", document=canonical.dumps(document), by="t", at_ms=0)
    p.gate.table_changed("policies", name, row or None, offset)
    p.settle_down()


def limit(name: str = "l", **fields: Any) -> dict[str, Any]:
    return {"kind": "limit", "limit": name, "version": "1", **fields}


def one(**settings: Any) -> dict[str, Any]:
    return chain("a", a=step(**settings))
