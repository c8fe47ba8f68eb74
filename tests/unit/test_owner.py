"""The log-then-tell protocol, with real machines on the log in memory: crashes at its edges, zombies, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster, Crash, result_of
from tidegate import codec
from tidegate.codec import avro
from tidegate.domain import canonical
from tidegate.domain.identity import account_root, partition_of
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.run_events import StepFailed
from tidegate.eventlog import owned, owner
from tidegate.eventlog.interface import Record
from tidegate.eventlog.machine import CorruptLogError, RefusedToStartError
from tidegate.scheduler import decide

EDGES = ("owner.before-log", "owner.after-log", "owner.after-tell")
RUNS = [f"r{n}" for n in range(6)]


def all_ended_once(cluster: Cluster) -> None:
    """Nothing lost, nothing twice: every run succeeded, its chain is whole, each step was entered once, no money is open."""
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run_id: run.status for run_id, run in runs.items()} == dict.fromkeys(RUNS, "succeeded")
    assert cluster.entered == {(run_id, step, 1): 1 for run_id in RUNS for step in "abc"}
    for partition in range(ACCOUNT_PARTITIONS):
        assert cluster.ledger_state(partition).runs == {}
        assert cluster.ledger_state(partition).attempts == {}


def run_scheduler(cluster: Cluster) -> None:
    for _ in range(10):
        cluster.owners["scheduler"].run_once(0.0)


def start_all(cluster: Cluster) -> None:
    for number, run_id in enumerate(RUNS):
        cluster.start_run(run_id, account=f"acme{number % 3}")


def test_runs_end_and_both_logs_verify() -> None:
    cluster = Cluster()
    start_all(cluster)
    cluster.settle()
    all_ended_once(cluster)


@pytest.mark.feature("O3")
def test_who_lost_its_share_of_the_group_is_not_ready_until_it_has_one_again() -> None:
    cluster = Cluster()
    first = cluster.owners["scheduler"]
    run_scheduler(cluster)
    assert first.why_not_ready() == ""
    silent = cluster.start("scheduler", "scheduler-1")
    for loop in (silent, first, silent, first, silent):
        loop.run_once(0.0)
    assert (first.why_not_ready(), silent.why_not_ready()) == ("", "")

    newcomer = cluster.start("scheduler", "scheduler-2")
    for _ in range(5):
        newcomer.run_once(0.0)
        first.run_once(0.0)
    assert first.why_not_ready() == "the group of run-commands has given us no share of its partitions"

    for loop in (silent, newcomer, first, newcomer, first):
        loop.run_once(0.0)
    assert first.why_not_ready() == ""


@pytest.mark.feature("D1")
@pytest.mark.parametrize("service", ["scheduler", "gate"])
@pytest.mark.parametrize(
    ("edge", "hit"),
    [("owner.after-announce", 1), ("owner.after-announce", 2)] + [(e, n) for e in EDGES for n in (1, 2, 3, 5, 8)],
)
def test_a_crash_at_an_edge_loses_nothing_and_repeats_nothing(
    monkeypatch: pytest.MonkeyPatch, service: str, edge: str, hit: int
) -> None:
    for seed in range(4):
        cluster = Cluster(seed)
        passes = 0
        running: list[str] = []

        def point(name: str, running: list[str] = running) -> None:
            nonlocal passes
            if name == edge and running[-1] == service:
                passes += 1
                if passes == hit:
                    raise Crash

        for name in ("scheduler", "gate"):
            wrap(monkeypatch, cluster, name, running)
        monkeypatch.setattr(owner, "failpoint", point)
        start_all(cluster)
        cluster.settle()
        assert passes >= hit, "the edge was never reached: the test shows nothing"
        all_ended_once(cluster)


def wrap(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, service: str, running: list[str]) -> None:
    """Note whose turn it is, so that a failpoint can tell the services apart; also for owners started later."""
    original = cluster.start

    def start(name: str, instance_id: str | None = None) -> Any:
        loop = original(name, instance_id)
        note(loop, name)
        return loop

    def note(loop: Any, name: str) -> None:
        turn = loop.run_once

        def run_once(timeout_s: float) -> int:
            running.append(name)
            return int(turn(timeout_s))

        loop.run_once = run_once

    if service == "scheduler":
        monkeypatch.setattr(cluster, "start", start)
    note(cluster.owners[service], service)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("service", ["scheduler", "gate"])
@pytest.mark.parametrize("pause_at", [2, 4, 6])
def test_a_zombie_that_wakes_after_another_took_over_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, service: str, pause_at: int
) -> None:
    cluster = Cluster()
    start_all(cluster)
    zombie = cluster.owners[service]
    passes = 0
    woken = False

    def point(name: str) -> None:
        """Stop the owner between deciding and logging; while it sleeps its session ends and another works on."""
        nonlocal passes, woken
        if name != "owner.before-log" or woken or not any(part.unacknowledged for part in zombie.owned.values()):
            return
        passes += 1
        if passes == pause_at:
            woken = True
            cluster.broker.expire(f"tidegate-{service}", f"{service}-0")
            cluster.start(service, f"{service}-1")
            cluster.settle()

    monkeypatch.setattr(owner, "failpoint", point)
    turns = 0
    while not woken and turns < 500:
        turns += 1
        cluster.execute()
        for loop in list(cluster.owners.values()):
            loop.run_once(0.0)
        cluster.now_ms += 10
    assert woken
    zombie.run_once(0.0)
    cluster.broker.expire(f"tidegate-{service}", f"{service}-0")  # it may have come back as an ordinary member
    cluster.settle()
    report, _ = cluster.verified()
    assert report.void_entries > 0, "the zombie wrote nothing: the test shows nothing"
    assert not zombie.owned
    all_ended_once(cluster)


def test_without_the_offset_check_the_zombie_would_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of rule 3 is what keeps a zombie silent: without it, it tells the gate what never happened."""
    told: list[int] = []
    for checks in (True, False):
        with monkeypatch.context() as patch:
            if not checks:
                patch.setattr(owned.OwnedPartition, "acknowledged", lambda self, slot, offset: slot.append(offset))
            cluster = Cluster()
            zombie = cluster.owners["scheduler"]
            cluster.settle()
            start_all(cluster)
            asleep = False

            def point(name: str, cluster: Cluster = cluster, zombie: Any = zombie) -> None:
                nonlocal asleep
                if name == "owner.before-log" and not asleep and any(p.unacknowledged for p in zombie.owned.values()):
                    asleep = True
                    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
                    cluster.start("scheduler", "scheduler-1")
                    cluster.settle()

            patch.setattr(owner, "failpoint", point)
            before = sum(cluster.broker.offsets("gate-requests", p).end for p in range(ACCOUNT_PARTITIONS))
            zombie.run_once(0.0)
            after = sum(cluster.broker.offsets("gate-requests", p).end for p in range(ACCOUNT_PARTITIONS))
            told.append(after - before)
            assert asleep
    assert told[1] > told[0]


def test_told_messages_that_come_again_are_not_taken_again() -> None:
    cluster = Cluster()
    start_all(cluster)
    cluster.settle()
    before, _ = cluster.verified()
    for topic in ("gate-requests", "gate-decisions"):
        for partition in range(2):
            start, end = cluster.broker.offsets(topic, partition)
            for message in list(cluster.broker.read(topic, partition, start, end)):
                cluster.writer.send(Record(topic, partition, message.key or b"", message.value, message.headers))
    cluster.writer.flush(1.0)
    cluster.settle()
    after, _ = cluster.verified()
    assert (after.entries, after.events) == (before.entries, before.events)
    all_ended_once(cluster)


def test_a_restart_folds_the_log_to_the_same_state() -> None:
    cluster = Cluster()
    start_all(cluster)
    for _ in range(6):  # in the middle
        cluster.execute()
        for loop in cluster.owners.values():
            loop.run_once(0.0)
    before = {p: sorted(part.state.runs) for p, part in cluster.owners["scheduler"].owned.items()}
    cluster.crash("scheduler")
    loop = cluster.start("scheduler")
    for _ in range(4):
        loop.run_once(0.0)
    after = {p: sorted(part.state.runs) for p, part in loop.owned.items()}
    assert {p: set(runs) for p, runs in before.items()} == {p: set(after[p]) & set(before[p]) for p in before}
    cluster.settle()
    all_ended_once(cluster)


@pytest.mark.feature("O3")
@pytest.mark.parametrize("topic", ["run-commands", "gate-requests", "gate-decisions", "step-results"])
def test_bytes_that_are_nothing_become_a_dead_letter_and_block_nobody(topic: str) -> None:
    cluster = Cluster()
    for partition in range(2):
        for value in (b"", b"{}", b"\xc3\x01" + bytes(8), b"\xc3\x01"):
            cluster.writer.send(Record(topic, partition, b"k", value, (("who", b"me"),)))
    cluster.writer.flush(1.0)
    start_all(cluster)
    cluster.settle()
    all_ended_once(cluster)
    letters = [letter for letter in cluster.letters() if letter.topic == topic]
    assert len(letters) == 8
    assert {letter.code for letter in letters} == {"malformed"}
    assert letters[0].headers == {"who": b"me"}


def test_a_message_in_the_wrong_partition_is_refused() -> None:
    cluster = Cluster()
    cluster.start_run("r0")
    cluster.settle()
    wrong = 1 - partition_of(account_root("acme"), ACCOUNT_PARTITIONS)
    start, end = cluster.broker.offsets("gate-requests", 1 - wrong)
    for message in list(cluster.broker.read("gate-requests", 1 - wrong, start, end)):
        cluster.writer.send(Record("gate-requests", wrong, message.key or b"", message.value))
    cluster.writer.flush(1.0)
    cluster.settle()
    assert {letter.code for letter in cluster.letters()} == {"internal_error"}
    assert cluster.ledger_state(wrong).runs == {}


def test_an_input_that_was_deleted_unread_is_refused_with_advice() -> None:
    cluster = Cluster()
    start_all(cluster)
    cluster.settle()
    cluster.crash("scheduler")
    partition = partition_of("r0", 2)
    for number in range(20):
        cluster.start_run(f"more{number}")
    end = cluster.broker.offsets("run-commands", partition).end
    cluster.broker.delete_before("run-commands", partition, end)
    cluster.start("scheduler")
    with pytest.raises(RefusedToStartError, match="deleted unread"):
        run_scheduler(cluster)


def test_a_log_topic_that_was_made_again_is_refused() -> None:
    cluster = Cluster()
    start_all(cluster)
    cluster.settle()
    cluster.crash("scheduler")
    kept = [
        (p, m)
        for p in range(2)
        for m in cluster.broker.read("run-events", p, 0, cluster.broker.offsets("run-events", p).end)
    ]
    cluster.broker.delete_topic("run-events")
    cluster.broker.create_topic("run-events", 2)
    for p, m in kept:
        cluster.writer.send(Record("run-events", p, m.key or b"", m.value, m.headers))
    cluster.writer.flush(1.0)
    cluster.start("scheduler")
    with pytest.raises(RefusedToStartError, match="made again"):
        run_scheduler(cluster)


def test_a_broken_chain_is_not_folded() -> None:
    cluster = Cluster()
    start_all(cluster)
    cluster.settle()
    cluster.crash("scheduler")
    partition = partition_of("r0", 2)
    end = cluster.broker.offsets("run-events", partition).end
    entries = [
        m for m in cluster.broker.read("run-events", partition, 0, end) if dict(m.headers).get("type") == b"RunEntry"
    ]
    cluster.writer.send(Record("run-events", partition, b"forged", entries[-1].value, entries[-1].headers))
    cluster.writer.flush(1.0)
    cluster.start("scheduler")
    with pytest.raises(CorruptLogError, match="starts at seq"):
        run_scheduler(cluster)


def turns(cluster: Cluster, count: int = 20) -> None:
    for _ in range(count):
        for loop in list(cluster.owners.values()):
            loop.run_once(0.0)
        cluster.now_ms += 10


def tasks_of(cluster: Cluster) -> list[Any]:
    return [codec.decode(message.value) for message in cluster.tasks.poll(100, 0.0)]


def answer(cluster: Cluster, task: Any, **fields: Any) -> None:
    cluster._send("step-results", task.result_partition, "any", result_of(task, **fields))


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_inputs_that_caused_no_entry_may_be_deleted_once_they_were_read(how: str) -> None:
    cluster = Cluster()
    cluster.start_run("r", "a")
    cluster.settle()
    cluster.crash("scheduler")
    cluster.start("scheduler")
    turns(cluster)  # it told again what was told: the gate reads it, and has nothing to write
    if how == "killed":
        cluster.now_ms += int(owner.RECORD_POSITIONS_EVERY_S * 1000)
        turns(cluster)
        cluster.crash("gate")
    else:
        cluster.owners.pop("gate").close()
    partition = partition_of("acme", ACCOUNT_PARTITIONS)
    cluster.broker.delete_before("gate-requests", partition, cluster.broker.offsets("gate-requests", partition).end)
    cluster.start("gate")
    cluster.incarnation = cluster.register()  # its lease is over by now
    cluster.start_run("s", "a")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert runs["s"].status == "succeeded"


@pytest.mark.feature("D2")
@pytest.mark.parametrize("restart", [False, True])
def test_a_clock_that_was_ahead_does_not_hold_back_offs(restart: bool) -> None:
    cluster = Cluster()
    cluster.start_run("r", "a")
    turns(cluster)
    (task,) = tasks_of(cluster)
    cluster.skew_ms = 3_600_000
    answer(cluster, task, outcome="failed", error_class="E", error_message="m", retryable=True)
    turns(cluster, 2)
    cluster.skew_ms = 0
    if restart:
        cluster.crash("scheduler")
        cluster.start("scheduler")
    turns(cluster, 50)
    (again,) = tasks_of(cluster)
    assert again.attempt == 2


@pytest.mark.feature("P7")
def test_new_work_goes_only_to_executors_that_were_heard_of() -> None:
    cluster = Cluster()
    cluster.register(instance_id="ghost", host="x", boot_id="y", slots=100, functions=("step:a",))
    cluster.now_ms += 30 * 86_400_000
    cluster.crash("gate")
    cluster.start("gate")
    cluster.incarnation = cluster.register()
    cluster.start_run("r", "a")
    turns(cluster)
    assert [task.instance_id for task in tasks_of(cluster)] == ["ex-0"]


@pytest.mark.feature("P1")
def test_a_policy_that_cannot_be_read_denies_also_after_a_restart() -> None:
    cluster = Cluster()
    rule = {"name": "no", "when": "true", "then": "deny", "reason": "never"}
    document = {"policy": "p", "version": "1", "rules": [rule]}

    def publish(text: dict[str, Any]) -> None:
        row = PolicyPublished(policy_id="p", version="1", document=canonical.dumps(text), by="t", at_ms=0)
        cluster._send("policies", 0, "p", row)
        turns(cluster)

    publish(document)
    publish({**document, "of_a_later_version": 1})
    cluster.start_run("before", "a")
    turns(cluster)
    cluster.crash("gate")
    cluster.start("gate")
    cluster.start_run("after", "a")
    turns(cluster)
    publish({**document, "rules": [{**rule, "when": "false"}]})
    cluster.start_run("mended", "a")
    cluster.settle()
    _, runs = cluster.verified()
    assert {run_id: run.status for run_id, run in runs.items()} == {
        "before": "failed",
        "after": "failed",
        "mended": "succeeded",
    }
    assert "'p' cannot be read" in runs["after"].reason


@pytest.mark.feature("P2")
def test_costs_beyond_all_sums_stop_nobody() -> None:
    cluster = Cluster()
    cluster.start_run("r", "a", "b")
    for _ in range(2):
        turns(cluster)
        for task in tasks_of(cluster):
            answer(cluster, task, actual_micros=2**62, usage={"tokens": 2**62, "x" * 1000: 1})
    cluster.crash("gate")
    cluster.start("gate")
    turns(cluster)
    report, runs = cluster.verified()
    assert report.problems == []
    assert runs["r"].status == "succeeded"


@pytest.mark.parametrize("limit", ["MAX_ENTRY_BYTES", "MAX_TELLS_PER_ENTRY"])
def test_a_decision_that_cannot_be_written_is_buried_and_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    cluster = Cluster()
    cluster.start_run("good", "a")
    cluster.settle()
    monkeypatch.setattr(owned, limit, 0)
    monkeypatch.setattr(owned, "MANY_EVENTS", 0)
    cluster.start_run("bad", "a")
    turns(cluster)
    monkeypatch.undo()
    letters = [codec.decode(m.value) for m in cluster.broker.read("dead-letters", 0, 0, 1)]
    assert [letter.code for letter in letters] == ["internal_error"]
    cluster.start_run("next", "a")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run_id: run.status for run_id, run in runs.items()} == {"good": "succeeded", "next": "succeeded"}


@pytest.mark.parametrize("late", [False, True], ids=["result", "timer"])
def test_a_run_ends_if_the_entry_that_would_let_it_go_on_is_too_large(
    monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Buried, such a result left its run waiting for ever; such a timer ended every owner that came to it."""
    cluster = Cluster()
    cluster.start_run("r", "a", "b")
    turns(cluster)
    (task,) = tasks_of(cluster)
    monkeypatch.setattr(owned, "MAX_ENTRY_BYTES", 4_000)
    if late:
        huge = StepFailed(step_id="a", code="x", reason="y" * 5_000)
        monkeypatch.setattr(decide, "on_timer", lambda run, *_: [] if run.is_over else [huge])
        answer(cluster, task, outcome="failed", error_class="Busy", error_message="no")
        turns(cluster)
        cluster.now_ms += 2_000
    else:
        answer(cluster, task, output=canonical.dumps("x" * 5_000))
    turns(cluster)
    cluster.start_run("next", "a")
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert {name: (run.status, run.code) for name, run in runs.items()} == {
        "r": ("failed", "internal_error"),
        "next": ("succeeded", ""),
    }
    assert "would have" in runs["r"].reason
    assert cluster.letters() == []


def test_an_input_of_a_newer_version_is_read_with_the_schema_that_was_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster()
    cluster.start_run("r", "a")
    (_, message), *_ = [
        (p, m)
        for p in range(2)
        for m in cluster.broker.read("run-commands", p, 0, cluster.broker.offsets("run-commands", p).end)
    ]
    written = avro._by_header[(message.value or b"")[: avro.HEADER_LENGTH]]
    schema = json.loads(written.text)
    schema["fields"].append({"name": "of_a_later_version", "type": "string", "default": ""})
    cluster.writer.send(Record("schemas", 0, b"any", json.dumps(schema).encode()))
    newer = avro._Schema(json.dumps(schema))
    body = (message.value or b"")[avro.HEADER_LENGTH :] + b"\0"
    command = Record("run-commands", message.partition, b"newer", newer.header + body)
    cluster.owners["scheduler"].run_once(0.0)
    cluster.writer.send(command)
    cluster.writer.flush(1.0)
    turns(cluster)
    assert cluster.broker.offsets("dead-letters", 0).end == 0
    avro._by_header.pop(newer.header, None)


@pytest.mark.feature("P1")
def test_a_policy_that_a_newer_version_published_is_in_force_after_a_restart() -> None:
    cluster = Cluster()
    cluster.require_approval()
    (message,) = cluster.broker.read("policies", 0, 0, 1)
    schema = json.loads(avro._by_header[(message.value or b"")[: avro.HEADER_LENGTH]].text)
    schema["fields"].append({"name": "of_a_later_version", "type": "string", "default": ""})
    newer = avro._Schema(json.dumps(schema))
    cluster.writer.send(Record("schemas", 0, b"newer", json.dumps(schema).encode()))
    value = newer.header + (message.value or b"")[avro.HEADER_LENGTH :] + b"\0"
    cluster.writer.send(Record("policies", 0, message.key, value))
    cluster.writer.flush(1.0)
    cluster.broker.compact("policies")
    cluster.crash("gate")
    cluster.start("gate")
    cluster.start_run("r", "a")
    cluster.settle()
    avro._by_header.pop(newer.header, None)
    (run,) = cluster.verified()[1].values()
    assert run.status == "waiting"


def dies_after_announcing(name: str) -> None:
    if name == "owner.after-announce":
        raise Crash


def test_a_partition_that_is_lost_and_comes_back_in_one_poll_loses_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is not waited for can turn out void when the messages after its input are here already."""
    cluster = Cluster()
    cluster.settle()
    cluster.require_approval()
    cluster.settle()
    first, second = [name for name in RUNS if partition_of(name, RUN_PARTITIONS) == 0][:2]
    scheduler, gate = cluster.owners["scheduler"], cluster.owners["gate"]
    cluster.start_run(first, "a")
    cluster.start_run(second, "a")
    scheduler.run_once(0.0)
    gate.run_once(0.0)
    assert cluster.broker.offsets("gate-decisions", 0).end == 2  # a question about each
    with monkeypatch.context() as patched:
        patched.setattr(owner, "MAX_BATCH", 1)
        scheduler.run_once(0.0)  # takes one of them, and waits for no acknowledgement: nobody is told of a question

    # Its session has ended. Another one announces itself and dies, and its session ends too.
    cluster.broker.expire("tidegate-scheduler", "scheduler-0")
    other = cluster.start("scheduler", "scheduler-1")
    with monkeypatch.context() as patched:
        patched.setattr(owner, "failpoint", dies_after_announcing)
        with pytest.raises(Crash):
            run_scheduler(cluster)
    assert cluster.owners["scheduler"] is other
    cluster.crash("scheduler")
    cluster.broker.expire("tidegate-scheduler", "scheduler-1")
    cluster.owners["scheduler"] = scheduler  # it wakes, and has everything back at once
    cluster.settle()

    report, runs = cluster.verified()
    assert report.problems == []
    assert {name: len(runs[name].open_approvals()) for name in (first, second)} == {first: 1, second: 1}


def test_a_log_that_is_made_again_while_partitions_are_taken_over_one_by_one_is_refused() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.crash("scheduler")
    scheduler = cluster.start("scheduler")
    scheduler.run_once(0.0)
    assert len(scheduler.owned) == 1 < RUN_PARTITIONS
    cluster.now_ms += 60_000  # the first one took a minute to be restored
    cluster.broker.delete_topic("run-events")
    cluster.broker.create_topic("run-events", RUN_PARTITIONS)
    with pytest.raises(RefusedToStartError):
        scheduler.run_once(0.0)
