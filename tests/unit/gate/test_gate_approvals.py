"""Approvals that lapse: the gate ends the hold by its recorded time; that is no denial, and no later yes brings it back."""

from __future__ import annotations

from typing import Any

import pytest

from support.pure import Pair, chain
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.messages import Approve, GateDecision, GateRequest, Unanswered
from tidegate.eventlog.machine import Decision

RULE = {"name": "ask", "when": "true", "then": "require_approval", "expires_s": 60}


def asking(**more: Any) -> Pair:
    pair = Pair(functions=("step:a",))
    pair.policy({"policy": "p", "version": "1", "rules": [RULE | more]})
    pair.start("r", chain("a"))
    return pair


def gate_alone(pair: Pair, ms: int) -> None:
    """Let time pass, and the gate see it; what it says is on its way."""
    pair.now_ms += ms
    answer = pair.gate.due(pair.ledger, pair.now_ms, pair.tables)
    assert answer is not None
    assert answer[0].startswith("timer:")
    pair._take(pair.gate, pair.ledger, answer[1])


@pytest.mark.feature("P4")
def test_who_is_asked_twice_in_one_millisecond_lapses_once() -> None:
    """A question that another takes the place of, for another budget, ends at the same time if it was asked in the same turn."""
    pair = asking()
    held = next(event for event in pair.ledger_events if isinstance(event, ev.ApprovalHeld))
    pair._take(pair.gate, pair.ledger, Decision(pair.ledger.subject, "", [held]))
    gate_alone(pair, 60_000)
    assert [type(e).__name__ for e in pair.ledger_events].count("ApprovalLapsed") == 1
    assert (pair.ledger.attempts, pair.ledger.questions) == ({}, [])


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
def test_the_gate_alone_ends_a_question_and_both_logs_say_so() -> None:
    pair = asking()
    pair.now_ms += 60_000
    assert pair.scheduler.due(pair.runs, pair.now_ms, pair.tables) is None
    pair.settle_down()
    assert (pair.run("r").status, pair.run("r").code) == ("failed", "approval_expired")
    ends = [type(event).__name__ for event in pair.ledger_events]
    assert ends == ["RunOpened", "ApprovalHeld", "ApprovalLapsed", "RunClosed"]
    assert pair.ledger.runs == {}


@pytest.mark.feature("P4")
@pytest.mark.parametrize("answer", ["approve", "reject"])
def test_an_answer_that_the_scheduler_takes_before_it_hears_of_the_end_changes_nothing(answer: str) -> None:
    pair = asking()
    pair.now_ms += 60_000
    lapsed = pair.gate.due(pair.ledger, pair.now_ms, pair.tables)
    assert lapsed is not None
    for event in lapsed[1].events:
        pair.gate.apply(pair.ledger, "ledger-0", "", event, 9, pair.now_ms)
    pair.command("r", answer, by="ada")
    source = Position(0, 1_000_000, 0)
    said = Unanswered(step_id="a", attempt=1, rule="ask", policy="p@1", reason="nobody answered in time")
    pair._send(pair.scheduler, GateDecision(run_id="r", source=source, items=(said,)))
    pair.settle_down()
    run = pair.run("r")
    assert (run.status, run.code) == ("failed", "approval_expired" if answer == "approve" else "rejected")
    assert not pair.tasks


@pytest.mark.feature("P4")
def test_an_approval_for_other_arguments_is_refused() -> None:
    pair = asking()
    yes = Approve(step_id="a", attempt=1, by="ada", arguments_hash="0" * 64)
    pair._send(pair.gate, GateRequest(run_id="r", account="acme/support", source=Position(0, 1, 0), items=(yes,)))
    pair.settle_down()
    assert not pair.tasks
    refused = next(event for event in pair.ledger_events if isinstance(event, ev.AttemptRefused))
    assert refused.reason == "the approval was given for other arguments"
