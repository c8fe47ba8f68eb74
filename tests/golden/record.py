"""Record a golden log: `python tests/golden/record.py NAME` writes tests/golden/NAME.json from runs on the log in memory.

Recorded once per release and never again under the same name: old logs must verify and fold for ever.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support.cluster import ACCOUNT_PARTITIONS, RUN_PARTITIONS, Cluster  # noqa: E402 - the path comes first
from tidegate.eventlog.interface import Message  # noqa: E402


def record(name: str) -> Path:
    """Play some runs, one of them across a restart of both owners, and write both logs down."""
    cluster = Cluster()
    for number in range(4):
        cluster.start_run(f"golden-{number}", account=f"acme{number}/team", budget_micros=100)
    cluster.execute()
    for loop in list(cluster.owners.values()):
        loop.run_once(0.0)
    cluster.crash("scheduler")
    cluster.crash("gate")
    cluster.start("scheduler")
    cluster.start("gate")
    cluster.command("golden-3", "cancel")
    cluster.settle()
    path = HERE / f"{name}.json"
    path.write_text(json.dumps({"records": [_plain(message) for message in _logs(cluster)]}, indent=1) + "\n")
    return path


def _logs(cluster: Cluster) -> list[Message]:
    found = []
    for topic, count in (("run-events", RUN_PARTITIONS), ("gate-ledger", ACCOUNT_PARTITIONS)):
        for partition in range(count):
            start, end = cluster.broker.offsets(topic, partition)
            found += list(cluster.broker.read(topic, partition, start, end))
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
