"""Record a golden log: `python tests/golden/record.py NAME` writes tests/golden/NAME.json from a simulated day, and its ends.

Recorded once per release and never again under the same name: old logs must verify and fold for ever. The day has graphs, maps,
child runs, waits, pauses, budgets and limits in it, owners that die and zombies whose entries are void.
"""

from __future__ import annotations

import base64
import itertools
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from simulation.evening import Evening  # noqa: E402 - the path comes first
from simulation.world import World  # noqa: E402
from tidegate.domain.run import RunState  # noqa: E402
from tidegate.eventlog.interface import Message  # noqa: E402
from tidegate.eventlog.verification import Report, verify_partition  # noqa: E402

SEED, STEPS = 23, 2500


def record(name: str) -> Path:
    """Play a short day and write both logs down, and how their runs ended."""
    with World(SEED) as world:
        world.begin()
        while world.steps < STEPS:
            world.step()
        Evening(world).rest()
        logs = _logs(world)
    ends = json.loads((HERE / "ends.json").read_text(encoding="utf-8"))
    if name in ends:
        raise SystemExit(f"{name} is recorded already: choose another name")
    report, runs = Report(), dict[str, RunState]()
    for _, partition in itertools.groupby(logs, key=lambda message: (message.topic, message.partition)):
        runs.update(verify_partition(partition, report))
    if report.problem_count:
        raise SystemExit(f"the log does not verify: {report.problems[:3]}")
    ends[name] = {run_id: [run.status, run.fingerprint] for run_id, run in sorted(runs.items())}
    (HERE / "ends.json").write_text(json.dumps(ends, indent=1) + "\n", encoding="utf-8")
    path = HERE / f"{name}.json"
    path.write_text(json.dumps({"records": [_plain(message) for message in logs]}, indent=1) + "\n", encoding="utf-8")
    return path


def _logs(world: World) -> list[Message]:
    found = []
    for topic in ("run-events", "gate-ledger"):
        for partition in range(world.broker.describe([topic])[topic].partition_count):
            start, end = world.broker.offsets(topic, partition)
            found += list(world.broker.read(topic, partition, start, end))
    return found


def _plain(message: Message) -> dict[str, object]:
    return {
        "topic": message.topic,
        "partition": message.partition,
        "offset": message.offset,
        "key": (message.key or b"").decode(),
        "headers": {name: value.decode() for name, value in message.headers},
        "value": base64.b64encode(message.value or b"").decode(),
    }


if __name__ == "__main__":
    sys.stdout.write(f"{record(sys.argv[1])}\n")
