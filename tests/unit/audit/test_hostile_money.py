"""The money under hostile orders: documents that change under way, windows that turn at the decision, huge amounts, restores."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.logs import LogWriter
from support.pure import chain, step
from tidegate.audit.money import Books
from tidegate.domain.identity import MAX_MICROS
from tidegate.eventlog.shelf import Shelf
from tidegate.gate import snapshots
from tidegate.gate.fold import derive
from unit.audit.test_budget_books import BUDGETS, BudgetPlayer, assert_ended, assert_kept
from unit.audit.test_money import books_of, messages_of

UNITS = ("run", "hour", "day", "month", "total")
ZONES = ("UTC", "Europe/Berlin", "Asia/Kolkata", "Australia/Lord_Howe", "America/Havana")
ACCOUNTS = ("*", "acme", "*/*", "acme/*", "umbrella")
EXCEEDS = ("deny", "ask", "pause")
RETENTION = {"kind": "retention", "retention": "ledger", "version": "1", "keep_s": 0, "every_s": 1}


class HostilePlayer(BudgetPlayer):
    """As a player of budgets, with operators who change everything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.documents = {document["budget"]: dict(document) for document in BUDGETS}

    def change_one(self, which: int, **fields: Any) -> None:
        name = sorted(self.documents)[which % len(self.documents)]
        document = self.documents[name] = self.documents[name] | fields
        if document.get("on_exceed", "deny") != "ask":
            document.pop("expires_s", None)
        self.story.policy({"kind": "budget", "version": f"w{len(self.story.decided)}", **document})

    def rewindow(self, which: int, micros: int) -> None:
        self.change_one(which, window=UNITS[micros % 5], time_zone=ZONES[micros % 7 % 5])

    def reaccount(self, which: int, micros: int) -> None:
        self.change_one(which, account=ACCOUNTS[micros % 5])

    def another_effect(self, which: int, micros: int) -> None:
        self.change_one(which, on_exceed=EXCEEDS[micros % 3])

    def nothing_left(self, which: int, micros: int) -> None:
        self.change_one(which, limits={"money_micros": 0, "calls": micros % 2})

    def remove(self, which: int, micros: int) -> None:
        self.story.forget(f"budget:{sorted(self.documents)[which % len(self.documents)]}")

    def rename(self, which: int, micros: int) -> None:
        name = sorted(self.documents)[which % len(self.documents)]
        document = self.documents.pop(name)
        self.story.forget(f"budget:{name}")
        new = f"n{micros}"
        self.documents[new] = document | {"budget": new}
        self.change_one(sorted(self.documents).index(new))

    def cost_the_world(self, which: int, micros: int) -> None:
        self._answer(self.story.tasks, which, "succeeded", MAX_MICROS)

    def carry(self, which: int, micros: int) -> None:
        self.story.policy(RETENTION)
        self.story.pass_time(1_001)
        self.story.settle_down()
        self.story.forget("retention:ledger")

    def begin_wide(self, which: int, micros: int) -> None:
        """Start a run that asks for all of its steps at once: what one takes, the next one of the same decision lacks."""
        names = "abc"[: 1 + which % 3]
        run_id = f"run-{len(self.begun)}"
        functions = {name: step(reserve_micros=micros // (number + 1)) for number, name in enumerate(names)}
        definition = {**chain(*names, **functions), "edges": [], "name": "wide"}
        self.story.start(
            run_id, definition, account=("acme/support", "umbrella/lab")[which % 2], budget_micros=micros * 2
        )
        self.begun.append(run_id)

    def limit(self, which: int, micros: int) -> None:
        """Let one of many run, or refuse all that waits: some of it has money set aside."""
        about: dict[str, Any] = {"when": "args.nothing > 1"} if micros % 3 == 0 else {"per": ["account"]}
        self.story.policy({"kind": "limit", "limit": "l", "version": str(micros), "at_once": 1 + which % 3, **about})

    def no_limit(self, which: int, micros: int) -> None:
        self.story.forget("limit:l")

    def short_queue(self, which: int, micros: int) -> None:
        self.story.policy({"kind": "queue", "queue": "default", "version": str(micros), "depth": 1 + which % 3})

    def pause_queue(self, which: int, micros: int) -> None:
        self.story.control("default", paused=micros % 3 > 0)

    def deny_all(self, which: int, micros: int) -> None:
        rules = [{"name": "all", "when": "true", "then": ("deny", "require_approval", "allow")[micros % 3]}]
        self.story.policy({"policy": "all", "version": str(micros), "rules": rules})

    def to_the_edge(self, which: int, micros: int) -> None:
        """Let it be the last or the first millisecond of a window."""
        ends = sorted({b.until_ms for b in self.story.ledger.buckets.values() if b.until_ms > self.story.now_ms})
        if ends:
            self.story.pass_time(max(0, ends[which % len(ends)] - self.story.now_ms - micros % 3 * 7))
            self.story.settle_down()

    def restore(self, which: int, micros: int) -> None:
        """The gate starts again, from snapshots."""
        story = self.story
        old = story.ledger
        fresh = story.gate.new_state(0, Shelf())
        for unit in snapshots.units_of(old):
            snapshots.load(fresh, unit, snapshots.dump(old, unit))
        fresh.seq, fresh.head = old.seq, old.head
        derive(fresh)
        assert fresh.buckets == old.buckets
        assert fresh.below == old.below
        assert fresh.families_over == old.families_over
        assert fresh.of_run == old.of_run
        story.ledger = fresh
        story.settle_down()


MOVES = (
    "begin",
    "begin",
    "begin_family",
    "begin_wide",
    "succeed",
    "succeed",
    "succeed",
    "fail",
    "release",
    "come_late",
    "come_twice",
    "die",
)
OTHERS = ("approve", "approve", "reject", "cancel", "wait", "top_up", "turn")
HOSTILE = (
    "rewindow",
    "rewindow",
    "reaccount",
    "another_effect",
    "nothing_left",
    "change",
    "remove",
    "rename",
    "cost_the_world",
    "carry",
    "to_the_edge",
    "to_the_edge",
    "restore",
    "limit",
    "no_limit",
    "short_queue",
    "pause_queue",
    "deny_all",
)
moves = st.lists(
    st.tuples(st.sampled_from(MOVES + OTHERS + HOSTILE), st.integers(0, 30), st.integers(0, 3_000)),
    min_size=5,
    max_size=80,
)


def books_kept(player: HostilePlayer, trouble: float = 0.0, seed: int = 1) -> Books:
    return books_of(messages_of(LogWriter(1, 1, seed).take(player.story.decided, trouble=trouble)))


@pytest.mark.feature("P2")
@settings(max_examples=100)
@given(moves, st.integers(0, 2**32))
def test_whoever_changes_what_the_money_is_right(played: list[tuple[str, int, int]], seed: int) -> None:
    player = HostilePlayer()
    player.play(played)
    assert_kept(player, books_kept(player, trouble=0.2, seed=seed))
    player.finish()
    assert_ended(player, books_kept(player))
