"""Approvals that lapse: the gate ends the hold by its recorded time; that is no denial, and no later yes brings it back."""

from __future__ import annotations

from typing import Any

import pytest

from support.pure import Pair, chain
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.messages import Approve, GateRequest

RULE = {"name": "ask", "when": "true", "then": "require_approval", "expires_s": 60}


def asking(**more: Any) -> Pair:
    pair = Pair(functions=("step:a",))
    pair.policy({"policy": "p", "version": "1", "rules": [RULE | more]})
    pair.start("r", chain("a"))
    return pair


def gate_alone(pair: Pair, ms: int) -> None:
    """Let time pass for the gate only: the scheduler's own timer would be as fast."""
    pair.now_ms += ms
    answer = pair.gate.due(pair.ledger, pair.now_ms, pair.tables)
    assert answer is not None
    assert answer[0].startswith("timer:")
    pair._take(pair.gate, pair.ledger, answer[1])


@pytest.mark.feature("P4")
def test_a_question_lapses_at_the_gate_and_the_step_fails_with_a_code_of_its_own() -> None:
    pair = asking()
    held = next(event for event in pair.ledger_events if isinstance(event, ev.ApprovalHeld))
    assert held.expires_at_ms == pair.now_ms + 60_000
    assert pair.gate.due(pair.ledger, held.expires_at_ms - 1, pair.tables) is None
    gate_alone(pair, 60_000)
    pair.settle_down()
    run = pair.run("r")
    assert (run.status, run.steps["a"].status) == ("failed", "failed")
    assert "ApprovalExpired" in pair.seen("r")
    assert "AttemptEnded" not in pair.seen("r")  # it was never denied
    assert next(e for _, e in pair.events if type(e).__name__ == "StepFailed").code == "approval_expired"
    assert [type(e).__name__ for e in pair.ledger_events].count("ApprovalLapsed") == 1
    assert not any(isinstance(event, ev.AttemptRefused) for event in pair.ledger_events)
    assert (pair.ledger.attempts, pair.ledger.questions) == ({}, [])


@pytest.mark.feature("P4")
def test_a_yes_that_crosses_the_end_of_its_time_lets_nothing_run() -> None:
    pair = asking()
    held = next(event for event in pair.ledger_events if isinstance(event, ev.ApprovalHeld))
    gate_alone(pair, 60_000)  # the scheduler has not heard of it yet
    yes = Approve(step_id="a", attempt=1, by="ada", arguments_hash=held.arguments_hash)
    request = GateRequest(run_id="r", account="acme/support", source=Position(0, 1, 0), items=(yes,))
    pair._send(pair.gate, request)
    pair.settle_down()
    assert not pair.tasks
    assert pair.run("r").status == "failed"


@pytest.mark.feature("P4")
def test_an_answer_in_time_counts_and_no_end_comes_later() -> None:
    pair = asking()
    pair.command("r", "approve", by="ada")
    assert pair.ledger.questions == []
    assert [task.step_id for task in pair.tasks] == ["a"]
    pair.now_ms += 60_001
    pair.register("worker-0", 1, 100, ("step:a",))
    pair.work({"a": lambda _: 1})
    assert pair.run("r").status == "succeeded"


@pytest.mark.feature("P4")
def test_when_the_scheduler_is_faster_the_gate_lets_go_once() -> None:
    pair = asking()
    pair.now_ms += 60_000
    pair.settle_down()
    assert pair.run("r").status == "failed"
    ends = [type(event).__name__ for event in pair.ledger_events if event.__class__ is not ev.RunOpened]
    assert sum(name in ("ApprovalLapsed", "AttemptReleased") for name in ends) == 1
    assert pair.ledger.runs == {}


@pytest.mark.feature("P4")
def test_an_approval_for_other_arguments_is_refused() -> None:
    pair = asking()
    yes = Approve(step_id="a", attempt=1, by="ada", arguments_hash="0" * 64)
    pair._send(pair.gate, GateRequest(run_id="r", account="acme/support", source=Position(0, 1, 0), items=(yes,)))
    pair.settle_down()
    assert not pair.tasks
    refused = next(event for event in pair.ledger_events if isinstance(event, ev.AttemptRefused))
    assert refused.reason == "the approval was given for other arguments"
