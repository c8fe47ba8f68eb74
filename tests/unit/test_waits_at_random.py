"""Waits, answers, events, pauses and cancels in any order, over crashes of both owners: a seed decides, the logs are judged."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from support.cluster import RUN_PARTITIONS, TOPICS, Cluster
from support.pure import step
from tidegate import codec
from tidegate.domain import canonical, states
from tidegate.domain import ledger_events as le
from tidegate.domain import run_events as ev
from tidegate.domain.controls import Controls
from tidegate.domain.entry import Entry
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Control
from tidegate.domain.run import RunState, apply
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.gateway import view
from tidegate.gateway.view import RunRow
from tidegate.scheduler import snapshots
from tidegate.sdk.reading import ValidEntries

RESTING = CheckpointSettings(every_entries=4, every_s=0.2, units_per_turn=3, rest_after_s=0)
EVENTS = ("paid", "shipped")


class Storm:
    """A cluster and what happens to it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cluster = Cluster(seed, RESTING)
        self.run_ids: list[str] = []
        self.controls: list[tuple[str, Control]] = []
        self._number = 0

    # -- what people do -----------------------------------------------------------------

    def command(self, run_id: str, kind: str, **fields: Any) -> None:
        self._number += 1
        self.cluster.command(run_id, kind, command_id=f"c{self._number}", **fields)

    def start(self) -> None:
        run_id = f"r{len(self.run_ids)}"
        self.run_ids.append(run_id)
        text = canonical.dumps(self._definition())
        fields = {"definition": text, "definition_hash": canonical.digest(text), "workflow": "w@1", "account": "acme"}
        self.command(run_id, "start", input='{"n":1}', **fields)

    def _definition(self) -> dict[str, Any]:
        nodes: dict[str, Any] = {"a": {"kind": "step", "function": "a"}}
        for number in range(self.rng.randint(1, 3)):
            nodes[f"w{number}"] = {"kind": (kind := self.rng.choice(sorted(WAITS))), "wait": WAITS[kind](self.rng)}
        for number in range(self.rng.randint(0, 2)):
            nodes[f"s{number}"] = {"kind": "step", "function": self.rng.choice("bc")}
        names = list(nodes)
        edges = [
            [self.rng.choice(names[:index]), name]
            for index, name in enumerate(names)
            if index and self.rng.random() < 0.8
        ]
        return {
            "name": "w",
            "version": "1",
            "nodes": nodes,
            "edges": edges,
            "functions": {name: step(idempotent=name != "c") for name in "abc"},
        }

    def signal(self) -> None:
        key = self.rng.choice((None, "", "k"))
        event = self.rng.choice(EVENTS)
        self.command(self.any_run(), "signal", event=event, key=key, value='"signalled"')

    def respond(self) -> None:
        step_id = self.rng.choice(("", "w0", "w1", "w2", "a"))
        value = self.rng.choice(('"yes"', '"no"', "7", '"again"', '"fail"'))
        self.command(self.any_run(), "respond", step_id=step_id, value=value)

    def one_of(self, *kinds: str) -> None:
        self.command(self.any_run(), self.rng.choice(kinds))

    def any_run(self) -> str:
        return self.rng.choice(self.run_ids) if self.run_ids else "nobody"

    def control(self, queue: str | None = None, *, paused: bool | None = None) -> None:
        queue = queue or self.rng.choice(("default", "*"))
        paused = self.rng.random() < 0.5 if paused is None else paused
        row = Control(queue=queue, paused=paused, by="t", reason="", at_ms=0)
        self.controls.append((queue, row))
        self.cluster._send("controls", 0, queue, row)

    def crash(self) -> None:
        service = self.rng.choice(("scheduler", "gate"))
        self.cluster.crash(service)
        self.cluster.start(service)

    def pass_time(self) -> None:
        self.cluster.now_ms += self.rng.choice((10, 500, 3_000, 8_000))
        self.cluster.register(incarnation=self.cluster.incarnation)  # a heartbeat

    def do_anything(self) -> None:
        acts = [self.start] * 2 + [self.signal] * 3 + [self.respond] * 3 + [self.pass_time] * 3
        acts += [self.control, self.crash]
        acts += [lambda: self.one_of("pause", "pause", "resume", "resume", "cancel", "approve", "reject")] * 2
        self.rng.choice(acts)()
        for _ in range(self.rng.randint(0, 4)):
            self.cluster.turn()

    def bring_to_an_end(self) -> None:
        """Resume everything, answer everything, and let time pass, until no run is alive."""
        self.control("default", paused=False)
        self.control("*", paused=False)
        for _ in range(60):
            self.pass_time()
            self.cluster.settle()
            alive = [run for run in self.runs().values() if not run.is_over and run.status != states.ABSENT]
            if not alive:
                return
            for run in alive:
                if run.paused is not None:
                    self.command(run.run_id, "resume")
                for waiting in run.open_waits():
                    self.command(run.run_id, "respond", step_id=waiting.step_id, value='"yes"')
                for asking in run.open_approvals():
                    self.command(run.run_id, "approve", step_id=asking.step_id)
        raise AssertionError(f"these never end: {alive}")

    # -- what came of it ------------------------------------------------------------------

    def runs(self) -> dict[str, RunState]:
        report, runs = self.cluster.verified()
        assert report.problems == []
        return runs

    def entries(self, topic: str) -> Iterator[Entry]:
        for partition in range(TOPICS[topic]):
            valid = ValidEntries()
            for message in self.cluster.messages(topic, partition):
                if valid.admits(message):
                    yield codec.decode(message.value)


WAITS: dict[str, Any] = {
    "sleep": lambda rng: {"seconds": rng.choice((0, 1, 5, 30)), **_timeout(rng)},
    "wait_until": lambda rng: {
        "at": f"1970-01-01T00:{rng.choice((1, 17, 18))}:{rng.randint(10, 59)}Z".replace(":1:", ":01:")
    },
    "wait_event": lambda rng: {"event": rng.choice(EVENTS), "key": rng.choice(("", "k")), **_timeout(rng)},
    "ask": lambda rng: {"prompt": "?", "choices": ["yes", "no"], **_timeout(rng)},
}


def _timeout(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.6:
        return {}
    return {
        "timeout_s": rng.choice((1, 10)),
        **({"on_timeout": "value", "timeout_value": "late"} if rng.random() < 0.5 else {}),
    }


@pytest.mark.feature("D3")
@pytest.mark.feature("D4")
@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_to_waiting_runs_the_log_holds(seed: int) -> None:
    storm = Storm(seed)
    for _ in range(60):
        storm.do_anything()
    storm.cluster.settle()
    assert_memory_is_the_fold(storm)
    storm.bring_to_an_end()
    assert set(storm.runs()) >= set(storm.run_ids)
    for entry in storm.entries("run-events"):
        assert_nothing_paused_is_asked(storm, entry)
    for entry in storm.entries("gate-ledger"):
        assert_nothing_paused_is_placed(storm, entry)
    for run_id in storm.run_ids:
        entries = [entry for entry in storm.entries("run-events") if entry.subject == run_id]
        assert_the_run_kept_the_rules(entries)
        assert_the_live_view_says_what_the_fold_says(entries)
    assert max(storm.cluster.entered.values(), default=1) == 1


def assert_memory_is_the_fold(storm: Storm) -> None:
    """What the owner holds, in memory or on the shelf, is what folding the log gives; and every due time is in its heap."""
    for run_id, run in storm.runs().items():
        state = storm.cluster.owners["scheduler"].owned[partition_of(run_id, RUN_PARTITIONS)].state
        held = state.find(run_id)
        run.head, run.account = held.head, held.account  # of the entries, not of their events
        if run.is_over:
            assert (held.status, held.seq) == (run.status, run.seq)
            continue
        assert held == run
        outlook = snapshots.outlook(snapshots.dump(run))
        assert {(due_ms, run_id, *rest) for due_ms, *rest in outlook.times} <= set(state.timers)
        assert all(run_id in state.held.get(queue, ()) for queue in outlook.queues) or run.paused is not None


def controls_at(storm: Storm, version: int) -> Controls:
    controls = Controls()
    for key, row in storm.controls[:version]:
        controls.take(key, row)
    return controls


def assert_nothing_paused_is_asked(storm: Storm, entry: Entry) -> None:
    controls = controls_at(storm, entry.tables["controls"])
    for event in entry.events:
        if isinstance(event, ev.AttemptRequested) or (isinstance(event, ev.StepReady) and not event.held):
            assert not controls.is_paused(event.call.queue), f"{event} in {entry}"


def assert_nothing_paused_is_placed(storm: Storm, entry: Entry) -> None:
    controls = controls_at(storm, entry.tables["controls"])
    placed = [event for event in entry.events if isinstance(event, le.Placing)]
    assert not any(controls.is_paused(event.call.queue) for event in placed)


def assert_the_live_view_says_what_the_fold_says(entries: list[Entry]) -> None:
    run, row = RunState(entries[0].subject), RunRow(run_id=entries[0].subject)
    for entry in entries:
        for event in entry.events:
            apply(run, event, entry.now_ms)
            view.apply_event(row, event, entry.now_ms)
        assert (row.status, row.paused, row.seq) == (run.status, run.paused is not None, run.seq)
        open_waits = {} if run.is_over else {step.step_id: step.wait for step in run.open_waits()}
        assert set(row.waits) == set(open_waits)
        assert row.waiting_count == len(open_waits)
        assert {step_id: line.status for step_id, line in row.steps.items()} == {
            step_id: state.status for step_id, state in run.steps.items()
        }


def assert_the_run_kept_the_rules(entries: list[Entry]) -> None:
    run, is_paused = RunState(entries[0].subject), False
    started: dict[str, ev.WaitStarted] = {}
    ends: list[str] = []
    for entry in entries:
        for event in entry.events:
            if isinstance(event, ev.RunPaused | ev.RunResumed):
                is_paused = isinstance(event, ev.RunPaused)
            elif isinstance(event, ev.WaitStarted):
                started[event.step_id] = event
            elif isinstance(event, ev.WaitEnded):
                ends.append(event.step_id)
                wait = started[event.step_id]
                if event.outcome == "due":
                    assert entry.now_ms >= (wait.due_ms or 0)
                elif event.outcome == "timed_out":
                    assert entry.now_ms >= (wait.timeout_at_ms or 0)
            asks = isinstance(event, ev.AttemptRequested) or (isinstance(event, ev.StepReady) and not event.held)
            assert not (is_paused and asks), f"{event} while the run is paused"
            over = {"CommandRefused", "ResultIgnored"}
            assert run.status not in states.RUN_TERMINAL or type(event).__name__ in over, f"{event} after the end"
            run.status = event.status if isinstance(event, ev.RunFinished) else run.status
    assert len(ends) == len(set(ends)), "a wait ended twice"
