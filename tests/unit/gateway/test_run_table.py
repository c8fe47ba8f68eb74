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
from tidegate.gateway.faust_app import ROW_CODEC, RunTable, codecs, make_app, make_table
from tidegate.gateway.view import RunRow, StepLine

PARTITIONS = 8


@pytest.fixture
def table() -> Iterator[RunTable]:
    """A table of an app that is never started: nothing here needs a broker."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(
            KafkaSettings(), group="g", instance_id="i", listening=listening, advertised_url="http://127.0.0.1:1"
        )
        yield make_table(app, "", PARTITIONS)
    asyncio.set_event_loop(None)
    loop.close()


def record(run_id: str, row: RunRow | None, value: bytes | None = b"{}") -> Any:
    """Return what Faust makes of a record of the changelog."""
    return SimpleNamespace(
        key=run_id, value=row, message=SimpleNamespace(value=None if row is None else value, partition=0)
    )


def at(seq: int) -> RunRow:
    return RunRow(run_id="a", seq=seq)


@pytest.mark.feature("D1")
def test_the_newest_row_counts_whatever_the_order_of_the_changelog(table: RunTable) -> None:
    table.apply_changelog_batch([record("a", at(5)), record("a", at(3)), record("b", at(1))])
    assert table.data["a"].seq == 5
    table.apply_changelog_batch([record("a", at(4))])
    assert table.data["a"].seq == 5
    table.apply_changelog_batch([record("a", at(6)), record("a", at(7)), record("a", at(6))])
    assert table.data["a"].seq == 7
    assert table.data["b"].seq == 1


@pytest.mark.feature("D7")
def test_a_tombstone_forgets_the_row(table: RunTable) -> None:
    table.apply_changelog_batch([record("a", at(5)), record("b", at(1))])
    table.apply_changelog_batch([record("a", None)])
    assert "a" not in table.data
    table.apply_changelog_batch([record("b", None), record("b", at(2))])
    assert table.data["b"].seq == 2


def test_a_row_that_cannot_be_read_leaves_the_known_one(table: RunTable) -> None:
    table.apply_changelog_batch([record("a", at(5))])
    unreadable = SimpleNamespace(key="a", value=None, message=SimpleNamespace(value=b"{", partition=0))
    table.apply_changelog_batch([unreadable])
    assert table.data["a"].seq == 5


def test_a_row_lies_in_the_partition_of_its_run(table: RunTable) -> None:
    for run_id in ("a", "b", "ä", "run-17"):
        assert table.partition_for_key(run_id) == partition_of(run_id, PARTITIONS)


def test_rows_are_json_that_people_can_read_and_what_is_no_row_is_none() -> None:
    codec = codecs.get_codec(ROW_CODEC)
    row = RunRow(run_id="a", status="waiting", seq=3, minutes={5: 7}, steps={"s": StepLine("dispatched", 2)})
    assert codec.loads(codec.dumps(row)) == row
    assert msgspec.json.decode(codec.dumps(row))["minutes"] == {"5": 7}
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
