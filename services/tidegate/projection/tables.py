"""The names of everything that the migrations make, in one place: what is filled, what is merged from it, what people query.

Whoever copies, exchanges, empties or compares tables takes the names from here. A test holds them to what the migrations make.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from tidegate.projection.rows import DEAD_LETTERS, EVENTS, FRESHNESS, INSTANCES, LEDGER, UNREADABLE, WHOLE


class Merged(NamedTuple):
    """A table that ClickHouse fills from facts, by a materialised view, in the same insert."""

    table: str
    source: str
    by: str


# Written by the projection, one row per record or event, or about how far it is.
FACTS: Final = (EVENTS, LEDGER, INSTANCES, DEAD_LETTERS, UNREADABLE, FRESHNESS, WHOLE)
# Merged from them: idempotent aggregates only.
MERGED: Final = (
    Merged("run_state", EVENTS, "run_state_of_events"),
    Merged("step_state", EVENTS, "step_state_of_events"),
    Merged("attempt_state", EVENTS, "attempt_state_of_events"),
    Merged("approval_state", EVENTS, "approval_state_of_events"),
    Merged("redaction_state", LEDGER, "redaction_state_of_ledger"),
    Merged("run_state", LEDGER, "run_state_of_ledger"),
    Merged("step_state", LEDGER, "step_state_of_ledger"),
    Merged("attempt_state", LEDGER, "attempt_state_of_ledger"),
)
TABLES: Final = (*FACTS, *dict.fromkeys(merged.table for merged in MERGED))
# What people query, and what a rebuild must give again; `freshness` depends on when it was written, `queues` on when it is asked.
REBUILT_VIEWS: Final = (
    "runs",
    "steps",
    "attempts",
    "events",
    "ledger",
    "decisions",
    "budgets",
    "account_budgets",
    "spend",
    "approvals",
    "waits",
    "graph_changes",
    "instances",
    "dead_letters",
    "unreadable",
)
VIEWS: Final = (*REBUILT_VIEWS, "freshness", "queues")
# What decides by its age when a row may go (TIDEGATE_PROJECTION_TTL_DAYS). The others hold what is now, or little.
AGED_BY: Final = {
    EVENTS: "at",
    LEDGER: "at",
    "run_state": "updated_at",
    "step_state": "updated_at",
    "attempt_state": "updated_at",
    "approval_state": "ifNull(coalesce(resolved_at, requested_at), toDateTime64('2100-01-01 00:00:00', 3, 'UTC'))",
    "redaction_state": "updated_at",
}
