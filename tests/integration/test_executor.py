"""The executor against a real broker: the test plays the gate by writing the tasks itself."""

import asyncio
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.brokers import create_topics_of
from tidegate import App, NonRetryable, Plan, ToolCall, codec, idempotency_key, report_cost, report_usage
from tidegate.domain.entry import Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Call, Instance, StepResult, StepTask
from tidegate.eventlog.interface import EventLogError, Record, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.executor.service import (
    EXIT_DRAINED,
    EXIT_LEASE_LAPSED,
    EXIT_LOOP_HUNG,
    Executor,
)
from tidegate.executor.settings import ExecutorSettings
from tidegate.registry import InstanceIdTakenError, Load, Registration

WAIT_S = 180.0
SHORT_LEASE_S = 5.0  # a busy machine must not let it lapse by itself
TASK_PARTITIONS = 3
RESULT_PARTITIONS = 2


class Following:
    """Reads a topic from where it ended when the reading began, and waits for what a test looks for."""

    def __init__(self, broker: KafkaBroker, topic: str, partitions: int) -> None:
        self._inbox = broker.plain_inbox()
        self._inbox.read_from({TopicPartition(topic, p): broker.offsets(topic, p).end for p in range(partitions)})
        self.seen: list[tuple[int, object]] = []  # (offset, record)

    def wait(self, done: Callable[[list[object]], bool], what: str) -> list[object]:
        deadline = time.monotonic() + WAIT_S
        while not done([record for _, record in self.seen]):
            assert time.monotonic() < deadline, f"waited in vain for {what}; seen: {self.seen}"
            self.poll(0.2)
        return [record for _, record in self.seen]

    def poll(self, timeout_s: float) -> None:
        self.seen += [(m.offset, codec.decode(m.value)) for m in self._inbox.poll(100, timeout_s)]

    def close(self) -> None:
        self._inbox.close()


def wait_for_partitions(broker: KafkaBroker, topic: str, count: int) -> None:
    """Block until the broker serves every partition of a topic that was made a moment ago."""
    deadline = time.monotonic() + WAIT_S
    for partition in range(count):
        while True:
            try:
                broker.offsets(topic, partition)
                break
            except EventLogError:
                assert time.monotonic() < deadline, f"{topic} is not there"
                time.sleep(0.05)


class World:
    """The topics that an executor needs, and a hand-played gate."""

    def __init__(self, bootstrap: str, prefix: str) -> None:
        self.settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=prefix)
        self.broker = KafkaBroker(self.settings)
        counts = {"instances": 1, "step-tasks.default": TASK_PARTITIONS, "step-results": RESULT_PARTITIONS}
        create_topics_of("executor", bootstrap, prefix, partitions=counts)
        for name, count in counts.items():
            wait_for_partitions(self.broker, name, count)
        self._writer = self.broker.writer()
        self._offsets = itertools.count(100)
        self.results = Following(self.broker, "step-results", RESULT_PARTITIONS)
        self.instances = Following(self.broker, "instances", 1)

    def close(self) -> None:
        self._writer.close()
        self.results.close()
        self.instances.close()
        self.broker.close()

    def registered(self, instance_id: str, count: int = 1) -> tuple[int, Instance]:
        """Wait for the count-th registration of an instance; return its incarnation and record."""

        def found(_records: object = None) -> list[tuple[int, Instance]]:
            return [
                (offset, record)
                for offset, record in self.instances.seen
                if isinstance(record, Instance) and record.instance_id == instance_id and record.incarnation == -1
            ]

        self.instances.wait(lambda _: len(found()) >= count, f"registration {count} of {instance_id}")
        return found()[count - 1]

    def heartbeat(self, instance_id: str, fits: Callable[[Instance], bool], what: str) -> Instance:
        """Wait for a record of an instance that fits."""

        def found() -> list[Instance]:
            return [
                r
                for _, r in self.instances.seen
                if isinstance(r, Instance) and r.instance_id == instance_id and fits(r)
            ]

        self.instances.wait(lambda _: bool(found()), what)
        return found()[0]

    def send(self, task: StepTask, to: int | None = None) -> StepTask:
        """Write a task to the partition of the instance that it is addressed to."""
        partition = partition_of(task.instance_id, TASK_PARTITIONS) if to is None else to
        key = f"{task.run_id}:{task.step_id}:{task.attempt}:{task.type}".encode()
        self._writer.send(Record("step-tasks.default", partition, key, codec.encode(task), (("type", b"StepTask"),)))
        self._writer.flush(WAIT_S)
        return task

    def task(self, target: "Target", function: str, arguments: object = None, **changes: object) -> StepTask:
        """Return a task for a function of the app; its position is above all before it."""
        offset = next(self._offsets)
        call = Call(
            kind=str(changes.pop("kind", "tool")),
            function=function,
            queue="default",
            arguments=json.dumps({} if arguments is None else arguments),
            timeout_ms=int(changes.pop("timeout_ms", 60_000)),  # type: ignore[call-overload]
            reserve_micros=500,
            idempotent=bool(changes.pop("idempotent", True)),
        )
        fields: dict[str, object] = {
            "type": "run",
            "run_id": "run-1",
            "step_id": f"node/{offset}",
            "attempt": 1,
            "account": "acme/shop",
            "instance_id": target.instance_id,
            "incarnation": target.incarnation,
            "source": Position(partition=2, offset=offset, index=0),
            "result_partition": 1,
            "idempotency_key": f"key-{offset}",
            "call": call,
        }
        return StepTask(**{**fields, **changes})  # type: ignore[arg-type]

    def place(self, target: "Target", function: str, arguments: object = None, **changes: object) -> StepTask:
        """Make a task and send it."""
        return self.send(self.task(target, function, arguments, **changes))

    def answers(self, *tasks: StepTask) -> list[StepResult]:
        """Wait for the answers to all of these tasks; return them in the order of the tasks."""

        def found() -> dict[tuple[str, int], StepResult]:
            return {(r.step_id, r.attempt): r for _, r in self.results.seen if isinstance(r, StepResult)}

        keys = [(task.step_id, task.attempt) for task in tasks]
        self.results.wait(lambda _: set(keys) <= set(found()), f"answers to {keys}")
        return [found()[key] for key in keys]

    def answer(self, task: StepTask) -> StepResult:
        return self.answers(task)[0]


class Target:
    """What a task is addressed to."""

    def __init__(self, instance_id: str, incarnation: int) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation


class InThread(Target):
    """An executor on an event loop in a thread of the test, so that its functions share memory with the test."""

    def __init__(self, world: World, app: App, instance_id: str = "worker-1", **settings: object) -> None:
        self.ended_with: list[int] = []
        self.process_end = threading.Event()
        values = {"slots": 2, "heartbeat_s": 0.2, "drain_s": 10.0, **settings}
        self.executor = Executor(
            world.broker,
            app,
            ExecutorSettings(**values),  # type: ignore[arg-type]
            instance_id=instance_id,
            end_process=self._end,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        super().__init__(instance_id, world.registered(instance_id)[0])

    def _run(self) -> None:
        self.ended_with.append(self._loop.run_until_complete(self.executor.run()))

    def _end(self, code: int) -> None:
        self.ended_with.append(code)
        self.process_end.set()

    def drain(self) -> None:
        self._loop.call_soon_threadsafe(self.executor.drain)

    def join(self) -> int:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the executor does not end"
        return self.ended_with[0]


@pytest.fixture
def world(bootstrap: str, topic_prefix: str) -> Iterator[World]:
    world = World(bootstrap, topic_prefix)
    yield world
    world.close()


@pytest.fixture
def execute(world: World) -> Iterator[Callable[..., InThread]]:
    """Start executors that are drained when the test ends."""
    started: list[InThread] = []

    def start(app: App, *arguments: str, **settings: object) -> InThread:
        started.append(InThread(world, app, *arguments, **settings))
        return started[-1]

    yield start
    for running in started:
        running.drain()
        running.drain()
    for running in started:
        if not running.process_end.is_set():
            running.join()


# --- registration -------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P7")
def test_registration_heartbeats_and_farewell(world: World) -> None:
    load = [Load(free_slots=3, marks={"gate-ledger-0": 7})]
    registration = Registration(
        world.broker, service="gate", instance_id="gate-1", load=lambda: load[0], heartbeat_s=0.1
    )
    incarnation = registration.start()
    offset, registered = world.registered("gate-1")
    assert (incarnation, registered.state, registered.pid) == (offset, "ready", os.getpid())
    load[0] = Load(free_slots=2)
    beat = world.heartbeat("gate-1", lambda r: r.free_slots == 2, "a heartbeat with the new load")
    assert (beat.incarnation, beat.state, beat.marks) == (incarnation, "ready", {})
    registration.drain()
    world.heartbeat("gate-1", lambda r: r.state == "draining", "the draining")
    registration.stop()
    gone = world.heartbeat("gate-1", lambda r: r.state == "gone", "the farewell")
    assert gone.incarnation == incarnation
    registration.stop()
    assert not registration.lapsed


def test_a_heartbeat_comes_at_once_when_asked_for(world: World) -> None:
    registration = Registration(world.broker, service="gate", instance_id="gate-1", heartbeat_s=3600)
    incarnation = registration.start()
    for _ in range(100):
        registration.beat_soon()
    world.heartbeat("gate-1", lambda r: r.incarnation == incarnation, "a heartbeat")
    registration.stop(farewell=False)
    beats = [r for _, r in world.instances.seen if isinstance(r, Instance) and r.incarnation == incarnation]
    assert len(beats) <= 3  # those hundred wishes came within milliseconds


def test_the_name_of_a_running_process_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.registry.registration.PREDECESSOR_WAIT_S", 0.3)
    code = textwrap.dedent("""
        from tidegate.eventlog.kafka import KafkaBroker
        from tidegate.eventlog.settings import KafkaSettings
        from tidegate.registry import Registration
        registration = Registration(KafkaBroker(KafkaSettings()), service="gate", instance_id="gate-1")
        registration.start()
        input()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(world), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as other:
        incarnation, _ = world.registered("gate-1")
        mine = Registration(world.broker, service="gate", instance_id="gate-1")
        with pytest.raises(InstanceIdTakenError, match=f"pid {other.pid} of .* is running"):
            mine.start()
        other.kill()
        other.wait()
        mine.start()
        assert [ended.incarnation for ended in mine.ended] == [incarnation]
        mine.stop()


# --- running tasks ------------------------------------------------------------------------------------------------------


@pytest.mark.feature("T1")
@pytest.mark.feature("T2")
@pytest.mark.feature("T3")
def test_sync_async_step_tool_and_agent(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")

    @app.tool
    def lookup(order_id: str, *, limit: int = 3) -> dict[str, object]:
        return {"order": order_id, "limit": limit, "key": idempotency_key()}

    @app.tool
    async def refund(amount: int) -> int:
        await asyncio.sleep(0)
        report_cost(70)
        report_cost(7)
        report_usage(calls=1)
        return amount * 2

    @app.step
    def greet(name: str) -> str:
        return f"hello {name}"

    @app.agent(tools=[lookup])
    def triage(state):  # type: ignore[no-untyped-def]
        if state.turn > 1:
            return state.output_of("lookup")
        return Plan("looking", [ToolCall("lookup", {"order_id": state.input})], cost_micros=11, usage={"tokens": 5})

    worker = execute(app)
    history = [
        {
            "content": "looking",
            "calls": [{"id": "", "name": "lookup", "arguments": {}, "ok": True, "output": [1], "error": None}],
        }
    ]
    tasks = [
        world.place(worker, "lookup", {"order_id": "A7"}),
        world.place(worker, "refund", {"amount": 21}),
    ]
    first, second = world.answers(*tasks)
    tasks = [
        world.place(worker, "greet", "Ada", kind="step"),
        world.place(worker, "triage", {"input": "A7", "turn": 1, "history": []}, kind="agent"),
    ]
    third, fourth = world.answers(*tasks)
    fifth = world.answer(world.place(worker, "triage", {"input": 1, "turn": 2, "history": history}, kind="agent"))
    here = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    assert {result.code_version for result in (first, second, third, fourth, fifth)} == {here}

    assert {result.outcome for result in (first, second, third, fourth, fifth)} == {"succeeded"}
    assert json.loads(first.output) == {"order": "A7", "limit": 3, "key": "key-100"}
    assert first.actual_micros == 500  # what was set aside, for want of a report
    assert (second.output, second.actual_micros, second.usage) == ("42", 77, {"calls": 1})
    assert json.loads(third.output) == "hello Ada"
    assert json.loads(fourth.output) == {
        "content": "looking",
        "tool_calls": [{"id": "", "name": "lookup", "arguments": {"order_id": "A7"}}],
        "final": None,
        "output": None,
    }
    assert (fourth.actual_micros, fourth.usage) == (11, {"tokens": 5})
    assert json.loads(fifth.output) == {"content": "", "tool_calls": [], "final": True, "output": [1]}
    assert first.incarnation == worker.incarnation
    assert 0 < first.started_ms <= first.finished_ms
    assert first.account == "acme/shop"


@pytest.mark.feature("T2")
@pytest.mark.feature("G3")
def test_failures_say_what_and_whether_repeating_helps(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")
    calls: list[str] = []

    @app.tool
    def naps(hours: int) -> None: ...

    @app.tool
    def raises() -> None:
        report_cost(9)
        raise ValueError("no \ud800 luck " + "x" * 10_000)

    @app.tool
    def gives_up() -> None:
        raise NonRetryable("card stolen")

    @app.tool
    async def not_json() -> object:
        calls.append("not_json")
        return {"when": object()}

    @app.tool
    def not_a_number() -> float:
        return float("nan")

    @app.tool
    def too_large() -> str:
        return "x" * 2000

    @app.tool
    def quits() -> None:
        raise SystemExit(3)

    worker = execute(app, slots=20, output_max_bytes=1000, code_version="release-7")
    names = ["raises", "gives_up", "not_json", "not_a_number", "too_large", "quits", "unheard_of"]
    tasks = [world.place(worker, name) for name in names]
    tasks += [
        world.place(worker, "naps", {"hours": "many", "bogus": 1}),
        world.place(worker, "naps", [1]),
        world.place(worker, "naps", {"hours": 1}, kind="step"),
    ]
    results = world.answers(*tasks)
    assert {result.outcome for result in results} == {"failed"}
    # Of what was entered: nothing is said of the code where none was.
    assert [result.code_version for result in results] == ["release-7"] * 6 + [""] * 4
    assert [(result.error_class, result.retryable) for result in results] == [
        ("ValueError", True),
        ("NonRetryable", False),
        ("NotJson", False),
        ("NotJson", False),
        ("OutputTooLarge", False),
        ("SystemExit", True),
        ("UnknownFunction", False),
        ("BadArguments", False),
        ("BadArguments", False),
        ("UnknownFunction", False),
    ]
    assert calls == ["not_json"]
    messages = [result.error_message for result in results]
    assert messages[0].startswith("no ? luck xxx")
    assert len(messages[0]) == 4000
    assert results[0].actual_micros == 9
    assert results[1].actual_micros == 0
    assert messages[2] == "output.when: object has no JSON form; return numbers, text, lists or objects"
    assert "2002 bytes as JSON, at most 1000" in messages[4]
    assert messages[6] == "this executor has no tool 'unheard_of'"
    assert "hours: Input should be a valid integer" in messages[7]
    assert "bogus: there is no such parameter" in messages[7]
    assert messages[8] == "expected an object with the members hours"
    assert messages[9] == "this executor has no step 'naps'"


def test_only_tasks_for_this_incarnation_above_the_mark_are_entered(
    world: World, execute: Callable[..., InThread]
) -> None:
    app = App("shop")
    entered: list[str] = []

    @app.tool
    def note(text: str) -> None:
        entered.append(text)

    worker = execute(app)
    first = world.place(worker, "note", {"text": "first"})
    world.answer(first)
    partition = partition_of(worker.instance_id, TASK_PARTITIONS)
    world.send(first)  # told again
    older = Position(partition=2, offset=first.source.offset - 1, index=4095)
    world.place(worker, "note", {"text": "older"}, source=older)
    world.place(Target(worker.instance_id, worker.incarnation - 1), "note", {"text": "for my predecessor"})
    world.place(Target(worker.instance_id, worker.incarnation + 1), "note", {"text": "for my successor"})
    world.send(world.task(Target("somebody-else", worker.incarnation), "note", {"text": "not mine"}), to=partition)
    same_entry = Position(partition=2, offset=first.source.offset, index=1)
    second = world.place(worker, "note", {"text": "next of the same entry"}, source=same_entry)
    other_ledger = world.place(
        worker, "note", {"text": "of another ledger partition"}, source=Position(partition=0, offset=1, index=0)
    )
    world.answers(second, other_ledger)
    assert entered == ["first", "next of the same entry", "of another ledger partition"]
    marks = {"gate-ledger-2": same_entry.rank(), "gate-ledger-0": 1 << 12}
    world.heartbeat(worker.instance_id, lambda r: r.marks == marks and not r.running, "the marks")


@pytest.mark.feature("P7")
def test_busy_when_no_slot_is_free_and_a_heartbeat_as_soon_as_one_is(
    world: World, execute: Callable[..., InThread]
) -> None:
    app = App("shop")
    door = threading.Event()

    @app.tool
    def waits() -> str:
        assert door.wait(WAIT_S)
        return "done"

    worker = execute(app, slots=2, heartbeat_s=3600)
    held = [world.place(worker, "waits") for _ in range(2)]
    refused = world.place(worker, "waits")
    assert world.answer(refused).outcome == "busy"
    assert world.answer(refused).actual_micros == 0
    door.set()
    assert [result.outcome for result in world.answers(*held)] == ["succeeded"] * 2
    world.heartbeat(worker.instance_id, lambda r: r.incarnation != -1 and r.free_slots > 0, "word of the free slot")
    again = refused.source.offset + 1
    repeated = world.place(worker, "waits", step_id=refused.step_id, attempt=2)
    assert repeated.source.offset == again
    assert world.answer(repeated).outcome == "succeeded"


def test_an_attempt_is_listed_as_running_until_its_answer_is_acknowledged(
    world: World, execute: Callable[..., InThread]
) -> None:
    app = App("shop")
    door = threading.Event()

    @app.tool
    def waits() -> None:
        assert door.wait(WAIT_S)

    worker = execute(app, slots=1)
    held = world.place(worker, "waits")
    beat = world.heartbeat(worker.instance_id, lambda r: bool(r.running), "the running attempt")
    assert (beat.free_slots, [r.step_id for r in beat.running]) == (0, [held.step_id])
    assert beat.marks == {"gate-ledger-2": held.source.rank()}
    door.set()
    world.answer(held)
    mark = held.source.rank()
    world.heartbeat(
        worker.instance_id, lambda r: not r.running and r.marks.get("gate-ledger-2") == mark, "the end of it"
    )


# --- timeouts, cancels, hangs -------------------------------------------------------------------------------------------


@pytest.mark.feature("T4")
def test_timeouts(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")
    door = threading.Event()
    aborted: list[str] = []

    @app.tool
    def sync_forever() -> None:
        assert door.wait(WAIT_S)

    @app.tool
    async def async_forever() -> None:
        try:
            report_cost(3)
            await asyncio.sleep(3600)
        finally:
            aborted.append("async")

    worker = execute(app, slots=2)
    stuck = world.place(worker, "sync_forever", timeout_ms=100, idempotent=False)
    slow = world.place(worker, "async_forever", timeout_ms=100)
    first, second = world.answers(stuck, slow)
    assert (first.outcome, first.error_class, first.retryable) == ("timed_out", "TimedOut", False)
    assert first.error_message == (
        "not finished after 0.1 s; it may have had its effect, and is not idempotent\nit may still be running"
    )
    assert (second.outcome, second.retryable, second.actual_micros) == ("timed_out", True, 3)
    assert aborted == ["async"]
    # The thread cannot be stopped: it keeps its slot until it ends.
    beat = world.heartbeat(worker.instance_id, lambda r: bool(r.marks) and not r.running, "both answered")
    assert (beat.slots, beat.free_slots) == (1, 1)
    door.set()
    world.heartbeat(worker.instance_id, lambda r: bool(r.marks) and r.free_slots == 2, "the slot is free again")
    assert [r.outcome for _, r in world.results.seen if isinstance(r, StepResult)] == ["timed_out"] * 2


@pytest.mark.feature("D4")
def test_cancel_aborts_async_and_lets_sync_end(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")
    door, entered = threading.Event(), threading.Semaphore(0)

    @app.tool
    def in_thread() -> str:
        entered.release()
        assert door.wait(WAIT_S)
        return "done all the same"

    @app.tool
    async def on_loop() -> None:
        entered.release()
        await asyncio.sleep(3600)

    worker = execute(app)
    tasks = [world.place(worker, "in_thread"), world.place(worker, "on_loop")]
    for _ in tasks:
        assert entered.acquire(timeout=WAIT_S)
    for task in tasks:
        world.place(worker, "", type="cancel", step_id=task.step_id, call=None)
    assert world.answer(tasks[1]).outcome == "cancelled"
    door.set()
    result = world.answer(tasks[0])
    assert (result.outcome, result.output) == ("succeeded", '"done all the same"')
    world.place(worker, "", type="cancel", step_id="never-heard-of", call=None)
    assert world.answer(world.place(worker, "in_thread")).outcome == "succeeded"


def test_a_function_that_blocks_the_loop_beyond_its_deadline_ends_the_process(
    world: World, execute: Callable[..., InThread]
) -> None:
    app = App("shop")
    door = threading.Event()

    @app.tool
    async def blocks() -> None:
        door.wait(WAIT_S)

    worker = execute(app, hang_grace_s=0.3)
    world.place(worker, "blocks", timeout_ms=100)
    assert worker.process_end.wait(WAIT_S)
    assert worker.ended_with == [EXIT_LOOP_HUNG]
    door.set()


# --- ending -------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P7")
def test_drain_finishes_what_runs_and_hands_back_the_rest(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")
    door = threading.Event()

    @app.tool
    def waits() -> str:
        assert door.wait(WAIT_S)
        return "done"

    worker = execute(app)
    held = world.place(worker, "waits")
    world.heartbeat(worker.instance_id, lambda r: bool(r.running), "the running attempt")
    worker.drain()
    draining = world.heartbeat(worker.instance_id, lambda r: r.state == "draining", "the draining")
    assert draining.free_slots == 0
    late = world.place(worker, "waits")
    result = world.answer(late)
    assert (result.outcome, result.started_ms) == ("released", 0)
    door.set()
    assert world.answer(held).outcome == "succeeded"
    assert worker.join() == EXIT_DRAINED
    gone = world.heartbeat(worker.instance_id, lambda r: r.state == "gone", "the farewell")
    assert gone.running == ()


def test_what_outlasts_the_drain_ends_without_an_answer(world: World, execute: Callable[..., InThread]) -> None:
    app = App("shop")

    @app.tool
    async def sleeps() -> None:
        await asyncio.sleep(3600)

    worker = execute(app, drain_s=0.2)
    held = world.place(worker, "sleeps")
    world.heartbeat(worker.instance_id, lambda r: bool(r.running), "the running attempt")
    worker.drain()
    assert worker.join() == EXIT_DRAINED
    gone = world.heartbeat(worker.instance_id, lambda r: r.state == "gone", "the farewell")
    assert [r.step_id for r in gone.running] == [held.step_id]  # not known how far it came: the gate finds it lost
    assert not world.results.seen


# --- real processes -----------------------------------------------------------------------------------------------------

APP_FILE = """
import asyncio, pathlib, time
from tidegate import App

app = App("shop")
here = pathlib.Path(__file__).parent

@app.tool(timeout_s=60)
def note(text: str) -> str:
    with (here / "entered").open("a") as file:
        file.write(text + "\\n")
    return text

@app.tool(timeout_s=60)
def note_and_wait(text: str) -> str:
    note(text)
    while not (here / "go").exists():
        time.sleep(0.02)
    return text
"""


def environment(world: World, **variables: str) -> dict[str, str]:
    return {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": world.settings.bootstrap,
        "TIDEGATE_KAFKA_TOPIC_PREFIX": world.settings.topic_prefix,
        **variables,
    }


class Worker(Target):
    """A real executor process."""

    def __init__(self, world: World, folder: Path, count: int = 1, **variables: str) -> None:
        self._log_path = folder / f"log-{count}"
        defaults = {"TIDEGATE_EXECUTOR_HEARTBEAT_S": "0.2", "TIDEGATE_EXECUTOR_SLOTS": "2"}
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tidegate.executor", "--app", str(folder / "shop_app.py"), "--instance-id", "w"],
                env=environment(world, **defaults, **variables),
                stderr=log,
                stdout=log,
            )
        try:
            incarnation, self.registration = world.registered("w", count)
        except AssertionError:
            self.process.kill()
            pytest.fail(f"the executor does not register: {self.log()}")
        super().__init__("w", incarnation)

    def log(self) -> str:
        return self._log_path.read_text(encoding="utf-8")

    def wait(self) -> int:
        return self.process.wait(WAIT_S)


@pytest.fixture
def work(world: World, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Start executor processes, each the next incarnation of the same instance; they are killed when the test ends."""
    (tmp_path / "shop_app.py").write_text(APP_FILE)
    (tmp_path / "entered").touch()
    started: list[Worker] = []

    def start(**variables: str) -> Worker:
        started.append(Worker(world, tmp_path, len(started) + 1, **variables))
        return started[-1]

    yield start
    for worker in started:
        worker.process.kill()
        worker.process.wait()


def entered(folder: Path) -> list[str]:
    return (folder / "entered").read_text().splitlines()


def wait_for_entry(folder: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in entered(folder):
        assert time.monotonic() < deadline, f"{text} was not entered"
        time.sleep(0.02)


def test_sigterm_drains_and_exits_with_0(world: World, work: Callable[..., Worker], tmp_path: Path) -> None:
    worker = work()
    held = world.place(worker, "note_and_wait", {"text": "held"})
    wait_for_entry(tmp_path, "held")
    worker.process.send_signal(signal.SIGTERM)
    world.heartbeat("w", lambda r: r.state == "draining", "the draining")
    late = world.place(worker, "note", {"text": "late"})
    assert world.answer(late).outcome == "released"
    (tmp_path / "go").touch()
    assert world.answer(held).outcome == "succeeded"
    assert worker.wait() == EXIT_DRAINED
    world.heartbeat("w", lambda r: r.state == "gone", "the farewell")
    assert entered(tmp_path) == ["held"]


@pytest.mark.feature("D1")
def test_kill_and_restart_registers_with_proof(world: World, work: Callable[..., Worker], tmp_path: Path) -> None:
    first = work()
    held = world.place(first, "note_and_wait", {"text": "held"})
    wait_for_entry(tmp_path, "held")
    first.process.kill()  # not waited for: its zombie is proof enough
    second = work()
    assert second.registration.task_offset == 1
    ((incarnation, evidence),) = [(e.incarnation, e.evidence) for e in second.registration.ended]
    assert incarnation == first.incarnation
    assert evidence.startswith(f"pid {first.process.pid} is gone")
    world.send(held)  # addressed to the dead one: for nobody
    assert world.answer(world.place(second, "note", {"text": "next"})).incarnation == second.incarnation
    assert entered(tmp_path) == ["held", "next"]


@pytest.mark.feature("D1")
def test_after_a_lapse_nothing_is_entered_and_the_process_ends(
    world: World, work: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = work(TIDEGATE_EXECUTOR_LEASE_S=str(SHORT_LEASE_S))
    held = world.place(worker, "note_and_wait", {"text": "held"})
    wait_for_entry(tmp_path, "held")
    worker.process.send_signal(signal.SIGSTOP)
    late = world.place(worker, "note", {"text": "late"})
    time.sleep(SHORT_LEASE_S + 0.5)
    (tmp_path / "go").touch()
    worker.process.send_signal(signal.SIGCONT)
    assert worker.wait() == EXIT_LEASE_LAPSED
    assert entered(tmp_path) == ["held"]
    assert "lease lapsed" in worker.log()
    world.results.poll(1.0)
    assert late.step_id not in [r.step_id for _, r in world.results.seen if isinstance(r, StepResult)]
    assert not [r for _, r in world.instances.seen if isinstance(r, Instance) and r.state == "gone"]
    again = work()
    assert [ended.incarnation for ended in again.registration.ended] == [worker.incarnation]
    assert held.incarnation != again.incarnation


@pytest.mark.feature("D1")
def test_the_lease_is_checked_right_before_the_function_is_entered(
    world: World, work: Callable[..., Worker], tmp_path: Path
) -> None:
    worker = work(TIDEGATE_EXECUTOR_LEASE_S=str(SHORT_LEASE_S), TIDEGATE_FAILPOINTS="executor.before-enter=stop")
    world.place(worker, "note", {"text": "too late"})
    _, status = os.waitpid(worker.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    time.sleep(SHORT_LEASE_S + 0.5)
    worker.process.send_signal(signal.SIGCONT)
    assert worker.wait() == EXIT_LEASE_LAPSED
    assert entered(tmp_path) == []


@pytest.mark.feature("D1")
@pytest.mark.parametrize(
    ("point", "is_entered", "is_answered"),
    [
        ("executor.task-received", False, False),
        ("executor.before-enter", False, False),
        ("executor.after-function", True, False),
        ("executor.before-result-ack", True, True),
    ],
)
def test_killed_at_every_edge(
    world: World,
    work: Callable[..., Worker],
    tmp_path: Path,
    *,
    point: str,
    is_entered: bool,
    is_answered: bool,
) -> None:
    worker = work(TIDEGATE_FAILPOINTS=f"{point}=kill")
    task = world.place(worker, "note", {"text": "once"})
    assert worker.wait() == -signal.SIGKILL
    assert entered(tmp_path) == (["once"] if is_entered else [])
    again = work()
    assert [ended.incarnation for ended in again.registration.ended] == [worker.incarnation]
    assert world.answer(world.place(again, "note", {"text": "alive"})).outcome == "succeeded"
    answered = [r.step_id for _, r in world.results.seen if isinstance(r, StepResult)]
    assert (task.step_id in answered) == is_answered
