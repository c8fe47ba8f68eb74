"""Records of the topics -> rows of the fact tables."""

import base64
import json
import re

import msgspec
import pytest

from support.logs import LogWriter, Story, dead_letter_record, instance_record
from tidegate import codec
from tidegate.eventlog.interface import Message
from tidegate.projection import rows
from tidegate.projection.migrations import migrations

pytestmark = pytest.mark.feature("O1")


def entries(log: str) -> list[tuple[int, int, dict[str, object]]]:
    """Return (partition, offset, fields) of every entry that a story wrote into a log."""
    story = Story()
    story.play_all()
    offsets: dict[int, int] = {}
    found = []
    for record in LogWriter(3, 2).take(story.decided):
        if record.topic != log:
            continue
        offset = offsets.get(record.partition, 0)
        offsets[record.partition] = offset + 1
        name, fields = codec.decode_facts(record.value)
        if name.endswith("Entry"):
            found.append((record.partition, offset, fields))
    return found


def as_dicts(table: str, found: list[rows.Row]) -> list[dict[str, object]]:
    return [dict(zip(rows.COLUMNS[table], row, strict=True)) for row in found]


def test_a_run_entry_gives_one_row_per_event_with_contiguous_seqs() -> None:
    for partition, offset, entry in entries("run-events"):
        found: list[rows.Row] = []
        rows.add_run_events(found, entry, partition, offset)

        shown = as_dicts(rows.EVENTS, found)
        assert [row["seq"] for row in shown] == list(
            range(entry["first_seq"], entry["first_seq"] + len(entry["events"]))
        )
        for row, (name, event) in zip(shown, entry["events"], strict=True):
            assert row["run_id"] == entry["subject"]
            assert (row["partition"], row["offset"], row["epoch"]) == (partition, offset, entry["epoch"])
            assert row["type"] == name
            assert row["step_id"] == event.get("step_id", "")
            assert row["attempt"] == event.get("attempt", 0)
            assert row["actual_micros"] == event.get("actual_micros", 0)
            assert row["at_ms"] == entry["now_ms"]


def test_the_body_of_an_event_is_all_its_fields_with_bytes_in_base64() -> None:
    for partition, offset, entry in entries("run-events"):
        found: list[rows.Row] = []
        rows.add_run_events(found, entry, partition, offset)

        for row, (_, event) in zip(as_dicts(rows.EVENTS, found), entry["events"], strict=True):
            expected = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in event.items()}
            assert json.loads(bytes(row["body"])) == expected


def test_a_ledger_entry_gives_one_row_per_event_with_its_money() -> None:
    seen = set()
    for partition, offset, entry in entries("gate-ledger"):
        found: list[rows.Row] = []
        rows.add_ledger_events(found, entry, partition, offset)

        for row, (name, event) in zip(as_dicts(rows.LEDGER, found), entry["events"], strict=True):
            seen.add(name)
            assert row["ledger"] == partition
            assert row["account"] == event["account"]
            assert row["run_id"] == event["run_id"]
            assert row["budget_micros"] == event.get("budget_micros")
            for money in ("reserved_micros", "actual_micros", "overshoot_micros"):
                assert row[money] == event.get(money, 0)
    assert {"RunOpened", "AttemptReserved", "AttemptRefused", "ApprovalHeld", "AttemptPlaced", "AttemptSettled"} <= seen


def test_the_same_record_gives_the_same_rows() -> None:
    partition, offset, entry = entries("run-events")[0]
    first: list[rows.Row] = []
    second: list[rows.Row] = []

    rows.add_run_events(first, entry, partition, offset)
    rows.add_run_events(second, entry, partition, offset)

    assert first == second


def test_an_event_type_of_a_newer_writer_is_a_row_too() -> None:
    _, _, entry = entries("run-events")[0]
    entry["events"] = [("RunRetired", {"by": "ann", "kept": 3})]
    found: list[rows.Row] = []

    rows.add_run_events(found, entry, 0, 0)

    (row,) = as_dicts(rows.EVENTS, found)
    assert (row["type"], bytes(row["body"])) == ("RunRetired", b'{"by":"ann","kept":3}')


@pytest.mark.parametrize(("written", "shown"), [(-1, 41), (7, 7)])
def test_a_registration_is_its_own_incarnation(written: int, shown: int) -> None:
    _, fields = codec.decode_facts(instance_record("ex-1", incarnation=written).value)

    row = dict(zip(rows.COLUMNS[rows.INSTANCES], rows.instance_row(fields, 41), strict=True))

    assert (row["instance_id"], row["incarnation"], row["offset"], row["removed"]) == ("ex-1", shown, 41, False)


def test_a_dead_letter_is_named_by_where_its_original_lies() -> None:
    _, fields = codec.decode_facts(dead_letter_record(5, b"\xff\x00{").value)

    (row,) = [json.loads(line) for line in rows.encode([rows.dead_letter_row(fields, 77)]).splitlines()]

    shown = dict(zip(rows.COLUMNS[rows.DEAD_LETTERS], row, strict=True))
    assert (shown["topic"], shown["partition"], shown["offset"], shown["letter_offset"]) == ("run-requests", 0, 5, 77)
    assert base64.b64decode(shown["original_base64"]) == b"\xff\x00{"
    assert base64.b64decode(json.loads(shown["headers"])["h"]) == b"\x00\xfe"


@pytest.mark.parametrize(
    "key",
    [
        *(b"", b"x", b"run-requests:0", b"run-requests:0:", b"run-requests:-1:5", "t:٣:5".encode()),
        b"run-requests:0:" + b"9" * 5_000,  # more digits than Python makes a number of
        b"run-requests:99999999999:5",  # more than the column holds: it would remove the row of another one
    ],
    ids=lambda key: key[:30],
)
def test_a_tombstone_with_a_strange_key_removes_no_dead_letter(key: bytes) -> None:
    assert rows.removed_dead_letter_row(key, 3) is None


def test_tombstones_give_whole_rows() -> None:
    letter = rows.removed_dead_letter_row(b"run-requests:4:19", 3)
    assert letter is not None

    assert dict(zip(rows.COLUMNS[rows.DEAD_LETTERS], letter, strict=True))["offset"] == 19
    assert dict(zip(rows.COLUMNS[rows.INSTANCES], rows.removed_instance_row(b"\xffx", 3), strict=True))["removed"]


def test_a_batch_is_one_line_of_json_per_row_whatever_is_in_it() -> None:
    nasty = 'line\nfeed\ttab\\ "quote" \x00 \u2028 😀'
    message = Message("run-events", 1, 9, None, b"123", (), 55)

    text = rows.encode([rows.unreadable_row(message, nasty), rows.unreadable_row(message, "b")])

    lines = text.decode().split("\n")
    assert lines[-1] == ""
    assert [json.loads(line) for line in lines[:-1]] == [
        ["run-events", 1, 9, nasty, 3, 55],
        ["run-events", 1, 9, "b", 3, 55],
    ]


def test_every_column_is_one_of_its_table() -> None:
    sql = "\n".join(statement for migration in migrations() for statement in migration.statements)
    for table, columns in rows.COLUMNS.items():
        definition = sql.split(f"CREATE TABLE IF NOT EXISTS {table}\n", 1)[1].split("ENGINE", 1)[0]
        names = [line.split()[0].strip("`") for line in definition.splitlines() if line.startswith("    ")]
        names += re.findall(rf"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS (\w+)", sql)

        assert set(columns) <= set(names), table


def test_numbers_of_any_size_that_avro_has_are_written_as_they_are() -> None:
    _, _, entry = entries("run-events")[0]
    entry["events"] = [("ResultIgnored", {"step_id": "s", "attempt": -(2**63), "actual_micros": 2**63 - 1})]
    found: list[rows.Row] = []

    rows.add_run_events(found, entry, 0, 0)

    decoded = msgspec.json.decode(rows.encode(found))
    assert -(2**63) in decoded
    assert 2**63 - 1 in decoded
