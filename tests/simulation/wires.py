"""What lies between a simulated process and the broker: every call is an edge where the world may kill, stop or cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from tidegate.eventlog.interface import (
    EventLogError,
    Message,
    Offsets,
    OwnershipChange,
    Record,
    TopicDescription,
    TopicPartition,
    WriteFailedError,
)
from tidegate.eventlog.kafka.subscription import AssignmentChange
from tidegate.eventlog.memory import MemoryBroker, MemoryInbox, MemoryWriter


class SimulatedCrash(BaseException):
    """The process ends here and now: no handler runs."""


class Wired(Protocol):
    """A process as its wires see it."""

    is_cut_off: bool
    writers: list[MemoryWriter]

    def edge(self, name: str) -> None:
        """Pass an edge. Raises SimulatedCrash if the process ends there."""

    def may_fail(self, writer: MemoryWriter) -> None:
        """Pass an edge at which an acknowledgement may be lost."""

    def joined(self, group: str, instance_id: str) -> None:
        """Note the membership, so that its session can end."""


class ProcessBroker:
    """The broker as one process reaches it; implements `interface.Broker`."""

    def __init__(self, broker: MemoryBroker, process: Wired) -> None:
        self._broker = broker
        self._process = process

    def writer(self) -> ProcessWriter:
        inner = self._broker.writer()
        self._process.writers.append(inner)
        return ProcessWriter(self._broker, inner, self._process)

    def inbox(self, group: str, instance_id: str, lead_topic: str) -> ProcessInbox:
        self._process.joined(group, instance_id)
        return ProcessInbox(self._broker.inbox(group, instance_id, lead_topic), self._process)

    def plain_inbox(self) -> ProcessInbox:
        return ProcessInbox(self._broker.plain_inbox(), self._process)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        self._pass("read")
        yield from self._broker.read(topic, partition, start, stop)

    def offsets(self, topic: str, partition: int) -> Offsets:
        self._pass("offsets")
        return self._broker.offsets(topic, partition)

    def describe(self, topics: Sequence[str]) -> dict[str, TopicDescription]:
        self._pass("describe")
        return self._broker.describe(topics)

    def committed(self, group: str) -> dict[int, int]:
        return self._broker.committed(group)

    def _pass(self, name: str) -> None:
        self._process.edge(f"broker.{name}")
        if self._process.is_cut_off:
            raise EventLogError("the broker cannot be reached from here")


class ProcessWriter:
    """A producer of one process; implements `interface.Writer`."""

    def __init__(self, broker: MemoryBroker, inner: MemoryWriter, process: Wired) -> None:
        self._broker = broker
        self._inner = inner
        self._process = process

    def send(self, record: Record, acked: Callable[[int], None] | None = None) -> None:
        self._process.edge("writer.send")
        self._inner.send(record, acked)

    def poll(self) -> None:
        self._process.edge("writer.poll")
        self._process.may_fail(self._inner)
        if not self._process.is_cut_off:
            self._inner.poll()

    def flush(self, timeout_s: float) -> None:
        self._process.edge("writer.flush")
        self._process.may_fail(self._inner)
        if self._process.is_cut_off and self._inner.failure is None:
            self._broker.fail(self._inner, f"not acknowledged within {timeout_s} s: cut off")
        self._inner.flush(timeout_s)
        self._process.edge("writer.flushed")

    def close(self) -> None:
        self._inner.close()


class ProcessInbox:
    """A consumer of one process; implements `interface.Inbox`."""

    def __init__(self, inner: MemoryInbox, process: Wired) -> None:
        self._inner = inner
        self._process = process

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        return self._inner.positions

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        self._process.edge("inbox.poll")
        return [] if self._process.is_cut_off else self._inner.poll(max_messages, timeout_s)

    def stay(self) -> None:
        if not self._process.is_cut_off:
            self._inner.stay()

    def take_changes(self) -> OwnershipChange:
        return self._inner.take_changes()

    def read_from(self, positions: Mapping[TopicPartition, int]) -> None:
        self._reach()
        self._inner.read_from(positions)

    def add(self, positions: Mapping[TopicPartition, int]) -> None:
        self._reach()
        self._inner.add(positions)

    def remove(self, partitions: Sequence[TopicPartition]) -> None:
        self._inner.remove(partitions)

    @property
    def has_share(self) -> bool:
        return self._inner.has_share

    def ends(self) -> dict[TopicPartition, int]:
        return self._inner.ends()

    def commit(self, positions: Mapping[int, int]) -> None:
        self._process.edge("inbox.commit")
        if not self._process.is_cut_off:
            self._inner.commit(positions)

    def close(self) -> None:
        self._inner.close()

    def _reach(self) -> None:
        if self._process.is_cut_off:
            raise EventLogError("the broker cannot be reached from here")


class GroupSubscription:
    """What `subscription.KafkaSubscription` is, on the log in memory: starts at what the group committed, topic by topic."""

    def __init__(self, broker: ProcessBroker, group: str, topics: Sequence[str], instance_id: str) -> None:
        self._broker = broker
        self._groups = {topic: f"{group}:{topic}" for topic in topics}
        self._inboxes = {topic: broker.inbox(name, instance_id, topic) for topic, name in self._groups.items()}
        self._assigned: set[TopicPartition] = set()
        self._gained: dict[TopicPartition, int | None] = {}
        self._lost: set[TopicPartition] = set()
        self._is_paused = False

    @property
    def assigned(self) -> frozenset[TopicPartition]:
        return frozenset(self._assigned)

    @property
    def has_share(self) -> bool:
        return all(inbox.has_share for inbox in self._inboxes.values())

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        messages: list[Message] = []
        for (topic, inbox), group in zip(self._inboxes.items(), self._groups.values(), strict=True):
            found = inbox.poll(0 if self._is_paused else max_messages - len(messages), timeout_s)
            changes = inbox.take_changes()
            lost = {TopicPartition(topic, partition) for partition in changes.lost}
            committed = self._broker.committed(group) if changes.gained else {}
            gained = {TopicPartition(topic, n): committed.get(n) for n in sorted(changes.gained)}
            if gained:
                inbox.add({at: self._start(at, offset) for at, offset in gained.items()})
            self._assigned = (self._assigned - lost) | gained.keys()
            self._lost |= lost
            self._gained |= gained
            messages += found
        return messages

    def take_changes(self) -> AssignmentChange:
        change = AssignmentChange(self._gained, frozenset(self._lost))
        self._gained, self._lost = {}, set()
        return change

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        for topic, inbox in self._inboxes.items():
            ours = {at.partition: n for at, n in positions.items() if at.topic == topic and at in self._assigned}
            if ours:
                inbox.commit(ours)

    def ends(self) -> dict[TopicPartition, int]:
        return {}

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False

    def close(self) -> None:
        for inbox in self._inboxes.values():
            inbox.close()

    def _start(self, at: TopicPartition, committed: int | None) -> int:
        return max(self._broker.offsets(at.topic, at.partition).start, committed or 0)


__all__ = ["GroupSubscription", "ProcessBroker", "SimulatedCrash", "WriteFailedError"]
