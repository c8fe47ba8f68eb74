"""How long the partitions of a log had nobody who wrote to them while owners changed, by the times in the log itself."""

from __future__ import annotations

from typing import Final

from tidegate.eventlog.interface import Broker, Message
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, TYPE_HEADER

LOG_OF: Final = {"scheduler": "run-events", "gate": "gate-ledger"}
_FIRST: Final = b"-1"  # the epoch in the header of an owner's first announcement


def of_partitions(broker: Broker, topic: str, since: dict[tuple[str, int], int]) -> dict[int, float]:
    """Return the longest pause in seconds of each partition whose owner changed after the offsets in `since`.

    A pause is from the last entry of an owner to the first entry of the next one. It says something only while there is
    always work to do in every partition. Blocks for reading. Raises EventLogError.
    """
    found = {}
    for partition in range(broker.describe([topic])[topic].partition_count):
        start, end = broker.offsets(topic, partition)
        begin = max(start, since.get((topic, partition), start))
        pauses = _pauses(list(broker.read(topic, partition, begin, end)))
        if pauses:
            found[partition] = max(pauses)
    return found


def _pauses(messages: list[Message]) -> list[float]:
    pauses = []
    last_ms: int | None = None
    has_changed = False
    for message in messages:
        headers = dict(message.headers)
        if headers.get(TYPE_HEADER) == ANNOUNCEMENT_TYPE.encode():
            has_changed = has_changed or headers.get(EPOCH_HEADER) == _FIRST
            continue
        if has_changed and last_ms is not None:
            pauses.append((message.timestamp_ms - last_ms) / 1000)
        has_changed, last_ms = False, message.timestamp_ms
    return pauses
