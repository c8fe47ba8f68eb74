"""Balances carried forward: one entry that says all that a ledger partition is, so that older ones may be retired. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from pydantic import Field

from tidegate import codec
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Entry
from tidegate.domain.messages import NOTHING
from tidegate.gate import snapshots
from tidegate.gate.budgets import amounts_of
from tidegate.gate.documents import Document
from tidegate.gate.ledger import Ledger

# An entry is one record; a ledger in which more than this is open waits until less is. The states alone are counted first, which
# is cheap; then all that is carried, as it is written. That leaves a MiB of the largest entry for what is around the event.
MAX_CARRIED_BYTES: Final = 8 * 1024 * 1024
MAX_EVENT_BYTES: Final = 14 * 1024 * 1024
DAY_S: Final = 24 * 3600


class CarriedError(ValueError):
    """What an entry carries contradicts itself."""


class Retention(Document):
    """How long entries of the ledger are kept at least (keep_s), and how often its balances are carried forward (every_s)."""

    KIND = "retention"
    NAME_FIELD = "retention"

    retention: Literal["ledger"]
    keep_s: int = Field(ge=0)
    every_s: int = Field(default=DAY_S, ge=1)


def is_due(ledger: Ledger, retention: Retention, now_ms: int) -> bool:
    """Tell whether balances are to be carried forward now: something happened since they were, and it is time."""
    carried = ledger.carried
    if carried is None:
        return ledger.seq > 0
    return ledger.seq > carried.seq and now_ms - carried.at_ms >= retention.every_s * 1000


def carried(ledger: Ledger, policy: str, by: str) -> ev.LedgerCarried | None:
    """Return all that a ledger says; None if that is too much for one entry."""
    units = []
    size = 0
    for unit in snapshots.units_of(ledger):
        state = snapshots.dump(ledger, unit)
        size += len(unit) + len(state)
        if size > MAX_CARRIED_BYTES:
            return None
        units.append(ev.CarriedUnit(unit=unit, state=state))
    event = ev.LedgerCarried(
        policy=policy, by=by, runs=tuple(_runs(ledger)), buckets=tuple(_buckets(ledger)), units=tuple(units)
    )
    return event if _size(event) <= MAX_EVENT_BYTES else None


def _size(event: ev.LedgerCarried) -> int:
    """Return how many bytes an entry has that holds nothing but an event: runs and buckets repeat much of their states."""
    entry = Entry(
        subject="",
        account="",
        first_seq=1,
        epoch=0,
        now_ms=0,
        prev_hash=b"",
        inputs={},
        marks={},
        told=0,
        tables={},
        cause="",
        events=(event,),
    )
    return len(codec.encode_entry("LedgerEntry", entry))


def load(ledger: Ledger, event: ev.LedgerCarried) -> list[str]:
    """Put what an entry carries into an empty ledger, and return its units. Raises CarriedError."""
    for item in event.units:
        try:
            snapshots.load(ledger, item.unit, item.state)
        except Exception as error:  # a format that this version does not know, bytes that are broken: many types
            raise CarriedError(f"{item.unit} cannot be read: {type(error).__name__}: {error}") from error
    if tuple(_runs(ledger)) != event.runs or tuple(_buckets(ledger)) != event.buckets:
        raise CarriedError("its balances are not those of the state that it carries")
    return [item.unit for item in event.units]


def _runs(ledger: Ledger) -> Iterator[ev.CarriedRun]:
    for run_id, run in sorted(ledger.runs.items()):
        yield ev.CarriedRun(
            account=run.account,
            run_id=run_id,
            budget_micros=run.budget_micros,
            reserved_micros=run.reserved_micros,
            settled_micros=run.settled_micros,
            closed=run.closed,
            parent_run_id=run.parent_run_id,
            has_children=run.has_children,
            attempts=tuple(
                ev.CarriedAttempt(
                    step_id=key.step_id,
                    attempt=key.attempt,
                    status="lost" if attempt.lost else attempt.status,
                    reserved_micros=attempt.reserved_micros,
                    buckets=attempt.buckets,
                    amounts=attempt.amounts if attempt.buckets else NOTHING,
                )
                for key in sorted(run.open)
                if (attempt := ledger.attempts[key])
            ),
        )


def _buckets(ledger: Ledger) -> Iterator[ev.CarriedBucket]:
    for key, bucket in sorted(ledger.buckets.items()):
        yield ev.CarriedBucket(
            account=bucket.account,
            bucket=key,
            limits=bucket.limits,
            reserved=amounts_of(bucket.reserved),
            spent=amounts_of(bucket.spent),
            open=bucket.open,
        )
