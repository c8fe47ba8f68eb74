"""What flows call besides steps: agents, tools, waits, other workflows. All of it on the rehearsal's scheduler and gate."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any

import pytest

from tidegate import App, CallFailedError, FlowError, Goto, GraphError, Plan, State, ToolCall
from tidegate.domain import canonical
from tidegate.sdk.errors import AppError, BadArgumentsError, NotJsonError
from tidegate.testing import CommandRefusedError, Outcome, Rehearsal

pytestmark = pytest.mark.feature("T6")


class Calls:
    """An app with something of every kind, whose flow `f` is what a test says."""

    def __init__(self, flow: Callable[..., Any], **options: Any) -> None:
        self.app = App("calls")

        @self.app.step
        def double(n: int) -> int:
            return 2 * n

        @self.app.tool
        def look(key: str, times: int = 1) -> str:
            return key * times

        @self.app.agent(tools=[look])
        def clerk(state: State) -> Plan:
            if state.turn == 1:
                return Plan(tool_calls=[ToolCall("look", {"key": str(state.input), "times": 2})], final=False)
            return Plan(output={"found": state.output_of("look")})

        @self.app.agent
        def broken(state: State) -> Plan:
            raise ValueError("no model")

        self.double, self.look, self.clerk, self.broken = double, look, clerk, broken
        self.inner = self.app.graph("inner").node("double", double)

        @self.app.flow(steps=[double])
        async def other(n: int) -> int:
            return (await double(n)).value + 1  # type: ignore[misc]  # in a flow, calls are awaited

        self.other = other
        given = {"steps": [double, look, clerk, broken], "workflows": [self.inner, other], **options}

        @self.app.flow(name="f", **given)
        async def play(value: Any = None) -> Any:
            return await flow(self, value)

    def run(self, value: Any = None) -> Outcome:
        self.rehearsal = Rehearsal(self.app)
        return self.rehearsal.run("f", value)


def nodes_of(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for event in outcome.seen("GraphChangeProposed"):
        found |= canonical.loads(event.change)["nodes"] if event.kind == "flow" else {}
    return found


def test_an_agent_is_called_like_a_step_and_its_tools_are_steps() -> None:
    async def ask_clerk(c: Calls, value: Any) -> Any:
        first, second = await asyncio.gather(c.clerk("a"), c.clerk("b"))
        return [first.value, (await c.clerk(second)).value, first.producer]

    outcome = Calls(ask_clerk).run()
    assert outcome.output == [{"found": "aa"}, {"found": "{'found': 'bb'}" * 2}, "clerk"], outcome.reason
    assert [step for step in outcome.steps if step.startswith("f/clerk/")] == [
        "f/clerk/1",
        "f/clerk/1/tool:look",
        "f/clerk/2",
    ]
    assert nodes_of(outcome)["f/clerk#2"] == {"kind": "agent", "function": "clerk"}


def test_a_tool_is_called_with_its_arguments_by_name_or_place() -> None:
    async def look(c: Calls, value: Any) -> Any:
        return [(await c.look("x")).value, (await c.look("y", times=3)).value]

    outcome = Calls(look).run()
    assert outcome.output == ["x", "yyy"], outcome.reason
    assert nodes_of(outcome)["f/look#2"] == {"kind": "tool", "function": "look"}


def test_an_agent_that_fails_raises_where_it_is_awaited() -> None:
    async def careful(c: Calls, value: Any) -> Any:
        try:
            await c.broken(1)
        except CallFailedError as error:
            return [error.node_id, "no model" in error.reason]

    assert Calls(careful).run().output == ["f/broken", True]


def test_runs_of_other_workflows_give_their_output_and_keep_to_their_budget() -> None:
    async def children(c: Calls, value: Any) -> Any:
        one, two = await asyncio.gather(c.app.workflow(c.inner, 4, budget_micros=7), c.app.workflow(c.other, 5))
        return [one.value, two.value, one.node_id, two.producer]

    outcome = Calls(children).run()
    assert outcome.output == [8, 11, "f/inner", "other"], outcome.reason
    (first, second) = outcome.seen("ChildStarted")
    assert (first.workflow, first.budget_micros, second.budget_micros) == ("inner@1", 7, None)
    assert nodes_of(outcome)["f/inner"] == {"kind": "workflow", "workflow": "inner@1"}


def test_a_child_that_fails_raises_where_it_is_awaited() -> None:
    async def careful(c: Calls, value: Any) -> Any:
        try:
            await c.app.workflow("inner", "no number")
        except CallFailedError as error:
            return error.node_id

    assert Calls(careful).run().output == "f/inner"


def test_what_is_open_when_a_flow_is_over_is_cancelled_children_too() -> None:
    async def leave(c: Calls, value: Any) -> Any:
        c.app.workflow(c.waiting)  # type: ignore[attr-defined]
        c.app.ask("well?")
        c.clerk("a")
        await c.app.sleep(5)
        return "left"

    async def never(value: Any = None) -> Any:
        await calls.app.wait_event("never")

    calls = Calls(leave)
    calls.waiting = calls.app.flow(name="waiting")(never)  # type: ignore[attr-defined]
    calls.app.functions["f"].children["waiting"] = never  # type: ignore[attr-defined]
    outcome = calls.run()
    if outcome.status == "waiting":
        outcome = calls.rehearsal.pass_time(6)
    assert (outcome.status, outcome.output) == ("succeeded", "left"), outcome.reason
    assert outcome.steps["f/ask"].status == outcome.steps["f/waiting"].status == "cancelled"
    assert calls.rehearsal.outcome(outcome.children[0]).status == "cancelled"


def test_times_pass_and_give_nothing() -> None:
    async def wait(c: Calls, value: Any) -> Any:
        first = await c.app.sleep(60)
        at = datetime.datetime(2031, 1, 1, tzinfo=datetime.UTC)
        second = await c.app.wait_until(at)
        third = await c.app.wait_until("2031-01-01T01:00:00+00:00")
        return [first.value, second.node_id, third.node_id, third.producer]

    calls = Calls(wait)
    outcome = calls.run()
    assert outcome.output == [None, "f/wait_until", "f/wait_until#2", "wait_until"], outcome.reason
    assert calls.rehearsal.now >= datetime.datetime(2031, 1, 1, 1, tzinfo=datetime.UTC)


def test_an_event_and_an_answer_are_values() -> None:
    async def wait(c: Calls, order: Any) -> Any:
        paid = await c.app.wait_event("paid", key=order)
        answer = await c.app.ask(f"refund {paid.value}?", choices=("yes", "no"))
        more = await c.app.ask("how much?", schema={"type": "integer"})
        return [paid.value, answer.value, more.value]

    calls = Calls(wait)
    outcome = calls.run(17)
    assert outcome.status == "waiting"
    assert [(wait.step_id, wait.key) for wait in outcome.run.waits] == [("f/wait_event", "17")]
    calls.rehearsal.signal("paid", {"amount": 3}, key="17")
    outcome = calls.rehearsal.respond("yes")
    assert outcome.run.waits[0].prompt == "how much?"
    assert calls.rehearsal.respond(4).output == [{"amount": 3}, "yes", 4]


def test_an_answer_that_is_wrong_leaves_the_question_open() -> None:
    async def wait(c: Calls, value: Any) -> Any:
        return (await c.app.ask("well?", choices=["yes"])).value

    calls = Calls(wait)
    calls.run()
    with pytest.raises(Exception, match="must be one of 'yes'"):
        calls.rehearsal.respond("no")
    assert calls.rehearsal.respond("yes").output == "yes"


def test_a_wait_that_is_given_up_fails_or_gives_its_value() -> None:
    async def wait(c: Calls, value: Any) -> Any:
        given = await c.app.ask("well?", timeout_s=5, timeout_value={"by": "default"})
        try:
            await c.app.wait_event("never", timeout_s=5)
        except CallFailedError as error:
            return [given.value, error.node_id]

    calls = Calls(wait)
    calls.run()
    assert calls.rehearsal.pass_time(11).output == [{"by": "default"}, "f/wait_event"]


def test_a_branch_goes_on_while_another_waits_for_a_person() -> None:
    async def both(c: Calls, value: Any) -> Any:
        async def quick() -> int:
            first = await c.double(1)
            return int((await c.double(first)).value)

        answer, number = await asyncio.gather(c.app.ask("well?"), quick())
        return [answer.value, number]

    calls = Calls(both)
    outcome = calls.run()
    assert outcome.steps["f/double#2"].status == "succeeded"
    assert calls.rehearsal.respond("ok").output == ["ok", 4]


def test_a_step_named_like_a_wait_is_another_call() -> None:
    app = App("named")

    @app.step(name="sleep")
    def snore(n: int) -> int:
        return n

    @app.flow(steps=[snore])
    async def night(n: int) -> list[str]:
        found = [await app.sleep(1), await snore(n), await app.sleep(1)]  # type: ignore[misc]
        return [result.node_id for result in found]

    with Rehearsal(app) as rehearsal:
        outcome = rehearsal.run("night", 1)
    assert outcome.output == ["night/sleep", "night/sleep#2", "night/sleep#3"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda c: c.double("x"), "arguments of step double: input: Input should be a valid integer"),
        (lambda c: c.look(5), "arguments of tool look: key"),
        (lambda c: c.look(), "missing a required argument: 'key'"),
        (lambda c: c.app.sleep("long"), "sleep: seconds: must be a number of seconds"),
        (lambda c: c.app.sleep(-1), "sleep.seconds: -1 is less than the minimum of 0"),
        (lambda c: c.app.wait_until("tomorrow"), "wait_until: at: must be a time such as"),
        (lambda c: c.app.wait_until(datetime.datetime(2030, 1, 1)), "wait_until: at: must be a time such as"),  # noqa: DTZ001
        (lambda c: c.app.wait_event("no name!"), "wait_event.event"),
        (lambda c: c.app.ask("well?", free_text=False), "without it the question needs `choices` or a `schema`"),
        (lambda c: c.app.ask("well?", schema={"type": "nothing"}), "ask.schema: not a JSON Schema"),
        (lambda c: c.app.ask("well?", timout_s=5), "'timout_s' was unexpected"),
        (lambda c: c.app.workflow("elsewhere"), "starts workflow 'elsewhere': its `workflows` do not name it"),
        (lambda c: c.app.workflow("inner", budget_micros=-1), "budget_micros of 'inner' must be a whole number"),
        (lambda c: c.app.workflow(7), "7 is no graph, no definition and no flow of this app"),
    ],
)
def test_a_call_that_is_wrong_is_refused_where_it_is_made(wrong: Callable[[Calls], Any], reason: str) -> None:
    async def caught(c: Calls, value: Any) -> str:
        try:
            await wrong(c)
        except (FlowError, BadArgumentsError, TypeError) as error:
            await c.double(1)  # it is played again, and refused again
            return str(error)
        return "nothing was wrong"

    outcome = Calls(caught).run()
    assert outcome.status == "succeeded", outcome.reason
    assert reason in outcome.output
    assert [step for step in outcome.steps if not step[2:].isdecimal()] in (["f/double"], ["f/double#2"])


def test_what_the_log_has_is_not_checked_again() -> None:
    """A run of before calls were checked where they are made goes on as its log says."""

    async def bad(c: Calls, value: Any) -> Any:
        try:
            await c.double("x")
        except CallFailedError:
            return "failed"

    calls = Calls(bad)
    call = {"id": "double", "function": "double", "hash": canonical.digest('"x"')}
    result = {"id": "double", "ok": False, "output": None, "error": "bad"}
    state = {"input": None, "turns": [{"calls": [call], "results": [result]}]}
    assert calls.app.functions["f"].call(state) == {"output": "failed"}


def test_code_that_waits_for_something_else_than_the_log_has_is_found_out() -> None:
    async def now(c: Calls, value: Any) -> Any:
        await c.app.sleep(calls.seconds)  # type: ignore[attr-defined]
        calls.seconds = 2  # type: ignore[attr-defined]
        await c.double(1)

    calls = Calls(now)
    calls.seconds = 1  # type: ignore[attr-defined]
    outcome = calls.run()
    assert outcome.status == "failed"
    assert 'the log has call sleep with other arguments than {"seconds":2}' in outcome.reason


def test_a_call_that_wants_to_choose_a_route_fails_the_run() -> None:
    async def go(c: Calls, value: Any) -> Any:
        await c.goes(1)  # type: ignore[attr-defined]

    calls = Calls(go, steps=["goes"])

    @calls.app.step
    def goes(n: int) -> Goto:
        return Goto("x", n)

    calls.goes = goes  # type: ignore[attr-defined]
    outcome = calls.run()
    assert (outcome.status, outcome.code) == ("failed", "bad_route")


def test_outside_flows_there_is_nothing_to_wait_for() -> None:
    with pytest.raises(FlowError, match="`sleep` of an app is for flows"):
        App("none").sleep(1)


def test_a_flow_pins_what_it_calls_and_what_that_calls() -> None:
    calls = Calls(test_outside_flows_there_is_nothing_to_wait_for)
    definition = calls.app.flow_definition("f")
    assert list(definition["functions"]) == ["broken", "clerk", "double", "f", "look"]
    other = calls.app.flow_definition("other")
    assert definition["functions"]["f"]["workflows"] == ["inner@1", f"other@{other['version']}"]
    assert definition["workflows"][f"other@{other['version']}"] == other
    assert "workflows" not in other


def test_a_flow_as_a_node_takes_its_children_along() -> None:
    async def child(c: Calls, value: Any) -> Any:
        return (await c.app.workflow(c.inner, value)).value

    calls = Calls(child)
    calls.app.graph("around").node("first", calls.double).node("f", "f").chain("first", "f")
    with Rehearsal(calls.app) as rehearsal:
        assert rehearsal.run("around", 3).output == 12


def test_a_flow_cannot_hold_itself() -> None:
    app = App("turning")

    @app.flow(workflows=["wheel"])
    async def wheel() -> None:
        await app.workflow("wheel")

    with pytest.raises((GraphError, AppError), match="wheel -> wheel: a workflow cannot hold itself"):
        app.flow_definition("wheel")


# --- tools that are done outside ---------------------------------------------------------------------------------------------

SIGNED = {"type": "object", "required": ["by"]}
POLICY = {
    "policy": "p",
    "version": "1",
    "rules": [
        {"name": "no-cheques", "when": 'tool == "sign" && args.paper == "cheque"', "then": "deny", "reason": "no"}
    ],
}


def signing(flow: Callable[..., Any], **options: Any) -> Rehearsal:
    """Return a stage for the flow `f`, which gets the outside tool `sign`."""
    app = App("outside")
    sign = app.outside_tool("sign", parameters={"required": ["paper"]}, output=SIGNED, timeout_s=60, cost_micros=5)

    @app.flow(steps=[sign])
    async def f(value: Any = None) -> Any:
        return await flow(sign, value)

    return Rehearsal(app, **options)


async def sign_two(sign: Any, value: Any) -> Any:
    async def outcome(paper: str) -> Any:
        try:
            return (await sign(paper=paper)).value
        except CallFailedError as error:
            return error.reason

    return await asyncio.gather(outcome("letter"), outcome(value))


def test_a_tool_that_is_done_outside_is_called_like_any_other() -> None:
    with signing(sign_two) as rehearsal:
        outcome = rehearsal.run("f", "will")
        assert [(wait.step_id, wait.kind, wait.function, wait.arguments, wait.key) for wait in outcome.waits] == [
            ("f/sign", "outside", "sign", {"paper": "letter"}, ""),
            ("f/sign#2", "outside", "sign", {"paper": "will"}, ""),
        ]
        assert outcome.run.needs_human
        with pytest.raises(CommandRefusedError, match="'by' is a required property"):
            rehearsal.respond({}, step_id="f/sign")
        assert rehearsal.respond({"by": "ann"}, step_id="f/sign").status == "waiting"
        outcome = rehearsal.reject("f/sign#2", reason="no witness")
        assert outcome.output == [{"by": "ann"}, "rejected by rehearsal: no witness"]
        assert outcome.spent_micros == 5


def test_a_flow_is_told_when_nobody_outside_answers_in_time() -> None:
    with signing(sign_two) as rehearsal:
        rehearsal.run("f", "will")
        rehearsal.respond({"by": "ann"}, step_id="f/sign#2")
        late = "nothing came within 60 s: an answer to the call of the outside tool sign"
        assert rehearsal.pass_time(60).output == [late, {"by": "ann"}]


def test_the_gate_is_asked_before_somebody_outside_does_what_a_flow_calls() -> None:
    with signing(sign_two, policies=[POLICY]) as rehearsal:
        stub = rehearsal.stub("sign", returns={"by": "ann"})
        assert rehearsal.run("f", "cheque").output == [{"by": "ann"}, "denied by no-cheques: no"]
        assert stub.calls == [{"paper": "letter"}]


def test_calls_of_outside_tools_are_open_no_longer_than_their_flow() -> None:
    with signing(sign_two) as rehearsal:
        rehearsal.run("f", "will")
        outcome = rehearsal.cancel()
        assert {step.status for step_id, step in outcome.steps.items() if "sign" in step_id} == {"cancelled"}
        with pytest.raises(CommandRefusedError, match="run_is_over"):
            rehearsal.respond({"by": "ann"}, step_id="f/sign")


@pytest.mark.parametrize("said", [{}, {"paper": object()}])
def test_arguments_of_outside_tools_are_checked_where_they_are_called(said: dict[str, Any]) -> None:
    async def wrongly(sign: Any, value: Any) -> Any:
        try:
            await sign(**said)
        except (BadArgumentsError, NotJsonError) as error:
            return str(error)

    with signing(wrongly) as rehearsal:
        outcome = rehearsal.run("f")
        assert ("'paper' is a required property" if not said else "has no JSON form") in outcome.output
        assert not outcome.seen("GraphChangeProposed")


def test_an_outside_tool_is_called_by_flows_that_name_it_and_by_nobody_else() -> None:
    app = App("outside")
    sign = app.outside_tool("sign")

    @app.flow
    async def forgetful() -> None:
        await sign()

    with Rehearsal(app) as rehearsal:
        assert "its `steps` do not name it" in rehearsal.run("forgetful").reason
    with pytest.raises(FlowError, match="tool 'sign' is done outside"):
        sign()
