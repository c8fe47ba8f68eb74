"""The scheduler's own gauges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from tidegate import metrics
from tidegate.domain import states
from tidegate.scheduler.service import RunsOfPartition

_status: Final = attrgetter("status")


def measure(partitions: Iterable[RunsOfPartition]) -> None:
    """Set the gauges from the partitions that are ours. Looks at every run in memory: for once in a few seconds."""
    by_status: Counter[str] = Counter(dict.fromkeys((states.RUNNING, states.WAITING), 0))
    timers = 0
    for partition in partitions:
        by_status.update(map(_status, partition.runs.values()))
        timers += len(partition.timers)
    for status, count in by_status.items():
        metrics.scheduler_runs.labels(status).set(count)
    metrics.scheduler_timers.set(timers)
