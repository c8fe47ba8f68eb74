"""Processes that are killed, frozen or told to go while a hundred runs are under way, and a broker that dies.

Every process has a companion that can take over its work: two schedulers, two gates, two executors.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from support.money import AttemptName
from support.stack import (
    LEDGER,
    RUNS,
    Ends,
    Truth,
    WholeStack,
    assert_tells_follow_from_the_logs,
    assert_whole,
    eventually,
    valid_entries,
)
from tidegate import codec, failpoints
from tidegate.domain.entry import OwnerAnnounced
from tidegate.domain.run_events import AttemptEnded

RUN_COUNT = 100
STEPS = ("first", "slow", "shaky", "last")
BUDGET_MICROS = 1_000
SERVICES = ("scheduler", "gate", "executor")
PROCESSES = {"scheduler": "scheduler-0", "gate": "gate-0", "executor": "executor-default-0"}
LOGS = {"scheduler": RUNS, "gate": LEDGER}
EXIT_LEASE_LAPSED = 70
# The shortest session that a broker with default settings accepts.
SESSION_TIMEOUT_MS = 6_000


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """A stack with two of everything."""
    with WholeStack(
        tmp_path_factory.mktemp("crashes"),
        executors=2,
        slots=12,
        instances={"scheduler": 2, "gate": 2},
        env={"TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS)},
    ) as stack:
        yield stack


class Load:
    """Runs that all do the same work, spread over all partitions of both logs."""

    def __init__(self, stack: WholeStack) -> None:
        """Ask for all of them at once."""
        self._stack = stack
        self._effects_before = len(stack.effects())
        self.began_at = stack.ends()
        name = uuid.uuid4().hex[:8]
        self.runs = [f"busy-{name}-{number}" for number in range(RUN_COUNT)]
        common = {"workflow": "busy", "input": 1, "budget_micros": BUDGET_MICROS}
        stack.requests(
            [{**common, "run_id": run_id, "account": f"org{n % 16}/app"} for n, run_id in enumerate(self.runs)]
        )

    def until_effects(self, per_run: float) -> None:
        """Wait until the functions have had so many effects on average: a whole run has one per step."""
        count = int(per_run * RUN_COUNT)
        eventually(lambda: len(self._stack.effects()) - self._effects_before >= count, f"{count} effects")

    def finish(self, *, may_restart: Iterable[str] = ()) -> Truth:
        """Wait for the end of all runs, then check them and everything else.

        may_restart: processes that the design allows to have ended and come back.
        """
        self.until_effects(len(STEPS))
        self._stack.expect_any_pid(may_restart)
        truth = assert_whole(self._stack)
        assert_tells_follow_from_the_logs(self._stack, self.began_at)
        ended = [truth.runs[run_id] for run_id in self.runs]
        assert {(run.status, run.output) for run in ended} == {("succeeded", "4")}
        assert len({run.fingerprint for run in ended}) == 1, "the same work came to something else"
        keys = {(line.run_id, line.step_id): line.key for line in truth.entered}
        effects = self._stack.effects()
        missing = [(run_id, step) for run_id in self.runs for step in STEPS if keys[run_id, step] not in effects]
        assert not missing, f"runs that succeeded without the effect of a step: {missing}"
        return truth

    def lost(self) -> dict[AttemptName, str]:
        """Return the attempts whose outcome the runs never learned, with the reason that they give."""
        runs = set(self.runs)
        return {
            AttemptName(entry.subject, event.step_id, event.attempt): event.error_message
            for entry in valid_entries(self._stack.log(RUNS)).values()
            for event in entry.events
            if isinstance(event, AttemptEnded) and event.outcome == "lost" and entry.subject in runs
        }

    def assert_was_in_the_middle(self, ends: Ends) -> None:
        """Show by the log that many runs were begun and not over when it ended at `ends`."""
        before: set[str] = set()
        after: set[str] = set()
        for (partition, offset), entry in valid_entries(self._stack.log(RUNS)).items():
            (before if offset < ends[RUNS, partition] else after).add(entry.subject)
        straddling = before & after & set(self.runs)
        assert len(straddling) >= RUN_COUNT // 10, f"{len(before)} runs were begun, {len(after)} went on"


def owners(stack: WholeStack, service: str, since: Ends | None = None) -> dict[int, str]:
    """Return who announced itself last for each partition of a service's log, of those announced (since then)."""
    found = {}
    for messages in stack.log(LOGS[service], since):
        for message in messages:
            record = codec.decode(message.value)
            if isinstance(record, OwnerAnnounced) and not record.repeat:
                found[message.partition] = record.instance_id
    return found


# --- killed ---------------------------------------------------------------


@pytest.mark.feature("D1")
@pytest.mark.parametrize("service", SERVICES)
def test_killed_while_a_hundred_runs_are_going(stack: WholeStack, service: str) -> None:
    load = Load(stack)
    moments = []
    for effects_per_run in (1.0, 2.5):
        load.until_effects(effects_per_run)
        stack.kill(PROCESSES[service])
        moments.append(stack.ends())
    load.finish()
    for ends in moments:
        load.assert_was_in_the_middle(ends)
    if service == "executor":
        # Its successor proves that it is dead when it registers; on a busy machine its lease may run out before.
        reasons = set(load.lost().values())
        assert reasons
        assert all(re.match(r"pid \d+ is gone|no heartbeat for \d+ ms", reason) for reason in reasons), reasons
    else:
        assert PROCESSES[service] in owners(stack, service, moments[0]).values()
        assert not load.lost(), "work was repeated although its executor lived"


@pytest.mark.feature("D1")
def test_all_killed_at_the_same_time(stack: WholeStack) -> None:
    load = Load(stack)
    load.until_effects(1.0)
    for name in stack.pids:
        stack.stack.kill(name)
    ends = stack.ends()
    for name in list(stack.pids):
        stack.expect_other_pid(name)
    load.finish()
    load.assert_was_in_the_middle(ends)


@pytest.mark.feature("D1", "P4", "T3")
@pytest.mark.parametrize("answer", ["approve", "reject"])
def test_what_must_not_be_repeated_asks_a_human_when_its_outcome_is_unknown(stack: WholeStack, answer: str) -> None:
    run_id = stack.client.start("pay_once", 50.0, run_id=f"pay-{uuid.uuid4().hex[:8]}", budget_micros=100)
    (entered,) = eventually(lambda: stack.entered(run_id), "the function to be entered")
    eventually(lambda: stack.paid(run_id), "the payment")
    stack.kill(entered.instance_id)
    run = stack.wait(run_id)
    assert run.status == "waiting"
    (asked,) = run.approvals
    assert (asked.step_id, asked.function, asked.why) == ("it", "pay_once", "outcome_unknown")
    assert "may already have had its effect" in asked.reason
    getattr(stack.client, answer)(run_id, reason="the bank says so")
    run = stack.wait(run_id)
    assert (run.status, run.code) == {"approve": ("succeeded", ""), "reject": ("failed", "rejected")}[answer]
    assert stack.paid(run_id) == {"approve": [1, 2], "reject": [1]}[answer]
    assert_whole(stack)


# Where a crash hurts most: what was logged is not told yet, what was admitted and what was done are not acknowledged. Every
# life of a process ends there again.
EDGES = {
    "scheduler-0": "owner.after-log=kill@120,admission.before-commit=kill@2",
    "gate-0": "owner.after-log=kill@100",
    "executor-default-0": "executor.before-result-ack=kill@150",
}


@pytest.mark.feature("D1", "T3")
def test_killed_again_and_again_at_the_edges_of_the_protocol(tmp_path: Path) -> None:
    """One process of each service, as by default: nobody else can go on while it is away."""
    armed = {name: {failpoints.ENVIRONMENT_VARIABLE: edges} for name, edges in EDGES.items()}
    with WholeStack(tmp_path, slots=24, process_env=armed) as stack:
        load = Load(stack)
        load.finish(may_restart=EDGES)
        for status in stack.stack.status():
            assert status.restarts, f"{status.name} never came to its edge"
            assert status.last_exit == -signal.SIGKILL


# --- frozen ---------------------------------------------------------------


@pytest.mark.feature("D1")
@pytest.mark.parametrize("service", ["scheduler", "gate"])
def test_an_owner_that_wakes_after_another_took_over_adds_nothing(stack: WholeStack, service: str) -> None:
    """It is frozen early, with much to do at hand: when it wakes it goes on with that, not knowing what happened."""
    name = PROCESSES[service]
    load = Load(stack)
    load.until_effects(0.3)
    its_own = {partition for partition, owner in owners(stack, service).items() if owner == name}
    assert its_own
    pid = stack.freeze(name)
    try:
        frozen = stack.ends()
        eventually(lambda: its_own <= owners(stack, service, frozen).keys(), "the other to take over")
        assert name not in owners(stack, service, frozen).values()
        woken = stack.ends()
    finally:
        os.kill(pid, signal.SIGCONT)
    load.finish(may_restart=[name])
    load.assert_was_in_the_middle(frozen)
    load.assert_was_in_the_middle(woken)


@pytest.mark.feature("D1")
def test_an_executor_that_wakes_after_its_lease_changes_nothing(stack: WholeStack) -> None:
    name = PROCESSES["executor"]
    load = Load(stack)
    load.until_effects(1.0)
    pid = stack.freeze(name)
    try:
        load.until_effects(len(STEPS))
    finally:
        os.kill(pid, signal.SIGCONT)
    stack.expect_other_pid(name)
    assert stack.last_exit(name) == EXIT_LEASE_LAPSED
    load.finish()
    assert load.lost(), "it held nothing when it was frozen"


# --- told to go ---------------------------------------------------------------


@pytest.mark.feature("P7")
def test_told_to_go_one_after_the_other_while_a_hundred_runs_are_going(stack: WholeStack) -> None:
    """As in a rolling restart: each ends with 0 when it has finished or handed back what it began."""
    long_ones = [stack.client.start("wait_here", 6.0, run_id=f"long-{uuid.uuid4().hex[:8]}") for _ in range(4)]
    for run_id in long_ones:
        eventually(lambda run_id=run_id: stack.entered(run_id), f"{run_id} to be entered")
    load = Load(stack)
    moments = []
    for effects_per_run, name in zip((0.5, 1.25, 2.0), PROCESSES.values(), strict=True):
        load.until_effects(effects_per_run)
        os.kill(stack.pids[name], signal.SIGTERM)
        moments.append(stack.ends())
        stack.expect_other_pid(name)
        assert stack.last_exit(name) == 0
    truth = load.finish()
    for ends in moments:
        load.assert_was_in_the_middle(ends)
    entered = {AttemptName(line.run_id, line.step_id, line.attempt) for line in truth.entered}
    assert not entered & load.lost().keys(), "it left without a word of what it had begun"
    for run_id in long_ones:
        assert truth.runs[run_id].status == "succeeded"
        assert [line.attempt for line in stack.entered(run_id)] == [1]


# --- without a broker ---------------------------------------------------------------


@pytest.mark.feature("D1")
def test_the_broker_killed_while_a_hundred_runs_are_going(stack: WholeStack) -> None:
    """If it is away for longer than leases and deadlines, processes may end and come back; nothing else changes."""
    assert stack.stack.kafka is not None
    load = Load(stack)
    load.until_effects(1.0)
    ends = stack.ends()
    stack.stack.kafka.kill()
    stack.stack.kafka.restart()
    load.finish(may_restart=list(stack.pids))
    load.assert_was_in_the_middle(ends)
