"""`tidegate demo`: the refund demo."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tidegate.demo.refund import ACCOUNT, DemoError, RefundDemo, Say, make_stack, wait_for_projection
from tidegate.embedded import sql
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError
from tidegate.eventlog.interface import EventLogError, Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.client import Client

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the demo's data folder and say where it is.")] = False,
) -> None:
    """Show a refund survive kill -9: dispatched twice, paid once. Exit code 1 if any part of the proof fails.

    Starts Kafka, ClickHouse and all services in a temporary folder, kills the executor in the middle of the refund, and
    proves with queries what came of it. Needs no Docker and nothing that is installed by hand; the first start fetches Kafka.
    """
    data_dir = Path(tempfile.mkdtemp(prefix="tidegate-demo-"))

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n") if as_json else typer.echo(line)

    stack = make_stack(data_dir, say)
    try:
        with stack:
            proof = RefundDemo(stack, say).run()
            _show_plain_producer(stack.settings, data_dir, say)
    except (DemoError, StackError, EmbeddedKafkaError, EventLogError) as error:
        typer.echo(f"demo failed: {error}", err=True)
        typer.echo(f"the logs are in {data_dir}/logs", err=True)
        if as_json:
            typer.echo(json.dumps({"ok": False, "error": str(error)}))
        raise typer.Exit(1) from None
    say("\nAll of it holds." if proof["ok"] else "\nThe proof FAILED.")
    if keep or not proof["ok"]:
        say(f"data and logs: {data_dir}")
    else:
        shutil.rmtree(data_dir, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps(proof))
    raise typer.Exit(0 if proof["ok"] else 1)


def _show_plain_producer(settings: KafkaSettings, data_dir: Path, say: Say) -> None:
    """Start the same run by what any Kafka producer can send, one JSON object, and look at it with SQL."""
    run_id = "by-a-plain-producer"
    request = json.dumps({"agent": "support", "run_id": run_id, "input": {"order_id": "order-7"}, "account": ACCOUNT})
    writer = KafkaBroker(settings).writer()
    writer.send(Record("run-requests", 0, b"any", request.encode()))
    writer.flush(10)
    with Client(settings) as client:
        run = client.wait(run_id, 60)
    say("\nThe same by a plain producer:")
    say(f"  echo '{request}' | kcat -P -b {settings.bootstrap} -t run-requests -k any")
    say(f"  -> {run.status}: {run.output}")
    query = f"SELECT step_id, status, attempts, spent_micros FROM steps WHERE run_id = '{run_id}' ORDER BY ready_at, step_id"
    say(f'  tidegate sql "{query}"')
    wait_for_projection(data_dir, settings, run_id)
    for row in sql.query(data_dir, query):
        say(f"     {row['step_id']:<36} {row['status']:<10} {row['attempts']} attempt {row['spent_micros']:>6} micros")
