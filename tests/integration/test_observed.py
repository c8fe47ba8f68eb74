"""Every service tells whether it lives, is ready, and what it does: while it works, and while the broker is away."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.stack import WholeStack, eventually

SERVICES = ("scheduler", "gate", "projection", "gateway")
RUN_COUNT = 12
ABSENT = 0
LOGS = ("run-events", "gate-ledger")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    with WholeStack(
        tmp_path_factory.mktemp("observed"),
        services=SERVICES,
        env={"TIDEGATE_HTTP_PORT": "0", "TIDEGATE_CHECKPOINT_EVERY_S": "0.5"},
    ) as stack:
        yield stack


def url_of(stack: WholeStack, name: str) -> str:
    lines = stack.stack.log_path(name).read_text(encoding="utf-8").splitlines()
    for line in reversed(lines):  # a process that was started again has another address
        if '"health and metrics"' in line:
            return str(json.loads(line)["url"])
    raise AssertionError(f"{name} serves nothing")


def ask(stack: WholeStack, name: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url_of(stack, name) + path, timeout=10) as response:  # noqa: S310 - http
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def measured(stack: WholeStack, name: str) -> dict[str, float]:
    """Return the sums over all labels of what a process exports, by sample name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(ask(stack, name, "/metrics")[1]):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def as_wanted(stack: WholeStack, name: str, wanted: dict[str, float]) -> dict[str, float | None] | None:
    found = measured(stack, name)
    shown = {key: found.get(key) for key in wanted}  # some are shown only once they are known
    return shown if shown == wanted else None


def all_answered(stack: WholeStack) -> dict[str, float] | None:
    """Return what the executor counted once every attempt has its answer: an effect comes before it."""
    found = measured(stack, "executor-default-0")
    answered = found.get("tidegate_executor_attempts_total", 0)
    all_ = answered >= RUN_COUNT * 4 and answered == found["tidegate_executor_attempt_seconds_count"]
    return found if all_ else None


def verdicts(stack: WholeStack, path: str) -> dict[str, int]:
    found = {}
    for name in stack.pids:
        try:
            found[name] = ask(stack, name, path)[0]
        except OSError:
            found[name] = ABSENT
    return found


@pytest.mark.feature("O5")
def test_every_service_says_how_it_is_and_what_it_does(stack: WholeStack) -> None:
    runs = [f"observed-{number}" for number in range(RUN_COUNT)]
    stack.requests([{"workflow": "busy", "input": 1, "run_id": run_id, "account": "org/app"} for run_id in runs])
    eventually(lambda: len(stack.effects()) >= RUN_COUNT * 4, "all effects")
    eventually(lambda: set(verdicts(stack, "/health/ready").values()) == {200}, "everybody to be ready")
    assert set(verdicts(stack, "/health/live").values()) == {200}

    wanted = {
        "scheduler-0": {
            "tidegate_admission_requests_total": RUN_COUNT,
            "tidegate_told_distance_records": 0,
            "tidegate_input_lag_messages": 0,
        },
        "gate-0": {
            "tidegate_gate_open_runs": 0,
            "tidegate_gate_free_slots": 8,
            "tidegate_input_lag_messages": 0,
        },
    }
    for name, values in wanted.items():
        told = eventually(lambda name=name, values=values: as_wanted(stack, name, values), f"{name} to say what it did")
        assert told == values
    scheduler = measured(stack, "scheduler-0")
    assert scheduler["tidegate_partitions_owned"] == 8
    assert scheduler["tidegate_takeovers_total"] == 8
    assert scheduler["tidegate_turn_seconds_count"] > 0
    assert scheduler["process_resident_memory_bytes"] > 0
    executor = eventually(lambda: all_answered(stack), "the executor to have answered what had its effect")
    placed = {"tidegate_gate_decisions_total": executor["tidegate_executor_attempts_total"]}
    # An owner's loop hands over its figures every two seconds: those that were right before the first run may be shown.
    eventually(lambda: as_wanted(stack, "gate-0", placed), "the gate to count what it placed")
    assert 0 < executor["tidegate_executor_lease_remaining_seconds"] <= 10
    events = eventually(lambda: measured(stack, "scheduler-0").get("tidegate_events_total"), "the scheduler's events")
    eventually(lambda: measured(stack, "projection-0")["tidegate_projection_events_total"] >= events, "the projection")
    # Counted as they are read; they are inserted, and their lag is known, later. Heartbeats go on, so the lag may be any.
    eventually(lambda: "tidegate_projection_lag_records" in measured(stack, "projection-0"), "what is inserted")
    eventually(lambda: measured(stack, "gateway-0")["tidegate_gateway_runs"] == RUN_COUNT, "the live view")
    eventually(lambda: measured(stack, "projection-0")["tidegate_projection_insert_seconds_count"] > 0, "an insert")


@pytest.mark.feature("L4")
def test_the_owners_state_is_what_their_logs_say(stack: WholeStack) -> None:
    def compared() -> dict[str, Any] | None:
        report: dict[str, Any] = json.loads(stack.cli("replay", "state", "--json"))
        units = {log: sum(p["compared"] for p in report["partitions"] if p["log"] == log) for log in LOGS}
        return report if units["run-events"] >= RUN_COUNT else None

    report = eventually(compared, "a checkpoint of every partition")
    assert report["ok"], report
    assert sum(part["entries"] for part in report["partitions"]) > RUN_COUNT


@pytest.mark.feature("O5")
def test_a_broker_that_is_away_makes_nobody_look_dead(stack: WholeStack) -> None:
    """If that takes longer than a lease or a deadline, a process may end itself; but no probe must do it."""
    kafka: Any = stack.stack.kafka
    kafka.kill()
    logs: list[Path] = [stack.stack.log_path(name) for name in stack.pids]
    eventually(lambda: all("onnect" in path.read_text()[-4000:] for path in logs), "everybody to notice")
    assert set(verdicts(stack, "/health/live").values()) <= {200, ABSENT}
    kafka.restart()
    eventually(lambda: set(verdicts(stack, "/health/ready").values()) == {200}, "everybody to be ready again")
