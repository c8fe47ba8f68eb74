"""All kinds of documents that there are: importing this makes them known. Who adds a kind adds its module here."""

from __future__ import annotations

from tidegate.gate.budgets import Budget, TopUp
from tidegate.gate.carrying import Retention
from tidegate.gate.documents import Document, DocumentError, parse, read, read_as
from tidegate.gate.limits import Limit, Queue
from tidegate.gate.policy import Policy
from tidegate.gate.retries import Retry

__all__ = [
    "Budget",
    "Document",
    "DocumentError",
    "Limit",
    "Policy",
    "Queue",
    "Retention",
    "Retry",
    "TopUp",
    "parse",
    "read",
    "read_as",
]
