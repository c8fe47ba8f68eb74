"""A whole Tidegate in processes of its own, and the check that must hold after anything that was done to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from confluent_kafka import KafkaError, Producer

from support import fault_app
from tidegate import codec
from tidegate.audit.money import AttemptName, Books, audit
from tidegate.domain import canonical, states
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import DeadLetter
from tidegate.domain.run import RunState
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.interface import Message
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.validity import EpochTracker
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.sdk.client import Client, Event, Run

WAIT_S = 180.0
POLL_S = 0.05
APP = f"{fault_app.__file__}:app"
RUNS, LEDGER, LETTERS = "run-events", "gate-ledger", "dead-letters"
# Which log the messages of a topic follow from.
TOLD_BY = {"gate-requests": RUNS, "gate-decisions": LEDGER, "step-tasks.default": LEDGER}

Ends = dict[tuple[str, int], int]

T = TypeVar("T")


def eventually(ask: Callable[[], T], what: str, timeout_s: float = WAIT_S) -> T:
    """Return the first answer that is true. A generous bound, not a speed: reaching it is the failure."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = ask()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain for {what}; last answer: {answer!r}"
        time.sleep(POLL_S)


def run_cli(kafka: KafkaSettings, *words: str, code: int = 0, **variables: str) -> str:
    """Run the `tidegate` command against a Kafka; returns what it printed, both ways. Fails unless it ends with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", *words],
        env={**os.environ, "TIDEGATE_KAFKA_BOOTSTRAP": kafka.bootstrap, **variables},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


class Entered(NamedTuple):
    """A line that a function left when it was entered."""

    run_id: str
    step_id: str
    attempt: int
    pid: int
    instance_id: str
    key: str


class Truth(NamedTuple):
    """What the logs and the outside world say at one moment."""

    report: Report
    runs: dict[str, RunState]
    books: Books
    entered: list[Entered]


class WholeStack:
    """A started `Stack` with the fault app's workflows published. Not thread-safe, but for `kill` and `start`."""

    def __init__(
        self,
        folder: Path,
        *,
        services: Sequence[str] = ("scheduler", "gate"),
        slots: int = 8,
        executors: int = 1,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """`options` are those of Stack. `env` is that of all processes."""
        self.folder = folder
        self.fault_dir = folder / "faults"
        self.fault_dir.mkdir(parents=True)
        pools = [ExecutorPool(APP, slots=slots, count=executors), ExecutorPool(APP, queue="nobody", count=0)]
        variables = {"TIDEGATE_FAULT_DIR": str(self.fault_dir), **(env or {})}
        self.stack = Stack(folder / "data", pools=pools, services=services, profile="quick", env=variables, **options)
        self.under_way: set[str] = set()

    def __enter__(self) -> WholeStack:
        self.stack.__enter__()
        try:
            self.broker = KafkaBroker(self.stack.settings)
            self.client = Client(self.stack.settings, by="tester")
            self.labels = self.client.publish(fault_app.app)
            self.counts = {name: found.partition_count for name, found in self.broker.describe(_TOPICS).items()}
            self.pids = self._pids()
            self._producer = Producer(
                {"bootstrap.servers": self.stack.settings.bootstrap, "message.max.bytes": 2**24 + 2**16, "log_level": 0}
            )
        except BaseException:
            self.stack.stop()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.client.close()
        self.broker.close()
        self.stack.__exit__(*error)

    # -- doing things to it -------------------------------------------------------------

    def produce(
        self, topic: str, value: bytes | None, *, key: bytes | None = b"k", partition: int = -1, **options: Any
    ) -> str:
        """Write a record as any producer of anybody's could; returns its source `topic:partition:offset`.

        Raises AssertionError with the broker's answer if it refuses.
        """
        sources: list[str] = []
        self._send(sources, topic, value, key=key, partition=partition, **options)
        self._flush(sources, 1)
        return sources[0]

    def request(self, request: Any, *, key: bytes = b"k", partition: int = -1) -> str:
        """Write a JSON request; returns its source."""
        return self.produce("run-requests", canonical.dumps(request).encode(), key=key, partition=partition)

    def requests(self, requests: Sequence[Any]) -> None:
        """Write many JSON requests in one go, spread over all partitions."""
        sources: list[str] = []
        for number, request in enumerate(requests):
            partition = number % self.counts["run-requests"]
            self._send(sources, "run-requests", canonical.dumps(request).encode(), key=b"k", partition=partition)
        self._flush(sources, len(requests))

    def _send(self, sources: list[str], topic: str, value: bytes | None, **options: Any) -> None:
        def delivered(error: KafkaError | None, message: Any) -> None:
            assert error is None, error.name()
            sources.append(f"{topic}:{message.partition()}:{message.offset()}")

        self._producer.produce(self.broker.physical_name(topic), value, on_delivery=delivered, **options)

    def _flush(self, sources: list[str], count: int) -> None:
        """Wait for the answers; what a callback raises is raised here."""
        assert not self._producer.flush(WAIT_S), "the broker does not answer"
        assert len(sources) == count

    def cli(self, *words: str, code: int = 0) -> str:
        """Run the `tidegate` command; returns what it printed, both ways. Fails unless it ends with `code`."""
        return run_cli(self.stack.settings, *words, code=code)

    def partition(self, run_id: str) -> int:
        """Return the partition of everything that concerns a run."""
        return partition_of(run_id, self.counts[RUNS])

    def expect_other_pid(self, name: str) -> int:
        """Wait until a process that ended runs again under another pid, and take that for the right one from now on."""
        old = self.pids[name]
        new = eventually(lambda: (pid := self.stack.pid(name)) != old and pid, f"{name} to be started again")
        assert isinstance(new, int)
        self.pids[name] = new
        return new

    def expect_any_pid(self, names: Iterable[str]) -> None:
        """Wait until these run, and take that for right: they may have been started again, or not."""
        wanted = set(names)
        eventually(lambda: wanted <= self._pids().keys(), f"{sorted(wanted)} to run")
        self.pids |= {name: pid for name, pid in self._pids().items() if name in wanted}

    def kill(self, name: str) -> None:
        """Kill -9, and wait until the supervisor has started it again."""
        assert self.stack.kill(name) == self.pids[name]
        self.expect_other_pid(name)

    def freeze(self, name: str) -> int:
        """SIGSTOP; returns the pid."""
        os.kill(self.pids[name], signal.SIGSTOP)
        return self.pids[name]

    # -- looking at it ------------------------------------------------------------------

    def last_exit(self, name: str) -> int | None:
        """Return how a process last ended, as in `subprocess`."""
        return next(status.last_exit for status in self.stack.status() if status.name == name)

    def wait(self, run_id: str) -> Run:
        """Wait for the run's end, or until it needs a human."""
        return self.client.wait(run_id, WAIT_S)

    def events(self, run_id: str) -> list[Event]:
        """Return the run's events so far."""
        return list(self.client.events(run_id))

    def types(self, run_id: str) -> list[str]:
        """Return the names of the run's events so far."""
        return [event.type for event in self.events(run_id)]

    def until(self, run_id: str, event_type: str, count: int = 1) -> None:
        """Wait until the run has had so many events of that type."""
        for event in self.client.events(run_id, follow=True):
            count -= event.type == event_type
            if not count:
                return
        raise AssertionError(f"{run_id} ended without {event_type}: {self.types(run_id)}")

    def letters(self) -> dict[str, DeadLetter]:
        """Return the dead letters by the source of what died."""
        start, end = self.broker.offsets(LETTERS, 0)
        found = {}
        for message in self.broker.read(LETTERS, 0, start, end):
            with contextlib.suppress(codec.DecodeError):  # somebody else's
                found[(message.key or b"").decode("utf-8", "replace")] = codec.decode(message.value)
        return found

    def letter(self, source: str) -> DeadLetter:
        """Wait for the dead letter about the record at `source`."""
        return eventually(lambda: self.letters().get(source), f"a dead letter about {source}")

    def entered(self, run_id: str | None = None) -> list[Entered]:
        """Return who entered functions (of a run)."""
        lines = fault_app.left(self.fault_dir / "entered.log")
        found = [Entered(p[0], p[1], int(p[2]), int(p[3]), p[4], p[5]) for p in lines]
        return [line for line in found if run_id in (None, line.run_id)]

    def effects(self) -> set[str]:
        """Return the idempotency keys under which functions had effects."""
        folder = self.fault_dir / "effects"
        return {path.name for path in folder.iterdir()} if folder.exists() else set()

    def paid(self, run_id: str) -> list[int]:
        """Return the attempts of a run that paid."""
        return [int(attempt) for line_of, attempt in fault_app.left(self.fault_dir / "paid.log") if line_of == run_id]

    def log(self, topic: str, since: Ends | None = None) -> list[list[Message]]:
        """Return all records of a topic (written since then), partition by partition."""
        found = []
        for partition in range(self.counts[topic]):
            start, end = self.broker.offsets(topic, partition)
            start = max(start, since[topic, partition]) if since else start
            found.append(list(self.broker.read(topic, partition, start, end)))
        return found

    def ends(self) -> Ends:
        """Return where each partition of the logs and of what they tell ends now."""
        return {
            (topic, partition): self.broker.offsets(topic, partition).end
            for topic in (*TOLD_BY, *set(TOLD_BY.values()))
            for partition in range(self.counts[topic])
        }

    def truth(self) -> Truth:
        """Read everything there is and verify it."""
        # The outside world first: what was entered must be in the logs that are read after it.
        entered = self.entered()
        report = Report()
        runs: dict[str, RunState] = {}
        for messages in self.log(RUNS):
            runs |= verify_partition(messages, report)
        ledger = self.log(LEDGER)
        for messages in ledger:
            verify_partition(messages, report)
        return Truth(report, runs, audit(ledger), entered)

    def _pids(self) -> dict[str, int]:
        return {status.name: status.pid for status in self.stack.status() if status.pid is not None}

    def log_tail(self) -> str:
        """Return the last lines of every process's log, for a failure's message."""
        tails = []
        for name in self.pids:
            path = self.stack.log_path(name)
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:] if path.exists() else []
            tails += [f"-- {name}", *(line[:500] for line in lines)]
        return "\n".join(tails)


_TOPICS = (RUNS, LEDGER, LETTERS, "run-requests", "run-commands", "step-results", *TOLD_BY)


def assert_whole(whole: WholeStack, *, unfinished: Iterable[str] = ()) -> Truth:
    """Check what must hold after every case; returns what was looked at.

    All processes live under the pids that are expected; both logs verify; every run is over and says why, or waits for a
    human, or is named in `unfinished`; nothing is set aside for a run that is over; every attempt was placed before it was
    entered, and entered once; an effect with an idempotency key happened once.
    """
    allowed = set(unfinished)
    truth = _quiet_truth(whole, allowed)
    assert whole._pids() == whole.pids, f"processes came or went:\n{whole.log_tail()}"
    assert truth.report.ok, truth.report.problems
    assert truth.report.events, "the logs are empty: nothing was looked at"
    assert not truth.books.problems, [str(problem) for problem in truth.books.problems]
    for run in truth.runs.values():
        _assert_explained(run, allowed)
    _assert_no_leak(truth, allowed)
    _assert_entered_once(truth)
    return truth


def assert_tells_follow_from_the_logs(whole: WholeStack, since: Ends) -> None:
    """Check that what was told since then follows from valid entries: what a zombie decided must not even be told."""
    valid = {topic: valid_entries(whole.log(topic)) for topic in (RUNS, LEDGER)}
    for topic, log in TOLD_BY.items():
        for message in (message for messages in whole.log(topic, since) for message in messages):
            told = codec.decode(message.value)
            entry = valid[log].get((told.source.partition, told.source.offset))
            where = f"{topic}-{message.partition}@{message.offset} of {told.run_id}"
            assert entry is not None, f"{where} follows from no valid entry: {told.source}"
            assert log == LEDGER or entry.subject == told.run_id, f"{where} follows from an entry of {entry.subject}"


def valid_entries(partitions: Iterable[Iterable[Message]]) -> dict[tuple[int, int], Entry]:
    """Return what no zombie wrote in a log, read from its beginning, by partition and offset."""
    found = {}
    for messages in partitions:
        tracker = EpochTracker()
        for message in messages:
            record = codec.decode(message.value)
            if isinstance(record, OwnerAnnounced):
                tracker.announced(message.offset, record.epoch)
            elif tracker.is_valid(record.epoch):
                found[message.partition, message.offset] = record
    return found


def _quiet_truth(whole: WholeStack, allowed: set[str]) -> Truth:
    """Read until nothing is under way any more: the last settlements come after the end of a run."""
    deadline = time.monotonic() + WAIT_S
    while True:
        truth = whole.truth()
        if (not _restless(truth, allowed) and not truth.report.problems) or time.monotonic() > deadline:
            return truth
        time.sleep(2 * POLL_S)


def _restless(truth: Truth, allowed: set[str]) -> list[str]:
    """Return the runs that still move, or whose money does."""
    moving = [run.run_id for run in truth.runs.values() if run.status == states.RUNNING]
    moving += [name.run_id for name in truth.books.open_reservations()]
    moving += [run_id for run_id, run in truth.runs.items() if run.is_over and not _is_closed(truth, run_id, run)]
    return [run_id for run_id in moving if run_id not in allowed]


def _is_closed(truth: Truth, run_id: str, run: RunState) -> bool:
    return run.status == states.REFUSED or (run_id in truth.books.runs and truth.books.runs[run_id].closed)


def _assert_explained(run: RunState, allowed: set[str]) -> None:
    if run.run_id in allowed:
        return
    waits = run.status == states.WAITING and run.open_approvals()
    only_refused = run.status == states.ABSENT and run.seq > 0  # commands to a run that never was
    assert run.is_over or waits or only_refused, f"{run.run_id} is {run.status}, and nothing says why"
    if run.status == states.SUCCEEDED:
        assert run.output, f"{run.run_id} succeeded without output"
    elif run.is_over:
        assert run.code, f"{run.run_id} is {run.status} without a code"
        assert run.reason, f"{run.run_id} is {run.status} without a reason"


def _assert_no_leak(truth: Truth, allowed: set[str]) -> None:
    left = {name: micros for name, micros in truth.books.open_reservations().items() if name.run_id not in allowed}
    assert not left, f"set aside and never given back: {left}"
    for run_id, run in truth.runs.items():
        if run.is_over and run.status != states.REFUSED and run_id not in allowed:
            assert _is_closed(truth, run_id, run), f"{run_id} is over and still open at the gate"
    over = {run_id for run_id, run in truth.runs.items() if run.is_over}
    held = [name for name in truth.books.open_holds() if name.run_id in over]
    assert not held, f"held for approval although the run is over: {held}"


def _assert_entered_once(truth: Truth) -> None:
    times = Counter(AttemptName(line.run_id, line.step_id, line.attempt) for line in truth.entered)
    twice = [name for name, count in times.items() if count > 1]
    assert not twice, f"entered more than once: {twice}"
    for line in truth.entered:
        name = AttemptName(line.run_id, line.step_id, line.attempt)
        placement = truth.books.attempts[name].placement if name in truth.books.attempts else None
        assert placement is not None, f"{name} was entered, but the ledger never placed it"
        assert placement.instance_id == line.instance_id, f"{name} was entered by {line.instance_id}"
    keys = {(line.run_id, line.step_id): line.key for line in truth.entered}
    for line in truth.entered:
        assert keys[line.run_id, line.step_id] == line.key, f"another idempotency key for another attempt: {line}"
    assert len(set(keys.values())) == len(keys), "two steps have one idempotency key"
