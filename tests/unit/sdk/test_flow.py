"""Flows, from the function to the log: calls are steps, what came is not asked again, and changed code is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from support.pure import Pair
from tidegate import App, CallFailedError, Goto, Propose, functions_of, merge
from tidegate.domain import canonical, flow_turns
from tidegate.sdk.errors import NonRetryable
from tidegate.sdk.testkit import step_context

pytestmark = pytest.mark.feature("T6")


class World:
    """An app whose flow runs on a scheduler and a gate without a log."""

    def __init__(self, flow: Callable[..., Any], **options: Any) -> None:
        self.app = App("flows")
        self.done: list[Any] = []

        @self.app.step(retries=0)
        def double(n: int) -> int:
            self.done.append(n)
            if n < 0:
                raise ValueError("too small")
            return 2 * n

        @self.app.step
        def add(a: int, b: int) -> int:
            return a + b

        self.double, self.add = double, add
        sign = self.app.outside_tool("sign", parameters={"type": "object"})
        self.flow = flow
        self.app.flow(name="f", steps=[double, add, sign], **options)(self.play)
        self.p = Pair(functions=tuple(functions_of(self.app)))

    async def play(self, value: Any) -> Any:
        return await self.flow(self, value)

    def begin(self, value: Any = None) -> None:
        self.p.start("r", self.app.flow_definition("f"), value)

    def do(self, task: Any) -> None:
        function = self.app.functions[task.call.function]
        bound = function.binder.bind(task.call.arguments)
        try:
            with step_context("r", task.step_id):
                value = function.call(*bound.args, **bound.kwargs)
        except Exception as error:
            retryable = not isinstance(error, NonRetryable)
            self.p.answer(
                task, "failed", error_class=type(error).__name__, error_message=str(error), retryable=retryable
            )
        else:
            self.p.answer(task, value=value)

    def next(self, step_id: str) -> None:
        task = next(task for task in self.p.tasks if task.step_id == step_id and task.type == "run")
        self.p.tasks.remove(task)
        self.do(task)

    def finish(self) -> Any:
        while self.p.tasks:
            task = self.p.tasks.popleft()
            if task.type == "run":
                self.do(task)
        return self.run

    @property
    def run(self) -> Any:
        return self.p.run("r")


async def chain(w: World, n: int) -> int:
    first = await w.double(n)  # type: ignore[misc] # a step is awaited in flows
    second = await w.double(first)  # type: ignore[misc]
    return second.value


def test_calls_are_steps_and_nothing_is_done_twice() -> None:
    w = World(chain)
    w.begin(3)
    run = w.finish()
    assert (run.status, run.output) == ("succeeded", "12")
    assert list(run.steps) == ["f/1", "f/double", "f/2", "f/double#2", "f/3"]
    assert w.done == [3, 6]
    assert run.flow_turns == 3


def test_the_graph_has_the_calls_and_where_their_arguments_come_from() -> None:
    async def sums(w: World, n: int) -> Any:
        a, b = await asyncio.gather(w.double(n), w.double(n + 1))
        both = merge(a.value + b.value, a, b)
        total = await w.add(a, both)
        return {"value": total, "of": [total.node_id, total.producer, list(total.parents)], "id": a.artifact_id}

    w = World(sums)
    w.begin(1)
    run = w.finish()
    assert run.status == "succeeded", run.reason
    output = canonical.loads(run.output)
    assert output == {
        "value": 8,
        "of": ["f/add", "add", ["f/double", "f/double#2"]],
        "id": canonical.digest("2"),
    }
    edges = [
        edge
        for _, event in w.p.events
        if type(event).__name__ == "GraphChangeProposed"
        for edge in canonical.loads(event.change)["edges"]
    ]
    assert edges == [["f", "f/double"], ["f", "f/double#2"], ["f/double", "f/add"], ["f/double#2", "f/add"]]


def test_a_branch_goes_on_while_another_waits_and_plays_the_same_ever_after() -> None:
    async def branch(w: World, n: int) -> int:
        first = await w.double(n)
        second = await w.double(first)
        return second.value

    async def two(w: World, n: int) -> list[int]:
        return list(await asyncio.gather(branch(w, n), branch(w, n + 10)))

    w = World(two)
    w.begin(1)
    w.next("f/1")
    w.next("f/double#2")  # the second branch is faster
    w.next("f/2")
    assert "f/double#3" in w.run.steps
    assert canonical.loads(w.run.steps["f/double#3"].call.arguments) == 22
    run = w.finish()
    assert (run.status, run.output) == ("succeeded", "[4,44]"), run.reason


def test_a_gather_is_played_once_for_all_of_its_calls() -> None:
    async def many(w: World, n: int) -> list[int]:
        return [result.value for result in await asyncio.gather(*(w.double(i) for i in range(n)))]

    w = World(many)
    w.begin(5)
    run = w.finish()
    assert run.output == "[0,2,4,6,8]"
    assert run.flow_turns == 2


async def by_tasks(w: World, n: int) -> list[int]:
    tasks = [asyncio.create_task(w.double(i), name=f"double {i}") for i in range(n)]
    return [result.value for result in await asyncio.gather(*tasks)]


async def by_task_group(w: World, n: int) -> list[int]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(w.double(i)) for i in range(n)]
    return [task.result().value for task in tasks]


async def by_ensured_futures(w: World, n: int) -> list[int]:
    return [result.value for result in await asyncio.gather(*[asyncio.ensure_future(w.double(i)) for i in range(n)])]


def assert_fails(flow: Callable[..., Any], says: str) -> None:
    """A run of the flow ends at once, for a reason that says this."""
    w = World(flow)
    w.begin(1)
    run = w.finish()
    assert run.status == "failed"
    assert says in run.reason


@pytest.mark.parametrize("flow", [by_tasks, by_task_group, by_ensured_futures])
def test_a_call_is_a_task_already(flow: Any) -> None:
    w = World(flow)
    w.begin(5)
    run = w.finish()
    assert (run.status, run.output) == ("succeeded", "[0,2,4,6,8]"), run.reason
    assert run.flow_turns == 2


def test_a_task_of_a_call_is_a_branch_like_any_other() -> None:
    async def started(w: World, n: int) -> list[Any]:
        slow = asyncio.create_task(w.double(n), name="slow")
        fast = await w.double(n + 10)
        slow.cancel()
        try:
            await slow
        except asyncio.CancelledError:
            return [fast.value, slow.cancelled(), slow.get_name()]
        return []

    w = World(started)
    w.begin(1)
    w.next("f/1")
    w.next("f/double#2")
    w.next("f/2")
    assert (w.run.status, w.run.output) == ("succeeded", '[22,true,"slow"]'), w.run.reason
    assert w.run.steps["f/double"].status == "cancelled"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda w: asyncio.gather([w.double(1), w.double(2)]), "asyncio.gather(*calls)"),
        (lambda w: asyncio.gather(w.double(i) for i in range(2)), "asyncio.gather(*calls)"),
        (lambda w: asyncio.gather(w.double), "asyncio.gather(*calls)"),
        (lambda w: asyncio.wait(w.double(1)), "asyncio.gather(*calls)"),
        (lambda w: asyncio.create_task(w.double), "asyncio.create_task(call)"),
        (lambda w: asyncio.create_task([w.double(1)]), "asyncio.create_task(call)"),
    ],
)
def test_what_asyncio_does_not_take_is_refused_with_what_to_write_instead(wrong: Any, says: str) -> None:
    async def odd(w: World, n: int) -> None:
        await wrong(w)

    assert_fails(odd, says)


def test_an_error_of_the_flow_itself_stays_what_it_is() -> None:
    async def wrong(w: World, n: int) -> None:
        await asyncio.gather(w.double(n))
        n + "1"  # type: ignore[operator] # that is the point

    w = World(wrong)
    w.begin(1)
    run = w.finish()
    assert "unsupported operand" in run.reason
    assert "gather" not in run.reason


def test_what_is_waited_for_together_comes_in_the_same_order_in_each_turn() -> None:
    """Sets of futures are in the order of their addresses otherwise: another one in the next turn."""

    async def together(w: World, n: int) -> list[int]:
        calls = [w.double(i) for i in range(n)]
        done, _ = await asyncio.wait(calls)
        firsts = [(await w.double(call.result())).value for call in done]
        done, _ = await asyncio.wait([asyncio.create_task(branch(w, first)) for first in firsts])
        seconds = [(await w.double(task.result())).value for task in done]
        return seconds + [(await w.double(await future)).value for future in asyncio.as_completed(calls)]

    async def branch(w: World, value: int) -> int:
        return (await w.double(value)).value

    w = World(together)
    w.begin(8)
    run = w.finish()
    assert run.status == "succeeded", run.reason
    assert sorted(canonical.loads(run.output)) == sorted([16 * n for n in range(8)] + [4 * n for n in range(8)])


def test_a_call_that_fails_raises_where_it_is_awaited() -> None:
    async def careful(w: World, n: int) -> str:
        try:
            await w.double(n)
        except CallFailedError as error:
            return f"{error.node_id} failed"
        return "fine"

    w = World(careful)
    w.begin(-1)
    assert w.finish().output == '"f/double failed"'


def test_a_failure_that_is_not_caught_fails_the_run_and_cancels_what_is_open() -> None:
    async def careless(w: World, n: int) -> None:
        await asyncio.gather(w.double(n), w.double(-1))

    w = World(careless)
    w.begin(1)
    w.next("f/1")
    w.next("f/double#2")
    w.next("f/2")
    run = w.run
    assert (run.status, run.code) == ("failed", "not_retryable")
    assert "too small" in run.reason
    assert run.steps["f/double"].status == "cancelled"


def test_what_is_open_when_the_flow_returns_is_cancelled() -> None:
    async def first_wins(w: World, n: int) -> int:
        w.double(n)
        return (await w.double(n + 1)).value

    w = World(first_wins)
    w.begin(1)
    w.next("f/1")
    w.next("f/double#2")
    w.next("f/2")
    assert (w.run.status, w.run.output) == ("succeeded", "4")
    assert w.run.steps["f/double"].status == "cancelled"


def test_cancelling_the_run_reaches_calls_and_turns() -> None:
    w = World(chain)
    w.begin(3)
    w.next("f/1")
    w.p.command("r", "cancel")
    assert {step.status for step in w.run.steps.values()} == {"succeeded", "cancelled"}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (lambda w, n: w.add(n, 1), "the log has call double, and the code calls add"),
        (lambda w, n: w.double(n + 1), "the log has call double with other arguments than"),
    ],
)
def test_code_that_no_longer_matches_the_log_fails_with_the_call_that_differs(changed: Any, names: str) -> None:
    w = World(chain)
    w.begin(3)
    w.next("f/1")

    async def other(w: World, n: int) -> Any:
        return (await changed(w, n)).value

    w.flow = other
    run = w.finish()
    assert run.status == "failed"
    assert "FlowChangedError" in run.steps["f/2"].error or "does not do what its log says" in run.reason
    assert names in run.reason


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda: asyncio.sleep(1), "call_later"),
        (lambda: asyncio.to_thread(print), "run_in_executor"),
        (lambda: asyncio.Event().wait(), "it would wait for ever"),
    ],
)
def test_a_flow_awaits_calls_and_nothing_else(wrong: Any, reason: str) -> None:
    async def odd(w: World, n: int) -> None:
        await wrong()

    assert_fails(odd, reason)


def test_a_step_that_the_flow_does_not_name_is_refused_and_not_run() -> None:
    async def foreign(w: World, n: int) -> None:
        await w.other(n)  # type: ignore[attr-defined]

    w = World(foreign)

    @w.app.step
    def other(n: int) -> None:
        raise AssertionError("it ran")

    w.other = other  # type: ignore[attr-defined]
    w.begin(1)
    assert "its `steps` do not name it" in w.finish().reason


@pytest.mark.parametrize("returned", [Goto("x", 1), Propose({"nodes": {}}, 1)])
def test_a_flow_that_returns_what_only_steps_may_return_fails(returned: Any) -> None:
    async def choose(w: World, n: int) -> Any:
        return returned

    w = World(choose)
    w.begin(1)
    run = w.finish()
    assert run.status == "failed"
    assert f"returns {type(returned).__name__}: a flow gives its output and nothing else" in run.reason


def turn(*calls: str, waits: Any) -> dict[str, Any]:
    made = [{"id": name, "function": name.partition("#")[0], "arguments": 1, "parents": []} for name in calls]
    return {"calls": made, "waits": waits}


@pytest.mark.parametrize(
    ("calls", "waits", "reason"),
    [
        ([], [["double"]], "was not told of yet"),
        (["add"], [["add"], ["double"]], "was not told of yet"),
        (["double#2"], [[1]], "must wait for calls that were made"),
        (["double#2"], [[]], "must wait for calls that were made"),
        (["double#2"], "double#2", "must wait for calls that were made"),
        (["double#2"], [["double", "double#2"]], ""),
    ],
)
def test_a_turn_that_waits_for_nothing_that_is_to_come_is_refused(calls: list[str], waits: Any, reason: str) -> None:
    w = World(chain)
    w.begin(1)
    w.p.answer(w.p.tasks.popleft(), value=turn("double", waits=[["double"]]))
    w.next("f/double")
    w.p.answer(w.p.tasks.popleft(), value=turn(*calls, waits=waits))
    assert w.run.code == ("bad_output" if reason else "")
    assert reason in w.run.reason


async def some(w: World, n: int) -> int:
    for _ in range(n):
        await w.double(1)
    return n


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"kind": ["step"]}, "the calls of a turn must be a list of objects"),
        ({"kind": "map"}, "the calls of a turn must be a list of objects"),
        ({"kind": "sleep", "function": "ask"}, "the calls of a turn must be a list of objects"),
        ({"kind": "sleep", "function": "sleep", "arguments": 1}, "sleep: 1 is not of type 'object'"),
        ({"kind": "ask", "function": "ask", "arguments": {"prompt": ""}}, "ask.prompt: '' should be non-empty"),
        ({"kind": "workflow", "function": "w", "arguments": 1}, "the call of workflow w must say its input"),
        ({"kind": "workflow", "function": "w", "arguments": {"input": 1, "budget_micros": 0.5}}, "a whole number"),
        ({"kind": "workflow", "function": "w", "arguments": {"input": 1}}, "'w', which is not among its `workflows`"),
        ({"kind": "agent", "function": "double"}, "calls agent 'double', which is not among its `steps`"),
        ({"kind": "tool", "function": "rm"}, "calls tool 'rm', which is not among its `steps`"),
        (
            {"kind": "tool", "function": "sign"},
            "calls tool 'sign' with wrong arguments: arguments: 1 is not of type 'object'",
        ),
    ],
)
def test_a_turn_that_calls_what_a_flow_cannot_call_fails(call: dict[str, Any], reason: str) -> None:
    w = World(chain)
    w.begin(1)
    made = {"id": call.get("function", "double"), "function": "double", "arguments": 1, "parents": [], **call}
    w.p.answer(w.p.tasks.popleft(), value={"calls": [made], "waits": [[made["id"]]]})
    assert w.run.code == "bad_output"
    assert reason in w.run.reason
    assert list(w.run.steps) == ["f/1"]


def test_turns_do_not_count_against_max_steps_and_calls_do() -> None:
    w = World(some, max_steps=3)
    w.begin(3)
    assert w.finish().status == "succeeded"
    w = World(some, max_steps=3)
    w.begin(4)
    assert w.finish().code == "max_steps"


def test_a_run_holds_what_its_calls_gave_once() -> None:
    w = World(some)
    w.begin(3)
    steps = w.finish().steps
    assert [steps[f"f/{turn}"].call.arguments == "null" for turn in (1, 2, 3, 4)] == [True, True, True, False]
    assert [len(turn["results"]) for turn in canonical.loads(steps["f/4"].call.arguments)["turns"]] == [1, 1, 1]


def test_a_flow_whose_turns_would_be_told_too_much_together_fails_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow_turns, "MAX_TOLD", 2_000)
    w = World(some)
    w.begin(3)
    assert w.finish().status == "succeeded"
    w = World(some)
    w.begin(8)
    run = w.finish()
    assert (run.status, run.code) == ("failed", "too_large")
    assert "characters, at most 2000 in all: each is told what all calls before it gave" in run.reason
    assert "`app.workflow`" in run.reason


def test_calls_that_the_log_could_not_hold_with_all_their_edges_fail_the_run() -> None:
    """Each says that it was made of all before it: a few bytes in a turn, and an edge in the log."""
    names = ["double", *(f"double#{number}" for number in range(2, 801))]
    calls = [
        {"id": name, "function": "double", "arguments": 1, "parents": names[:number]}
        for number, name in enumerate(names)
    ]
    w = World(chain, max_steps=1000)
    w.begin(1)
    w.p.answer(w.p.tasks.popleft(), value={"calls": calls, "waits": [names]})
    assert (w.run.status, w.run.code) == ("failed", "too_large")


def test_outside_flows_a_step_is_the_function_itself() -> None:
    w = World(chain)
    assert w.double(4) == 8
