"""Sees runs end, as any reader of `run-events` would."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from typing import Final

from tidegate import codec
from tidegate.domain.run_events import RunFinished
from tidegate.eventlog.interface import Broker, EventLogError, Message, TopicPartition
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER, EpochTracker

RUN_EVENTS: Final = "run-events"
MAX_BATCH: Final = 2000
POLL_S: Final = 0.1
# An entry that ends a run holds one of these words as they are. Only such entries are decoded: the benchmark shares the
# processors with what it measures.
_END_WORDS: Final = (b"succeeded", b"failed", b"cancelled")


class RunFailedError(RuntimeError):
    """A run of the benchmark did not succeed, so there is nothing to measure."""


class RunWatcher:
    """A thread that reads the log from its present end and notes when it saw which run end, and how."""

    def __init__(self, broker: Broker) -> None:
        """Blocks for some round trips. Raises EventLogError."""
        self._changed = threading.Condition()
        self._ended_at_s: dict[str, float] = {}
        self._order: list[str] = []
        self._taken = 0
        self._bad: dict[str, str] = {}
        self._failure = ""
        self._trackers: dict[int, EpochTracker] = {}
        self._stop = threading.Event()
        count = broker.describe([RUN_EVENTS])[RUN_EVENTS].partition_count
        self._inbox = broker.plain_inbox()
        # From the start, not the end: the epochs in force are announced there. The log is young when this is made.
        self._inbox.read_from(
            {TopicPartition(RUN_EVENTS, p): broker.offsets(RUN_EVENTS, p).start for p in range(count)}
        )
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading. Blocks for a moment."""
        self._stop.set()
        self._thread.join()
        self._inbox.close()

    def wait(self, run_ids: Collection[str], timeout_s: float, *, may_fail: bool = False) -> dict[str, float]:
        """Block until all the runs have ended; return when each was seen to, `time.monotonic`.

        Raises TimeoutError, and RunFailedError if one did not succeed (unless it may) or the log cannot be read.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            missing = {run_id for run_id in run_ids if run_id not in self._ended_at_s}
            seen = len(self._order)
            while missing:
                self._raise_if_bad(may_fail)
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"{len(missing)} of {len(run_ids)} runs did not end within {timeout_s:.0f} s")
                self._changed.wait(left_s)
                missing.difference_update(self._order[seen:])
                seen = len(self._order)
            self._raise_if_bad(may_fail)
            return {run_id: self._ended_at_s[run_id] for run_id in run_ids}

    def take_ended(self) -> list[str]:
        """Return the runs that were seen to end since the last call. Does not block. Raises RunFailedError if the log cannot be
        read."""
        with self._changed:
            self._raise_if_bad(may_fail=True)
            ended, self._taken = self._order[self._taken :], len(self._order)
            return ended

    def _raise_if_bad(self, may_fail: bool) -> None:
        if self._failure:
            raise RunFailedError(self._failure)
        for run_id, how in () if may_fail else self._bad.items():
            raise RunFailedError(f"run {run_id} ended as {how}")

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                messages = self._inbox.poll(MAX_BATCH, POLL_S)
                seen_at_s = time.monotonic()
                ends = [end for message in messages for end in self._ends_in(message)]
                if ends:
                    self._note(ends, seen_at_s)
        except EventLogError as error:
            with self._changed:
                self._failure = f"run-events cannot be read: {error}"
                self._changed.notify_all()

    def _ends_in(self, message: Message) -> list[tuple[str, RunFinished]]:
        headers = dict(message.headers)
        tracker = self._trackers.setdefault(message.partition, EpochTracker())
        epoch = int(headers.get(EPOCH_HEADER, b"%d" % NO_EPOCH))
        if headers.get(TYPE_HEADER) == ANNOUNCEMENT_TYPE.encode():
            tracker.announced(message.offset, epoch)
            return []
        value = message.value or b""
        if not tracker.is_valid(epoch) or not any(word in value for word in _END_WORDS):
            return []
        entry = codec.decode(value)
        return [(entry.subject, event) for event in entry.events if isinstance(event, RunFinished)]

    def _note(self, ends: list[tuple[str, RunFinished]], seen_at_s: float) -> None:
        with self._changed:
            for run_id, finished in ends:
                self._ended_at_s[run_id] = seen_at_s
                self._order.append(run_id)
                if finished.status != "succeeded":
                    self._bad[run_id] = f"{finished.status} ({finished.code}: {finished.reason})"
            self._changed.notify_all()
