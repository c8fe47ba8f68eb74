"""The chaos demo: starts everything, lets the storm loose on it, waits for quiet, and looks at what is left."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidegate import codec
from tidegate.audit.money import Books
from tidegate.demo.chaos import app as chaos_app
from tidegate.demo.chaos.checks import Facts, Row, breaches
from tidegate.demo.chaos.observer import Customers, Observer
from tidegate.demo.chaos.plan import blows, run_ids, wishes
from tidegate.demo.chaos.provider import Provider
from tidegate.demo.chaos.storm import Storm
from tidegate.domain import canonical
from tidegate.domain.messages import DeadLetter, PolicyPublished
from tidegate.domain.run import RunState
from tidegate.embedded import sql
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.interface import Broker, Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.eventlog.verification import Report, verify_partition
from tidegate.sdk.client import Client

APP: Final = "tidegate.demo.chaos.app:app"
INSTANCES: Final = {"scheduler": 2, "gate": 2}
EXECUTORS: Final = 2
SLOTS: Final = 16
# Times as short as a broker with default settings accepts, so that a storm of a minute sees many of them end.
ENVIRONMENT: Final = {
    "TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": "6000",
    "TIDEGATE_GATE_LEASE_S": "6",
    "TIDEGATE_EXECUTOR_LEASE_S": "6",
    "PYTHONFAULTHANDLER": "1",
}
RUN_EVENTS, LEDGER, LETTERS, POLICIES = "run-events", "gate-ledger", "dead-letters", "policies"
CRASHES: Final = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE})
QUIET_S: Final = 180.0  # how long runs, money and tables may take to come to rest after the storm; then they are lost
ASK_AGAIN_S: Final = 0.5
WRITE_S: Final = 30.0
ROWS: Final = """
SELECT run_id, status, last_seq, spent_micros, n FROM runs
LEFT JOIN (SELECT run_id, count() AS n FROM events GROUP BY run_id) AS e USING run_id
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How many runs, for how many seconds the storm lasts, and how often it strikes."""

    runs: int
    seconds: float
    blows: int


SIZES: Final = {"chaos-100": Size(100, 45.0, 26), "chaos-500": Size(500, 180.0, 110)}


@dataclass(frozen=True, slots=True)
class Screen:
    """What people see. `say` gets a line; `show` how many runs are over, and how many are in which state."""

    say: Callable[[str], None]
    show: Callable[[int, Counter[str]], None]


def make_stack(data_dir: Path, on_progress: Callable[[str], None]) -> Stack:
    """Return the stack that the storm is let loose on: everything, and two of whatever shares its work."""
    pool = ExecutorPool(APP, slots=SLOTS, count=EXECUTORS)
    return Stack(data_dir, pools=[pool], instances=INSTANCES, env=ENVIRONMENT, profile="quick", on_progress=on_progress)


class ChaosDemo:
    """One storm over a started stack."""

    def __init__(self, stack: Stack, size: Size, seed: int, screen: Screen) -> None:
        self._stack = stack
        self._size = size
        self._seed = seed
        self._screen = screen
        self._broker = KafkaBroker(stack.settings)
        self._runs = run_ids(size.runs)
        self._crashes: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Run it and return the summary. Blocks for minutes. Raises DemoError, EventLogError, EmbeddedKafkaError."""
        began_s = time.monotonic()
        self._publish()
        observer = Observer(self._broker)
        wished = wishes(self._seed, self._size.runs, self._size.seconds)
        customers = Customers(self._broker, self._seed, wished, observer.questions)
        names = [status.name for status in self._stack.status()]
        plan = blows(self._seed, self._size.seconds, self._size.blows, names)
        storm = Storm(self._stack, plan, self._screen.say)
        try:
            storm.rage(lambda: self._show(observer))
            storm_s = time.monotonic() - began_s
            self._screen.say(f"{storm_s:>6.1f} s  the storm is over; waiting until nothing is under way any more")
            self._wait(lambda: not observer.unfinished(self._runs) or observer.failure, observer)
        finally:
            customers.close()
            observer.close()
        facts = self._gather(customers)
        summary = self._summary(facts, storm, observer)
        return {
            **summary,
            "requests": dict(customers.sent),
            "storm_seconds": round(storm_s, 1),
            "seconds": round(time.monotonic() - began_s, 1),
        }

    def _publish(self) -> None:
        with Client(self._stack.settings, by="chaos") as client:
            client.publish(chaos_app.app)
        policy = chaos_app.POLICY
        row = PolicyPublished(
            policy_id=policy["policy"],
            version=policy["version"],
            document=canonical.dumps(policy),
            by="chaos",
            at_ms=time.time_ns() // 1_000_000,
        )
        writer = self._broker.writer()
        headers = ((TYPE_HEADER, b"PolicyPublished"),)
        writer.send(Record(POLICIES, 0, policy["policy"].encode(), codec.encode(row), headers))
        writer.flush(WRITE_S)
        writer.close()

    def _look_for_crashes(self) -> None:
        """Note who died of a signal that we did not send."""
        for status in self._stack.status():
            if -(status.last_exit or 0) in CRASHES:
                name = signal.Signals(-(status.last_exit or 0)).name
                self._crashes.add(
                    f"{status.name}: {name}, before its start number {status.restarts + 1}; see {status.log_path}"
                )

    def _show(self, observer: Observer) -> None:
        self._look_for_crashes()
        statuses = observer.statuses()
        over = self._size.runs - len(observer.unfinished(self._runs))
        self._screen.show(over, statuses)

    def _wait(self, is_done: Callable[[], Any], observer: Observer | None = None) -> bool:
        """Ask again and again until it is done, or the time is up; says which of the two."""
        deadline_s = time.monotonic() + QUIET_S
        while not is_done():
            if time.monotonic() > deadline_s:
                return False
            if observer is not None:
                self._show(observer)
            time.sleep(ASK_AGAIN_S)
        if observer is not None:
            self._show(observer)
        return True

    # -- what is left -------------------------------------------------------------------

    def _gather(self, customers: Customers) -> Facts:
        """Read everything there is, as soon as nothing moves any more (or the time is up). Raises DemoError, EventLogError."""
        self._screen.say("         reading both logs, the tables and the provider's own books")
        facts = Facts(wanted={run_id: frozenset(customers.wanted[run_id]) for run_id in self._runs})
        self._wait(lambda: not _read_books(self._broker).problems_at_rest())
        runs: dict[str, RunState] = {}
        facts.run_report, facts.ledger_report, facts.books = Report(), Report(), _read_books(self._broker)
        for partition in self._partitions(RUN_EVENTS):
            runs |= verify_partition(_messages(self._broker, RUN_EVENTS, partition), facts.run_report)
        for partition in self._partitions(LEDGER):
            verify_partition(_messages(self._broker, LEDGER, partition), facts.ledger_report)
        facts.runs = runs
        facts.letters = self._letters()
        provider = Provider(self._stack.data_dir / "world")
        facts.calls, facts.payments = provider.calls(), provider.payments()
        try:
            sql.wait_caught_up(self._stack.data_dir, sql.log_ends(self._broker), QUIET_S)
            facts.rows, facts.ledger_rows = self._tables()
        except OSError as error:  # TimeoutError too
            self._screen.say(f"         the projection does not answer: {error}")
        self._wait(lambda: self._see_live_view(facts))
        return facts

    def _partitions(self, topic: str) -> range:
        return range(self._broker.describe([topic])[topic].partition_count)

    def _letters(self) -> list[DeadLetter]:
        return [codec.decode(message.value) for message in _messages(self._broker, LETTERS, 0) if message.value]

    def _tables(self) -> tuple[dict[str, Row], int]:
        rows = sql.query(self._stack.data_dir, ROWS)
        counted = sql.query(self._stack.data_dir, "SELECT count() AS n FROM ledger")
        found = {
            row["run_id"]: Row(row["status"], int(row["last_seq"]), int(row["n"]), int(row["spent_micros"]))
            for row in rows
        }
        return found, int(counted[0]["n"])

    def _see_live_view(self, facts: Facts) -> bool:
        """Ask the live view for every run; returns whether it has the end of all of them."""
        try:
            url = canonical.loads((self._stack.data_dir / "gateway.json").read_text(encoding="utf-8"))["url"].rstrip(
                "/"
            )
            with urllib.request.urlopen(f"{url}/v1/runs?limit=1000", timeout=10) as answer:  # noqa: S310 - our own file's
                rows = canonical.loads(answer.read().decode())["runs"]
        except (OSError, LookupError, canonical.NotJsonError):
            return False
        facts.live = {row["run_id"]: row["status"] for row in rows}
        return all(facts.live.get(run_id) == run.status for run_id, run in facts.runs.items())

    # -- the summary ----------------------------------------------------------------

    def _summary(self, facts: Facts, storm: Storm, observer: Observer) -> dict[str, Any]:
        self._look_for_crashes()
        looping = {
            f"{status.name}: {status.state}" for status in self._stack.status() if status.state == "crash-looping"
        }
        facts.crashes = sorted(self._crashes | looping)
        found = breaches(facts)
        if observer.failure:
            found["broken chains"].append(f"the log cannot be followed: {observer.failure}")
        seen = observer.seen()
        done: dict[str, dict[str, int]] = {}
        for (what, service), count in sorted(storm.done.items()):
            done.setdefault(what, {})[service] = count
        return {
            "ok": not any(found.values()),
            "seed": self._seed,
            "runs": self._size.runs,
            "ended": dict(Counter(run.status for run in facts.runs.values())),
            "breaches": found,
            "done": done,
            "restarts": sum(status.restarts for status in self._stack.status()),
            "attempts": len(facts.books.attempts),
            "attempts_lost": seen["lost"],
            "attempts_failed": seen["failed"] + seen["timed_out"],
            "questions_answered": seen["ApprovalResolved"],
            "late_results": seen["ResultIgnored"],
            "functions_entered": len(facts.calls),
            "payments": len(facts.payments),
            "events": facts.run_report.events,
            "ledger_events": facts.ledger_report.events,
            "void_entries": facts.run_report.void_entries + facts.ledger_report.void_entries,
            "dead_letters": len(facts.letters),
            "settled_micros": sum(run.settled_micros for run in facts.books.runs.values()),
        }


def _messages(broker: Broker, topic: str, partition: int) -> Any:
    start, end = broker.offsets(topic, partition)
    return broker.read(topic, partition, start, end)


def _read_books(broker: Broker) -> Books:
    books = Books()
    for partition in range(broker.describe([LEDGER])[LEDGER].partition_count):
        for message in _messages(broker, LEDGER, partition):
            books.read(message)
    return books
