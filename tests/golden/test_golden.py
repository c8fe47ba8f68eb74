"""Logs of every release so far verify, fold and come to the same ends, for ever."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import msgspec
import pytest

from tidegate.domain.identity import partition_of
from tidegate.domain.run import RunState
from tidegate.eventlog.interface import Message
from tidegate.eventlog.verification import Report, verify_partition

HERE = Path(__file__).parent
ENDS = json.loads((HERE / "ends.json").read_text(encoding="utf-8"))


def messages_of(name: str) -> list[Message]:
    records = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["records"]
    return [
        Message(
            record["topic"],
            record["partition"],
            record["offset"],
            record["key"].encode(),
            base64.b64decode(record["value"]),
            tuple((name, value.encode()) for name, value in record["headers"].items()),
            0,
        )
        for record in records
    ]


@pytest.mark.feature("L2")
@pytest.mark.parametrize("name", sorted(ENDS))
def test_a_recorded_log_still_means_what_it_meant(name: str) -> None:
    report, runs = Report(), dict[str, RunState]()
    for _, partition in itertools.groupby(messages_of(name), key=lambda m: (m.topic, m.partition)):
        runs.update(verify_partition(partition, report))
    assert report.problems == []
    assert {run_id: [run.status, run.fingerprint] for run_id, run in runs.items()} == ENDS[name]


@pytest.mark.feature("L2")
@pytest.mark.parametrize("damage", ["a byte changed", "an entry left out", "two entries swapped"])
def test_damage_is_found(damage: str) -> None:
    log = [m for m in messages_of("spine-v1") if m.topic == "run-events"]
    messages = [m for m in log if m.partition == partition_of("golden-3", 2)]
    first, second, *_ = [index for index, m in enumerate(messages) if (m.key or b"").startswith(b"golden-3:")]
    if damage == "an entry left out":
        del messages[first]
    elif damage == "two entries swapped":
        messages[first], messages[second] = messages[second], messages[first]
    else:
        value = bytearray(messages[first].value or b"")
        value[-3] ^= 1
        messages[first] = msgspec.structs.replace(messages[first], value=bytes(value))
    report = Report()
    verify_partition(messages, report)
    assert report.problem_count
