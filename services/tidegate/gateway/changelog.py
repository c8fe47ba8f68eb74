"""Reading the changelogs ourselves: all of them at the start, and where Faust has left a gap.

Faust may lose what it has fetched when it begins to read, and goes on behind that; compaction leaves gaps, too. Tables believe only
what comes without one. Reading is done by threads, taking rows on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from tidegate.eventlog.interface import Broker
from tidegate.gateway.faust_app import ViewTable

_Taken = tuple[str, Any, bool]  # key, row, whether it is a tombstone


class Changelogs:
    """The changelogs of the tables."""

    def __init__(self, broker: Broker, tables: Iterable[ViewTable]) -> None:
        self._broker = broker
        self._tables = tuple(tables)

    async def read_on(self, partitions: Iterable[int], is_current: Callable[[], bool] = lambda: True) -> int:
        """Bring what the tables have of some partitions up to the ends of the changelogs; return how many records that took.

        is_current: whether what is read is still wanted; asked on the event loop before anything is taken. Raises EventLogError.
        """
        count = 0
        for table, partition in itertools.product(self._tables, sorted(partitions)):
            begin = table.store.read_to.get(partition)
            end = (await asyncio.to_thread(self._broker.offsets, table.name, partition)).end
            if begin == end - 1:
                continue
            found = await asyncio.to_thread(self._read, table, partition, begin, end)
            if not is_current():
                return count
            if table.store.read_to.get(partition) != begin:
                continue  # Faust was faster
            for key, row, is_tombstone in found:
                table.take(key, row, is_tombstone=is_tombstone)
            table.store.read_to[partition] = end - 1
            count += len(found)
        return count

    def _read(self, table: ViewTable, partition: int, begin: int | None, end: int) -> list[_Taken]:
        """Return what a changelog holds behind an offset, or from its start. Blocks."""
        start = self._broker.offsets(table.name, partition).start
        messages = self._broker.read(table.name, partition, start if begin is None else max(begin + 1, start), end)
        return [
            (
                (message.key or b"").decode("utf-8", "replace"),
                None if message.value is None else table.decoded(message.value),
                message.value is None,
            )
            for message in messages
        ]
