"""What a writer promises."""

import random
import time
from collections.abc import Callable, Sequence

import pytest

from contract.worlds import LARGEST_BYTES, PATIENCE_S, Outage, World, eventually, gather, numbered, write
from tidegate.eventlog.interface import Record, TopicPartition, WriteFailedError, Writer


def send_all(writer: Writer, records: Sequence[Record], acked: list[int] | None = None) -> None:
    """Send and flush: a refusal may come from either."""
    for record in records:
        writer.send(record, None if acked is None else acked.append)
    writer.flush(PATIENCE_S)


def test_acknowledged_offsets_are_contiguous_while_a_writer_is_alone(world: World) -> None:
    world.create_topic("log")
    writer = world.broker.writer()
    acked: list[int] = []

    send_all(writer, numbered("log", 500), acked)

    assert acked == list(range(500))


def test_acknowledged_offsets_jump_when_another_writer_wrote_in_between(world: World) -> None:
    world.create_topic("log")
    rightful, zombie = world.broker.writer(), world.broker.writer()
    acked: list[int] = []

    for writer in (rightful, zombie, rightful):
        writer.send(Record("log", 0, b"key", b"value"), acked.append if writer is rightful else None)
        writer.flush(PATIENCE_S)

    assert acked == [0, 2]


def test_acknowledgements_come_in_order_in_each_partition(world: World) -> None:
    world.create_topic("log", partitions=3)
    writer = world.broker.writer()
    acked: list[tuple[int, int, int]] = []

    def note(at: int, n: int) -> Callable[[int], None]:
        return lambda offset: acked.append((at, n, offset))

    for n in range(300):
        writer.send(Record("log", n % 3, b"key", b""), note(n % 3, n))
    writer.flush(PATIENCE_S)

    for partition in range(3):
        mine = [(n, offset) for at, n, offset in acked if at == partition]
        assert mine == [(3 * offset + partition, offset) for offset in range(100)]


def test_acknowledgements_are_told_only_by_poll_and_flush(world: World) -> None:
    world.create_topic("log")
    writer = world.broker.writer()
    acked: list[int] = []

    writer.send(Record("log", 0, b"key", b"value"), acked.append)
    time.sleep(0.2)
    assert acked == []

    eventually(lambda: acked == [0], writer.poll)


def test_a_callback_may_send(world: World) -> None:
    """Tells are sent when their entry is acknowledged."""
    world.create_topic("log")
    world.create_topic("tells")
    writer = world.broker.writer()

    writer.send(Record("log", 0, b"entry", b""), lambda _: writer.send(Record("tells", 0, b"tell", b"")))
    writer.flush(PATIENCE_S)
    writer.flush(PATIENCE_S)

    assert world.broker.offsets("tells", 0).end == 1


def test_what_is_read_is_what_was_written(world: World) -> None:
    world.create_topic("log", partitions=2)
    headers = (("type", b"RunEntry"), ("epoch", b"12"), ("epoch", b"13"), ("empty", b""))
    written = [
        Record("log", 1, b"\x00\xff", b"\x00\x01\xfe", headers),
        Record("log", 1, b"tombstone", None),
        Record("log", 1, b"empty", b""),
        Record("log", 1, b"", b"empty key"),
    ]
    before_ms = time.time_ns() // 1_000_000
    write(world.broker, written)
    after_ms = time.time_ns() // 1_000_000

    messages = list(world.broker.read("log", 1, 0, 4))

    assert [Record(m.topic, m.partition, m.key or b"", m.value, m.headers) for m in messages] == written
    assert [m.offset for m in messages] == [0, 1, 2, 3]
    assert all(before_ms <= m.timestamp_ms <= after_ms for m in messages)


def test_a_large_message_arrives_whole(world: World) -> None:
    world.create_topic("log", config={"max.message.bytes": str(LARGEST_BYTES)})
    large = random.Random(10).randbytes(10_000_000)
    write(world.broker, [Record("log", 0, b"small", b"1"), Record("log", 0, b"large", large), *numbered("log", 1)])

    inbox = world.broker.plain_inbox()
    inbox.read_from({TopicPartition("log", 0): 0})
    polled = gather(inbox, 3)
    inbox.close()

    assert [m.value for m in polled] == [b"1", large, b"0"]
    assert [m.value for m in world.broker.read("log", 0, 0, 3)] == [b"1", large, b"0"]


def test_nothing_is_written_behind_a_refused_record(world: World) -> None:
    """A log with a gap would be worse than one that ends."""
    world.create_topic("log", config={"max.message.bytes": "2000"})
    writer = world.broker.writer()
    acked: list[int] = []
    send_all(writer, [Record("log", 0, b"good", b"1")], acked)

    refused = Record("log", 0, b"refused", random.Random(1).randbytes(3000))

    with pytest.raises(WriteFailedError):
        send_all(writer, [refused, *numbered("log", 20)], acked)

    assert acked == [0]
    assert [m.key for m in world.broker.read("log", 0, 0, world.broker.offsets("log", 0).end)] == [b"good"]


def test_a_writer_that_failed_is_dead(world: World) -> None:
    world.create_topic("log", config={"max.message.bytes": "2000"})
    writer = world.broker.writer()
    with pytest.raises(WriteFailedError):
        send_all(writer, [Record("log", 0, b"refused", random.Random(1).randbytes(3000))])

    for _ in range(2):
        with pytest.raises(WriteFailedError):
            writer.send(Record("log", 0, b"key", b"value"))
        with pytest.raises(WriteFailedError):
            writer.poll()
        with pytest.raises(WriteFailedError):
            writer.flush(PATIENCE_S)
    writer.close()
    assert world.broker.offsets("log", 0).end == 0


def test_a_record_larger_than_any_may_be_is_refused(world: World) -> None:
    world.create_topic("log", config={"max.message.bytes": str(LARGEST_BYTES)})
    writer = world.broker.writer()

    with pytest.raises(WriteFailedError):
        send_all(writer, [Record("log", 0, b"key", bytes(LARGEST_BYTES + 100_000))])


def test_a_record_for_a_partition_that_is_not_there_is_refused(world: World) -> None:
    world.create_topic("log")
    writer = world.broker.writer()

    with pytest.raises(WriteFailedError):
        send_all(writer, [Record("log", 7, b"key", b"value")])


def test_a_closed_writer_writes_no_more(world: World) -> None:
    world.create_topic("log")
    writer = world.broker.writer()
    acked: list[int] = []
    writer.send(Record("log", 0, b"key", b"value"), acked.append)

    writer.close()
    writer.close()

    assert acked == []
    with pytest.raises(WriteFailedError):
        writer.send(Record("log", 0, b"key", b"value"))


@pytest.mark.feature("D1")
def test_an_outage_loses_and_doubles_nothing(outage: tuple[World, Outage]) -> None:
    world, switch = outage
    world.create_topic("log")
    writer = world.broker.writer()
    inbox = world.broker.plain_inbox()
    inbox.read_from({TopicPartition("log", 0): 0})
    acked: list[int] = []
    records = numbered("log", 900)

    for record in records[:300]:
        writer.send(record, acked.append)
    writer.flush(PATIENCE_S)
    for record in records[300:600]:
        writer.send(record, acked.append)
    switch.begin()
    for record in records[600:]:
        writer.send(record, acked.append)
    writer.poll()
    switch.end()
    writer.flush(PATIENCE_S)

    assert acked == list(range(900))
    messages = gather(inbox, 900)
    inbox.close()
    assert [m.value for m in messages] == [record.value for record in records]


def test_a_flush_that_misses_its_deadline_kills_the_writer(outage: tuple[World, Outage]) -> None:
    world, switch = outage
    world.create_topic("log")
    writer = world.broker.writer()
    acked: list[int] = []
    switch.begin()
    writer.send(Record("log", 0, b"key", b"value"), acked.append)

    with pytest.raises(WriteFailedError):
        writer.flush(0.3)
    with pytest.raises(WriteFailedError):
        writer.poll()
    writer.close()
    switch.end()

    assert acked == []
