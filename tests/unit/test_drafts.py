"""Consecutive inputs of one subject become one entry, and allows wait for the results that say so too (docs/adr/0040)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster
from support.pure import entries_of
from tidegate import codec
from tidegate.domain import run_events as re
from tidegate.domain.entry import Entry, InputRange, Position, causes_in, causes_text, parts_of
from tidegate.domain.identity import partition_of
from tidegate.eventlog import draft, owned
from tidegate.eventlog.interface import Message
from tidegate.eventlog.verification import Report, verify_partition

pytestmark = pytest.mark.feature("L2")

RUNS = ("r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7")


def entries(cluster: Cluster, topic: str, key: str, partitions: int) -> list[Entry]:
    messages = cluster.messages(topic, partition_of(key, partitions))
    records = [codec.decode(message.value) for message in messages if message.value is not None]
    return [record for record in records if isinstance(record, Entry)]


def ledger(cluster: Cluster) -> list[Entry]:
    return entries(cluster, "gate-ledger", "acme", ACCOUNT_PARTITIONS)


def run_entries(cluster: Cluster, run_id: str) -> list[Entry]:
    return [one for one in entries(cluster, "run-events", run_id, RUN_PARTITIONS) if one.subject == run_id]


def names(entry: Entry) -> list[str]:
    return [type(event).__name__ for event in entry.events]


def until(cluster: Cluster, service: str, is_so: Callable[[], Any]) -> None:
    """Let one service work, while the clock stands, until it is so."""
    for _ in range(50):
        if is_so():
            return
        cluster.owners[service].run_once(0.0)
    raise AssertionError(f"it never comes to be: {service}")


def asked(cluster: Cluster, *run_ids: str) -> None:
    """Start runs, and let the scheduler ask the gate for all of them before that reads anything."""
    cluster.settle()
    for run_id in run_ids:
        cluster.start_run(run_id, "a", "b")
    until(cluster, "scheduler", lambda: all(run_entries(cluster, run_id) for run_id in run_ids))
    cluster.owners["scheduler"].run_once(0.0)


def test_a_cause_names_its_inputs_exactly() -> None:
    ranges = [
        InputRange("gate-requests", 3, 7, 7),
        InputRange("gate-leases", 3, 1, 3),
        InputRange("gate-requests", 3, 9, 10),
    ]
    text = causes_text(ranges)
    assert text == "gate-requests:3:7 gate-leases:3:1..3 gate-requests:3:9..10"
    assert causes_in(text) == [
        *("gate-requests:3:7", "gate-leases:3:1", "gate-leases:3:2", "gate-leases:3:3"),
        *("gate-requests:3:9", "gate-requests:3:10"),
    ]
    for alone in ("gate-requests:3:7", "timer:17:a ..b/1..2:1", "table:policies:17"):
        assert causes_in(alone) == [alone]
    assert causes_in("a:0:0..999999999999 b:0:1", 2) == [
        "a:0:0",
        "a:0:1",
    ]  # no entry of ours, and more than fits anywhere


def test_what_a_turn_of_the_gate_decides_is_one_entry() -> None:
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: ledger(cluster))
    (entry,) = ledger(cluster)
    opened = [event.run_id for event in entry.events if type(event).__name__ == "RunOpened"]
    assert sorted(opened) == list(RUNS)
    assert len(entry.parts) == len(RUNS)
    assert f"gate-requests:0:{entry.inputs['gate-requests'] - 1}" == causes_in(entry.cause)[-1]
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run.status for run in runs.values()} == {"succeeded"}


def test_what_an_entry_tells_is_what_each_of_its_inputs_would_have_told() -> None:
    """Receivers judge a message as what one input caused: two of its items never concern the same thing in turn."""
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: ledger(cluster))
    (entry,) = ledger(cluster)
    machine = cluster.owners["gate"].machine
    together = machine.tells(entry, lambda index: Position(0, 5, index))
    assert [tell.record.source.index for tell in together] == list(range(len(together)))
    alone = [tell for one in entries_of(entry) for tell in machine.tells(one, lambda index: Position(0, 5, index))]

    def unplaced(record: Any) -> Any:
        return msgspec.structs.replace(record, source=Position(0, 0, 0))

    assert [(t.topic, t.key, unplaced(t.record)) for t in together] == [
        (t.topic, t.key, unplaced(t.record)) for t in alone
    ]
    assert len({(tell.topic, tell.key) for tell in together}) == len(together), (
        "compaction would take one for the other"
    )


def test_parts_that_do_not_make_up_their_entry_are_noticed() -> None:
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: ledger(cluster))
    (entry,) = ledger(cluster)
    for parts in (entry.parts[1:], (*entry.parts[:-1], entry.parts[-1] + 1)):
        with pytest.raises(ValueError, match="do not make up"):
            parts_of(msgspec.structs.replace(entry, parts=parts))


def test_verify_tells_of_an_entry_that_names_more_inputs_than_it_has_parts() -> None:
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: ledger(cluster))
    (entry,) = ledger(cluster)
    forged = msgspec.structs.replace(entry, cause=f"{entry.cause} gate-leases:0:1")
    for shown, problems in ((entry, 0), (forged, 1)):
        value = codec.encode_entry("LedgerEntry", shown)
        log = cluster.messages("gate-ledger", partition_of("acme", ACCOUNT_PARTITIONS))
        report = Report()
        verify_partition(
            [msgspec.structs.replace(one, value=value) if codec.decode(one.value) == entry else one for one in log],
            report,
        )
        assert len(report.problems) == problems, report.problems


def test_an_entry_of_many_inputs_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "MAX_EVENTS", 7)
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: sum(len(entry.parts) or 1 for entry in ledger(cluster)) == len(RUNS))
    assert all(len(entry.events) <= 7 for entry in ledger(cluster))
    assert len(ledger(cluster)) > 2
    monkeypatch.setattr(draft, "MAX_BYTES", 1)
    cluster = Cluster()
    asked(cluster, *RUNS)
    until(cluster, "gate", lambda: len(ledger(cluster)) == len(RUNS))


def test_a_decision_that_cannot_be_written_leaves_the_others_in_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    asked(cluster, *RUNS)
    requests = [codec.decode(one.value).run_id for one in cluster.messages("gate-requests", partition_of("acme", 2))]
    encode = codec.encode_events

    def refusing(kind: str, events: Any) -> bytes:
        if kind == "LedgerEntry" and any(getattr(event, "run_id", "") == "r3" for event in events):
            raise ValueError("not a good LedgerEntry")
        return encode(kind, events)

    monkeypatch.setattr(owned.codec, "encode_events", refusing)
    until(cluster, "gate", lambda: ledger(cluster))
    (entry,) = ledger(cluster)
    assert {event.run_id for event in entry.events} == set(RUNS) - {"r3"}
    offsets = [int(cause.rpartition(":")[2]) for cause in causes_in(entry.cause)]
    assert offsets == [offset for offset, run_id in enumerate(requests) if run_id != "r3"]
    (letter,) = [codec.decode(message.value) for message in cluster.messages("dead-letters", 0)]
    assert (letter.topic, letter.offset) == ("gate-requests", requests.index("r3"))
    monkeypatch.undo()
    cluster.settle()
    report, runs = cluster.verified()
    assert report.problems == []
    assert {run_id for run_id, run in runs.items() if run.status == "succeeded"} == set(RUNS) - {"r3"}


def test_a_changed_table_seals_what_was_decided_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    asked(cluster, *RUNS)
    gate = cluster.owners["gate"]
    poll, held = gate._inbox.poll, list[Message]()

    def rows_in_the_middle(most: int, timeout_s: float) -> list[Message]:
        held.extend(poll(most, timeout_s))
        inputs = [message for message in held if message.topic not in gate.tables.rows]
        found = [message for message in held if message.topic in gate.tables.rows]
        if len(inputs) < len(RUNS) or not found:
            return []
        held.clear()
        return [*inputs[: len(RUNS) // 2], *found, *inputs[len(RUNS) // 2 :]]

    monkeypatch.setattr(gate._inbox, "poll", rows_in_the_middle)
    cluster.require_approval()
    monkeypatch.undo()
    before, after = ledger(cluster)
    assert len(before.parts) == len(after.parts) == len(RUNS) // 2
    assert "AttemptGranted" in names(before)
    assert "ApprovalHeld" not in names(before)
    assert "ApprovalHeld" in names(after)
    assert "AttemptGranted" not in names(after)
    assert before.tables["policies"] < after.tables["policies"]
    cluster.settle()
    report, _ = cluster.verified()
    assert report.problems == []


# --- allows wait ---


def allowed(cluster: Cluster, run_id: str = "r0") -> None:
    """Let a run's first step be allowed and placed, and the scheduler read of it."""
    asked(cluster, run_id)
    until(cluster, "gate", lambda: ledger(cluster))
    cluster.owners["gate"].run_once(0.0)
    waiting = cluster.owners["scheduler"].owned[partition_of(run_id, RUN_PARTITIONS)].waiting
    until(cluster, "scheduler", lambda: len(waiting) == 1)


def test_an_allow_and_a_result_that_comes_soon_are_one_entry() -> None:
    cluster = Cluster()
    allowed(cluster)
    before = len(run_entries(cluster, "r0"))
    assert cluster.execute()
    until(cluster, "scheduler", lambda: len(run_entries(cluster, "r0")) > before)
    entry = run_entries(cluster, "r0")[before]
    assert names(entry)[:2] == ["AttemptDispatched", "StepSucceeded"]
    assert [cause.partition(":")[0] for cause in causes_in(entry.cause)] == ["gate-decisions", "step-results"]
    assert [names(part)[0] for part in parts_of(entry)] == ["AttemptDispatched", "StepSucceeded"]


def test_without_a_result_an_allow_waits_no_longer_than_it_may() -> None:
    cluster = Cluster()
    allowed(cluster)
    loop, before = cluster.owners["scheduler"], len(run_entries(cluster, "r0"))
    assert loop._longest_poll_s(10.0) == pytest.approx(0.1), "a poll must not outlast what waits"
    cluster.now_ms += 99
    loop.run_once(0.0)
    assert len(run_entries(cluster, "r0")) == before
    cluster.now_ms += 2
    loop.run_once(0.0)
    entry = run_entries(cluster, "r0")[before]
    assert names(entry) == ["AttemptDispatched"]


def test_what_waits_is_not_read_and_a_successor_reads_it_again() -> None:
    cluster = Cluster()
    allowed(cluster)
    part = cluster.owners["scheduler"].owned[partition_of("r0", RUN_PARTITIONS)]
    assert part.inputs.get("gate-decisions", 0) == 0
    cluster.crash("scheduler")
    cluster.start("scheduler")
    cluster.settle()
    dispatched = [event for event in cluster.events_of("r0") if isinstance(event, re.AttemptDispatched)]
    assert [event.step_id for event in dispatched] == sorted({event.step_id for event in dispatched})
    assert dispatched


def test_a_command_about_the_run_finds_it_as_the_gate_left_it() -> None:
    cluster = Cluster()
    allowed(cluster)
    before = len(run_entries(cluster, "r0"))
    cluster.command("r0", "cancel")
    until(cluster, "scheduler", lambda: len(run_entries(cluster, "r0")) > before)
    events = [name for entry in run_entries(cluster, "r0")[before:] for name in names(entry)]
    assert events[0] == "AttemptDispatched"
    assert "RunCancelRequested" in events


def test_what_comes_behind_in_the_same_topic_waits_for_nobody() -> None:
    """A denial does not overtake, or what waits would be below its mark; it makes what waits go ahead."""
    cluster = Cluster()
    partition = partition_of("r0", RUN_PARTITIONS)
    other = next(name for name in RUNS[1:] if partition_of(name, RUN_PARTITIONS) == partition)
    cluster.settle()
    rule = {"name": "no", "when": 'account == "acme/no"', "then": "deny"}
    cluster.publish({"policy": "no", "version": "1", "rules": [rule]})
    allowed(cluster)
    before = len(run_entries(cluster, "r0"))
    cluster.owners["scheduler"]._patience_s = 3600.0
    cluster.start_run(other, "a", account="acme/no")
    for _ in range(10):
        cluster.owners["scheduler"].run_once(0.0)
        cluster.owners["gate"].run_once(0.0)
    assert names(run_entries(cluster, "r0")[before]) == ["AttemptDispatched"]
    assert "StepFailed" in [name for entry in run_entries(cluster, other) for name in names(entry)]
