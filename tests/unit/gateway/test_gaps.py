"""Faust may pass over records when it begins to read a partition; the live view must not. Found by the chaos demo."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from support.logs import LogWriter, Story
from tidegate.eventlog.interface import Message
from tidegate.eventlog.memory import MemoryBroker
from tidegate.gateway import service
from tidegate.gateway.faust_app import RUN_EVENTS, TABLES, ViewTables
from tidegate.gateway.service import Gateway


class _Table(dict[str, Any]):
    """A table whose changelog takes everything at once, and is not asked for again."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.unacknowledged: list[Any] = []
        self.changelog_records = 0
        self.store = SimpleNamespace(read_to={0: -1})

    def on_recover(self, _: Any) -> None:
        pass


def gateway(broker: MemoryBroker, committed: int = 0) -> Gateway:
    """Return a gateway that owns the only partition, as after its table was restored."""
    signal = SimpleNamespace(connect=lambda *_, **__: None)
    app: Any = SimpleNamespace(
        topic=lambda *_, **__: None,
        agent=lambda *_, **__: lambda _: None,
        on_partitions_revoked=signal,
        on_partitions_assigned=signal,
        assignor=SimpleNamespace(assigned_actives=lambda: [TP(name, 0) for name in TABLES]),
    )
    tables: Any = ViewTables(*map(_Table, TABLES))  # type: ignore[arg-type]
    made = Gateway(
        app,
        tables,
        broker,
        lambda: {0: committed} if committed else {},
        prefix="",
        log="the log",
        partition_count=1,
        keep_minutes=60,
    )
    asyncio.run(made._recovered())
    assert made.owned == {0}
    return made


@pytest.fixture
def log() -> tuple[MemoryBroker, list[Message]]:
    """Runs of every kind in one partition."""
    story = Story()
    story.play_all()
    broker = MemoryBroker()
    for topic in (RUN_EVENTS, *TABLES):
        broker.create_topic(topic, 1)
    writer = broker.writer()
    for record in LogWriter(1, 1).take(story.decided):
        if record.topic == RUN_EVENTS:
            writer.send(record)
    writer.flush(1)
    return broker, list(broker.read(RUN_EVENTS, 0, 0, broker.offsets(RUN_EVENTS, 0).end))


class _Noted:
    """A broker that notes from where it is read, and that has compacted some records away."""

    def __init__(self, broker: MemoryBroker, read: list[int], compacted: range = range(0)) -> None:
        self._broker, self._noted, self._compacted = broker, read, compacted
        self.offsets = broker.offsets

    def read(self, topic: str, partition: int, start: int, stop: int) -> Any:
        self._noted.append(start)
        kept = self._broker.read(topic, partition, start, stop)
        return (message for message in kept if message.offset not in self._compacted)


def rows_after(made: Gateway, batches: list[list[Message]]) -> dict[str, tuple[int, str, bool]]:
    """Hand over the batches as Faust would; return the rows' seq, status, and whether they say that they are incomplete."""

    async def hand_over() -> None:
        for batch in batches:
            events: Any = [SimpleNamespace(message=message) for message in batch]
            assert await made._handle(events) == events

    asyncio.run(hand_over())
    return {run_id: (row.seq, row.status, row.incomplete) for run_id, row in made.view.rows.items()}


@pytest.mark.feature("O1")
@pytest.mark.parametrize("hole", ["between two batches", "within a batch", "at the beginning"])
def test_what_faust_passes_over_is_read_from_the_log(log: tuple[MemoryBroker, list[Message]], hole: str) -> None:
    broker, messages = log
    whole = rows_after(gateway(broker), [messages])
    batches = {
        "between two batches": [messages[:4], messages[10:]],
        "within a batch": [[*messages[:4], *messages[10:]]],
        "at the beginning": [messages[6:]],
    }[hole]
    assert rows_after(gateway(broker), batches) == whole
    assert not any(incomplete for _, _, incomplete in whole.values())


def test_reading_begins_behind_what_was_committed(log: tuple[MemoryBroker, list[Message]]) -> None:
    broker, messages = log
    read: list[int] = []
    made = gateway(broker, committed=messages[20].offset)
    made._broker = _Noted(broker, read)  # type: ignore[assignment]
    rows_after(made, [messages[22:]])
    assert messages[20].offset in read
    rows_after(made, [messages[22:]])
    assert read.count(messages[20].offset) == 1, "what follows on is no gap"


def test_offsets_that_compaction_took_are_no_gap(log: tuple[MemoryBroker, list[Message]]) -> None:
    broker, messages = log
    whole = rows_after(gateway(broker), [messages])
    read: list[int] = []
    compacted: Any = _Noted(broker, read, range(3, 6))
    rows = rows_after(gateway(compacted), [[message for message in messages if message.offset not in range(3, 6)]])
    assert rows.keys() == whole.keys()
    assert len(read) <= 2, "once for the batch, and once for the epoch"


def test_what_is_read_again_after_a_rebalance_is_no_gap(log: tuple[MemoryBroker, list[Message]]) -> None:
    broker, messages = log
    whole = rows_after(gateway(broker), [messages])
    assert rows_after(gateway(broker), [messages[:10], messages[4:20], [*messages[15:25], *messages[20:]]]) == whole


def ready_by_itself(made: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return whether the view was complete before it had waited, while it waited, and when it had read the rest by itself."""
    said = [made.is_ready]
    asyncio.run(made.read_the_rest())
    said.append(made.is_ready)
    monkeypatch.setattr(service, "SILENCE_S", 0.0)
    asyncio.run(made.read_the_rest())
    return [*said, made.is_ready]


def test_a_view_whose_last_records_faust_passed_over_becomes_complete(
    log: tuple[MemoryBroker, list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written behind them, so nothing would show that they are missing: a gateway was never ready."""
    broker, messages = log
    whole = rows_after(gateway(broker), [messages])
    made = gateway(broker)
    rows_after(made, [messages[:-5]])
    assert ready_by_itself(made, monkeypatch) == [False, False, True]
    assert {run_id: (row.seq, row.status, row.incomplete) for run_id, row in made.view.rows.items()} == whole
    rows_after(made, [messages[-5:]])  # should Faust hand them over after all
    assert {run_id: (row.seq, row.status, row.incomplete) for run_id, row in made.view.rows.items()} == whole


def test_a_partition_of_which_faust_gives_nothing_becomes_complete(
    log: tuple[MemoryBroker, list[Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, messages = log
    made = gateway(broker)
    assert ready_by_itself(made, monkeypatch) == [False, False, True]
    assert made.view.rows.keys() == gateway_rows(broker, messages)
    compacted: Any = _Noted(broker, [], range(len(messages) + 1))
    assert ready_by_itself(gateway(compacted, committed=1), monkeypatch)[-1], "there is nothing left to wait for"


def gateway_rows(broker: MemoryBroker, messages: list[Message]) -> Any:
    return rows_after(gateway(broker), [messages]).keys()
