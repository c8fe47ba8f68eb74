"""What owners certify of their state is compared with their logs, and whatever differs is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import typer

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster
from tidegate import codec
from tidegate.cli import replay
from tidegate.domain.entry import Snapshot
from tidegate.eventlog.interface import Message, Record
from tidegate.eventlog.restore import certified
from tidegate.eventlog.settings import CheckpointSettings
from tidegate.eventlog.state_check import StateReport, check_state
from tidegate.gate import snapshots as ledger_formats
from tidegate.scheduler import snapshots as run_formats

OFTEN = CheckpointSettings(every_entries=5, every_s=0.5, units_per_turn=2, rest_after_s=3600)
LOGS = {"scheduler": RUN_PARTITIONS, "gate": ACCOUNT_PARTITIONS}
TOPICS = {"scheduler": "run-snapshots", "gate": "gate-snapshots"}


def worked(seed: int) -> Cluster:
    """Return a cluster with runs that are over and runs under way, and checkpoints of both."""
    cluster = Cluster(seed, OFTEN)
    for number in range(14):
        cluster.start_run(f"r{number}", *("abc"[: 1 + number % 3]), account=f"acme{number % 3}")
        if number % 5 == 0:
            cluster.command(f"r{number}", "cancel", command_id=f"c{number}")
        cluster.turn()
    for _ in range(20):
        cluster.turn()
    return cluster


def reports(cluster: Cluster, service: str) -> list[StateReport]:
    return [check_state(cluster.broker, cluster.machine(service), partition) for partition in range(LOGS[service])]


@pytest.mark.feature("L4")
@pytest.mark.parametrize("seed", range(8))
def test_sound_owners_say_what_their_logs_say(seed: int) -> None:
    cluster = worked(seed)
    for service in LOGS:
        found = reports(cluster, service)
        assert [one.differences for one in found] == [[] for _ in found]
        assert sum(one.compared for one in found) > 0


def live_snapshots(cluster: Cluster, service: str) -> list[tuple[Message, Snapshot]]:
    topic = TOPICS[service]
    found = []
    for partition in range(LOGS[service]):
        start, end = cluster.broker.offsets(topic, partition)
        latest = {message.key: message for message in cluster.broker.read(topic, partition, start, end)}
        for key, message in latest.items():
            if message.value is not None and key is not None and key.startswith(b"live:"):
                found.append((message, codec.decode(message.value)))
    return [(message, snapshot) for message, snapshot in found if counts(cluster, service, message.partition, snapshot)]


def counts(cluster: Cluster, service: str, partition: int, snapshot: Snapshot) -> bool:
    """Tell whether a checkpoint is in force that needs this snapshot, of something that is there."""
    unit = snapshot.units[0]
    if not unit.state:
        return False
    found = certified(cluster.broker, cluster.machine(service), partition)
    return found is not None and unit.as_of < found.checkpoint.read_from and found.states.get(unit.unit) == unit


def changed(state: bytes) -> bytes:
    parts: list[Any] = msgspec.msgpack.decode(state)
    return msgspec.msgpack.encode([*parts[:-1], {"something": "else"}])


@pytest.mark.feature("L4")
@pytest.mark.parametrize("service", LOGS)
@pytest.mark.parametrize("damage", [changed, lambda state: b"rubbish", None], ids=["changed", "rubbish", "removed"])
def test_a_state_that_is_not_what_the_log_says_is_found(service: str, damage: Callable[[bytes], bytes] | None) -> None:
    cluster = worked(3)
    message, snapshot = live_snapshots(cluster, service)[0]
    unit = snapshot.units[0]
    value = None
    if damage is not None:
        units = (msgspec.structs.replace(unit, state=damage(unit.state)),)
        value = codec.encode(msgspec.structs.replace(snapshot, units=units))
    writer = cluster.broker.writer()
    writer.send(Record(message.topic, message.partition, message.key or b"", value, message.headers))
    writer.flush(1.0)

    report = check_state(cluster.broker, cluster.machine(service), message.partition)

    assert not report.ok
    assert [one.unit for one in report.differences] == [unit.unit]


# --- owners of another version -----------------------------------------------------------------------------------------------


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everything that is written from now on have another snapshot format than the owners wrote."""
    monkeypatch.setattr(run_formats, "SNAPSHOT_FORMAT", run_formats.SNAPSHOT_FORMAT - 1)
    monkeypatch.setattr(ledger_formats, "SNAPSHOT_FORMAT", ledger_formats.SNAPSHOT_FORMAT - 1)


@pytest.mark.feature("L4")
@pytest.mark.parametrize("service", LOGS)
def test_states_of_another_format_are_no_differences_and_said_to_be_compared_in_part(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = worked(5)
    written = {"scheduler": run_formats, "gate": ledger_formats}[service].SNAPSHOT_FORMAT
    other_version(monkeypatch)
    found = reports(cluster, service)
    assert [one.differences for one in found] == [[] for _ in found]
    in_part = [one for one in found if one.in_part]
    assert in_part
    assert all((one.formats, one.own_format) == ([written], written - 1) for one in in_part)


@pytest.mark.feature("L4")
def test_a_chain_that_differs_is_found_whatever_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = worked(3)
    message, snapshot = live_snapshots(cluster, "scheduler")[0]
    unit = snapshot.units[0]
    state = msgspec.msgpack.decode(unit.state)
    heads = [part for part in state[-1] if isinstance(part, bytes) and len(part) == 32]
    assert heads
    units = (msgspec.structs.replace(unit, state=unit.state.replace(heads[0], b"x" * 32)),)
    writer = cluster.broker.writer()
    value = codec.encode(msgspec.structs.replace(snapshot, units=units))
    writer.send(Record(message.topic, message.partition, message.key or b"", value, message.headers))
    writer.flush(1.0)
    other_version(monkeypatch)

    report = check_state(cluster.broker, cluster.machine("scheduler"), message.partition)

    assert [(one.unit, "chain" in one.why) for one in report.differences] == [(unit.unit, True)]


@pytest.mark.feature("L4")
def test_the_command_says_which_version_to_use(capsys: pytest.CaptureFixture[str]) -> None:
    report = StateReport(
        log="run-events", partition=0, read_from=3, entries=9, compared=4, in_part=2, formats=[8], own_format=7
    )
    with pytest.raises(typer.Exit) as ended:
        replay._show_state([report], as_json=False)
    assert ended.value.exit_code == replay.EXIT_IN_PART
    said = capsys.readouterr()
    assert "equal" in said.out
    assert "2 states of snapshot format 8, and this version writes 7" in said.err
    assert "kubectl exec POD -- tidegate replay state" in said.err
    with pytest.raises(typer.Exit) as ended:
        replay._show_state([msgspec.structs.replace(report, difference_count=1)], as_json=False)
    assert ended.value.exit_code == replay.EXIT_FAILED
