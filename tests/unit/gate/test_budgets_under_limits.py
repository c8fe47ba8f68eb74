"""What was set aside in budgets comes back when a limit refuses after all, here or from another partition, or on a cancel."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from support.cluster import ACCOUNT_PARTITIONS, Crash
from support.limits import apply, limit, one, pair
from tidegate.audit.money import Books, audit
from tidegate.domain import canonical
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import PolicyPublished, StepResult
from tidegate.eventlog import owner
from unit.gate.test_leases import ACCOUNTS, World

BREAKER = {"limit": "x", "per": ["provider"], "breaker": {"failures": 1, "open_s": 1000, "while_open": "deny"}}
COUNTED = {"budget": "all", "account": "*", "limits": {"money_micros": 10_000}}
# Of the time that an attempt may take nothing is used here, so there is room again when it ends.
TWO_AT_ONCE = {"budget": "two", "account": "*", "limits": {"wall_seconds": 120}, "on_exceed": "pause"}
CALL = {"provider": "p", "reserve_micros": 5, "max_attempts": 1, "timeout_ms": 60_000}


class Spending(World):
    """As a world, with budgets; some of what its executor does fails."""

    failing = 0.0

    def __init__(self, seed: int, limits: list[dict[str, Any]], *budgets: dict[str, Any]) -> None:
        super().__init__(seed, limits)
        for fields in budgets:
            self.publish({"kind": "budget", "version": "1", **fields})

    def publish(self, document: dict[str, Any]) -> None:
        key = f"{document['kind']}:{document[document['kind']]}"
        row = PolicyPublished(policy_id=key, version="1", document=canonical.dumps(document), by="t", at_ms=0)
        self._send("policies", 0, key, row)
        for _ in range(5):
            self.turn()

    def _answer(self, partition: int, result: StepResult) -> None:
        if self.dice.random() < self.failing:
            result = msgspec.structs.replace(
                result, outcome="failed", output="", error_class="E", error_message="m", retryable=False
            )
        super()._answer(partition, result)

    def money(self) -> Books:
        """Return the books of the money, from the ledger's bytes."""
        return audit(self.messages("gate-ledger", n) for n in range(ACCOUNT_PARTITIONS))

    def at_rest(self) -> Books:
        """Let everything come to rest, and check that nothing is set aside, held, asked or waiting any more."""
        self.settle(20_000)
        report, states = self.verified()
        assert report.ok, report.problems
        assert all(run.is_over for run in states.values())
        books = self.money()
        assert [str(problem) for problem in (*books.problems, *books.problems_at_rest())] == []
        for partition in range(ACCOUNT_PARTITIONS):
            ledger = self.ledger_state(partition)
            assert (ledger.held, ledger.asks, ledger.asking, ledger.attempts, ledger.runs) == ({}, {}, {}, {}, {})
            assert not any(bucket.open or any(bucket.reserved) for bucket in ledger.buckets.values())
            for key, bucket in ledger.buckets.items():
                assert bucket.spent == tuple(books.budgets.buckets[key].spent.values())
        return books


def far_and_home(limit_key: str) -> tuple[str, str]:
    """Return an account whose partition does not decide about a limit, and one whose does."""
    decides = partition_of(limit_key, ACCOUNT_PARTITIONS)
    return (
        next(account for account in ACCOUNTS if partition_of(account, ACCOUNT_PARTITIONS) != decides),
        next(account for account in ACCOUNTS if partition_of(account, ACCOUNT_PARTITIONS) == decides),
    )


def names_of(world: World, run_id: str) -> list[str]:
    return [type(event).__name__ for event in world.ledger_events() if getattr(event, "run_id", "") == run_id]


@pytest.mark.feature("P2", "P3")
def test_what_another_partition_refuses_gives_its_budget_back() -> None:
    world = Spending(0, [BREAKER], COUNTED)
    far, home = far_and_home("x:p")
    world.failing = 1.0
    world.begin("opens", home, CALL)
    world.settle(20_000)
    world.begin("refused", far, CALL)
    books = world.at_rest()
    seen = names_of(world, "refused")
    assert seen.index("AttemptReserved") < seen.index("LeasesAsked") < seen.index("AttemptRefused")
    assert seen.count("AttemptReserved") == seen.count("BudgetsReleased") == 1
    assert [bucket.spent["calls"] for bucket in books.budgets.buckets.values() if bucket.account == far] == [0]


@pytest.mark.feature("P2", "P3")
def test_what_the_limits_refuse_when_they_change_gives_its_budget_back() -> None:
    p = pair()
    p.policy({"kind": "budget", "version": "1", **COUNTED})
    apply(p, limit(at_once=1))
    p.start("runs", one(reserve_micros=5))
    p.start("waits", one(reserve_micros=7))
    (bucket,) = p.ledger.buckets.values()
    assert (bucket.reserved[0], bucket.reserved[3]) == (12, 2)
    apply(p, limit(at_once=1, when="args.missing > 1"), offset=2)
    p.answer(p.tasks.popleft(), value=1, actual_micros=5)
    p.pass_time(200)
    assert (p.run("waits").code, p.tasks) == ("denied", p.tasks)
    assert "cannot be evaluated" in p.run("waits").reason
    assert (bucket.open, bucket.reserved, bucket.spent[0], bucket.spent[3]) == (0, (0,) * 5, 5, 1)


@pytest.mark.feature("P2", "D4")
def test_a_cancel_gives_back_what_waits_for_a_limit_and_lets_who_is_paused_go_on() -> None:
    p = pair()
    p.policy({"kind": "budget", "version": "1", "budget": "b", "limits": {"money_micros": 10}, "on_exceed": "pause"})
    apply(p, limit(where={"provider": "x"}, at_once=1))
    p.start("runs", one(provider="x", reserve_micros=4))
    p.start("waits", one(provider="x", reserve_micros=4))
    p.start("paused", one(reserve_micros=4))
    assert [task.run_id for task in p.tasks] == ["runs"]
    p.command("waits", "cancel")
    p.pass_time(200)
    assert [task.run_id for task in p.tasks] == ["runs", "paused"]
    (bucket,) = p.ledger.buckets.values()
    assert (bucket.open, bucket.reserved[0]) == (2, 8)


@pytest.mark.feature("P2", "P3")
@pytest.mark.parametrize("seed", range(8))
def test_nothing_stays_set_aside_whatever_is_refused_cancelled_or_crashes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    breaker = {**BREAKER, "breaker": {"failures": 2, "window_s": 1, "open_s": 1, "while_open": "deny"}}
    places = {"limit": "l", "per": ["model"], "at_once": 2}
    world = Spending(seed, [breaker, places], COUNTED, TWO_AT_ONCE)
    world.failing = 0.3
    dice = random.Random(seed + 2)
    armed = True

    def point(_: str) -> None:
        if armed and dice.random() < 0.002:
            raise Crash

    monkeypatch.setattr(owner, "failpoint", point)
    for number in range(24):
        world.begin(f"r{number}", dice.choice(ACCOUNTS), CALL | {"model": dice.choice(("", "m"))})
        for _ in range(dice.randrange(6)):
            world.turn()
        if dice.random() < 0.2:
            world.command(f"r{dice.randrange(number + 1)}", "cancel", command_id=f"cancel-{number}")
    armed = False
    world.at_rest()
    refused = [e for e in world.ledger_events() if type(e).__name__ == "AttemptRefused" and e.rule == "limit"]
    assert refused, "nothing was refused: the test shows nothing"
