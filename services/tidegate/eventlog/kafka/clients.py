"""What all our clients of Kafka share: how they connect, log, ask again and leave, and what their errors mean to us."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from operator import methodcaller
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (
    AdminClient,
)

from tidegate.eventlog.interface import (
    EventLogError,
    OffsetOutOfRangeError,
    TopicPartition,
    UnknownTopicError,
)
from tidegate.eventlog.kafka.client_lines import Sparing
from tidegate.eventlog.kafka.contact import GroupContact
from tidegate.eventlog.kafka.renewal import Renewal, RenewingConsumer, RenewingProducer
from tidegate.eventlog.settings import KafkaSettings

MAX_RECORD_BYTES = 16 * 1024 * 1024
MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 64 * 1024  # a record of the greatest size and what the protocol puts around it
REQUEST_TIMEOUT_S = 30.0
ASK_AGAIN_S = 0.05
HURRY_S = 0.02
LEAVE_TIMEOUT_S = 10.0
CONTACT_TIMEOUT_S = 3.0
UNKNOWN_TOPIC = frozenset(
    {
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_ID,
    }
)
NOT_AUTHORIZED = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)
OUT_OF_RANGE = frozenset(
    {
        KafkaError.OFFSET_OUT_OF_RANGE,
        KafkaError._AUTO_OFFSET_RESET,
        KafkaError._LOG_TRUNCATION,
    }
)
# Trouble that the client mends by itself (it reconnects, finds the new leader or coordinator) and only tells us of.
PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._DESTROY_BROKER,  # the one that was asked is gone; the next try goes to whom there is
        KafkaError._MAX_POLL_EXCEEDED,  # the loss of the partitions is reported by the group as such
        KafkaError._RESOLVE,
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._WAIT_COORD,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_COORDINATOR,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.UNKNOWN_LEADER_EPOCH,
    }
)
# Trouble of a group's member that joins again by itself; whether a commit was refused for it is of no interest.
PASSING_IN_GROUP = PASSING | {
    KafkaError._ASSIGNMENT_LOST,
    KafkaError.ILLEGAL_GENERATION,
    KafkaError.MEMBER_ID_REQUIRED,
    KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.UNKNOWN_MEMBER_ID,
}
# A header's name that is not UTF-8 makes the client return a broken list and set an exception at the same time. Called
# as a method, the interpreter may notice only later, with the list in use; called from C it notices at once.
_read_headers = methodcaller("headers")
T = TypeVar("T")
_log = logging.getLogger(__name__)
client_log = logging.getLogger(f"{__name__}.client")
# Every producer would warn that this option is called experimental. It is wanted; tests/contract shows what it does.
client_log.addFilter(lambda line: "enable.gapless.guarantee" not in line.getMessage())
client_log.addFilter(Sparing())


def connection(settings: KafkaSettings) -> dict[str, Any]:
    """Return what all our clients are configured with. Trouble is short where the client asks again soon."""
    return {
        **settings.client_config(),
        "retry.backoff.ms": 20,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
        "topic.metadata.propagation.max.ms": 10_000,
        "enable.metrics.push": False,
    }


def make_consumer(settings: KafkaSettings, config: Mapping[str, Any]) -> Consumer:
    """Return a consumer that logs as we do and fails when it is refused and what it shows was replaced. Raises SecretFileError."""
    if not settings.has_files:
        return Consumer(dict(config), logger=client_log)
    return RenewingConsumer(dict(config), Renewal(settings, log_trouble), logger=client_log)


def group_contact(settings: KafkaSettings, name: str) -> GroupContact:
    """Return the watch over a member of the group that shares `name`."""
    return GroupContact(
        name,
        session_timeout_s=settings.session_timeout_ms / 1000,
        max_poll_interval_s=max(settings.max_poll_interval_ms, settings.session_timeout_ms) / 1000,
        is_answered=partial(is_answered, settings),
        monotonic_s=time.monotonic,
    )


def is_answered(settings: KafkaSettings) -> bool:
    """Tell whether the brokers answer a client that has just been made, with the credentials of now. Blocks for seconds."""
    try:
        admin = AdminClient(connection(settings), logger=client_log)
        admin.describe_cluster(request_timeout=CONTACT_TIMEOUT_S).result()
    except (KafkaException, EventLogError) as error:
        _log.warning("without the group, and brokers do not answer a new client: %s", error)
        return False
    return True


def leave(consumer: Consumer) -> None:
    """Close a consumer, or leave it to itself if it does not end. Blocks up to LEAVE_TIMEOUT_S. Does not raise.

    The client waits for ever for the answer to a commit that was under way when the brokers began to refuse us. On a thread,
    which also keeps the consumer from being freed by ours: that waits for the same.
    """

    def close() -> None:
        with suppress(KafkaException, RuntimeError):
            consumer.close()

    closing = threading.Thread(target=close, name="leave", daemon=True)
    closing.start()
    closing.join(LEAVE_TIMEOUT_S)
    if closing.is_alive():
        _log.warning("Kafka's client does not end, and is left to itself after %.0f s", LEAVE_TIMEOUT_S)


def make_producer(settings: KafkaSettings, config: Mapping[str, Any]) -> Producer:
    if not settings.has_files:
        return Producer(dict(config), logger=client_log)
    return RenewingProducer(dict(config), Renewal(settings, log_trouble), logger=client_log)


def log_trouble(error: KafkaError) -> None:
    client_log.error("%s: %s", error.name(), error.str())  # as the client does when nobody else wants to know


def known_ends(consumer: Consumer, prefix: str, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """Return the next offset to be written of partitions that a consumer reads, as far as the last answers told. Does not block."""
    ends = {}
    for at in partitions:
        with suppress(KafkaException):
            _, end = consumer.get_watermark_offsets(KafkaPartition(prefix + at.topic, at.partition), cached=True)
            if end >= 0:
                ends[at] = end
    return ends


def headers_of(raw: Any) -> tuple[tuple[str, bytes], ...]:
    """Return the headers of a client's message; none if the client cannot show them. Does not raise."""
    try:
        headers = _read_headers(raw)
    except (SystemError, UnicodeDecodeError):
        return ()  # names that are not UTF-8 and so not readable with this client: none of ours
    if not headers:
        return ()
    for _, value in headers:
        if value is None:
            return tuple((name, value or b"") for name, value in headers)
    return tuple(headers)


def is_fatal(error: KafkaError) -> bool:
    """Tell whether the client can do no more. A consumer's error says so by its code, without the flag."""
    return error.fatal() or error.code() == KafkaError._FATAL


def said(error: KafkaError) -> str:
    """Return what an error says, and what it most likely means."""
    text = f"{error.name()}: {error.str()}"
    if error.code() in UNKNOWN_TOPIC:
        return f"{text}: it does not exist (any more), or this user may not see it"
    if error.code() in NOT_AUTHORIZED:
        return f"{text}: the brokers' ACLs do not let this user; `tidegate topics acls` lists what each service needs"
    if error.code() in OUT_OF_RANGE:
        return f"{text}: records were deleted before they were read, or the topic was made again"
    return text


def as_log_error(error: KafkaError, where: str = "") -> EventLogError:
    """Return our exception for a client's error."""
    text = f"{where}{said(error)}"
    if error.code() in UNKNOWN_TOPIC:
        return UnknownTopicError(text)
    if error.code() in OUT_OF_RANGE:
        return OffsetOutOfRangeError(text)
    return EventLogError(text)


def patiently(ask: Callable[[], T]) -> T:
    """Ask until there is an answer: leaders move, and a topic made a moment ago has none yet. Blocks, but not for ever."""
    deadline = time.monotonic() + REQUEST_TIMEOUT_S
    while True:
        try:
            return ask()
        except KafkaException as error:
            if error.args[0].code() not in PASSING or time.monotonic() > deadline:
                raise as_log_error(error.args[0]) from error
        time.sleep(ASK_AGAIN_S)


@contextmanager
def log_errors(where: str = "") -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        raise as_log_error(error.args[0], where) from error
