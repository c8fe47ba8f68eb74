"""Reads the tasks, on a thread of its own, and hands them to the event loop the moment they arrive."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Final

import structlog

from tidegate import codec
from tidegate.domain.messages import StepTask
from tidegate.eventlog.interface import Broker, EventLogError, Message, TopicPartition

MAX_BATCH: Final = 500
POLL_S: Final = 0.2

_log = structlog.get_logger()


class TaskFeed:
    """Follows one partition of a queue's topic from a given offset. No group, no commits: the registration says it all."""

    def __init__(
        self,
        broker: Broker,
        feed_from: tuple[TopicPartition, int],
        deliver: Callable[[list[StepTask]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """`deliver` gets the tasks of everybody who listens to this partition, in order, on the feed's thread."""
        self._broker = broker
        self._feed_from = feed_from
        self._deliver = deliver
        self._on_failure = on_failure
        self._stopping = False
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(target=in_context, args=(self._run,), name="tasks", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Blocks for a moment. Idempotent."""
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        inbox = self._broker.plain_inbox()
        try:
            inbox.read_from(dict([self._feed_from]))
            while not self._stopping:
                tasks = [task for message in inbox.poll(MAX_BATCH, POLL_S) if (task := _task_in(message)) is not None]
                if tasks:
                    self._deliver(tasks)
        except EventLogError as error:
            self._on_failure(f"tasks cannot be read: {error}")
        finally:
            inbox.close()


def _task_in(message: Message) -> StepTask | None:
    try:
        record = codec.decode(message.value)
    except codec.DecodeError as error:
        # Whom it was for is not known. Its attempt stays unanswered, so the gate finds it lost with our lease at the latest.
        _log.error("task skipped", partition=message.partition, offset=message.offset, error=str(error))
        return None
    return record if isinstance(record, StepTask) else None
