"""W7: many runs that sleep. What they cost in memory, how soon their owner is back after a kill, and when they wake."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from tidegate import codec
from tidegate.bench.lab import Lab
from tidegate.domain.entry import Entry
from tidegate.domain.run_events import WaitEnded, WaitStarted

RUN_EVENTS: Final = "run-events"
# Checkpoints that come often and runs that rest soon, so that what is measured is what stays when all is written down.
SETTINGS: Final = {"TIDEGATE_CHECKPOINT_EVERY_S": "5", "TIDEGATE_CHECKPOINT_REST_AFTER_S": "2"}
SPREAD_S: Final = 60.0
RUNS_ASLEEP_PER_S: Final = (
    300.0  # at the least: what it takes to bring them to sleep, write them down and read them back
)
LEAST_SLEEP_S: Final = 15.0


def wake_times(count: int, now_s: float) -> list[str]:
    """Return when each run is to wake, RFC 3339: after all have had the time to fall asleep, evenly over a while."""
    begin_s = now_s + LEAST_SLEEP_S + count / RUNS_ASLEEP_PER_S
    spread_s = min(SPREAD_S, count / 100)
    return [
        datetime.fromtimestamp(begin_s + spread_s * number / count, UTC).isoformat(timespec="milliseconds")
        for number in range(count)
    ]


def put_to_sleep(lab: Lab, count: int) -> dict[str, float]:
    """Ask for runs that sleep; return when each was asked for. Blocks until all are in the log."""
    asked = dict(lab.request("asleep", at) for at in wake_times(count, time.time()))
    lab.flush()
    return asked


def lateness_ms(lab: Lab, run_ids: set[str]) -> list[int]:
    """Return by how much each run woke after its time, sorted: by the owner's clock in the log. Reads the whole log."""
    due: dict[str, int] = {}
    late: list[int] = []
    for entry in _entries(lab):
        if entry.subject not in run_ids:
            continue
        for event in entry.events:
            if isinstance(event, WaitStarted):
                due[entry.subject] = event.due_ms or 0
            elif isinstance(event, WaitEnded):
                late.append(entry.now_ms - due[entry.subject])
    return sorted(late)


def _entries(lab: Lab) -> Iterator[Entry]:
    for partition in range(lab.broker.describe([RUN_EVENTS])[RUN_EVENTS].partition_count):
        start, end = lab.broker.offsets(RUN_EVENTS, partition)
        for message in lab.broker.read(RUN_EVENTS, partition, start, end):
            record = codec.decode(message.value) if message.value is not None else None
            if isinstance(record, Entry):
                yield record
