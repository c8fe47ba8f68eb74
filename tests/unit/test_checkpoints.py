"""Checkpoints and restores, with real machines on the log in memory: what is restored must be what folding the log gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster, Crash
from support.pure import chain
from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.entry import OwnerAnnounced
from tidegate.domain.identity import partition_of
from tidegate.eventlog import checkpoints, owned, owner, restore, tail
from tidegate.eventlog.interface import EventLogError, Record, TopicPartition
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.shelf import Shelf, ShelfError
from tidegate.gate import snapshots as gate_snapshots
from tidegate.scheduler import snapshots as run_snapshots

OFTEN = CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=2, rest_after_s=3600)
EDGES = ("checkpoint.begun", "checkpoint.before-certify", "checkpoint.after-certify")
LOGS = {"scheduler": ("run-events", RUN_PARTITIONS), "gate": ("gate-ledger", ACCOUNT_PARTITIONS)}
SNAPSHOTS = {"scheduler": "run-snapshots", "gate": "gate-snapshots"}


def state_of(part: OwnedPartition) -> dict[str, Any]:
    """Return all that a partition's state says, wherever its units are."""
    machine = part.machine
    units = {unit: machine.dump(part.state, unit) for unit in part.as_of if part.as_of[unit] >= 0}
    decode = msgspec.msgpack.decode  # sets come in any order
    return {
        "units": {unit: freeze(decode(data)) for unit, data in (units | shelved(part)).items()},
        "head": machine.head(part.state, own) if (own := machine.own_subject(part.state)) else None,
        "told": part.told.told,
        "inputs": part.inputs,
        "marks": part.marks,
        "now_ms": part.now_ms,
        "waiting": getattr(part.state, "waiting", None),
        "held_by": getattr(part.state, "held_by", None),
    }


def freeze(value: Any) -> Any:
    """Return lists of text sorted: command ids are a set."""
    if isinstance(value, list):
        items = [freeze(item) for item in value]
        return sorted(items) if items and all(isinstance(item, str) for item in items) else items
    return {key: freeze(item) for key, item in value.items()} if isinstance(value, dict) else value


def shelved(part: OwnedPartition) -> dict[str, bytes]:
    rows = part.shelf._database.execute("SELECT unit, state FROM units") if part.shelf._database else ()
    return {unit: state for unit, state in rows if unit not in part.as_of}


def restored_and_folded(cluster: Cluster, service: str, partition: int) -> tuple[OwnedPartition, OwnedPartition]:
    """Restore the partition at its present end, by snapshots and without."""
    machine = cluster.machine(service)
    topic, _ = LOGS[service]
    stop = cluster.broker.offsets(topic, partition).end
    by_snapshots = restore.restore(cluster.broker, machine, partition, stop, lambda _: None, 0).part
    by_log, _ = restore.fold_all(cluster.broker, machine, partition, stop, lambda _: None)
    for part in (by_snapshots, by_log):
        part.put_away_all_over()
    return by_snapshots, by_log


def assert_restores(cluster: Cluster) -> int:
    """Every partition restored from its snapshots is what its log says; returns how many had a checkpoint."""
    used = 0
    for service, (_, count) in LOGS.items():
        for partition in range(count):
            by_snapshots, by_log = restored_and_folded(cluster, service, partition)
            assert state_of(by_snapshots) == state_of(by_log)
            used += by_snapshots.checkpoint is not None
    return used


def checkpoint_of(cluster: Cluster, service: str, partition: int) -> Any:
    return cluster.owners[service].owned[partition].checkpoint


def some_work(cluster: Cluster, count: int = 12, steps: int = 6) -> list[str]:
    names = [f"r{number}" for number in range(count)]
    for number, run_id in enumerate(names):
        cluster.start_run(run_id, *("abc"[: 1 + number % 3]), account=f"acme{number % 3}")
    for _ in range(steps):
        cluster.turn()
    return names


@pytest.mark.parametrize("seed", range(20))
def test_what_is_restored_is_what_the_log_says_at_any_moment(seed: int) -> None:
    """Runs, crashes, cancels, late results, forced compaction: after every few turns both ways agree."""
    cluster = Cluster(seed, OFTEN)
    rng = random.Random(seed)
    used = 0
    for number in range(60):
        what = rng.random()
        if what < 0.5:
            cluster.start_run(f"r{number}", *("abc"[: rng.randint(1, 3)]), account=f"acme{number % 3}")
        elif what < 0.6:
            cluster.command(f"r{rng.randint(0, 60)}", "cancel", command_id=f"c{number}")
        elif what < 0.7:
            service = rng.choice(("scheduler", "gate"))
            cluster.crash(service)
            cluster.start(service)
        elif what < 0.8:
            cluster.broker.compact(rng.choice(("run-snapshots", "gate-snapshots", "run-events", "gate-ledger")))
        for _ in range(rng.randint(1, 6)):
            cluster.turn()
        cluster.broker.land_stragglers()
        if number % 5 == 0:
            used += assert_restores(cluster)
    cluster.settle()
    used += assert_restores(cluster)
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run.status for run in runs.values()} <= {"succeeded", "cancelled"} | {"absent"}
    assert set(cluster.entered.values()) == {1}
    assert used > 10, "checkpoints were hardly ever used: the test shows nothing"


@pytest.mark.feature("D1")
@pytest.mark.parametrize("service", ["scheduler", "gate"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("hit", [1, 2, 3])
def test_a_crash_in_a_checkpoint_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, service: str, edge: str, hit: int
) -> None:
    for seed in range(3):
        cluster = Cluster(seed, OFTEN)
        passes = 0

        def point(name: str, cluster: Cluster = cluster) -> None:
            nonlocal passes
            if name == edge and cluster.running == service:
                passes += 1
                if passes == hit:
                    raise Crash

        monkeypatch.setattr(checkpoints, "failpoint", point)
        names = some_work(cluster, 20)
        cluster.settle()
        assert passes >= hit, "the edge was never reached: the test shows nothing"
        report, runs = cluster.verified()
        assert report.problems == []
        assert {run_id: runs[run_id].status for run_id in names} == dict.fromkeys(names, "succeeded")
        assert assert_restores(cluster)


def test_a_restart_reads_only_what_came_after_the_checkpoint() -> None:
    cluster = Cluster(0, OFTEN)
    some_work(cluster, 30)
    cluster.settle()
    assert checkpoint_of(cluster, "scheduler", 0)
    for service, (topic, _) in LOGS.items():
        part, _ = restored_and_folded(cluster, service, 0)
        assert part.checkpoint is not None
        entries = sum(1 for message in cluster.messages(topic, 0) if message.value is not None)
        assert part.since_checkpoint < entries / 3


def test_a_quiet_moment_is_taken_for_a_checkpoint() -> None:
    """What is written then is in nobody's way: whoever is killed later has less to fold."""
    seldom = CheckpointSettings(every_entries=16 * 5, every_s=3600)
    cluster = Cluster(0, seldom)
    some_work(cluster, 12)
    cluster.settle()
    for _ in range(30):  # 0.3 s more
        cluster.turn()
    for service, (topic, _) in LOGS.items():
        entries = sum(1 for message in cluster.messages(topic, 0) if message.value is not None)
        quiet, folded = restored_and_folded(cluster, service, 0)
        assert 10 < entries < 16 * 5, "it would be time for one in any case: the test shows nothing"
        assert quiet.since_checkpoint < 5
        assert state_of(quiet) == state_of(folded)


# --- what is over leaves the memory ---------------------------------------------------------------


def test_runs_that_are_over_leave_the_memory_and_are_still_known() -> None:
    cluster = Cluster(0, OFTEN)
    names = some_work(cluster, 30)
    cluster.settle()
    loop = cluster.owners["scheduler"]
    in_memory = [run_id for part in loop.owned.values() for run_id in part.state.runs]
    assert len(in_memory) < len(names) / 2
    for restart in (False, True):
        if restart:
            cluster.crash("scheduler")
            loop = cluster.start("scheduler")
            cluster.settle()
        before, _ = cluster.verified()
        for run_id in names:
            cluster.start_run(run_id, *("abc"[: 1 + int(run_id[1:]) % 3]), account="acme")  # the same again
        cluster.settle()
        after, runs = cluster.verified()
        assert after.events == before.events, "a run that is over was started again"
    for number, run_id in enumerate(names):
        cluster.start_run(run_id, "a", content_hash="other", command_id=f"again-{number}", account="acme")
    cluster.settle()
    after, runs = cluster.verified()
    assert after.problems == []
    assert after.events == before.events + len(names), "each is refused once, in its own chain"
    assert all(runs[run_id].status == "succeeded" for run_id in names)
    assert {letter.code for letter in cluster.letters()} == {"duplicate_run_id"}


@pytest.mark.feature("P2")
@pytest.mark.parametrize("restart", [False, True])
def test_a_late_result_of_a_run_that_left_the_memory_settles_once(restart: bool) -> None:
    cluster = Cluster(0, OFTEN)
    cluster.holds_back = True
    cluster.start_run("late", "a", account="acme0")
    for _ in range(20):
        cluster.turn()
    cluster.command("late", "cancel")
    some_work(cluster, 30, steps=60)
    partition = partition_of("late", RUN_PARTITIONS)
    assert "late" not in cluster.owners["scheduler"].owned[partition].state.runs, "it never left"
    if restart:
        cluster.crash("scheduler")
        cluster.start("scheduler")
    cluster.holds_back = False
    for _ in range(2):
        cluster.answer_late()
        cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    ignored = [event for event in cluster.events_of("late") if type(event).__name__ == "ResultIgnored"]
    assert len(ignored) == 1
    assert runs["late"].status == "cancelled"
    settled = [event for event in cluster.ledger_events() if event.run_id == "late" and hasattr(event, "actual_micros")]
    assert [event.actual_micros for event in settled] == [2]
    assert_restores(cluster)


def test_runs_that_wait_for_long_leave_the_memory_and_come_back() -> None:
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=50, rest_after_s=5))
    cluster.require_approval()
    names = some_work(cluster, 10, steps=40)
    assert all(run.status == "waiting" for run in cluster.verified()[1].values())
    cluster.now_ms += 60_000
    cluster.settle()
    loop = cluster.owners["scheduler"]
    assert [run_id for part in loop.owned.values() for run_id in part.state.runs] == []
    cluster.crash("scheduler")
    loop = cluster.start("scheduler")
    cluster.settle()
    assert [run_id for part in loop.owned.values() for run_id in part.state.runs] == []
    assert assert_restores(cluster)
    for run_id in names:
        cluster.command(run_id, "approve", step_id="a", by="ann")
    cluster.settle()
    assert all(
        run.open_approvals() == [] or run.steps["a"].status == "succeeded" for run in cluster.verified()[1].values()
    )
    assert assert_restores(cluster)


def test_definitions_of_runs_that_are_over_are_forgotten_with_the_next_owner() -> None:
    """Else every version that was ever published would be read and written by every owner there will be."""
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=50, rest_after_s=5))
    some_work(cluster, 10, steps=40)  # of three definitions
    asleep = {
        "name": "asleep",
        "version": "1",
        "nodes": {"w": {"kind": "wait_event", "wait": {"event": "go"}}},
        "edges": [],
        "functions": {},
    }
    for number in range(6):
        cluster.start_definition(f"asleep{number}", asleep)
    cluster.settle()
    cluster.now_ms += 60_000
    cluster.settle()

    def kept() -> set[str]:
        parts = (part for part in cluster.owners["scheduler"].owned.values())
        return {canonical.loads(text)["name"] for part in parts for text in part.state.definitions.values()}

    assert len(kept()) > 1
    for _ in range(2):
        cluster.crash("scheduler")
        cluster.start("scheduler")
        cluster.now_ms += 10_000
        cluster.settle()
        assert kept() == {"asleep"}
        assert assert_restores(cluster)
    cluster.command("asleep0", "signal", event="go", key=None, value="1")
    cluster.settle()
    assert cluster.verified()[1]["asleep0"].status == "succeeded"


# --- what is doubtful is thrown away ---------------------------------------------------------------


def doubtful_cluster() -> Cluster:
    cluster = Cluster(0, OFTEN)
    cluster.require_approval()  # so that many runs stay alive
    some_work(cluster, 20, steps=40)
    cluster.settle()
    return cluster


def live_key(cluster: Cluster, service: str) -> tuple[int, bytes, bytes]:
    """Return a snapshot that the checkpoint in force counts: one of a checkpoint that is being made may vanish unnoticed."""
    for partition in range(LOGS[service][1]):
        in_force = cluster.owners[service].owned[partition].checkpoint
        for message in reversed(cluster.messages(SNAPSHOTS[service], partition)):
            if (
                message.value
                and (message.key or b"").startswith(b"live:")
                and codec.decode(message.value).units[0].state
                and in_force is not None
                and codec.decode(message.value).first <= in_force.number
            ):
                return partition, message.key or b"", message.value
    raise AssertionError("nothing is alive")


def removed(record: Any) -> None:
    return None


def of_another_format(record: Any) -> Any:
    (unit,) = record.units
    state = bytes([unit.state[0], 99]) + unit.state[2:]
    return codec.encode(type(record)(**fields(record) | {"units": (type(unit)(unit.unit, unit.as_of, state),)}))


def ahead_of_the_log(record: Any) -> Any:
    (unit,) = record.units
    return codec.encode(
        type(record)(**fields(record) | {"units": (type(unit)(unit.unit, unit.as_of + 1_000_000, unit.state),)})
    )


def half_of_it(record: Any) -> Any:
    return codec.encode(type(record)(**fields(record) | {"pieces": 2}))


def fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


@pytest.mark.parametrize("service", ["scheduler", "gate"])
@pytest.mark.parametrize("damage", [removed, of_another_format, ahead_of_the_log, half_of_it])
def test_a_doubtful_snapshot_is_thrown_away_and_the_log_folded(service: str, damage: Callable[[Any], Any]) -> None:
    cluster = doubtful_cluster()
    partition, key, value = live_key(cluster, service)
    assert restored_and_folded(cluster, service, partition)[0].checkpoint is not None
    cluster.writer.send(Record(SNAPSHOTS[service], partition, key, damage(codec.decode(value))))
    cluster.writer.flush(1.0)
    by_snapshots, by_log = restored_and_folded(cluster, service, partition)
    assert by_snapshots.checkpoint is None, "the damage went unnoticed"
    assert state_of(by_snapshots) == state_of(by_log)
    cluster.crash(service)  # and the service goes on from there, with checkpoints of its own
    cluster.start(service)
    some_more = [f"more{number}" for number in range(20)]
    for run_id in some_more:
        cluster.start_run(run_id, account="acme1")
    cluster.settle()
    assert checkpoint_of(cluster, service, partition) is not None
    assert_restores(cluster)


# From the key of a snapshot that the checkpoint needs.
ALTERED: list[Callable[[bytes], bytes]] = [
    lambda key: b"garbage",
    lambda key: b"",
    lambda key: b"\xff\xfe",
    lambda key: key[:5],
    lambda key: key.replace(b":", b":+", 1),  # a number to Python, and another key to Kafka
    lambda key: key.replace(b":", b":0", 1),
    lambda key: key.replace(b":", b": ", 1),
    lambda key: key.rpartition(b":")[0],
    lambda key: key.rpartition(b":")[0] + b":\xff",
    lambda key: key.replace(b":", b":" + b"9" * 5000, 1),
    lambda key: b"part:1",
    lambda key: b"done:x:1",
    lambda key: b"done:1:1:1",
]


@pytest.mark.parametrize("service", ["scheduler", "gate"])
def test_what_stands_under_a_key_that_no_owner_writes_is_passed_over(service: str) -> None:
    """It certifies nothing and took nobody's place; else one such record would make every restart fold the whole log."""
    cluster = doubtful_cluster()
    partition, key, _ = live_key(cluster, service)
    for alter in ALTERED:
        for value in (b"garbage", None):
            cluster.writer.send(Record(SNAPSHOTS[service], partition, alter(key), value))
            cluster.writer.flush(1.0)
            by_snapshots, by_log = restored_and_folded(cluster, service, partition)
            assert by_snapshots.checkpoint is not None, (alter(key), value)
            assert state_of(by_snapshots) == state_of(by_log)


def test_garbage_under_an_owners_key_is_not_passed_over() -> None:
    cluster = doubtful_cluster()
    partition, key, _ = live_key(cluster, "scheduler")
    cluster.writer.send(Record("run-snapshots", partition, key, b"garbage"))
    cluster.writer.flush(1.0)
    assert restored_and_folded(cluster, "scheduler", partition)[0].checkpoint is None


def test_the_next_owner_removes_what_no_owner_wrote() -> None:
    cluster = doubtful_cluster()
    cluster.writer.send(Record("run-snapshots", 0, b"garbage", b"garbage"))
    cluster.writer.flush(1.0)
    cluster.crash("scheduler")
    cluster.start("scheduler")
    some_work(cluster, 0, steps=5)
    cluster.now_ms += 10_000
    cluster.settle()
    last = [m.value for m in cluster.messages("run-snapshots", 0) if m.key == b"garbage"][-1:]
    assert last in ([None], [])


@pytest.mark.parametrize("service", ["scheduler", "gate"])
def test_a_snapshot_topic_that_lost_its_tail_is_noticed(service: str) -> None:
    """What is lost may leave an older snapshot under the same key, which nothing else would tell from the true one."""
    cluster = doubtful_cluster()
    partition, _, _ = live_key(cluster, service)
    log = cluster.broker.log(TopicPartition(SNAPSHOTS[service], partition))
    log.end = checkpoint_of(cluster, service, partition).snapshots_end - 1
    log.keep(lambda message: message.offset < log.end)
    by_snapshots, by_log = restored_and_folded(cluster, service, partition)
    assert by_snapshots.checkpoint is None
    assert state_of(by_snapshots) == state_of(by_log)


def test_a_lost_definition_of_a_run_that_rests_is_noticed() -> None:
    """What rests is read only when somebody wants it: too late to find that it cannot be read."""
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=50, rest_after_s=5))
    cluster.require_approval()
    names = some_work(cluster, 10, steps=40)
    cluster.now_ms += 60_000
    cluster.settle()
    for partition in range(RUN_PARTITIONS):
        for message in cluster.messages("run-snapshots", partition):
            if (message.key or b"").startswith(b"part:"):
                cluster.broker.lose("run-snapshots", partition, message.offset)
    cluster.crash("scheduler")
    cluster.start("scheduler")
    for run_id in names:
        cluster.command(run_id, "approve", step_id="a", by="ann")
    cluster.settle()
    assert cluster.letters() == []
    asked = [step.step_id for run in cluster.verified()[1].values() for step in run.open_approvals()]
    assert "a" not in asked


def test_a_lost_segment_is_noticed() -> None:
    cluster = Cluster(0, OFTEN)
    some_work(cluster, 30)
    cluster.settle()
    key = next(m.key for m in cluster.messages("run-snapshots", 0) if (m.key or b"").startswith(b"done:"))
    cluster.writer.send(Record("run-snapshots", 0, key or b"", None))
    cluster.writer.flush(1.0)
    by_snapshots, by_log = restored_and_folded(cluster, "scheduler", 0)
    assert by_snapshots.checkpoint is None
    assert state_of(by_snapshots) == state_of(by_log)


def test_a_state_too_large_for_a_record_is_cut_and_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "MAX_PIECE_BYTES", 100)
    cluster = doubtful_cluster()
    assert any(
        (m.key or b"").startswith(b"live:") and b":3:" in (m.key or b"") for m in cluster.messages("run-snapshots", 0)
    )
    assert assert_restores(cluster)


def test_snapshots_of_earlier_owners_are_removed() -> None:
    cluster = doubtful_cluster()
    for _ in range(4):
        for service in LOGS:
            cluster.crash(service)
            cluster.start(service)
        some_work(cluster, 0, steps=5)
        cluster.now_ms += 10_000
        for run_id in ("x", "y", "z", "u", "v"):
            cluster.command(f"{run_id}{cluster.now_ms}", "cancel")
        cluster.settle()
    cluster.broker.purge("run-snapshots")
    for partition in range(RUN_PARTITIONS):
        epochs = {
            (m.key or b"").split(b":")[1]
            for m in cluster.messages("run-snapshots", partition)
            if (m.key or b"")[:4] == b"live"
        }
        assert len(epochs) <= 1


def test_the_announcement_before_a_checkpoint_is_found_far_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "FIRST_SPAN", 3)
    cluster = Cluster(0, OFTEN)
    some_work(cluster, 30)
    cluster.settle()
    assert assert_restores(cluster)


def test_a_replaced_owners_snapshots_do_no_harm() -> None:
    """It was stopped in the middle of a checkpoint; another took over and worked on; then it writes what it still has."""
    cluster = Cluster(0, OFTEN)
    some_work(cluster, 20)
    zombie = cluster.owners["scheduler"]
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    cluster.start("scheduler", "scheduler-1")
    for _ in range(8):
        cluster.turn()
    for partition, checkpointer in zombie._checkpointers.items():
        zombie.owned[partition].since_checkpoint = 1_000
        for _ in range(20):
            checkpointer.work(cluster.now_ms / 1000, cluster.now_ms)
            zombie._tell_writer.flush(1.0)
    assert all(part.doubt for part in zombie.owned.values()), "it certified a checkpoint although it owns nothing"
    assert_restores(cluster)
    cluster.settle()
    assert assert_restores(cluster)


def test_announcements_name_the_last_checkpoint() -> None:
    cluster = Cluster(0, OFTEN)
    some_work(cluster, 30)
    cluster.settle()
    named = [
        record.checkpoint
        for message in cluster.messages("run-events", 0)
        if isinstance(record := codec.decode(message.value), OwnerAnnounced) and record.checkpoint is not None
    ]
    assert named[-1] == checkpoint_of(cluster, "scheduler", 0)
    assert [checkpoint.number for checkpoint in named] == list(range(1, len(named) + 1))


def test_formats_are_told_apart() -> None:
    for module in (run_snapshots, gate_snapshots):
        assert module.SNAPSHOT_FORMAT >= 1
    other = run_snapshots.SNAPSHOT_FORMAT + 1
    with pytest.raises(ValueError, match=f"format {other}"):
        run_snapshots.load(msgspec.msgpack.encode([other, None, None]), {})


# --- what an attacker found ---------------------------------------------------------------


def test_a_run_that_is_over_and_too_large_for_a_record_is_cut_like_one_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every refused command is remembered, so somebody can make the little that is kept of a finished run large."""
    monkeypatch.setattr(owned, "MAX_DONE_BYTES", 300)
    monkeypatch.setattr(checkpoints, "MAX_PIECE_BYTES", 300)
    cluster = Cluster(0, OFTEN)
    cluster.start_run("r", "a")
    cluster.settle()
    for number in range(30):
        cluster.command("r", "cancel", command_id=f"{number:0100d}")
        cluster.turn()
    cluster.settle()
    assert max(len(m.value or b"") for p in range(RUN_PARTITIONS) for m in cluster.messages("run-snapshots", p)) < 600
    for _ in range(2):
        cluster.crash("scheduler")
        cluster.start("scheduler")
        cluster.settle()
        assert_restores(cluster)


def test_a_shelf_that_cannot_be_read_ends_the_owner_and_buries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=50, rest_after_s=5))
    cluster.require_approval()
    some_work(cluster, 10, steps=40)
    cluster.now_ms += 60_000
    cluster.settle()
    get, failed = Shelf.get, []

    def fails(shelf: Shelf, unit: str) -> Any:
        if unit == "r0" and not failed:
            failed.append(unit)
            raise ShelfError("disk I/O error")
        return get(shelf, unit)

    monkeypatch.setattr(Shelf, "get", fails)
    cluster.command("r0", "approve", step_id="a", by="ann")
    with pytest.raises(ShelfError):
        cluster.settle()
    cluster.crash("scheduler")
    cluster.start("scheduler")
    cluster.settle()
    assert cluster.letters() == []
    assert not cluster.verified()[1]["r0"].open_approvals()


def test_a_definition_is_found_again_whatever_hash_its_start_names() -> None:
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=50, rest_after_s=5))
    cluster.require_approval()
    text = canonical.dumps(chain("a"))
    cluster.command("r", "start", account="acme", workflow="w@1", definition=text, definition_hash="wrong", input="1")
    some_work(cluster, 10, steps=40)
    cluster.now_ms += 60_000
    cluster.settle()
    cluster.command("r", "approve", step_id="a", by="ann")
    cluster.settle()
    assert cluster.letters() == []
    assert assert_restores(cluster)


@pytest.mark.parametrize("name", ["ledger", "other"])
def test_a_run_may_be_named_as_a_ledger(name: str) -> None:
    cluster = Cluster(0, CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=1, rest_after_s=3600))
    partition = partition_of("acme0", ACCOUNT_PARTITIONS)
    cluster.start_run(f"{name}-{partition}", "a", "b", "c", account="acme0")
    used = 0
    for number in range(40):
        cluster.start_run(f"r{number}", "a", account="acme0")
        cluster.turn()
        if checkpoint_of(cluster, "gate", partition) is not None:
            assert restored_and_folded(cluster, "gate", partition)[0].checkpoint is not None
            used += 1
    assert used


def test_a_restart_reads_the_end_of_its_log_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking for the checkpoint, for the epoch before it and folding are three ways through the same records."""
    cluster = Cluster(0, OFTEN)
    some_work(cluster, steps=20)
    read_of_the_log, used = cluster.broker.read, 0
    for service, (topic, count) in LOGS.items():
        for partition in range(count):
            stop = cluster.broker.offsets(topic, partition).end
            read: list[int] = []

            def read_noting(
                where: str, at: int, begin: int, end: int, topic: str = topic, read: list[int] = read
            ) -> Any:
                for message in read_of_the_log(where, at, begin, end):
                    read.extend([message.offset] if where == topic else [])
                    yield message

            monkeypatch.setattr(cluster.broker, "read", read_noting)
            machine = cluster.machine(service)
            part = restore.restore(cluster.broker, machine, partition, stop, lambda _: None, 0).part

            used += part.checkpoint is not None
            assert sorted(read) == sorted(set(read))
    assert used, "nothing was restored from a checkpoint"


@pytest.mark.parametrize("seed", range(10))
def test_a_tail_gives_what_the_log_holds_however_little_it_may_keep(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    broker = MemoryBroker()
    broker.create_topic("run-events", 1)
    writer = broker.writer()
    for number in range(60):
        writer.send(Record("run-events", 0, b"%d" % (number % 40), b"x" * rng.randint(0, 50)))
    writer.flush(1.0)
    broker.compact("run-events")  # leaves holes
    monkeypatch.setattr(tail, "MAX_KEPT_RECORDS", rng.choice((0, 7, 30, 100)))
    monkeypatch.setattr(tail, "MAX_KEPT_BYTES", rng.choice((0, 300, 10_000)))

    end_of_log = tail.Tail(broker, "run-events", 0, 55)

    for _ in range(30):
        begin = rng.randint(0, 55)
        end = rng.randint(begin, 55)
        assert list(end_of_log.read(begin, end)) == list(broker.read("run-events", 0, begin, end))


def test_a_checkpoint_does_not_wait_for_inputs_that_do_not_come() -> None:
    """It is made of a quiet moment: turns that wait their full time for inputs would make it last longer than that."""
    cluster = Cluster(0, OFTEN)
    some_work(cluster, steps=12)
    loop = cluster.owners["scheduler"]
    waits = {True: set[float](), False: set[float]()}
    for _ in range(200):
        cluster.turn()
        waits[any(checkpointer.is_busy for checkpointer in loop._checkpointers.values())].add(loop._longest_poll_s(0.2))

    assert max(waits[True]) <= owner.CHECKPOINT_POLL_S
    assert max(waits[False]) == 0.2


@pytest.mark.feature("D1")
@pytest.mark.parametrize("by_snapshots", [True, False])
def test_an_owner_stays_in_its_group_while_it_restores(monkeypatch: pytest.MonkeyPatch, by_snapshots: bool) -> None:
    """A long restore without a word would cost it the partition as soon as it is done, and keep all other owners waiting."""
    cluster = Cluster(checkpoints=OFTEN if by_snapshots else None)
    for number in range(6):
        cluster.start_run(f"r{number}")
    cluster.settle()
    cluster.crash("scheduler")
    loop = cluster.start("scheduler")
    words: list[int] = []
    stay, real = loop._inbox.stay, owner.restore
    is_restoring = False

    def restored(*args: Any) -> Any:
        nonlocal is_restoring
        is_restoring = True
        try:
            return real(*args)
        finally:
            is_restoring = False

    monkeypatch.setattr(loop._inbox, "stay", lambda: (words.append(is_restoring), stay())[1])
    monkeypatch.setattr(owner, "restore", restored)
    monkeypatch.setattr(restore, "PROGRESS_EVERY", 2)
    cluster.settle()
    assert sum(words) > 5

    # Whoever has its place meanwhile goes on with it.
    cluster.crash("scheduler")
    late = cluster.start("scheduler")

    def overtaken(*args: Any) -> Any:
        cluster.broker.inbox("tidegate-scheduler", "scheduler-0", "run-commands").poll(1, 0.0)
        return real(*args)

    monkeypatch.setattr(owner, "restore", overtaken)
    with pytest.raises(EventLogError, match="another process has joined"):
        late.run_once(0.0)
