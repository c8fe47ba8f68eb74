"""Waits for events, times and people, and what may not happen to them. Scheduler and gate together, without any log."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from support.pure import Pair, agent, chain, step, tool
from tidegate.domain import canonical
from tidegate.domain import run_events as ev
from tidegate.domain.messages import EndedIncarnation
from tidegate.domain.questions import question_id
from tidegate.domain.run import RunState, StepState
from tidegate.domain.workflow import validate_definition
from tidegate.scheduler import decide
from tidegate.scheduler import waits as waiting

STEPS = ("step:a", "step:b", "step:c", "step:pay")


def pair(**options: Any) -> Pair:
    return Pair(functions=STEPS, **options)


def waiter(kind: str, *, after: str = "b", **settings: Any) -> dict[str, Any]:
    """Return a definition of a wait `w`, then a step."""
    return {
        "name": "waiter",
        "version": "1",
        "nodes": {"w": {"kind": kind, "wait": settings}, after: {"kind": "step", "function": after}},
        "edges": [["w", after]],
        "functions": {after: step()},
    }


def ended(p: Pair, run_id: str = "r") -> str:
    """Let the step after the wait hand on what it got, and return the run's output."""
    p.work({name: lambda value: value for name in "abc"})
    assert p.run(run_id).status == "succeeded", p.run(run_id).reason
    return p.run(run_id).output


def refusal(p: Pair) -> ev.CommandRefused:
    event = p.events[-1][1]
    assert isinstance(event, ev.CommandRefused)
    return event


# --- times ----------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D3")
def test_a_sleep_ends_when_its_time_has_come_and_hands_on_its_input() -> None:
    p = pair()
    p.start("r", waiter("sleep", seconds=60), {"n": 1})
    (started,) = [event for _, event in p.events if isinstance(event, ev.WaitStarted)]
    assert started.due_ms == p.now_ms + 60_000, "the due time is in the log"
    assert p.run("r").status == "waiting"
    p.pass_time_with_heartbeats(59_999)
    assert not p.tasks
    assert p.scheduler.next_due_ms(p.runs) == p.now_ms + 1
    p.pass_time_with_heartbeats(1)
    assert ended(p) == '{"n":1}'


@pytest.mark.feature("D3")
@pytest.mark.parametrize(
    "at",
    ["1970-01-01T00:20:00Z", "1970-01-01T01:20:00+01:00", "${ input.at }", "${ timestamp(input.at) }"],
)
def test_a_wait_until_a_time(at: str) -> None:
    p = pair()
    p.start("r", waiter("wait_until", at=at), {"at": "1970-01-01T00:20:00Z"})
    p.pass_time_with_heartbeats(1_200_000 - p.now_ms - 1)
    assert not p.tasks
    p.pass_time_with_heartbeats(1)
    ended(p)


def test_a_time_that_is_over_is_no_wait() -> None:
    p = pair()
    p.start("r", waiter("wait_until", at="1970-01-01T00:00:01Z"))
    ended(p)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sleep", {"seconds": "${ input.x }"}),
        ("sleep", {"seconds": "${ -1 }"}),
        ("wait_until", {"at": "${ '2030-01-01T00:00:00' }"}),
        ("wait_until", {"at": "${ '2101-01-01T00:00:00Z' }"}),
        ("wait_event", {"event": "e", "key": "${ {'a': 1} }"}),
        ("ask", {"prompt": "${ 1 }"}),
        ("ask", {"prompt": "?", "choices": "${ [1, 2] }"}),
        ("ask", {"prompt": "?", "choices": "${ [] }"}),  # a question with choices does not become one without
        ("ask", {"prompt": "?", "choices": "${ [''] }"}),
    ],
)
def test_what_cannot_be_waited_for_fails_the_run_with_the_reason(kind: str, settings: dict[str, Any]) -> None:
    p = pair()
    p.start("r", waiter(kind, **settings), {"x": "soon"})
    assert (p.run("r").status, p.run("r").code) == ("failed", "binding_failed")
    assert "wait of node w" in p.run("r").reason


# --- events ---------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D3")
def test_an_event_ends_the_wait_for_its_name_and_key_alone() -> None:
    p = pair()
    p.start("r", waiter("wait_event", event="paid", key="${ input.order }"), {"order": 7})
    p.command("r", "signal", event="paid", key="8", value='"other"')
    p.command("r", "signal", event="shipped", key="7", value='"other"')
    assert p.run("r").status == "waiting"
    p.command("r", "signal", event="paid", key="7", value='{"cents":5}')
    assert ended(p) == '{"cents":5}'


@pytest.mark.feature("D3")
@pytest.mark.parametrize("key", ["7", None])
def test_an_event_that_comes_before_its_wait_is_kept(key: str | None) -> None:
    p = pair()
    definition = waiter("wait_event", event="paid", key="7")
    definition["nodes"]["a"] = {"kind": "step", "function": "a"}
    definition["edges"].append(["a", "w"])
    definition["functions"]["a"] = step()
    p.start("r", definition)
    p.command("r", "signal", event="paid", key=key, value="1")
    p.command("r", "signal", event="paid", key=key, value="2")
    p.answer(p.tasks.popleft(), value=0)
    assert ended(p) == "1", "the oldest is taken first"


def test_kept_events_go_one_to_a_wait_and_are_bounded() -> None:
    p = pair()
    definition = waiter("wait_event", event="other")
    p.start("r", definition)
    for number in range(waiting.MAX_KEPT_SIGNALS):
        p.command("r", "signal", event="paid", key=None, value=str(number))
    p.command("r", "signal", event="paid", key=None, value="1")
    assert refusal(p).code == "too_many_signals"
    q = pair()
    q.start("r", definition)
    q.command("r", "signal", event="paid", key=None, value=f'"{"x" * 900_000}"')
    q.command("r", "signal", event="paid", key=None, value=f'"{"x" * 900_000}"')
    assert refusal(q).code == "too_many_signals"


def test_an_event_without_a_key_must_be_clear() -> None:
    p = pair()
    definition = waiter("wait_event", event="paid", key="1")
    definition["nodes"]["v"] = {"kind": "wait_event", "wait": {"event": "paid", "key": "2"}}
    definition["edges"].append(["v", "b"])
    p.start("r", definition)
    p.command("r", "signal", event="paid", key=None, value="1")
    assert refusal(p).code == "ambiguous_signal"
    assert "v (key '2'), w (key '1')" in refusal(p).reason
    p.command("r", "signal", event="paid", key="2", value="20")
    p.command("r", "signal", event="paid", key=None, value="10")
    assert ended(p) == '{"v":20,"w":10}'


# --- questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D3")
@pytest.mark.parametrize(
    ("settings", "bad", "good"),
    [
        ({"choices": ["yes", "no"]}, ['"maybe"', "true", '""'], '"no"'),
        ({"choices": ["yes", "no"], "free_text": True}, ["1", '"  "'], '"perhaps"'),
        ({}, ["1", '""', "null"], '"words"'),
        ({"schema": {"type": "integer", "minimum": 3}}, ["2", '"3"', "2.5"], "3"),
        ({"schema": {"type": "string", "maxLength": 3}}, ['"long"', "1"], '"abc"'),
        ({"choices": "${ input.options }"}, ['"c"'], '"b"'),
    ],
)
def test_only_a_good_answer_counts(settings: dict[str, Any], bad: list[str], good: str) -> None:
    p = pair()
    p.start("r", waiter("ask", prompt="Which of ${...}?", **settings), {"options": ["a", "b"]})
    for value in bad:
        p.command("r", "respond", step_id="w", value=value)
        assert refusal(p).code == "invalid_answer"
        assert "the question stays open" in refusal(p).reason
        assert p.run("r").status == "waiting"
        assert not p.tasks
    p.command("r", "respond", step_id="w", value=good, by="ann", reason="because")
    (end,) = [event for _, event in p.events if isinstance(event, ev.WaitEnded)]
    assert (end.outcome, end.by, end.reason) == ("answered", "ann", "because")
    (given,) = [event for _, event in p.events if isinstance(event, ev.StepSucceeded)]
    assert given.given_by == "ann"
    assert ended(p) == good


@pytest.mark.feature("D3")
def test_an_answer_without_a_key_needs_exactly_one_open_wait() -> None:
    p = pair()
    definition = waiter("ask", prompt="one?")
    definition["nodes"]["v"] = {"kind": "wait_event", "wait": {"event": "e"}}
    definition["nodes"]["s"] = {"kind": "sleep", "wait": {"seconds": 9}}
    definition["edges"].append(["v", "b"])
    p.start("r", definition)
    p.command("r", "respond", value='"x"')
    assert refusal(p).code == "no_such_wait"
    assert "open: v, w" in refusal(p).reason
    p.command("r", "respond", step_id="s", value='"x"')
    assert refusal(p).code == "no_such_wait"
    p.command("r", "respond", step_id="v", value="1")
    p.command("r", "respond", value='"x"')
    assert p.run("r").steps["w"].output == '"x"'


def test_an_answer_counts_once() -> None:
    p = pair()
    p.start("r", waiter("ask", prompt="?"))
    p.command("r", "respond", step_id="w", value='"first"', command_id="c1")
    p.command("r", "respond", step_id="w", value='"second"', command_id="c1")
    p.command("r", "respond", step_id="w", value='"third"', command_id="c2")
    assert refusal(p).code == "no_such_wait"
    assert ended(p) == '"first"'


# --- giving up --------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("D3")
@pytest.mark.parametrize(
    ("kind", "settings"), [("ask", {"prompt": "?"}), ("wait_event", {"event": "e"}), ("sleep", {"seconds": 100})]
)
def test_a_wait_that_takes_too_long_fails_or_goes_on_with_a_value(kind: str, settings: dict[str, Any]) -> None:
    p = pair()
    p.start("fails", waiter(kind, timeout_s=10, **settings))
    p.start(
        "goes-on",
        waiter(kind, timeout_s=10, on_timeout="value", timeout_value={"n": "${ input.n }"}, **settings),
        {"n": 5},
    )
    p.pass_time_with_heartbeats(9_999)
    assert p.run("fails").status == "waiting"
    p.pass_time_with_heartbeats(1)
    assert (p.run("fails").status, p.run("fails").code) == ("failed", "wait_timed_out")
    assert "10 s" in p.run("fails").reason
    assert ended(p, "goes-on") == '{"n":5}'
    p.command("fails", "respond", value='"late"')
    assert refusal(p).code == "run_is_over"


@pytest.mark.feature("P4")
def test_an_approval_that_expires_is_no_rejection() -> None:
    p = pair()
    ask = {"when": "true", "then": "require_approval"}
    for_ever = {"name": "for-ever", **ask, "when": "run.id == 'never'"}
    in_time = {"name": "in-time", **ask, "when": "run.id == 'r'", "expires_s": 1}
    p.policy({"policy": "ask", "version": "1", "rules": [for_ever, in_time]})
    p.start("never", chain("a"))
    p.start("r", chain("a"))
    assert p.run("r").steps["a"].status == "awaiting_approval"
    p.pass_time_with_heartbeats(999)
    assert p.run("r").status == "waiting"
    p.pass_time_with_heartbeats(1)
    assert (p.run("r").status, p.run("r").code) == ("failed", "approval_expired")
    assert "ApprovalResolved" not in p.seen("r")
    p.command("r", "approve", step_id="a")
    assert refusal(p).code == "run_is_over"
    assert not p.tasks
    assert p.run("never").status == "waiting"


# --- which question ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P4")
def test_an_answer_to_an_earlier_question_is_no_answer_to_this_one() -> None:
    p = pair()
    p.policy({"policy": "ask", "version": "1", "rules": [{"name": "r", "when": "true", "then": "require_approval"}]})
    p.start("r", chain("pay", pay=step(idempotent=False)))
    for wrong in ({"attempt": 2}, {"why": "outcome_unknown"}, {"attempt": 2, "why": "policy"}):
        p.command("r", "approve", step_id="pay", **wrong)
        assert refusal(p).code == "other_question"
        assert "attempt 1 (policy)" in refusal(p).reason
    p.command("r", "approve", step_id="pay", attempt=1, why="policy")
    p.register("worker-0", 2, 10, STEPS, ended=(EndedIncarnation(incarnation=1, evidence="pid gone"),))
    p.command("r", "approve", step_id="pay", attempt=1, why="policy")
    assert refusal(p).code == "other_question", "it was asked for another reason meanwhile"
    assert p.run("r").steps["pay"].approval is not None


@pytest.mark.feature("P4")
@pytest.mark.parametrize("answer", ["approve", "reject"])
def test_an_answer_does_not_count_for_the_question_that_the_same_attempt_asks_next(answer: str) -> None:
    """First a rule asks about the attempt, then a budget does: whoever answers the first twice has not answered the second."""
    p = pair()
    p.policy({"policy": "ask", "version": "7", "rules": [{"name": "r", "when": "true", "then": "require_approval"}]})
    budget = {"kind": "budget", "budget": "daily", "version": "3", "window": "day", "on_exceed": "ask"}
    p.policy(budget | {"account": "acme", "limits": {"money_micros": 5}})
    p.start("r", chain("pay", pay=step(reserve_micros=10)))
    first = p.run("r").steps["pay"].approval
    assert first is not None
    about = {"step_id": "pay", "attempt": 1, "why": "policy"}
    p.command("r", "approve", **about, question=question_id(first))
    second = p.run("r").steps["pay"].approval
    assert second is not None
    assert (first.rule, first.policy, second.rule) == ("r", "ask@7", "budget:daily")
    p.command("r", answer, **about, question=question_id(first))
    assert refusal(p).code == "other_question"
    assert f"rule budget:daily of {second.policy}, question {question_id(second)}" in refusal(p).reason
    assert p.run("r").steps["pay"].approval == second
    p.command("r", answer, **about, question=question_id(second))
    assert len(p.tasks) == (answer == "approve")


def unknown_outcome() -> Pair:
    """Return a pair in which run r asks what became of the first attempt of pay."""
    p = pair()
    p.start("r", chain("pay", "b", pay=step(idempotent=False, reserve_micros=10)))
    p.register("worker-0", 2, 10, STEPS, ended=(EndedIncarnation(incarnation=1, evidence="pid gone"),))
    return p


UNKNOWN = {
    "timed_out": {"error_class": "TimedOut", "error_message": "not finished after 2 s", "retryable": False},
    "died": {"error_class": "Died", "error_message": "its process was ended by SIGKILL", "retryable": False},
}
ONCE = step(idempotent=False, reserve_micros=10, max_attempts=5)


@pytest.mark.feature("T2")
@pytest.mark.parametrize("outcome", sorted(UNKNOWN))
def test_a_time_out_and_a_death_ask_what_became_of_what_must_not_be_repeated(outcome: str) -> None:
    p = pair()
    p.start("r", chain("pay", "b", pay=ONCE))
    first = p.tasks.popleft()
    p.answer(first, outcome, actual_micros=4, **UNKNOWN[outcome])
    assert (p.run("r").status, p.dispatches, p.money()) == ("waiting", [("pay", 1)], (0, 4))
    asked = p.run("r").steps["pay"].approval
    assert asked is not None
    assert (asked.why, asked.attempt) == ("outcome_unknown", 1)
    assert f"{UNKNOWN[outcome]['error_class']}: {UNKNOWN[outcome]['error_message']}" in asked.reason
    p.pass_time_with_heartbeats(100_000)
    p.answer(first, value="it had happened")  # a second word about one attempt
    assert p.run("r").status == "waiting"
    p.command("r", "respond", value='"again"')
    assert p.dispatches == [("pay", 1), ("pay", 2)]
    p.answer(p.tasks.popleft(), outcome, actual_micros=4, **UNKNOWN[outcome])
    p.command("r", "respond", value='{"done":{"receipt":7}}', by="ann", attempt=2, why="outcome_unknown")
    p.answer(p.tasks.popleft(), value="shipped")
    assert (ended(p), p.money()) == ('"shipped"', (0, 8))


@pytest.mark.feature("T2")
def test_an_error_that_was_raised_is_a_known_outcome_even_if_it_is_called_like_an_unknown_one() -> None:
    p = pair()
    p.start("r", chain("pay", pay=ONCE))
    p.answer(p.tasks.popleft(), "failed", **UNKNOWN["died"] | {"retryable": True})
    p.pass_time(1_000)
    assert p.dispatches == [("pay", 1), ("pay", 2)]
    p.answer(p.tasks.popleft(), "failed", **UNKNOWN["died"])
    assert (p.run("r").status, p.run("r").code) == ("failed", "not_retryable")


@pytest.mark.feature("T2")
@pytest.mark.parametrize("outcome", sorted(UNKNOWN))
def test_what_may_be_repeated_is_repeated_whatever_became_of_it(outcome: str) -> None:
    p = pair()
    p.start("r", chain("pay", pay=step()))
    p.answer(p.tasks.popleft(), outcome, **UNKNOWN[outcome] | {"retryable": True})
    p.pass_time(1_000)
    assert p.dispatches == [("pay", 1), ("pay", 2)]


@pytest.mark.feature("T2")
@pytest.mark.parametrize("answer", ["fail", "done"])
def test_an_agent_hears_what_a_human_says_of_its_tool_that_timed_out(answer: str) -> None:
    p = Pair(functions=("agent:bot", "tool:pay", "tool:look"))
    document = {
        "name": "agent:bot",
        "version": "1",
        "nodes": {"bot": {"kind": "agent", "function": "bot"}},
        "functions": {"bot": agent("pay", "look"), "pay": tool(idempotent=False), "look": tool()},
    }
    p.start("r", document)
    calls = [{"id": name, "name": name, "arguments": {}} for name in ("pay", "look")]
    p.answer(p.tasks.popleft(), value={"content": "", "tool_calls": calls})
    tasks = {task.step_id: task for task in p.tasks}
    p.tasks.clear()
    p.answer(tasks["bot/1/tool:pay"], "timed_out", **UNKNOWN["timed_out"])
    p.answer(tasks["bot/1/tool:look"], value="seen")
    assert (p.run("r").status, p.tasks) == ("waiting", deque())
    p.command("r", "respond", value='"fail"' if answer == "fail" else '{"done":"paid"}', by="ann", reason="no money")
    (turn,) = p.tasks
    assert turn.call is not None
    (observed,) = [call for call in canonical.loads(turn.call.arguments)["history"][0]["calls"] if call["id"] == "pay"]
    expected = (False, "rejected by ann: no money") if answer == "fail" else (True, None)
    assert (observed["ok"], observed["error"]) == expected


@pytest.mark.feature("T2")
def test_however_often_it_is_lost_a_human_is_asked() -> None:
    p = pair()
    p.start("r", chain("pay", pay=ONCE))
    for number in range(2, decide.MAX_LOSSES + 3):
        ended_before = EndedIncarnation(incarnation=number - 1, evidence="pid gone")
        p.register("worker-0", number, 10, STEPS, ended=(ended_before,))
        assert p.run("r").status == "waiting"
        p.command("r", "respond", value='"again"')
        p.tasks.clear()
    assert p.run("r").status == "running"


@pytest.mark.feature("T2")
def test_an_unknown_outcome_is_given_by_a_human() -> None:
    p = unknown_outcome()
    for bad in ('"yes"', '{"done":1,"x":2}', "null", '{"again":1}'):
        p.command("r", "respond", value=bad)
        assert refusal(p).code == "invalid_answer"
    p.command("r", "respond", step_id="pay", value='{"done":{"receipt":7}}', by="ann", attempt=1, why="outcome_unknown")
    (given,) = [event for _, event in p.events if isinstance(event, ev.StepSucceeded)]
    assert (given.given_by, given.attempt, given.output) == ("ann", 0, '{"receipt":7}')
    (resolved,) = [event for _, event in p.events if isinstance(event, ev.ApprovalResolved)]
    assert resolved.answer == "done"
    late = p.tasks.popleft()
    assert (late.step_id, late.attempt) == ("pay", 1)
    p.answer(late, value={"receipt": 8}, actual_micros=9)  # it ran after all: its cost counts, its word does not
    assert ended(p) == '{"receipt":7}'
    assert p.money() == (0, 9)
    assert p.dispatches == [("pay", 1), ("b", 1)]


@pytest.mark.feature("T2")
@pytest.mark.parametrize(("command", "fields"), [("respond", {"value": '"again"'}), ("approve", {})])
def test_an_unknown_outcome_is_run_again_only_if_a_human_says_so(command: str, fields: dict[str, Any]) -> None:
    p = unknown_outcome()
    assert p.dispatches == [("pay", 1)]
    p.command("r", command, **fields)
    assert p.dispatches == [("pay", 1), ("pay", 2)]
    (resolved,) = [event for _, event in p.events if isinstance(event, ev.ApprovalResolved)]
    assert resolved.answer == "again"


@pytest.mark.feature("T2")
@pytest.mark.parametrize(("command", "fields"), [("respond", {"value": '"fail"'}), ("reject", {})])
def test_an_unknown_outcome_fails_if_a_human_says_so(command: str, fields: dict[str, Any]) -> None:
    p = unknown_outcome()
    p.command("r", command, by="ann", **fields)
    assert (p.run("r").status, p.run("r").code) == ("failed", "rejected")
    assert p.dispatches == [("pay", 1)]


def test_an_approval_is_no_wait_to_respond_to() -> None:
    p = pair()
    p.policy({"policy": "ask", "version": "1", "rules": [{"name": "r", "when": "true", "then": "require_approval"}]})
    p.start("r", chain("a"))
    p.command("r", "respond", step_id="a", value='"yes"')
    assert "approve or reject it" in refusal(p).reason


# --- definitions --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        ({"kind": "sleep"}, "must say `seconds`"),
        ({"kind": "sleep", "wait": {"seconds": "soon"}}, "must be an expression"),
        ({"kind": "sleep", "wait": {"seconds": -1}}, "minimum"),
        ({"kind": "sleep", "wait": {"seconds": 1, "prompt": "?"}}, "sleep has no such setting"),
        ({"kind": "sleep", "function": "b", "wait": {"seconds": 1}}, "runs no function"),
        ({"kind": "wait_until", "wait": {"at": "tomorrow"}}, "must be a time such as"),
        ({"kind": "wait_until", "wait": {"at": "2030-01-01T00:00:00"}}, "with its offset"),
        ({"kind": "wait_event", "wait": {"event": "e", "key": "${ 1 + }"}}, "does not compile"),
        ({"kind": "wait_event", "wait": {"event": "no name"}}, "does not match"),
        ({"kind": "wait_event", "input": 1, "wait": {"event": "e"}}, "has no input"),
        ({"kind": "ask", "wait": {"prompt": "?", "free_text": False}}, "needs `choices` or a `schema`"),
        ({"kind": "ask", "wait": {"prompt": "?", "choices": []}}, "non-empty"),
        ({"kind": "ask", "wait": {"prompt": "?", "schema": {"type": "text"}}}, "not a JSON Schema"),
        ({"kind": "ask", "wait": {"prompt": "?", "on_timeout": "value"}}, "needs `timeout_s`"),
        ({"kind": "ask", "wait": {"prompt": "?", "timeout_s": 1, "timeout_value": 1}}, "on_timeout: value"),
        ({"kind": "step", "function": "b", "wait": {"seconds": 1}}, "has no `wait`"),
        ({"kind": "step"}, "needs `function`"),
    ],
)
def test_a_definition_that_cannot_wait_is_refused(node: dict[str, Any], problem: str) -> None:
    definition = waiter("sleep", seconds=1)
    definition["nodes"]["w"] = node
    found = validate_definition(definition)
    assert any(problem in line for line in found), found


@pytest.mark.feature("D3")
def test_a_timer_that_cannot_be_decided_on_ends_its_run_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised, it would end the owner, and every owner after it that comes to this timer: the partition would be lost."""
    p = pair()
    for run_id in ("bad", "good"):
        p.start(run_id, waiter("sleep", seconds=60))
    on_due = waiting.on_due

    def broken(run: RunState, step: StepState, now_ms: int) -> list[Any]:
        if run.run_id == "bad":
            raise RecursionError("too deep")
        return on_due(run, step, now_ms)

    monkeypatch.setattr(waiting, "on_due", broken)
    p.pass_time_with_heartbeats(60_000)
    bad = p.run("bad")
    assert (bad.status, bad.code) == ("failed", "internal_error")
    assert bad.reason.endswith("deciding on a timer failed: RecursionError: too deep")
    assert {step.status for step in bad.steps.values()} == {"cancelled"}
    assert ended(p, "good") == "null"
