"""What a rehearsal is played on: both owners and one executor per queue, on one log in memory, and a clock that is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from tidegate import codec
from tidegate.domain.messages import EndedIncarnation, Instance, StepTask
from tidegate.domain.run import RunState
from tidegate.eventlog.interface import Message, Record, TopicPartition
from tidegate.eventlog.memory import MAX_RECORD_BYTES, MemoryBroker
from tidegate.eventlog.owner import DEAD_LETTERS, OwnerLoop
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.executor import results
from tidegate.executor.decide import Verdict, judge_task
from tidegate.gate.placement import Executors
from tidegate.gate.service import GateMachine
from tidegate.registry.registration import INSTANCES, READY, mark_name
from tidegate.scheduler.service import SchedulerMachine
from tidegate.testing.performer import Performer

SLOTS: Final = 1_000
NEVER_MS: Final = 10**15  # no lease runs out because the clock jumped
QUIET_TURNS: Final = 3
MAX_TURNS: Final = 100_000
TASKS: Final = "step-tasks."
_TOPIC_CONFIG: Final = {"max.message.bytes": str(MAX_RECORD_BYTES)}  # as those of a deployment

Perform = Callable[[StepTask], bool]


class RestlessError(RuntimeError):
    """The rehearsal does not come to rest: something is done over and over."""


class Stage:
    """Single-threaded, but for the functions. Nothing happens but in `settle`."""

    def __init__(self, offered: Mapping[str, tuple[str, ...]], now_ms: int) -> None:
        """offered: by queue, the functions as registrations list them."""
        self.now_ms = now_ms
        self.performer = Performer()
        self.broker = MemoryBroker(clock_ms=lambda: self.now_ms)
        self._offered = offered
        self._writer = self.broker.writer()
        self._marks: dict[str, dict[str, int]] = {queue: {} for queue in offered}
        self._incarnations: dict[str, int] = {}
        executors = Executors(
            NEVER_MS, lambda: self.now_ms, lambda: self.broker.offsets(INSTANCES, 0).end, wall_ms=lambda: self.now_ms
        )
        self.scheduler, gate = SchedulerMachine(1, 1), GateMachine(1, 1, executors)
        self._make_topics((self.scheduler, gate))
        for queue in offered:
            self._register(queue)
        self._tasks = self.broker.plain_inbox()
        self._tasks.read_from({TopicPartition(TASKS + queue, 0): 0 for queue in offered})
        self._loops = [self._loop(machine) for machine in (self.scheduler, gate)]

    def _make_topics(self, machines: Iterable[SchedulerMachine | GateMachine]) -> None:
        names = {DEAD_LETTERS, "schemas", results.STEP_RESULTS, *(TASKS + queue for queue in self._offered)}
        for machine in machines:
            names |= {machine.lead_topic, *machine.other_topics, machine.log_topic, machine.snapshot_topic}
            names |= set(machine.table_topics)
        for name in sorted(names):
            self.broker.create_topic(name, config=_TOPIC_CONFIG)

    def _loop(self, machine: Any) -> OwnerLoop:
        loop = OwnerLoop(
            self.broker,
            machine,
            f"rehearsal-{machine.service}",
            clock_ms=lambda: self.now_ms,
            monotonic_s=lambda: self.now_ms / 1000,
        )
        loop.start()
        return loop

    def _register(self, queue: str) -> None:
        """Register the queue's executor; one that was there before is then known to be dead."""
        before = self._incarnations.get(queue)
        ended = () if before is None else (EndedIncarnation(incarnation=before, evidence="it was lost, as rehearsed"),)
        row = Instance(
            instance_id=_executor(queue),
            service="executor",
            incarnation=-1,
            state=READY,
            host="rehearsal",
            boot_id="rehearsal",
            pid=1,
            pid_started=0.0,
            started_ms=self.now_ms,
            at_ms=self.now_ms,
            queue=queue,
            slots=SLOTS,
            functions=self._offered[queue],
            ended=ended,
        )
        self._incarnations[queue] = self.broker.offsets(INSTANCES, 0).end
        self.write(INSTANCES, row.instance_id, row)

    # -- what happens ---------------------------------------------------------------

    def write(self, topic: str, key: str, record: Any) -> None:
        """Write a record of ours."""
        header = ((TYPE_HEADER, type(record).__name__.encode()),)
        self._writer.send(Record(topic, 0, key.encode(), codec.encode(record), header))
        self._writer.flush(0.0)

    def settle(self, perform: Perform) -> None:
        """Let everybody work until nothing moves. `perform` does a task; False says that its executor died with it.

        Raises RestlessError.
        """
        quiet, seen = 0, self._progress()
        for _ in range(MAX_TURNS):
            self._work(perform)
            for loop in self._loops:
                loop.run_once(0.0)
            now = self._progress()
            quiet, seen = (quiet + 1 if now == seen else 0), now
            if quiet >= QUIET_TURNS:
                return
        raise RestlessError(f"it does not come to rest in {MAX_TURNS} turns")

    def _progress(self) -> tuple[int, ...]:
        """Return numbers that change whenever something is read or written."""
        read = sum(sum(part.inputs.values()) for loop in self._loops for part in loop.owned.values())
        known = sum(sum(loop.tables.versions.values()) for loop in self._loops)
        written = (self.broker.offsets(loop.machine.log_topic, 0).end for loop in self._loops)
        tasks = (self.broker.offsets(TASKS + queue, 0).end for queue in self._offered)
        return (read, known, *written, *tasks, sum(sum(marks.values()) for marks in self._marks.values()))

    def _work(self, perform: Perform) -> None:
        lost = set()
        for message in self._tasks.poll(500, 0.0):
            task: StepTask = codec.decode(message.value)
            queue = message.topic.removeprefix(TASKS)
            if self._verdict(queue, task) is Verdict.RUN and not perform(task):
                lost.add(queue)
        for queue in sorted(lost):
            self._register(queue)

    def _verdict(self, queue: str, task: StepTask) -> Verdict:
        marks = self._marks[queue]
        verdict = judge_task(
            task,
            instance_id=_executor(queue),
            incarnation=self._incarnations[queue],
            marks=marks,
            free_slots=1,
            draining=False,
        )
        if verdict in (Verdict.RUN, Verdict.CANCEL):
            marks[mark_name(task.source.partition)] = task.source.rank()
        return verdict

    def answer(self, task: StepTask, result: Any) -> None:
        """Write what came of a task."""
        record = results.to_record(task, result)
        self._writer.send(record)
        self._writer.flush(0.0)

    # -- what is there ---------------------------------------------------------------

    def next_due_ms(self) -> int | None:
        """Return when something happens by itself, None for never."""
        dues = (loop.machine.next_due_ms(part.state) for loop in self._loops for part in loop.owned.values())
        return min((due for due in dues if due is not None), default=None)

    def messages(self, topic: str) -> Iterator[Message]:
        """Yield what a topic holds."""
        start, end = self.broker.offsets(topic, 0)
        return self.broker.read(topic, 0, start, end)

    def run(self, run_id: str) -> RunState | None:
        """Return a run as the scheduler has it."""
        found: RunState | None = self._loops[0].owned[0].state.find(run_id)
        return found

    def close(self) -> None:
        """End the functions' loop."""
        self.performer.close()


def _executor(queue: str) -> str:
    return f"rehearsal-{queue}"
