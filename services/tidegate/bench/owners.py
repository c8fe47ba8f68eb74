"""Who owns the partitions of a log, as the log itself says."""

from __future__ import annotations

from typing import Final

from tidegate import codec
from tidegate.domain.entry import OwnerAnnounced
from tidegate.eventlog.interface import Broker
from tidegate.eventlog.tail import Tail
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, TYPE_HEADER

_SPAN: Final = 2_500  # owners announce themselves again every thousand entries


def of_partitions(broker: Broker, topic: str) -> dict[int, str]:
    """Return the instance that announced itself last in each partition, if any did. Blocks for reading. Raises EventLogError."""
    found = {}
    for partition in range(broker.describe([topic])[topic].partition_count):
        owner = _last_announced(broker, topic, partition)
        if owner is not None:
            found[partition] = owner
    return found


def are_spread(owners: dict[int, str], service: str, replicas: int) -> bool:
    """Tell whether each of so many replicas owns as many partitions as the others, but for one."""
    held = [list(owners.values()).count(f"{service}-{number}") for number in range(replicas)]
    return sum(held) == len(owners) > 0 and min(held) > 0 and max(held) - min(held) <= 1


def _last_announced(broker: Broker, topic: str, partition: int) -> str | None:
    end = broker.offsets(topic, partition).end
    tail = Tail(broker, topic, partition, end)
    while end > tail.start:
        begin = max(tail.start, end - _SPAN)
        for message in reversed(list(tail.read(begin, end))):
            if (TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()) in message.headers and message.value is not None:
                record = codec.decode(message.value)
                return record.instance_id if isinstance(record, OwnerAnnounced) else None
        end = begin
    return None
