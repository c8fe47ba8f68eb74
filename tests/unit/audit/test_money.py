"""The auditor agrees with ledgers that the gate's own deciders made, whatever happened, and with none that was touched."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.logs import Decided, LogWriter, Story
from tidegate import codec
from tidegate.audit.money import ENDED, HELD, REFUSED, AttemptName, Books, audit
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Entry
from tidegate.domain.states import RUN_TERMINAL
from tidegate.eventlog.interface import Message, Record

PARTITIONS = 2
ACCOUNTS = ("acme/support", "umbrella/lab", "initech")
FUNCTIONS = ("a", "b", "ask", "forbidden", "once", "flaky")


def messages_of(records: Iterable[Record]) -> list[Message]:
    """Give each record of the ledger the offset that it has in its partition."""
    ends: Counter[int] = Counter()
    found = []
    for record in records:
        if record.topic == "gate-ledger":
            offset = ends[record.partition]
            ends[record.partition] += 1
            found.append(
                Message(record.topic, record.partition, offset, record.key, record.value, record.headers, offset)
            )
    return found


def ledger(decided: list[Decided], *, trouble: float = 0.0, seed: int = 1) -> list[Message]:
    """Write what the gate decided as its owners would; `trouble` brings in new owners, and zombies of old ones."""
    return messages_of(LogWriter(1, PARTITIONS, seed).take(decided, trouble=trouble))


def books_of(messages: Iterable[Message]) -> Books:
    return audit([messages])


# --- ledgers as they come ---------------------------------------------------------------


class Player:
    """Plays a story by moves that a test chooses; each makes sense of its two numbers as it can, or does nothing."""

    def __init__(self) -> None:
        self.story = Story(slots=3)
        self.story.decided.clear()
        self.begun: list[str] = []
        self.forgotten: list[Any] = []  # tasks of executors that died: their results may still come

    def play(self, moves: Iterable[tuple[str, int, int]]) -> None:
        for name, which, micros in moves:
            getattr(self, name)(which, micros)

    def begin(self, which: int, micros: int) -> None:
        functions = {FUNCTIONS[which % 6]: None, FUNCTIONS[which % 5]: None, FUNCTIONS[micros % 4]: None}
        budget = None if micros % 3 == 0 else micros
        account = ACCOUNTS[which % len(ACCOUNTS)]
        number = len(self.begun)
        self.begun.append(self.story.begin(f"run-{number}", *functions, account=account, budget_micros=budget))

    def succeed(self, which: int, micros: int) -> None:
        self._answer(self.story.tasks, which, "succeeded", micros)

    def fail(self, which: int, micros: int) -> None:
        self._answer(self.story.tasks, which, "failed", micros, error_class="E", error_message="m", retryable=True)

    def release(self, which: int, micros: int) -> None:
        self._answer(self.story.tasks, which, "released", 0)

    def come_late(self, which: int, micros: int) -> None:
        self._answer(self.forgotten, which, "succeeded", micros)

    def come_twice(self, which: int, micros: int) -> None:
        if runs := [task for task in self.story.tasks if task.type == "run"]:
            self.story.answer(runs[which % len(runs)], "succeeded", 1, actual_micros=micros)

    def die(self, which: int, micros: int) -> None:
        self.forgotten += [task for task in self.story.tasks if task.type == "run"]
        self.story.tasks.clear()
        self.story.lose_executor()

    def approve(self, which: int, micros: int) -> None:
        self._command("approve", which)

    def reject(self, which: int, micros: int) -> None:
        self._command("reject", which)

    def cancel(self, which: int, micros: int) -> None:
        self._command("cancel", which)

    def wait(self, which: int, micros: int) -> None:
        self.story.pass_time(1 + micros * 20)

    def finish(self) -> None:
        """Play on until every run is over and nothing is under way."""
        for _ in range(200):
            self.wait(0, 5_000)
            while self.story.tasks:
                self.succeed(0, 5)
            for run_id in self.begun:
                if not self.story.run(run_id).is_over:
                    self.story.command(run_id, "cancel", by="z")
            if not self.story.tasks and all(self.story.run(run_id).is_over for run_id in self.begun):
                return
        raise AssertionError("the runs do not end")

    def _answer(self, tasks: Any, which: int, outcome: str, micros: int, **fields: Any) -> None:
        if not tasks:
            return
        task = tasks[which % len(tasks)]
        tasks.remove(task)
        if task.type == "cancel":
            outcome, fields = "cancelled", {}
            for other in [
                t for t in tasks if (t.run_id, t.step_id, t.attempt) == (task.run_id, task.step_id, task.attempt)
            ]:
                tasks.remove(other)
        self.story.answer(task, outcome, {"n": micros}, actual_micros=micros, **fields)

    def _command(self, kind: str, which: int) -> None:
        if self.begun:
            self.story.command(self.begun[which % len(self.begun)], kind, by="ann")


MOVES = ("begin", "begin", "succeed", "succeed", "fail", "release", "come_late", "come_twice", "die")
HUMAN_MOVES = ("approve", "reject", "cancel", "wait")
moves = st.lists(
    st.tuples(st.sampled_from(MOVES + HUMAN_MOVES), st.integers(0, 30), st.integers(0, 3_000)), max_size=60
)


@pytest.mark.feature("P2")
@given(moves, st.integers(0, 2**32))
def test_the_books_agree_with_the_gate_whatever_happened(played: list[tuple[str, int, int]], seed: int) -> None:
    player = Player()
    player.play(played)
    books = books_of(ledger(player.story.decided, trouble=0.3, seed=seed))
    assert [str(problem) for problem in books.problems] == []
    reserved, settled = player.story.money()
    assert sum(books.open_reservations().values()) == reserved
    assert sum(run.settled_micros for run in books.runs.values()) == settled
    assert sum(totals.open_micros for totals in books.accounts().values()) == reserved
    for run_id, run in player.story.ledger.runs.items():
        mine = books.runs[run_id]
        assert (mine.reserved_micros, mine.settled_micros) == (run.reserved_micros, run.settled_micros)
    kept = {AttemptName(*key): attempt.status for key, attempt in player.story.ledger.attempts.items()}
    assert {name for name, status in kept.items() if status == HELD} == books.open_holds()
    assert {name for name, mine in books.attempts.items() if mine.status not in ENDED} == kept.keys()


@given(moves)
def test_when_nothing_is_under_way_any_more_nothing_is_left_over(played: list[tuple[str, int, int]]) -> None:
    player = Player()
    player.play(played)
    player.finish()
    books = books_of(ledger(player.story.decided))
    assert [str(problem) for problem in (*books.problems, *books.problems_at_rest())] == []
    assert all(player.story.run(run_id).status in RUN_TERMINAL for run_id in books.runs)


def test_record_by_record_or_all_at_once_is_the_same() -> None:
    story = Story()
    story.play_all()
    messages = ledger(story.decided, trouble=0.3)
    random.Random(3).shuffle(order := [message.partition for message in messages])
    queues: dict[int, Iterator[Message]] = {
        number: iter([message for message in messages if message.partition == number]) for number in set(order)
    }
    mixed = Books()
    assert [problem for number in order for problem in mixed.read(next(queues[number]))] == []
    whole = books_of(messages)
    assert (mixed.runs, mixed.attempts, mixed.void_entries) == (whole.runs, whole.attempts, whole.void_entries)
    assert whole.void_entries > 0


# --- ledgers that were touched ---------------------------------------------------------------


def played() -> Story:
    """Play one run of every kind, each to its end."""
    story = Story()
    story.play_all()
    for kind in ("approved", "running", "later"):
        story.do(f"s-{kind}")
    for kind in ("asking", "unknown-open"):
        story.command(f"s-{kind}", "reject", by="ann")
    return story


def rewritten(story: Story, change: Callable[[int, Any], Iterable[Any]]) -> Books:
    """Return the books of the story's ledger in which every event was replaced by what `change` makes of it.

    All else (seqs, epochs, chain) is as an owner would have written it.
    """
    number = 0
    made = []
    for one in story.decided:
        if one.log != "gate-ledger":
            continue
        events: list[Any] = []
        for event in one.events:
            events += change(number, event)
            number += 1
        if events:
            made.append(one._replace(events=tuple(events)))
    books = books_of(ledger(made))
    books.problems += books.problems_at_rest()
    return books


def numbered(story: Story, *kinds: type) -> list[int]:
    """Return the places of the ledger's events of some kinds."""
    events = [event for one in story.decided if one.log == "gate-ledger" for event in one.events]
    return [number for number, event in enumerate(events) if isinstance(event, kinds)]


STORY = played()
MONEY = (ev.RunOpened, ev.AttemptGranted, ev.AttemptReserved, ev.AttemptPlaced, ev.AttemptReleased, ev.RunClosed)


def in_time(story: Story) -> list[int]:
    """Return the settlements that came while their runs were open: of a later one only `run-events` could tell more."""
    events = [event for one in story.decided if one.log == "gate-ledger" for event in one.events]
    closes = {event.run_id: number for number, event in enumerate(events) if isinstance(event, ev.RunClosed)}
    return [
        number
        for number, event in enumerate(events)
        if isinstance(event, ev.AttemptSettled) and number < closes[event.run_id]
    ]


TOUCHABLE = sorted(numbered(STORY, *MONEY) + in_time(STORY))


def test_the_ledger_that_is_touched_below_is_right() -> None:
    assert rewritten(STORY, lambda _, event: [event]).problems == []
    assert all(numbered(STORY, kind) for kind in MONEY)


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", TOUCHABLE)
def test_a_missing_event_is_noticed(place: int) -> None:
    assert rewritten(STORY, lambda number, event: [] if number == place else [event]).problems


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", TOUCHABLE)
def test_a_doubled_event_is_noticed(place: int) -> None:
    assert rewritten(STORY, lambda number, event: [event, event] if number == place else [event]).problems


@pytest.mark.feature("P2")
@given(st.data())
def test_a_changed_amount_is_noticed(data: st.DataObject) -> None:
    fields = ("reserved_micros", "actual_micros", "overshoot_micros", "settled_micros")
    place = data.draw(st.sampled_from([n for n in TOUCHABLE if n not in numbered(STORY, ev.RunOpened)]))
    by = data.draw(st.integers(-5_000, 5_000).filter(bool))

    def change(number: int, event: Any) -> list[Any]:
        if number != place:
            return [event]
        field = data.draw(st.sampled_from([name for name in fields if hasattr(event, name)]))
        return [msgspec.structs.replace(event, **{field: getattr(event, field) + by})]

    assert rewritten(STORY, change).problems


@pytest.mark.feature("P2")
@pytest.mark.parametrize("place", TOUCHABLE)
def test_money_billed_to_somebody_else_is_noticed(place: int) -> None:
    def change(number: int, event: Any) -> list[Any]:
        return [msgspec.structs.replace(event, account="acme/else") if number == place else event]

    assert rewritten(STORY, change).problems


def events_of(*events: Any) -> list[Message]:
    decided = [Decided("gate-ledger", "ledger-0", "acme/support", (event,), 1) for event in events]
    return ledger(decided)


NAME: dict[str, Any] = {"account": "acme/support", "run_id": "r", "step_id": "s", "attempt": 1}
OPEN = ev.RunOpened(account="acme/support", run_id="r", budget_micros=100, workflow="w@1", tags={})


def reserve(micros: int, attempt: int = 1, approved_by: str = "") -> ev.AttemptReserved:
    return ev.AttemptReserved(
        **{**NAME, "attempt": attempt}, reserved_micros=micros, rule="", policy="", approved_by=approved_by
    )


def grant(micros: int, attempt: int = 1, approved_by: str = "") -> ev.AttemptGranted:
    """Return what reserves and places at once."""
    reserved = msgspec.structs.asdict(reserve(micros, attempt, approved_by))
    del reserved["counts"]
    call = msgspec.structs.replace(_call(), reserve_micros=micros)
    return ev.AttemptGranted(**reserved, instance_id="x", incarnation=3, task_partition=0, call=call)


def problems_of(*events: Any) -> list[str]:
    return [problem.text for problem in books_of(events_of(*events)).problems]


@pytest.mark.parametrize("reserve", [reserve, grant])
def test_more_set_aside_than_the_budget_allows_is_noticed(reserve: Callable[..., Any]) -> None:
    assert problems_of(OPEN, reserve(60), reserve(40, 2)) == []
    assert problems_of(OPEN, reserve(60), reserve(41, 2)) == [
        "r s#2: 41 reserved; with that 101 are set aside and 0 spent of 100"
    ]


def test_spending_by_what_was_never_placed_is_noticed() -> None:
    held = ev.ApprovalHeld(**NAME, rule="", policy="", reason="", arguments_hash="", call=_call())
    settled = ev.AttemptSettled(**NAME, reserved_micros=0, actual_micros=5, overshoot_micros=5)
    assert problems_of(OPEN, held, settled) == ["r s#1: 5 spent by what was never placed"]


@pytest.mark.parametrize("reserve", [reserve, grant])
def test_an_approval_that_nobody_gave_is_noticed(reserve: Callable[..., Any]) -> None:
    held = ev.ApprovalHeld(**NAME, rule="", policy="", reason="", arguments_hash="", call=_call())
    assert problems_of(OPEN, held, reserve(0, approved_by="ann")) == []
    assert problems_of(OPEN, held, reserve(0)) == ["r s#1: reserved although nobody approved it"]


def test_a_loss_by_somebody_who_never_had_it_is_noticed() -> None:
    placed = ev.AttemptPlaced(
        **NAME, reserved_micros=0, rule="", policy="", instance_id="x", incarnation=3, task_partition=0, call=_call()
    )
    lost = ev.PlacementLost(**NAME, instance_id="x", incarnation=4, reason="")
    said = ["r s#1: lost by x of incarnation 4, which never had it"]
    assert problems_of(OPEN, reserve(0), placed, lost) == problems_of(OPEN, grant(0), lost) == said


def test_a_grant_of_what_was_reserved_or_placed_already_is_noticed() -> None:
    for before in (reserve(0), grant(0)):
        assert len(problems_of(OPEN, before, grant(0))) == 1
    assert len(problems_of(OPEN, grant(0), reserve(0))) == 1


def test_a_grant_of_another_amount_than_its_call_asks_for_is_noticed() -> None:
    granted = msgspec.structs.replace(grant(60), reserved_micros=50)
    assert problems_of(OPEN, granted) == ["r s#1: 50 reserved, its call asks for 60"]


def test_what_the_auditor_cannot_read_is_a_problem() -> None:
    message = events_of(OPEN)[-1]
    books = Books()
    (problem,) = books.read(msgspec.structs.replace(message, value=b"\xc3\x01 not a record of ours"))
    assert problem.where == f"gate-ledger-{message.partition}@{message.offset}"
    assert "cannot be read" in problem.text
    (problem,) = books.read(msgspec.structs.replace(message, value=(message.value or b"")[:-3]))
    assert "cannot be read" in problem.text
    assert books.read(msgspec.structs.replace(message, value=None)) == []


def test_a_record_of_the_other_log_is_a_problem() -> None:
    (message, *_) = [
        Message(record.topic, 0, 0, record.key, record.value, record.headers, 0)
        for record in LogWriter(1, 1).take(STORY.decided)
        if record.topic == "run-events" and dict(record.headers)["type"] == b"RunEntry"
    ]
    (problem,) = Books().read(message)
    assert problem.text == "a RunEntry has no place in the ledger"


def test_a_gap_is_a_problem_and_an_entry_of_an_owner_who_is_over_is_none() -> None:
    story = Story()
    for number in range(6):
        story.play_plain(number)
    messages = [m for m in ledger(story.decided) if m.partition == ledger(story.decided)[0].partition]
    entries = [m for m in messages if dict(m.headers)["type"] == b"LedgerEntry"]
    gap = books_of(m for m in messages if m is not entries[2])
    assert any("was due" in problem.text for problem in gap.problems)
    stale = codec.decode(entries[1].value)
    assert isinstance(stale, Entry)
    void = msgspec.structs.replace(stale, epoch=stale.epoch + 1)
    forged = msgspec.structs.replace(entries[1], value=codec.encode_entry("LedgerEntry", void))
    books = books_of([*messages, forged])
    assert (books.problems, books.void_entries) == ([], 1)


def test_refusals_are_in_the_books() -> None:
    story = played()
    books = books_of(ledger(story.decided))
    assert books.attempts[AttemptName("s-denied", "forbidden", 1)].status == REFUSED
    assert books.attempts[AttemptName("s-broke", "a", 1)].status == REFUSED


def _call() -> Any:
    held = next(event for one in STORY.decided for event in one.events if isinstance(event, ev.ApprovalHeld))
    return msgspec.structs.replace(held.call, reserve_micros=0)
