"""Invariant 6 on random graphs: the same outputs give the same steps and the same fingerprint, in whatever order they come.

A step's outcome is a function of its id and the seed alone, as if it had been recorded. What differs between two runs of a
definition is which of the open attempts answers next, whether it fails once before, and when a run lies in a snapshot.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest

from support.pure import Pair, agent, step, tool
from tidegate.domain import canonical
from tidegate.domain.messages import StepTask
from tidegate.domain.run import RunState, apply
from tidegate.domain.workflow import validate_definition
from tidegate.scheduler import snapshots

FUNCTIONS = ("step:f", "agent:bot", "tool:look")
SEEDS = range(60)
ORDERS = 4


def fate(seed: int, name: str) -> int:
    """Return a number that only the seed and the name decide."""
    return zlib.crc32(f"{seed}/{name}".encode())


def random_definition(rng: random.Random) -> dict[str, Any]:
    """Return a definition that can run: conditions, joins, maps, agents, children, choices, loops and failures."""
    while True:
        definition = _candidate(rng)
        if not validate_definition(definition):
            return definition


def _candidate(rng: random.Random) -> dict[str, Any]:
    names = [f"n{number}" for number in range(rng.randint(2, 9))]
    nodes: dict[str, Any] = {name: _node(rng) for name in names}
    edges: list[Any] = []
    for later, name in enumerate(names[1:], 1):
        for other in rng.sample(names[:later], rng.randint(0 if rng.random() < 0.2 else 1, min(later, 3))):
            if rng.random() < 0.12 and nodes[other]["kind"] in ("step", "agent"):
                nodes[other].setdefault("routes", []).append(name)
            elif rng.random() < 0.4:
                value = "size(output)" if nodes[other]["kind"] == "map" else "output"
                edges.append({"from": other, "to": name, "when": f"{value} % {rng.randint(2, 4)} > 0"})
            else:
                edges.append([other, name])
    for number, name in enumerate(names):
        if nodes[name]["kind"] in ("step", "agent") and rng.random() < 0.3:
            nodes[name].setdefault("routes", []).append(rng.choice(names[: number + 1]))
    for name in names:
        if rng.random() < 0.3:
            nodes[name]["join"] = rng.choice(["any", {"need": 2}])
    inner = {"name": "inner", "version": "1", "nodes": {"x": {"kind": "step", "function": "f"}}}
    functions = {"f": step(max_attempts=2), "bot": agent("look"), "look": tool()}
    return {
        "name": "any",
        "version": "1",
        "nodes": nodes,
        "edges": edges,
        "start": [names[0]],
        "functions": functions,
        "failure_mode": "continue",
        "aggregate": rng.choice(["success_only", "all"]),
        "success": rng.choice(["all", "any"]),
        "max_steps": 10_000,
        "max_hops": 10_000,
        "workflows": {"inner@1": {**inner, "functions": {"f": step(max_attempts=1)}}},
    }


def _node(rng: random.Random) -> dict[str, Any]:
    kind = rng.choices(["step", "agent", "map", "workflow"], [6, 2, 2, 1])[0]
    node: dict[str, Any] = {"kind": kind}
    if kind == "map":
        node |= {"over": str(list(range(rng.randint(0, 5)))), "at_once": rng.randint(1, 3)}
        node |= {
            "function": rng.choice(["f", "bot"]),
            "on_item_failure": "continue",
        }  # else the first failure cancels some
    elif kind == "workflow":
        node["workflow"] = "inner@1"
    else:
        node["function"] = {"step": "f", "agent": "bot"}[kind]
    if rng.random() < 0.2:
        node["on_failure"] = "continue"
    return node


class Game:
    """One run of a definition, in one order."""

    def __init__(self, definition: dict[str, Any], seed: int, order: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"{seed}/{order}")
        self.p = Pair(functions=FUNCTIONS)
        self.nodes = definition["nodes"]
        self.p.start("r", definition, 1)
        for _ in range(3_000):
            if not self.p.tasks:
                due = self.p.scheduler.next_due_ms(self.p.runs)
                if due is None:
                    break
                self.p.pass_time(max(0, due - self.p.now_ms))
                continue
            task = self.p.tasks[self.rng.randrange(len(self.p.tasks))]
            self.p.tasks.remove(task)
            if task.call is not None:
                self._answer(task)
            if self.rng.random() < 0.1:
                self._through_a_snapshot()
        self.run = self.p.run("r")
        assert self.run.is_over, "the run does not end"

    def _answer(self, task: StepTask) -> None:
        number = fate(self.seed, f"{task.run_id}/{task.step_id}")
        if task.attempt == 1 and task.call is not None and task.call.function != "look" and self.rng.random() < 0.1:
            self.p.answer(task, "released")
            return
        if number % 6 == 0:
            self.p.answer(task, "failed", error_class="E", error_message="no", retryable=False)
            return
        goto = self._goto(task, number)
        if task.call is not None and task.call.kind == "agent":
            turn = canonical.loads(task.call.arguments)["turn"]
            calls = [{"name": "look", "arguments": {"n": n}} for n in range(number % 3)] if turn < 3 else []
            plan: dict[str, Any] = {"tool_calls": calls} if calls else {"output": number % 100, "goto": goto}
            self.p.answer(task, value=plan)
        else:
            self.p.answer(task, value=number % 100, goto=goto)

    def _goto(self, task: StepTask, number: int) -> str:
        """Return a route, backwards too, but for the third visit and later ones."""
        name, _, rest = task.step_id.partition("/")
        routes = self.nodes[name].get("routes", []) if task.run_id == "r" else []
        if not routes or number % 5 == 0:
            return ""
        parts = rest.split("/") if rest else []
        visit = int(parts[0]) if len(parts) > (self.nodes[name]["kind"] == "agent") else 1
        return str(routes[number % len(routes)]) if visit < 3 else ""

    def _through_a_snapshot(self) -> None:
        run = self.p.run("r")
        if not run.is_over:
            self.p.runs.runs["r"] = snapshots.load(snapshots.dump(run), self.p.runs.definitions)


def picture(run: RunState) -> dict[str, tuple[str, str]]:
    return {step_id: (found.status, found.output or "") for step_id, found in run.steps.items()}


def folded(p: Pair) -> RunState:
    run = RunState("r")
    for subject, event in p.events:
        if subject == "r":
            apply(run, event, p.now_ms)
    return run


@pytest.mark.feature("G2")
@pytest.mark.parametrize("seed", SEEDS)
def test_no_order_changes_the_steps_or_the_fingerprint(seed: int) -> None:
    definition = random_definition(random.Random(seed))
    games = [Game(definition, seed, order) for order in range(ORDERS)]
    first = games[0].run
    for game in games:
        assert picture(game.run) == picture(first)
        assert (game.run.status, game.run.output) == (first.status, first.output)
        assert game.run.fingerprint == first.fingerprint
        assert game.run.settled_nodes == len(definition["nodes"]) == sum(n.is_settled for n in game.run.nodes.values())
        assert {n: (s.status, s.visit) for n, s in game.run.nodes.items()} == {
            n: (s.status, s.visit) for n, s in first.nodes.items()
        }
        again = folded(game.p)
        assert (again.nodes, again.settled_nodes, again.hops) == (game.run.nodes, game.run.settled_nodes, game.run.hops)
        reserved, _ = game.p.money()
        assert reserved == 0


def test_the_seeds_reach_everything() -> None:
    seen: set[str] = set()
    statuses: set[str] = set()
    for seed in SEEDS:
        game = Game(random_definition(random.Random(seed)), seed, 0)
        seen |= set(game.p.seen("r"))
        statuses.add(game.run.status)
    assert statuses == {"succeeded", "failed"}
    assert {
        "NodeJoined",
        "NodeSkipped",
        "NodeSucceeded",
        "NodeFailed",
        "PathsChosen",
        "LoopEntered",
        "MapStarted",
        "ChildStarted",
        "ChildEnded",
    } <= seen
