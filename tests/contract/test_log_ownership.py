"""What a group promises about who owns a partition."""

import pytest

from contract.worlds import Outage, Owner, World, eventually, gather, numbered, quiet, settle, write
from tidegate.eventlog.interface import EventLogError, TopicPartition

PARTITIONS = 4


def lead(*partitions: int) -> list[TopicPartition]:
    return [TopicPartition("lead", partition) for partition in partitions]


def test_one_member_owns_everything_and_is_told_once(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    only = Owner(world.broker, "one")

    settle([only], PARTITIONS)
    for _ in range(5):
        only.turn()

    assert only.gained == [frozenset(range(PARTITIONS))]
    assert only.lost == []
    only.inbox.close()


def test_nothing_is_read_before_it_is_asked_for(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    write(world.broker, numbered("lead", 5, 1))
    only = Owner(world.broker, "one")
    settle([only], PARTITIONS)

    assert quiet(only.inbox) == []
    only.inbox.read_from({TopicPartition("lead", 1): 2})

    assert [m.offset for m in gather(only.inbox, 3)] == [2, 3, 4]
    only.inbox.close()


def test_a_second_member_takes_some_and_the_first_hears_of_it(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    first = Owner(world.broker, "one")
    settle([first], PARTITIONS)
    second = Owner(world.broker, "two")

    settle([first, second], PARTITIONS)

    # Another may have owned any of them in between, so the first is told that it lost all of them.
    assert first.lost == [frozenset(range(PARTITIONS))]
    assert not first.owned & second.owned
    for owner in (first, second):
        owner.inbox.close()


def test_a_member_says_whether_it_has_its_share(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    first = Owner(world.broker, "one")
    assert not first.inbox.has_share
    settle([first], PARTITIONS)
    assert first.inbox.has_share
    second, silent = Owner(world.broker, "two"), Owner(world.broker, "three")
    settle([first, second, silent], PARTITIONS)

    newcomer = Owner(world.broker, "zero")  # the group gives out nothing before all have heard of it
    members = [first, second, newcomer]
    eventually(lambda: not any(m.inbox.has_share for m in members), lambda: [m.turn() for m in members])
    for _ in range(10):
        assert not any(m.turn() or m.inbox.has_share for m in members)

    eventually(lambda: all(m.inbox.has_share for m in members), lambda: [m.turn() for m in [*members, silent]])
    for owner in [*members, silent]:
        owner.inbox.close()


def test_a_lost_partition_is_read_no_more_and_the_others_are_not_disturbed(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    world.create_topic("other")
    write(world.broker, [record for p in range(PARTITIONS) for record in numbered("lead", 50, p)])
    other = TopicPartition("other", 0)
    first = Owner(world.broker, "one")
    settle([first], PARTITIONS)
    first.inbox.read_from(dict.fromkeys(lead(*range(PARTITIONS)), 0) | {other: 0})
    seen = first.turn()  # at most some of it: the rest is on its way or buffered

    second = Owner(world.broker, "two")
    writer = world.broker.writer()
    for n in range(1000):
        writer.send(numbered("other", 1, first=n)[0])
        if first.lost:
            break
        messages = first.turn()
        seen += [m for m in messages if m.topic == "other"] if first.lost else messages
        second.turn()
    writer.flush(10)
    written = world.broker.offsets("other", 0).end
    assert first.lost

    from_other = [m for m in seen if m.topic == "other"]
    later = gather(first.inbox, written - len(from_other))
    assert [m.offset for m in from_other + later] == list(range(written))
    assert quiet(first.inbox) == []
    for owner in (first, second):
        owner.inbox.close()


def test_a_partition_that_is_not_ours_cannot_be_read(world: World) -> None:
    """Between a loss and its being taken note of, a service may still ask for it."""
    world.create_topic("lead", PARTITIONS)
    write(world.broker, [record for p in range(PARTITIONS) for record in numbered("lead", 3, p)])
    first, second = Owner(world.broker, "one"), Owner(world.broker, "two")
    settle([first, second], PARTITIONS)

    first.inbox.read_from(dict.fromkeys(lead(*range(PARTITIONS)), 0))
    messages = gather(first.inbox, 3 * len(first.owned)) + quiet(first.inbox)

    assert {m.partition for m in messages} == first.owned
    for owner in (first, second):
        owner.inbox.close()


def test_what_was_lost_and_came_back_is_both_and_is_not_read_until_asked_for(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    first = Owner(world.broker, "one")
    settle([first], PARTITIONS)
    first.inbox.read_from(dict.fromkeys(lead(*range(PARTITIONS)), 0))
    second = Owner(world.broker, "two")

    # The first does not ask what changed until the rebalance is over.
    eventually(lambda: bool(second.owned), lambda: (first.inbox.poll(10, 0.02), second.turn()))
    for _ in range(20):
        first.inbox.poll(10, 0.02)
    gained, lost = first.inbox.take_changes()

    assert lost == frozenset(range(PARTITIONS))
    assert gained == frozenset(range(PARTITIONS)) - second.owned
    write(world.broker, [record for p in range(PARTITIONS) for record in numbered("lead", 3, p)])
    assert quiet(first.inbox) == []
    for owner in (first, second):
        owner.inbox.close()


@pytest.mark.feature("D1")
@pytest.mark.parametrize("closed", [True, False])
def test_a_restarted_member_has_its_partitions_back_and_nobody_else_notices(world: World, closed: bool) -> None:
    world.create_topic("lead", PARTITIONS)
    first, second = Owner(world.broker, "one"), Owner(world.broker, "two")
    settle([first, second], PARTITIONS)
    had, changes_of_second = set(first.owned), len(second.gained) + len(second.lost)

    if closed:
        first.inbox.close()
    restarted = Owner(world.broker, "one")
    settle([restarted, second], PARTITIONS)

    assert restarted.owned == had
    assert len(second.gained) + len(second.lost) == changes_of_second
    for owner in (first, restarted, second):
        owner.inbox.close()


def test_a_member_whose_place_another_process_took_is_shut_out(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    old = Owner(world.broker, "one")
    settle([old], PARTITIONS)
    old.inbox.read_from(dict.fromkeys(lead(*range(PARTITIONS)), 0))
    new = Owner(world.broker, "one")
    settle([new], PARTITIONS)

    for _ in range(2):
        with pytest.raises(EventLogError):
            eventually(lambda: False, lambda: old.inbox.poll(10, 0.1))

    assert old.inbox.take_changes() == (frozenset(), frozenset(range(PARTITIONS)))
    new.turn()
    assert new.owned == set(range(PARTITIONS))
    for owner in (old, new):
        owner.inbox.close()


@pytest.mark.feature("D1")
def test_the_partitions_of_a_member_that_stays_away_go_to_the_others(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    first, second = Owner(world.broker, "one"), Owner(world.broker, "two")
    settle([first, second], PARTITIONS)

    first.inbox.close()
    world.expire("owners", "one")
    settle([second], PARTITIONS)

    assert second.owned == set(range(PARTITIONS))
    second.inbox.close()


def test_committed_offsets_are_noted_for_people(world: World) -> None:
    world.create_topic("lead", PARTITIONS)
    only = Owner(world.broker, "one")
    settle([only], PARTITIONS)

    only.inbox.commit({})
    only.inbox.commit({0: 3, 2: 1})
    eventually(lambda: world.committed("owners", "lead") == {0: 3, 2: 1}, lambda: only.turn(0.1))
    only.inbox.commit({0: 5})

    eventually(lambda: world.committed("owners", "lead") == {0: 5, 2: 1}, lambda: only.turn(0.1))
    only.inbox.close()


def test_members_outlive_an_outage(outage: tuple[World, Outage]) -> None:
    world, switch = outage
    world.create_topic("lead", PARTITIONS)
    write(world.broker, numbered("lead", 3, 1))
    only = Owner(world.broker, "one")
    settle([only], PARTITIONS)
    only.inbox.read_from(dict.fromkeys(lead(*range(PARTITIONS)), 0))
    assert [m.offset for m in gather(only.inbox, 3)] == [0, 1, 2]

    switch.begin()
    for _ in range(10):
        only.turn()
    switch.end()
    write(world.broker, numbered("lead", 3, 1, first=3))

    # Whether the group takes the partitions away for a moment is its business: what counts is that we hear of it.
    seen: list[int] = []

    def turn() -> None:
        seen.extend(m.offset for m in only.turn(0.1))
        if only.lost and 1 in only.owned:
            only.inbox.read_from({TopicPartition("lead", 1): 3 + len(seen)})
            only.lost.clear()

    eventually(lambda: len(seen) == 3, turn)
    assert seen == [3, 4, 5]
    only.inbox.close()
