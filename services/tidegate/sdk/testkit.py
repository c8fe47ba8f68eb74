"""Trying functions and agents of an app in a test, without Kafka: nothing is recorded, retried or budgeted."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import inspect
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from tidegate.domain import canonical, identity
from tidegate.sdk import json_form
from tidegate.sdk.app import App
from tidegate.sdk.binding import AGENT, TOOL
from tidegate.sdk.context import Meter, StepContext, running
from tidegate.sdk.errors import AppError, BadArgumentsError
from tidegate.sdk.functions import Function
from tidegate.sdk.plan import Plan, State, ToolCall, plan_of

MAX_TURNS: Final = 20


class Conversation(NamedTuple):
    """What an agent did: its final output, every plan it made, and the State after the last one."""

    output: Any
    plans: list[Plan]
    state: State


@contextlib.contextmanager
def step_context(
    run_id: str = "test", step_id: str = "step", *, attempt: int = 1, timeout_s: float = 30.0
) -> Iterator[Meter]:
    """Make `context()`, `idempotency_key()` and the reports work inside the block; yields what was reported."""
    meter = Meter()
    deadline = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=timeout_s)
    key = identity.idempotency_key(run_id, step_id)
    with running(StepContext(run_id, step_id, attempt, identity.DEFAULT_ACCOUNT, "", key, deadline), meter):
        yield meter


def call(app: App, name: str, arguments: Any = None, *, step_id: str | None = None) -> Any:
    """Call a function of the app as an executor would: arguments checked, output as the JSON value that is recorded.

    Raises BadArgumentsError, NotJsonError, AppError for an unknown name, and whatever the function raises.
    """
    function = app.functions.get(name)
    if function is None:
        raise AppError(f"app {app.name!r} has no function {name!r}")
    return json_form.to_json(_call(function, json_form.to_json(arguments, "arguments"), step_id or name))


def run_agent(app: App, agent: str, input: Any = None, *, max_turns: int = MAX_TURNS) -> Conversation:  # noqa: A002 - the word of the request
    """Ask an agent and call its tools until its plan is final.

    As in a run, a tool that fails, is unknown or gets bad arguments becomes an observation. Raises AppError if there is no
    final plan after `max_turns`.
    """
    function = app.functions.get(agent)
    if function is None or function.kind != AGENT:
        raise AppError(f"app {app.name!r} has no agent {agent!r}")
    plans: list[Plan] = []
    state: dict[str, Any] = {"input": json_form.to_json(input, "input"), "turn": 1, "history": []}
    for turn in range(1, max_turns + 1):
        plan = plan_of(_call(function, state, identity.agent_turn_step(agent, turn)))
        plans.append(plan)
        recorded = plan.to_json()
        if plan.final or (plan.final is None and not plan.tool_calls):
            output = recorded["output"] if recorded["output"] is not None else plan.content
            return Conversation(output, plans, State.from_json(state))
        calls = [_observe(app, function, call) for call in plan.tool_calls]
        state = {**state, "turn": turn + 1, "history": [*state["history"], {"content": plan.content, "calls": calls}]}
    raise AppError(f"agent {agent!r} made no final plan in {max_turns} turns")


def _observe(app: App, agent: Function, wish: ToolCall) -> dict[str, Any]:
    tool = app.functions.get(wish.name)
    seen: dict[str, Any] = {"id": wish.id, "name": wish.name, "arguments": dict(wish.arguments)}
    if tool is None or tool.kind != TOOL or wish.name not in agent.tools:
        return {**seen, "ok": False, "output": None, "error": f"unknown tool {wish.name!r}"}
    try:
        output = json_form.to_json(_call(tool, json_form.to_json(wish.arguments), f"tool:{wish.name}"))
    except Exception as error:  # whatever a tool raises, the agent is told
        name = "BadArguments" if isinstance(error, BadArgumentsError) else type(error).__name__
        return {**seen, "ok": False, "output": None, "error": f"{name}: {error}"}
    return {**seen, "ok": True, "output": output, "error": None}


def _call(function: Function, arguments: Any, step_id: str) -> Any:
    bound = function.binder.bind(canonical.dumps(arguments))
    with step_context(step_id=step_id):
        returned = function.call(*bound.args, **bound.kwargs)
        return asyncio.run(_finish(returned)) if inspect.iscoroutine(returned) else returned


async def _finish(coroutine: Any) -> Any:
    return await coroutine
