"""Following runs in the log as they happen: one reader for all runs that a client waits for.

Reading begins once per partition and then goes on, because beginning is what takes long: a consumer that is given another
partition first waits for its running fetch to end, tens of milliseconds. There is no thread: who waits reads, for itself
and for the others who wait. While nobody waits, nothing is done.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Final

from tidegate.eventlog.interface import Broker, EventLogError, Inbox, Message, TopicPartition
from tidegate.sdk.reading import RUN_EVENTS, ValidEntries

MAX_BATCH: Final = 1000
# How long one thread reads before a partition that was added meanwhile gets its turn.
TURN_S: Final = 0.05
# More than an owner of the log lets pass between two announcements of its epoch.
LOOK_BACK_RECORDS: Final = 1100
# After so long without reading there may be much to catch up with: jumping to the end may be better.
IDLE_S: Final = 5.0
MAX_SUBSCRIPTIONS: Final = 1000


class Subscription:
    """The valid entries of one run, from offset `begin` of its partition on. `dropped`: it gets no more of them.

    history_s: how long to wait for a first entry before looking for the run before `begin`: 0 at once, infinity if it
    cannot be there.
    """

    __slots__ = ("begin", "dropped", "entries", "history_s", "partition")

    def __init__(self, partition: int, begin: int, history_s: float) -> None:
        self.partition = partition
        self.begin = begin
        self.history_s = history_s
        self.entries: list[Message] = []
        self.dropped = False


class _Partition:
    """How far a partition was read, and which of its entries are valid."""

    __slots__ = ("position", "valid")

    def __init__(self, position: int) -> None:
        self.position = position
        self.valid = ValidEntries()


class Follower:
    """Thread-safe."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._changed = threading.Condition()
        self._inbox: Inbox | None = None
        self._somebody_reads = False
        self._read_at_s = 0.0
        self._partitions: dict[int, _Partition] = {}
        self._to_add: dict[TopicPartition, int] = {}
        self._subscriptions: OrderedDict[bytes, Subscription] = OrderedDict()

    def find(self, run_id: str) -> Subscription | None:
        """Return the subscription that is there."""
        with self._changed:
            return self._subscriptions.get(run_id.encode())

    def subscribe(self, run_id: str, partition: int, history_s: float) -> Subscription:
        """Collect the run's entries: all that are not in the log yet are certain to be among them.

        Returns the subscription that is there already, if there is one. Blocks for a round trip at most.
        """
        there = self.find(run_id)
        if there is not None:
            return there
        self._follow(partition)
        with self._changed:
            made = Subscription(partition, self._partitions[partition].position, history_s)
            if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
                self._subscriptions.popitem(last=False)[1].dropped = True
            return self._subscriptions.setdefault(run_id.encode(), made)

    def wait(self, subscription: Subscription, seen: int, timeout_s: float) -> bool:
        """Block until there are more than `seen` entries; returns whether there are. Raises EventLogError."""
        deadline = time.monotonic() + timeout_s
        while len(subscription.entries) <= seen:
            if subscription.dropped or time.monotonic() >= deadline:
                return False
            self._read_or_wait(deadline)
        return True

    def catch_up(self, partition: int, end: int, timeout_s: float) -> bool:
        """Read until offset `end` is passed; returns False if it is not within `timeout_s`. Raises EventLogError."""
        deadline = time.monotonic() + timeout_s
        while (state := self._partitions.get(partition)) is not None and state.position < end:
            if time.monotonic() >= deadline:
                return False
            self._read_or_wait(deadline)
        return state is not None

    def close(self) -> None:
        """Free the connection. Nobody may be waiting."""
        with self._changed:
            self._reset()

    def _follow(self, partition: int) -> None:
        """See to it that a partition is read, from a place that is not too far back."""
        with self._changed:
            if partition in self._partitions and time.monotonic() - self._read_at_s < IDLE_S:
                return
        start, end = self._broker.offsets(RUN_EVENTS, partition)
        with self._changed:
            state = self._partitions.get(partition)
            if state is not None and state.position >= end - LOOK_BACK_RECORDS:
                return
            for run_id, subscription in list(self._subscriptions.items()):
                if subscription.partition == partition:  # what lies between is not read
                    self._subscriptions.pop(run_id).dropped = True
            position = max(start, end - LOOK_BACK_RECORDS)
            self._partitions[partition] = _Partition(position)
            self._to_add[TopicPartition(RUN_EVENTS, partition)] = position

    def _read_or_wait(self, deadline: float) -> None:
        """Read for a moment, or wait for another thread that does."""
        with self._changed:
            if self._somebody_reads:
                self._changed.wait(max(0.0, deadline - time.monotonic()))
                return
            self._somebody_reads = True
            to_add, self._to_add = self._to_add, {}
        batch: list[Message] = []
        try:
            if self._inbox is None:
                self._inbox = self._broker.plain_inbox()
            if to_add:
                self._inbox.add(to_add)
            batch = self._inbox.poll(MAX_BATCH, max(0.0, min(TURN_S, deadline - time.monotonic())))
        except EventLogError:
            with self._changed:
                self._reset()
            raise
        finally:
            with self._changed:
                self._distribute(batch)
                self._somebody_reads = False
                self._read_at_s = time.monotonic()
                self._changed.notify_all()

    def _distribute(self, batch: list[Message]) -> None:
        for message in batch:
            state = self._partitions.get(message.partition)
            if state is None or message.offset < state.position:
                continue
            state.position = message.offset + 1
            if not state.valid.admits(message):
                continue
            subscription = self._subscriptions.get((message.key or b"").partition(b":")[0])
            if subscription is not None:
                subscription.entries.append(message)

    def _reset(self) -> None:
        """Forget everything: who still waits finds its subscription dropped and begins afresh."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        for subscription in self._subscriptions.values():
            subscription.dropped = True
        self._subscriptions.clear()
        self._partitions.clear()
        self._to_add.clear()
