"""The live view's fold: what a row says, that nothing counts twice, and what is forgotten."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest

from support.logs import LogWriter, Story
from tidegate import codec
from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.entry import Entry
from tidegate.eventlog.interface import Record
from tidegate.eventlog.validity import NO_EPOCH
from tidegate.gateway.view import (
    MAX_OUTPUT_CHARS,
    MAX_STEP_LINES,
    MAX_TEXT_CHARS,
    MINUTE_MS,
    LiveView,
    PartitionReader,
    RunRow,
    SpendWindows,
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
            for account, windows in view.windows.accounts().items()
            for minute, micros in windows.items()
        }
    )


@pytest.mark.feature("O4")
@pytest.mark.feature("D5")
@pytest.mark.parametrize("seed", range(4))
def test_rows_say_what_the_fold_of_runs_says_and_zombies_are_void(story: Story, seed: int) -> None:
    records = log_of(story, seed)
    view, reader = LiveView(), PartitionReader(0)
    for offset, record in enumerate(records):
        taken = reader.take(offset, record.value)
        if taken is not None:
            view.take(taken)

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


@pytest.mark.feature("O4")
@pytest.mark.parametrize("seed", range(4))
def test_reading_any_part_again_changes_nothing(story: Story, seed: int) -> None:
    """What a restart does: the table is as of some time, the committed offset of some time before."""
    records = log_of(story, seed)
    entries = valid_entries(records)
    once = LiveView()
    for one in entries:
        once.take(one)
    chance = random.Random(seed)
    view = LiveView()
    position = 0
    while position < len(entries):
        ahead = position + chance.randrange(1, 12)
        for one in entries[position:ahead]:
            view.take(one)
        view = LiveView(restored(view.rows.values()))
        position = max(0, ahead - chance.randrange(0, 9))

    assert view.rows == once.rows
    assert windows_of(view) == windows_of(once) == spend_by_hand(story)


def valid_entries(records: list[Record]) -> list[Entry]:
    reader = PartitionReader(0)
    found = (reader.take(offset, record.value) for offset, record in enumerate(records))
    return [one for one in found if one is not None]


def restored(rows: Any) -> list[RunRow]:
    """Return the rows after a round trip through the changelog."""
    return [msgspec.json.decode(msgspec.json.encode(row), type=RunRow) for row in rows]


@pytest.mark.feature("O4")
def test_an_entry_that_is_known_is_told_apart_and_leaves_the_row_alone() -> None:
    view = LiveView()
    first = entry(1, ready("a"), succeeded("a", 5))
    assert view.take(first) is view.rows["r"]
    before = msgspec.json.encode(view.rows["r"])
    assert view.take(first) is None
    assert view.take(entry(2, succeeded("a", 5))) is None
    assert msgspec.json.encode(view.rows["r"]) == before
    assert view.windows.accounts() == {"acme/shop": {0: 5}}


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


# --- spend ---------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P2")
def test_windows_are_of_an_account_and_all_below_it_from_a_minute_on() -> None:
    view = LiveView()
    view.take(entry(1, succeeded("a", 5), now_ms=MINUTE_MS, run_id="r1", account="acme"))
    view.take(entry(1, succeeded("a", 7), now_ms=2 * MINUTE_MS, run_id="r2", account="acme/shop"))
    view.take(entry(2, succeeded("b", 11), now_ms=3 * MINUTE_MS - 1, run_id="r2", account="acme/shop"))
    view.take(entry(1, succeeded("a", 13), now_ms=2 * MINUTE_MS, run_id="r3", account="acmeville"))
    assert view.windows.accounts("acme") == {"acme": {1: 5}, "acme/shop": {2: 18}}
    assert view.windows.accounts("acme", 2) == {"acme/shop": {2: 18}}
    assert view.windows.accounts("acme/shop") == {"acme/shop": {2: 18}}
    assert view.windows.accounts("ac") == {}
    assert view.windows.accounts() == {"acme": {1: 5}, "acme/shop": {2: 18}, "acmeville": {2: 13}}


@pytest.mark.feature("P2")
def test_money_counts_in_the_minute_in_which_it_was_spent_also_after_the_end_of_the_run() -> None:
    row = RunRow(run_id="r")
    apply(row, entry(1, ready("a"), finished("cancelled")))
    late = ev.ResultIgnored(
        step_id="a", attempt=1, outcome="succeeded", actual_micros=9, reason="", instance_id="i", incarnation=1
    )
    apply(row, entry(3, late, now_ms=5 * MINUTE_MS))
    assert (row.status, row.spent_micros, row.minutes) == ("cancelled", 9, {5: 9})


@pytest.mark.feature("P2")
def test_minutes_older_than_what_is_kept_leave_the_row_but_not_the_sum() -> None:
    view = LiveView(keep_minutes=10)
    for number, minute in enumerate((1, 5, 11, 30)):
        view.take(entry(number + 1, succeeded("a", 1), now_ms=minute * MINUTE_MS))
        kept = {known for known in (1, 5, 11, 30)[: number + 1] if known > minute - 10}
        assert set(view.rows["r"].minutes) == kept
        assert view.windows.accounts() == {"acme/shop": dict.fromkeys(kept, 1)}
    assert view.rows["r"].spent_micros == 4


@pytest.mark.feature("D7")
def test_runs_that_are_over_are_forgotten_after_a_time_and_open_ones_never() -> None:
    view = LiveView(keep_minutes=10)
    for run_id, events in {
        "over": (ready("a"), succeeded("a", 3), finished()),
        "open": (started(), ready("a"), succeeded("a", 4)),
    }.items():
        view.take(entry(1, *events, run_id=run_id))
    view.take(entry(1, ev.CommandRefused(command_id="c", type="cancel", source="", code="", reason="", original=b"")))
    view.take(entry(1, finished(), run_id="young", now_ms=MINUTE_MS))
    assert view.outdated(10 * MINUTE_MS) == []
    assert sorted(view.outdated(10 * MINUTE_MS + 1)) == ["over", "r"]
    for run_id in view.outdated(10 * MINUTE_MS + 1):
        view.forget(run_id)
    view.forget("over")
    assert set(view.rows) == {"open", "young"}
    assert view.windows.accounts() == {"acme/shop": {0: 4}} == SpendWindows(view.rows.values()).accounts()
