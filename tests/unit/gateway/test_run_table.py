"""The table that Faust keeps: where a row goes, and which rows of a changelog count."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from faust.types import TP

from tidegate.domain.identity import partition_of
from tidegate.eventlog.interface import EventLogError, Record
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gateway.changelog import Changelogs
from tidegate.gateway.faust_app import ROW_CODEC, TALLY_CODEC, ViewTable, ViewTables, codecs, make_app, make_tables
from tidegate.gateway.figures import Figures, Tally
from tidegate.gateway.view import RunRow, StepLine

PARTITIONS = 8


@pytest.fixture
def tables() -> Iterator[ViewTables]:
    """The tables of an app that is never started: nothing here needs a broker."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(
            KafkaSettings(), group="g", instance_id="i", listening=listening, advertised_url="http://127.0.0.1:1"
        )
        yield make_tables(app, "", PARTITIONS)
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def table(tables: ViewTables) -> ViewTable:
    return tables.runs


def record(run_id: str, row: RunRow | Tally | None, value: bytes | None = b"{}") -> Any:
    """Return what Faust makes of a record of a changelog; `feed` says where it lies."""
    message = SimpleNamespace(value=None if row is None else value, partition=0, offset=-1, topic="")
    return SimpleNamespace(key=run_id, value=row, message=message)


def feed(table: ViewTable, records: list[Any], lost: int = 0, topic: str = "") -> None:
    """Hand over records that follow on what the table has read of partition 0, but for so many that were lost."""
    read_to = table.store.read_to.setdefault(0, -1)
    for offset, one in enumerate(records, read_to + 1 + lost):
        one.message.offset, one.message.topic = offset, topic or table.changelog_topic.get_topic_name()
    table.apply_changelog_batch(records)


def at(seq: int) -> RunRow:
    return RunRow(run_id="a", seq=seq)


@pytest.mark.feature("D1")
def test_the_newest_row_counts_whatever_the_order_of_the_changelog(table: ViewTable) -> None:
    feed(table, [record("a", at(5)), record("a", at(3)), record("b", at(1))])
    assert table.data["a"].seq == 5
    feed(table, [record("a", at(4))])
    assert table.data["a"].seq == 5
    feed(table, [record("a", at(6)), record("a", at(7)), record("a", at(6))])
    assert table.data["a"].seq == 7
    assert table.data["b"].seq == 1


@pytest.mark.feature("D7")
def test_a_tombstone_forgets_the_row(table: ViewTable) -> None:
    feed(table, [record("a", at(5)), record("b", at(1))])
    feed(table, [record("a", None)])
    assert "a" not in table.data
    feed(table, [record("b", None), record("b", at(2))])
    assert table.data["b"].seq == 2


def test_a_row_that_cannot_be_read_leaves_the_known_one(table: ViewTable) -> None:
    feed(table, [record("a", at(5))])
    unreadable = record("a", None)
    unreadable.message.value = b"{"
    feed(table, [unreadable])
    assert table.data["a"].seq == 5


def test_a_row_lies_in_the_partition_of_its_run(table: ViewTable) -> None:
    for run_id in ("a", "b", "ä", "run-17"):
        assert table.partition_for_key(run_id) == partition_of(run_id, PARTITIONS)


def test_rows_are_json_that_people_can_read_and_what_is_no_row_is_none() -> None:
    codec = codecs.get_codec(ROW_CODEC)
    row = RunRow(run_id="a", status="waiting", seq=3, steps={"s": StepLine("dispatched", 2)})
    assert codec.loads(codec.dumps(row)) == row
    assert msgspec.json.decode(codec.dumps(row))["steps"] == {"s": ["dispatched", 2, "", ""]}
    assert codec.loads(b'{"seq": 1}') is None
    assert codec.loads(b"\xff") is None


@pytest.mark.feature("K2")
def test_what_faust_cannot_do_is_said_before_it_starts() -> None:
    settings = KafkaSettings(security_protocol="sasl_ssl", sasl_mechanism="OAUTHBEARER")
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(EventLogError, match="TIDEGATE_KAFKA_SASL_MECHANISM"),
    ):
        make_app(settings, group="g", instance_id="i", listening=listening, advertised_url="http://127.0.0.1:1")


# --- tallies -------------------------------------------------------------------------------------------------------------


def tally(as_of: int, log: str = "now", partition: int = 3) -> Tally:
    return Tally(partition=partition, kind="account", name="acme/shop", hour=7, log=log, as_of=as_of)


@pytest.mark.feature("D1")
def test_a_tally_of_another_log_is_not_measured_by_its_offset(tables: ViewTables) -> None:
    figures, key = tables.figures, tally(0).key
    feed(figures, [record(key, tally(90, "before")), record(key, tally(5)), record(key, tally(4))])
    assert (figures.data[key].log, figures.data[key].as_of) == ("now", 5)


def test_a_tally_lies_in_the_partition_that_it_is_of(tables: ViewTables) -> None:
    for partition in range(PARTITIONS):
        assert tables.figures.partition_for_key(tally(0, partition=partition).key) == partition


def test_a_record_of_the_other_table_is_not_taken(tables: ViewTables) -> None:
    feed(tables.runs, [record("a", tally(5))], topic="gateway-figures")
    assert not tables.runs.data
    assert tables.runs.store.read_to == {0: -1}


def test_tallies_are_short_json_and_may_get_further_numbers() -> None:
    codec = codecs.get_codec(TALLY_CODEC)
    one = Tally(partition=0, kind="tool", name="f", hour=7, log="l", as_of=3, minutes={59: Figures(5, 2, 1)})
    assert codec.loads(codec.dumps(one)) == one
    assert b'"minutes":{"59":[5,2,1,0,0,0]}' in codec.dumps(one)
    shorter = codec.dumps(one).replace(b"[5,2,1,0,0,0]", b"[5,2,1]")
    assert codec.loads(shorter) == one


# --- what is kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D1")
def test_what_comes_behind_a_gap_is_not_believed(table: ViewTable) -> None:
    feed(table, [record("a", at(1))])
    feed(table, [record("b", at(1))], lost=2)
    assert set(table.data) == {"a"}
    assert table.persisted_offset(TP("gateway-runs", 0)) == 0
    assert table.persisted_offset(TP("gateway-runs", 1)) is None


@pytest.mark.feature("D1")
def test_own_records_are_known_as_far_as_nobody_else_wrote_between(table: ViewTable) -> None:
    tp = TP("gateway-runs", 0)
    table.store.set_persisted_offset(tp, 5)
    assert table.persisted_offset(tp) is None, "what was before is not known"
    feed(table, [record("a", at(1))])
    for offset, known in ((1, 1), (2, 2), (4, 2), (5, 2), (3, 3)):
        table.store.set_persisted_offset(tp, offset)
        assert table.persisted_offset(tp) == known


@pytest.mark.feature("D1")
def test_partitions_that_we_stand_by_for_are_kept_and_others_forgotten(table: ViewTable) -> None:
    for number in range(40):
        table.take(f"r{number}", RunRow(run_id=f"r{number}", seq=1))
    table.store.read_to.update(dict.fromkeys(range(PARTITIONS), 7))
    active, standby = {TP("gateway-runs", 1)}, {TP("gateway-runs", 4)}
    asyncio.run(table.store.on_recovery_completed(active, standby))
    assert {partition_of(run_id, PARTITIONS) for run_id in table.data} == {1, 4}
    assert table.store.read_to == {1: 7, 4: 7}


@pytest.fixture
def written(table: ViewTable) -> tuple[MemoryBroker, list[str]]:
    """A changelog of three keys in partition 0, the second of which is forgotten again."""
    broker = MemoryBroker()
    broker.create_topic(table.name, PARTITIONS)
    keys = [name for name in map(str, range(100)) if partition_of(name, PARTITIONS) == 0][:3]
    writer = broker.writer()
    for key, seq in ((keys[0], 1), (keys[1], 1), (keys[0], 3), (keys[0], 2), (keys[1], 0), (keys[2], 9)):
        value = msgspec.json.encode(RunRow(run_id=key, seq=seq)) if seq else None
        writer.send(Record(table.name, 0, key.encode(), value))
    writer.flush(1.0)
    return broker, keys


@pytest.mark.feature("D1")
def test_a_changelog_is_read_whole_at_the_start_and_gaps_later(
    table: ViewTable, written: tuple[MemoryBroker, list[str]]
) -> None:
    broker, keys = written
    changelogs = Changelogs(broker, [table])
    assert asyncio.run(changelogs.read_on(range(PARTITIONS))) == 6
    assert {key: table.data[key].seq for key in table.data} == {keys[0]: 3, keys[2]: 9}
    assert table.store.read_to == {0: 5, **dict.fromkeys(range(1, PARTITIONS), -1)}
    assert asyncio.run(changelogs.read_on(range(PARTITIONS))) == 0

    feed(table, [record(keys[0], at(4))], lost=1)
    writer = broker.writer()
    for seq in (4, 5):
        writer.send(Record(table.name, 0, keys[0].encode(), msgspec.json.encode(RunRow(run_id=keys[0], seq=seq))))
    writer.flush(1.0)
    assert asyncio.run(changelogs.read_on([0])) == 2
    assert table.data[keys[0]].seq == 5


@pytest.mark.feature("D1")
def test_what_was_read_is_dropped_if_the_group_gave_out_its_partitions_meanwhile(
    table: ViewTable, written: tuple[MemoryBroker, list[str]]
) -> None:
    assert asyncio.run(Changelogs(written[0], [table]).read_on([0], lambda: False)) == 0
    assert not table.data
    assert table.store.read_to == {}
