"""Pause, resume and cancel, and which errors are tried again. Scheduler and gate together, without any log."""

from __future__ import annotations

from typing import Any

import pytest

from support.pure import Pair, agent, chain, step, tool
from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.messages import EndedIncarnation
from tidegate.scheduler import holding

STEPS = ("step:a", "step:b", "step:c", "step:once", "agent:bot", "tool:look")


def pair(**options: Any) -> Pair:
    return Pair(functions=STEPS, **options)


def refusal(p: Pair) -> ev.CommandRefused:
    event = p.events[-1][1]
    assert isinstance(event, ev.CommandRefused)
    return event


def asked_since(p: Pair, count: int) -> list[str]:
    """Return what the scheduler has asked the gate for since then."""
    return [
        event.step_id
        for _, event in p.events[count:]
        if (isinstance(event, ev.StepReady) and not event.held) or isinstance(event, ev.AttemptRequested)
    ]


def finish(p: Pair) -> None:
    p.work({name: lambda value: value for name in ("a", "b", "c", "once")})


# --- pause of a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D4")
def test_a_paused_run_ends_what_runs_and_asks_for_nothing_new() -> None:
    p = pair()
    p.start("r", chain("a", "b", "c"), 5)
    p.command("r", "pause", by="ann", reason="look")
    before = len(p.events)
    finish(p)
    run = p.run("r")
    assert run.steps["a"].status == "succeeded", "its result is recorded"
    assert run.steps["b"].status == "held"
    assert asked_since(p, before) == []
    assert p.money() == (0, 0), "nothing is reserved for what is held"
    p.command("r", "resume")
    assert run.steps["b"].attempt == 1
    finish(p)
    assert p.run("r").output == "5"
    assert p.dispatches == [("a", 1), ("b", 1), ("c", 1)]


@pytest.mark.feature("D4")
def test_pausing_twice_and_resuming_what_goes_on_is_refused() -> None:
    p = pair()
    p.start("r", chain("a"))
    p.command("r", "resume")
    assert refusal(p).code == "not_paused"
    p.command("r", "pause")
    p.command("r", "pause")
    assert refusal(p).code == "already_paused"
    for command in ("pause", "resume"):
        p.command("nobody", command)
        assert refusal(p).code == "unknown_run"


@pytest.mark.feature("D4")
@pytest.mark.parametrize("outcome", ["failed", "busy", "released", "lost"])
def test_a_paused_run_does_not_try_again_until_it_is_resumed(outcome: str) -> None:
    p = pair()
    p.start("r", chain("a", "b"))
    task = p.tasks.popleft()
    p.command("r", "pause")
    before = len(p.events)
    if outcome == "lost":
        p.register("worker-0", 2, 100, STEPS, ended=(EndedIncarnation(incarnation=1, evidence="pid gone"),))
    else:
        p.answer(task, outcome, error_class="E", error_message="no")
    p.now_ms += 5_000
    p.settle_down()
    assert p.run("r").steps["a"].status == "held"
    assert asked_since(p, before) == []
    p.command("r", "resume")
    assert p.tasks[-1].attempt == 2
    finish(p)
    assert p.run("r").status == "succeeded"


@pytest.mark.feature("D4")
def test_an_agent_of_a_paused_run_calls_no_tool() -> None:
    p = pair()
    definition = {
        "name": "agent:bot",
        "version": "1",
        "nodes": {"bot": {"kind": "agent", "function": "bot"}},
        "functions": {"bot": agent("look"), "look": tool()},
    }
    p.start("r", definition)
    p.command("r", "pause")
    p.work({"bot": lambda s: {"tool_calls": [{"name": "look", "arguments": {}}], "content": ""}})
    assert [step.status for step in p.run("r").steps.values()] == ["succeeded", "held"]
    p.command("r", "resume")
    assert [task.step_id for task in p.tasks] == ["bot/1/tool:look"]


@pytest.mark.feature("D4")
def test_an_approval_waits_for_the_end_of_the_pause() -> None:
    p = pair()
    p.policy({"policy": "ask", "version": "1", "rules": [{"name": "r", "when": "true", "then": "require_approval"}]})
    p.start("r", chain("a"))
    p.command("r", "pause")
    p.command("r", "approve")
    assert refusal(p).code == "run_is_paused"
    p.command("r", "resume")
    p.command("r", "approve")
    assert p.dispatches == [("a", 1)]


@pytest.mark.feature("D4")
def test_a_wait_of_a_paused_run_ends_but_nothing_follows() -> None:
    p = pair()
    definition = chain("b")
    definition["nodes"]["w"] = {"kind": "sleep", "wait": {"seconds": 1}}
    definition["edges"] = [["w", "b"]]
    p.start("r", definition)
    p.command("r", "pause")
    p.pass_time_with_heartbeats(5_000)
    assert [step.status for step in p.run("r").steps.values()] == ["succeeded", "held"]
    p.command("r", "resume")
    assert p.dispatches == [("b", 1)]


# --- pause of queues ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D4")
@pytest.mark.parametrize("queue", ["default", "*"])
def test_what_is_asked_for_while_its_queue_is_paused_is_taken_shown_and_not_started(queue: str) -> None:
    p = pair()
    p.control(queue, paused=True)
    p.start("r", chain("a", "b"), 3)
    assert p.run("r").status == "running"
    assert p.run("r").steps["a"].status == "held"
    assert not p.tasks
    p.control(queue, paused=False)
    finish(p)
    assert p.run("r").output == "3"


@pytest.mark.feature("D4")
def test_a_queue_that_is_paused_does_not_hold_others() -> None:
    p = pair()
    p.register("worker-1", 1, 100, STEPS, queue="other")
    p.control("default", paused=True)
    p.start("here", chain("a"))
    p.start("there", chain("a", a=step(queue="other")))
    assert [task.run_id for task in p.tasks] == ["there"]
    p.control("*", paused=True)
    p.control("default", paused=False)
    assert p.run("here").steps["a"].status == "held", "everything is paused still"
    p.control("*", paused=False)
    assert [task.run_id for task in p.tasks] == ["there", "here"]


@pytest.mark.feature("D4")
def test_the_gate_places_nothing_of_a_paused_queue_that_was_asked_for_before() -> None:
    p = pair(slots=1)
    p.start("first", chain("a"))
    p.start("second", chain("a"))  # no slot is free: it stands in the gate's queue
    p.control("default", paused=True)
    finish(p)
    assert p.run("first").status == "succeeded"
    assert p.run("second").steps["a"].status == "requested"
    assert p.dispatches == [("a", 1)]
    p.control("default", paused=False)
    finish(p)
    assert p.run("second").status == "succeeded"


def test_a_run_paused_in_a_paused_queue_needs_both_to_end() -> None:
    p = pair()
    p.control("default", paused=True)
    p.start("r", chain("a"))
    p.command("r", "pause")
    p.control("default", paused=False)
    assert not p.tasks
    p.control("default", paused=True)
    p.command("r", "resume")
    assert not p.tasks
    p.control("default", paused=False)
    assert len(p.tasks) == 1


def test_held_steps_come_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "MAX_RELEASED", 2)
    p = pair()
    definition = chain("a")
    definition["nodes"] = {f"n{number}": {"kind": "step", "function": "a"} for number in range(5)}
    p.control("*", paused=True)
    p.start("r", definition)
    p.control("*", paused=False)
    assert len(p.tasks) == 5
    assert not any(p.runs.held.values())
    assert p.scheduler.next_due_ms(p.runs) is None


def test_a_control_that_names_nothing_is_ignored() -> None:
    p = pair()
    p.control("no such name", paused=True)
    p.start("r", chain("a"))
    assert len(p.tasks) == 1


# --- cancel -----------------------------------------------------------------------------------------------------------------------


def _queued(p: Pair) -> None:
    p.start("blocker", chain("a"))
    p.start("r", chain("a", "b"))


def _waiting(p: Pair) -> None:
    definition = chain("b")
    definition["nodes"]["w"] = {"kind": "wait_event", "wait": {"event": "e"}}
    definition["edges"] = [["w", "b"]]
    p.start("r", definition)


def _retrying(p: Pair) -> None:
    p.start("r", chain("a", "b"))
    p.answer(p.tasks.popleft(), "failed", error_class="E", error_message="no")


def _in_approval(p: Pair) -> None:
    p.policy({"policy": "ask", "version": "1", "rules": [{"name": "r", "when": "true", "then": "require_approval"}]})
    p.start("r", chain("a", "b"))


def _unknown(p: Pair) -> None:
    p.start("r", chain("once", once=step(idempotent=False)))
    p.tasks.clear()
    p.register("worker-0", 2, 1, STEPS, ended=(EndedIncarnation(incarnation=1, evidence="pid gone"),))


def _asleep(p: Pair) -> None:
    definition = chain("b")
    definition["nodes"]["w"] = {"kind": "sleep", "wait": {"seconds": 3}}
    definition["edges"] = [["w", "b"]]
    p.start("r", definition)


def _paused(p: Pair) -> None:
    p.start("r", chain("a", "b"))
    p.command("r", "pause")
    p.answer(p.tasks.popleft(), value=1)


def _held(p: Pair) -> None:
    p.control("*", paused=True)
    p.start("r", chain("a", "b"))


def _running(p: Pair) -> None:
    p.start("r", chain("a", "b"))


@pytest.mark.feature("D4")
@pytest.mark.parametrize(
    "bring", [_queued, _waiting, _retrying, _in_approval, _unknown, _asleep, _paused, _held, _running]
)
def test_after_a_cancel_nothing_of_the_run_is_dispatched(bring: Any) -> None:
    p = pair(slots=1)
    bring(p)
    assert p.run("r").status not in states.RUN_TERMINAL
    before = [task for task in p.tasks if task.run_id == "r" and task.type == "run"]
    p.command("r", "cancel", by="ann", reason="enough")
    run = p.run("r")
    assert (run.status, run.code, run.reason) == ("cancelled", "cancelled", "enough")
    assert not run.open_waits()
    assert not run.open_approvals()
    for command, fields in (
        ("approve", {}),
        ("respond", {"value": '"again"'}),
        ("signal", {"event": "e"}),
        ("resume", {}),
        ("pause", {}),
    ):
        p.command("r", command, **fields)
        assert refusal(p).code == "run_is_over"
    p.control("*", paused=False)
    p.pass_time_with_heartbeats(20_000, incarnation=2 if bring is _unknown else 1)
    for task in [task for task in p.tasks if task.run_id != "r"]:
        p.tasks.remove(task)
        p.answer(task, value=1)
    p.pass_time_with_heartbeats(20_000, incarnation=2 if bring is _unknown else 1)
    assert [task for task in p.tasks if task.run_id == "r" and task.type == "run"] == before
    assert all(task.type == "cancel" for task in p.tasks if task.run_id == "r" and task not in before)
    if bring is _running:
        assert [task.type for task in p.tasks] == ["run", "cancel"], "what runs is told to stop"
    # What had been dispatched answers, and then nothing is reserved any more.
    for task in before:
        p.answer(task, "cancelled")
    assert p.money()[0] == 0


# --- which errors are tried again -------------------------------------------------------------------------------------------------


@pytest.mark.feature("D2")
@pytest.mark.parametrize(
    ("settings", "error", "is_retried"),
    [
        ({}, "KeyError", True),
        ({"no_retry_on": ["KeyError"]}, "KeyError", False),
        ({"no_retry_on": ["KeyError"]}, "OSError", True),
        ({"retry_on": ["OSError"]}, "KeyError", False),
        ({"retry_on": ["OSError"]}, "OSError", True),
        ({"retry_on": ["OSError"], "no_retry_on": ["OSError"]}, "OSError", False),
    ],
)
def test_only_errors_of_the_named_classes_are_tried_again(
    settings: dict[str, Any], error: str, is_retried: bool
) -> None:
    p = pair()
    p.start("r", chain("a", a=step(**settings)))
    p.answer(p.tasks.popleft(), "failed", error_class=error, error_message="no")
    p.pass_time_with_heartbeats(1_000)
    assert bool(p.tasks) == is_retried
    if not is_retried:
        assert (p.run("r").status, p.run("r").code) == ("failed", "not_retryable")
        assert error in p.run("r").reason


@pytest.mark.feature("D2")
def test_when_a_retry_is_due_is_in_the_log_and_the_same_in_every_run_of_it() -> None:
    due = []
    for _ in range(2):
        p = pair()
        p.start("r", chain("a", a=step(max_attempts=3)))
        for _ in range(3):
            p.answer(p.tasks.popleft(), "failed", error_class="E", error_message="no")
            p.pass_time_with_heartbeats(10_000)
        due.append([event.retry_at_ms for _, event in p.events if isinstance(event, ev.AttemptEnded)])
        assert p.run("r").code == "attempts_exhausted"
        assert "3 of 3 attempts failed" in p.run("r").reason
    assert due[0] == due[1]
    assert due[0][-1] is None
