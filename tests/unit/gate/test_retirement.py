"""Balances carried forward and entries retired, with real machines on the log in memory: what is left says what all of it said."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from support.cluster import ACCOUNT_PARTITIONS, Cluster, Crash
from tidegate import codec
from tidegate.audit import money
from tidegate.audit.money import Books, audit
from tidegate.cli.ledger import kept
from tidegate.domain.entry import Entry
from tidegate.domain.identity import child_run_id
from tidegate.domain.ledger_events import LedgerCarried, RunOpened
from tidegate.eventlog import checkpoints, owned, restore, retention
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import CorruptLogError, Decision
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.state_check import check_state
from tidegate.gate import carrying, snapshots
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine

OFTEN = CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=2, rest_after_s=3600)
LEDGER = "gate-ledger"
ACCOUNTS = ("acme0", "beta", "acme1")  # of both partitions
COST_MICROS = 2  # of a step on the test's executor
RETENTION = {"kind": "retention", "retention": "ledger", "version": "1", "keep_s": 0, "every_s": 1}
BUDGETS: list[dict[str, Any]] = [
    {"kind": "budget", "budget": "all", "version": "1", "account": "*", "window": "month", "limits": {"calls": 1000}},
    {"kind": "budget", "budget": "each", "version": "1", "window": "run", "limits": {"money_micros": 1000}},
]


def cluster_with_retention(seed: int) -> Cluster:
    cluster = Cluster(seed, OFTEN)
    for document in BUDGETS:
        cluster.publish(document)
    cluster.publish(RETENTION, by="ann")
    return cluster


def entries(cluster: Cluster, partition: int) -> list[tuple[Message, Entry]]:
    records = [
        (message, codec.decode(message.value)) for message in cluster.messages(LEDGER, partition) if message.value
    ]
    return [(message, record) for message, record in records if isinstance(record, Entry)]


def kept_books(cluster: Cluster) -> Books:
    """Return books that see every record as it is written, whatever is retired later."""
    books = Books()
    for partition in range(ACCOUNT_PARTITIONS):
        for message in cluster.messages(LEDGER, partition):
            books.read(message)
    cluster.broker.on_written(lambda message: books.read(message) if message.topic == LEDGER else None)
    return books


def units(part: OwnedPartition) -> dict[str, Any]:
    found = [unit for unit in snapshots.units_of(part.state) if not unit.startswith("limit:")]
    return {unit: msgspec.msgpack.decode(snapshots.dump(part.state, unit)) for unit in found}


def let_retire(cluster: Cluster) -> None:
    """Let time go by: balances are carried forward, a checkpoint holds that, what was before is retired and compacted away."""
    for _ in range(4):
        cluster.settle()
        cluster.now_ms += 1500
        cluster.register(incarnation=cluster.incarnation)
    cluster.settle()
    cluster.broker.purge(LEDGER)


def assert_whole(cluster: Cluster) -> None:
    """What is left of the ledger folds to the state of its snapshots, verifies, and holds its books."""
    machine = cluster.machine("gate")
    for partition in range(ACCOUNT_PARTITIONS):
        stop = cluster.broker.offsets(LEDGER, partition).end
        by_log, _ = restore.fold_all(cluster.broker, machine, partition, stop, lambda _: None)
        by_snapshots = restore.restore(cluster.broker, machine, partition, stop, lambda _: None, 0).part
        assert units(by_log) == units(by_snapshots)
        assert machine.head(by_log.state, "") == machine.head(by_snapshots.state, "")
        assert (by_log.marks, by_log.inputs) == (by_snapshots.marks, by_snapshots.inputs)
        assert check_state(cluster.broker, cluster.machine("gate"), partition).differences == []
    books = audit(cluster.messages(LEDGER, partition) for partition in range(ACCOUNT_PARTITIONS))
    assert [*books.problems, *books.torn()] == []
    report, _ = cluster.verified()
    assert report.problems == []


@pytest.mark.feature("L1")
@pytest.mark.parametrize("seed", range(16))
def test_a_ledger_may_be_retired_at_any_moment(seed: int) -> None:
    """Runs, crashes, cancels, compaction: what is left says the same at every moment, and the money that was counted stays."""
    cluster = cluster_with_retention(seed)
    books = kept_books(cluster)
    rng = random.Random(seed)
    for number in range(60):
        what = rng.random()
        if what < 0.5:
            cluster.start_run(f"r{number}", *("abc"[: rng.randint(1, 3)]), account=ACCOUNTS[number % 3])
        elif what < 0.6:
            cluster.command(f"r{rng.randint(0, 60)}", "cancel", command_id=f"c{number}")
        elif what < 0.7:
            cluster.crash("gate")
            cluster.start("gate")
        elif what < 0.8:
            cluster.broker.compact(LEDGER)
        elif what < 0.9:
            cluster.broker.purge(LEDGER)
        for _ in range(rng.randint(1, 6)):
            cluster.turn()
        cluster.now_ms += rng.choice((0, 300, 1500))
        cluster.register(incarnation=cluster.incarnation)
        cluster.broker.land_stragglers()
        assert books.problems == []
        if number % 6 == 0:
            assert_whole(cluster)
    let_retire(cluster)
    assert_whole(cluster)
    assert books.problems == []
    assert all(entries(cluster, partition)[0][1].first_seq > 1 for partition in range(ACCOUNT_PARTITIONS))
    left = audit(cluster.messages(LEDGER, partition) for partition in range(ACCOUNT_PARTITIONS))
    assert {key: bucket.spent for key, bucket in left.budgets.buckets.items()} == {
        key: bucket.spent for key, bucket in books.budgets.buckets.items()
    }
    assert left.problems_at_rest() == []
    spent = sum(bucket.spent["micros"] for key, bucket in left.budgets.buckets.items() if key.startswith("all|"))
    assert spent == COST_MICROS * sum(cluster.entered.values())


@pytest.mark.parametrize(
    "edge", ["retention.before-tombstone", "checkpoint.begun", "checkpoint.before-certify", "checkpoint.after-certify"]
)
@pytest.mark.parametrize("hit", [1, 5])
def test_a_crash_while_entries_are_retired_loses_nothing(monkeypatch: pytest.MonkeyPatch, edge: str, hit: int) -> None:
    cluster = cluster_with_retention(3)
    books = kept_books(cluster)
    passes = 0

    def point(name: str) -> None:
        nonlocal passes
        if name == edge and cluster.running == "gate":
            passes += 1
            if passes == hit:
                raise Crash

    monkeypatch.setattr(retention, "failpoint", point)
    monkeypatch.setattr(checkpoints, "failpoint", point)
    for round_ in range(6):
        for number in range(6):
            cluster.start_run(f"r{round_}-{number}", "a", "b", account=ACCOUNTS[number % 3])
        let_retire(cluster)
        assert_whole(cluster)
    assert passes >= hit, "the edge was never reached: the test shows nothing"
    assert books.problems == []
    assert all(entries(cluster, partition)[0][1].first_seq > 1 for partition in range(ACCOUNT_PARTITIONS))


def retired(seed: int = 1) -> Cluster:
    cluster = cluster_with_retention(seed)
    for number in range(6):
        cluster.start_run(f"r{number}", account=ACCOUNTS[number % 3])
    cluster.holds_back = True
    cluster.start_run("open", account="acme0")
    let_retire(cluster)
    return cluster


def test_the_entry_says_who_asked_and_by_what() -> None:
    cluster = retired()
    (_, first), *_ = entries(cluster, 0)
    assert isinstance(first.events[0], LedgerCarried)
    assert (first.events[0].by, first.events[0].policy) == ("ann", "ledger@1")


def test_nothing_is_retired_before_a_checkpoint_holds_what_carries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.Checkpointer, "work", lambda *_: None)
    cluster = retired()
    assert any(isinstance(entry.events[0], LedgerCarried) for _, entry in entries(cluster, 0))
    assert entries(cluster, 0)[0][1].first_seq == 1


def test_a_hole_that_nothing_carries_forward_is_a_fault() -> None:
    cluster = retired()
    cluster.publish(RETENTION | {"every_s": 10**6})
    latest = entries(cluster, 0)[-1][0].offset
    for number in range(8):
        cluster.start_run(f"more{number}", account="acme0")
    for _ in range(10):
        cluster.turn()
    after = [message.offset for message, _ in entries(cluster, 0) if message.offset > latest]
    assert len(after) > 2
    cluster.broker.lose(LEDGER, 0, after[0])
    stop = cluster.broker.offsets(LEDGER, 0).end
    with pytest.raises(CorruptLogError, match="starts at seq"):
        restore.fold_all(cluster.broker, cluster.machine("gate"), 0, stop, lambda _: None)
    assert audit([cluster.messages(LEDGER, 0)]).torn()
    assert not cluster.verified()[0].ok


@pytest.mark.parametrize("field", ["spent", "reserved", "settled_micros"])
def test_a_carried_value_that_does_not_follow_is_refused(field: str) -> None:
    """By the books that hold what it replaces, and by the next owner, whose state it is."""
    cluster = cluster_with_retention(1)
    cluster.holds_back = True
    for number in range(6):
        cluster.start_run(f"r{number}", account=ACCOUNTS[number % 3])
    cluster.settle()
    cluster.now_ms += 1500
    cluster.settle()
    refused = 0
    for partition in range(ACCOUNT_PARTITIONS):
        books = Books()
        for message in cluster.messages(LEDGER, partition):
            record = None if message.value is None else codec.decode(message.value)
            if isinstance(record, Entry) and isinstance(record.events[0], LedgerCarried) and record.events[0].runs:
                forged = _forged(record.events[0], field)
                entry = msgspec.structs.replace(record, events=(forged,))
                assert books.read(msgspec.structs.replace(message, value=codec.encode_entry("LedgerEntry", entry)))
                machine = cluster.machine("gate")
                part = OwnedPartition(machine, partition)
                with pytest.raises(CorruptLogError, match="balances"):
                    machine.load_carried(part.state, entry)
                refused += 1
            else:
                assert books.read(message) == []
    assert refused


def _forged(event: LedgerCarried, field: str) -> LedgerCarried:
    change = msgspec.structs.replace
    if field == "settled_micros":
        return change(event, runs=(change(event.runs[0], settled_micros=77), *event.runs[1:]))
    bucket = event.buckets[0]
    amounts = change(getattr(bucket, field), micros=77)
    return change(event, buckets=(change(bucket, **{field: amounts}), *event.buckets[1:]))


def test_the_command_says_what_is_kept_and_how_far_it_has_come() -> None:
    cluster = retired()
    before, after = (kept(cluster.broker, keep_ms, cluster.now_ms) for keep_ms in (0, 10**9))
    for partition, part in enumerate(before):
        there = entries(cluster, partition)
        assert (part.entries, part.carried_by, part.carried_for) == (len(there), "ann", "ledger@1")
        assert part.before_carried == part.older
        assert part.oldest_ms == there[0][1].now_ms
    assert [part.older for part in after] == [0] * ACCOUNT_PARTITIONS


def test_a_late_cost_of_an_attempt_that_ended_before_balances_were_carried_counts() -> None:
    """Its run is still open: books of what is left know the run, not the attempt, and agree with what the run closes with."""
    cluster = cluster_with_retention(1)
    books = kept_books(cluster)
    cluster.holds_back = True
    cluster.start_run("open", "a", account="acme0")
    cluster.settle()
    cluster.now_ms += 60_000  # its lease lapses: it is given up
    cluster.incarnation = cluster.register(pid=2)
    for _ in range(40):
        cluster.turn()
        cluster.now_ms += 1000
        cluster.register(incarnation=cluster.incarnation, pid=2)
    (late, second) = cluster.held_back
    assert (late[1].attempt, second[1].attempt) == (1, 2)
    cluster.holds_back = False
    let_retire(cluster)
    cluster.publish(RETENTION | {"every_s": 10**6})
    cluster.start_run("more", account="acme0")
    let_retire(cluster)
    assert entries(cluster, 0)[0][1].first_seq > 1

    cluster._answer(*late)
    cluster.settle()
    cluster._answer(*second)
    cluster.settle()
    assert books.problems == []
    assert_whole(cluster)
    left = audit(cluster.messages(LEDGER, partition) for partition in range(ACCOUNT_PARTITIONS))
    assert left.runs["open"].closed
    assert left.runs["open"].settled_micros == books.runs["open"].settled_micros == 2 * COST_MICROS


def test_a_late_cost_is_believed_once_and_only_of_a_run_that_was_carried() -> None:
    books = Books()
    cluster = retired()
    for partition in range(ACCOUNT_PARTITIONS):
        for message in cluster.messages(LEDGER, partition):
            books.read(message)
    page = money._Page(books, cluster.messages(LEDGER, 0)[-1])
    carried, opened = "open", "later"
    books.runs[opened] = money.RunBooks("acme0", None)
    for run_id, said in (
        (carried, []),
        (carried, ["after it was settled"]),
        (opened, ["after it was never asked for"]),
    ):
        before = len(books.problems)
        page._attempt(
            "AttemptSettled",
            {
                "account": "acme0",
                "run_id": run_id,
                "step_id": "gone",
                "attempt": 1,
                "reserved_micros": 0,
                "actual_micros": 5,
                "overshoot_micros": 5,
            },
        )
        new = books.problems[before:]
        assert len(new) == len(said)
        assert all(text in problem.text for text, problem in zip(said, new, strict=True))


def opened_runs(count: int) -> tuple[GateMachine, OwnedPartition]:
    """Return a ledger of runs whose names are long: they stand in an entry that carries them again and again."""
    machine = GateMachine(2, 2, Executors(10_000, lambda: 0, lambda: 0))
    part = OwnedPartition(machine, 0)
    for number in range(count):
        parent = f"{number:08d}-" + "p" * 60
        event = RunOpened(
            account="a/" * 20 + "a",
            run_id=child_run_id(parent, "w"),
            budget_micros=None,
            workflow="w@1",
            tags={},
            parent_run_id=parent,
        )
        machine.apply(part.state, "ledger-0", "", event, number + 1, 1)
    return machine, part


def test_all_that_is_carried_counts_not_the_states_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the entry is refused as too large, and every owner of the partition ends at it."""
    _, part = opened_runs(300)
    event = carrying.carried(part.state, "ledger@1", "ann")
    assert event is not None
    part.add(Decision("ledger-0", "", [event], is_complete=True), "c", {})
    sealed = part.seal()
    assert sealed is not None
    _, value = sealed
    states = sum(len(unit.unit) + len(unit.state) for unit in event.units)
    assert len(value) > 1.5 * states
    _, part = opened_runs(300)
    monkeypatch.setattr(carrying, "MAX_EVENT_BYTES", len(value) - 1000)
    assert carrying.carried(part.state, "ledger@1", "ann") is None
    monkeypatch.setattr(carrying, "MAX_EVENT_BYTES", len(value))
    assert carrying.carried(part.state, "ledger@1", "ann") == event


def test_what_may_be_carried_may_be_written() -> None:
    assert carrying.MAX_EVENT_BYTES + 1024 * 1024 <= owned.MAX_ENTRY_BYTES


def let_pass(cluster: Cluster, rounds: int = 4) -> None:
    """Let time go by like `let_retire`, but compaction takes nothing."""
    for _ in range(rounds):
        cluster.settle()
        cluster.now_ms += 1500
        cluster.register(incarnation=cluster.incarnation)
    cluster.settle()


def tombstones(cluster: Cluster) -> Counter[bytes | None]:
    """Return how many there are of each key in a partition of the ledger."""
    return Counter(message.key for message in cluster.messages(LEDGER, 0) if message.value is None)


def assert_no_gap(cluster: Cluster) -> None:
    """Of what is carried forward, nothing is left out before the last entry that is retired."""
    there = [message.key for message, _ in entries(cluster, 0)]
    retired_keys = tombstones(cluster).keys()
    last = max(index for index, key in enumerate(there) if key in retired_keys)
    assert set(there[: last + 1]) <= retired_keys


@pytest.mark.parametrize("keep_s", [0, 4])
@pytest.mark.parametrize("crashes", [False, True])
def test_what_has_its_tombstone_gets_no_second_one(keep_s: int, crashes: bool) -> None:
    """Compaction leaves the active segment alone: entries lie there for many rounds, and for owners to come."""
    cluster = cluster_with_retention(1)
    cluster.publish(RETENTION | {"keep_s": keep_s}, by="ann")
    for number in range(12):
        cluster.start_run(f"r{number}", "a", account="acme0")
    grown = set()
    for round_ in range(9):
        cluster.start_run(f"more{round_}", "a", account="acme0")
        let_pass(cluster)
        if crashes:
            cluster.crash("gate")
            cluster.start("gate")
        cluster.settle()
        grown.add(tombstones(cluster).total())
        assert set(tombstones(cluster).values()) <= {1}
    assert len(grown) > 3
    assert_no_gap(cluster)
    let_retire(cluster)
    assert_whole(cluster)


def test_an_owner_that_dies_while_it_retires_leaves_the_rest_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_with_retention(1)
    passes = 0

    def point(name: str) -> None:
        nonlocal passes
        passes += name == "retention.before-tombstone"
        if passes == 20:
            raise Crash

    monkeypatch.setattr(retention, "failpoint", point)
    monkeypatch.setattr(retention, "OFFSETS_PER_TURN", 7)
    for number in range(12):
        cluster.start_run(f"r{number}", "a", account="acme0")
    for round_ in range(4):
        cluster.start_run(f"more{round_}", "a", account="acme0")
        let_pass(cluster, 2)
    assert passes > 20
    assert set(tombstones(cluster).values()) == {1}
    assert tombstones(cluster).total() > 20
    assert_no_gap(cluster)
