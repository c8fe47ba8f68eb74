"""Random flows: plain Python that makes random calls, played by the real player; and the judge's books of their turns.

What a flow does follows from its input alone. Its branches share one source of chance, so whoever goes on first draws first: a
turn that is told what came in another order than the turns before plays another flow, and says so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from typing import Any, Final, NamedTuple

from simulation.change_books import Proposals
from tidegate import App, CallFailedError, FlowChangedError, FlowError, NonRetryable
from tidegate.domain import canonical
from tidegate.domain import run_events as re
from tidegate.domain.messages import Call
from tidegate.sdk.testkit import step_context

STEPS_ALONE: Final = ("f_calls", "f_wild")
FLOWS: Final = (*STEPS_ALONE, "f_all")
INNER: Final = "inner"
OUTSIDE: Final = "t_outside"  # a tool that people answer for
EVENTS: Final = ("paid", "shipped")
KEYS: Final = ("", "k")
CHOICES: Final = ("yes", "no")
MAX_CALLS: Final = 8
RUBBISH: Final = (
    "[]",
    '{"calls":"none","waits":[]}',
    '{"calls":[],"waits":[]}',
    '{"calls":[],"waits":[["nobody"]]}',
    '{"calls":[{"id":"dear","function":"t_ok","arguments":1,"parents":[]}],"waits":[["dear"]]}',
    '{"calls":[{"id":"unknown","function":"unknown","arguments":1,"parents":[]}],"waits":[["unknown"]]}',
    '{"calls":[{"id":"sleep","kind":"sleep","function":"sleep","arguments":{},"parents":[]}],"waits":[["sleep"]]}',
    '{"calls":[{"id":"inner","kind":"workflow","function":"inner","arguments":1,"parents":[]}],"waits":[["inner"]]}',
    '{"output":1,"calls":[]}',
)


class _Program:
    """One play of a flow. The calls that it makes are bounded, its branches share the chance. calls: of which it chooses."""

    def __init__(self, value: Any, calls: list[Callable[[_Program, Any], Any]]) -> None:
        self.rng = Random(canonical.dumps(value))
        self.calls = calls
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
        if chance < 0.9:
            try:
                return await self.call(value)
            except CallFailedError as error:
                return error.node_id
        return await self.call(value)

    def call(self, value: Any) -> Any:
        self.left -= 1
        return self.rng.choice(self.calls)(self, value)


def _plain(value: Any) -> Any:
    """Return a value that JSON has: exceptions that were gathered become their texts."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, BaseException) else value


def app_of(steps: tuple[str, ...], agents: tuple[str, ...], tools: tuple[str, ...], begins_ms: int) -> App:
    """Return the app whose flows call these. No function of it is ever run: executors of the simulation have their own."""
    app = App("simulated")
    inner = {"name": INNER, "version": "1"}

    def nothing(value: Any = None) -> Any:
        raise AssertionError("a function was called outside the log")

    made = [app.step(name=name)(_copy_of(nothing)) for name in steps]
    talking = [app.agent(name=name)(_copy_of(nothing)) for name in agents]
    handy = [app.tool(name=name)(_copy_of(nothing)) for name in tools]
    functions = [lambda program, value, call=call: call(value) for call in (*made, *talking * 3, *handy)]
    outside = app.outside_tool(OUTSIDE)
    waits: list[Callable[[_Program, Any], Any]] = [
        lambda program, value: outside(value=value),
        lambda program, value: app.sleep(program.rng.choice((0, 0.3, 2)), **_timeout(program.rng)),
        lambda program, value: app.wait_until(_moment(program.rng, begins_ms), **_timeout(program.rng)),
        lambda program, value: app.wait_event(
            program.rng.choice(EVENTS), key=program.rng.choice(KEYS), **_timeout(program.rng)
        ),
        lambda program, value: app.ask("?", choices=program.rng.choice((None, CHOICES)), **_timeout(program.rng)),
        lambda program, value: app.workflow(inner, value, budget_micros=program.rng.choice((None, 200))),
    ]

    async def steps_alone(value: Any = None) -> Any:
        return _plain(await _Program(value, functions[: len(made)]).play(value))

    async def everything(value: Any = None) -> Any:
        return _plain(await _Program(value, [*functions, *waits, *waits, *waits, *waits]).play(value))

    app.flow(name="f_calls", steps=made)(steps_alone)
    app.flow(name="f_wild", steps=made)(_async_copy_of(steps_alone))
    app.flow(name="f_all", steps=[*made, *talking, *handy, outside], workflows=[inner])(everything)
    return app


def _timeout(rng: Random) -> Any:
    return rng.choice(({}, {"timeout_s": 1}, {"timeout_s": 4, "timeout_value": {"n": 4}}))


def _moment(rng: Random, begins_ms: int) -> datetime:
    return datetime.fromtimestamp(begins_ms // 1000 + rng.randint(-5, 60), UTC)


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


class _Place(NamedTuple):
    """Where a step of a flow belongs. path: of the flow's visit. call: empty of its own turns. rest: what is done for a call."""

    path: str
    turn: int
    call: str
    rest: str


def _place(step_id: str) -> _Place:
    node, *parts = step_id.split("/")
    if len(parts) > 1 and parts[0].isdecimal():
        node, parts = f"{node}/{parts[0]}", parts[1:]
    if parts[0].isdecimal():
        return _Place(node, int(parts[0]), "", "")
    return _Place(node, 0, f"{node}/{parts[0]}", "/".join(parts[1:]))


class FlowBooks:
    """The judge's books of flows. require: raises its text if its condition does not hold."""

    def __init__(self, require: Callable[[object, str], None]) -> None:
        self._require = require
        self._proposals = Proposals()
        self._kinds: dict[tuple[str, str], str] = {}  # of the nodes of each run
        self._places: dict[tuple[str, str], _Place] = {}  # of all steps of flows
        self._came: dict[tuple[str, str], tuple[bool, str]] = {}  # what each call has come to
        self._told: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by run and path: what its latest turn was told
        self._said: dict[tuple[str, str], dict[str, Any]] = {}  # what its latest turn said
        self._latest: dict[tuple[str, str], int] = {}
        self._made: set[tuple[str, str]] = set()
        self._over: set[tuple[str, str]] = set()
        self.turns = 0
        self.calls: Counter[str] = Counter()
        self.outside = 0  # calls of outside tools that were let through, of flows and of agents that flows call
        self.ended = 0

    def event(self, run_id: str, event: Any) -> None:
        """A turn is told what the log has, in its order; calls begin once and only those that a turn has made."""
        if isinstance(event, re.RunStarted):
            self._nodes(run_id, canonical.loads(event.definition)["nodes"])
        elif (change := self._proposals.accepted(run_id, event)) is not None:
            self._nodes(run_id, change["nodes"])
        elif isinstance(event, re.AttemptEnded):
            wrong = event.error_class in (FlowChangedError.__name__, FlowError.__name__)
            self._require(not wrong, f"(6) {run_id} {event.step_id}: {event.error_class}: {event.error_message}")
        elif isinstance(event, re.StepReady | re.WaitStarted | re.ChildStarted):
            if self._kinds.get((run_id, event.node_id)) != "flow":
                return
            if isinstance(event, re.WaitStarted) and event.kind == "outside":  # a call that was let through
                self._may_go_on(run_id, event.step_id, self._places[run_id, event.step_id])
                self.outside += 1
            else:
                self._begins(run_id, event)
        elif (place := self._places.get((run_id, getattr(event, "step_id", "")))) is not None:
            self._goes_on(run_id, event, place)

    def _nodes(self, run_id: str, nodes: dict[str, Any]) -> None:
        for name, node in nodes.items():
            self._kinds[run_id, name] = node["kind"]

    def _begins(self, run_id: str, event: Any) -> None:
        place = self._places[run_id, event.step_id] = _place(event.step_id)
        self._may_go_on(run_id, event.step_id, place)
        if place.turn:
            self._turn_ready(run_id, place, event)
        elif place.rest in ("", "1"):
            self._call_begins(run_id, place, event)

    def _goes_on(self, run_id: str, event: Any, place: _Place) -> None:
        if isinstance(event, re.AttemptRequested):
            self._may_go_on(run_id, event.step_id, place)
        elif isinstance(event, re.StepSucceeded) and place.turn:
            self._turn_said(run_id, place, canonical.loads(event.output))
        elif isinstance(event, re.StepFailed) and place.turn:
            self._end(run_id, place)
        elif isinstance(event, re.StepFailed) and "tool:" not in place.rest:
            self._came[run_id, place.call] = (False, event.reason)
        elif isinstance(event, re.StepSucceeded) and not place.rest:
            self._came[run_id, place.call] = (True, event.output)
        elif isinstance(event, re.StepSucceeded) and place.rest.isdecimal():
            plan = canonical.loads(event.output)
            if plan.get("final") or (plan.get("final") is None and not plan.get("tool_calls")):
                output = plan.get("output")
                given = plan.get("content", "") if output is None else output
                self._came[run_id, place.call] = (True, canonical.dumps(given))
        elif isinstance(event, re.ChildEnded):
            is_good = event.status == "succeeded"
            self._came[run_id, place.call] = (is_good, event.output if is_good else event.reason)

    def _call_begins(self, run_id: str, place: _Place, event: Any) -> None:
        name = f"{run_id} {place.call}"
        said = self._said.get((run_id, place.path))
        self._require(said is not None, f"{name} was called by no turn")
        assert said is not None
        made = {f"{place.path}/{call['id']}": call for call in said["calls"]}.get(place.call)
        self._require(made is not None, f"{name} is no call of the turn before it")
        assert made is not None
        self._require((run_id, place.call) not in self._made, f"{name} was made twice")
        self._made.add((run_id, place.call))
        kind, given = made.get("kind", "step"), made["arguments"]
        self.calls[kind] += 1
        if isinstance(event, re.WaitStarted):
            self._require((event.kind, event.prompt) == (kind, given.get("prompt", "")), f"{name} is {event}")
        elif isinstance(event, re.ChildStarted):
            self._require(kind == "workflow" and event.workflow == f"{made['function']}@1", f"{name} is {event}")
            self._require(canonical.loads(event.input) == given["input"], f"{name} is given {event.input}")
        else:
            value = canonical.loads(event.call.arguments)
            call = (event.call.kind, event.call.function, value["input"] if kind == "agent" else value)
            self._require(call == (kind, made["function"], given), f"{name} is {call}")

    def _may_go_on(self, run_id: str, step_id: str, place: _Place) -> None:
        self._require((run_id, place.path) not in self._over, f"{run_id} {step_id} is asked for, and its flow is over")

    def _turn_ready(self, run_id: str, place: _Place, event: re.StepReady) -> None:
        name, told = f"{run_id} {event.step_id}", canonical.loads(event.call.arguments)["turns"]
        flow = (run_id, place.path)
        self.turns += 1
        self._require(place.turn == self._latest.get(flow, 0) + 1, f"{name} follows turn {self._latest.get(flow)}")
        self._latest[flow] = place.turn
        self._require(len(told) == place.turn - 1, f"{name} was told of {len(told)} turns")
        if place.turn > 1:
            self._told_rightly(run_id, place, name, told)
        self._told[flow] = told

    def _told_rightly(self, run_id: str, place: _Place, name: str, told: list[dict[str, Any]]) -> None:
        said = self._said.pop((run_id, place.path), None)
        self._require(said is not None, f"{name} is ready before the turn before it has said something")
        assert said is not None
        self._require(told[:-1] == self._told[run_id, place.path], f"(6) {name} was told another beginning")
        made = [(call["id"], call["function"]) for call in said["calls"]]
        self._require([(call["id"], call["function"]) for call in told[-1]["calls"]] == made, f"(6) {name}: calls")
        before = {result["id"] for turn in told[:-1] for result in turn["results"]}
        for result in told[-1]["results"]:
            self._require(result["id"] not in before, f"{name} was told of {result['id']} twice")
            value = canonical.dumps(result["output"]) if result["ok"] else result["error"]
            came = self._came.get((run_id, f"{place.path}/{result['id']}"))
            self._require(came == (result["ok"], value), f"(6) {name} was told {value} of {result['id']}, it is {came}")
        self._require(told[-1]["results"], f"{name} is ready, and nothing has come")

    def _turn_said(self, run_id: str, place: _Place, said: dict[str, Any]) -> None:
        if "output" in said:
            self._end(run_id, place)
        else:
            self._said[run_id, place.path] = said

    def _end(self, run_id: str, place: _Place) -> None:
        self._over.add((run_id, place.path))
        self.ended += 1
