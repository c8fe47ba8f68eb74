"""What a function can ask and report while it runs, and the kit for trying functions in a test."""

import asyncio

import pytest

from tidegate import (
    App,
    AppError,
    NotJsonError,
    OutsideStepError,
    Plan,
    ToolCall,
    context,
    idempotency_key,
    report_cost,
    report_usage,
)
from tidegate.domain import identity
from tidegate.sdk import testkit
from tidegate.sdk.errors import BadArgumentsError


@pytest.mark.parametrize("ask", [context, idempotency_key, lambda: report_cost(1), lambda: report_usage(tokens=1)])
def test_outside_of_a_step_there_is_nothing_to_ask(ask):
    with pytest.raises(OutsideStepError, match="testkit"):
        ask()


@pytest.mark.feature("T3")
def test_the_key_is_the_same_for_all_attempts_and_no_other_step():
    keys = []
    for step, attempt in (("a", 1), ("a", 2), ("b", 1)):
        with testkit.step_context("run", step, attempt=attempt):
            keys.append(idempotency_key())
            assert context().attempt == attempt
    assert keys[0] == keys[1] == identity.idempotency_key("run", "a")
    assert keys[2] != keys[0]


def test_reports_add_up_and_are_checked():
    with testkit.step_context() as meter:
        assert meter.cost_micros is None
        report_cost(3)
        report_cost(0)
        report_usage(tokens=2, calls=1)
        report_usage(tokens=5)
        for wrong in (-1, 1.5, True, "1", 2**63):
            with pytest.raises(ValueError, match="whole number"):
                report_cost(wrong)
        with pytest.raises(ValueError, match="would be"):
            report_cost(2**53 - 2)
        with pytest.raises(ValueError, match="named by text"):
            meter.add_usage({1: 1})
        with pytest.raises(ValueError, match="'tokens'"):
            report_usage(calls=1, tokens=-1)
    assert (meter.cost_micros, meter.usage) == (3, {"tokens": 7, "calls": 1})


def test_concurrent_attempts_on_one_loop_do_not_see_each_other():
    async def attempt(name: str) -> tuple[str, int | None]:
        with testkit.step_context("run", name) as meter:
            await asyncio.sleep(0)
            report_cost(len(name))
            await asyncio.gather(asyncio.to_thread(report_cost, 10))
            return context().step_id, meter.cost_micros

    async def both():
        return await asyncio.gather(attempt("a"), attempt("bb"))

    assert asyncio.run(both()) == [("a", 11), ("bb", 12)]


def test_remaining_time():
    with testkit.step_context(timeout_s=60):
        assert 0 < context().remaining_s() <= 60


@pytest.fixture
def app():
    app = App("shop")

    @app.tool
    async def look_up(order_id: str) -> dict:
        return {"id": order_id, "key": idempotency_key()}

    @app.tool
    def fails() -> None:
        raise RuntimeError("no")

    @app.tool
    def not_mine() -> None: ...

    @app.agent(tools=[look_up, fails])
    def triage(state):
        if state.turn == 1:
            calls = [("look_up", {"order_id": state.input}), ("look_up", {}), ("fails", {}), ("not_mine", {})]
            return Plan("looking", [ToolCall(name, arguments, "same-id") for name, arguments in calls])
        return {
            "found": state.output_of("look_up")["id"],
            "errors": [o.error for o in state.observations() if not o.ok],
        }

    @app.agent
    def endless(state):
        return Plan("thinking", final=False)

    @app.step
    def bad(x) -> object:
        return {x}

    return app


@pytest.mark.feature("T1")
def test_an_agent_can_be_tried_without_kafka(app):
    done = testkit.run_agent(app, "triage", "A7")
    assert done.output == {
        "found": "A7",
        "errors": [
            "BadArguments: order_id: is missing",
            "RuntimeError: no",
            "unknown tool 'not_mine'",
        ],
    }
    assert len(done.plans) == 2
    assert done.state.turn == 2


def test_an_agent_that_never_ends_is_stopped(app):
    with pytest.raises(AppError, match="no final plan in 20 turns"):
        testkit.run_agent(app, "endless")


def test_functions_can_be_called_as_an_executor_would(app):
    assert testkit.call(app, "look_up", {"order_id": "A"})["id"] == "A"
    with pytest.raises(BadArgumentsError):
        testkit.call(app, "look_up", {"order_id": 1.5})
    with pytest.raises(NotJsonError, match="set"):
        testkit.call(app, "bad", 1)
    with pytest.raises(AppError, match="no function 'nobody'"):
        testkit.call(app, "nobody")
