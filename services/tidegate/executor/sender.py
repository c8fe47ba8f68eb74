"""Writes results, on a thread of its own: whatever is waiting goes out together, and nothing waits for an acknowledgement."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Final

import structlog

from tidegate.eventlog.interface import Broker, Record, Writer
from tidegate.failpoints import failpoint

IDLE_WAIT_S: Final = 1.0
UNACKED_WAIT_S: Final = 0.005
RETRY_WAIT_S: Final = 1.0
JOIN_S: Final = 2.0
MAX_FAILURES_IN_A_ROW: Final = 5

_log = structlog.get_logger()

Acked = Callable[[], None]


class ResultSender:
    """Sends each record until it is acknowledged, then calls back, on its own thread.

    A writer that failed is replaced and everything unacknowledged is sent again: a result that is there twice does no harm,
    because it names its attempt. `on_failure(reason)` is called once if that does not help either.
    """

    def __init__(self, broker: Broker, on_failure: Callable[[str], None]) -> None:
        self._broker = broker
        self._on_failure = on_failure
        # A record, somebody who waits until all before it are acknowledged, or None to wake the thread.
        self._waiting: queue.SimpleQueue[tuple[Record, Acked] | threading.Event | None] = queue.SimpleQueue()
        self._unacked: dict[int, tuple[Record, Acked]] = {}
        self._count = 0  # of records taken over from the queue
        self._flushes: list[threading.Event] = []
        self._failures = 0
        self._stopping = False
        in_context = contextvars.copy_context().run
        self._thread = threading.Thread(target=in_context, args=(self._run,), name="results", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def send(self, record: Record, acked: Acked) -> None:
        """Take a record over. Does not block. Thread-safe."""
        self._waiting.put((record, acked))

    def flush(self, timeout_s: float) -> bool:
        """Block until everything taken over is acknowledged; returns False if it is not within `timeout_s`."""
        flushed = threading.Event()
        self._waiting.put(flushed)
        return flushed.wait(timeout_s)

    def stop(self) -> None:
        """End the thread and give up what is not acknowledged. Blocks for a moment. Idempotent."""
        self._stopping = True
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        writer: Writer | None = None
        while not self._stopping:
            try:
                if writer is None:
                    writer = self._broker.writer()
                    for number in list(self._unacked):
                        self._write(writer, number)
                for number in self._take_over():
                    self._write(writer, number)
                writer.poll()
                if self._flushes and not self._unacked:
                    for flushed in self._flushes:
                        flushed.set()
                    self._flushes.clear()
            except Exception as error:  # whatever it is: without this thread no attempt would ever be answered
                self._give_up(writer, error)
                writer = None
        if writer is not None:
            writer.close()

    def _take_over(self) -> list[int]:
        """Wait for a record, shortly if acknowledgements are due, and return the numbers of all that are there."""
        taken: list[int] = []
        timeout_s = UNACKED_WAIT_S if self._unacked else IDLE_WAIT_S
        try:
            item = self._waiting.get(timeout=timeout_s)
            while True:
                if isinstance(item, threading.Event):
                    self._flushes.append(item)
                elif item is not None:
                    self._count += 1
                    self._unacked[self._count] = item
                    taken.append(self._count)
                item = self._waiting.get_nowait()
        except queue.Empty:
            return taken

    def _write(self, writer: Writer, number: int) -> None:
        record, acked = self._unacked[number]

        def on_ack(_offset: int) -> None:
            failpoint("executor.before-result-ack")
            del self._unacked[number]
            self._failures = 0
            acked()
            failpoint("executor.after-result-ack")

        failpoint("executor.before-result")
        writer.send(record, on_ack)

    def _give_up(self, writer: Writer | None, error: Exception) -> None:
        if writer is not None:
            writer.close()
        self._failures += 1
        _log.error("results not written", error=str(error), waiting=len(self._unacked), failures=self._failures)
        if self._failures == MAX_FAILURES_IN_A_ROW:
            self._on_failure(f"results cannot be written: {error}")
        threading.Event().wait(RETRY_WAIT_S)
