"""What compaction may and may not do to a log."""

import pytest

from contract.worlds import EAGERLY_COMPACTED, FILLER, World, gather, write
from tidegate.domain.identity import entry_key
from tidegate.eventlog.interface import Message, Record, TopicPartition
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER, EpochTracker


def remaining(world: World, topic: str) -> list[Message]:
    start, end = world.broker.offsets(topic, 0)
    return [m for m in world.broker.read(topic, 0, start, end) if m.key != FILLER]


def test_compaction_leaves_the_last_record_of_a_key_at_its_offset(world: World) -> None:
    world.create_topic("log", config=EAGERLY_COMPACTED)
    write(world.broker, [Record("log", 0, key, b"%d" % n) for n, key in enumerate([b"a", b"b", b"a", b"c", b"a"])])
    before = world.broker.offsets("log", 0)

    world.compact("log")

    assert [(m.offset, m.key, m.value) for m in remaining(world, "log")] == [
        (1, b"b", b"1"),
        (3, b"c", b"3"),
        (4, b"a", b"4"),
    ]
    assert world.broker.offsets("log", 0).start == before.start
    assert world.broker.offsets("log", 0).end == before.end + 1  # the filler


def test_holes_are_read_over(world: World) -> None:
    world.create_topic("log", config=EAGERLY_COMPACTED)
    write(world.broker, [Record("log", 0, b"key-%d" % (n % 10), b"%d" % n) for n in range(1000)])
    world.compact("log")
    inbox = world.broker.plain_inbox()

    inbox.read_from({TopicPartition("log", 0): 100})  # itself a hole
    messages = gather(inbox, 11)

    assert [m.offset for m in messages] == [*range(990, 1001)]
    assert [m.offset for m in world.broker.read("log", 0, 0, 995)] == list(range(990, 995))
    assert list(world.broker.read("log", 0, 0, 500)) == []
    inbox.close()


def test_tombstones_are_seen_until_they_are_purged(world: World) -> None:
    world.create_topic("log", config=EAGERLY_COMPACTED | {"delete.retention.ms": "86400000"})
    write(
        world.broker,
        [Record("log", 0, b"gone", b"1"), Record("log", 0, b"kept", b"1"), Record("log", 0, b"gone", None)],
    )

    world.compact("log")

    assert [(m.offset, m.key, m.value) for m in remaining(world, "log")] == [(1, b"kept", b"1"), (2, b"gone", None)]


def test_purged_tombstones_are_gone_with_what_they_deleted(world: World) -> None:
    world.create_topic("log", config=EAGERLY_COMPACTED)
    write(
        world.broker,
        [Record("log", 0, b"gone", b"1"), Record("log", 0, b"kept", b"1"), Record("log", 0, b"gone", None)],
    )

    world.compact("log")
    world.purge("log")

    assert [(m.offset, m.key) for m in remaining(world, "log")] == [(1, b"kept")]


def announcement(epoch: int, name: str) -> Record:
    headers = ((TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()), (EPOCH_HEADER, b"%d" % epoch))
    return Record("log", 0, f"owner:{name}".encode(), b"", headers)


def entry(subject: str, first_seq: int, epoch: int) -> Record:
    headers = ((TYPE_HEADER, b"RunEntry"), (EPOCH_HEADER, b"%d" % epoch))
    return Record("log", 0, entry_key(subject, first_seq, epoch).encode(), b"%d" % epoch, headers)


def tombstone(subject: str, first_seq: int, epoch: int) -> Record:
    return Record("log", 0, entry_key(subject, first_seq, epoch).encode(), None)


def valid_keys(messages: list[Message]) -> list[bytes]:
    """Judge a log as every simple reader does, by its headers."""
    tracker, valid = EpochTracker(), []
    for message in messages:
        if message.value is None:
            continue
        headers = dict(message.headers)
        epoch = int(headers[EPOCH_HEADER])
        if headers[TYPE_HEADER] == ANNOUNCEMENT_TYPE.encode():
            tracker.announced(message.offset, epoch)
        elif tracker.is_valid(epoch):
            valid.append(message.key or b"")
    return valid


@pytest.mark.feature("L1")
def test_zombies_are_void_and_compaction_changes_no_verdict(world: World) -> None:
    world.create_topic("log", config=EAGERLY_COMPACTED)
    write(
        world.broker,
        [
            announcement(NO_EPOCH, "one:1"),  # offset 0: epoch 0
            entry("a", 1, 0),
            entry("retired", 1, 0),
            entry("a", 2, 0),
            announcement(NO_EPOCH, "two:1"),  # offset 4: epoch 4
            entry("a", 3, 0),  # the first owner did not notice: void
            entry("a", 3, 4),
            entry("retired", 2, 0),  # void
            announcement(0, "0:1"),  # the zombie repeats its announcement: still void
            entry("b", 1, 0),  # void
            entry("b", 1, 4),
            announcement(4, "4:1"),
            entry("retired", 2, 4),
            entry("b", 2, 0),  # void
            # Retention tells tombstones for the retired run, void entries included.
            tombstone("retired", 1, 0),
            tombstone("retired", 2, 0),
            tombstone("retired", 2, 4),
        ],
    )
    before = remaining(world, "log")
    expected = [b"a:1:0", b"a:2:0", b"a:3:4", b"b:1:4"]
    assert valid_keys(before) == [b"a:1:0", b"retired:1:0", b"a:2:0", b"a:3:4", b"b:1:4", b"retired:2:4"]

    world.compact("log")
    compacted = remaining(world, "log")
    world.purge("log")
    purged = remaining(world, "log")

    assert len(compacted) < len(before)
    assert valid_keys(compacted) == expected
    assert valid_keys(purged) == expected
