"""The table that Faust keeps: where a row goes, and which rows of a changelog count."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tidegate.domain.identity import partition_of
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings
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
    """Return what Faust makes of a record of the changelog."""
    return SimpleNamespace(
        key=run_id, value=row, message=SimpleNamespace(value=None if row is None else value, partition=0)
    )


def at(seq: int) -> RunRow:
    return RunRow(run_id="a", seq=seq)


@pytest.mark.feature("D1")
def test_the_newest_row_counts_whatever_the_order_of_the_changelog(table: ViewTable) -> None:
    table.apply_changelog_batch([record("a", at(5)), record("a", at(3)), record("b", at(1))])
    assert table.data["a"].seq == 5
    table.apply_changelog_batch([record("a", at(4))])
    assert table.data["a"].seq == 5
    table.apply_changelog_batch([record("a", at(6)), record("a", at(7)), record("a", at(6))])
    assert table.data["a"].seq == 7
    assert table.data["b"].seq == 1


@pytest.mark.feature("D7")
def test_a_tombstone_forgets_the_row(table: ViewTable) -> None:
    table.apply_changelog_batch([record("a", at(5)), record("b", at(1))])
    table.apply_changelog_batch([record("a", None)])
    assert "a" not in table.data
    table.apply_changelog_batch([record("b", None), record("b", at(2))])
    assert table.data["b"].seq == 2


def test_a_row_that_cannot_be_read_leaves_the_known_one(table: ViewTable) -> None:
    table.apply_changelog_batch([record("a", at(5))])
    unreadable = SimpleNamespace(key="a", value=None, message=SimpleNamespace(value=b"{", partition=0))
    table.apply_changelog_batch([unreadable])
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
    figures.apply_changelog_batch([record(key, tally(90, "before")), record(key, tally(5)), record(key, tally(4))])
    assert (figures.data[key].log, figures.data[key].as_of) == ("now", 5)


def test_a_tally_lies_in_the_partition_that_it_is_of(tables: ViewTables) -> None:
    for partition in range(PARTITIONS):
        assert tables.figures.partition_for_key(tally(0, partition=partition).key) == partition


def test_a_record_of_the_other_table_is_not_taken(tables: ViewTables) -> None:
    tables.runs.apply_changelog_batch([record("a", at(5)), record("b", tally(5))])
    tables.figures.apply_changelog_batch([record("a", at(5))])
    assert set(tables.runs.data) == {"a"}
    assert not tables.figures.data


def test_tallies_are_short_json_and_may_get_further_numbers() -> None:
    codec = codecs.get_codec(TALLY_CODEC)
    one = Tally(partition=0, kind="tool", name="f", hour=7, log="l", as_of=3, minutes={59: Figures(5, 2, 1)})
    assert codec.loads(codec.dumps(one)) == one
    assert b'"minutes":{"59":[5,2,1,0,0,0]}' in codec.dumps(one)
    shorter = codec.dumps(one).replace(b"[5,2,1,0,0,0]", b"[5,2,1]")
    assert codec.loads(shorter) == one
