"""The gate's own gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tidegate import metrics
from tidegate.gate.ledger import HELD, PLACED, QUEUED, RESERVED, Ledger
from tidegate.gate.placement import Executors


def measure(executors: Executors, ledgers: Iterable[Ledger]) -> None:
    """Set the gauges from the ledgers that are ours. Looks at every open attempt: for once in a few seconds."""
    by_status: Counter[str] = Counter(dict.fromkeys((HELD, QUEUED, RESERVED, PLACED), 0))
    waiting: Counter[str] = Counter()
    runs = reserved = 0
    ours = list(ledgers)
    for ledger in ours:
        by_status.update(attempt.status for attempt in ledger.attempts.values())
        waiting.update(
            attempt.call.queue
            for attempt in ledger.attempts.values()
            if attempt.status == QUEUED and attempt.call is not None
        )
        runs += len(ledger.runs)
        reserved += sum(run.reserved_micros for run in ledger.runs.values())
    for status, count in by_status.items():
        metrics.gate_attempts.labels(status).set(count)
    metrics.gate_runs.set(runs)
    metrics.gate_reserved.set(reserved)
    metrics.set_by_label(metrics.gate_waiting, waiting)
    slots = executors.free_slots({ledger.partition: ledger for ledger in ours})
    metrics.set_by_label(metrics.gate_executors, executors.ready_by_queue())
    metrics.set_by_label(metrics.gate_free_slots, slots.by_queue())
