"""Topics that are deleted and made again: under an owner that works, and while it is away (rule 10)."""

import msgspec
import pytest

from support.cluster import RUN_PARTITIONS, Cluster
from support.newer import of_a_newer_version, own_schemas, publish
from tidegate import codec
from tidegate.domain.entry import Entry
from tidegate.eventlog.interface import Record
from tidegate.eventlog.machine import CorruptLogError, RefusedToStartError
from tidegate.eventlog.owner import OwnerLoop
from tidegate.eventlog.settings import CheckpointSettings


def at_work() -> Cluster:
    """Return a cluster that has done some runs."""
    cluster = Cluster()
    for number in range(6):
        cluster.start_run(f"run{number}")
    cluster.settle()
    return cluster


def work(owner: OwnerLoop) -> None:
    for _ in range(5):
        owner.run_once(0.0)


def make_again(cluster: Cluster, topic: str) -> None:
    cluster.broker.delete_topic(topic)
    cluster.broker.create_topic(topic, RUN_PARTITIONS)


@pytest.mark.feature("D1")
def test_an_owner_whose_log_is_made_again_does_not_begin_anew_in_it() -> None:
    cluster = at_work()
    make_again(cluster, "run-events")
    cluster.start_run("later")
    scheduler = cluster.owners["scheduler"]
    with pytest.raises(RefusedToStartError, match=r"run-events was deleted and made again .*Restore it from a backup"):
        work(scheduler)
    written = sum(cluster.broker.offsets("run-events", partition).end for partition in range(RUN_PARTITIONS))
    assert written <= 1, "more than what it had decided before it looked"


def test_an_owner_whose_log_is_gone_when_it_takes_over_says_so() -> None:
    cluster = at_work()
    scheduler = cluster.owners["scheduler"]
    cluster.broker.delete_topic("run-events")
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    with pytest.raises(RefusedToStartError, match="run-events was deleted while its owner was at work"):
        work(scheduler)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("announced_again", [False, True])
def test_what_a_surprised_owner_wrote_in_a_log_that_was_made_again_is_not_taken_for_its_past(
    announced_again: bool,
) -> None:
    """As many records as its group has committed, even: what a whole turn decided."""
    cluster = at_work()
    cluster.crash("scheduler")
    end = cluster.broker.offsets("run-events", 0).end
    last = list(cluster.broker.read("run-events", 0, 0, end))[-1]
    assert isinstance(codec.decode(last.value), Entry)
    make_again(cluster, "run-events")
    for _ in range(end):
        cluster.writer.send(Record("run-events", 0, last.key, last.value, last.headers))
    cluster.writer.flush(1.0)
    for _ in range(1 + announced_again):
        scheduler = cluster.start("scheduler")
        with pytest.raises(RefusedToStartError, match=r"run-events-0 begins with an entry.*Restore it from a backup"):
            work(scheduler)
        cluster.crash("scheduler")


@pytest.mark.feature("D1")
def test_an_owner_whose_input_is_made_again_does_not_go_on_in_the_middle_of_the_new_one() -> None:
    cluster = at_work()
    held = [
        list(cluster.broker.read("step-results", p, *cluster.broker.offsets("step-results", p)))
        for p in range(RUN_PARTITIONS)
    ]
    make_again(cluster, "step-results")
    for message in [message for messages in held for message in messages * 2]:
        cluster.writer.send(Record("step-results", message.partition, message.key, message.value, message.headers))
    cluster.writer.flush(1.0)
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    with pytest.raises(
        RefusedToStartError, match="step-results was deleted and made again while its owner was at work"
    ):
        work(cluster.owners["scheduler"])


@pytest.mark.feature("D1")
@pytest.mark.parametrize("restarted", [False, True])
def test_a_partition_count_that_changed_under_an_owner_is_refused_at_the_next_take_over(restarted: bool) -> None:
    """Whatever it announces and certifies meanwhile names the count with which it wrote."""
    cluster = Cluster(checkpoints=CheckpointSettings(every_entries=1, every_s=1.0))
    for number in range(6):
        cluster.start_run(f"run{number}")
    cluster.settle()
    log = cluster.broker._topics["run-events"]
    log.partition_count += 1
    cluster.now_ms += 40_000
    for number in range(6):
        cluster.start_run(f"later{number}")
    cluster.settle()
    if restarted:
        cluster.crash("scheduler")
        cluster.start("scheduler")
    else:
        cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    with pytest.raises(RefusedToStartError, match="run-events had 2 partitions when it was written and has 3 now"):
        work(cluster.owners["scheduler"])


@pytest.mark.feature("D1")
def test_an_announcement_of_another_log_has_no_place_in_this_one() -> None:
    cluster = at_work()
    cluster.crash("scheduler")
    end = cluster.broker.offsets("run-events", 0).end
    first = next(iter(cluster.broker.read("run-events", 0, 0, end)))
    other = msgspec.structs.replace(codec.decode(first.value), log="gate-ledger")
    cluster.writer.send(Record("run-events", 0, b"owner:other", codec.encode(other), first.headers))
    cluster.writer.flush(1.0)
    cluster.start("scheduler")
    with pytest.raises(
        CorruptLogError, match=f"run-events-0 at offset {end}: this OwnerAnnounced has no place in a log"
    ):
        work(cluster.owners["scheduler"])


@pytest.mark.feature("D1")
def test_an_input_that_was_made_again_and_filled_beyond_the_recorded_position_is_refused() -> None:
    cluster = at_work()
    cluster.crash("scheduler")
    before = max(cluster.broker.offsets("run-commands", partition).end for partition in range(RUN_PARTITIONS))
    make_again(cluster, "run-commands")
    for number in range(20 * before):
        cluster.start_run(f"other{number}")
    ends = [cluster.broker.offsets("run-commands", partition).end for partition in range(RUN_PARTITIONS)]
    assert min(ends) > before
    scheduler = cluster.start("scheduler")
    with pytest.raises(RefusedToStartError, match=r"run-commands had the topic id .* mean nothing in it"):
        work(scheduler)


@pytest.mark.feature("D1")
def test_tombstones_before_what_a_surprised_owner_wrote_do_not_hide_it() -> None:
    """A turn sends its tombstones last, so in a log made again under a retiring owner they come before the next turn's entries."""
    cluster = at_work()
    cluster.crash("scheduler")
    end = cluster.broker.offsets("run-events", 0).end
    last = list(cluster.broker.read("run-events", 0, 0, end))[-1]
    make_again(cluster, "run-events")
    cluster.writer.send(Record("run-events", 0, b"run0:1:0", None))
    for _ in range(end):
        cluster.writer.send(Record("run-events", 0, last.key, last.value, last.headers))
    cluster.writer.flush(1.0)
    scheduler = cluster.start("scheduler")
    with pytest.raises(RefusedToStartError, match="run-events-0 begins with an entry at offset 1"):
        work(scheduler)


@pytest.mark.feature("K5")
def test_an_owner_at_work_takes_over_what_a_newer_version_announced_meanwhile() -> None:
    """A rolling upgrade: a pod of the new version had the partition for a moment, and one of the old version gets it back."""
    cluster = at_work()
    for partition in range(RUN_PARTITIONS):
        end = cluster.broker.offsets("run-events", partition).end
        messages = cluster.broker.read("run-events", partition, 0, end)
        last = [message for message in messages if (message.key or b"").startswith(b"owner:")][-1]
        text, value = of_a_newer_version(codec.decode(last.value))
        publish(cluster.broker, text)
        cluster.writer.send(Record("run-events", partition, b"owner:newer:%d" % partition, value, last.headers))
    cluster.writer.flush(1.0)
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    with own_schemas():
        work(cluster.owners["scheduler"])
    assert cluster.owners["scheduler"].owned.keys() == set(range(RUN_PARTITIONS))
