"""Outside tools as authors declare them, and as a rehearsal plays them."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from tidegate import App, AppError, Plan, State, ToolCall, functions_of
from tidegate.testing import CommandRefusedError, Rehearsal


class Quote(pydantic.BaseModel):
    cents: int


app = App("quotes")
quote = app.outside_tool(
    "quote",
    description="What an item costs.",
    parameters={"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    output=Quote,
    timeout_s=3600,
)


@app.agent(tools=[quote])
def clerk(state: State) -> Plan:
    if state.turn == 1:
        return Plan(tool_calls=[ToolCall("quote", {"item": state.input}, id="c1")])
    (seen,) = state.observations()
    return Plan(output=seen.output if seen.ok else seen.error)


@pytest.mark.feature("T4")
def test_it_is_pinned_and_offered_by_nobody() -> None:
    pinned = app.agent_definition("clerk")["functions"]["quote"]
    assert pinned["outside"]
    assert pinned["timeout_ms"] == 3_600_000
    assert pinned["output"]["required"] == ["cents"]
    assert functions_of(app) == ["agent:clerk"]


@pytest.mark.feature("T4")
def test_the_test_answers() -> None:
    with Rehearsal(app) as rehearsal:
        outcome = rehearsal.run(agent="clerk", input="tea")
        (wait,) = outcome.waits
        assert (wait.kind, wait.function, wait.arguments, wait.key) == ("outside", "quote", {"item": "tea"}, "c1")
        assert outcome.run.needs_human
        with pytest.raises(CommandRefusedError, match="cents"):
            rehearsal.respond({"cents": "many"})
        assert rehearsal.respond({"cents": 7}).output == {"cents": 7}


@pytest.mark.feature("T4")
@pytest.mark.parametrize(
    ("act", "output"),
    [
        ({"returns": {"cents": 5}}, {"cents": 5}),
        ({"calls": lambda item: {"cents": len(item)}}, {"cents": 3}),
        ({"raises": KeyError("tea")}, "rejected by rehearsal: KeyError: 'tea'"),
    ],
)
def test_a_stand_in_answers(act: dict[str, Any], output: Any) -> None:
    with Rehearsal(app) as rehearsal:
        stub = rehearsal.stub("quote", **act)
        assert rehearsal.run(agent="clerk", input="tea").output == output
        assert stub.calls == [{"item": "tea"}]


@pytest.mark.feature("T4")
@pytest.mark.parametrize("act", [{"lost": True}, {"takes_s": 3600}])
def test_a_stand_in_that_gives_no_answer(act: dict[str, Any]) -> None:
    with Rehearsal(app) as rehearsal:
        rehearsal.stub("quote", **act)
        assert rehearsal.run(agent="clerk", input="tea").status == "waiting"
        assert "nothing came within 3600 s" in rehearsal.pass_time(3600).output


def test_a_stand_in_whose_answer_does_not_fit_is_a_mistake_of_the_test() -> None:
    with Rehearsal(app) as rehearsal:
        rehearsal.stub("quote", returns=1)
        with pytest.raises(CommandRefusedError, match="invalid_answer"):
            rehearsal.run(agent="clerk", input="tea")


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": 8 * 24 * 3600}, {"timeout_s": float("nan")}])
def test_a_time_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(AppError, match="timeout_s must be"):
        App("a").outside_tool("t", **options)


def test_a_name_is_given_once() -> None:
    made = App("a")
    made.outside_tool("t")
    with pytest.raises(AppError, match="has a tool of that name already"):
        made.outside_tool("t")
    with pytest.raises(AppError, match="has a tool of that name already"):
        made.step(name="t")(lambda: None)
