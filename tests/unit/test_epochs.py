"""Which epoch is in force where reading starts in the middle of a log."""

import itertools
import random

import msgspec
import pytest

from support.cluster import RUN_PARTITIONS, Cluster
from support.logs import LogWriter, Story
from support.newer import of_a_newer_version, own_schemas, publish
from tidegate import codec
from tidegate.domain.entry import OwnerAnnounced
from tidegate.domain.identity import partition_of
from tidegate.domain.run_events import CommandRefused
from tidegate.eventlog import epochs, owner
from tidegate.eventlog.epochs import epoch_before
from tidegate.eventlog.interface import Record
from tidegate.eventlog.machine import Decision
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.validity import ANNOUNCEMENT_TYPE, EPOCH_HEADER, NO_EPOCH, TYPE_HEADER, EpochTracker

pytestmark = pytest.mark.feature("L4")


def written(records: list[Record]) -> MemoryBroker:
    broker = MemoryBroker()
    broker.create_topic("run-events", 1)
    writer = broker.writer()
    for record in records:
        writer.send(msgspec.structs.replace(record, partition=0))
    writer.flush(1.0)
    return broker


def troubled_log(seed: int, length: int = 40) -> list[Record]:
    """Return one partition's records, with owners that change often and zombies."""
    story = Story()
    for number in range(length // 8):
        story.play_plain(number)
    records = LogWriter(1, 1, seed).take(story.decided, trouble=0.5)
    return [record for record in records if record.topic == "run-events"]


def true_epochs(records: list[Record]) -> list[int]:
    """Return the epoch in force before each offset, from a reading of the whole log."""
    tracker, found = EpochTracker(), []
    for offset, record in enumerate(records):
        found.append(tracker.epoch)
        decoded = codec.decode(record.value)
        if isinstance(decoded, OwnerAnnounced):
            tracker.announced(offset, decoded.epoch)
    return [*found, tracker.epoch]


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_epoch_that_a_reading_of_the_whole_log_gives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With the shortest look back, every search has to grow, and sees zombies first.
    monkeypatch.setattr(epochs, "FIRST_SPAN", 1)
    records = troubled_log(seed)
    broker = written(records)

    found = [epoch_before(broker, "run-events", 0, offset) for offset in range(len(records) + 1)]

    # The rule is bounded: a stretch in which an old owner alone both announces and writes would mislead it. With the span
    # of one that happens; it then errs to an epoch that was in force before, and never to one that was not announced yet.
    truth = true_epochs(records)
    assert all(got <= true for got, true in zip(found, truth, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_within_the_bound_it_is_exact(seed: int) -> None:
    records = troubled_log(seed)
    broker = written(records)

    found = [epoch_before(broker, "run-events", 0, offset) for offset in range(len(records) + 1)]

    assert found == true_epochs(records)


def test_an_owner_that_writes_without_repeating_is_found_however_far_back_it_announced() -> None:
    story = Story()
    for number in range(6):
        story.play_plain(number)
    records = [r for r in LogWriter(1, 1).take(story.decided, trouble=0.0) if r.topic == "run-events"]
    broker = written(records)

    assert len(records) > 4 * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "FIRST_SPAN", 2)
        assert epoch_before(broker, "run-events", 0, len(records)) == 0


def test_a_log_without_announcements_has_no_epoch() -> None:
    records = [record for record in troubled_log(1) if not record.key.startswith(b"owner:")]
    broker = written(records)

    assert epoch_before(broker, "run-events", 0, 0) == NO_EPOCH
    empty = MemoryBroker()
    empty.create_topic("run-events", 1)
    assert epoch_before(empty, "run-events", 0, 0) == NO_EPOCH


def test_rubbish_in_the_log_is_no_evidence() -> None:
    records = troubled_log(3)
    noise = random.Random(3)
    for _ in range(5):
        records.insert(noise.randrange(len(records)), Record("run-events", 0, b"k", None))
    records = [Record("run-events", 0, b"x", b"rubbish"), *records]
    broker = written(records)

    assert epoch_before(broker, "run-events", 0, 1) == NO_EPOCH
    assert epoch_before(broker, "run-events", 0, len(records)) >= 0


def test_what_a_zombie_can_write_does_not_fill_the_first_look_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it sees where its records came to lie, an owner writes one turn. Here it is as full as turns can be, it repeats the
    announcement in it, and another owner has taken over meanwhile."""
    cluster = Cluster()
    cluster.settle()
    zombie = cluster.owners["scheduler"]
    partition = partition_of("r", RUN_PARTITIONS)
    part = zombie.owned[partition]
    part.since_announcement = owner.ANNOUNCE_EVERY_ENTRIES - 1
    refused = CommandRefused(command_id="c", type="cancel", source="s", code="unknown_run", reason="", original=b"")
    monkeypatch.setattr(
        zombie.machine,
        "due",
        lambda state, *_: ("timer:1", Decision("r", "", [refused])) if state is part.state else None,
    )
    others = (name for name in map("r{}".format, itertools.count()) if partition_of(name, RUN_PARTITIONS) == partition)
    for run_id in itertools.islice(others, owner.MAX_BATCH):  # each of another run, so that each makes an entry
        cluster.command(run_id, "cancel", command_id="c")

    def point(name: str) -> None:
        if name == "owner.before-log" and cluster.owners["scheduler"] is zombie and part.unacknowledged:
            cluster.broker.expire("tidegate-scheduler", "scheduler-0")
            cluster.start("scheduler", "scheduler-1")
            for _ in range(RUN_PARTITIONS):
                cluster.owners["scheduler"].run_once(0.0)

    monkeypatch.setattr(owner, "failpoint", point)
    zombie.run_once(0.0)

    in_force = cluster.owners["scheduler"].owned[partition].epoch
    log = cluster.messages("run-events", partition)
    after = [dict(message.headers)[EPOCH_HEADER] for message in log if message.offset > in_force]
    void = [epoch for epoch in after if epoch == b"%d" % part.epoch]
    assert len(void) > owner.MAX_BATCH + owner.MAX_DUE_PER_TURN  # the turn was full, and there was the announcement
    assert len(void) < epochs.FIRST_SPAN
    assert epoch_before(cluster.broker, "run-events", partition, len(log)) == in_force
    # The owner in force repeats itself at least once in what is left of the span, so one look is enough.
    assert len(void) + owner.ANNOUNCE_EVERY_ENTRIES < epochs.FIRST_SPAN


@pytest.mark.feature("K5")
def test_an_announcement_of_a_newer_version_counts_too() -> None:
    """A reader of the old version that has run since before would take the entries of the new owner for a zombie's."""
    log, story = LogWriter(1, 1), Story()
    story.play_plain(1)
    records = [record for record in log.take(story.decided) if record.topic == "run-events"]
    announced = OwnerAnnounced(
        log="run-events",
        partition=0,
        epoch=NO_EPOCH,
        repeat=0,
        topic_id="t",
        partition_count=1,
        instance_id="newer",
        at_ms=0,
    )
    text, value = of_a_newer_version(announced)
    headers = ((TYPE_HEADER, ANNOUNCEMENT_TYPE.encode()), (EPOCH_HEADER, b"-1"))
    broker = written([*records, Record("run-events", 0, b"owner:newer", value, headers)])
    broker.create_topic("schemas", 1)
    publish(broker, text)
    with own_schemas():
        assert epoch_before(broker, "run-events", 0, len(records) + 1) == len(records)
