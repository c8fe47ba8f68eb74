"""`tidegate audit money`: what it shows, and how it says no."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from support.logs import LogWriter, Story
from tidegate.cli import audit
from tidegate.domain.ledger_events import AttemptSettled
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.memory import MemoryBroker


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    """One run of every kind; the command reads what `written` last wrote of it."""
    made = Story()
    made.play_all()
    return made


def written(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    broker = MemoryBroker()
    for topic, partitions in (("run-events", 1), ("gate-ledger", 2), ("schemas", 1)):
        broker.create_topic(topic, partitions)
    writer = broker.writer()
    for record in LogWriter(1, 2).take(story.decided):
        writer.send(record)
    writer.flush(1)
    monkeypatch.setattr(audit, "KafkaBroker", lambda _: broker)


def run_audit(*words: str) -> Any:
    return CliRunner().invoke(audit.app, ["money", *words])


@pytest.mark.feature("P2")
def test_the_books_are_shown(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    written(monkeypatch, story)
    found = json.loads(run_audit("--json").stdout)
    reserved, settled = story.money()
    accounts = found["accounts"].values()
    assert found["ok"] is True
    assert (sum(a["open_micros"] for a in accounts), sum(a["settled_micros"] for a in accounts)) == (reserved, settled)
    assert sum(one["reserved_micros"] for one in found["open"]) == reserved > 0
    result = run_audit()
    assert result.exit_code == 0
    assert "umbrella/lab" in result.stdout
    assert result.stdout.endswith("it agrees with itself\n")


def test_one_run_is_shown_by_itself(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    written(monkeypatch, story)
    found = json.loads(run_audit("--run", "s-running", "--json").stdout)
    assert found["run"] == {
        "account": "acme/support",
        "budget_micros": None,
        "reserved_micros": 1_000,
        "settled_micros": 0,
        "overshoot_micros": 0,
        "closed": False,
        "parent": "",
        "below_micros": 0,
        "over": False,
        "is_alone": True,
        "is_carried": False,
    }
    assert [one["step_id"] for one in found["open"]] == ["a"]
    assert "not over" in run_audit("--run", "s-running").stdout
    result = run_audit("--run", "nobody")
    assert result.exit_code == 2
    assert "no run nobody" in result.stderr


@pytest.mark.feature("P2")
def test_a_ledger_that_does_not_agree_is_a_failure(monkeypatch: pytest.MonkeyPatch, story: Story) -> None:
    for number, one in enumerate(story.decided):
        (event, *rest) = one.events
        if isinstance(event, AttemptSettled):
            dearer = msgspec.structs.replace(event, actual_micros=event.actual_micros + 1)
            story.decided[number] = one._replace(events=(dearer, *rest))
            break
    written(monkeypatch, story)
    result = run_audit()
    assert result.exit_code == 1
    assert "1 problem" in result.stdout
    assert f"{event.run_id}: closed with" in result.stderr
    found = json.loads(run_audit("--json").stdout)
    assert [problem["run_id"] for problem in found["problems"]] == [event.run_id]
    assert run_audit("--run", "s-running").exit_code == 0


def test_a_ledger_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def __init__(self, _: object) -> None:
            pass

        def describe(self, _: object) -> None:
            raise EventLogError("no answer")

    monkeypatch.setattr(audit, "KafkaBroker", Unreachable)
    monkeypatch.setenv("TIDEGATE_KAFKA_BOOTSTRAP", "127.0.0.1:7")
    result = run_audit()
    assert result.exit_code == 2
    assert result.stderr == "cannot read the ledger of Kafka at 127.0.0.1:7: no answer\n"
