"""Processes that are killed, frozen or told to go while a hundred runs are under way.

Every process has a companion that can take over its work: two schedulers, two gates, two executors.
"""

from __future__ import annotations

import os
import re
import signal
import uuid
from collections.abc import Iterator

import pytest

from support.load import STEPS, Load, owners
from support.stack import WholeStack, assert_whole, eventually
from tidegate.audit.money import AttemptName

SERVICES = ("scheduler", "gate", "executor")
PROCESSES = {"scheduler": "scheduler-0", "gate": "gate-0", "executor": "executor-default-0"}
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
        env={
            "TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS),
            # Often, so that restarts begin with snapshots.
            "TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "150",
            "TIDEGATE_CHECKPOINT_EVERY_S": "2",
        },
    ) as stack:
        yield stack


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
