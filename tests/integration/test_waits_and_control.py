"""Waits, answers, events, pauses and cancels on a whole system, with the scheduler killed while runs wait."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from support.stack import WAIT_S, WholeStack, assert_whole, eventually
from tidegate.cli.__main__ import app
from tidegate.domain import states
from tidegate.domain.identity import child_run_id
from tidegate.domain.run import RunState, apply
from tidegate.sdk.client import Run

SLEEP_S = 4.0
# So that runs that wait are written down and leave the memory at once.
RESTING = {
    "TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "5",
    "TIDEGATE_CHECKPOINT_EVERY_S": "0.3",
    "TIDEGATE_CHECKPOINT_REST_AFTER_S": "0",
}


def then_one(kind: str, **settings: Any) -> dict[str, Any]:
    """Return a workflow that waits and then runs the step `one` of the fault app."""
    return {
        "name": f"waits_{kind}",
        "version": "1",
        "nodes": {"w": {"kind": kind, "wait": settings}, "one": {"kind": "step", "function": "one"}},
        "edges": [["w", "one"]],
        "functions": {"one": {"kind": "step"}},
    }


RETRIES = {"kind": "step", "max_attempts": 3, "backoff_ms": 600_000, "backoff_max_ms": 600_000}
ASKS = then_one("ask", prompt="How many?", schema={"type": "integer", "maximum": 9})
DEFINITIONS = [
    then_one("sleep", seconds=SLEEP_S),
    then_one("wait_event", event="paid", key="${ string(input) }"),
    then_one("wait_until", at="2090-01-01T00:00:00Z"),
    ASKS,
    {
        "name": "waits_to_retry",
        "version": "1",
        "nodes": {"w": {"kind": "step", "function": "fail"}},
        "edges": [],
        "functions": {"fail": RETRIES},
    },
    {
        "name": "waits_tour",
        "version": "1",
        "nodes": {
            "w": {"kind": "ask", "wait": {"prompt": "Once more?", "choices": ["yes", "no"]}},
            "again": {"kind": "router", "choose": "output == 'yes' ? 'w' : 'held'", "routes": ["w", "held"]},
            "held": {"kind": "step", "function": "one", "input": 1},
            "bad": {"kind": "step", "function": "fail_for_good", "on_failure": "continue"},
            "after": {"kind": "step", "function": "one"},
            "c": {"kind": "workflow", "workflow": "waits_ask@1"},
            "late": {"kind": "step", "function": "fail"},
        },
        "edges": [["w", "again"], ["bad", "after"]],
        "functions": {"one": {"kind": "step"}, "fail_for_good": {"kind": "step"}, "fail": RETRIES},
        "workflows": {"waits_ask@1": ASKS},
    },
    {
        "name": "waits_for_child",
        "version": "1",
        "nodes": {"c": {"kind": "workflow", "workflow": "waits_ask@1"}},
        "edges": [],
        "functions": {},
        "workflows": {"waits_ask@1": ASKS},
    },
]
BEGINNINGS = {"StepReady", "AttemptRequested", "AttemptDispatched", "WaitStarted", "ChildStarted"}

ORDERS = """
policy: orders
version: "1"
rules:
  - name: ask-about-orders
    when: account.startsWith('asked/') && tool == 'order_tea'
    then: require_approval
    reason: somebody must look
  - name: never-orders
    when: account == 'asked/denied' && tool == 'order_tea'
    then: deny
    reason: not for this account
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    with WholeStack(tmp_path_factory.mktemp("waits"), env=RESTING) as whole:
        whole.client.publish(DEFINITIONS)
        file = tmp_path_factory.mktemp("policy") / "orders.yaml"
        file.write_text(ORDERS, encoding="utf-8")
        cli(whole, "policy", "apply", str(file))
        yield whole


@pytest.fixture
def whole(stack: WholeStack) -> Iterator[WholeStack]:
    yield stack
    assert_whole(stack)


def cli(whole: WholeStack, *words: str, code: int = 0) -> str:
    environment = {"TIDEGATE_KAFKA_BOOTSTRAP": whole.stack.settings.bootstrap}
    done = CliRunner().invoke(app, list(words), env=environment)
    assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception}"
    return done.stdout + done.stderr


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


def seen(whole: WholeStack, run_id: str, is_so: Callable[[Run], object]) -> Run:
    """Follow the log until it says so of a run."""
    return next(run for run, _ in whole.client.follow(run_id, WAIT_S) if is_so(run))


def waiting(whole: WholeStack, run_id: str) -> Run:
    return seen(whole, run_id, lambda run: run.waits)


@pytest.mark.feature("D3")
def test_what_waits_survives_the_death_of_its_scheduler(whole: WholeStack) -> None:
    runs = {
        kind: whole.client.start(f"waits_{kind}", 7, run_id=new_id(kind)) for kind in ("sleep", "wait_event", "ask")
    }
    slept = waiting(whole, runs["sleep"]).waits[0]
    asked = waiting(whole, runs["ask"])
    assert asked.needs_human
    assert asked.waits[0].prompt == "How many?"
    assert not waiting(whole, runs["wait_event"]).needs_human
    early = new_id("early")
    whole.client.start("waits_wait_event", 8, run_id=early)
    waiting(whole, early)
    assert "kept for what will wait" in cli(whole, "runs", "signal", early, "paid", "--key", "other")

    whole.kill("scheduler-0")
    assert "is not of type" in cli(whole, "runs", "respond", runs["ask"], "--text", "many", code=4)
    assert "invalid_answer" in cli(whole, "runs", "respond", runs["ask"], "--value", "10", code=4)
    assert "answered: w" in cli(whole, "runs", "respond", runs["ask"], "--value", "5", "--by", "ann")
    assert "ends the wait of w" in cli(whole, "runs", "signal", runs["wait_event"], "paid", "-k", "7", "-p", "20")
    assert "ends the wait of w" in cli(whole, "runs", "signal", early, "paid", "-p", "30")

    ended = {kind: whole.wait(run_id) for kind, run_id in runs.items()}
    assert {kind: run.output for kind, run in ended.items()} == {"sleep": 8, "wait_event": 21, "ask": 6}
    assert whole.wait(early).output == 31
    (woke,) = [event for event in whole.events(runs["sleep"]) if event.type == "WaitEnded"]
    assert woke.at_ms >= slept.due_ms, "it woke before its time"
    (given,) = [event.data for event in whole.events(runs["ask"]) if getattr(event.data, "given_by", "")]
    assert given.given_by == "ann"


@pytest.mark.feature("T4")
@pytest.mark.feature("T5")
def test_model_errors_do_not_fail_a_run_and_outside_answers_survive_the_scheduler(whole: WholeStack) -> None:
    run_id = whole.client.start(agent="throttled", run_id=new_id("throttled"))
    tea, milk = (f"throttled/1/tool:quote{number}" for number in ("", "#2"))
    asked = seen(whole, run_id, lambda run: len(run.waits) == 2)
    assert asked.needs_human
    assert [(wait.step_id, wait.function, wait.arguments) for wait in asked.waits] == [
        (tea, "quote", {"item": "tea"}),
        (milk, "quote", {"item": "milk"}),
    ]
    ended = [event for event in whole.events(run_id) if event.type == "AttemptEnded"]
    assert [(event.data.error_class, event.data.retry_rule) for event in ended] == [("RateLimited", "model")] * 2
    assert all(event.data.retry_at_ms - event.at_ms >= 200 for event in ended), "sooner than the provider allowed"

    whole.kill("scheduler-0")
    assert "invalid_answer" in cli(whole, "runs", "respond", run_id, tea, "--value", '"dear"', code=4)
    assert f"open: {tea}, {milk}" in cli(whole, "runs", "respond", run_id, "--value", "1", code=4)
    assert "no open wait" in cli(whole, "runs", "respond", run_id, "nobody", "--value", "1", code=4)
    assert f"answered: {tea}" in cli(whole, "runs", "respond", run_id, tea, "--value", "5", "--by", "erp")
    assert "waits for nothing any more" in cli(whole, "runs", "respond", run_id, tea, "--value", "6", code=4)
    assert f"rejected: {milk}" in cli(whole, "runs", "reject", run_id, milk, "--reason", "sold out")
    assert seen(whole, run_id, lambda run: run.is_over).output == [5, None]
    assert "run_is_over" in cli(whole, "runs", "respond", run_id, tea, "--value", "7", code=4)


@pytest.mark.feature("T4", "P1", "P2")
def test_the_gate_is_asked_before_anybody_outside_is(whole: WholeStack) -> None:
    tea = "buyer/1/tool:order_tea"
    denied = whole.client.run(agent="buyer", account="asked/denied", run_id=new_id("denied"), timeout_s=180)
    assert denied.output == [False, None, "denied by never-orders: not for this account"]
    dear = whole.client.run(agent="buyer", budget_micros=30, run_id=new_id("dear"), timeout_s=180)
    assert dear.output[2].startswith("denied by budget: ")

    run = whole.client.run(agent="buyer", account="asked/shop", budget_micros=50, run_id=new_id("asked"), timeout_s=180)
    assert [(asked.step_id, asked.why, asked.rule) for asked in run.approvals] == [(tea, "policy", "ask-about-orders")]
    assert run.waits == ()
    assert "approve or reject it" in cli(whole, "runs", "respond", run.run_id, tea, "--value", "5", code=4)
    cli(whole, "runs", "approve", run.run_id, tea, "--attempt", "1", "--why", "policy")
    seen(whole, run.run_id, lambda run: run.waits)
    for name in ("scheduler-0", "gate-0"):
        whole.kill(name)
    assert f"answered: {tea}" in cli(whole, "runs", "respond", run.run_id, tea, "--value", "7", "--by", "erp")
    over = seen(whole, run.run_id, lambda run: run.is_over)
    assert (over.output, over.spent_micros) == ([True, 7, None], 40)

    cancelled = whole.client.start(agent="buyer", run_id=new_id("cancelled"), budget_micros=50)
    seen(whole, cancelled, lambda run: run.waits)
    cli(whole, "runs", "cancel", cancelled)
    assert seen(whole, cancelled, lambda run: run.is_over).spent_micros == 0


@pytest.mark.feature("D4")
def test_what_is_paused_is_taken_and_shown_but_not_started(whole: WholeStack) -> None:
    before = whole.client.run("chain", 1)
    assert before.status == "succeeded"
    assert (
        cli(whole, "pause", "--queue", "default", "--reason", "incident 7", "--by", "ann")
        == "queue default is paused\n"
    )
    # From the moment in which a run is held, the scheduler has read it; the gate has when it is back after its death.
    held = [whole.client.start("chain", number, run_id=new_id("held")) for number in range(5)]
    for run_id in held:
        assert seen(whole, run_id, lambda run: run.held).held == ("one",)
    whole.kill("scheduler-0")
    whole.kill("gate-0")
    (row,) = json.loads(cli(whole, "pause", "--list", "--json"))
    assert (row["queue"], row["by"], row["reason"]) == ("default", "ann", "incident 7")
    cancelled = held.pop()
    assert "is being cancelled" in cli(whole, "runs", "cancel", cancelled)
    paused = held[-1]
    assert "is paused" in cli(whole, "pause", paused)
    assert not any(whole.entered(run_id) for run_id in (*held, cancelled))
    cli(whole, "resume", "--queue", "default")
    for run_id in held[:-1]:
        assert whole.wait(run_id).status == "succeeded"
    assert whole.client.get(paused).paused
    assert not whole.entered(paused)
    assert "goes on" in cli(whole, "resume", paused)
    assert whole.wait(paused).status == "succeeded"
    assert not whole.entered(cancelled)


@pytest.mark.feature("D2")
@pytest.mark.feature("D4")
def test_a_cancel_reaches_what_runs_and_nothing_follows(whole: WholeStack) -> None:
    run_id = whole.client.start("wait_here", 60, run_id=new_id("cancel"))
    eventually(lambda: whole.entered(run_id), "it runs")
    asleep = whole.client.start("waits_wait_until", 1, run_id=new_id("asleep"))
    waiting(whole, asleep)
    # In every other state that a run may be in: queued for a slot, backing off, in approval, asking, in a child.
    queued = whole.client.start("never", 1, run_id=new_id("queued"))
    whole.until(queued, "StepReady")
    backing_off = whole.client.start("waits_to_retry", 1, run_id=new_id("retrying"))
    whole.until(backing_off, "AttemptEnded")
    in_approval = whole.client.start(agent="buyer", account="asked/shop", run_id=new_id("approval"))
    asking = whole.client.start("waits_ask", 1, run_id=new_id("asking"))
    parent = whole.client.start("waits_for_child", 1, run_id=new_id("parent"))
    child = child_run_id(parent, "c")
    for one in (in_approval, asking, child):
        seen(whole, one, lambda run: run.needs_human)
    victims = [run_id, asleep, queued, backing_off, in_approval, asking, parent]
    for victim in victims:
        cli(whole, "runs", "cancel", victim, "--reason", "enough")
    for victim in (*victims, child):
        assert seen(whole, victim, lambda run: run.is_over).status == "cancelled"
    for victim in (*victims, child):
        types = whole.types(victim)
        assert BEGINNINGS.isdisjoint(types[types.index("RunCancelRequested") :]), types
    # What comes too late is refused, and starts nothing.
    assert "run_is_over" in cli(
        whole, "runs", "approve", in_approval, "buyer/1/tool:order_tea", "--why", "policy", code=4
    )
    assert "run_is_over" in cli(whole, "runs", "respond", child, "w", "--value", "5", code=4)
    whole.until(run_id, "ResultIgnored")  # the executor says that it has stopped
    (stopped,) = [event.data for event in whole.events(run_id) if event.type == "ResultIgnored"]
    assert stopped.outcome == "cancelled"
    types = whole.types(run_id)
    assert "AttemptDispatched" not in types[types.index("RunCancelRequested") :]
    assert not whole.entered(asleep)
    assert not whole.entered(queued)
    assert [line.attempt for line in whole.entered(backing_off)] == [1]


def passed(whole: WholeStack, run_id: str) -> set[tuple[str, str]]:
    """Return the statuses that a run, its steps and its nodes have gone through, by its log."""
    run, found = RunState(run_id), set[tuple[str, str]]()
    for event in whole.events(run_id):
        apply(run, event.data, event.at_ms)
        found |= {("run", run.status)} | {("step", step.status) for step in run.steps.values()}
        found |= {("node", node.status) for node in run.nodes.values()}
    return found


@pytest.mark.feature("D5")
def test_there_is_no_status_that_nothing_ever_has(whole: WholeStack) -> None:
    runs = [whole.client.start("waits_tour", 1, run_id=new_id("tour"))]
    (tour,) = runs
    whole.until(tour, "NodeFailed")
    whole.until(tour, "AttemptEnded", 2)
    cli(whole, "pause", tour)
    for answer in ("yes", "no"):
        seen(whole, tour, lambda run: run.waits)
        cli(whole, "runs", "respond", tour, "--text", answer)
    seen(whole, tour, lambda run: run.held)
    runs.append(whole.client.start(agent="buyer", account="asked/shop", run_id=new_id("approval")))
    seen(whole, runs[-1], lambda run: run.approvals)
    for run_id in runs:
        cli(whole, "runs", "cancel", run_id)
    for workflow in ("chain", "fail_for_good", "nobody_has_published_it"):
        runs.append(whole.client.start(workflow, 1, run_id=new_id("short")))
    for run_id in runs:
        seen(whole, run_id, lambda run: run.is_over)
    tables = {"run": states.RUN_MEANINGS, "step": states.STEP_MEANINGS, "node": states.NODE_MEANINGS}
    named = {(of, status) for of, meanings in tables.items() for status in meanings if status != states.ABSENT}
    assert set().union(*(passed(whole, run_id) for run_id in runs)) == named
