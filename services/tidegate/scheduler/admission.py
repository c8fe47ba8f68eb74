"""Admission, done: reads `run-requests` in a group, writes `run-commands` and dead letters, then commits.

At least once: a request that is read again after a crash becomes the same command again, which the run recognises by its id.
"""

from __future__ import annotations

import time
from typing import Final

import structlog

from tidegate import codec, metrics
from tidegate.domain.entry import MAX_OFFSET
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import DeadLetter, RunCommand, WorkflowPublished
from tidegate.eventlog.interface import NO_SHARE, Broker, Message, Record, TopicPartition
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.eventlog.letters import DELETED_UNREAD, dead_letter
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.settings import KafkaSettings
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
        self._next: dict[int, int] = {}  # by partition of the inbox: the offset after what was read or committed last

    def run_once(self) -> None:
        """Admit what is there; blocks up to 200 ms if nothing is. Raises EventLogError."""
        messages = self._requests.poll(MAX_BATCH, 0.2)
        self._look_for_deleted(messages)
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

    def why_not_ready(self) -> str:
        """Return what is missing until requests are admitted; empty if nothing is. Any thread may ask."""
        return "" if self._requests.has_share else NO_SHARE.format(RUN_REQUESTS)

    def close(self) -> None:
        """Leave the group."""
        self._requests.close()
        self._writer.close()

    def _look_for_deleted(self, messages: list[Message]) -> None:
        """Say which requests retention took before we read them: the client goes on behind them without a word."""
        changes = self._requests.take_changes()
        for at in changes.lost:
            self._next.pop(at.partition, None)
        for at, committed in sorted(changes.gained.items()):
            if committed is not None:
                self._next[at.partition] = self._report_deleted(at.partition, committed)
        for message in messages:
            expected = self._next.get(message.partition, message.offset)
            if message.offset > expected:
                self._report_deleted(message.partition, expected, message.offset)
            self._next[message.partition] = message.offset + 1

    def _report_deleted(self, partition: int, expected: int, found: int = MAX_OFFSET) -> int:
        """Write a letter if the inbox begins behind the offset that is to be read next; returns where reading goes on.

        found: the offset of the first message that was there instead. The gap alone may be compaction's. Blocks for a round trip
        or two. Raises EventLogError.
        """
        start = min(found, self._broker.offsets(RUN_REQUESTS, partition).start)
        if start <= expected:
            return expected
        reason = (
            f"the requests of {RUN_REQUESTS}-{partition} from offset {expected} to {start - 1} ({start - expected} at the most) "
            "were deleted before admission read them: nobody knows what they were. Have their producers send them again, and "
            "give the topic a retention longer than the longest outage"
        )
        place = f"{RUN_REQUESTS}:{partition}:{expected}"
        _log.error("requests deleted unread", partition=partition, first=expected, last=start - 1, letter=place)
        metrics.admission_deleted.inc(start - expected)
        nothing = Message(RUN_REQUESTS, partition, expected, None, None, (), 0)
        now_ms = time.time_ns() // 1_000_000
        letter = dead_letter(nothing, service="scheduler", code=DELETED_UNREAD, reason=reason, run_id="", at_ms=now_ms)
        self._send(DEAD_LETTERS, 0, place, letter)
        self._writer.flush(WRITE_DEADLINE_S)
        self._requests.commit({TopicPartition(RUN_REQUESTS, partition): start})  # it is said once
        return start

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
        self._tables = Tables((WORKFLOWS,), looking_up(broker, codec.decode))
        self._latest: dict[str, tuple[int, str]] = {}
        self._inbox = broker.plain_inbox()
        self._tables.load(broker)
        self._inbox.read_from(self._tables.positions())
        self._note_all()
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
        if key in self._tables.rows[WORKFLOWS]:
            offset, name = self._tables.offsets[WORKFLOWS][key], key.partition("@")[0]
            self._latest[name] = max((offset, key), self._latest.get(name, (-1, "")))
        else:  # what was removed may have been the latest: the one published before it is that now
            self._note_all()

    def _note_all(self) -> None:
        self._latest.clear()
        for key in self._tables.rows[WORKFLOWS]:
            self._note(key)

    def find(self, wanted: str) -> WorkflowPublished | Unreadable | None:
        """Return the definition under `name@version`, or the one published last under `name`; `Unreadable` if nobody can tell
        what that is: an older one must not be taken for it.

        If there is none, or nothing but the name is given, the table is read to its end first, once per batch: publishing before
        asking is always enough, and what a name means is what was published last.
        """
        found = self._find(wanted) if "@" in wanted else None
        if found is None and self._fresh_as_of < self._wanted_since:
            self._fresh_as_of = time.monotonic()
            self._read_to_end()
        return found or self._find(wanted)

    def _find(self, wanted: str) -> WorkflowPublished | Unreadable | None:
        rows: dict[str, WorkflowPublished | Unreadable] = self._tables.rows[WORKFLOWS]
        return rows.get(wanted) if "@" in wanted else rows.get(self._latest.get(wanted, (-1, ""))[1])

    def _read_to_end(self) -> None:
        before = self._tables.versions[WORKFLOWS]
        self._tables.load(self._broker)
        if self._tables.versions[WORKFLOWS] != before:
            self._inbox.read_from(self._tables.positions())
            self._note_all()
