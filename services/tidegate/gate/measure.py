"""The gate's own gauges."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter

from tidegate import metrics
from tidegate.gate.ledger import Ledger
from tidegate.gate.placement import Executors
from tidegate.gate.state import HELD, METERS, PLACED, QUEUED, RESERVED

_status, _reserved = attrgetter("status"), attrgetter("reserved_micros")


def measure(executors: Executors, ledgers: Iterable[Ledger]) -> None:
    """Set the gauges from the ledgers that are ours. Looks at every open attempt: for once in a few seconds."""
    by_status: Counter[str] = Counter(dict.fromkeys((HELD, QUEUED, RESERVED, PLACED), 0))
    waiting: Counter[str] = Counter()  # by queue
    runs = reserved = 0
    ours = list(ledgers)
    for ledger in ours:
        by_status.update(map(_status, ledger.attempts.values()))
        waiting.update(ledger.depth)
        runs += len(ledger.runs)
        reserved += sum(map(_reserved, ledger.runs.values()))
    for status, count in by_status.items():
        metrics.gate_attempts.labels(status).set(count)
    metrics.gate_runs.set(runs)
    metrics.gate_reserved.set(reserved)
    metrics.set_by_label(metrics.gate_waiting, waiting)
    metrics.set_by_label(metrics.gate_budget_left, budgets_left(ours, time.time_ns() // 1_000_000), keep_least=True)
    slots = executors.free_slots({ledger.partition: ledger for ledger in ours})
    metrics.set_by_label(metrics.gate_executors, executors.ready_by_queue())
    metrics.set_by_label(metrics.gate_free_slots, slots.by_queue())


def budgets_left(ledgers: Iterable[Ledger], now_ms: int) -> dict[str, float]:
    """Return by budget how much is left of what it limits, as a share, where least is left: of its accounts, and of what it counts.

    Below 0 if more was spent. Buckets of single runs and of windows that are over are left out.
    """
    least: dict[str, float] = {}
    for ledger in ledgers:
        for bucket in ledger.buckets.values():
            if bucket.run_id or bucket.from_ms > now_ms or (bucket.until_ms and bucket.until_ms <= now_ms):
                continue
            for meter, spent, reserved in zip(METERS, bucket.spent, bucket.reserved, strict=True):
                limit = getattr(bucket.limits, meter)
                if limit is not None:
                    left = (limit - spent - reserved) / limit if limit else 0.0
                    least[bucket.budget] = min(least.get(bucket.budget, left), left)
    return least
