"""`tidegate pause` and `tidegate resume`: a queue, everything, or a run."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.table import Table

from tidegate.cli import runs
from tidegate.cli.endings import RUN_EXIT_CODES, explained, usage
from tidegate.cli.options import By, Json, Reason
from tidegate.cli.registry import INSTANCES
from tidegate.cli.run_output import moment
from tidegate.cli.terminal import Console
from tidegate.domain.controls import EVERYTHING, is_control_key
from tidegate.domain.messages import Control
from tidegate.eventlog.interface import Broker
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.registry import listing
from tidegate.sdk.client import Client

pause_app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
resume_app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)

RunId = Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run: as `tidegate runs pause` and `resume`.")]
Queue = Annotated[str | None, typer.Option("--queue", "-q", help="The queue.")]
All = Annotated[bool, typer.Option("--all", help="Everything. Queues that are paused by themselves stay so.")]


@pause_app.command(epilog=RUN_EXIT_CODES)
def pause(
    run_id: RunId = None,
    queue: Queue = None,
    all_: All = False,
    list_: Annotated[bool, typer.Option("--list", help="Change nothing; show which queues are paused.")] = False,
    as_json: Json = False,
    reason: Reason = "",
    by: By = None,
) -> None:
    """Let nothing start: of a queue, of anything, or of a run. What runs may end; what is asked for meanwhile is kept."""
    if list_:
        if run_id or queue or all_:
            usage("pause", "--list stands alone")
        _show(as_json)
        return
    if run_id:
        _alone("pause", queue, all_)
        runs.pause(run_id, reason, by)
        return
    name = _queue("pause", queue, all_)
    with explained("pause"):
        broker = KafkaBroker(KafkaSettings())
        with Client(broker, by=by) as client:
            client.pause_queue(name, reason=reason)
        print(f"{_named(name)} paused")
        if name != EVERYTHING and name not in (served := _served_queues(broker)):
            said = ", ".join(sorted(served)) or "none"
            typer.echo(f"no executor serves queue {name}: is that its name? Served are: {said}", err=True)


@resume_app.command(epilog=RUN_EXIT_CODES)
def resume(run_id: RunId = None, queue: Queue = None, all_: All = False, reason: Reason = "", by: By = None) -> None:
    """Take back a pause: of a queue, of everything, or of a run. Each is taken back by itself."""
    if run_id:
        _alone("resume", queue, all_)
        runs.resume(run_id, reason, by)
        return
    name = _queue("resume", queue, all_)
    with explained("resume"), Client(by=by) as client:
        was_paused = client.paused_queues()
        client.resume_queue(name, reason=reason)
    print(f"{_named(name)} {'resumed' if name in was_paused else 'not paused: nothing to resume'}")
    if name != EVERYTHING and EVERYTHING in was_paused:
        typer.echo("everything is paused still: tidegate resume --all", err=True)
    others = sorted(was_paused.keys() - {EVERYTHING, name})
    if name == EVERYTHING and others:
        typer.echo(f"paused by themselves still: {', '.join(others)}", err=True)


def _alone(command: str, queue: str | None, all_: bool) -> None:
    if queue or all_:
        usage(command, "name a run, or give --queue or --all")


def _queue(command: str, queue: str | None, all_: bool) -> str:
    if (queue is None) != all_:
        usage(command, "name a run, or give --queue or --all")
    if queue is not None and (queue == EVERYTHING or not is_control_key(queue)):
        usage(command, f"--queue: {queue!r} is no queue's name; --all is for everything")
    return EVERYTHING if queue is None else queue


def _served_queues(broker: Broker) -> set[str]:
    tables = Tables((INSTANCES,))
    tables.load(broker)
    now_ms = time.time_ns() // 1_000_000
    lines = listing.instances(tables.rows[INSTANCES], tables.offsets[INSTANCES], now_ms, everybody=False)
    return {line["queue"] for line in lines if line["service"] == listing.EXECUTOR}


def _named(queue: str) -> str:
    return "everything is" if queue == EVERYTHING else f"queue {queue} is"


def _show(as_json: bool) -> None:
    with explained("pause"), Client() as client:
        rows = client.paused_queues()
    if as_json:
        print(json.dumps([_row(queue, row) for queue, row in rows.items()], ensure_ascii=False))
    elif not rows:
        print("nothing is paused")
    else:
        table = Table("queue", "since", "by", "reason", box=None, pad_edge=False)
        for queue, row in rows.items():
            table.add_row("everything" if queue == EVERYTHING else queue, moment(row.at_ms), row.by, row.reason)
        Console(highlight=False).print(table)


def _row(queue: str, row: Control) -> dict[str, object]:
    return {"queue": queue, "by": row.by, "reason": row.reason, "at_ms": row.at_ms}
