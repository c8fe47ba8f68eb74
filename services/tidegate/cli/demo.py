"""`tidegate demo`: the refund demo."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tidegate.demo.refund import ACCOUNT, DemoError, RefundDemo, make_stack, query_sql
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import StackError
from tidegate.eventlog.interface import EventLogError
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
            _show_plain_producer(stack.settings.bootstrap, data_dir, say)
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


def _show_plain_producer(bootstrap: str, data_dir: Path, say: object) -> None:
    """Start the same run by what any Kafka producer can send, and look at it with SQL."""
    from confluent_kafka import Producer

    request = {
        "agent": "support",
        "run_id": "by-a-plain-producer",
        "input": {"order_id": "order-7"},
        "account": ACCOUNT,
    }
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.produce("run-requests", key="any", value=json.dumps(request))
    producer.flush(10)
    with Client(bootstrap) as client:
        run = client.wait("by-a-plain-producer", 60)
    query = "SELECT step_id, status, attempts, spent_micros FROM steps WHERE run_id = 'by-a-plain-producer' ORDER BY ready_at"
    assert callable(say)  # noqa: S101 - typed loosely because typer.echo has another signature
    say("\nThe same by a plain producer:")
    say(f"  echo '{json.dumps(request)}' | kcat -P -b {bootstrap} -t run-requests -k any")
    say(f"  -> {run.status}: {run.output}")
    say(f'  tidegate sql "{query}"')
    for _ in range(100):
        rows = query_sql(data_dir, query)
        if rows and all(row["status"] == "succeeded" for row in rows):
            break
    for row in rows:
        say(f"     {row['step_id']:<36} {row['status']:<10} {row['attempts']} attempt {row['spent_micros']:>6} micros")
