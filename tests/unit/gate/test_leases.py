"""Limits across account roots: leases that ledger partitions ask of each other, under crashes. By seeds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from support.cluster import ACCOUNT_PARTITIONS, Cluster, Crash
from support.pure import chain, step
from tidegate import codec
from tidegate.audit.limits import Bound, LimitBooks, audit_limits
from tidegate.domain import canonical
from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Call, Lease, LeaseAsk, PolicyPublished
from tidegate.eventlog import owner
from tidegate.eventlog.interface import Record
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.gate.fold import apply
from tidegate.gate.leasing import LEASE_IDLE_MS, orphaned
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import Desk, LimitSet

ACCOUNTS = [f"acme{n}" for n in range(5)]
BOUNDS = {
    "calls": Bound(at_once=2),
    "models": Bound(at_once=1),
    "pace": Bound(rate_per_s=20, burst=3),
    "mine": Bound(at_once=2),
}
LIMITS: list[dict[str, Any]] = [
    {"limit": "calls", "per": ["provider"], "at_once": 2},
    {"limit": "models", "per": ["model"], "at_once": 1},
    {"limit": "pace", "per": ["operation"], "rate_per_s": 20, "burst": 3},
    {"limit": "mine", "per": ["account"], "at_once": 2},
]
KINDS: list[dict[str, Any]] = [
    {"provider": "p"},
    {"provider": "q", "model": "m"},
    {"provider": "p", "model": "n", "operation": "o"},
    {"operation": "o"},
    {},
]


class World(Cluster):
    """A cluster with limits, whose executor takes its time, and whose gate may die anywhere."""

    def __init__(self, seed: int, limits: list[dict[str, Any]], checkpoints: CheckpointSettings | None = None) -> None:
        super().__init__(seed, checkpoints)
        self.holds_back = True
        self.state = "ready"  # of the executor
        self.dice = random.Random(seed + 1)
        self.turns = 0
        for number, fields in enumerate(limits):
            document = {"kind": "limit", "version": "1", **fields}
            name = f"limit:{document['limit']}"
            row = PolicyPublished(policy_id=name, version="1", document=canonical.dumps(document), by="t", at_ms=number)
            self._send("policies", 0, name, row)
        for _ in range(5):
            self.turn()

    def begin(self, run_id: str, account: str, settings: dict[str, Any]) -> None:
        text = canonical.dumps(chain("a", a=step(**settings)))
        self.command(
            run_id,
            "start",
            account=account,
            workflow="chain@1",
            definition=text,
            definition_hash=canonical.digest(text),
            input="1",
        )

    def turn(self) -> int:
        self.turns += 1
        if self.turns % 100 == 0:
            self.register(incarnation=self.incarnation, state=self.state)
        moved = super().turn()
        keep = []
        for partition, result in self.held_back:
            if self.dice.random() < 0.1:
                self._answer(partition, result)
                moved += 1
            else:
                keep.append((partition, result))
        self.held_back = keep
        waiting = any(part.state.has_waiting() for part in self.owners["gate"].owned.values())
        return moved + len(keep) + waiting

    def turns_until(self, holds: Callable[[], bool]) -> None:
        for _ in range(1_000):
            if holds():
                return
            self.turn()
        raise AssertionError("it never comes about")

    def books(self) -> LimitBooks:
        return audit_limits((self.messages("gate-ledger", n) for n in range(ACCOUNT_PARTITIONS)), BOUNDS)

    def end(self, runs: int) -> LimitBooks:
        """Let everything come to rest, and check what must hold then."""
        self.settle(20_000)
        for partition in range(ACCOUNT_PARTITIONS):  # every question is asked again
            for message in self.messages("gate-leases", partition):
                if any(isinstance(item, LeaseAsk) for item in codec.decode(message.value).items):
                    self.writer.send(Record("gate-leases", partition, message.key, message.value))
        self.settle(20_000)
        _, states = self.verified()
        assert {run.status for run in states.values()} == {"succeeded"}
        assert len(states) == runs, "somebody waits for ever"
        books = self.books()
        assert books.problems == []
        assert books.problems_at_rest() == []
        for partition in range(ACCOUNT_PARTITIONS):
            ledger = self.ledger_state(partition)
            assert (ledger.held, ledger.asks, ledger.asking, ledger.attempts) == ({}, {}, {}, {})
        assert all(count == 1 for count in self.entered.values())
        return books


@pytest.mark.feature("P3", "D1")
@pytest.mark.parametrize("seed", range(12))
def test_no_limit_is_exceeded_and_nobody_waits_for_ever_whatever_crashes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    world = World(seed, LIMITS)
    dice = random.Random(seed + 2)
    disarm = _let_owners_crash(monkeypatch, seed)
    for number in range(30):
        world.begin(f"r{number}", dice.choice(ACCOUNTS), dice.choice(KINDS))
        for _ in range(dice.randrange(3)):
            world.turn()
    for _ in range(60):
        world.turn()
    disarm()
    books = world.end(30)
    assert {limit for limit, _ in books.leases} == set(BOUNDS)
    assert books.leases["calls", "p"].peak <= 2


@pytest.mark.feature("P3")
def test_a_limit_of_another_partition_is_used_to_the_full_and_fairly() -> None:
    world = World(0, LIMITS[:1])
    other = next(a for a in ACCOUNTS if partition_of(a, 2) != partition_of("calls:p", 2))
    home = next(a for a in ACCOUNTS if partition_of(a, 2) == partition_of("calls:p", 2))
    for number in range(12):
        world.begin(f"o{number}", other, {"provider": "p"})
        world.begin(f"h{number}", home, {"provider": "p"})
    books = world.end(24)
    assert books.leases["calls", "p"].peak == 2
    assert books.throttled > 0
    placed = [e.account for e in world.ledger_events() if type(e).__name__ in ("LeaseGiven",)]
    assert len(placed) >= 12
    assert books.leases["calls", "p"].accounts[home] == 12


@pytest.mark.feature("P3")
def test_leases_survive_in_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners that load their state give no place away twice, and remember tokens and who stands in line."""
    settings = CheckpointSettings(every_entries=5, every_s=0.05)
    monkeypatch.setitem(BOUNDS, "pace", Bound(rate_per_s=0.5, burst=2))
    slow = {"limit": "pace", "per": ["operation"], "rate_per_s": 0.5, "burst": 2}
    world = World(3, [*LIMITS[:2], slow, LIMITS[3]], settings)
    for number in range(30):
        world.begin(f"r{number}", ACCOUNTS[number % 5], KINDS[number % 5])
        world.turn()
        if number % 4 == 3:
            for _ in range(10):
                world.turn()
            world.crash("gate")
            world.start("gate")
    world.end(30)


@pytest.mark.feature("P3")
def test_runs_that_no_limit_is_about_pay_nothing() -> None:
    world = World(1, LIMITS[:1])
    for number in range(10):
        world.begin(f"r{number}", ACCOUNTS[number % 5], {"provider": ""})
    world.end(10)
    names = {type(event).__name__ for event in world.ledger_events()}
    at_once, later = {"AttemptGranted"}, {"AttemptReserved", "AttemptQueued", "AttemptPlaced"}
    assert names <= {"RunOpened", *at_once, *later, "AttemptSettled", "RunClosed"}
    assert [world.broker.offsets("gate-leases", n).end for n in range(ACCOUNT_PARTITIONS)] == [0, 0]


@pytest.mark.feature("P3")
def test_leases_that_find_no_slot_go_back_to_others() -> None:
    """A run that got its lease elsewhere but whose executor is gone by then must not keep it from who could use it."""
    world = World(2, LIMITS[:1])
    far = next(a for a in ACCOUNTS if partition_of(a, 2) != partition_of("calls:p", 2))
    ledger = world.ledger_state(partition_of(far, 2))
    world.begin("r0", far, {"provider": "p"})
    world.turns_until(lambda: bool(ledger.asking))
    world.state = "draining"
    world.register(incarnation=world.incarnation, state=world.state)
    world.turns_until(lambda: bool(ledger.granted))
    began_ms = world.now_ms
    world.turns_until(lambda: not ledger.granted)
    assert world.now_ms - began_ms >= LEASE_IDLE_MS
    for _ in range(10):
        world.turn()
    assert world.books().problems_at_rest() == []
    world.state = "ready"
    world.register(incarnation=world.incarnation)
    world.end(1)


@pytest.mark.feature("P3")
@pytest.mark.parametrize("seed", range(24))
def test_two_that_need_the_same_two_places_of_two_partitions_do_not_wait_for_each_other(seed: int) -> None:
    """Places are taken in the order of partitions, one's own too: nobody has to give one back because another one has the other."""
    limits = [{"limit": name, "per": ["provider"], "at_once": 1} for name in _one_of_each_partition()]
    world = World(seed, limits)
    for number in range(6):
        world.begin(f"r{number}", ACCOUNTS[number % 5], {"provider": "p"})
        for _ in range(world.dice.randrange(3)):
            world.turn()
    books = world.end(6)
    returns = [event for event in world.ledger_events() if type(event).__name__ == "LeasesReturned"]
    assert returns, "nobody asked another partition"
    assert [event for event in returns if event.reason == "no slot"] == []
    assert {(lease.peak, lease.starts) for lease in books.leases.values()} == {(1, 6)}


@pytest.mark.feature("P3", "D1")
@pytest.mark.parametrize("seed", range(8))
def test_places_of_ones_own_partition_that_were_asked_for_are_counted_once_whatever_crashes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    first, last = _one_of_each_partition()
    bound = Bound(at_once=2, rate_per_s=50, burst=2)
    monkeypatch.setitem(BOUNDS, first, bound)
    monkeypatch.setitem(BOUNDS, last, Bound(at_once=1))
    monkeypatch.setitem(BOUNDS, "mine", Bound(at_once=1))
    breaker = {"failures": 2, "open_s": 0.1}
    limits = [
        {"limit": first, "per": ["provider"], "at_once": 2, "rate_per_s": 50, "burst": 2, "breaker": breaker},
        {"limit": last, "per": ["provider"], "at_once": 1},
        {"limit": "mine", "per": ["account"], "at_once": 1},
    ]
    world = World(seed, limits, CheckpointSettings(every_entries=5, every_s=0.05))
    disarm = _let_owners_crash(monkeypatch, seed)
    for number in range(12):
        world.begin(f"r{number}", ACCOUNTS[number % 5], {"provider": "p"})
        for _ in range(world.dice.randrange(3)):
            world.turn()
    disarm()
    world.end(12)
    asked = [event for event in world.ledger_events() if type(event).__name__ == "LeasesAsked"]
    assert any(event.partition == partition_of(event.account, ACCOUNT_PARTITIONS) for event in asked)


def _let_owners_crash(monkeypatch: pytest.MonkeyPatch, seed: int) -> Callable[[], None]:
    """Let owners die anywhere, until what is returned is called."""
    dice = random.Random(seed + 2)

    def point(_: str) -> None:
        if dice.random() < 0.002:
            raise Crash

    monkeypatch.setattr(owner, "failpoint", point)
    return lambda: monkeypatch.setattr(owner, "failpoint", lambda _: None)


def _one_of_each_partition() -> list[str]:
    names = (f"limit{number}" for number in range(100))
    found = {partition_of(f"{name}:p", ACCOUNT_PARTITIONS): name for name in names}
    return [found[partition] for partition in range(ACCOUNT_PARTITIONS)]


@pytest.mark.feature("P3", "D4")
def test_cancelling_what_asks_elsewhere_gives_everything_back() -> None:
    for seed in range(6):
        world = World(seed, LIMITS[:2])
        dice = random.Random(seed)
        for number in range(12):
            world.begin(f"r{number}", ACCOUNTS[number % 5], KINDS[number % 3])
            for _ in range(dice.randrange(4)):
                world.turn()
        for number in range(0, 12, 2):
            world.command(f"r{number}", "cancel")
            world.turn()
        world.settle(20_000)
        books = world.books()
        assert books.problems + books.problems_at_rest() == []
        for partition in range(ACCOUNT_PARTITIONS):
            ledger = world.ledger_state(partition)
            assert (ledger.held, ledger.asks, ledger.asking, ledger.attempts) == ({}, {}, {}, {})


def test_what_a_gate_of_before_did_not_give_back_to_itself_is_found() -> None:
    """It never asked its own partition, so it did not know that an attempt of a newer gate's held something there."""
    here, there = Lease(1, "one", "p"), Lease(2, "two", "p")
    names: dict[str, Any] = {"account": "acme", "run_id": "r", "step_id": "s", "attempt": 1}
    call = Call(kind="step", function="f", queue="q", arguments="{}", timeout_ms=1, reserve_micros=0, idempotent=True)
    ledger = Ledger(1)
    so_far: list[Any] = [
        ev.RunOpened(
            account="acme", run_id="r", budget_micros=None, workflow="w@1", tags={}, priority=5, request_id="x"
        ),
        ev.AttemptReserved(**names, reserved_micros=0, rule="", policy="", approved_by=""),
        ev.AttemptQueued(**names, call=call, leases=(here, there), limits_version=1),
        ev.LeasesAsked(**names, partition=1, priority=5, leases=(here,), instance_id="", local=()),
        ev.LeaseHeard(**names, partition=1, priority=5, leases=(here,)),
        ev.LeaseGiven(**names, partition=1, leases=(here,)),
        ev.LeasesGranted(**names, partition=1),
    ]
    for number, event in enumerate(so_far, 1):
        apply(ledger, event, number, 1_000)
    desk = Desk(ledger, LimitSet([], 3, 1), 2_000)
    assert orphaned(desk) == []
    apply(ledger, ev.AttemptReleased(**names, reserved_micros=0, reason="ended"), 8, 1_000)
    assert ledger.held == {here: 1}
    (end,) = orphaned(desk)
    apply(ledger, end, 9, 2_000)
    assert (ledger.held, ledger.busy, ledger.asks) == ({}, {}, {})
