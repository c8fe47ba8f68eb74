"""The live view's fold: what a row says, that nothing counts twice, and what is forgotten."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import msgspec
import pytest

from support.logs import LogWriter, Story
from tidegate import codec
from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.entry import Entry
from tidegate.eventlog.interface import Record
from tidegate.eventlog.validity import NO_EPOCH
from tidegate.gateway.figures import ACCOUNT, MINUTE_MS, Figures, Name, Tally, called_by, is_at_or_below, learn
from tidegate.gateway.view import (
    MAX_OUTPUT_CHARS,
    MAX_STEP_LINES,
    MAX_TEXT_CHARS,
    LiveView,
    PartitionReader,
    RunRow,
    apply,
)

CALL = {
    "kind": "step",
    "function": "f",
    "queue": "default",
    "arguments": "null",
    "timeout_ms": 1,
    "reserve_micros": 0,
    "idempotent": True,
}


def entry(first_seq: int, *events: Any, now_ms: int = 0, run_id: str = "r", account: str = "acme/shop") -> Entry:
    return Entry(
        subject=run_id,
        account=account,
        first_seq=first_seq,
        epoch=0,
        now_ms=now_ms,
        prev_hash=b"",
        inputs={},
        marks={},
        told=-1,
        tables={},
        cause="",
        events=events,
    )


def started() -> ev.RunStarted:
    return ev.RunStarted(
        command_id="c",
        content_hash="",
        source="",
        workflow="w@1",
        definition_hash="",
        definition="",
        input="null",
        budget_micros=None,
        tags={},
    )


def ready(step_id: str) -> ev.StepReady:
    return ev.StepReady(step_id=step_id, node_id=step_id, wave=0, call=msgspec.convert(CALL, ev.Call))


def succeeded(step_id: str, micros: int = 0, output: str = "1") -> ev.StepSucceeded:
    return ev.StepSucceeded(
        step_id=step_id,
        attempt=1,
        output=output,
        actual_micros=micros,
        usage={},
        instance_id="i",
        incarnation=1,
        started_ms=0,
        finished_ms=0,
    )


def finished(status: str = "succeeded", output: str = "1", reason: str = "") -> ev.RunFinished:
    return ev.RunFinished(status=status, output=output, code="", reason=reason, fingerprint="")


def log_of(story: Story, seed: int = 1, trouble: float = 0.3) -> list[Record]:
    """Return one partition of `run-events` that holds everything: owners change, zombies write, announcements repeat."""
    records = LogWriter(1, 1, seed).take(story.decided, trouble=trouble)
    return [record for record in records if record.topic == "run-events"]


@pytest.fixture(scope="module")
def story() -> Story:
    played = Story()
    played.play_all()
    return played


def spend_by_hand(story: Story) -> Counter[tuple[str, int]]:
    """Return what each account spent in each minute, straight from the decisions."""
    found: Counter[tuple[str, int]] = Counter()
    for one in story.decided:
        if one.log == "run-events":
            for event in one.events:
                found[one.account, one.now_ms // MINUTE_MS] += getattr(event, "actual_micros", 0)
    return +found


def windows_of(view: LiveView) -> Counter[tuple[str, int]]:
    return +Counter(
        {
            (account, minute): micros
            for account, windows in view.tallies.spent(lambda _: True, 0).items()
            for minute, micros in windows.items()
        }
    )


class Counted(NamedTuple):
    """What somebody's figures are, as `Figures` has them."""

    spent_micros: int
    attempts: int
    errors: int
    denied: int
    runs: int
    failed_runs: int


def figures_by_hand(story: Story) -> dict[tuple[str, str], Counted]:
    """Return the figures of accounts and functions over all time: functions by what the steps were made with."""
    found: dict[tuple[str, str], list[int]] = {}
    functions = {
        (one.subject, event.step_id): (event.call.kind, event.call.function)
        for one in story.decided
        if one.log == "run-events"
        for event in one.events
        if isinstance(event, ev.StepReady)
    }
    for one in story.decided:
        for event in one.events if one.log == "run-events" else ():
            outcome = getattr(event, "outcome", "") if isinstance(event, ev.AttemptEnded) else ""
            is_success = isinstance(event, ev.StepSucceeded) and event.attempt > 0
            is_end = isinstance(event, ev.RunFinished)
            numbers = [
                getattr(event, "actual_micros", 0),
                is_success + (outcome in ("failed", "timed_out", "lost")),
                outcome in ("failed", "timed_out", "lost"),
                outcome == "denied",
                is_end,
                is_end and event.status == "failed",
            ]
            names = [(ACCOUNT, one.account), functions.get((one.subject, getattr(event, "step_id", "")))]
            for name in names:
                if name and any(numbers):
                    sums = found.setdefault(name, [0] * len(numbers))
                    sums[:] = [a + b for a, b in zip(sums, numbers, strict=True)]
    return {name: Counted(*numbers) for name, numbers in found.items()}


def figures_of(view: LiveView) -> dict[tuple[str, str], Counted]:
    latest = max(row.updated_ms for row in view.rows.values()) // MINUTE_MS
    found = view.tallies.windows(lambda _: True, [latest + 1], latest)
    return {tuple(name): Counted(*msgspec.structs.astuple(sums[0])) for name, sums in found.items()}


@pytest.mark.feature("O4")
@pytest.mark.feature("D5")
@pytest.mark.parametrize("seed", range(4))
def test_rows_say_what_the_fold_of_runs_says_and_zombies_are_void(story: Story, seed: int) -> None:
    records = log_of(story, seed)
    view, reader = LiveView(), PartitionReader(0)
    for offset, record in enumerate(records):
        taken = reader.take(offset, record.value)
        if taken is not None:
            view.take(taken, 0, offset)

    assert reader.void_count > 0
    assert set(view.rows) == set(story.runs.runs)
    for run_id, run in story.runs.runs.items():
        row = view.rows[run_id]
        assert (row.status, row.seq, row.workflow) == (run.status, run.seq, run.workflow_label), run_id
        assert (row.output, row.code, row.error) == (run.output or "", run.code, run.reason)
        assert not row.incomplete
        by_status = Counter(step.status for step in run.steps.values())
        assert row.step_count == len(run.steps)
        assert row.succeeded_count == by_status[states.SUCCEEDED]
        assert row.failed_count == by_status[states.FAILED]
        assert row.cancelled_count == by_status[states.CANCELLED]
        assert {step_id: (line.status, line.attempt) for step_id, line in row.steps.items()} == {
            step_id: (step.status, step.attempt) for step_id, step in run.steps.items()
        }
        assert set(row.approvals) == {step.step_id for step in run.open_approvals()}
        assert (row.started_ms, row.finished_ms) == (run.started_ms, run.finished_ms), run_id
    assert windows_of(view) == spend_by_hand(story)
    assert figures_of(view) == figures_by_hand(story)


@pytest.mark.feature("O4")
@pytest.mark.parametrize("seed", range(4))
def test_reading_any_part_again_changes_nothing(story: Story, seed: int) -> None:
    """What a restart does: the table is as of some time, the committed offset of some time before."""
    records = log_of(story, seed)
    entries = valid_entries(records)
    once = LiveView()
    for offset, one in entries:
        once.take(one, 0, offset)
    chance = random.Random(seed)
    view = LiveView()
    position = 0
    while position < len(entries):
        ahead = position + chance.randrange(1, 12)
        old = LiveView(restored(view.rows.values(), RunRow), restored(view.tallies.rows.values(), Tally))
        for offset, one in entries[position:ahead]:
            view.take(one, 0, offset)
        # A kill in the middle of writing: of some keys the changelogs have what came of this batch, of others not yet.
        rows = {**old.rows, **{key: row for key, row in view.rows.items() if chance.random() < 0.8}}
        tallies = {**old.tallies.rows}
        tallies |= {key: tally for key, tally in view.tallies.rows.items() if chance.random() < 0.8}
        whole = chance.random() < 0.5
        if whole:
            rows, tallies = view.rows, view.tallies.rows
        view = LiveView(restored(rows.values(), RunRow), restored(tallies.values(), Tally))
        position = max(0, (ahead if whole else position) - chance.randrange(0, 9))

    assert view.rows == once.rows
    for one in (view, once):
        newest = [(row.started_ms, row.run_id) for row in one.newest_first((2**62, ""))]
        assert newest == sorted(((row.started_ms, row.run_id) for row in one.rows.values()), reverse=True)
    assert view.tallies.rows == once.tallies.rows
    assert windows_of(view) == windows_of(once) == spend_by_hand(story)
    assert figures_of(view) == figures_by_hand(story)


def valid_entries(records: list[Record]) -> list[tuple[int, Entry]]:
    reader = PartitionReader(0)
    found = [(offset, reader.take(offset, record.value)) for offset, record in enumerate(records)]
    return [(offset, one) for offset, one in found if one is not None]


def restored(rows: Any, row_type: Any) -> list[Any]:
    """Return the rows after a round trip through the changelog."""
    return [msgspec.json.decode(msgspec.json.encode(row), type=row_type) for row in rows]


@pytest.mark.feature("O4")
def test_an_entry_that_is_known_is_told_apart_and_leaves_the_row_alone() -> None:
    view = LiveView()
    first = entry(1, ready("a"), succeeded("a", 5))
    changed = view.take(first, 0, 7)
    assert changed.row is view.rows["r"]
    assert [tally.key for tally in changed.tallies] == ["0:account:0:acme/shop", "0:step:0:f"]
    before = msgspec.json.encode([view.rows, view.tallies.rows])
    assert view.take(first, 0, 7) == (None, [])
    assert view.take(entry(2, succeeded("a", 5)), 0, 6) == (None, [])
    assert msgspec.json.encode([view.rows, view.tallies.rows]) == before
    assert view.tallies.spent(lambda _: True, 0) == {"acme/shop": {0: 5}}


@pytest.mark.feature("O4")
def test_rows_of_an_earlier_version_learn_what_their_nodes_call_when_the_log_is_read_again() -> None:
    """They hold the entries and no notes: an upgrade gives the tallies a changelog, and the log is read from its beginning."""
    view = LiveView([RunRow(run_id="r", seq=2, status="running")])
    changed = view.take(entry(1, started(), ready("a")), 0, 0)
    assert changed.row is view.rows["r"], "what it has learned must get into the changelog"
    assert (changed.row.seq, changed.row.functions) == (2, {"a": "step:f"})
    (account, function) = view.take(entry(3, succeeded("a", 5)), 0, 1).tallies
    assert (account.name, function.kind, function.name) == ("acme/shop", "step", "f")


@pytest.mark.feature("O4")
def test_a_gap_is_shown_and_not_hidden() -> None:
    row = RunRow(run_id="r")
    apply(row, entry(1, ready("a")))
    assert not row.incomplete
    apply(row, entry(3, succeeded("b", 7)))
    assert row.incomplete
    assert (row.spent_micros, row.succeeded_count) == (7, 1)


@pytest.mark.feature("D5")
def test_reading_from_the_middle_needs_the_epoch_in_force_there(story: Story) -> None:
    records = log_of(story, seed=2)
    reader = PartitionReader(0)
    taken = [reader.take(offset, record.value) for offset, record in enumerate(records)]
    middle = len(records) // 2
    epoch = max(
        (offset for offset, record in enumerate(records[:middle]) if (record.key or b"").startswith(b"owner:new")),
        default=NO_EPOCH,
    )
    again = PartitionReader(middle, epoch)
    assert [again.take(middle + n, record.value) for n, record in enumerate(records[middle:])] == taken[middle:]
    assert again.next_offset == len(records)
    assert PartitionReader(middle).take(middle, next(r.value for r in records if r.value and is_entry(r.value))) is None


def is_entry(value: bytes) -> bool:
    return isinstance(codec.decode(value), Entry)


def test_what_has_no_business_in_the_log_is_told_and_the_next_record_is_read() -> None:
    reader = PartitionReader(7)
    with pytest.raises(codec.DecodeError):
        reader.take(7, b"nonsense")
    assert reader.next_offset == 8
    assert reader.take(8, None) is None
    assert reader.next_offset == 9


# --- bounds --------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("O4")
def test_a_row_keeps_open_steps_rather_than_finished_ones_and_counts_all() -> None:
    row = RunRow(run_id="r")
    seq = 1
    for number in range(MAX_STEP_LINES + 20):
        apply(row, entry(seq, ready(f"s{number}")))
        seq += 1
        if number % 2:
            apply(row, entry(seq, succeeded(f"s{number}")))
            seq += 1
    assert len(row.steps) == MAX_STEP_LINES
    assert row.step_count == MAX_STEP_LINES + 20
    assert row.succeeded_count == (MAX_STEP_LINES + 20) // 2
    assert all(f"s{number}" in row.steps for number in range(0, MAX_STEP_LINES + 20, 2))


@pytest.mark.feature("O4")
def test_long_texts_are_cut() -> None:
    row = RunRow(run_id="r")
    apply(row, entry(1, finished("failed", "x" * (MAX_OUTPUT_CHARS + 1), "y" * (MAX_TEXT_CHARS + 1))))
    assert len(row.output) == MAX_OUTPUT_CHARS
    assert row.output_cut
    assert len(row.error) == MAX_TEXT_CHARS + 1
    assert row.error.endswith("…")


# --- figures -------------------------------------------------------------------------------------------------------------


def ended(step_id: str, outcome: str, micros: int = 0) -> ev.AttemptEnded:
    return ev.AttemptEnded(
        step_id=step_id,
        attempt=1,
        outcome=outcome,
        error_class="",
        error_message="",
        actual_micros=micros,
        usage={},
        retry_at_ms=None,
        instance_id="",
        incarnation=0,
    )


@pytest.mark.feature("P2")
def test_spend_is_of_an_account_and_all_below_it_from_a_minute_on() -> None:
    view = LiveView()
    view.take(entry(1, succeeded("a", 5), now_ms=MINUTE_MS, run_id="r1", account="acme"), 0, 1)
    view.take(entry(1, succeeded("a", 7), now_ms=2 * MINUTE_MS, run_id="r2", account="acme/shop"), 0, 2)
    view.take(entry(2, succeeded("b", 11), now_ms=3 * MINUTE_MS - 1, run_id="r2", account="acme/shop"), 0, 3)
    view.take(entry(1, succeeded("a", 13), now_ms=2 * MINUTE_MS, run_id="r3", account="acmeville"), 1, 1)

    def spent(account: str = "", since_minute: int = 0) -> dict[str, dict[int, int]]:
        return view.tallies.spent(lambda tally: is_at_or_below(tally.name, account), since_minute)

    assert spent("acme") == {"acme": {1: 5}, "acme/shop": {2: 18}}
    assert spent("acme", 2) == {"acme/shop": {2: 18}}
    assert spent("acme/shop") == {"acme/shop": {2: 18}}
    assert spent("ac") == {}
    assert spent() == {"acme": {1: 5}, "acme/shop": {2: 18}, "acmeville": {2: 13}}


@pytest.mark.feature("P2")
def test_money_counts_in_the_minute_in_which_it_was_spent_also_after_the_end_of_the_run() -> None:
    view = LiveView()
    view.take(entry(1, ready("a"), finished("cancelled")), 0, 0)
    late = ev.ResultIgnored(
        step_id="a", attempt=1, outcome="succeeded", actual_micros=9, reason="", instance_id="i", incarnation=1
    )
    view.take(entry(3, late, now_ms=5 * MINUTE_MS), 0, 1)
    assert (view.rows["r"].status, view.rows["r"].spent_micros) == ("cancelled", 9)
    found = view.tallies.windows(lambda _: True, [1], 5)
    assert {name.kind: sums[0] for name, sums in found.items()} == dict.fromkeys((ACCOUNT, "step"), Figures(9))


@pytest.mark.feature("O4")
def test_attempts_and_errors_count_and_what_ran_nothing_does_not() -> None:
    view = LiveView()
    outcomes = ("failed", "timed_out", "lost", "denied", "released", "busy", "expired", "proposed")
    events = [ready("a"), *(ended("a", outcome, 1) for outcome in outcomes), succeeded("a", 2), finished("failed")]
    view.take(entry(1, *events), 0, 0)
    by_hand = succeeded("b")
    view.take(entry(99, msgspec.structs.replace(by_hand, attempt=0, given_by="anna")), 0, 1)
    found = view.tallies.windows(lambda _: True, [1], 0)
    assert found[Name("step", "f")] == [Figures(10, 4, 3, 1)]
    assert found[Name(ACCOUNT, "acme/shop")] == [Figures(10, 4, 3, 1, 1, 1)]


@pytest.mark.feature("O4")
def test_windows_end_with_a_minute_and_reach_over_hours() -> None:
    view = LiveView()
    for offset, minute in enumerate((0, 1, 59, 60, 119, 120, 185)):
        view.take(entry(offset + 1, succeeded("a", 10**offset), now_ms=minute * MINUTE_MS), 0, offset)

    def spent(size: int, until: int) -> int:
        found = view.tallies.windows(lambda tally: tally.kind == ACCOUNT, [size], until)
        return sum(sums[0].spent_micros for sums in found.values())

    assert spent(1, 0) == 1
    assert spent(61, 60) == 1111
    assert spent(60, 60) == 1110
    assert spent(60, 119) == 11000
    assert spent(186, 185) == 1111111
    assert spent(184, 185) == 1111100
    assert spent(5, 300) == 0
    assert spent(60, 118) == 1100, "what came after the window does not count in it"


@pytest.mark.feature("O4")
@pytest.mark.parametrize(
    ("step_id", "name"),
    [
        ("f", ("step", "f")),
        ("price", ("step", "f")),
        ("price/2", ("step", "f")),
        ("price/#3", ("step", "f")),
        ("triage/1", ("agent", "support")),
        ("triage/#3/2", ("agent", "support")),
        ("triage/2/1/tool:look.up", ("tool", "look.up")),
        ("triage/1/tool:f#12", ("tool", "f")),
        ("plan/1", ("flow", "make_plan")),
        ("plan/draft", ("step", "draft")),
        ("plan/2/draft#3", ("step", "draft")),
    ],
)
def test_the_function_of_a_step(step_id: str, name: tuple[str, str]) -> None:
    functions: dict[str, str] = {}
    for node_id, kind, function in (("f", "step", "f"), ("price", "step", "f"), ("triage", "agent", "support")):
        call = msgspec.convert({**CALL, "kind": kind, "function": function}, ev.Call)
        learn(functions, [ev.StepReady(step_id=node_id, node_id=node_id, wave=0, call=call)])
    flow = msgspec.convert({**CALL, "kind": "flow", "function": "make_plan"}, ev.Call)
    drafted = msgspec.convert({**CALL, "function": "draft"}, ev.Call)
    assert learn(functions, [ev.StepReady(step_id="plan/1", node_id="plan", wave=0, call=flow)])
    assert not learn(functions, [ev.StepReady(step_id="plan/draft", node_id="plan", wave=1, call=drafted)])
    assert functions == {"price": "step:f", "triage": "agent:support", "plan": "flow:make_plan"}
    assert called_by(functions, step_id) == name


@pytest.mark.feature("D7")
def test_runs_and_hours_that_are_over_are_forgotten_after_a_time_and_open_runs_never() -> None:
    view = LiveView(keep_minutes=10)
    for offset, (run_id, events) in enumerate(
        {
            "over": (ready("a"), succeeded("a", 3), finished()),
            "open": (started(), ready("a"), succeeded("a", 4)),
        }.items()
    ):
        view.take(entry(1, *events, run_id=run_id), 0, offset)
    refused = ev.CommandRefused(command_id="c", type="cancel", source="", code="", reason="", original=b"")
    view.take(entry(1, refused), 0, 2)
    view.take(entry(1, finished(), run_id="young", now_ms=60 * MINUTE_MS), 0, 3)
    assert view.outdated(10 * MINUTE_MS) == []
    assert sorted(view.outdated(10 * MINUTE_MS + 1)) == ["over", "r"]
    for run_id in view.outdated(10 * MINUTE_MS + 1):
        view.forget(run_id)
    view.forget("over")
    assert set(view.rows) == {"open", "young"}
    assert {row.run_id for row in view.newest_first((2**62, ""))} == {"open", "young"}
    assert view.tallies.spent(lambda _: True, 0) == {"acme/shop": {0: 7}}, "what was spent was spent"
    assert view.outdated_tallies(70 * MINUTE_MS - 1) == []
    outdated = view.outdated_tallies(70 * MINUTE_MS)
    assert outdated == ["0:account:0:acme/shop", "0:step:0:f"]
    for key in outdated:
        view.tallies.forget(key)
    assert view.tallies.spent(lambda _: True, 0) == {}
    assert list(view.tallies.rows) == ["0:account:1:acme/shop"]


@pytest.mark.feature("D1")
def test_tallies_of_another_log_count_as_none() -> None:
    old = LiveView(log="before")
    old.take(entry(1, succeeded("a", 5)), 0, 100)
    view = LiveView(old.rows.values(), old.tallies.rows.values(), log="now")
    assert not view.tallies.rows
    view.take(entry(1, succeeded("b", 7), run_id="other"), 0, 3)
    assert view.tallies.spent(lambda _: True, 0) == {"acme/shop": {0: 7}}
