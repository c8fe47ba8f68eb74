"""A process's line in `instances`: registration, heartbeats on a thread of their own, farewell."""

from __future__ import annotations

import contextvars
import functools
import importlib.metadata
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

import structlog

from tidegate import codec
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import EndedIncarnation, FunctionDetail, Instance, Running
from tidegate.eventlog.interface import (
    Broker,
    EventLogError,
    Record,
    TopicPartition,
    UnknownTopicError,
    WriteFailedError,
    Writer,
)
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.failpoints import failpoint
from tidegate.registry.lease import Lease
from tidegate.registry.predecessors import GONE, INCARNATION_HEADER, NOT_YET_KNOWN, Predecessors, examine, last_records
from tidegate.registry.process import ProcessIdentity, boottime_s, this_process

INSTANCES: Final = "instances"
READY: Final = "ready"
DRAINING: Final = "draining"

DEFAULT_HEARTBEAT_S: Final = 1.0
DEFAULT_LEASE_S: Final = 10.0
SOON_S: Final = 0.05  # the least time between two heartbeats, however often `beat_soon` is called
REGISTER_TIMEOUT_S: Final = 60.0
FAREWELL_TIMEOUT_S: Final = 5.0
PREDECESSOR_WAIT_S: Final = 5.0  # a process that was just killed may need a moment to disappear

_log = structlog.get_logger()


class InstanceIdTakenError(EventLogError):
    """Another process that is running right now is registered under this instance id."""


class TaskFeed(NamedTuple):
    """What an executor adds to its registration. `functions` are written `kind:name`; `details` say more about them."""

    queue: str
    slots: int
    functions: tuple[str, ...]
    details: tuple[FunctionDetail, ...] = ()


class Load(NamedTuple):
    """What an executor holds at one instant: all belong together, for the gate draws conclusions from them.

    slots: how many it can use now, fewer than it has while some are stuck; None for as many as it has.
    """

    slots: int | None = None
    free_slots: int = 0
    running: tuple[Running, ...] = ()
    marks: Mapping[str, int] = MappingProxyType({})


def task_topic(queue: str) -> str:
    """Return the topic of a queue's tasks."""
    return f"step-tasks.{queue}"


def task_partition_of(instance_id: str, partition_count: int) -> int:
    """Return the partition of its queue's topic that an executor listens to."""
    return partition_of(instance_id, partition_count)


@functools.cache
def mark_name(ledger_partition: int) -> str:
    """Return the name under which marks of a ledger partition are kept, the same as in the marks of entries."""
    return f"gate-ledger-{ledger_partition}"


class Registration:
    """Registers this process and keeps it registered. `start` and `stop` belong to one thread; the rest to any.

    After `start`: `incarnation` is the offset of the registration, `feed_from` the partition and numeric offset from
    which an executor reads its tasks: read before registering, so that no task addressed to this incarnation can lie
    before it.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        service: str,
        instance_id: str,
        feed: TaskFeed | None = None,
        load: Callable[[], Load] = Load,
        heartbeat_s: float = DEFAULT_HEARTBEAT_S,
        lease_s: float | None = None,
        on_lapse: Callable[[str], None] | None = None,
        process: ProcessIdentity | None = None,
    ) -> None:
        """Prepare; nothing is written.

        load: called on the heartbeat thread for every heartbeat; must not block. lease_s: None for a service on whose
        liveness no placement rests; otherwise `on_lapse(reason)` is called once, on the thread that notices the lapse.
        """
        self.instance_id = instance_id
        self.incarnation = NOT_YET_KNOWN
        self.feed_from: tuple[TopicPartition, int] | None = None
        self.ended: tuple[EndedIncarnation, ...] = ()
        self.lease = Lease(lease_s, on_lapse)
        self._broker = broker
        self._service = service
        self._feed = feed
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._process = process
        self._state = READY
        self._started_ms = 0
        self._writer: Writer | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._beat_wanted = False

    @property
    def lapsed(self) -> bool:
        """Tell whether the lease was found lapsed; the incarnation is over then."""
        return self.lease.lapsed

    def lease_held(self) -> bool:
        """Read the clock and tell whether the lease is held right now; a lapse found here is final."""
        return self.lease.held()

    def start(self) -> int:
        """Register, start the heartbeats and return the incarnation.

        Blocks for reading `instances` and for one acknowledgement. Raises UnknownTopicError, InstanceIdTakenError or
        another EventLogError; nothing is running then.
        """
        process = self._process = self._process or this_process()
        self._started_ms = time.time_ns() // 1_000_000
        if self._feed is not None:  # 1. where our tasks will begin
            self.feed_from = self._read_feed_end(self._feed.queue)
        self.ended = self._examine_predecessors(process).ended  # 2. who had our name before, and is dead
        self.incarnation = self._register()  # 3. the offset of this record is our incarnation
        _log.info(
            "registered",
            service=self._service,
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            ended=[f"{ended.incarnation}: {ended.evidence}" for ended in self.ended],
        )
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(
            target=in_context, args=(self._beat_until_stopped,), name="heartbeat", daemon=True
        )
        self._thread.start()
        return self.incarnation

    def _read_feed_end(self, queue: str) -> tuple[TopicPartition, int]:
        topic = task_topic(queue)
        found = self._broker.describe([topic]).get(topic)
        if found is None:
            raise UnknownTopicError(f"queue {queue!r} has no topic: {topic} does not exist")
        partition = task_partition_of(self.instance_id, found.partition_count)
        return TopicPartition(topic, partition), self._broker.offsets(topic, partition).end

    def _examine_predecessors(self, process: ProcessIdentity) -> Predecessors:
        start, end = self._broker.offsets(INSTANCES, 0)
        records = last_records(self._broker.read(INSTANCES, 0, start, end), self.instance_id)
        deadline = time.monotonic() + PREDECESSOR_WAIT_S
        while (found := examine(records, process)).alive:
            if time.monotonic() >= deadline:
                raise InstanceIdTakenError(
                    f"instance id {self.instance_id!r} is in use: {found.alive}; give this process another instance id"
                )
            time.sleep(0.1)
        return found

    def _register(self) -> int:
        offsets: list[int] = []
        self._writer = self._broker.writer()
        failpoint("registry.before-register")
        try:
            sent_at_s = boottime_s()
            self._writer.send(self._record(self._state), offsets.append)
            self._writer.flush(REGISTER_TIMEOUT_S)
            failpoint("registry.after-register")
        except EventLogError:
            self._writer.close()
            raise
        if not self.lease.acknowledged(sent_at_s):
            self._writer.close()
            raise EventLogError("the registration was acknowledged too late: its lease had run out")
        return offsets[0]

    def _record(self, state: str) -> Record:
        load, feed, process = self._load(), self._feed, self._process
        if process is None:
            raise RuntimeError("not started")
        instance = Instance(
            instance_id=self.instance_id,
            service=self._service,
            incarnation=self.incarnation,
            state=state,
            host=process.host,
            boot_id=process.boot_id,
            pid=process.pid,
            pid_started=process.pid_started,
            started_ms=self._started_ms,
            at_ms=time.time_ns() // 1_000_000,
            queue=feed.queue if feed else "",
            slots=load.slots if load.slots is not None else feed.slots if feed else 0,
            task_partition=self.feed_from[0].partition if self.feed_from else 0,
            task_offset=self.feed_from[1] if self.feed_from else 0,
            free_slots=load.free_slots,
            running=load.running,
            marks=dict(load.marks),
            ended=self.ended,
            functions=feed.functions if feed else (),
            version=_version(),
            details=feed.details if feed else (),
        )
        headers = ((TYPE_HEADER, b"Instance"), (INCARNATION_HEADER, str(self.incarnation).encode()))
        return Record(INSTANCES, 0, self.instance_id.encode(), codec.encode(instance), headers)

    def beat_soon(self) -> None:
        """Ask for a heartbeat now: a slot became free after all were taken, say. Does not block."""
        self._beat_wanted = True
        self._wake.set()

    def drain(self) -> None:
        """Say `draining` from now on: nothing new is wanted. Does not block."""
        self._state = DRAINING
        self.beat_soon()

    def stop(self, *, farewell: bool = True) -> None:
        """End the heartbeats; with `farewell` say `gone` unless the lease lapsed. Blocks for seconds. Idempotent."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._writer is None:
            return
        try:
            if farewell and not self.lapsed:
                failpoint("registry.before-farewell")
                self._writer.send(self._record(GONE))
                self._writer.flush(FAREWELL_TIMEOUT_S)
                failpoint("registry.after-farewell")
        except WriteFailedError as error:
            _log.warning("farewell not acknowledged", instance_id=self.instance_id, error=str(error))
        finally:
            self._writer.close()
            self._writer = None

    def _beat_until_stopped(self) -> None:
        heart = _Heart(self._heartbeat_s)
        while not self._stopping and self.lease.held():
            try:
                if self._writer is None:
                    self._writer = self._broker.writer()
                if heart.is_due(self._beat_wanted):
                    self._beat_wanted = False
                    self._send_heartbeat(self._writer, heart)
                self._writer.poll()
            except EventLogError as error:
                # Heartbeats are whole records: a new writer may just go on. If it cannot, the lease runs out.
                _log.warning("heartbeat failed, trying again", instance_id=self.instance_id, error=str(error))
                if self._writer is not None:
                    self._writer.close()
                    self._writer = None
                heart.failed()
            if self._wake.wait(heart.wait_s(self._beat_wanted)):
                self._wake.clear()

    def _send_heartbeat(self, writer: Writer, heart: _Heart) -> None:
        sent_at_s = boottime_s()
        heart.sent()

        def acked(_offset: int) -> None:
            failpoint("registry.before-heartbeat-ack")
            heart.acked()
            self.lease.acknowledged(sent_at_s)

        failpoint("registry.before-heartbeat")
        writer.send(self._record(self._state), acked)


class _Heart:
    """When the next heartbeat is due. One is under way at a time; its acknowledgement is polled for."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last_sent_s = time.monotonic()  # the registration was the first one
        self._under_way = False

    def sent(self) -> None:
        self._last_sent_s = time.monotonic()
        self._under_way = True

    def acked(self) -> None:
        self._under_way = False

    def failed(self) -> None:
        self._under_way = False
        self._last_sent_s = time.monotonic()

    def is_due(self, wanted: bool) -> bool:
        return not self._under_way and self._due_in_s(wanted) <= 0

    def _due_in_s(self, wanted: bool) -> float:
        return self._last_sent_s + (min(SOON_S, self._every_s) if wanted else self._every_s) - time.monotonic()

    def wait_s(self, wanted: bool) -> float:
        """Return how long to sleep: until the next one is due, or only a little while one is under way."""
        if not self._under_way:
            return max(0.0, self._due_in_s(wanted))
        age_s = time.monotonic() - self._last_sent_s
        return min(0.05, max(0.002, age_s / 4))


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("tidegate")
    except importlib.metadata.PackageNotFoundError:
        return ""
