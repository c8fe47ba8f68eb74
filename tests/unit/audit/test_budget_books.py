"""Budgets recomputed from the ledger's bytes: they hold at every instant, whatever happens, and no touched ledger passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.logs import Decided
from support.pure import chain, step
from tidegate.audit.money import Books
from tidegate.domain import ledger_events as ev
from tidegate.domain.messages import NOTHING, Amounts
from tidegate.gate.state import METERS
from unit.audit.test_money import Player, _call, books_of, ledger, rewritten

DAY_MS = 24 * 3_600_000
BUDGETS = (
    {"budget": "org", "window": "day", "limits": {"money_micros": 6_000}, "alerts": [50, 100]},
    {"budget": "team", "account": "*/*", "limits": {"money_micros": 4_000, "calls": 9}, "on_exceed": "pause"},
    {
        "budget": "asks",
        "account": "acme",
        "window": "hour",
        "limits": {"calls": 3},
        "on_exceed": "ask",
        "expires_s": 600,
    },
    {"budget": "each", "window": "run", "limits": {"output_tokens": 40, "wall_seconds": 120}},
)


def _parent(first: dict[str, Any], name: str, *others: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow of a step and of runs that follow it: two of `first`, one of each other one."""
    children = {"x": first, "y": first} if not others else {"x": first, **{f"z{n}": o for n, o in enumerate(others)}}
    return {
        "name": name,
        "version": "1",
        "nodes": {
            "a": {"kind": "step", "function": "a"},
            **{node: {"kind": "workflow", "workflow": f"{child['name']}@1"} for node, child in children.items()},
        },
        "edges": [["a", node] for node in children],
        "functions": {"a": step(reserve_micros=500)},
        "workflows": {f"{child['name']}@1": child for child in children.values()},
    }


class BudgetPlayer(Player):
    """As a player, with budgets of every kind in force."""

    def __init__(self) -> None:
        super().__init__()
        self.top_ups = 0
        for document in BUDGETS:
            self.publish(document)

    def publish(self, document: dict[str, Any]) -> None:
        self.story.policy({"kind": "budget", "version": "1", **document})

    def top_up(self, which: int, micros: int) -> None:
        self.top_ups += 1
        document = {"kind": "topup", "topup": f"t{self.top_ups}", "budget": ("org", "team")[which % 2]}
        account = ("acme", "acme/support")[which % 2]
        self.story.policy(document | {"account": account, "at_ms": self.story.now_ms, "add": {"money_micros": micros}})

    def change(self, which: int, micros: int) -> None:
        changed = dict(BUDGETS[which % len(BUDGETS)])
        self.publish(
            changed | {"version": f"v{micros}", "limits": {"money_micros": 1_000 + micros, "calls": 2 + which}}
        )

    def begin_family(self, which: int, micros: int) -> None:
        """Start a run whose step is followed by two runs, one of them with another two below it."""
        leaf = {**chain("b", b=step(reserve_micros=1_000)), "name": "leaf"}
        definition = _parent(_parent(leaf, "middle"), "parent", leaf)
        number = len(self.begun)
        run_id = f"run-{number}"
        account = ("acme/support", "umbrella/lab")[which % 2]
        budget = None if micros % 5 == 0 else micros * 2
        self.story.start(run_id, definition, account=account, budget_micros=budget)
        self.begun.append(run_id)

    def turn(self, which: int, micros: int) -> None:
        self.story.pass_time(DAY_MS if which % 3 else 3_600_000)


MOVES = (
    "begin",
    "begin",
    "begin_family",
    "begin_family",
    "succeed",
    "succeed",
    "succeed",
    "fail",
    "release",
    "come_late",
    "come_twice",
    "die",
)
OTHERS = ("approve", "approve", "reject", "cancel", "wait", "top_up", "change", "turn")
moves = st.lists(
    st.tuples(st.sampled_from(MOVES + OTHERS), st.integers(0, 30), st.integers(0, 3_000)), min_size=5, max_size=60
)
fewer = settings(max_examples=60)


def assert_kept(player: BudgetPlayer, books: Books) -> None:
    """The books are right, and say what the gate does."""
    assert [str(problem) for problem in books.problems] == []
    kept = player.story.ledger.buckets
    assert books.budgets.buckets.keys() == kept.keys()
    for key, bucket in kept.items():
        mine = books.budgets.buckets[key]
        assert tuple(mine.spent[meter] for meter in METERS) == bucket.spent
        assert tuple(mine.reserved(meter) for meter in METERS) == bucket.reserved
        assert len(mine.open) == bucket.open


def assert_ended(player: BudgetPlayer, books: Books) -> None:
    """Nothing is set aside any more, and nothing of a run is left."""
    assert [str(problem) for problem in (*books.problems, *books.problems_at_rest())] == []
    assert all(not bucket.open and not any(bucket.reserved) for bucket in player.story.ledger.buckets.values())
    assert not player.story.ledger.lacking
    assert player.story.ledger.of_run == {}
    assert player.story.ledger.runs == player.story.ledger.below == player.story.ledger.families_over == {}


@pytest.mark.feature("P2")
@fewer
@given(moves, st.integers(0, 2**32))
def test_no_budget_is_ever_exceeded_but_by_recorded_overshoot(played: list[tuple[str, int, int]], seed: int) -> None:
    player = BudgetPlayer()
    player.play(played)
    assert_kept(player, books_of(ledger(player.story.decided, trouble=0.3, seed=seed)))


@pytest.mark.feature("P2")
@fewer
@given(moves)
def test_every_reservation_ends(played: list[tuple[str, int, int]]) -> None:
    player = BudgetPlayer()
    player.play(played)
    player.finish()
    assert_ended(player, books_of(ledger(player.story.decided)))


# --- ledgers that were touched ---------------------------------------------------------------


def played() -> BudgetPlayer:
    player = BudgetPlayer()
    player.play(
        [("begin", n, 9_000) for n in (0, 6, 12, 18, 1)]
        + [("succeed", 0, 100)] * 2
        + [("approve", n, 0) for n in range(5)]
        + [
            ("fail", 0, 100),
            ("die", 0, 0),
            ("top_up", 0, 500),
            ("top_up", 1, 500),
            ("succeed", 0, 1_500),
            ("turn", 1, 0),
        ]
    )
    player.finish()
    return player


PLAYED = played()
EVENTS = [event for one in PLAYED.story.decided if one.log == "gate-ledger" for event in one.events]
OF_BUDGETS = (ev.AttemptGranted, ev.AttemptReserved, ev.AttemptSettled, ev.BudgetsReleased, ev.BudgetClosed)
PLACES = [
    number
    for number, event in enumerate(EVENTS)
    if isinstance(event, OF_BUDGETS) and (isinstance(event, ev.BudgetClosed) or event.buckets)
]
# What is left out at the end, or at a bucket that lives on, nobody could miss.
MISSED = [n for n in PLACES if not isinstance(EVENTS[n], ev.BudgetClosed)]


def touched(change: Callable[[int, Any], Iterable[Any]]) -> Books:
    return rewritten(PLAYED.story, change)


def test_the_ledger_that_is_touched_below_is_right() -> None:
    assert touched(lambda _, event: [event]).problems == []
    assert {type(event) for event in EVENTS} >= {*OF_BUDGETS, ev.BudgetSet}
    assert any(event.exceeds for event in EVENTS if isinstance(event, ev.AttemptGranted))


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", MISSED)
def test_a_missing_event_is_noticed(place: int) -> None:
    assert touched(lambda number, event: [] if number == place else [event]).problems


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", PLACES)
def test_a_doubled_event_is_noticed(place: int) -> None:
    assert touched(lambda number, event: [event, event] if number == place else [event]).problems


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("meter", ["micros", "calls"])
def test_a_changed_amount_is_noticed(place: int, meter: str) -> None:
    def more(amounts: Amounts) -> Amounts:
        changed: Amounts = msgspec.structs.replace(amounts, **{meter: getattr(amounts, meter) + 1})
        return changed

    event = EVENTS[place]
    field = next(name for name in ("amounts", "set_aside", "spent") if hasattr(event, name))
    changed = msgspec.structs.replace(event, **{field: more(getattr(event, field))})
    assert touched(lambda number, event: [changed if number == place else event]).problems


@pytest.mark.feature("P2")
def test_a_bucket_that_an_event_leaves_out_is_noticed() -> None:
    """One event says it for all buckets of an attempt."""
    for place in MISSED:
        event = EVENTS[place]
        fewer = msgspec.structs.replace(event, buckets=event.buckets[1:])
        assert touched(lambda number, other, at=place, less=fewer: [less if number == at else other]).problems, event


# --- single rules ---------------------------------------------------------------------------------------------------------

NAME: dict[str, Any] = {"account": "acme/support", "run_id": "r", "step_id": "s", "attempt": 1}
KEY = "daily|acme|0"
SET = ev.BudgetSet(
    account="acme",
    bucket=KEY,
    budget="daily",
    version="1",
    limits=ev.Ceilings(micros=100),
    on_exceed="deny",
    from_ms=0,
    until_ms=DAY_MS,
)
OPEN = ev.RunOpened(account="acme/support", run_id="r", budget_micros=None, workflow="w@1", tags={})


def bought(micros: int, attempt: int = 1, *, exceeds: bool = False, approved_by: str = "") -> tuple[Any, ...]:
    """Return what says that an attempt's money is set aside."""
    _, reserved = bought_before(micros, attempt, exceeds=exceeds, approved_by=approved_by)
    return (msgspec.structs.replace(reserved, counts=True, exceeds=(KEY,) if exceeds else ()),)


def bought_before(
    micros: int, attempt: int = 1, *, exceeds: bool = False, approved_by: str = ""
) -> tuple[ev.BudgetReserved, ev.AttemptReserved]:
    """Return the same as ledgers before `LedgerEntry.v6` say it."""
    name = NAME | {"attempt": attempt}
    amounts = Amounts(micros=micros, calls=1)
    return (
        ev.BudgetReserved(**name, bucket=KEY, amounts=amounts, exceeds=exceeds),
        ev.AttemptReserved(
            **name,
            reserved_micros=micros,
            rule="",
            policy="",
            approved_by=approved_by,
            amounts=amounts,
            basis="history",
            buckets=(KEY,),
        ),
    )


def problems_of(*entries: Any) -> list[str]:
    decided = [
        Decided("gate-ledger", "ledger-0", "acme/support", entry if isinstance(entry, tuple) else (entry,), 1)
        for entry in entries
    ]
    return [problem.text for problem in books_of(ledger(decided)).problems]


def bought_at_once(micros: int, attempt: int = 1, *, exceeds: bool = False, approved_by: str = "") -> tuple[Any, ...]:
    """Return the same of an attempt that is placed with it."""
    (reserved,) = bought(micros, attempt, exceeds=exceeds, approved_by=approved_by)
    fields = msgspec.structs.asdict(reserved)
    del fields["counts"]
    return (ev.AttemptGranted(**fields, instance_id="x", incarnation=3, task_partition=0, call=_call()),)


@pytest.mark.parametrize("bought", [bought, bought_before, bought_at_once])
def test_more_than_the_limit_is_noticed_unless_somebody_approved_it(bought: Callable[..., tuple[Any, ...]]) -> None:
    assert problems_of(OPEN, SET, bought(60), bought(40, 2)) == []
    assert "with that it exceeds" in problems_of(OPEN, SET, bought(60), bought(41, 2))[0]
    assert problems_of(OPEN, SET, bought(60), bought(41, 2, exceeds=True, approved_by="ann")) == []
    assert problems_of(OPEN, SET, bought(60), bought(41, 2, exceeds=True)) == [
        f"r s#2: exceeds {KEY}, which nobody approved"
    ]


def test_half_of_several_budgets_is_noticed() -> None:
    reserved, allowed = bought_before(60)
    assert problems_of(OPEN, SET, (reserved,), (allowed,)) == []
    assert problems_of(OPEN, SET, (allowed,)) == [f"r s#1: set aside in ['{KEY}'], but held in []"]
    queued = ev.AttemptQueued(**NAME, call=_call())
    released = ev.AttemptReleased(**NAME, reserved_micros=60, reason="void")
    assert "ended, daily|acme|0 still holds" in problems_of(OPEN, SET, bought(60), queued, released)[0]


def test_an_alert_that_is_not_so_is_noticed() -> None:
    alert = ev.BudgetAlerted(
        account="acme", bucket=KEY, budget="daily", meter="micros", percent=50, spent=60, limit=100
    )
    spent = ev.BudgetSettled(**NAME, bucket=KEY, reserved=NOTHING, used=Amounts(micros=60, calls=1))
    assert problems_of(SET, spent, alert) == []
    assert len(problems_of(SET, alert)) == 1
    assert problems_of(SET, spent, alert, alert) == [f"{KEY}: 50 percent of micros told twice"]


@pytest.mark.feature("P2")
def test_a_bucket_that_is_forgotten_before_its_window_is_over_is_noticed() -> None:
    closed = ev.BudgetClosed(account="acme", bucket=KEY, spent=NOTHING)
    assert problems_of(msgspec.structs.replace(SET, until_ms=1), closed) == []
    assert "what is spent in it is forgotten" in problems_of(SET, closed)[0]
