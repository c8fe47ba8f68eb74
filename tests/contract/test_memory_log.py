"""What the memory log can be made to do beyond what both logs do by themselves."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.worlds import Owner, numbered, settle, write
from tidegate.eventlog.interface import EventLogError, Record, TopicPartition, WriteFailedError
from tidegate.eventlog.memory import MemoryBroker, MemoryWriter

WRITERS = 3
PARTITIONS = 2

step = st.one_of(
    st.tuples(st.just("send"), st.integers(0, WRITERS - 1), st.integers(0, PARTITIONS - 1)),
    st.tuples(st.sampled_from(["poll", "poll", "flush", "crash", "fail"]), st.integers(0, WRITERS - 1), st.just(0)),
    st.tuples(st.just("land"), st.just(0), st.just(0)),
)


class Fleet:
    """Writers that are sent to, polled and killed. Remembers what each sent to each partition and what was acknowledged."""

    def __init__(self, seed: int) -> None:
        self.broker = MemoryBroker(rng=Random(seed))
        self.broker.create_topic("log", PARTITIONS)
        self.writers = [self.broker.writer() for _ in range(WRITERS)]
        self.lives = [0] * WRITERS
        self.sent: dict[tuple[int, int, int], list[bytes]] = {}
        self.acked: dict[tuple[int, bytes], int] = {}

    def run(self, steps: list[tuple[str, int, int]]) -> None:
        for number, (what, who, partition) in enumerate(steps):
            writer = self.writers[who]
            if what == "send":
                self._send(writer, who, partition, b"%d" % number)
            elif what == "poll":
                writer.poll()
            elif what == "flush":
                writer.flush(1)
            elif what == "land":
                self.broker.land_stragglers()
            else:
                self._kill(who, what)

    def _send(self, writer: MemoryWriter, who: int, partition: int, value: bytes) -> None:
        self.sent.setdefault((who, self.lives[who], partition), []).append(value)
        record = Record("log", partition, b"key", value)
        writer.send(record, lambda offset: self.acked.__setitem__((partition, value), offset))

    def _kill(self, who: int, how: str) -> None:
        dead = self.writers[who]
        if how == "crash":
            self.broker.crash(dead)
        else:
            self.broker.fail(dead)
        with pytest.raises(WriteFailedError):
            dead.poll()
        self.writers[who] = self.broker.writer()
        self.lives[who] += 1

    def log(self, partition: int) -> list[tuple[int, bytes]]:
        end = self.broker.offsets("log", partition).end
        return [(m.offset, m.value or b"") for m in self.broker.read("log", partition, 0, end)]


@given(st.integers(0, 2**32), st.lists(step, max_size=60))
def test_whatever_dies_the_log_holds_a_prefix_of_what_each_writer_sent(
    seed: int, steps: list[tuple[str, int, int]]
) -> None:
    fleet = Fleet(seed)
    fleet.run(steps)

    for partition in range(PARTITIONS):
        log = fleet.log(partition)
        values = [value for _, value in log]
        assert [offset for offset, _ in log] == list(range(len(log)))
        for (_, _, at), sent in fleet.sent.items():
            if at == partition:
                written = [value for value in values if value in set(sent)]
                assert written == sent[: len(written)]
        acked = {value: offset for (at, value), offset in fleet.acked.items() if at == partition}
        assert acked == {value: offset for offset, value in log if value in acked}


@given(st.integers(0, 2**32), st.lists(step, max_size=60))
def test_the_same_seed_gives_the_same_history(seed: int, steps: list[tuple[str, int, int]]) -> None:
    one, other = Fleet(seed), Fleet(seed)
    one.run(steps)
    other.run(steps)

    assert one.acked == other.acked
    assert [one.log(p) for p in range(PARTITIONS)] == [other.log(p) for p in range(PARTITIONS)]


def test_a_dead_process_may_write_after_its_successor() -> None:
    """The case for epochs: some seed must show it, or simulations with this log would never see a zombie."""

    def stragglers_after_successor(seed: int) -> bool:
        broker = MemoryBroker(rng=Random(seed))
        broker.create_topic("log")
        dying = broker.writer()
        for record in numbered("log", 3):
            dying.send(record)
        broker.crash(dying)
        write(broker, [Record("log", 0, b"owner", b"successor")])
        return broker.land_stragglers() > 0

    assert {stragglers_after_successor(seed) for seed in range(50)} == {True, False}


def test_a_crash_takes_what_was_not_written_or_not() -> None:
    def written(seed: int) -> int:
        broker = MemoryBroker(rng=Random(seed))
        broker.create_topic("log")
        dying = broker.writer()
        for record in numbered("log", 2):
            dying.send(record)
        broker.crash(dying)
        return broker.offsets("log", 0).end

    assert {written(seed) for seed in range(50)} == {0, 1, 2}


def test_records_of_a_crash_during_an_outage_arrive_after_it() -> None:
    broker = MemoryBroker()
    broker.create_topic("log")
    writer = broker.writer()
    writer.send(numbered("log", 1)[0])

    broker.interrupt()
    broker.crash(writer)
    with pytest.raises(EventLogError):
        broker.offsets("log", 0)
    assert broker.land_stragglers() == 0
    broker.restore()

    assert broker.offsets("log", 0).end == 0
    assert broker.land_stragglers() == 1
    assert broker.offsets("log", 0).end == 1


def test_a_member_that_is_expired_while_it_runs_hears_of_it_and_joins_again() -> None:
    broker = MemoryBroker()
    broker.create_topic("lead", 4)
    sleeper, other = Owner(broker, "one"), Owner(broker, "two")
    settle([sleeper, other], 4)

    broker.expire("owners", "one")
    for _ in range(3):
        other.turn()
    assert other.owned == {0, 1, 2, 3}
    assert sleeper.owned == {0, 1}  # it sleeps and knows nothing

    sleeper.turn()
    assert sleeper.owned == set()
    settle([sleeper, other], 4)


def test_a_member_that_is_silent_holds_a_rebalance_up_until_it_is_expired() -> None:
    broker = MemoryBroker()
    broker.create_topic("lead", 4)
    silent, newcomer = Owner(broker, "one"), Owner(broker, "two")
    settle([silent], 4)

    for _ in range(5):
        newcomer.turn()
    assert newcomer.owned == set()

    broker.expire("owners", "one")
    newcomer.turn()
    assert newcomer.owned == {0, 1, 2, 3}


def test_commits_of_a_member_that_the_group_does_not_know_are_ignored() -> None:
    broker = MemoryBroker()
    broker.create_topic("lead", 2)
    old, new = Owner(broker, "one"), Owner(broker, "one")
    settle([old], 2)
    old.inbox.commit({0: 1})
    settle([new], 2)

    old.inbox.commit({0: 7})
    new.inbox.commit({1: 2})

    assert broker.committed("owners") == {0: 1, 1: 2}


def test_members_share_partitions_by_ranges() -> None:
    broker = MemoryBroker()
    broker.create_topic("lead", 8)
    owners = [Owner(broker, name) for name in ("b", "c", "a")]

    settle(owners, 8)

    assert [sorted(owner.owned) for owner in owners] == [[3, 4, 5], [6, 7], [0, 1, 2]]


def test_records_bear_the_time_at_which_they_were_sent() -> None:
    now_ms = 1_000
    broker = MemoryBroker(clock_ms=lambda: now_ms)
    broker.create_topic("log")
    writer = broker.writer()
    writer.send(numbered("log", 1)[0])
    now_ms = 2_000
    writer.flush(1)

    inbox = broker.plain_inbox()
    inbox.read_from({TopicPartition("log", 0): 0})
    assert [m.timestamp_ms for m in inbox.poll(10, 5.0)] == [1_000]
