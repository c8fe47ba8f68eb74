"""The world: one broker, all processes, one clock, one chance. `step` is the only thing that ever happens."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import threading
from bisect import bisect
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, NoReturn, Self
from unittest import mock

import structlog

from simulation import budgets, definitions, waiting
from simulation import work as works
from simulation.accidents import SNAPSHOTS, Accidents
from simulation.executor import ExecutorLife, Outcome
from simulation.judge import Judge, Violation
from simulation.processes import (
    AdmissionLife,
    GateLife,
    Life,
    ModelStore,
    OwnerLife,
    ProjectionLife,
    SchedulerLife,
)
from simulation.profile import Profile, draw
from simulation.wires import SimulatedCrash
from tidegate import failpoints
from tidegate.domain.messages import StepTask
from tidegate.eventlog import epochs, owner, restore
from tidegate.eventlog.interface import EventLogError, Message, Record
from tidegate.eventlog.machine import CorruptLogError, RefusedToStartError
from tidegate.eventlog.memory import MemoryBroker, MemoryWriter
from tidegate.eventlog.owned import OwnedPartition
from tidegate.executor import sender
from tidegate.registry import ProcessIdentity, registration
from tidegate.registry.predecessors import examine
from tidegate.registry.process import Seen, judge
from tidegate.scheduler import admission

BEGINS_MS = 2_678_370_000  # half a minute before an hour, a day and a month are over
SESSION_MS = 3_000
MAX_INSIDE = 3
MAX_TURNS = 5  # that a process does one after another when it is its turn
NOT_WORK = frozenset({"instances"}) | SNAPSHOTS  # what is written to these topics does not count as something going on
SAID_OFTEN = frozenset({"record skipped", "table record skipped", "dead letter", "attempt failed"})  # about rubbish
MESSAGE_BYTES = str(16 * 1024 * 1024)

SERVICES: dict[str, Callable[..., Life]] = {
    "scheduler": SchedulerLife,
    "gate": GateLife,
    "admission": AdmissionLife,
    "projection": ProjectionLife,
    "executor": ExecutorLife,
}


def topics(run_partitions: int, account_partitions: int, task_partitions: int) -> dict[str, int]:
    """Return all topics with their partition counts. A new topic is a line here."""
    return {
        "run-requests": 2,
        "run-commands": run_partitions,
        "run-events": run_partitions,
        "gate-decisions": run_partitions,
        "step-results": run_partitions,
        "gate-requests": account_partitions,
        "gate-leases": account_partitions,
        "gate-ledger": account_partitions,
        "run-snapshots": run_partitions,
        "gate-snapshots": account_partitions,
        **{f"step-tasks.{queue}": task_partitions for queue in definitions.QUEUES},
        "instances": 1,
        "policies": 1,
        "controls": 1,
        "workflows": 1,
        "dead-letters": 1,
        "schemas": 1,
    }


class Post:
    """A place that a process fills: it is started again under its name when it has ended."""

    def __init__(self, service: str, name: str, make: Callable[[], Life]) -> None:
        self.service = service
        self.name = name
        self.make = make
        self.life: Life | None = None
        self.start_at_ms = 0


class World:
    """Use as a context: while it is open, the clocks, failpoints and threads of the code under test are the world's."""

    def __init__(self, seed: int, profile: Profile | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.profile = profile or draw(self.rng)
        self.now_ms = BEGINS_MS
        self.steps = 0
        self.run_partitions, self.account_partitions = 2, 2
        self.lease_ms = self.profile.lease_ms
        self.functions = definitions.FUNCTIONS
        self.topics = topics(self.run_partitions, self.account_partitions, self.profile.task_partitions)
        self.broker = MemoryBroker(clock_ms=lambda: self.now_ms, rng=self.rng)
        for name, count in self.topics.items():
            self.broker.create_topic(name, count, {"max.message.bytes": MESSAGE_BYTES})
        self.broker.on_written(self._written)
        self.last: deque[str] = deque(maxlen=200)
        self.crashes: Counter[str] = Counter()  # how often a process was killed or stopped at a failpoint, by name
        self._passes: dict[str, int] = {}
        self.faults: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._lives = itertools.count(1)
        self._ticks = itertools.count(1)
        self.stack_of_turns: list[Life] = []
        self.contacts: dict[tuple[str, str], int] = {}
        self.work_writes = 0
        self.broker_back_ms = 0
        self.is_calm = False
        self.keys_of_steps: dict[tuple[str, str], str] = {}
        self.pids: dict[int, tuple[str, Life]] = {}
        self.store = ModelStore()
        self.judge = Judge(self)
        self.work = works.Work(self)
        self.patience = waiting.Patience(self.work)
        self.treasury = budgets.Treasury(self.work)
        self.accidents = Accidents(self)
        self._writer = self.broker.writer()
        self.lives: list[Life] = []
        self.posts = list(self._make_posts())
        names = list(self.profile.weights)
        self._actions = [self._action(name) for name in names]
        self._bounds = list(itertools.accumulate(self.profile.weights[name] for name in names))
        self._stack = ExitStack()

    def _make_posts(self) -> Iterator[Post]:
        for service, count in self.profile.replicas.items():
            for number in range(count):
                name = f"{service}-{number}"
                make: Callable[[], Life] = functools.partial(SERVICES[service], self, name)
                if service == "executor":
                    queue = definitions.QUEUES[number % 2] if count > 1 else "default"
                    make = functools.partial(ExecutorLife, self, name, queue, 1 + number)
                yield Post(service, name, make)
        if self.profile.replicas["executor"] == 1:
            yield Post("executor", "executor-gpu", functools.partial(ExecutorLife, self, "executor-gpu", "gpu", 2))

    def _action(self, name: str) -> Callable[[], object]:
        for part in (self, self.accidents, self.work, self.patience, self.treasury):
            found: Callable[[], object] | None = getattr(part, name, None)
            if found is not None:
                return found
        raise AttributeError(f"nothing that can happen is called {name!r}")

    def owner_options(self, life: OwnerLife) -> dict[str, Any]:
        """Return further arguments of `OwnerLoop`. An option that is to be simulated is a line here."""
        return {"checkpoints": self.profile.checkpoints}

    # -- taking the place of the real world ------------------------------------------------------------

    def __enter__(self) -> Self:
        time = SimpleNamespace(time_ns=self._time_ns, monotonic=self._monotonic_s, sleep=self._sleep)
        no_threads = SimpleNamespace(Thread=_NoThread, Event=_NoEvent, Condition=threading.Condition)
        look = functools.partial(examine, judge_one=functools.partial(judge, look=self._look_at))
        subscription = AdmissionLife.subscription
        for target, name, value in (
            (owner, "time", time),
            (owner, "ANNOUNCE_EVERY_ENTRIES", self.profile.announce_every),
            (owner, "RECORD_POSITIONS_EVERY_S", self.profile.record_positions_every_s),
            (epochs, "FIRST_SPAN", self.profile.look_back),
            (restore, "FIRST_SPAN", self.profile.look_back),
            (admission, "time", time),
            (admission, "KafkaSubscription", subscription),
            (registration, "time", time),
            (registration, "threading", no_threads),
            (registration, "boottime_s", self._boottime_s),
            (registration, "examine", look),
            (registration, "_version", lambda: "simulated"),
            (sender, "threading", no_threads),
        ):
            self._stack.enter_context(mock.patch.object(target, name, value))
        failpoints.observe(self._failpoint)
        self._stack.callback(failpoints.observe, None)
        self._stack.enter_context(_logs_to(self._logged, self._snapshots_thrown_away))
        return self

    def begin(self) -> None:
        """Start all processes."""
        for _ in range(3):
            self.work.publish_workflow()
        for post in self.posts:
            self.start(post)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _time_ns(self) -> int:
        life_ms = self.stack_of_turns[-1].wall_ms() if self.stack_of_turns else self.now_ms
        return life_ms * 1_000_000 + next(self._ticks) % 1_000_000

    def _monotonic_s(self) -> float:
        return self.stack_of_turns[-1].monotonic_s() + next(self._ticks) * 1e-9

    def _boottime_s(self) -> float:
        return self.stack_of_turns[-1].boottime_s()

    def _sleep(self, seconds: float) -> None:
        self.advance_by(max(1, int(seconds * 1000)))

    def _look_at(self, pid: int) -> Seen | None:
        host, life = self.pids.get(pid, ("", None))
        if life is None or host != self.stack_of_turns[-1].host:
            return Seen(None)
        return Seen(None if life.is_dead else float(life.number))

    def identity_of(self, life: Life) -> ProcessIdentity:
        """Return who a new process is. A pod of a StatefulSet begins only when the one before it has ended."""
        alone = all(other.is_dead or other.name != life.name for other in self.lives)
        is_pod = alone and self.rng.random() < 0.3
        self.pids[life.number] = (life.host, life)
        host = f"pod:sim/{life.name}" if is_pod else life.host
        return ProcessIdentity(host, f"boot-{life.host}", life.number, float(life.number))

    # -- the record of what happened ----------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Add a line to the trace. It decides nothing; two runs of one seed have the same lines."""
        who = str(self.stack_of_turns[-1]) if self.stack_of_turns else "world"
        line = f"{self.steps} {self.now_ms} {who}: {text}"
        self._digest.update(line.encode())
        self.last.append(line)

    @property
    def running(self) -> Life | None:
        """Return whose turn it is."""
        return self.stack_of_turns[-1] if self.stack_of_turns else None

    def name_of(self, part: OwnedPartition) -> str:
        """Return who owns a partition, for people."""
        names = [str(life) for life in self.lives if isinstance(life, OwnerLife) and part in life.loop.owned.values()]
        return f"{', '.join(names)} (epoch {part.epoch})"

    @property
    def digest(self) -> str:
        """Return the hash of the whole trace so far."""
        return self._digest.hexdigest()

    def _logged(self, text: str) -> None:
        who = str(self.stack_of_turns[-1]) if self.stack_of_turns else "world"
        self.last.append(f"{self.steps} {self.now_ms} {who} logs: {text}")

    def _snapshots_thrown_away(self, log: str, partition: int, reason: str) -> None:
        """Snapshots that nobody damaged are never doubtful to the owner in force: that would be harmless, but wrong.

        One that was stopped while it took over may find that its successor has removed them.
        """
        self.faults["snapshots thrown away"] += 1
        is_in_force = self.judge.logs[log, partition].announced_by is self.stack_of_turns[-1]
        if is_in_force and not self.faults["snapshots damaged"]:
            raise Violation(f"(8) doubtful snapshots that nobody damaged: {reason}")

    def _written(self, message: Message) -> None:
        if message.topic not in NOT_WORK:
            self.work_writes += 1
        size = -1 if message.value is None else len(message.value)
        content = hashlib.blake2b(message.value or b"", digest_size=4).hexdigest()
        if message.topic in SNAPSHOTS:
            content = ""  # sets are written in them, whose order no two processes share
        key = (message.key or b"").decode("utf-8", "replace")
        self.note(f"{message.topic}-{message.partition}@{message.offset} {key} {size} {content}")
        self.judge.written(message)

    # -- steps ------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Let one thing happen, whatever chance says."""
        self.steps += 1
        self._actions[bisect(self._bounds, self.rng.random() * self._bounds[-1])]()

    def turn(self) -> None:
        lives = [life for life in self.lives if not life.is_inside and life.frozen_until_ms <= self.now_ms]
        if lives:
            life = self.rng.choice(lives)
            for _ in range(self.rng.randint(1, MAX_TURNS)):
                if not life.is_dead:
                    self.run(life)

    def run(self, life: Life, what: Callable[[], object] | None = None) -> None:
        """Let a process do something; whatever it raises ends it, as it would end the real one."""
        self.stack_of_turns.append(life)
        life.is_inside += 1
        try:
            (what or life.turn)()
        except SimulatedCrash:
            self.end(life, "killed")
        except (CorruptLogError, RefusedToStartError) as error:
            if isinstance(error, CorruptLogError) or not self._is_behind(life, str(error)):
                raise Violation(f"{life} refuses to work: {error}") from error
            self.end(life, "refused, a successor is further")
        except EventLogError as error:
            self.end(life, f"ended itself: {error}")
        except Exception as error:
            raise Violation(f"{life} fell over: {type(error).__name__}: {error}") from error
        finally:
            life.is_inside -= 1
            self.stack_of_turns.pop()
        if isinstance(life, OwnerLife) and not life.is_dead and not life.is_inside:
            for part in life.loop.owned.values():
                self.judge.owned(part)

    def _is_behind(self, life: Life, refusal: str) -> bool:
        """Tell whether another process has announced itself since for the partition that a refusal names (`topic-N begins at`).

        Then the one that refuses was stopped while it took over, and what its successor has read may be gone.
        """
        assert isinstance(life, OwnerLife)
        partition = int(refusal.partition(" ")[0].rpartition("-")[2])
        return self.judge.logs[life.loop.machine.log_topic, partition].announced_by is not life

    def end(self, life: Life, why: str) -> None:
        """End a life: what it had not written is lost, or on its way. Its post is filled again later."""
        if life.is_dead:
            return
        life.is_dead = True
        self.note(f"{life} is over: {why}")
        for writer in life.writers:
            if writer.failure is None:
                self.broker.crash(writer)
        self.lives.remove(life)
        for post in self.posts:
            if post.life is life:
                post.life = None
                post.start_at_ms = self.now_ms + self.rng.choice((0, 0, 0, 100, 500, 5_000))

    def start(self, post: Post) -> None:
        life = post.life = post.make()
        self.lives.append(life)
        self.note(f"{life} starts")
        self.run(life, life.start)

    def holds_lease(self, instance_id: str, incarnation: int) -> bool:
        """Tell whether this life of an executor has its lease, whoever says what of it, and goes on."""
        return any(
            isinstance(life, ExecutorLife)
            and (life.name, life.registration and life.registration.incarnation) == (instance_id, incarnation)
            and not life.ending
            and life.boottime_s() < life.lease_until_s
            for life in self.lives
        )

    def next_life(self) -> int:
        return next(self._lives)

    # -- time -------------------------------------------------------------------------------------------

    def advance(self) -> None:
        self.advance_by(self.rng.choice((1, 5, 20, 100, 400)))

    def long_advance(self) -> None:
        self.advance_by(self.rng.choice((1_000, 4_000, self.lease_ms + 500)))

    def advance_by(self, ms: int) -> None:
        self.now_ms += ms
        if not self.broker.reachable and self.now_ms >= self.broker_back_ms:
            self.broker.restore()
        if self.rng.random() < 0.2:
            self.broker.land_stragglers()  # what was under way arrives, if at all, within seconds
        for life in self.lives:
            if life.is_cut_off and self.rng.random() < 0.1:
                life.is_cut_off = False
        self._end_sessions()
        for post in self.posts:
            if post.life is None and self.now_ms >= post.start_at_ms and self.broker.reachable:
                self.start(post)

    def seen_in_group(self, group: str, instance_id: str) -> None:
        self.contacts[group, instance_id] = self.now_ms

    def _end_sessions(self) -> None:
        """Do what a group's coordinator does: whoever was not heard of for a session is out."""
        for life in self.lives:
            if not life.is_inside and not life.is_cut_off and life.frozen_until_ms <= self.now_ms:
                for membership in life.memberships:
                    self.contacts[membership] = self.now_ms
        for (group, instance_id), heard_ms in list(self.contacts.items()):
            if self.now_ms - heard_ms > SESSION_MS:
                del self.contacts[group, instance_id]
                self.broker.expire(group, instance_id)

    # -- edges ------------------------------------------------------------------------------------------

    def edge(self, life: Life, name: str) -> None:
        """A process is between two things: it may be killed here, or stopped while the others go on."""
        if life.is_dead:
            raise SimulatedCrash
        if self.is_calm:
            return
        chance = self.rng.random()
        if chance < self.profile.crash:
            self._die_here(name)
        elif chance < self.profile.crash + self.profile.stop:
            self._stop_here(life, name)

    def _failpoint(self, name: str) -> None:
        """A named edge. Each has its own countdown, so that those that are seldom passed are not seldom died at."""
        if not self.stack_of_turns:
            return
        self.edge(self.stack_of_turns[-1], name)
        if self.is_calm or not self.profile.failpoint_passes:
            return
        if name not in self._passes:
            self._passes[name] = self.rng.randint(1, 3) if self.rng.random() < 0.25 else self._next_pass()
        self._passes[name] = left = self._passes[name] - 1
        if left <= 0:
            self._passes[name] = self._next_pass()
            self.crashes[name] += 1
            if self.rng.random() < 0.3:
                self._stop_here(self.stack_of_turns[-1], name)
            else:
                self._die_here(name)

    def _next_pass(self) -> int:
        """Return at which pass a failpoint acts next: as often after one or two as after some hundreds."""
        return int(self.profile.failpoint_passes ** self.rng.random())

    def _die_here(self, name: str) -> NoReturn:
        self.faults["killed at an edge"] += 1
        self.note(f"killed at {name}")
        raise SimulatedCrash

    def _stop_here(self, life: Life, name: str) -> None:
        """Stop the process in the middle of what it does; it wakes after a while, and does not know."""
        if len(self.stack_of_turns) > MAX_INSIDE:
            return
        self.faults["stopped at an edge"] += 1
        self.note(f"stopped at {name}")
        is_long = self.rng.random() < 0.5
        if is_long:
            for group, instance_id in life.memberships:  # for its group it is gone: others take over
                self.broker.expire(group, instance_id)
        for _ in range(self.rng.randint(1, 80)):
            self.step()
            if is_long and self.rng.random() < 0.1:
                self.advance_by(2_000)
        if life.is_dead:
            raise SimulatedCrash
        self.note("goes on")

    def may_fail(self, life: Life, writer: MemoryWriter) -> None:
        """The connection breaks: what was sent may or may not be written, and its sender hears that it failed."""
        if not self.is_calm and writer.failure is None and self.rng.random() < self.profile.fail:
            self.faults["acknowledgements lost"] += 1
            self.note("acknowledgements lost")
            self.broker.fail(writer, "the connection broke")

    # -- what others write, and what functions do ----------------------------------------------------------

    def write(self, topic: str, partition: int, key: str, value: bytes | None) -> tuple[str, int, int]:
        """Write a record as somebody outside; returns where it lies. While the broker is away it waits for it."""
        self.broker.restore()
        offsets: list[int] = []
        self._writer.send(Record(topic, partition, key.encode(), value), offsets.append)
        self._writer.flush(1.0)
        return topic, partition, offsets[0]

    def entered(self, life: ExecutorLife, task: StepTask) -> Outcome:
        """The door through which every function is entered."""
        self.note(f"enters {task.run_id} {task.step_id} attempt {task.attempt}")
        self.judge.entered(life, task)
        return works.behaviour(self.rng, task)


class _NoThread:
    """A thread that never runs: what it would do is done in turns."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, *_: object) -> None:
        pass

    def is_alive(self) -> bool:
        return False


class _NoEvent:
    """An event for which nobody waits."""

    def set(self) -> None:
        pass

    def clear(self) -> None:
        pass

    def wait(self, *_: object) -> bool:
        return False


@contextmanager
def _logs_to(listener: Callable[[str], None], doubtful: Callable[[str, int, str], None]) -> Iterator[None]:
    """Have the services' structured logs told to the listener instead of being written; snapshots thrown away to another."""

    def take(_: Any, level: str, fields: Any) -> Any:
        error = fields.pop("exc_info", None)
        event = str(fields.get("event", ""))
        if (level in ("warning", "error", "critical") or error) and event not in SAID_OFTEN:
            listener(f"{level}: {fields}")
        if event.startswith("snapshots thrown away"):
            doubtful(fields["log"], fields["partition"], str(fields.get("reason")))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[structlog.processors.format_exc_info, take], wrapper_class=before["wrapper_class"])
    try:
        yield
    finally:
        structlog.configure(**before)
