"""What lists and `why` say to people: complete, in words, nothing cut off."""

import inspect
from typing import Any

import pytest

from tidegate.cli import approvals, budget, run_output, why
from tidegate.domain import ledger_events as ev
from tidegate.domain.messages import Call
from tidegate.gate.windows import said_moment

QUESTION: dict[str, Any] = {
    "run_id": "r-1",
    "step_id": "support/2/tool:issue_refund",
    "attempt": 1,
    "account": "acme/support",
    "policy": "big-refunds@1",
    "rule": "ask-a-human",
    "why": "policy",
    "reason": "refunds above 40 dollars need a human",
    "since_ms": 1_795_298_405_000,
    "expires_at_ms": 0,
    "arguments_hash": "9f" * 32,
    "question": "0123456789abcdef",
}


def throttled(**fields: Any) -> ev.AttemptThrottled:
    given = {"account": "a", "run_id": "r", "step_id": "s", "attempt": 1, "cause": "limit", "limit": "one", "key": ""}
    return ev.AttemptThrottled(**(given | {"reason": "one allows 1 at once", "position": 0, "retry_at_ms": 0} | fields))


@pytest.mark.feature("P3")
def test_why_says_which_limit_an_attempt_waits_for() -> None:
    assert why._SAYINGS[ev.AttemptThrottled](throttled()) == "waits: one allows 1 at once"
    said = why._SAYINGS[ev.AttemptThrottled](throttled(position=3, retry_at_ms=1_795_298_405_000))
    assert said == "waits: one allows 1 at once, 3 before it, at the earliest at 2026-11-21T22:00:05+00:00"


@pytest.mark.feature("P6")
@pytest.mark.parametrize(
    ("prefer", "said"),
    [
        ("", ""),
        ("gpu-0,worker-1", ", as preferred"),
        ("gpu-0,gpu-1", "; preferred, but without a free slot for it: gpu-0, gpu-1"),
    ],
)
def test_why_says_what_became_of_the_wish_for_an_executor(prefer: str, said: str) -> None:
    call = Call(
        kind="step",
        function="a",
        queue="q",
        arguments="1",
        timeout_ms=1,
        reserve_micros=0,
        idempotent=True,
        prefer=prefer,
    )
    names: dict[str, Any] = {"account": "a", "run_id": "r", "step_id": "s", "attempt": 1, "rule": "", "policy": ""}
    life: dict[str, Any] = {"instance_id": "worker-1", "incarnation": 7, "task_partition": 0, "reserved_micros": 0}
    event = ev.AttemptPlaced(**names, **life, call=call)
    placed = f"placed on worker-1 (incarnation 7){said}"
    assert why._SAYINGS[ev.AttemptPlaced](event) == placed
    granted = ev.AttemptGranted(**names, **life, call=call, approved_by="ann", buckets=("b|a|total",))
    allowed = "allowed: 0 micro-dollars set aside, counted in b|a|total, approved by ann"
    assert why._SAYINGS[ev.AttemptGranted](granted) == f"{allowed}; {placed}"


def test_why_has_a_saying_for_every_reason_to_refuse_hold_or_wait() -> None:
    steps = {
        event
        for _, event in inspect.getmembers(ev, inspect.isclass)
        if {"step_id", "attempt", "reason"} <= set(getattr(event, "__struct_fields__", ()))
    }
    assert ev.AttemptThrottled in steps
    unsaid = {event.__name__ for event in steps - why._SAYINGS.keys() if not event.__name__.startswith("Lease")}
    assert not unsaid


@pytest.mark.feature("P4")
def test_a_question_is_shown_whole_with_the_command_that_answers_it() -> None:
    lines = approvals._shown(QUESTION)
    assert QUESTION["step_id"] in lines[0]
    assert lines[1].strip() == "rule ask-a-human of big-refunds@1: refunds above 40 dollars need a human"
    assert lines[2].strip() == f"arguments {QUESTION['arguments_hash']}"
    assert "tidegate approvals approve r-1 support/2/tool:issue_refund --question 0123456789abcdef" in lines[3]
    older = approvals._shown(QUESTION | {"arguments_hash": "", "question": ""})
    assert "tidegate approvals approve r-1 support/2/tool:issue_refund --attempt 1" in older[2]
    assert "until" not in lines[0]
    assert "until 2026-11-21 22:00:06" in approvals._shown(QUESTION | {"expires_at_ms": 1_795_298_406_000})[0]


def test_windows_are_said_as_times() -> None:
    assert said_moment(1_795_305_600_000) == "2026-11-22 00:00:00Z"
    assert budget._window("1795219200000") == "since 2026-11-21 00:00:00Z"
    assert budget._window("total") == "total"
    assert budget._window("run:r-1") == "run:r-1"


def test_a_held_step_says_how_to_find_the_pause() -> None:
    step = {"step_id": "s", "status": "held", "attempt": 0, "error": "", "waits_for": ""}
    assert "tidegate pause --list" in run_output._step_why(step).plain
    assert run_output._step_why(step | {"status": "running", "error": "it broke"}).plain == "it broke"


def test_a_question_that_lapses_says_when() -> None:
    question = QUESTION | {"expires_at_ms": 1_795_298_406_000}
    assert ", until 20" in run_output._question("r-1", question)[0].plain
    assert "until" not in run_output._question("r-1", QUESTION)[0].plain
