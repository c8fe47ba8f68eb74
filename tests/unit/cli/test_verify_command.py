"""`tidegate verify`: what it says of runs that are over, of runs that are not, and of a Kafka that does not answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from support.cluster import Cluster
from tidegate.cli import verify
from tidegate.eventlog.interface import EventLogError


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Have the command read a log in memory, with one run that is over."""
    made = Cluster()
    made.start_run("over")
    made.settle()
    monkeypatch.setattr(verify, "KafkaBroker", lambda _: made.broker)
    return made


def run_verify(*words: str) -> Any:
    return CliRunner().invoke(verify.app, list(words))


@pytest.mark.feature("L2")
def test_runs_that_are_not_over_are_counted_and_are_no_fault(cluster: Cluster) -> None:
    assert json.loads(run_verify("--json").stdout)["runs_not_over"] == 0
    assert "not over" not in run_verify().stdout
    for run_id in ("cut-1", "cut-2"):
        cluster.start_run(run_id)
    for _ in range(3):
        cluster.owners["scheduler"].run_once(0.0)
    result = run_verify()
    assert result.exit_code == 0
    assert result.stdout.endswith(": all whole; 2 runs not over\n")
    assert run_verify("cut-1").stdout.endswith(": all whole; 1 run not over\n")
    found = json.loads(run_verify("--json").stdout)
    assert (found["ok"], found["runs_not_over"]) == (True, 2)


def test_one_of_a_thing_is_said_as_one(cluster: Cluster) -> None:
    assert run_verify("over").stdout.startswith("1 subject, ")
    assert run_verify("nobody").stdout == "0 subjects, 0 entries, 0 events, 0 void entries: 1 problem\n"


def test_a_kafka_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def __init__(self, _: object) -> None:
            pass

        def describe(self, _: object) -> None:
            raise EventLogError("no answer")

    monkeypatch.setattr(verify, "KafkaBroker", Unreachable)
    monkeypatch.setenv("TIDEGATE_KAFKA_BOOTSTRAP", "127.0.0.1:7")
    result = run_verify()
    assert result.exit_code == 2
    assert result.stderr == "cannot read the logs of Kafka at 127.0.0.1:7: no answer\n"
