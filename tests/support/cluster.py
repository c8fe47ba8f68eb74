"""Scheduler and gate under the real owner loop, on the log in memory, with one executor that the test plays.

Single-threaded: `settle` lets everybody work until nothing moves. A process dies by `crash`: what it had sent may or may not
have been written, as the seed decides.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from support.pure import chain
from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import DeadLetter, Instance, PolicyPublished, RunCommand, StepResult, StepTask
from tidegate.domain.run import RunState
from tidegate.eventlog.interface import Message, Record, TopicPartition
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.owner import OwnerLoop
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine
from tidegate.scheduler.service import SchedulerMachine

RUN_PARTITIONS, ACCOUNT_PARTITIONS = 2, 2
TOPICS = {
    "run-commands": RUN_PARTITIONS,
    "run-events": RUN_PARTITIONS,
    "gate-decisions": RUN_PARTITIONS,
    "step-results": RUN_PARTITIONS,
    "gate-requests": ACCOUNT_PARTITIONS,
    "gate-leases": ACCOUNT_PARTITIONS,
    "gate-ledger": ACCOUNT_PARTITIONS,
    "run-snapshots": RUN_PARTITIONS,
    "gate-snapshots": ACCOUNT_PARTITIONS,
    "step-tasks.default": 1,
    "instances": 1,
    "policies": 1,
    "workflows": 1,
    "controls": 1,
    "dead-letters": 1,
    "schemas": 1,
}


class Crash(BaseException):
    """A process ends here, without any handler running."""


def result_of(task: StepTask, **fields: Any) -> StepResult:
    """Return a result of the task as the executor would send it: a success, if the fields do not say otherwise."""
    return StepResult(
        run_id=task.run_id,
        step_id=task.step_id,
        attempt=task.attempt,
        account=task.account,
        instance_id=task.instance_id,
        incarnation=task.incarnation,
        **({"outcome": "succeeded", "output": "1"} | fields),
    )


class Cluster:
    """One broker in memory, owners of both logs, an executor of step functions a, b and c."""

    def __init__(self, seed: int | None = None, checkpoints: CheckpointSettings | None = None) -> None:
        self.now_ms = 1_000_000
        self.checkpoints = checkpoints
        self.rng = None if seed is None else random.Random(seed)
        self.broker = MemoryBroker(clock_ms=lambda: self.now_ms, rng=self.rng)
        for name, count in TOPICS.items():
            self.broker.create_topic(name, count)
        self.writer = self.broker.writer()
        self.tasks = self.broker.plain_inbox()
        self.entered: Counter[tuple[str, str, int]] = Counter()
        self.seen_ranks: dict[int, int] = {}
        self.running = ""  # whose turn it is
        self.fails: dict[str, str] = {}  # error classes of the functions that fail
        self.holds_back = False  # whether the executor keeps its results
        self.held_back: list[tuple[int, StepResult]] = []
        self.skew_ms = 0  # how far the owners' clocks are off
        self.incarnation = self.register()
        self.tasks.read_from({TopicPartition("step-tasks.default", 0): 0})
        self.owners: dict[str, OwnerLoop] = {}
        self.generation = 0
        self.start("scheduler")
        self.start("gate")

    # -- processes ----------------------------------------------------------------------

    def start(self, service: str, instance_id: str | None = None) -> OwnerLoop:
        """Start an owner; under its old name it has its partitions back at once."""
        loop = OwnerLoop(
            self.broker,
            self.machine(service),
            instance_id or f"{service}-0",
            clock_ms=lambda: self.now_ms + self.skew_ms,
            monotonic_s=lambda: self.now_ms / 1000,
            checkpoints=self.checkpoints,
        )
        loop.start()
        self.owners[service] = loop
        return loop

    def machine(self, service: str) -> Any:
        """Return a new machine of the service."""
        if service == "scheduler":
            return SchedulerMachine(RUN_PARTITIONS, ACCOUNT_PARTITIONS)
        executors = Executors(
            10_000,
            lambda: self.now_ms,
            lambda: self.broker.offsets("instances", 0).end,
            wall_ms=lambda: self.now_ms,
            task_partitions=lambda queue: TOPICS.get(f"step-tasks.{queue}", 0),
        )
        return GateMachine(RUN_PARTITIONS, ACCOUNT_PARTITIONS, executors)

    def crash(self, service: str) -> None:
        """Kill an owner: its writers are gone with what they had not written."""
        dead = self.owners.pop(service)
        self.broker.crash(dead._log_writer)
        self.broker.crash(dead._tell_writer)

    def register(self, **changes: Any) -> int:
        """Write the registration of an executor; returns its incarnation."""
        usual: dict[str, Any] = {
            "instance_id": "ex-0",
            "service": "executor",
            "incarnation": -1,
            "state": "ready",
            "host": "h",
            "boot_id": "b",
            "pid": 1,
            "pid_started": 0.0,
            "started_ms": 0,
            "at_ms": self.now_ms,
            "queue": "default",
            "slots": 4,
            "functions": ("step:a", "step:b", "step:c"),
        }
        row = Instance(**(usual | changes))
        offsets: list[int] = []
        self._send("instances", 0, row.instance_id, row, offsets.append)
        return offsets[0]

    # -- work ---------------------------------------------------------------------------

    def command(self, run_id: str, kind: str, **fields: Any) -> None:
        fields = {"command_id": f"{kind}-{run_id}", "content_hash": "h", "source": "run-requests:0:0"} | fields
        record = RunCommand(run_id=run_id, type=kind, original=b"{}", **fields)
        self._send("run-commands", partition_of(run_id, RUN_PARTITIONS), f"{run_id}:{record.command_id}", record)

    def start_run(self, run_id: str, *functions: str, **fields: Any) -> None:
        self.start_definition(run_id, chain(*(functions or ("a", "b", "c"))), **fields)

    def start_definition(self, run_id: str, definition: dict[str, Any], **fields: Any) -> None:
        """Ask for a run of any definition whose functions are the steps a, b and c."""
        text = canonical.dumps(definition)
        self.command(
            run_id,
            "start",
            account=fields.pop("account", "acme"),
            workflow=f"{definition['name']}@{definition['version']}",
            definition=text,
            definition_hash=canonical.digest(text),
            input="1",
            **fields,
        )

    def execute(self) -> int:
        """Play the executor: run every task that is addressed to us and new; returns how many messages there were."""
        messages = self.tasks.poll(100, 0.0)
        for message in messages:
            task = codec.decode(message.value)
            rank = task.source.rank()
            if task.incarnation != self.incarnation or rank <= self.seen_ranks.get(task.source.partition, -1):
                continue
            self.seen_ranks[task.source.partition] = rank
            if task.type != "run":
                continue
            self.entered[task.run_id, task.step_id, task.attempt] += 1
            error_class = self.fails.get(task.call.function) if task.call is not None else None
            result = (
                result_of(task, output='{"ok":true}', actual_micros=2)
                if error_class is None
                else result_of(task, outcome="failed", output="", error_class=error_class)
            )
            if self.holds_back:
                self.held_back.append((task.result_partition, result))
            else:
                self._answer(task.result_partition, result)
        return len(messages)

    def answer_late(self) -> None:
        """Send the results that were held back."""
        for partition, result in self.held_back:
            self._answer(partition, result)

    def _answer(self, partition: int, result: StepResult) -> None:
        key = f"{result.run_id}:{result.step_id}:{result.attempt}:succeeded"
        self._send("step-results", partition, key, result)

    def require_approval(self) -> None:
        """Have a person asked about every step."""
        document = {
            "policy": "ask",
            "version": "1",
            "rules": [{"name": "always", "when": "true", "then": "require_approval"}],
        }
        self.publish(document)

    def publish(self, document: dict[str, Any], by: str = "") -> None:
        """Put a document of the gate in force."""
        kind = document.get("kind", "policy")
        key = document[kind] if kind == "policy" else f"{kind}:{document[kind]}"
        text = canonical.dumps(document)
        row = PolicyPublished(policy_id=key, version="1", document=text, by=by, at_ms=self.now_ms)
        self._send("policies", 0, key, row)
        for _ in range(100):  # a poll may bring something else first
            self.turn()
            if self.owners["gate"].tables.rows["policies"].get(key) == row:
                return
        raise AssertionError("the gate does not read its policies")

    def turn(self) -> int:
        """Let everybody work once; returns how much moved. A Crash ends the owner that it happens in."""
        moved = self.execute()
        for service, loop in list(self.owners.items()):
            self.running = service
            try:
                moved += loop.run_once(0.0)
            except Crash:
                self.crash(service)
                self.start(service)
                moved += 1
        self.now_ms += 10
        return moved

    def settle(self, turns: int = 400) -> None:
        """Let everybody work until nothing has moved for some turns. A Crash ends the owner that it happens in."""
        quiet = 0
        for _ in range(turns):
            quiet = 0 if self.turn() else quiet + 1
            if quiet > 20:
                return
        raise AssertionError("it never comes to rest")

    def _send(
        self, topic: str, partition: int, key: str, record: Any, acked: Callable[[int], None] | None = None
    ) -> None:
        self.writer.send(Record(topic, partition, key.encode(), codec.encode(record)), acked)
        self.writer.flush(1.0)

    # -- what came of it ----------------------------------------------------------------

    def verified(self) -> tuple[Report, dict[str, RunState]]:
        """Verify both logs and return the folded runs."""
        report, runs = Report(), {}
        for topic, count in (("run-events", RUN_PARTITIONS), ("gate-ledger", ACCOUNT_PARTITIONS)):
            for partition in range(count):
                start, end = self.broker.offsets(topic, partition)
                runs.update(verify_partition(self.broker.read(topic, partition, start, end), report))
        return report, runs

    def ledger_state(self, partition: int) -> Any:
        return self.owners["gate"].owned[partition].state

    def messages(self, topic: str, partition: int) -> list[Message]:
        start, end = self.broker.offsets(topic, partition)
        return list(self.broker.read(topic, partition, start, end))

    def events_of(self, run_id: str) -> list[Any]:
        """Return the run's events, void ones included."""
        messages = self.messages("run-events", partition_of(run_id, RUN_PARTITIONS))
        records = [codec.decode(message.value) for message in messages]
        return [event for record in records if getattr(record, "subject", "") == run_id for event in record.events]

    def ledger_events(self) -> list[Any]:
        """Return the events of all ledger partitions, void ones included."""
        records = [
            codec.decode(message.value)
            for partition in range(ACCOUNT_PARTITIONS)
            for message in self.messages("gate-ledger", partition)
        ]
        return [event for record in records for event in getattr(record, "events", ())]

    def letters(self) -> list[DeadLetter]:
        start, end = self.broker.offsets("dead-letters", 0)
        return [codec.decode(message.value) for message in self.broker.read("dead-letters", 0, start, end)]
