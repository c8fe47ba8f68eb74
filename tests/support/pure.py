"""Scheduler and gate wired to each other without any log: every tell is delivered at once, in order.

What the owner loop adds (durability, epochs, marks) is left out, so a test sees only what is decided.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from tidegate.domain import canonical
from tidegate.domain.entry import Entry, Position, causes_of, parts_of
from tidegate.domain.messages import Call, Control, Instance, PolicyPublished, RunCommand, StepResult, StepTask
from tidegate.domain.run import RunState
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import Decision, Machine
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine
from tidegate.scheduler.service import SchedulerMachine

Function = dict[str, Any]


def step(**settings: Any) -> Function:
    return {"kind": "step", "backoff_ms": 100, **settings}


def tool(**settings: Any) -> Function:
    return {"kind": "tool", "backoff_ms": 100, **settings}


def agent(*tools: str, **settings: Any) -> Function:
    return {"kind": "agent", "tools": list(tools), **settings}


def chain(*functions: str, **settings: Function) -> dict[str, Any]:
    """Return a definition that runs step functions one after another, each node named like its function."""
    return {
        "name": "chain",
        "version": "1",
        "nodes": {name: {"kind": "step", "function": name} for name in functions},
        "edges": [[a, b] for a, b in itertools.pairwise(functions)],
        "functions": {name: settings.get(name, step()) for name in functions},
    }


class Pair:
    """A scheduler partition and a gate partition, one executor, and a clock that the test moves."""

    def __init__(self, slots: int = 100, functions: tuple[str, ...] = ()) -> None:
        self.now_ms = 1_000_000
        self.table_end = 0
        self.executors = Executors(10_000, lambda: self.now_ms, lambda: self.table_end)
        self.executors.listen()
        self.scheduler = SchedulerMachine(1, 1)
        self.gate = GateMachine(1, 1, self.executors)
        self.runs = self.scheduler.new_state(0, Shelf())
        self.ledger = self.gate.new_state(0, Shelf())
        self.tables = Tables(("instances", "policies"))
        self.tables.versions |= {"instances": 10**9, "policies": 0}
        self.tasks: deque[StepTask] = deque()
        self.letters: list[Any] = []
        self.events: list[Any] = []
        self.ledger_events: list[Any] = []
        self.dispatches: list[tuple[str, int]] = []
        self.unheard: deque[Any] | None = None  # what the gate says, while the scheduler does not read it
        self._queue: deque[tuple[Machine, Any, Any]] = deque()
        self._offset = 0
        self.offered = (functions, slots)
        self.register("worker-0", 1, slots, functions)

    def register(self, name: str, incarnation: int, slots: int, functions: tuple[str, ...], **changes: Any) -> None:
        row = self.beat(name, incarnation, slots, functions, **changes)
        self.gate.table_changed("instances", name, row, incarnation)
        self.settle_down()

    @staticmethod
    def beat(name: str, incarnation: int, slots: int, functions: tuple[str, ...], **changes: Any) -> Instance:
        """Return what an executor writes of itself."""
        return Instance(
            instance_id=name,
            service=changes.pop("service", "executor"),
            incarnation=incarnation,
            state=changes.pop("state", "ready"),
            host="h",
            boot_id="b",
            pid=1,
            pid_started=0.0,
            started_ms=0,
            at_ms=0,
            queue=changes.pop("queue", "default"),
            slots=slots,
            functions=functions,
            **changes,
        )

    def policy(self, document: dict[str, Any]) -> None:
        """Put a document of any kind in force."""
        kind = document.get("kind", "policy")
        key = document[kind] if kind == "policy" else f"{kind}:{document[kind]}"
        row = PolicyPublished(
            policy_id=key, version=document.get("version", "1"), document=canonical.dumps(document), by="t", at_ms=0
        )
        self._publish(key, row)

    def forget(self, key: str) -> None:
        """Remove a document."""
        self._publish(key, None)

    def _publish(self, key: str, row: PolicyPublished | None) -> None:
        for machine in (self.scheduler, self.gate):
            machine.table_changed("policies", key, row, 0)
        self.settle_down()

    def control(self, queue: str, *, paused: bool) -> None:
        """Pause or resume a queue, or everything (`*`); both services read it before anything else happens."""
        row = Control(queue=queue, paused=paused, by="t", reason="", at_ms=self.now_ms)
        self.tables.versions["controls"] = self.tables.versions.get("controls", 0) + 1
        for machine in (self.scheduler, self.gate):
            machine.table_changed("controls", queue, row, 0)
        self.settle_down()

    def command(self, run_id: str, type_: str, **fields: Any) -> None:
        self._offset += 1
        source = f"run-requests:0:{self._offset}"
        fields.setdefault("command_id", source)
        fields.setdefault("content_hash", "h")
        self._send(
            self.scheduler,
            RunCommand(run_id=run_id, type=type_, source=source, original=b"{}", **fields),
        )
        self.settle_down()

    def start(self, run_id: str, definition: dict[str, Any], value: Any = None, **fields: Any) -> None:
        text = canonical.dumps(definition)
        fields.setdefault("account", "acme/support")
        self.command(
            run_id,
            "start",
            workflow=f"{definition['name']}@{definition['version']}",
            definition=text,
            definition_hash=canonical.digest(text),
            input=canonical.dumps(value),
            **fields,
        )

    def answer(self, task: StepTask, outcome: str = "succeeded", value: Any = None, **fields: Any) -> None:
        result = StepResult(
            run_id=task.run_id,
            step_id=task.step_id,
            attempt=task.attempt,
            account=task.account,
            instance_id=task.instance_id,
            incarnation=task.incarnation,
            outcome=outcome,
            output=canonical.dumps(value) if outcome == "succeeded" else "",
            **fields,
        )
        self._send(self.scheduler, result)
        self.settle_down()

    def work(self, functions: dict[str, Callable[[Any], Any]], limit: int = 1000) -> None:
        """Let the executor do everything that is there; a function that raises fails its attempt."""
        for _ in range(limit):
            if not self.tasks:
                return
            task = self.tasks.popleft()
            if task.type == "cancel" or task.call is None:
                continue
            try:
                value = functions[task.call.function](canonical.loads(task.call.arguments))
            except Exception as error:
                self.answer(task, "failed", error_class=type(error).__name__, error_message=str(error))
            else:
                self.answer(task, "succeeded", value, actual_micros=task.call.reserve_micros)
        raise AssertionError("the run does not end")

    def hear(self) -> None:
        """Let the scheduler read what it has not read of the gate, and everything after that."""
        unheard, self.unheard = self.unheard, None
        for record in unheard or ():
            self._send(self.scheduler, record)
        self.settle_down()

    def pass_time(self, ms: int) -> None:
        self.now_ms += ms
        self.settle_down()

    def pass_time_with_heartbeats(self, ms: int, incarnation: int = 1) -> None:
        """Let time go by at the end of which the executor is heard of, so that it is not taken for dead."""
        self.now_ms += ms
        functions, slots = self.offered
        self.register("worker-0", incarnation, slots, functions)

    def run(self, run_id: str) -> RunState:
        return self.runs.runs[run_id]

    def seen(self, run_id: str) -> list[str]:
        return [type(event).__name__ for subject, event in self.events if subject == run_id]

    def money(self) -> tuple[int, int]:
        """Return (reserved, settled) micro-dollars, recomputed from the ledger's events."""
        reserved = settled = 0
        for event in self.ledger_events:
            name = type(event).__name__
            if name in ("AttemptGranted", "AttemptReserved"):
                reserved += event.reserved_micros
            elif name in ("AttemptSettled", "AttemptReleased"):
                reserved -= event.reserved_micros
                settled += getattr(event, "actual_micros", 0)
        return reserved, settled

    def settle_down(self) -> None:
        """Deliver until nothing moves: inputs first, then what is due."""
        while True:
            while self._queue:
                machine, state, record = self._queue.popleft()
                message = Message("t", 0, 0, b"", b"", (), self.now_ms)
                decision = machine.decide(state, record, message, self.now_ms, self.tables)
                if decision is not None:
                    self._take(machine, state, decision)
            due = [(m, s, m.due(s, self.now_ms, self.tables)) for m, s in self._machines()]
            if not any(answer for _, _, answer in due):
                return
            for machine, state, answer in due:
                if answer is not None:
                    self._take(machine, state, answer[1])

    def _machines(self) -> list[tuple[Any, Any]]:
        return [(self.scheduler, self.runs), (self.gate, self.ledger)]

    def _send(self, machine: Any, record: Any) -> None:
        self._queue.append((machine, self.runs if machine is self.scheduler else self.ledger, record))

    def _take(self, machine: Any, state: Any, decision: Decision) -> None:
        self._offset += 1
        offset = self._offset
        seq, _ = machine.head(state, decision.subject)
        for number, event in enumerate(decision.events, seq + 1):
            machine.apply(state, decision.subject, decision.account, event, number, self.now_ms)
            if machine is self.scheduler:
                self.events.append((decision.subject, event))
            else:
                self.ledger_events.append(event)
        entry = Entry(
            subject=decision.subject,
            account=decision.account,
            first_seq=1,
            epoch=0,
            now_ms=self.now_ms,
            prev_hash=b"",
            inputs={},
            marks={},
            told=-1,
            tables={},
            cause="",
            events=tuple(decision.events),
        )
        for tell in machine.tells(entry, lambda index: Position(0, offset, index)):
            if tell.topic == "gate-requests":
                self._send(self.gate, tell.record)
            elif tell.topic == "gate-decisions" and self.unheard is not None:
                self.unheard.append(tell.record)
            elif tell.topic in ("gate-decisions", "run-commands"):
                self._send(self.scheduler, tell.record)
            elif tell.topic.startswith("step-tasks."):
                self.dispatches.append((tell.record.step_id, tell.record.attempt))
                self.tasks.append(tell.record)
            else:
                self.letters.append(tell.record)


__all__ = ["Call", "Pair", "agent", "chain", "step", "tool"]


def entries_of(entry: Entry) -> list[Entry]:
    """Return an entry as if what each of its inputs caused were an entry of its own."""
    return [
        msgspec.structs.replace(entry, first_seq=part.first_seq, cause=cause, parts=(), events=part.events)
        for cause, part in zip(causes_of(entry), parts_of(entry), strict=True)
    ]
