"""The work that the simulated world is given: workflows, functions, policies, requests, answers of humans, and rubbish."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from simulation import flows
from simulation.definitions import FLOW_APP, GOES, ONCE, OUTSIDE, TOOLS, definition, proposal
from simulation.executor import Outcome
from tidegate import codec
from tidegate.audit.limits import Bound
from tidegate.domain import canonical, states
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Call, PolicyPublished, RunCommand, StepResult, StepTask, WorkflowPublished
from tidegate.domain.requests import RunRequest
from tidegate.eventlog.interface import Record
from tidegate.executor import results

if TYPE_CHECKING:
    from simulation.world import World

ACCOUNTS = ("acme", "acme/support", "beta/x", "gamma")
MAILBOXES = ("run-commands", "gate-requests", "gate-decisions", "gate-leases", "step-results")


class SimulatedRule(NamedTuple):
    """A policy rule twice: as the gate reads it, and as the judge does."""

    when: str
    then: str
    holds: Callable[[Call, int, str], bool]


RULES = {
    "no-fatal": SimulatedRule('name == "fatal"', "deny", lambda call, _n, _a: call.function == "fatal"),
    "ask-once": SimulatedRule('name == "once"', "require_approval", lambda call, _n, _a: call.function == "once"),
    "ask-tool": SimulatedRule(
        'tool.startsWith("t_o")', "require_approval", lambda call, _n, _a: call.function.startswith("t_o")
    ),
    "ask-dear": SimulatedRule("reserve_micros > 40", "require_approval", lambda call, _n, _a: call.reserve_micros > 40),
    "no-sixth": SimulatedRule("attempt > 5", "deny", lambda _c, attempt, _a: attempt > 5),
    "ask-beta": SimulatedRule(
        'account.startsWith("beta") && attempt > 1', "require_approval", lambda _c, n, a: a.startswith("beta") and n > 1
    ),
}


def behaviour(rng: Random, task: StepTask) -> Outcome:
    """Return what a function does this time."""
    assert task.call is not None
    call = task.call
    cost = rng.choice((None, None, 0, call.reserve_micros // 2))
    runs_ms = rng.choice((0, 0, 5, 20, 100, 500))
    if call.kind == "agent":
        return Outcome(runs_ms, _plan(rng, call), cost_micros=cost)
    if call.kind == "flow":
        if rng.random() < 0.1:
            return Outcome(runs_ms, error="Flaky", cost_micros=cost)
        said, error = flows.turn(FLOW_APP, rng, task.run_id, task.step_id, call)
        return Outcome(runs_ms, said, error=error, retryable=False, cost_micros=cost)
    trait = call.function.removeprefix("t_")
    if trait in ("flaky", "once_flaky") and rng.random() < 0.5:
        return Outcome(runs_ms, error="Flaky", cost_micros=cost)
    if call.function in ONCE and rng.random() < 0.3:
        return Outcome(rng.choice((runs_ms, call.timeout_ms + 500)), error=results.DIED, cost_micros=cost)
    if trait == "fatal":
        return Outcome(runs_ms, error="Fatal", retryable=rng.random() < 0.5, cost_micros=cost)
    if trait == "slow":
        runs_ms = rng.choice((100, call.timeout_ms + 500, call.timeout_ms + 5_000))
    elif trait == "long":
        runs_ms = rng.choice((500, 2_000, 6_000))
    elif trait == "dear":
        cost = call.reserve_micros + rng.choice((0, 1, 30))
    elif trait == "odd" and rng.random() < 0.2:
        return Outcome(runs_ms, "this is no JSON", cost_micros=cost)
    goto = rng.choice((*canonical.loads(call.arguments)["routes"], "", "n9")) if _has_routes(call) else ""
    change = proposal(rng, task.step_id) if call.kind == "step" and rng.random() < 0.4 else ""
    return Outcome(runs_ms, canonical.dumps({"n": rng.randint(0, 9)}), cost_micros=cost, change=change, goto=goto)


def _has_routes(call: Call) -> bool:
    value = canonical.loads(call.arguments)
    return call.function == GOES and isinstance(value, dict) and bool(value.get("routes"))


def _plan(rng: Random, call: Call) -> str:
    if call.function == "a_wild" and rng.random() < 0.3:
        return rng.choice(('{"tool_calls":"none"}', '"text"', '{"tool_calls":[{"name":"t_unknown"},{"name":5}]}'))
    turn = canonical.loads(call.arguments)["turn"]
    if turn >= 3 or rng.random() < 0.3:
        return canonical.dumps({"content": "done", "output": {"turn": turn}})
    calls = [
        {
            "id": rng.choice(("", f"c{number}")),
            "name": rng.choice((*TOOLS, OUTSIDE, OUTSIDE, OUTSIDE)),
            "arguments": {"x": rng.randint(0, 3)},
        }
        for number in range(rng.randint(0, 3))
    ]
    return canonical.dumps({"content": "go on", "tool_calls": calls, "final": False})


# A limit's numbers never change here, and none is taken away: the judge holds every holder ever seen against them.
LIMITS: dict[str, dict[str, Any]] = {
    "steps": {"where": {"kind": "step"}, "per": ["function"], "at_once": 2},
    "accounts": {"per": ["account"], "account_level": 1, "at_once": 3},
    "all": {"at_once": 6},
    "workers": {"per": ["instance"], "at_once": 2},
    "pace": {"where": {"kind": "tool"}, "rate_per_s": 5, "burst": 3},
    "flaky": {"where": {"name": "flaky"}, "breaker": {"failures": 3, "window_s": 5, "open_s": 1}},
}
BOUNDS = {
    name: Bound(fields.get("at_once"), fields.get("rate_per_s"), fields.get("burst", 1))
    for name, fields in LIMITS.items()
}


class Work:
    """Users, operators and intruders. Each method writes one thing, as somebody outside would."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = world.rng
        self.started: list[str] = []
        self.requests: list[Record] = []
        self.versions: dict[str, int] = {}
        self.policies: dict[str, int] = {}
        self.unanswered: set[tuple[str, str]] = set()  # questions that nobody will ever answer
        self._count = 0

    def number(self) -> int:
        self._count += 1
        return self._count

    # -- operators ------------------------------------------------------------------------

    def publish_workflow(self) -> None:
        name = self.rng.choice(("w0", "w1", "w2", "w3"))
        version = self.versions[name] = self.versions.get(name, 0) + 1
        text = canonical.dumps(definition(self.rng, name, version, self.world.now_ms))
        row = WorkflowPublished(
            name=name, version=str(version), definition_hash=canonical.digest(text), definition=text, by="sim", at_ms=0
        )
        self.world.write("workflows", 0, f"{name}@{version}", codec.encode(row))

    def publish_policy(self) -> None:
        name = self.rng.choice(("p0", "p1"))
        chance = self.rng.random()
        if chance < 0.25:
            self.world.judge.policy(name, ())
            self.world.write("policies", 0, name, None)
            return
        version = self.policies[name] = self.policies.get(name, 0) + 1
        chosen = self.rng.sample(sorted(RULES), self.rng.randint(1, 2))
        rules: list[dict[str, Any]] = [
            {"name": rule, "when": RULES[rule].when, "then": RULES[rule].then} for rule in chosen
        ]
        for rule in rules:
            if rule["then"] == "require_approval" and self.rng.random() < 0.4:
                rule["expires_s"] = self.rng.choice((1, 4))
        document = canonical.dumps({"policy": name, "version": str(version), "rules": rules})
        if chance < 0.35:
            document = '{"policy":"' + name + '","version":"x","rules":"none"}'
            self.world.judge.policy(name, None)
        else:
            self.world.judge.policy(name, tuple(chosen))
        row = PolicyPublished(policy_id=name, version=str(version), document=document, by="sim", at_ms=0)
        self.world.write("policies", 0, name, codec.encode(row))

    def publish_limit(self) -> None:
        """Put a limit in force, again perhaps."""
        name = self.rng.choice(sorted(LIMITS))
        document = canonical.dumps({"kind": "limit", "limit": name, "version": "1", **LIMITS[name]})
        row = PolicyPublished(policy_id=f"limit:{name}", version="1", document=document, by="sim", at_ms=0)
        self.world.write("policies", 0, f"limit:{name}", codec.encode(row))

    # -- users ----------------------------------------------------------------------------

    def start_run(self) -> None:
        number = self.number()
        fields: dict[str, Any] = {
            "workflow": self._wanted(),
            "input": {"n": number},
            "account": self.rng.choice(ACCOUNTS),
        }
        if self.rng.random() < 0.85:
            fields["run_id"] = f"r{number}"
            self.started.append(fields["run_id"])
        budget = self.rng.choice((None, None, None, 30, 100, 300, 1_000, 100_000))
        if budget is not None:
            fields["budget_micros"] = budget
        if self.rng.random() < 0.3:
            fields["command_id"] = f"c{number}"
        if number % 4 == 0:
            fields["prefer"] = ("executor-0", "executor-1", "executor-gpu", "nobody")[number // 4 % 4]
        if self.rng.random() < 0.1:
            avro = RunRequest(**{**fields, "input": canonical.dumps(fields["input"])})
            self.request(codec.encode(avro))
            return
        self.request(json.dumps(fields).encode())

    def _wanted(self) -> str:
        if self.rng.random() < 0.05:
            return "nothing"
        name = self.rng.choice(sorted(self.versions))
        return name if self.rng.random() < 0.7 else f"{name}@{self.rng.randint(1, self.versions[name])}"

    def cancel(self) -> None:
        if self.started:
            run_id = self.rng.choice(self.started[-12:])
            fields = {"type": "cancel", "run_id": run_id, "by": "sim"}
            if self.rng.random() < 0.5:
                fields["command_id"] = f"cancel-{self.rng.randint(0, 3)}"
            self.request(json.dumps(fields).encode())

    def answer(self) -> None:
        """Answer one of the open questions, rightly or not, or decide that nobody ever will."""
        questions = self._questions()
        if questions:
            self._answer(*self.rng.choice(questions))

    def answer_all(self) -> bool:
        """Answer all open questions like that; returns whether there were any."""
        questions = self._questions()
        for run_id, step_id in questions:
            self._answer(run_id, step_id)
        return bool(questions)

    def _answer(self, run_id: str, step_id: str) -> None:
        if self.rng.random() < 0.1:
            self.unanswered.add((run_id, step_id))
            return
        fields = {"type": self.rng.choice(("approve", "approve", "reject")), "run_id": run_id, "by": "ann"}
        if self.rng.random() < 0.8:
            fields["step_id"] = step_id
        elif self.rng.random() < 0.2:
            fields["step_id"] = "elsewhere"
        self.request(json.dumps(fields).encode())

    def _questions(self) -> list[tuple[str, str]]:
        return [
            (run.run_id, step.step_id)
            for run in self.world.judge.runs()
            if run.status == states.WAITING
            for step in run.open_approvals()
            if (run.run_id, step.step_id) not in self.unanswered
        ]

    def request(self, value: bytes) -> None:
        partition = self.rng.randrange(self.world.topics["run-requests"])
        record = Record("run-requests", partition, b"k%d" % self.number(), value)
        self.requests.append(record)
        self.world.write(record.topic, record.partition, record.key.decode(), record.value)

    def repeat_request(self) -> None:
        """Send an earlier request again, byte for byte."""
        if self.requests:
            record = self.rng.choice(self.requests[-20:])
            self.request(record.value or b"")

    # -- intruders and accidents --------------------------------------------------------------

    def bad_request(self) -> None:
        number = self.number()
        run_id = self.rng.choice((f"r{number}", *self.started[-3:]))
        self.request(
            self.rng.choice(
                (
                    b"",
                    b"\xff\xfe{}",
                    b"{",
                    b'{"workflow": "w0", "workflow": "w1"}',
                    b"\xc3\x01" + bytes(8),
                    json.dumps({"workflow": "w0", "run_id": run_id, "input": "x" * 5_000}).encode(),
                    json.dumps({"workflow": "w0", "run_id": run_id, "budget_micros": -1}).encode(),
                    json.dumps({"workflow": "unknown", "run_id": run_id}).encode(),
                    json.dumps({"type": "cancel", "run_id": f"nobody{number}"}).encode(),
                    json.dumps({"type": "approve", "run_id": run_id}).encode(),
                    json.dumps({"type": "dance", "run_id": run_id}).encode(),
                )
            )
        )

    def rubbish(self) -> None:
        """Write bytes that are nothing, or a record that has no business there, to a topic that services read."""
        topic = self.rng.choice((*MAILBOXES, "step-results", "instances", "dead-letters", "step-tasks.default"))
        partition = self.rng.randrange(self.world.topics[topic])
        value = self.rng.choice((b"", b"{}", b"\xc3\x01", b"\xc3\x01" + bytes(12), self._foreign_record()))
        at = self.world.write(topic, partition, f"rubbish-{self.number()}", value)
        if topic in MAILBOXES:
            self.world.judge.rubbish.add(at)

    def _foreign_record(self) -> bytes:
        row = WorkflowPublished(name="x", version="1", definition_hash="", definition="", by="", at_ms=0)
        return codec.encode(row)

    def forge(self) -> None:
        """Write a result or a command that nobody asked for, of a run that may or may not exist."""
        run_id = self.rng.choice((f"ghost{self.number()}", *self.started[-6:]))
        if self.rng.random() < 0.7:
            record: Any = StepResult(
                run_id=run_id,
                step_id=self.rng.choice(("n0", "n1", "ghost")),
                attempt=self.rng.choice((0, -1, 90)),
                account="",
                instance_id="intruder",
                incarnation=1,
                outcome="succeeded",
                output='{"forged":true}',
                actual_micros=10**6,
            )
            topic = "step-results"
        else:
            command = f"forged-{self.number()}"
            record = RunCommand(
                run_id=run_id,
                command_id=command,
                type="dance",
                source="run-requests:0:0",
                content_hash="",
                original=b"",
            )
            topic = "run-commands"
        right = partition_of(run_id, self.world.run_partitions)
        partition = right if self.rng.random() < 0.8 else self.rng.randrange(self.world.run_partitions)
        at = self.world.write(topic, partition, f"{run_id}:forged-{self.number()}", codec.encode(record))
        if partition != right:
            self.world.judge.rubbish.add(at)
