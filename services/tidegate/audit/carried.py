"""Balances carried forward, recomputed: they must follow from what they stand for; where that is gone, books begin with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from tidegate.audit.budgets import LARGEST, METERS, BucketBooks

if TYPE_CHECKING:
    from tidegate.audit.money import Books

RUN_FIELDS: Final = ("account", "budget_micros", "reserved_micros", "settled_micros", "closed", "parent")


def contradictions(books: Books, runs: set[str], buckets: set[str], event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (run, what is wrong) where what is carried is not what the books of a partition say.

    runs, buckets: those of the partition that the books know.
    """
    expected = {run_id: said for run_id in runs if (said := _said_of_run(books, run_id)) is not None}
    carried = {run["run_id"]: _carried_run(run) for run in event["runs"]}
    for run_id in sorted(expected.keys() | carried.keys()):
        if expected.get(run_id) != carried.get(run_id):
            yield run_id, f"{run_id}: carried as {carried.get(run_id)}, it is {expected.get(run_id)}"
    there = {key: _said_of_bucket(books.budgets.buckets[key]) for key in buckets if key in books.budgets.buckets}
    found = {bucket["bucket"]: _carried_bucket(bucket) for bucket in event["buckets"]}
    for key in sorted(there.keys() | found.keys()):
        if there.get(key) != found.get(key):
            yield "", f"{key}: carried as {found.get(key)}, it is {there.get(key)}"


def _said_of_run(books: Books, run_id: str) -> dict[str, Any] | None:
    """Return what must be carried of a run; None if nothing: it and its family are over."""
    run = books.runs[run_id]
    attempts = {
        f"{name.step_id}#{name.attempt}": (attempt.status, attempt.reserved_micros or 0)
        for name, attempt in books.attempts_of(run_id)
    }
    if run.over or (run.is_alone and run.closed and not attempts):
        return None
    said = {name: getattr(run, name) for name in RUN_FIELDS}
    return said | {"settled_micros": min(run.settled_micros, LARGEST), "attempts": attempts}


def _carried_run(run: dict[str, Any]) -> dict[str, Any]:
    attempts = {
        f"{attempt['step_id']}#{attempt['attempt']}": (attempt["status"], attempt["reserved_micros"])
        for attempt in run["attempts"]
    }
    fields = run | {"parent": run["parent_run_id"], "attempts": attempts}
    return {name: fields[name] for name in (*RUN_FIELDS, "attempts")}


def _said_of_bucket(bucket: BucketBooks) -> dict[str, Any]:
    return {
        "account": bucket.account,
        "limits": bucket.limits,
        "reserved": {meter: bucket.reserved(meter) for meter in METERS},
        "spent": bucket.spent,
        "open": len(bucket.open),
    }


def _carried_bucket(bucket: dict[str, Any]) -> dict[str, Any]:
    return {name: bucket[name] for name in ("account", "limits", "reserved", "spent", "open")}
