"""Registry: what counts as proof of death, when a lease ends, what a heartbeat says. No broker here."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tidegate import codec
from tidegate.domain.messages import Instance
from tidegate.eventlog.interface import Message
from tidegate.registry.lease import Lease
from tidegate.registry.predecessors import INCARNATION_HEADER, examine, last_records
from tidegate.registry.process import (
    Judgement,
    ProcessIdentity,
    Seen,
    Verdict,
    boottime_s,
    judge,
    look_at,
    this_process,
)

ME = ProcessIdentity(host="box", boot_id="boot-1", pid=700, pid_started=90.0)


def instance(**changes: object) -> Instance:
    fields: dict[str, object] = {
        "instance_id": "executor-1",
        "service": "executor",
        "incarnation": -1,
        "state": "ready",
        "host": "box",
        "boot_id": "boot-1",
        "pid": 500,
        "pid_started": 12.5,
        "started_ms": 1,
        "at_ms": 2,
    }
    return Instance(**{**fields, **changes})  # type: ignore[arg-type]


# --- proof of death ---


@pytest.mark.parametrize(
    ("older", "seen", "verdict"),
    [
        (instance(), Seen(None), Verdict.DEAD),  # that pid is gone
        (instance(), Seen(80.0), Verdict.DEAD),  # that pid is another process now
        (instance(), Seen(12.5), Verdict.ALIVE),
        (instance(), None, Verdict.UNKNOWN),  # not to be seen
        (instance(host="elsewhere"), Seen(None), Verdict.UNKNOWN),  # a pid means nothing on another machine
        (instance(boot_id="boot-0"), Seen(None), Verdict.UNKNOWN),  # host names are given twice
        (instance(host="box/pid:[4026532345]"), Seen(None), Verdict.UNKNOWN),  # nor in another container
        (instance(pid=700, pid_started=90.0), Seen(90.0), Verdict.UNKNOWN),  # ourselves
    ],
)
def test_only_what_can_be_seen_is_proof(older, seen, verdict):
    assert judge(older, ME, lambda _pid: seen).verdict is verdict


def test_a_pod_of_a_stateful_set_is_given_to_one_process_at_a_time():
    me = ME._replace(host="pod:agents/executor-1")
    other_node = instance(host="pod:agents/executor-1", boot_id="boot-9")
    assert judge(other_node, me, lambda _pid: None).verdict is Verdict.DEAD
    assert judge(instance(host="pod:agents/executor-2"), me, lambda _pid: Seen(None)).verdict is Verdict.UNKNOWN
    same_container = instance(host="pod:agents/executor-1")
    assert judge(same_container, me, lambda _pid: Seen(12.5)).verdict is Verdict.ALIVE


def test_evidence_is_readable():
    evidence = judge(instance(), ME, lambda _pid: Seen(80.0)).evidence
    assert evidence == "pid 500 started at 80.00, not 12.50 (host box, boot boot-1)"


def test_look_at_sees_a_life_from_birth_to_zombie_to_nothing():
    me = this_process()
    assert look_at(me.pid) == Seen(me.pid_started)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        born = look_at(child.pid)
        assert born is not None
        assert born.started is not None
        assert born.started >= me.pid_started
        child.send_signal(signal.SIGSTOP)
        assert look_at(child.pid) == born  # stopped is not dead
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert look_at(child.pid) == Seen(None)  # a zombie runs no more
        child.wait()
        assert look_at(child.pid) == Seen(None)


def test_identity_is_the_same_each_time_and_counts_from_boot():
    assert this_process() == this_process()
    assert 0 < this_process().pid_started <= boottime_s()


def test_the_pod_identity_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TIDEGATE_STATEFUL_POD", "agents/executor-1")
    assert this_process().host == "pod:agents/executor-1"


# --- who was here before ---


def message(offset: int, record: Instance, key: str = "executor-1", header: bool = True) -> Message:
    headers = ((INCARNATION_HEADER, str(record.incarnation).encode()),) if header else ()
    return Message("instances", 0, offset, key.encode(), codec.encode(record), headers, 0)


def test_the_last_record_of_each_incarnation_counts():
    messages = [
        message(3, instance(pid=1)),
        message(4, instance(incarnation=3, pid=1, free_slots=1)),
        message(5, instance(instance_id="other", pid=9), key="other"),
        message(6, instance(pid=2), header=False),
        message(7, instance(incarnation=6, pid=2, state="gone"), header=False),
        message(8, instance(incarnation=3, pid=1, free_slots=2)),
        Message("instances", 0, 9, b"executor-1", b"\xc3\x01 not a record", ((INCARNATION_HEADER, b"-1"),), 0),
        Message("instances", 0, 10, b"executor-1", None, (), 0),
    ]
    found = last_records(messages, "executor-1")
    assert {incarnation: (record.pid, record.state, record.free_slots) for incarnation, record in found.items()} == {
        3: (1, "ready", 2),
        6: (2, "gone", 0),
    }


def test_ended_are_those_proven_dead_that_said_no_farewell():
    records = {3: instance(pid=1), 6: instance(pid=2, state="gone"), 9: instance(pid=3), 12: instance(pid=4)}
    verdicts = {1: Verdict.DEAD, 2: Verdict.DEAD, 3: Verdict.UNKNOWN, 4: Verdict.DEAD}
    found = examine(records, ME, lambda older, _me: Judgement(verdicts[older.pid], f"evidence {older.pid}"))
    assert [(ended.incarnation, ended.evidence) for ended in found.ended] == [(3, "evidence 1"), (12, "evidence 4")]
    assert not found.alive


def test_one_that_is_alive_is_reported():
    found = examine({3: instance()}, ME, lambda _older, _me: Judgement(Verdict.ALIVE, "pid 500 is running"))
    assert found.alive == "pid 500 is running"


# --- the lease ---


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lapses():
    return []


@pytest.fixture
def lease(clock, lapses):
    lease = Lease(10.0, lapses.append, clock)
    assert lease.acknowledged(100.0)
    return lease


def test_a_lease_runs_from_the_sending_not_from_the_acknowledgement(lease, clock):
    clock.now = 105.0
    assert lease.acknowledged(101.0)
    assert lease.until_s == 111.0
    clock.now = 110.9
    assert lease.held()
    clock.now = 111.0
    assert not lease.held()


@pytest.mark.feature("P7")
def test_an_acknowledgement_read_too_late_extends_nothing(lease, clock, lapses):
    clock.now = 110.0  # stopped meanwhile; the acknowledgement of 109.0 lies in the buffer
    assert not lease.acknowledged(109.0)
    assert lapses == ["no heartbeat was acknowledged in time (lease of 10 s)"]
    clock.now = 105.0
    assert not lease.held()  # final, whatever the clock says
    assert not lease.acknowledged(104.0)
    assert len(lapses) == 1


def test_acknowledgements_in_disorder_never_shorten_it(lease, clock):
    clock.now = 104.0
    lease.acknowledged(103.0)
    lease.acknowledged(102.0)
    assert lease.until_s == 113.0


def test_even_the_first_acknowledgement_can_be_too_late(clock, lapses):
    lease = Lease(10.0, lapses.append, clock)
    clock.now = 110.0
    assert not lease.acknowledged(100.0)
    assert lapses == ["the registration was acknowledged too late (lease of 10 s)"]


def test_without_length_it_never_lapses(clock):
    lease = Lease(None, None, clock)
    clock.now = 1e9
    assert lease.held()
    assert lease.acknowledged(0.0)


def test_boottime_runs_on_while_a_process_is_stopped():
    code = "from tidegate.registry import boottime_s as b; a = b(); print(flush=True); input(); print(b() - a)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        child.send_signal(signal.SIGCONT)
        out, _ = child.communicate(b"\n", timeout=20)
    assert float(out) >= 1.0
