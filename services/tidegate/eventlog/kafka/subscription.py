"""Reading topics as a consumer group whose committed offsets alone decide where reading starts.

The opposite of an `Inbox`, whose owner says where to read: here an operator may say it, with Kafka's own tool, on the
stopped group. For readers whose work may be done twice without harm, such as projections.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException
from confluent_kafka import TopicPartition as KafkaPartition

from tidegate.eventlog.interface import EventLogError, Message, TopicPartition, UnknownTopicError
from tidegate.eventlog.kafka.client_lines import Sparing
from tidegate.eventlog.kafka.clients import (
    MAX_RECORD_BYTES,
    PASSING_IN_GROUP,
    as_log_error,
    group_contact,
    headers_of,
    is_fatal,
    known_ends,
    leave,
    make_consumer,
)
from tidegate.eventlog.settings import KafkaSettings

MAX_PREFETCH_KIB: Final = 64 * 1024
MIN_PREFETCH_MESSAGES: Final = 100_000
ANSWER_TIMEOUT_S: Final = 10.0
GATHER_BYTES: Final = 1024 * 1024  # more than a reader that gathers is likely to be sent at once

# A commit that comes while the client has no place in the group is refused by the client itself.
_PASSING: Final = PASSING_IN_GROUP | {KafkaError._STATE}
_UNKNOWN_TOPIC: Final = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})

_log = logging.getLogger(__name__)
_log.addFilter(Sparing())
_client_log = logging.getLogger(f"{__name__}.client")
_client_log.addFilter(Sparing())


class AssignmentChange(NamedTuple):
    """Partitions that the group took from us since the last call, and gave to us; one that was taken and given back is in both.

    gained: what is still ours of it; each with the next offset that the group had committed, None if it had none.
    """

    gained: Mapping[TopicPartition, int | None]
    lost: frozenset[TopicPartition]


class KafkaSubscription:
    """A member of a group that shares the partitions of some topics. Not thread-safe.

    Where nothing was committed, or what was committed is kept no more, reading starts at the first offset kept.

    instance_id: static membership. Without it (the default) a member that closes leaves the group at once, so that the
    group's offsets can be reset right away, and one that is killed is missed after `session_timeout_ms`.
    with_headers: False for those who need none and read very much: it is a twentieth of the work.
    gather_ms: how long the broker may hold a small answer back so that it becomes a large one. For those who read
    everything and are in no hurry: answers, not bytes, are what a broker works for.
    prefetch: how many messages may wait here to be polled, and MiB of them; one answer of the broker's comes on top.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        group: str,
        topics: Sequence[str],
        instance_id: str | None = None,
        *,
        with_headers: bool = True,
        gather_ms: int = 0,
        prefetch: tuple[int, int] = (MIN_PREFETCH_MESSAGES, MAX_PREFETCH_KIB // 1024),
    ) -> None:
        self._prefix = settings.topic_prefix
        self._with_headers = with_headers
        self._names = {settings.topic_prefix + topic: topic for topic in topics}
        self._given: list[KafkaPartition] = []  # by the group; not ours before we know where to read on
        self._assigned: frozenset[TopicPartition] = frozenset()
        self._gained: dict[TopicPartition, int | None] = {}
        self._lost: frozenset[TopicPartition] = frozenset()
        self._refusal: EventLogError | None = None
        self._is_closing = False
        self._contact = group_contact(settings, ", ".join(self._names))
        membership = {} if instance_id is None else {"group.instance.id": instance_id}
        config = _consumer_config(settings, group, gather_ms, prefetch) | membership | {"on_commit": self._on_commit}
        self._consumer = make_consumer(settings, config)
        self._consumer.subscribe(
            list(self._names), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    @property
    def assigned(self) -> frozenset[TopicPartition]:
        """The partitions that are ours right now, and are being read."""
        return self._assigned

    @property
    def has_share(self) -> bool:
        """Tell whether we read our share of the group's partitions, be it none of them. Any thread may ask."""
        return self._contact.has_share

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Return messages of the assigned partitions, in order per partition; waits for the first one only.

        They are all from after the changes that `take_changes` tells of next: what was read before is dropped.
        Blocks up to `timeout_s`. Must be called at least every `max_poll_interval_ms`, also while paused: it is how the
        group knows that the reader lives. Raises UnknownTopicError, or EventLogError when shut out of the group or when a
        commit was refused for good.
        """
        self._contact.check()
        if self._given:
            self._begin()
        try:
            batch: list[Any] = self._consumer.consume(1, timeout_s)
            if batch and max_messages > 1:
                lost_before = self._lost
                more = self._consumer.consume(max_messages - 1, 0)
                # The client itself drops what is outdated, but only of what one call returns.
                batch = more if self._lost is not lost_before else batch + more
        except KafkaException as failure:
            raise EventLogError(str(failure.args[0])) from failure
        self._raise_refusal()
        names = self._names
        messages = []
        for raw in batch:
            error = raw.error()
            if error is None:
                topic = names[raw.topic() or ""]
                headers = headers_of(raw) if self._with_headers else ()
                messages.append(
                    Message(topic, raw.partition(), raw.offset(), raw.key(), raw.value(), headers, raw.timestamp()[1])
                )
            else:
                self._note(error)
        return messages

    def take_changes(self) -> AssignmentChange:
        """Return what changed since the last call."""
        change = AssignmentChange(self._gained, self._lost)
        self._gained, self._lost = {}, frozenset()
        return change

    def commit(self, positions: Mapping[TopicPartition, int]) -> None:
        """Note next offsets in the group; partitions that are no longer ours are left out. Does not wait for the answer.

        `poll` hears it. A commit that fails because the group moves on or the broker is away is harmless, and only logged: who
        reads next begins at what was committed before. Raises EventLogError if the broker refused an earlier one for good.
        """
        ours = [
            KafkaPartition(self._prefix + at.topic, at.partition, offset)
            for at, offset in positions.items()
            if at in self._assigned
        ]
        if ours:
            # Waiting would never end if the brokers begin to refuse us meanwhile, and nobody would hear that they do.
            try:
                self._consumer.commit(offsets=ours, asynchronous=True)
            except KafkaException as error:
                self._not_answered("not committed", error.args[0])
        self._raise_refusal()

    def pause(self) -> None:
        """Deliver nothing more of what is assigned now. What a later rebalance brings is not paused: pause again."""
        with suppress(KafkaException):
            self._consumer.pause(self._physical())

    def resume(self) -> None:
        """Go on where `pause` stopped."""
        with suppress(KafkaException):
            self._consumer.resume(self._physical())

    def ends(self) -> dict[TopicPartition, int]:
        """Return the next offset to be written of each assigned partition, as far as the last fetch told. Does not block."""
        return known_ends(self._consumer, self._prefix, self._assigned)

    def close(self) -> None:
        """Leave the group. Nothing more is committed. Blocks up to `LEAVE_TIMEOUT_S`. Does not raise."""
        self._is_closing = True
        leave(self._consumer)

    def _physical(self) -> list[KafkaPartition]:
        return [KafkaPartition(self._prefix + at.topic, at.partition) for at in self._assigned]

    def _on_assign(self, consumer: Consumer, partitions: list[KafkaPartition]) -> None:
        self._contact.lost()  # until we read: who had an empty share before was told of no loss
        self._given = partitions
        # A client that is closing answers no questions.
        if self._is_closing or not self._begin():
            consumer.assign([])  # the group waits for an answer, we do not

    def _begin(self) -> bool:
        """Read on where the group says, if it does say so. Blocks for a round trip, bounded. Does not raise.

        The client would ask by itself, but once: if the coordinator moves just then, it never reads anything again
        (librdkafka issue 5586).
        """
        try:
            found = self._consumer.committed(self._given, timeout=ANSWER_TIMEOUT_S) if self._given else []
            failed = next((at.error for at in found if at.error is not None), None)
            if failed is None:
                self._consumer.assign([_beginning(at) for at in found])
                # The client remembers that a partition was paused when it was ours before.
                self._consumer.resume(found)
        except KafkaException as failure:
            failed = failure.args[0]
        if failed is not None:
            self._not_answered("not told where to read on", failed)
            return False
        gained = {TopicPartition(self._names[at.topic], at.partition): at.offset for at in found}
        self._given = []
        self._contact.gained()
        self._assigned |= frozenset(gained)
        self._gained |= {at: offset if offset >= 0 else None for at, offset in gained.items()}
        return True

    def _on_revoke(self, _consumer: Consumer, partitions: list[KafkaPartition]) -> None:
        lost = self._logical(partitions) & self._assigned
        self._given = []
        self._contact.lost()
        self._assigned -= lost
        self._lost |= lost
        for at in lost:
            self._gained.pop(at, None)

    def _logical(self, partitions: list[KafkaPartition]) -> frozenset[TopicPartition]:
        return frozenset(
            TopicPartition(self._names[p.topic], p.partition) for p in partitions if p.topic in self._names
        )

    def _note(self, error: KafkaError) -> None:
        if error.code() in _UNKNOWN_TOPIC:
            raise UnknownTopicError(error.str())
        if is_fatal(error):
            raise EventLogError(f"{error.name()}: {error.str()}")
        _log.warning("trouble with Kafka: %s", error)

    def _on_commit(self, error: KafkaError | None, partitions: list[KafkaPartition]) -> None:
        failed = error or next((at.error for at in partitions if at.error is not None), None)
        if failed is not None:
            self._not_answered("not committed", failed)

    def _not_answered(self, what: str, error: KafkaError) -> None:
        """Log what passes; remember what does not, for what a callback raises would take a poll's messages with it."""
        if error.code() in _PASSING or error.retriable():
            _log.warning("%s: %s", what, error)
        else:
            self._refusal = as_log_error(error, f"{what}: ")

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal


def _beginning(at: KafkaPartition) -> KafkaPartition:
    """Return where reading begins: at what was committed, or at the first offset kept."""
    return KafkaPartition(at.topic, at.partition, at.offset if at.offset >= 0 else OFFSET_BEGINNING)


def _consumer_config(settings: KafkaSettings, group: str, gather_ms: int, prefetch: tuple[int, int]) -> dict[str, Any]:
    return {
        **settings.client_config(),
        "group.id": settings.topic_prefix + group,
        "group.protocol": "classic",
        "partition.assignment.strategy": "range",
        "session.timeout.ms": settings.session_timeout_ms,
        "heartbeat.interval.ms": settings.heartbeat_interval_ms,
        "max.poll.interval.ms": max(settings.max_poll_interval_ms, settings.session_timeout_ms),
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "earliest",
        "isolation.level": "read_committed",
        "fetch.min.bytes": GATHER_BYTES if gather_ms else 1,
        "fetch.wait.max.ms": gather_ms or 100,
        "fetch.message.max.bytes": 4 * 1024 * 1024,
        "fetch.max.bytes": 2 * MAX_RECORD_BYTES,
        "receive.message.max.bytes": 8 * MAX_RECORD_BYTES,
        # Bounded memory; a full queue is looked at again soon, not after the default of a second.
        "queued.max.messages.kbytes": prefetch[1] * 1024,
        "queued.min.messages": prefetch[0],
        "fetch.queue.backoff.ms": 10,
        "retry.backoff.ms": 20,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
        "enable.metrics.push": False,
    }
