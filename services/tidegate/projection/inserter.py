"""Inserts batches on a thread of its own, one at a time, again and again until ClickHouse has them.

So the reader keeps its place in the group while ClickHouse is slow or away, and decodes the next batch meanwhile.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from tidegate.eventlog.interface import TopicPartition
from tidegate.failpoints import failpoint
from tidegate.projection.rows import Reach, Row
from tidegate.projection.store import Store, StoreError, TablesMissingError

FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0

_log = structlog.get_logger()


class Batch:
    """Rows by table, and the next offset of every partition that they bring us to.

    reach: of the partitions whose freshness it tells. whole_to: once it is inserted, up to where the tables lack nothing of them.
    """

    __slots__ = (
        "began_s",
        "byte_count",
        "last_event_ms",
        "positions",
        "reach",
        "row_count",
        "tables",
        "urgent",
        "whole_to",
    )

    def __init__(self, began_s: float) -> None:
        self.began_s = began_s
        self.tables: dict[str, list[Row]] = {}
        self.positions: dict[TopicPartition, int] = {}
        self.last_event_ms: dict[TopicPartition, int] = {}
        self.reach: dict[TopicPartition, Reach] = {}
        self.whole_to: dict[TopicPartition, int] = {}
        self.row_count = 0
        self.byte_count = 0
        self.urgent = False

    def table(self, name: str) -> list[Row]:
        """Return the rows of a table, to be appended to."""
        return self.tables.setdefault(name, [])


class Inserter:
    """The thread that owns the connection to ClickHouse. `submit`, `take_done` and `wait` belong to the reader's thread.

    `failing` tells why the batch under way could not be inserted so far; empty if nothing is wrong.
    """

    def __init__(self, open_store: Callable[[], Store]) -> None:
        self._open_store = open_store
        self._store: Store | None = None
        self._lock = threading.Condition()
        self._batch: Batch | None = None
        self._done: Batch | None = None
        self._stopping = False
        self._is_open = False
        self._error: BaseException | None = None
        self.failing = ""
        # The logs of the thread name the service and the instance too.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="inserter", daemon=True)

    def start(self) -> None:
        """Begin; the store is opened first, by the thread. Does not block."""
        self._thread.start()

    def wait_opened(self, timeout_s: float) -> bool:
        """Block until ClickHouse is open and its tables are there, or for so long. Raises what ended the thread."""
        with self._lock:
            self._lock.wait_for(lambda: self._is_open or self._error is not None, timeout_s)
        if self._error is not None:
            raise self._error
        return self._is_open

    def why_not_open(self) -> str:
        """Return why there are no tables to insert into yet; empty if there are. Any thread may ask."""
        return "" if self._is_open else self.failing or "ClickHouse is being opened"

    @property
    def is_idle(self) -> bool:
        """Tell whether a batch may be submitted: the one before is inserted and was taken."""
        return self._batch is None and self._done is None

    def submit(self, batch: Batch) -> None:
        """Hand over a batch. Only while idle."""
        with self._lock:
            self._batch = batch
            self._lock.notify_all()

    def take_done(self) -> Batch | None:
        """Return the batch that was inserted since the last call. Raises what ended the thread, if something did."""
        if self._error is not None:
            raise self._error
        done, self._done = self._done, None
        return done

    def wait(self, timeout_s: float) -> bool:
        """Block until no batch is under way, or for so long. Tells whether none is."""
        with self._lock:
            return self._lock.wait_for(lambda: self._batch is None or self._error is not None, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Finish the batch under way if that takes no longer, then end. Returns False if it was given up."""
        self.wait(timeout_s)
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        self._thread.join(timeout_s)
        return self._batch is None

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._insert_until_done(batch)
        except BaseException as error:
            with self._lock:
                self._error = error
                self._lock.notify_all()
        finally:
            if self._store is not None:
                self._store.close()

    def _next(self) -> Batch | None:
        # Opened before the first batch, so that whoever asks in SQL finds tables, if empty ones.
        is_open = self._try_until_done(self._opened)
        with self._lock:
            self._is_open = is_open
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._batch is not None or self._stopping)
            return None if self._stopping else self._batch

    def _insert_until_done(self, batch: Batch) -> None:
        failpoint("projection.before-insert")
        if self._try_until_done(lambda: self._insert(batch)):
            failpoint("projection.after-insert")
            with self._lock:
                self._batch, self._done = None, batch
                self._lock.notify_all()

    def _insert(self, batch: Batch) -> None:
        batch.whole_to = self._opened().insert(batch.tables, batch.reach)

    def _opened(self) -> Store:
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def _try_until_done(self, action: Callable[[], object]) -> bool:
        """Repeat the action until it works; returns False if it had not when we were told to stop."""
        retry_s = FIRST_RETRY_S
        began_s = time.monotonic()
        while not self._stopping:
            try:
                action()
            except StoreError as error:
                self.failing = str(error)
                level = _log.info if isinstance(error, TablesMissingError) else _log.error
                level("ClickHouse: trying again", error=self.failing, retry_s=retry_s)
            else:
                if self.failing:
                    _log.info("ClickHouse works again", after_s=round(time.monotonic() - began_s, 1))
                    self.failing = ""
                return True
            with self._lock:
                self._lock.wait_for(lambda: self._stopping, retry_s)
            retry_s = min(2 * retry_s, LONGEST_RETRY_S)
        return False
