"""Reads the tasks, on a thread of its own, and hands them to the event loop the moment they arrive."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Final

import structlog

from tidegate import codec
from tidegate.domain.messages import StepTask
from tidegate.eventlog.intake import check
from tidegate.eventlog.interface import Broker, EventLogError, Message, TopicPartition, UnknownTopicError
from tidegate.eventlog.schemas import looking_up
from tidegate.executor.results import STEP_RESULTS

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
            partitions, decode = self._result_partitions(), looking_up(self._broker, codec.decode)
            while not self._stopping:
                found = (_task_in(message, partitions, decode) for message in inbox.poll(MAX_BATCH, POLL_S))
                tasks = [task for task in found if task is not None]
                if tasks:
                    self._deliver(tasks)
        except EventLogError as error:
            self._on_failure(f"tasks cannot be read: {error}")
        except Exception as error:
            # Whatever it is: an executor that lives and reads nothing would be given tasks for ever.
            _log.exception("the reading of tasks has ended")
            self._on_failure(f"tasks cannot be read: {type(error).__name__}: {error}")
        finally:
            inbox.close()

    def _result_partitions(self) -> int:
        found = self._broker.describe([STEP_RESULTS]).get(STEP_RESULTS)
        if found is None:
            raise UnknownTopicError(f"topic {STEP_RESULTS} does not exist")
        return found.partition_count


def _task_in(message: Message, result_partitions: int, decode: Callable[[bytes | None], Any]) -> StepTask | None:
    """Return the task of a message; None if it holds none that could be answered. Raises EventLogError, as `decode` may."""
    if message.value is None:
        return None
    try:
        record = decode(message.value)
        check(message.topic, record)
        if record.result_partition >= result_partitions:
            raise codec.DecodeError(f"there is no partition {record.result_partition} for its result")
    except codec.DecodeError as error:
        # Whom it was for is not known. Its attempt stays unanswered, so the gate finds it lost with our lease at the latest.
        _log.error("task skipped", partition=message.partition, offset=message.offset, error=str(error))
        return None
    task: StepTask = record
    return task
