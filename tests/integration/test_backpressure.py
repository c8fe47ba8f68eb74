"""More work than can be done at once: it waits in Kafka and in the ledger, memory stays bounded, and others are answered.

Small floods, so that they fit into every run of the tests. `tests/flood.py` makes large ones, with figures. A ClickHouse that is
away is in test_projection.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from support.pure import Pair
from support.stack import WholeStack, assert_whole, eventually
from tidegate.domain import states
from tidegate.domain.messages import Call
from tidegate.eventlog.kafka import inbox as kafka_inbox
from tidegate.eventlog.kafka import subscription
from tidegate.eventlog.kafka import writer as kafka_writer
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gate import decide
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import Attempt, AttemptKey, Line
from tidegate.scheduler import admission

FLOOD = 1_000
SLOW_S = 0.01
MIB = 1024 * 1024
ROOM_MIB = 150  # what a process may grow by in a flood of this size: more would be more than 100 KiB a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """A system whose only executor has one slot."""
    with WholeStack(tmp_path_factory.mktemp("flood"), slots=1) as stack:
        yield stack


def resident_mib(whole: WholeStack) -> dict[str, float]:
    return {name: psutil.Process(pid).memory_info().rss / MIB for name, pid in whole.pids.items()}


def ended(whole: WholeStack, run_ids: list[str]) -> int:
    """Return how many of these runs are over."""
    runs = whole.truth().runs
    return sum(1 for run_id in run_ids if run_id in runs and runs[run_id].is_over)


@pytest.mark.feature("P6")
def test_a_flood_before_a_slow_executor_waits_and_everybody_else_is_answered(whole: WholeStack) -> None:
    """One slot, a function that takes its time, and many runs at once. A command is answered long before the last of them."""
    whole.client.run("chain", 1, timeout_s=180)
    before = resident_mib(whole)
    lot = uuid.uuid4().hex[:6]
    flood = [f"flood-{lot}-{number}" for number in range(FLOOD)]
    whole.requests([{"workflow": "wait_here", "input": SLOW_S, "run_id": run_id} for run_id in flood])
    last = flood[-1]
    whole.until(last, "StepReady")

    whole.client.cancel(last, reason="no longer wanted")
    assert whole.wait(last).status == states.CANCELLED
    done = ended(whole, flood)
    assert done < FLOOD, "the command waited for the whole flood"

    whole.client.wait(flood[-2], 300)  # those who came first go first, so few are left then
    eventually(lambda: ended(whole, flood) == FLOOD, "the flood to be worked off", timeout_s=300)
    grown = {name: round(now - before[name]) for name, now in resident_mib(whole).items()}
    assert max(grown.values()) < ROOM_MIB, grown
    truth = assert_whole(whole)
    outcomes = {truth.runs[run_id].status for run_id in flood[:-1]}
    assert outcomes == {states.SUCCEEDED}
    assert len(whole.entered()) == len({(line.run_id, line.step_id, line.attempt) for line in whole.entered()})


@pytest.mark.feature("P6")
def test_after_a_flood_of_garbage_the_next_request_is_taken(whole: WholeStack) -> None:
    """Every letter is durable before its record counts as read, and still the inbox moves."""
    before = resident_mib(whole)
    whole.requests([f"no request {number}" for number in range(FLOOD)])
    for number in range(200):
        whole.produce("step-results", b"garbage %d" % number, partition=number % whole.counts["step-results"])
    assert whole.client.run("chain", 1, timeout_s=120).output == {"n": 4}
    eventually(lambda: len(whole.letters()) >= FLOOD + 200, "all letters to be written", timeout_s=120)
    grown = {name: round(now - before[name]) for name, now in resident_mib(whole).items()}
    assert max(grown.values()) < ROOM_MIB, grown


# --- what a decision costs when many wait ---------------------------------------------------------------


class Watched(dict[Any, Any]):
    """A dict that notes which of its values were looked at, and whether it was gone through."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.looked_at: set[Any] = set()
        self.was_walked = False

    def __getitem__(self, key: Any) -> Any:
        self.looked_at.add(key)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self.was_walked = True
        return super().__iter__()

    def items(self) -> Any:
        self.was_walked = True
        return super().items()


def crowded(lines: int, each: int) -> Ledger:
    """Return a ledger with so many lines, in each of which so many attempts wait; the n-th of all has turn n."""
    ledger = Ledger(0)
    turn = 0
    for _ in range(each):
        for line in range(lines):
            turn += 1
            call = Call(
                kind="step",
                function=f"f{line}",
                queue="default",
                arguments="1",
                timeout_ms=1,
                reserve_micros=0,
                idempotent=True,
            )
            key = AttemptKey(f"run-{turn}", "s", 1)
            ledger.attempts[key] = Attempt(account="a", call=call, status="queued", turn=turn)
            ledger.waiting.setdefault(("default", f"f{line}"), Line()).add("a", key, turn)
            ledger.waiting_count += 1
    ledger.waiting = Watched(ledger.waiting)
    return ledger


@pytest.mark.feature("P6")
def test_with_all_slots_taken_nobody_looks_at_those_who_wait() -> None:
    """A gate decides for every settlement: if that walked all lines, thousands of functions would be thousands of steps."""
    ledger = crowded(lines=500, each=4)
    full = Pair(slots=0, functions=tuple(f"step:f{line}" for line in range(500)))
    assert decide.place_waiting(ledger, full.executors.free_slots({})) == []
    watched: Any = ledger.waiting
    assert (watched.was_walked, watched.looked_at) == (False, set())


@pytest.mark.feature("P6")
def test_only_lines_that_a_free_executor_works_off_are_looked_at() -> None:
    ledger = crowded(lines=500, each=4)
    one = Pair(slots=2, functions=("step:f7", "step:f3"))
    placed = decide.place_waiting(ledger, one.executors.free_slots({}))
    assert [event.run_id for event in placed] == ["run-4", "run-8"], "the oldest first, whatever line it stands in"
    watched: Any = ledger.waiting
    assert watched.looked_at == {("default", "f3"), ("default", "f7")}
    assert not watched.was_walked


# --- what clients may hold ---------------------------------------------------------------


def test_every_client_has_a_bound_on_what_it_holds() -> None:
    """The defaults of librdkafka are 64 MiB and 100,000 messages a consumer, and a gigabyte a producer."""
    settings = KafkaSettings()
    mib = 1024
    for tell_end in (False, True):
        reader = kafka_inbox._reader_config(settings, tell_end=tell_end)
        assert reader["queued.max.messages.kbytes"] <= 32 * mib
        assert reader["queued.min.messages"] <= 10_000
    writer = kafka_writer._writer_config(settings)
    assert writer["queue.buffering.max.kbytes"] <= 256 * mib
    assert writer["queue.buffering.max.messages"] <= 50_000
    inbox = subscription._consumer_config(settings, "g", 0, admission.PREFETCH)
    assert inbox["queued.max.messages.kbytes"] <= 8 * mib
    assert inbox["queued.min.messages"] <= 4 * admission.MAX_BATCH
