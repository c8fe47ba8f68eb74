"""Readers of the logs, with foreign records between the true ones: none ends, and what is true is still found."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import hostile
from support.hostile import Known, fuzzed
from support.logs import LogWriter, Story
from tidegate import codec
from tidegate.codec import avro
from tidegate.domain import states
from tidegate.domain.entry import OwnerAnnounced
from tidegate.eventlog.epochs import epoch_before
from tidegate.eventlog.interface import Message, Record, TopicPartition
from tidegate.eventlog.kafka.subscription import AssignmentChange
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.gateway.view import LiveView, PartitionReader
from tidegate.projection import rows
from tidegate.projection.inserter import Batch
from tidegate.projection.service import Limits, Projection
from tidegate.sdk.reading import ValidEntries

RUN = "s-plain-0"


def true_records() -> dict[str, list[Record]]:
    story = Story()
    story.play_plain(0)
    story.play_humans()
    written = LogWriter(1, 1).take(story.decided, trouble=0.1)
    return {topic: [record for record in written if record.topic == topic] for topic in ("run-events", "gate-ledger")}


TRUE = true_records()
KNOWN = Known(
    {
        "run_id": (RUN,),
        "subject": (RUN, "ledger-0"),
        "epoch": (0, 1, 5),
        "first_seq": (1, 2, 9),
        "step_id": ("a", "b"),
        "now_ms": (1_767_100_000_000,),
    }
)


@st.composite
def foreign(draw: st.DrawFn, topic: str) -> tuple[int, Record]:
    """Return a record of nobody and before which of the true ones it lies."""
    record = Record(topic, 0, draw(hostile.keys()), draw(hostile.values(topic, KNOWN)), draw(hostile.headers()))
    return draw(st.integers(0, len(TRUE[topic]))), record


def written(topic: str, strangers: list[tuple[int, Record]]) -> MemoryBroker:
    broker = MemoryBroker()
    for name in ("run-events", "gate-ledger", "instances", "dead-letters", "schemas"):
        broker.create_topic(name, 1, {"max.message.bytes": str(2**24)})
    writer = broker.writer()
    for number, record in enumerate([*TRUE[topic], None]):
        for _, stranger in (one for one in strangers if one[0] == number):
            writer.send(stranger)
        if record is not None:
            writer.send(record)
    writer.flush(1.0)
    return broker


def messages_of(broker: MemoryBroker, topic: str) -> list[Message]:
    start, end = broker.offsets(topic, 0)
    return list(broker.read(topic, 0, start, end))


@given(st.lists(foreign("run-events"), min_size=1, max_size=5))
@fuzzed(120)
def test_foreign_records_in_the_log_of_runs_stop_no_reader(strangers: list[tuple[int, Record]]) -> None:
    broker = written("run-events", strangers)
    messages = messages_of(broker, "run-events")
    verify_partition(messages, Report())
    reader, view, valid = PartitionReader(0), LiveView(), ValidEntries()
    for message in messages:
        valid.admits(message)
        try:
            entry = reader.take(message.offset, message.value)
        except codec.DecodeError:
            continue
        if entry is not None:
            msgspec.json.encode(view.take(entry, message.partition, message.offset))
    epoch_before(broker, "run-events", 0, len(messages))
    project(broker, "run-events")


@given(st.lists(foreign("gate-ledger"), min_size=1, max_size=5))
@fuzzed(120)
def test_foreign_records_in_the_ledger_stop_no_reader(strangers: list[tuple[int, Record]]) -> None:
    broker = written("gate-ledger", strangers)
    verify_partition(messages_of(broker, "gate-ledger"), Report())
    project(broker, "gate-ledger")


@given(st.sampled_from(("instances", "dead-letters")).flatmap(lambda t: hostile.values(t, KNOWN).map(lambda v: (t, v))))
@fuzzed(120)
def test_foreign_records_in_other_topics_stop_no_projection(written_: tuple[str, bytes | None]) -> None:
    topic, value = written_
    broker = written("run-events", [])
    writer = broker.writer()
    writer.send(Record(topic, 0, b"\xff:1:2", value))
    writer.flush(1.0)
    project(broker, topic)


class _Everything:
    """A subscription that has one topic, from its beginning."""

    def __init__(self, broker: MemoryBroker, topic: str) -> None:
        self.assigned = frozenset([TopicPartition(topic, 0)])
        self._messages = messages_of(broker, topic)
        self._change = AssignmentChange(dict.fromkeys(self.assigned), frozenset())

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        found, self._messages = self._messages, []
        return found

    def take_changes(self) -> AssignmentChange:
        change, self._change = self._change, AssignmentChange({}, frozenset())
        return change

    def ends(self) -> dict[TopicPartition, int]:
        return {}


class _Encoding:
    """An inserter that makes the text that ClickHouse would get."""

    is_idle = True
    failing = ""

    def take_done(self) -> Batch | None:
        return None

    def submit(self, batch: Batch) -> None:
        for table, table_rows in batch.tables.items():
            assert rows.encode(table_rows) or not table_rows, table
            for row in table_rows:
                times = [
                    value
                    for name, value in zip(rows.COLUMNS[table], row, strict=True)
                    if name in ("at_ms", "started_ms")
                ]
                assert all(0 <= at_ms < rows.LATEST_MS for at_ms in times)


def project(broker: MemoryBroker, topic: str) -> None:
    projection = Projection(
        _Everything(broker, topic),  # type: ignore[arg-type]
        broker,
        _Encoding(),  # type: ignore[arg-type]
        Limits(0.0, 10_000, 10**9),
        sleep=lambda _: None,
    )
    projection.run_once()
    assert projection.counters.messages == broker.offsets(topic, 0).end


# --- single cases ---------------------------------------------------------------


def claim(epoch: int) -> Record:
    record = OwnerAnnounced(
        log="run-events", partition=0, epoch=epoch, repeat=1, topic_id="", partition_count=1, instance_id="", at_ms=0
    )
    headers = (("type", b"OwnerAnnounced"), ("epoch", b"%d" % epoch))
    return Record("run-events", 0, b"owner:x:1", codec.encode(record), headers)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("epoch", [10**6, 2**62])
def test_an_epoch_that_cannot_be_does_not_void_the_true_one(epoch: int) -> None:
    """An epoch is the offset of a record that lies before. A claim of a later one would silence the log for all readers."""
    broker = written("run-events", [(3, claim(epoch))])
    messages = messages_of(broker, "run-events")
    report = Report()
    runs = verify_partition(messages, report)
    assert report.ok, report.problems
    assert runs[RUN].status == states.SUCCEEDED
    valid = ValidEntries()
    assert sum(valid.admits(message) for message in messages) == report.entries
    assert epoch_before(broker, "run-events", 0, len(messages)) < len(messages)


@pytest.mark.parametrize("text", [b"9" * 5_000, b"999999999", b"\xb2", b"", b"-5"])
def test_an_epoch_header_that_cannot_be_is_nobodys(text: bytes) -> None:
    stranger = Record("run-events", 0, b"k", b"garbage", (("epoch", text), ("type", b"RunEntry")))
    broker = written("run-events", [(len(TRUE["run-events"]), stranger)])
    messages = messages_of(broker, "run-events")
    alone = written("run-events", [])
    end = len(messages)
    assert epoch_before(broker, "run-events", 0, end) == epoch_before(alone, "run-events", 0, end - 1)
    valid = ValidEntries()
    assert [valid.admits(message) for message in messages][-1] is False


# --- schemas ---------------------------------------------------------------


def schema_with(fields: list[dict[str, object]]) -> str:
    return json.dumps({"type": "record", "name": "RunCommand", "namespace": "tidegate", "fields": fields})


def test_a_schema_that_gives_a_known_field_another_type_is_refused() -> None:
    with pytest.raises(codec.DecodeError, match="run_id: was long"):
        codec.register_schema(schema_with([{"name": "run_id", "type": "long"}]))


def test_a_schema_that_doubles_with_every_name_is_refused() -> None:
    inner: object = {"type": "record", "name": "X0", "fields": [{"name": "n", "type": "long"}]}
    for level in range(1, 40):
        fields = [{"name": "a", "type": inner}, {"name": "b", "type": f"X{level - 1}"}]
        inner = {"type": "record", "name": f"X{level}", "fields": fields}
    with pytest.raises(codec.DecodeError, match="too large"):
        codec.register_schema(schema_with([{"name": "more", "type": inner}]))


def test_a_schema_of_items_without_bytes_is_refused() -> None:
    """Five bytes could stand for a list of a thousand million items."""
    nothing = {"type": "record", "name": "Nothing", "fields": []}
    holder = {"type": "record", "name": "Holder", "fields": [{"name": "n", "type": nothing}]}
    with pytest.raises(codec.DecodeError, match="without bytes"):
        codec.register_schema(schema_with([{"name": "more", "type": {"type": "array", "items": holder}}]))


def test_a_schema_of_a_later_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avro, "_by_header", dict(avro._by_header))
    later = json.loads((codec.schemas_dir() / "avro" / "StepResult.v1.avsc").read_text(encoding="utf-8"))
    later["fields"].append({"name": "later", "type": {"type": "map", "values": "long"}})
    codec.register_schema(json.dumps(later))
