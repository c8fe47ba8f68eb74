"""The inserter: one batch at a time, again and again until it is in."""

import threading
import time

import pytest

from tidegate.eventlog.interface import TopicPartition
from tidegate.projection import inserter as module
from tidegate.projection.inserter import Batch, Inserter
from tidegate.projection.migrations import MigrationError
from tidegate.projection.store import StoreError

WAIT_S = 20.0


class Store:
    """Takes batches, after failing as often as it is told to."""

    def __init__(self) -> None:
        self.failures = 0
        self.inserted: list[object] = []
        self.closed = False
        self.threads: set[str] = set()

    def insert(self, tables: object, reach: object) -> dict[TopicPartition, int]:
        self.threads.add(threading.current_thread().name)
        if self.failures:
            self.failures -= 1
            raise StoreError("away")
        self.inserted.append(tables)
        return {}

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(module, "LONGEST_RETRY_S", 0.01)


def batch(name: str) -> Batch:
    made = Batch(0.0)
    made.table(name)
    return made


def take(inserter: Inserter) -> Batch:
    deadline = time.monotonic() + WAIT_S
    while (done := inserter.take_done()) is None:
        assert time.monotonic() < deadline
        inserter.wait(0.05)
    return done


def test_a_batch_is_inserted_on_the_thread_and_given_back_once() -> None:
    store = Store()
    inserter = Inserter(lambda: store)  # type: ignore[arg-type, return-value] # has what is used of a Store
    inserter.start()
    first = batch("a")
    inserter.submit(first)

    assert take(inserter) is first
    assert inserter.take_done() is None
    assert inserter.is_idle
    assert store.inserted == [first.tables]
    assert store.threads == {"inserter"}
    assert inserter.stop(WAIT_S)
    assert store.closed


def test_it_is_not_idle_until_the_batch_was_taken() -> None:
    store = Store()
    inserter = Inserter(lambda: store)  # type: ignore[arg-type, return-value] # has what is used of a Store
    inserter.start()
    inserter.submit(batch("a"))

    assert inserter.wait(WAIT_S)
    assert not inserter.is_idle
    take(inserter)
    assert inserter.is_idle
    inserter.stop(WAIT_S)


def test_a_store_that_fails_is_tried_again_until_it_works() -> None:
    store = Store()
    store.failures = 7
    inserter = Inserter(lambda: store)  # type: ignore[arg-type, return-value] # has what is used of a Store
    inserter.start()
    inserter.submit(batch("a"))

    take(inserter)

    assert store.failures == 0
    assert len(store.inserted) == 1
    assert inserter.failing == ""
    inserter.stop(WAIT_S)


def test_a_store_that_cannot_be_opened_is_opened_later() -> None:
    store = Store()
    tries: list[int] = []

    def open_store() -> Store:
        tries.append(1)
        if len(tries) < 4:
            raise StoreError("away")
        return store

    inserter = Inserter(open_store)  # type: ignore[arg-type] # has what is used of a Store
    inserter.start()
    inserter.submit(batch("a"))

    take(inserter)

    assert len(tries) == 4
    inserter.stop(WAIT_S)


def test_stopping_gives_up_a_batch_that_cannot_be_inserted() -> None:
    store = Store()
    store.failures = 10**9
    inserter = Inserter(lambda: store)  # type: ignore[arg-type, return-value] # has what is used of a Store
    inserter.start()
    inserter.submit(batch("a"))
    assert not inserter.wait(0.05)
    assert inserter.failing == "away"

    assert not inserter.stop(0.2)

    assert store.inserted == []
    assert inserter.take_done() is None


def test_what_no_retry_can_mend_is_raised_to_the_reader() -> None:
    def refuse() -> Store:
        raise MigrationError("a newer projection was here")

    inserter = Inserter(refuse)  # type: ignore[arg-type] # never returns
    inserter.start()
    inserter.submit(batch("a"))
    assert inserter.wait(WAIT_S)

    with pytest.raises(MigrationError):
        inserter.take_done()
