"""What an owner loop does, counted in plain numbers in its turns and handed to the metrics once in a while."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Final

from tidegate import metrics
from tidegate.domain.entry import Entry
from tidegate.eventlog.interface import Message, TopicPartition
from tidegate.eventlog.owned import OwnedPartition

REPORT_EVERY_S: Final = 2.0
_TOPIC: Final = attrgetter("topic")


@cache
def _is_refusal(name: str) -> bool:
    return name.endswith("Refused")


class LoopMeter:
    """Belongs to one loop and its thread. Counting costs a few additions a message; everything else waits for `report`.

    measure: sets the service's own gauges from the states of the owned partitions.
    """

    def __init__(self, measure: Callable[[Iterable[Any]], None] | None = None) -> None:
        self._measure = measure
        self._topics: Counter[str] = Counter()
        self._types: Counter[type] = Counter()
        self._codes: Counter[str] = Counter()
        self._entries = 0
        self._tells = 0
        self._began_s = 0.0
        self._is_busy = False
        self._reported_s = float("-inf")
        self._labelled: set[int] = set()

    def polled(self, messages: Sequence[Message]) -> None:
        """A turn begins with what a poll brought."""
        self._began_s = time.perf_counter()
        self._is_busy = bool(messages)
        if messages:
            self._topics.update(map(_TOPIC, messages))
            metrics.turn_messages.observe(len(messages))

    def logged(self, entry: Entry, tell_count: int) -> None:
        """An entry is acknowledged and told."""
        self._is_busy = True
        self._entries += 1
        self._tells += tell_count
        for event in entry.events:
            kind = type(event)
            self._types[kind] += 1
            if _is_refusal(kind.__name__):
                self._codes[getattr(event, "code", "") or kind.__name__] += 1

    def turn_done(
        self, now_s: float, owned: Mapping[int, OwnedPartition], ends: Callable[[], Mapping[TopicPartition, int]]
    ) -> None:
        """A turn is over; hand over what was counted if it is time. `ends`: the inputs' ends as far as they are known."""
        if self._is_busy:
            metrics.turn_seconds.observe(time.perf_counter() - self._began_s)
        if now_s - self._reported_s >= REPORT_EVERY_S:
            self._reported_s = now_s
            self.report(owned, ends())

    def report(self, owned: Mapping[int, OwnedPartition], ends: Mapping[TopicPartition, int]) -> None:
        """Hand everything over."""
        for topic, count in self._topics.items():
            metrics.messages.labels(topic).inc(count)
        for kind, count in self._types.items():
            metrics.events.labels(kind.__name__).inc(count)
            decision = _DECISIONS.get(kind.__name__)
            if decision is not None:
                metrics.gate_decisions.labels(decision).inc(count)
        for code, count in self._codes.items():
            metrics.refusals.labels(code).inc(count)
        metrics.entries.inc(self._entries)
        metrics.tells.inc(self._tells)
        self._topics, self._types, self._codes = Counter(), Counter(), Counter()
        self._entries = self._tells = 0
        self._report_partitions(owned, ends)
        if self._measure is not None:
            self._measure([part.state for part in owned.values()])

    def _report_partitions(self, owned: Mapping[int, OwnedPartition], ends: Mapping[TopicPartition, int]) -> None:
        metrics.partitions_owned.set(len(owned))
        for gone in self._labelled - owned.keys():
            for gauge in _BY_PARTITION:
                gauge.remove(str(gone))
        if self._labelled - owned.keys():
            metrics.input_lag.clear()
        self._labelled = set(owned)
        for partition, part in owned.items():
            metrics.partition_epoch.labels(partition).set(part.epoch)
            metrics.told_distance.labels(partition).set(max(0, part.told_distance))
            metrics.units_in_memory.labels(partition).set(len(part.as_of))
            metrics.since_checkpoint.labels(partition).set(part.since_checkpoint)
        for at, end in ends.items():
            part_of = owned.get(at.partition)
            position = None if part_of is None else part_of.inputs.get(at.topic)
            if position is not None:
                metrics.input_lag.labels(at.topic, at.partition).set(max(0, end - position))


_BY_PARTITION: Final = (
    metrics.partition_epoch,
    metrics.told_distance,
    metrics.units_in_memory,
    metrics.since_checkpoint,
)
_DECISIONS: Final = {
    "AttemptGranted": "allow",
    "AttemptPlaced": "allow",
    "AttemptRefused": "deny",
    "AttemptThrottled": "throttle",
    "ApprovalHeld": "require_approval",
}
