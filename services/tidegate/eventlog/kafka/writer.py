"""Writing to Kafka: an idempotent producer that skips nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from tidegate.eventlog.interface import (
    Record,
    WriteFailedError,
)
from tidegate.eventlog.kafka.clients import (
    MAX_REQUEST_BYTES,
    connection,
    make_producer,
    said,
)
from tidegate.eventlog.settings import KafkaSettings

MAX_UNACKED_RECORDS = 50_000
MAX_UNACKED_KIB = 256 * 1024
FULL_BUFFER_POLL_S = 0.1
FIRST_CONTACT_S = 2.0


def _make_contact(producer: Producer) -> None:
    with suppress(KafkaException):
        producer.list_topics(timeout=FIRST_CONTACT_S)


class KafkaWriter:
    """An idempotent producer; implements `interface.Writer`. Not thread-safe."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._prefix = settings.topic_prefix
        self._failure: WriteFailedError | None = None
        self._producer = make_producer(settings, _writer_config(settings))
        self._produce = self._producer.produce
        # The client asks for its producer id when metadata comes, but else only every 500 ms, which would make the
        # first write of every process so late. A thread asks, so that a process with several writers does not wait for one
        # after the other. With no broker in reach the client asks later by itself.
        threading.Thread(target=_make_contact, args=(self._producer,), name="first-contact", daemon=True).start()

    def send(self, record: Record, acked: Callable[[int], None] | None = None) -> None:
        """Buffer a record. `acked(offset)` is called in order per partition, from a later call of this thread.

        Blocks only while the local buffer is full, polling. Raises WriteFailedError.
        """
        while self._failure is None:
            try:
                self._produce(
                    self._prefix + record.topic,
                    record.value,
                    record.key,
                    record.partition,
                    self._on_delivery if acked is None else partial(self._on_delivery_tell, acked),
                    headers=list(record.headers),
                )
            except BufferError:
                self._served(self._producer.poll, FULL_BUFFER_POLL_S)
            except KafkaException as error:
                self._fail(error.args[0])
            else:
                return
        raise self._failure

    def poll(self) -> None:
        """Run the callbacks of what was acknowledged. Does not block. Raises WriteFailedError."""
        if self._failure is None:
            self._served(self._producer.poll, 0)
        if self._failure is not None:
            raise self._failure

    def flush(self, timeout_s: float) -> None:
        """Block until everything sent is acknowledged. Raises WriteFailedError if not so within `timeout_s`.

        A write that was not acknowledged in time may still happen, or have happened.
        """
        if self._failure is None:
            unacked = self._served(self._producer.flush, timeout_s)
            if unacked and self._failure is None:
                self._fail(f"{unacked} records were not acknowledged within {timeout_s} s")
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Give up what is not acknowledged and free the connection. Does not raise. Callbacks run no more."""
        self._fail("the writer is closed")
        with suppress(Exception):
            self._producer.close()

    def _served(self, call: Callable[[float], int], timeout_s: float) -> int:
        """Run a call of the client that runs callbacks. Fatal errors make the writer dead."""
        try:
            return call(timeout_s)
        except KafkaException as error:
            self._fail(error.args[0])
        except SystemError as error:
            # How the client's callbacks fail when a fatal error is on its way to us at the same time.
            self._fail(str(error.__cause__ or error))
        return 0

    def _on_delivery(self, error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._fail(error, message)

    def _on_delivery_tell(self, acked: Callable[[int], None], error: KafkaError | None, message: Any) -> None:
        if error is not None:
            self._fail(error, message)
        elif self._failure is None:
            acked(message.offset())

    def _fail(self, reason: KafkaError | str, message: Any = None) -> None:
        """Make the writer dead. Records that are still here are given up, so that none overtakes the failed one."""
        if self._failure is not None:
            return
        where = "" if message is None else f" to {message.topic()} [{message.partition()}]"
        why = reason if isinstance(reason, str) else said(reason)
        self._failure = WriteFailedError(f"writing{where} failed: {why}")
        with suppress(Exception):
            self._producer.purge(blocking=False)


def _writer_config(settings: KafkaSettings) -> dict[str, Any]:
    return {
        **connection(settings),
        "acks": "all",
        "enable.idempotence": True,
        # A record that cannot be written must stop everything behind it, never be skipped: it does not time out by
        # itself (`flush` has the deadline), and a gap is fatal.
        "enable.gapless.guarantee": True,
        "message.timeout.ms": 0,
        # Under load records gather by themselves while a request is under way, and only then: any wait would cost a lone
        # record over 1 ms. A broker answers the requests of a connection one by one anyhow, so more than one under way
        # only makes them smaller and many (measured: a third less work for the broker, 40 % more steps/s).
        "linger.ms": 0,
        "max.in.flight": 1,
        "compression.type": settings.compression,
        "message.max.bytes": MAX_REQUEST_BYTES,
        "queue.buffering.max.messages": MAX_UNACKED_RECORDS,
        "queue.buffering.max.kbytes": MAX_UNACKED_KIB,
    }
