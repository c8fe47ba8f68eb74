"""Random flows: plain Python that makes random calls, played by the real player; and the judge's books of their turns.

What a flow does follows from its input alone. Its branches share one source of chance, so whoever goes on first draws first: a
turn that is told what came in another order than the turns before plays another flow, and says so.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any, Final

from tidegate import App, CallFailedError, FlowChangedError, FlowError, NonRetryable
from tidegate.domain import canonical
from tidegate.domain import run_events as re
from tidegate.domain.messages import Call
from tidegate.sdk.testkit import step_context

FLOWS: Final = ("f_calls", "f_wild")
MAX_CALLS: Final = 8
RUBBISH: Final = (
    "[]",
    '{"calls":"none","waits":[]}',
    '{"calls":[],"waits":[]}',
    '{"calls":[],"waits":[["nobody"]]}',
    '{"calls":[{"id":"dear","function":"t_ok","arguments":1,"parents":[]}],"waits":[["dear"]]}',
    '{"calls":[{"id":"unknown","function":"unknown","arguments":1,"parents":[]}],"waits":[["unknown"]]}',
    '{"output":1,"calls":[]}',
)


class _Program:
    """One play of a flow. The calls that it makes are bounded, its branches share the chance."""

    def __init__(self, value: Any, steps: list[Any]) -> None:
        self.rng = Random(canonical.dumps(value))
        self.steps = steps
        self.left = self.rng.randint(1, MAX_CALLS)

    async def play(self, value: Any, depth: int = 0) -> Any:
        for _ in range(self.rng.randint(1, 3)):
            if self.left <= 0:
                break
            value = await self.act(value, depth)
        return value

    async def act(self, value: Any, depth: int) -> Any:
        chance = self.rng.random()
        if depth < 2 and chance < 0.25:
            branches = [self.play(value, depth + 1) for _ in range(self.rng.randint(2, 3))]
            return await asyncio.gather(*branches, return_exceptions=self.rng.random() < 0.5)
        if depth < 2 and chance < 0.35:
            return await asyncio.create_task(self.play(value, depth + 1))
        if chance < 0.4:
            self.call(value)  # nobody waits for it
        if chance < 0.8:
            try:
                return await self.call(value)
            except CallFailedError as error:
                return error.node_id
        return await self.call(value)

    def call(self, value: Any) -> Any:
        self.left -= 1
        return self.rng.choice(self.steps)(value)


def _plain(value: Any) -> Any:
    """Return a value that JSON has: exceptions that were gathered become their texts."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, BaseException) else value


def app_of(steps: tuple[str, ...]) -> App:
    """Return the app whose flows call these steps. No step of it is ever run: executors of the simulation have their own."""
    app = App("simulated")

    def nothing(value: Any = None) -> Any:
        raise AssertionError("a step was called outside the log")

    made = [app.step(name=name)(_copy_of(nothing)) for name in steps]

    async def play(value: Any = None) -> Any:
        return _plain(await _Program(value, made).play(value))

    for name in FLOWS:
        app.flow(name=name, steps=made)(_async_copy_of(play))
    return app


def _copy_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def copy(value: Any = None) -> Any:
        return function(value)

    return copy


def _async_copy_of(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def copy(value: Any = None) -> Any:
        return await function(value)

    return copy


def turn(app: App, rng: Random, run_id: str, step_id: str, call: Call) -> tuple[str, str]:
    """Return what a turn says, or nothing and the class of the error that ends it; sometimes rubbish."""
    if call.function == "f_wild" and rng.random() < 0.1:
        return rng.choice(RUBBISH), ""
    with step_context(run_id, step_id):
        try:
            return canonical.dumps(app.functions[call.function].call(canonical.loads(call.arguments))), ""
        except NonRetryable as error:
            return "", type(error).__name__


class FlowBooks:
    """The judge's books of flows. require: raises its text if its condition does not hold."""

    def __init__(self, require: Callable[[object, str], None]) -> None:
        self._require = require
        self._kinds: dict[tuple[str, str], str] = {}  # of the nodes of each run
        self._outputs: dict[tuple[str, str], str] = {}
        self._errors: dict[tuple[str, str], str] = {}
        self._told: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by run and path: what its latest turn was told
        self._said: dict[tuple[str, str], dict[str, Any]] = {}  # what its latest turn said
        self._latest: dict[tuple[str, str], str] = {}
        self._made: dict[tuple[str, str], set[str]] = defaultdict(set)
        self._begun: dict[tuple[str, str], Call] = {}
        self._over: set[tuple[str, str]] = set()
        self.turns = 0
        self.calls = 0
        self.ended = 0

    def event(self, run_id: str, event: Any) -> None:
        """A turn is told what the log has, in its order; calls begin once and only those that a turn has made."""
        if isinstance(event, re.RunStarted):
            self._nodes(run_id, canonical.loads(event.definition)["nodes"])
        elif isinstance(event, re.GraphChangeProposed) and event.kind == "graph" and event.change:
            self._nodes(run_id, canonical.loads(event.change)["nodes"])
        elif isinstance(event, re.AttemptEnded):
            wrong = event.error_class in (FlowChangedError.__name__, FlowError.__name__)
            self._require(not wrong, f"(6) {run_id} {event.step_id}: {event.error_class}: a turn was told another log")
        elif isinstance(event, re.StepReady) and self._kinds.get((run_id, event.node_id)) == "flow":
            self._ready(run_id, event)
        elif isinstance(event, re.AttemptRequested) and (run_id, event.step_id) in self._begun:
            self._may_go_on(run_id, event.step_id)
        elif isinstance(event, re.StepSucceeded):
            self._outputs[run_id, event.step_id] = event.output
            self._succeeded(run_id, event)
        elif isinstance(event, re.StepFailed):
            self._errors[run_id, event.step_id] = event.reason
            self._failed(run_id, event)

    def _nodes(self, run_id: str, nodes: dict[str, Any]) -> None:
        for name, node in nodes.items():
            self._kinds.setdefault((run_id, name), node.get("kind", "") if isinstance(node, dict) else "")

    def _ready(self, run_id: str, event: re.StepReady) -> None:
        path, _, name = event.step_id.rpartition("/")
        self._begun[run_id, event.step_id] = event.call
        self._may_go_on(run_id, event.step_id)
        if event.call.kind == "flow":
            self._turn_ready(run_id, path, int(name), event)
            return
        self.calls += 1
        self._require((run_id, path) in self._said, f"{run_id} {event.step_id} was called by no turn")
        made = {call["id"]: call for call in self._said[run_id, path]["calls"]}
        self._require(name in made, f"{run_id} {event.step_id} is no call of the turn before it")
        self._require(name not in self._made[run_id, path], f"{run_id} {event.step_id} was made twice")
        self._made[run_id, path].add(name)
        call = (event.call.function, canonical.loads(event.call.arguments))
        self._require(call == (made[name]["function"], made[name]["arguments"]), f"{run_id} {event.step_id} is {call}")

    def _may_go_on(self, run_id: str, step_id: str) -> None:
        path = step_id.rpartition("/")[0]
        self._require((run_id, path) not in self._over, f"{run_id} {step_id} is asked for, and its flow is over")

    def _turn_ready(self, run_id: str, path: str, number: int, event: re.StepReady) -> None:
        name, told = f"{run_id} {event.step_id}", canonical.loads(event.call.arguments)["turns"]
        self.turns += 1
        self._latest[run_id, path] = event.step_id
        self._require(len(told) == number - 1, f"{name} was told of {len(told)} turns")
        if number == 1:
            self._told[run_id, path] = told
            return
        said = self._said.pop((run_id, path), None)
        self._require(said is not None, f"{name} is ready before the turn before it has said something")
        assert said is not None
        self._require(told[:-1] == self._told[run_id, path], f"(6) {name} was told another beginning")
        made = [(call["id"], call["function"]) for call in said["calls"]]
        self._require([(call["id"], call["function"]) for call in told[-1]["calls"]] == made, f"(6) {name}: calls")
        before = {result["id"] for turn in told[:-1] for result in turn["results"]}
        for result in told[-1]["results"]:
            step = (run_id, f"{path}/{result['id']}")
            self._require(result["id"] not in before, f"{name} was told of {result['id']} twice")
            here = self._outputs if result["ok"] else self._errors
            value = canonical.dumps(result["output"]) if result["ok"] else result["error"]
            self._require(here.get(step) == value, f"(6) {name} was told {value} of {step[1]}")
        self._require(told[-1]["results"], f"{name} is ready, and nothing has come")
        self._told[run_id, path] = told

    def _succeeded(self, run_id: str, event: re.StepSucceeded) -> None:
        path = event.step_id.rpartition("/")[0]
        if self._latest.get((run_id, path)) != event.step_id:
            return
        said = canonical.loads(event.output)
        if "output" in said:
            self._end(run_id, path)
        else:
            self._said[run_id, path] = said

    def _failed(self, run_id: str, event: re.StepFailed) -> None:
        path = event.step_id.rpartition("/")[0]
        if self._latest.get((run_id, path)) == event.step_id:
            self._end(run_id, path)

    def _end(self, run_id: str, path: str) -> None:
        self._over.add((run_id, path))
        self.ended += 1
