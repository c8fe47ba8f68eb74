"""Admission, done: reads `run-requests` in a group, writes `run-commands` and dead letters, then commits.

At least once: a request that is read again after a crash becomes the same command again, which the run recognises by its id.
"""

from __future__ import annotations

import time
from typing import Final

import structlog

from tidegate import codec, metrics
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import DeadLetter, RunCommand, WorkflowPublished
from tidegate.eventlog.interface import Broker, Message, Record, TopicPartition
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.subscription import KafkaSubscription
from tidegate.eventlog.tables import Tables, Unreadable
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.failpoints import failpoint
from tidegate.scheduler.admit import admit
from tidegate.scheduler.settings import SchedulerSettings

_log = structlog.get_logger()

RUN_REQUESTS: Final = "run-requests"
RUN_COMMANDS: Final = "run-commands"
DEAD_LETTERS: Final = "dead-letters"
WORKFLOWS: Final = "workflows"
GROUP: Final = "tidegate-admission"
MAX_BATCH: Final = 500
PREFETCH: Final = (2_000, 8)  # messages, MiB: a few batches. A flood waits in Kafka, not here.
WRITE_DEADLINE_S: Final = 30.0


class Admission:
    """One member of the admission group. Single-threaded."""

    def __init__(
        self, broker: Broker, kafka: KafkaSettings, settings: SchedulerSettings, run_partitions: int, instance_id: str
    ) -> None:
        self._broker = broker
        self._settings = settings
        self._run_partitions = run_partitions
        self._writer = broker.writer()
        self._requests = KafkaSubscription(kafka, GROUP, [RUN_REQUESTS], instance_id, prefetch=PREFETCH)
        self._workflows = PublishedWorkflows(broker)

    def run_once(self) -> None:
        """Admit what is there; blocks up to 200 ms if nothing is. Raises EventLogError."""
        messages = self._requests.poll(MAX_BATCH, 0.2)
        if not messages:
            return
        failpoint("admission.after-poll")
        self._workflows.follow(messages[-1])
        metrics.admitted.inc(len(messages))
        for message in messages:
            if message.value is not None:
                self._admit(message)
        failpoint("admission.before-flush")
        self._writer.flush(WRITE_DEADLINE_S)
        failpoint("admission.before-commit")
        self._requests.commit({TopicPartition(m.topic, m.partition): m.offset + 1 for m in messages})
        failpoint("admission.after-commit")

    def close(self) -> None:
        """Leave the group."""
        self._requests.close()
        self._writer.close()

    def _admit(self, message: Message) -> None:
        command, letter = admit(
            message,
            self._workflows.find,
            time.time_ns() // 1_000_000,
            max_bytes=self._settings.max_request_bytes,
            horizon_ms=int(self._settings.request_horizon_s * 1000),
        )
        if letter is not None:
            metrics.admission_refused.labels(letter.code).inc()
            _log.warning(
                "request refused",
                source=f"{message.partition}:{message.offset}",
                code=letter.code,
                run_id=letter.run_id,
            )
            self._send(DEAD_LETTERS, 0, f"{message.topic}:{message.partition}:{message.offset}", letter)
        if command is not None:
            partition = partition_of(command.run_id, self._run_partitions)
            self._send(RUN_COMMANDS, partition, f"{command.run_id}:{command.command_id}", command)

    def _send(self, topic: str, partition: int, key: str, record: RunCommand | DeadLetter) -> None:
        headers = ((TYPE_HEADER, type(record).__name__.encode()),)
        self._writer.send(Record(topic, partition, key.encode(), codec.encode(record), headers))


class PublishedWorkflows:
    """The `workflows` table as admission sees it: at least as new as the request that is being judged."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._tables = Tables((WORKFLOWS,))
        self._latest: dict[str, tuple[int, str]] = {}
        self._inbox = broker.plain_inbox()
        self._tables.load(broker)
        self._inbox.read_from(self._tables.positions())
        for key in self._tables.rows[WORKFLOWS]:
            self._note(key)
        self._fresh_as_of = time.monotonic()
        self._wanted_since = self._fresh_as_of

    def follow(self, newest: Message) -> None:
        """Take in what was published meanwhile. Does not block."""
        self._wanted_since = time.monotonic()
        while messages := self._inbox.poll(MAX_BATCH, 0.0):
            for message in messages:
                self._tables.take(message)
                self._note((message.key or b"").decode("utf-8", "replace"))

    def _note(self, key: str) -> None:
        row = self._tables.rows[WORKFLOWS].get(key)
        if row is None:
            return
        offset, name = self._tables.offsets[WORKFLOWS][key], key.partition("@")[0]
        if offset >= self._latest.get(name, (-1, ""))[0]:
            self._latest[name] = (offset, key)

    def find(self, wanted: str) -> WorkflowPublished | Unreadable | None:
        """Return the definition under `name@version`, or the one published last under `name`; `Unreadable` if nobody can tell
        what that is: an older one must not be taken for it.

        If there is none, the table is read to its end first, once per batch: publishing before asking is always enough.
        """
        found = self._find(wanted)
        if found is None and self._fresh_as_of < self._wanted_since:
            self._fresh_as_of = time.monotonic()
            self._read_to_end()
            found = self._find(wanted)
        return found

    def _find(self, wanted: str) -> WorkflowPublished | Unreadable | None:
        rows: dict[str, WorkflowPublished | Unreadable] = self._tables.rows[WORKFLOWS]
        return rows.get(wanted) if "@" in wanted else rows.get(self._latest.get(wanted, (-1, ""))[1])

    def _read_to_end(self) -> None:
        before = self._tables.versions[WORKFLOWS]
        self._tables.load(self._broker)
        if self._tables.versions[WORKFLOWS] != before:
            self._inbox.read_from(self._tables.positions())
            for key in self._tables.rows[WORKFLOWS]:
                self._note(key)
