"""`tidegate smoke`: a real run through an installation, from the request on the topic to the rows that people see.

Exit codes: 0 the run succeeded and its row is there, 1 something did not come, 2 wrong usage or settings, 3 Kafka does not answer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from typing import Annotated, Final, NoReturn

import typer

from tidegate.cli.endings import explained
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.registry.registration import task_topic
from tidegate.sdk.client import Client
from tidegate.sdk.errors import RunNotFinishedError
from tidegate.topics.apply import apply_command

INPUT: Final = 21
EXPECTED: Final = 42
EXECUTOR_END_S: Final = 30.0
ASK_AGAIN_S: Final = 0.5

app = typer.Typer(add_completion=False)


@app.command()
def smoke(
    queue: Annotated[str, typer.Option(help="A queue that no other executors serve; its topic must exist.")] = "smoke",
    timeout_s: Annotated[float, typer.Option(help="How long to wait for each part.")] = 90.0,
    rows: Annotated[bool, typer.Option("--rows/--no-rows", help="Whether to look for the run's row, too.")] = True,
) -> None:
    """Show that everything works: serve a function of our own, run it, and find the run in the projections.

    SQL is asked where TIDEGATE_SQL_URL or TIDEGATE_CLICKHOUSE_URL says. What is left is one run of the workflow
    `tidegate-smoke`, which cost one micro-dollar; one that does not end in time is cancelled.
    """
    broker, topic = KafkaBroker(KafkaSettings()), task_topic(queue)
    with explained("smoke"):
        if not broker.describe([topic]):
            _fail(f"there is no topic {topic}: make it with `{apply_command([topic])}`, or give another --queue")
    run_id = f"smoke-{uuid.uuid4().hex[:12]}"
    os.environ["TIDEGATE_SMOKE_QUEUE"] = queue
    from tidegate.demo.smoke import app as functions  # noqa: PLC0415 - reads the queue when it is imported

    command = [sys.executable, "-m", "tidegate.executor", "--app", "tidegate.demo.smoke:app", "--queue", queue]
    name = {"TIDEGATE_INSTANCE_ID": f"executor-{run_id}", "TIDEGATE_LOG_LEVEL": "error"}
    served = subprocess.Popen([*command, "--slots", "1"], env={**os.environ, **name})
    try:
        with explained("smoke"), Client(broker, by="smoke") as client:
            (label,) = client.publish(functions)
            began_s = time.monotonic()
            client.start(label, INPUT, run_id=run_id)
            try:
                run = client.wait(run_id, timeout_s=timeout_s)
            except RunNotFinishedError as error:
                client.cancel(run_id, reason="not over in time")
                _fail(f"{error}. Do a scheduler and a gate run, and do their logs say why not?")
            _say(f"run {run_id}: {run.status} after {time.monotonic() - began_s:.2f} s")
            if run.status != "succeeded" or run.output != EXPECTED:
                _fail(f"expected it to succeed with {EXPECTED}; it says {run.output!r}")
    finally:
        served.terminate()
        try:
            served.wait(EXECUTOR_END_S)
        except subprocess.TimeoutExpired:
            served.kill()
    if rows:
        _await(lambda: _has_row(run_id), timeout_s, f"no row of {run_id} in ClickHouse")
        _say(f"run {run_id}: its row is in ClickHouse")


def _has_row(run_id: str) -> bool:
    query = f"select status from runs where run_id = '{run_id}' and status = 'succeeded'"  # noqa: S608 - an id of ours
    asked = subprocess.run(
        [sys.executable, "-m", "tidegate.cli", "sql", query, "--format", "TSV"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.returncode == 0 and "succeeded" in asked.stdout


def _await(is_so: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            _fail(f"{otherwise} after {timeout_s:.0f} s: does the projection run, and how far behind is it?")
        time.sleep(ASK_AGAIN_S)


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(text: str) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(1)
