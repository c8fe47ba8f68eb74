"""A flood of requests on a whole system: `.venv/bin/python tests/flood.py --runs 100000`.

Prints one JSON object: how long it took, the largest resident set of every process, and how three things fared meanwhile that
have nothing to do with the flood: a long run that was under way before it, small runs asked for after it, and commands.
Progress goes to standard error. See docs/reliability/backpressure.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.bench.app import app as bench_app
from tidegate.bench.processes import Meter
from tidegate.bench.watcher import RunWatcher
from tidegate.domain import canonical
from tidegate.domain.identity import partition_of
from tidegate.embedded import sql
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.interface import Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.sdk.client import Client

APP = "tidegate.bench.app:app"
ACCOUNTS = 16
PROBE_EVERY_S = 1.0
LONG_RUN = "long-run"
TIMEOUT_S = 7200.0


@dataclass
class Waits:
    """Seconds from asking to the end, one per probe."""

    runs: list[float] = field(default_factory=list)
    commands: list[float] = field(default_factory=list)


def main() -> int:
    """Run the flood; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000, help="how many runs of three steps are asked for at once")
    parser.add_argument("--slots", type=int, default=512, help="attempts that the executor runs at the same time")
    parser.add_argument(
        "--spread", choices=("all", "one"), default="all", help="inbox partitions that the flood lies in"
    )
    parser.add_argument(
        "--probes", action=argparse.BooleanOptionalAction, default=True, help="ask for small runs meanwhile"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tidegate-flood-") as folder:
        stack = Stack(Path(folder), pools=[ExecutorPool(APP, slots=options.slots)], on_progress=say)
        with stack:
            sys.stdout.write(json.dumps(flood(stack, options), indent=2) + "\n")
    return 0


def say(line: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{line}\n")


def flood(stack: Stack, options: argparse.Namespace) -> dict[str, Any]:
    """Ask for all runs at once, wait for all of them, and return the figures."""
    broker = KafkaBroker(stack.settings)
    watcher = RunWatcher(broker)
    with Client(stack.settings) as client:
        client.publish(bench_app)
        client.run("three", 0)
        client.start("thousand", 0, run_id=LONG_RUN, account="somebody-else")
    before = resident(stack)
    waits, over = Waits(), threading.Event()
    probes = [
        threading.Thread(target=target, args=(stack, waits, over), daemon=True) for target in (ask_runs, ask_commands)
    ]
    with Meter(lambda: pids(stack)) as meter:
        began_s, began_ms = time.monotonic(), time.time() * 1000
        asked = ask(broker, options.runs, options.spread)
        asked_s = time.monotonic() - began_s
        say(f"{options.runs} requests are in the log after {asked_s:.1f} s")
        for thread in probes if options.probes else ():
            thread.start()
        ended = watcher.wait(asked, TIMEOUT_S)
        took_s = max(ended.values()) - began_s
        over.set()
        sql.wait_caught_up(stack.data_dir, sql.log_ends(broker), TIMEOUT_S)
        where = where_steps_wait(stack, began_ms, took_s)
        caught_up_s = time.monotonic() - began_s
    for thread in probes if options.probes else ():
        thread.join()
    with Client(stack.settings) as client:
        done_ms = [event.at_ms for event in client.events(LONG_RUN) if event.type == "StepSucceeded"]
    steps = [
        (later - earlier) / 1000
        for earlier, later in itertools.pairwise(done_ms)
        if began_ms <= earlier and later <= began_ms + took_s * 1000
    ]
    watcher.close()
    broker.close()
    return {
        "runs": options.runs,
        "slots": options.slots,
        "spread": options.spread,
        "asked_s": round(asked_s, 1),
        "seconds": round(took_s, 1),
        "projection_caught_up_s": round(caught_up_s, 1),
        "rss_mib": {
            name: {"before": round(before.get(name, 0)), "peak": round(cost.peak_rss_mib)}
            for name, cost in meter.costs().items()
        },
        "small_run_s": summary(waits.runs),
        "command_s": summary(waits.commands),
        "step_of_long_run_s": {**summary(steps), "of_which": where},
    }


def pids(stack: Stack) -> dict[str, int | None]:
    """Return the present pid of every process."""
    kafka = {} if stack.kafka is None else {"kafka": stack.kafka.pid}
    return {**kafka, **{status.name: status.pid for status in stack.status()}}


def resident(stack: Stack) -> dict[str, float]:
    """Return what every process holds now, MiB."""
    with Meter(lambda: pids(stack)) as meter:
        pass
    return {name: cost.peak_rss_mib for name, cost in meter.costs().items()}


def ask(broker: KafkaBroker, runs: int, spread: str) -> list[str]:
    """Write the requests as fast as the broker takes them."""
    count = broker.describe(["run-requests"])["run-requests"].partition_count
    writer = broker.writer()
    asked = []
    for number in range(runs):
        run_id = f"flood-{number}"
        request = {"workflow": "three", "run_id": run_id, "input": number, "account": f"flood-{number % ACCOUNTS}/load"}
        partition = partition_of(run_id, count) if spread == "all" else 0
        writer.send(Record("run-requests", partition, run_id.encode(), canonical.dumps(request).encode()))
        asked.append(run_id)
    writer.flush(600.0)
    writer.close()
    return asked


def ask_runs(stack: Stack, waits: Waits, over: threading.Event) -> None:
    """Ask for somebody else's small runs, one after the other, until the flood is over."""
    number = 0
    with Client(stack.settings) as client:
        while not over.wait(PROBE_EVERY_S):
            number += 1
            began_s = time.monotonic()
            client.wait(client.start("three", number, account="somebody-else", run_id=f"probe-{number}"), TIMEOUT_S)
            waits.runs.append(time.monotonic() - began_s)
            say(f"a small run took {waits.runs[-1]:.2f} s")


def ask_commands(stack: Stack, waits: Waits, over: threading.Event) -> None:
    """Send commands to a run that does not mind (there is nothing to approve), until the flood is over."""
    with Client(stack.settings) as client:
        while not over.wait(PROBE_EVERY_S):
            began_s = time.monotonic()
            client.answer(LONG_RUN, client.approve(LONG_RUN), TIMEOUT_S)
            waits.commands.append(time.monotonic() - began_s)
            say(f"the answer to a command took {waits.commands[-1]:.2f} s")


def where_steps_wait(stack: Stack, began_ms: float, took_s: float) -> dict[str, float]:
    """Return the mean seconds that a step of the long run spent in each part of its way, of those within the flood."""
    text = f"""
        SELECT step_id, source, type, min(ms) AS ms FROM (
            SELECT step_id, 'run' AS source, type, toUnixTimestamp64Milli(at) AS ms FROM events WHERE run_id = '{LONG_RUN}'
            UNION ALL
            SELECT step_id, 'gate', type, toUnixTimestamp64Milli(at) FROM ledger WHERE run_id = '{LONG_RUN}'
        ) GROUP BY step_id, source, type"""
    moments: dict[str, dict[str, int]] = {}
    at_once = "gate:AttemptGranted"
    for row in sql.query(stack.data_dir, text):
        name = f"{row['source']}:{row['type']}"
        for moment in ("gate:AttemptReserved", "gate:AttemptPlaced") if name == at_once else (name,):
            moments.setdefault(row["step_id"], {})[moment] = int(row["ms"])
    way = ["run:StepReady", "gate:AttemptReserved", "gate:AttemptPlaced", "run:StepSucceeded"]
    names = ["to_be_decided_by_the_gate", "for_a_slot", "to_run_and_be_noted"]
    whole = [
        at
        for at in moments.values()
        if all(event in at for event in way) and began_ms <= at[way[0]] and at[way[-1]] <= began_ms + took_s * 1000
    ]
    return {
        name: round(statistics.mean(at[later] - at[earlier] for at in whole) / 1000, 2) if whole else 0.0
        for name, (earlier, later) in zip(names, itertools.pairwise(way), strict=True)
    }


def summary(seconds: list[float]) -> dict[str, Any]:
    """Return count, median and greatest of some times."""
    if not seconds:
        return {"count": 0}
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 2),
        "mean": round(statistics.mean(seconds), 2),
        "max": round(max(seconds), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
