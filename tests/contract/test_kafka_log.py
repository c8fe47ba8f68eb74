"""What only the real log has: prefixes, a bounded buffer, clients that write what ours cannot, silence."""

import time
from collections.abc import Callable, Iterator

import pytest

from contract.worlds import PATIENCE_S, KafkaWorld, Owner, eventually, gather, numbered, quiet, settle, write
from support.foreign_producer import ForeignProducer
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog.interface import EventLogError, OwnershipChange, Record, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker, clients, inbox
from tidegate.eventlog.kafka import writer as kafka_writer


@pytest.fixture
def world(bootstrap: str, topic_prefix: str) -> Iterator[KafkaWorld]:
    world = KafkaWorld(bootstrap, topic_prefix)
    yield world
    world.broker.close()


def test_installations_with_different_prefixes_share_a_kafka(
    world: KafkaWorld, bootstrap: str, topic_prefix: str
) -> None:
    other = KafkaWorld(bootstrap, f"other-{topic_prefix}")
    for each in (world, other):
        each.create_topic("lead", 2)
    write(world.broker, numbered("lead", 3))
    ours, theirs = Owner(world.broker, "one"), Owner(other.broker, "one")

    settle([ours], 2)
    settle([theirs], 2)
    theirs.inbox.read_from({TopicPartition("lead", 0): 0})

    assert world.broker.physical_name("lead") == f"{topic_prefix}lead"
    assert quiet(theirs.inbox) == []
    assert [m.topic for m in world.broker.read("lead", 0, 0, 3)] == ["lead"] * 3
    ours.turn()
    assert ours.lost == []
    for owner in (ours, theirs):
        owner.inbox.close()
    other.broker.close()


def test_a_full_buffer_makes_send_wait_and_loses_nothing(world: KafkaWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_writer, "MAX_UNACKED_RECORDS", 10)
    world.create_topic("log")
    writer = world.broker.writer()
    acked: list[int] = []

    for record in numbered("log", 2000):
        writer.send(record, acked.append)
    assert len(acked) >= 1990  # the buffer holds only ten
    writer.flush(PATIENCE_S)

    assert acked == list(range(2000))
    assert [m.value for m in world.broker.read("log", 0, 0, 2000)] == [b"%d" % n for n in range(2000)]


def test_a_writer_that_starts_during_an_outage_writes_after_it(own_kafka: Callable[[], EmbeddedKafka]) -> None:
    embedded = own_kafka()
    world = KafkaWorld(embedded.bootstrap, "")
    world.create_topic("log")
    embedded.kill()

    writer = world.broker.writer()
    acked: list[int] = []
    writer.send(Record("log", 0, b"key", b"value"), acked.append)
    embedded.start()
    writer.flush(PATIENCE_S)

    assert acked == [0]


@pytest.mark.feature("D1")
def test_a_member_outlives_an_outage_that_is_longer_than_its_session(own_kafka: Callable[[], EmbeddedKafka]) -> None:
    """The client takes itself for another process then, and gives up for good."""
    embedded = own_kafka()
    world = KafkaWorld(embedded.bootstrap, "")
    world.create_topic("lead", 2)
    world.create_topic("other")
    only = Owner(world.broker, "one")
    settle([only], 2)
    only.inbox.read_from({TopicPartition("other", 0): 0})

    for _ in range(2):
        embedded.kill()
        eventually(lambda: not only.owned, only.turn)
        embedded.start()
        settle([only], 2)

    write(world.broker, numbered("other", 3))
    assert [m.offset for m in gather(only.inbox, 3)] == [0, 1, 2]
    only.inbox.close()


@pytest.mark.feature("D1")
def test_a_member_that_stays_keeps_its_partitions_however_long_it_does_not_poll(world: KafkaWorld) -> None:
    """A restore may take longer than the group waits for a poll: when it was done, its partition would be taken away."""
    world.create_topic("lead", 2)
    settings = world.settings.model_copy(update={"max_poll_interval_ms": world.settings.session_timeout_ms})
    only = Owner(KafkaBroker(settings), "one")
    settle([only], 2)

    until_s = time.monotonic() + settings.session_timeout_ms / 1000 * 1.3
    while time.monotonic() < until_s:
        only.inbox.stay()
        time.sleep(0.1)
    for _ in range(20):  # the loss would be told with what comes next
        assert only.inbox.poll(1, 0.05) == []

    assert only.inbox.take_changes() == OwnershipChange(frozenset(), frozenset())
    only.inbox.close()


def test_questions_that_nobody_answers_raise_in_the_end(
    own_kafka: Callable[[], EmbeddedKafka], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "REQUEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr(inbox, "READ_SILENCE_S", 1.0)
    monkeypatch.setattr(inbox, "MAX_FETCH_BATCH", 1)
    embedded = own_kafka()
    world = KafkaWorld(embedded.bootstrap, "")
    world.create_topic("log", config={"max.message.bytes": "16777216"})
    write(world.broker, [Record("log", 0, b"%d" % n, bytes(10_000_000)) for n in range(8)])
    reading = world.broker.read("log", 0, 0, 8)
    next(reading)

    embedded.kill()

    with pytest.raises(EventLogError):
        list(reading)  # more than a client holds in advance
    with pytest.raises(EventLogError):
        world.broker.offsets("log", 0)
    with pytest.raises(EventLogError):
        world.broker.describe(["log"])


def test_headers_that_no_python_client_would_write_do_not_stop_a_reader(world: KafkaWorld, bootstrap: str) -> None:
    """Anybody may write requests, in any language. A message that cannot be read would stop admission for ever."""
    world.create_topic("requests")
    topic = world.broker.physical_name("requests").encode()

    with ForeignProducer(bootstrap) as producer:
        producer.produce(topic, b"\xff\xfe not text", b"value")
        producer.produce(topic, b"null", None)
        producer.produce(topic, b"good", b"value")

    messages = list(world.broker.read("requests", 0, 0, 3))
    assert [m.headers for m in messages] == [(), (("null", b""),), (("good", b"value"),)]
    assert [m.value for m in messages] == [b"payload"] * 3
