"""Retry documents as authors write them. The scheduler decides by them: see `domain/retry_documents.py`."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from tidegate.domain.retry_documents import problems
from tidegate.gate.budgets import SCOPE_PATTERN
from tidegate.gate.documents import Document, name_field


class Retry(Document):
    """How failed attempts are repeated. account, functions, workflow, tags: of which attempts; all that are said must fit. One that
    says none of them is for the functions that name it. retries: settings, as a function of a definition has them."""

    KIND = "retry"
    NAME_FIELD = "retry"

    retry: str = name_field()
    account: str = Field(default="", pattern=rf"{SCOPE_PATTERN}|^$")
    functions: list[str] = Field(default_factory=list, max_length=1000)
    workflow: str = Field(default="", max_length=128)
    tags: dict[str, str] = Field(default_factory=dict, max_length=20)
    retries: dict[str, Any]

    @field_validator("retries")
    @classmethod
    def _are_settings(cls, value: dict[str, Any]) -> dict[str, Any]:
        if wrong := problems(value):
            raise ValueError("; ".join(wrong))
        return value
