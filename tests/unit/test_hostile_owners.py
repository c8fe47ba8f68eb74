"""Scheduler and gate under the real owner loop, fed with what nobody of ours would write: they consume it all and live on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import hostile
from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, TOPICS, Cluster
from support.hostile import Known, fuzzed
from support.pure import chain
from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.entry import Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import (
    Authorise,
    Call,
    GateDecision,
    GateRequest,
    Instance,
    Lost,
    OpenRun,
    RunCommand,
    Void,
)
from tidegate.eventlog.interface import Record

MAILBOXES = ("run-commands", "gate-requests", "gate-decisions", "step-results")
RUNS = ("r0", "r1", "r2", "ghost")
DEFINITION = canonical.dumps(chain("a", "b"))
KNOWN = Known(
    {
        "run_id": RUNS,
        "account": ("acme", "other/team"),
        **dict.fromkeys(
            ("GateRequest.source", "GateDecision.source", "StepTask.source"),
            (Position(0, 1, 0), Position(1, 3, 0), Position(0, 40, 0)),
        ),
        "source": ("run-requests:0:0",),
        "step_id": ("a", "b", "c"),
        "attempt": (1, 1, 2),
        "instance_id": ("ex-0",),
        "incarnation": (0,),
        "RunCommand.type": ("start", "cancel", "approve", "reject", "refuse"),
        "command_id": ("one", "two"),
        "content_hash": ("h",),
        "definition": (canonical.dumps(chain("a", "b")),),
        "original": (b"{}",),
        "outcome": ("succeeded", "failed", "timed_out", "died", "cancelled", "released", "busy"),
        "kind": ("step", "agent", "tool"),
        "function": ("a", "b"),
        "queue": ("default", "elsewhere"),
        "output": ("1", '{"ok":true}'),
        "arguments": ("1", "{}"),
        "arguments_hash": (canonical.digest("1"),),
        "input": ("1",),
        "tags": ({},),
        "workflow": ("chain@1",),
        "timeout_ms": (100,),
        "service": ("executor",),
        "Instance.state": ("ready", "ready", "draining", "gone"),
        "functions": ((), ("step:a", "step:b")),
        "budget_micros": (None, 0, 5, 100),
        **dict.fromkeys(("actual_micros", "reserve_micros", "reserved_micros"), (0, 5, 2**53)),
        **dict.fromkeys(("rule", "policy", "reason", "by", "code", "idempotency_key", "definition_hash"), ("x",)),
    }
)
LIVES = st.sampled_from(("ex-0", "ghost", "", "x" * 300))


@st.composite
def messages(draw: st.DrawFn) -> Record:
    topic = draw(st.sampled_from((*MAILBOXES, "instances", "policies")))
    value = draw(hostile.values(topic, KNOWN))
    key = draw(LIVES).encode() if topic == "instances" else draw(hostile.keys())
    partition = draw(st.integers(0, TOPICS[topic] - 1))
    return Record(topic, partition, key, value, draw(hostile.headers()))


@given(st.lists(messages(), min_size=1, max_size=8), st.integers(0, 6))
@fuzzed(200)
def test_owners_consume_whatever_lies_there_and_start_again(records: list[Record], turns: int) -> None:
    cluster = Cluster()
    for number in range(3):
        cluster.start_run(f"r{number}", account=("acme", "other/team")[number % 2])
    for _ in range(turns):
        work(cluster)
    for record in records:
        cluster.writer.send(record)
        cluster.writer.flush(1.0)
        work(cluster)
    for _ in range(30):
        work(cluster)
    assert_consumed(cluster)
    assert_accounted(cluster, records)
    for service in ("scheduler", "gate"):
        cluster.crash(service)
        cluster.start(service)
    for _ in range(20):
        work(cluster)
    assert_consumed(cluster)
    report, _ = cluster.verified()
    assert report.problems == []


def work(cluster: Cluster) -> None:
    cluster.execute()
    for loop in cluster.owners.values():
        loop.run_once(0.0)
    cluster.now_ms += 50


def assert_consumed(cluster: Cluster) -> None:
    for service, count in (("scheduler", RUN_PARTITIONS), ("gate", ACCOUNT_PARTITIONS)):
        loop = cluster.owners[service]
        assert set(loop.owned) == set(range(count)), f"{service} owns {set(loop.owned)}"
        for partition, part in loop.owned.items():
            for topic in loop._input_topics:
                end = cluster.broker.offsets(topic, partition).end
                assert part.inputs[topic] == end, f"{topic}-{partition} is read up to {part.inputs[topic]} of {end}"


def assert_accounted(cluster: Cluster, records: list[Record]) -> None:
    """Everything in a mailbox that is no record of it is a dead letter."""
    letters = {(letter.topic, letter.partition, letter.offset) for letter in cluster.letters()}
    for topic in MAILBOXES:
        for partition in range(TOPICS[topic]):
            start, end = cluster.broker.offsets(topic, partition)
            for message in cluster.broker.read(topic, partition, start, end):
                if message.value is not None and not hostile.is_record_of(topic, message.value):
                    assert (topic, partition, message.offset) in letters, (
                        f"{topic}-{partition}@{message.offset} is gone"
                    )


# --- single cases: each of them once stopped an owner for good, or let something happen twice ------------------------


def send(cluster: Cluster, topic: str, record: Any, partition: int = 0, key: bytes = b"k") -> tuple[str, int, int]:
    """Write a record; returns where it lies."""
    offsets: list[int] = []
    cluster.writer.send(Record(topic, partition, key, codec.encode(record)), offsets.append)
    cluster.writer.flush(1.0)
    return topic, partition, offsets[0]


def codes(cluster: Cluster) -> dict[tuple[str, int, int], str]:
    return {(letter.topic, letter.partition, letter.offset): letter.code for letter in cluster.letters()}


def restart(cluster: Cluster) -> None:
    for service in ("scheduler", "gate"):
        cluster.crash(service)
        cluster.start(service)
    cluster.settle()


def assert_works(cluster: Cluster) -> None:
    """Every partition of both logs still gets a run to its end."""
    probes = {f"probe-{number}": f"acme{number}" for number in range(8)}
    for run_id, account in probes.items():
        cluster.start_run(run_id, account=account)
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert {runs[run_id].status for run_id in probes} == {"succeeded"}
    assert {partition_of(run_id, RUN_PARTITIONS) for run_id in probes} == set(range(RUN_PARTITIONS))
    assert {partition_of(root, ACCOUNT_PARTITIONS) for root in probes.values()} == set(range(ACCOUNT_PARTITIONS))


def command(run_id: str, **fields: Any) -> RunCommand:
    wanted = {"command_id": "c", "type": "cancel", "source": "run-requests:0:7", "content_hash": "h", "original": b"{}"}
    return RunCommand(run_id=run_id, **(wanted | fields))


@pytest.mark.feature("G1")
@pytest.mark.parametrize(
    "fields",
    [
        {"source": ""},
        {"source": "a:b:c"},
        {"source": "run-requests:0:99999999999999999999999"},
        {"account": "//"},
        {"command_id": "c" * 1000},
        {"budget_micros": -1},
        {"original": b"x" * 300_000},
    ],
    ids=lambda fields: next(iter(fields)) + "=" + str(next(iter(fields.values())))[:20],
)
def test_a_command_that_admission_would_not_write_is_a_dead_letter(fields: dict[str, Any]) -> None:
    """A source that names no place once made a refusal that could not be told, at no start ever again."""
    cluster = Cluster()
    at = send(cluster, "run-commands", command("r0", **fields), partition_of("r0", RUN_PARTITIONS))
    cluster.settle()
    assert codes(cluster)[at] == "malformed"
    restart(cluster)
    assert_works(cluster)


@pytest.mark.parametrize("run_id", ["", "a:b", "r" * 10_000_000])
def test_no_run_gets_an_id_that_a_record_has_no_room_for(run_id: str) -> None:
    cluster = Cluster()
    for topic in TOPICS:
        cluster.broker._topic(topic).config["max.message.bytes"] = str(2**24)
    at = send(cluster, "run-commands", command(run_id), partition_of(run_id, RUN_PARTITIONS))
    cluster.settle()
    assert codes(cluster)[at] == "malformed"
    assert_works(cluster)


IMPOSSIBLE = (
    Position(0, 2**63 - 1, 0),
    Position(0, 2**51, 0),
    Position(0, -1, 0),
    Position(-1, 0, 0),
    Position(2**31, 0, 0),
    Position(0, 0, 4096),
    Position(0, 0, -(2**63)),
)


@pytest.mark.feature("D1")
@pytest.mark.parametrize("position", IMPOSSIBLE)
def test_a_position_that_cannot_be_leaves_no_mark(position: Position) -> None:
    """A mark that does not fit into an entry once refused every later entry of the partition."""
    cluster = Cluster()
    items = (Void(step_id="a", attempt=1),)
    lost = (Lost(step_id="a", attempt=1, instance_id="x", incarnation=0, reason=""),)
    places = [
        send(cluster, "gate-requests", GateRequest(run_id="r", account=root, source=position, items=items), number)
        for number, root in enumerate(roots())
    ]
    places += [
        send(cluster, "gate-decisions", GateDecision(run_id="r0", source=position, items=lost), number)
        for number in range(RUN_PARTITIONS)
    ]
    cluster.settle()
    assert {codes(cluster)[at] for at in places} == {"malformed"}
    assert all(part.marks == {} for loop in cluster.owners.values() for part in loop.owned.values())
    restart(cluster)
    assert_works(cluster)


def roots() -> list[str]:
    """Return an account of each ledger partition, in their order."""
    names = [f"acme{number}" for number in range(50)]
    return [
        next(name for name in names if partition_of(name, ACCOUNT_PARTITIONS) == number)
        for number in range(ACCOUNT_PARTITIONS)
    ]


@pytest.mark.feature("D1")
def test_a_record_of_another_kind_leaves_no_mark() -> None:
    cluster = Cluster()
    stray = GateDecision(run_id="r0", source=Position(0, 10**6, 0), items=())
    at = send(cluster, "gate-requests", stray)
    cluster.settle()
    assert codes(cluster)[at] == "malformed"
    assert cluster.owners["gate"].owned[0].marks == {}
    assert_works(cluster)


@pytest.mark.feature("D1")
def test_an_attempt_that_is_asked_for_twice_is_placed_once() -> None:
    cluster = Cluster()
    root = roots()[0]
    call = Call(
        kind="step", function="a", queue="default", arguments="1", timeout_ms=1, reserve_micros=3, idempotent=True
    )
    ask = Authorise(step_id="a", attempt=1, call=call)
    opened = OpenRun(budget_micros=None, workflow="w@1", tags={})
    for offset, items in enumerate([(opened, ask, ask), (ask,)]):
        send(
            cluster,
            "gate-requests",
            GateRequest(run_id="r", account=root, source=Position(0, offset, 0), items=items),
        )
        cluster.owners["gate"].run_once(0.0)
        cluster.owners["gate"].run_once(0.0)
    assert cluster.ledger_state(0).runs["r"].reserved_micros == 3
    assert cluster.broker.offsets("step-tasks.default", 0).end == 1


def executor_row(**fields: Any) -> Instance:
    row: dict[str, Any] = {
        "instance_id": "ghost",
        "service": "executor",
        "incarnation": -1,
        "state": "ready",
        "host": "",
        "boot_id": "",
        "pid": 0,
        "pid_started": 0.0,
        "started_ms": 0,
        "at_ms": 1_000_000,
        "queue": "default",
        "slots": 100,
        "functions": ("step:a", "step:b", "step:c"),
    }
    return Instance(**(row | fields))


@pytest.mark.parametrize("partition", [-1, 1, 2**40])
def test_no_task_goes_to_an_executor_that_listens_nowhere(partition: int) -> None:
    """A task that cannot be written once stopped every gate that found its placement in the ledger."""
    cluster = Cluster()
    cluster.settle()
    send(cluster, "instances", executor_row(task_partition=partition), key=b"ghost")
    assert_works(cluster)
    restart(cluster)
