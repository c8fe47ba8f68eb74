"""What readers promise."""

import random

import pytest

from contract.worlds import PATIENCE_S, World, eventually, gather, numbered, quiet, write
from tidegate.eventlog.interface import (
    Inbox,
    Message,
    OffsetOutOfRangeError,
    Offsets,
    Record,
    TopicPartition,
    UnknownTopicError,
)

LOG = TopicPartition("log", 0)
OTHER = TopicPartition("other", 0)


def first_message(inbox: Inbox, max_messages: int) -> Message:
    """Poll until something comes; returns the first message, and leaves others of its batch behind."""
    found: list[Message] = []
    eventually(lambda: bool(found), lambda: found.extend(inbox.poll(max_messages, 0.1)))
    return found[0]


def test_messages_come_in_order_in_each_partition(world: World) -> None:
    world.create_topic("log", partitions=3)
    write(world.broker, [record for p in range(3) for record in numbered("log", 200, p)])
    inbox = world.broker.plain_inbox()

    inbox.read_from({TopicPartition("log", partition): 0 for partition in range(3)})
    messages = gather(inbox, 600)

    for partition in range(3):
        mine = [m for m in messages if m.partition == partition]
        assert [m.offset for m in mine] == list(range(200))
        assert [m.value for m in mine] == [b"%d" % n for n in range(200)]
    inbox.close()


def test_a_poll_returns_no_more_than_asked_for(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 100))
    inbox = world.broker.plain_inbox()
    inbox.read_from({LOG: 0})

    sizes: list[int] = []
    eventually(lambda: sum(sizes) == 100, lambda: sizes.append(len(inbox.poll(7, 0.05))))

    assert max(sizes) <= 7
    inbox.close()


@pytest.mark.feature("L1")
def test_recorded_positions_can_be_read_again(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 50))
    inbox = world.broker.plain_inbox()

    inbox.read_from({LOG: 0})
    first = gather(inbox, 50)
    inbox.read_from({LOG: 20})
    again = gather(inbox, 30)

    assert again == first[20:]
    inbox.close()


def test_nothing_of_before_is_returned_after_a_change_of_position(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 2000))
    inbox = world.broker.plain_inbox()
    rng = random.Random(5)

    for _ in range(40):
        start = rng.randrange(2000)
        inbox.read_from({LOG: start})
        assert first_message(inbox, rng.choice([1, 3])).offset == start
        start = rng.randrange(2000)
        inbox.add({LOG: start})
        assert first_message(inbox, rng.choice([1, 3])).offset == start
    inbox.close()


def test_partitions_are_added_and_removed_without_disturbing_the_others(world: World) -> None:
    world.create_topic("log")
    world.create_topic("other")
    write(world.broker, [*numbered("log", 10), *numbered("other", 10)])
    inbox = world.broker.plain_inbox()

    inbox.add({LOG: 0})
    seen = gather(inbox, 10)
    inbox.add({OTHER: 5})
    assert [(m.topic, m.offset) for m in gather(inbox, 5)] == [("other", offset) for offset in range(5, 10)]

    inbox.remove([OTHER])
    write(world.broker, [*numbered("log", 10, first=10), *numbered("other", 10)])
    seen += gather(inbox, 10)
    seen += quiet(inbox)
    inbox.remove([LOG, TopicPartition("log", 3)])
    write(world.broker, numbered("log", 10, first=20))

    assert [(m.topic, m.offset) for m in seen] == [("log", offset) for offset in range(20)]
    assert quiet(inbox) == []
    inbox.close()


def test_new_messages_arrive_at_a_reader_that_waits_at_the_end(world: World) -> None:
    world.create_topic("log")
    inbox = world.broker.plain_inbox()
    inbox.read_from({LOG: 0})
    assert quiet(inbox) == []

    write(world.broker, numbered("log", 3))

    assert [m.value for m in gather(inbox, 3)] == [b"0", b"1", b"2"]
    inbox.close()


@pytest.mark.parametrize("position", [2, 11])
def test_a_position_that_is_not_there_raises_until_it_is_changed(world: World, position: int) -> None:
    world.create_topic("log")
    world.create_topic("other")
    write(world.broker, [*numbered("log", 10), *numbered("other", 1)])
    world.delete_before("log", 0, 4)
    inbox = world.broker.plain_inbox()
    inbox.read_from({LOG: position})

    for _ in range(2):
        with pytest.raises(OffsetOutOfRangeError):
            eventually(lambda: False, lambda: inbox.poll(10, 0.1))

    inbox.read_from({LOG: 4})
    assert [m.offset for m in gather(inbox, 6)] == list(range(4, 10))
    inbox.close()


def test_the_end_itself_is_a_position(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 10))
    inbox = world.broker.plain_inbox()

    inbox.read_from({LOG: 10})

    assert quiet(inbox) == []
    inbox.close()


def test_reading_what_does_not_exist_raises(world: World) -> None:
    world.create_topic("log")
    inbox = world.broker.plain_inbox()

    for missing in (TopicPartition("nowhere", 0), TopicPartition("log", 5)):
        with pytest.raises(UnknownTopicError):
            inbox.read_from({missing: 0})
        with pytest.raises(UnknownTopicError):
            inbox.add({missing: 0})
        with pytest.raises(UnknownTopicError):
            world.broker.offsets(*missing)
        with pytest.raises(UnknownTopicError):
            list(world.broker.read(*missing, 0, 1))
    inbox.close()


def test_offsets_are_those_of_the_first_kept_and_of_the_next_record(world: World) -> None:
    world.create_topic("log", partitions=2)
    assert world.broker.offsets("log", 1) == Offsets(0, 0)

    write(world.broker, numbered("log", 10, 1))
    assert world.broker.offsets("log", 1) == Offsets(0, 10)

    world.delete_before("log", 1, 4)
    assert world.broker.offsets("log", 1) == Offsets(4, 10)
    assert world.broker.offsets("log", 0) == Offsets(0, 0)


def test_read_is_bounded_on_both_sides(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 3000))

    assert [m.offset for m in world.broker.read("log", 0, 5, 2500)] == list(range(5, 2500))
    assert [m.offset for m in world.broker.read("log", 0, 0, 1)] == [0]
    assert list(world.broker.read("log", 0, 7, 7)) == []


def test_read_refuses_what_is_not_there(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 10))
    world.delete_before("log", 0, 4)

    with pytest.raises(OffsetOutOfRangeError):
        list(world.broker.read("log", 0, 4, 11))
    with pytest.raises(OffsetOutOfRangeError):
        list(world.broker.read("log", 0, 3, 10))
    assert [m.offset for m in world.broker.read("log", 0, 4, 10)] == list(range(4, 10))


def test_read_ends_although_its_last_offsets_hold_nothing(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 3))
    world.waste_offsets("log", 0)
    end = world.broker.offsets("log", 0).end

    assert end > 3
    assert [m.offset for m in world.broker.read("log", 0, 0, end)] == [0, 1, 2]
    assert list(world.broker.read("log", 0, 3, end)) == []

    after = write(world.broker, numbered("log", 1, first=3))
    assert after == [end]
    assert [m.offset for m in world.broker.read("log", 0, 0, end + 1)] == [0, 1, 2, end]


def test_reads_may_be_interleaved_and_abandoned(world: World) -> None:
    world.create_topic("log", partitions=2)
    write(world.broker, [*numbered("log", 100, 0), *numbered("log", 100, 1, first=100)])

    one, two = world.broker.read("log", 0, 0, 100), world.broker.read("log", 1, 0, 100)
    pairs = [(next(one).value, next(two).value) for _ in range(50)]
    del one
    rest = list(two)
    again = list(world.broker.read("log", 0, 0, 100))

    assert pairs == [(b"%d" % n, b"%d" % (100 + n)) for n in range(50)]
    assert [m.value for m in rest] == [b"%d" % n for n in range(150, 200)]
    assert [m.value for m in again] == [b"%d" % n for n in range(100)]


def test_read_stops_although_somebody_goes_on_writing(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 10))
    writer = world.broker.writer()
    seen = []

    for message in world.broker.read("log", 0, 0, 10):
        seen.append(message.offset)
        writer.send(Record("log", 0, b"later", b""))
        writer.flush(PATIENCE_S)
    writer.close()

    assert seen == list(range(10))


def test_topics_are_described(world: World) -> None:
    world.create_topic("log", partitions=3, config={"cleanup.policy": "compact", "max.message.bytes": "5000"})

    found = world.broker.describe(["log", "nowhere"])

    assert set(found) == {"log"}
    assert found["log"].name == "log"
    assert found["log"].partition_count == 3
    assert found["log"].replication_factor == 1
    assert found["log"].config["cleanup.policy"] == "compact"
    assert found["log"].config["max.message.bytes"] == "5000"
    assert world.broker.describe([]) == {}


def test_a_topic_that_is_made_again_is_another_one(world: World) -> None:
    world.create_topic("log")
    write(world.broker, numbered("log", 5))
    before = world.broker.describe(["log"])["log"].topic_id

    world.delete_topic("log")
    assert world.broker.describe(["log"]) == {}
    world.create_topic("log")

    assert world.broker.describe(["log"])["log"].topic_id != before
    assert world.broker.offsets("log", 0) == Offsets(0, 0)
