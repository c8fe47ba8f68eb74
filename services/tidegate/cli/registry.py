"""`tidegate instances` and `tidegate functions`: who is registered, and what can be run. Read from the topic `instances`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate.cli.endings import explained
from tidegate.cli.terminal import Console
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.registry import listing

INSTANCES: Final = "instances"
EVERY_S: Final = 1.0
PIPED_WIDTH: Final = 160
_STYLES: Final = {"registered": "green", "draining": "yellow", "silent": "red", "gone": "dim"}
_EPILOG: Final = "Exit codes: 0 done; 2 wrong usage; 3 Kafka does not answer."

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON array; with --watch one per line and look.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Look again every second until Ctrl-C.")]
Everybody = Annotated[bool, typer.Option("--all", "-a", help="Also those that are gone or not heard of any more.")]
Queue = Annotated[str, typer.Option("--queue", "-q", help="Only executors of this queue.")]

instances_app = typer.Typer(add_completion=False)
functions_app = typer.Typer(add_completion=False)
Lines = list[dict[str, Any]]


@instances_app.command(epilog=_EPILOG)
def instances(queue: Queue = "", everybody: Everybody = False, watch: Watch = False, as_json: AsJson = False) -> None:
    """List the processes that are registered: state, slots, what runs, and when they were last heard of."""

    def look(tables: Tables) -> Lines:
        found = listing.instances(
            tables.rows[INSTANCES], tables.offsets[INSTANCES], time.time_ns() // 1_000_000, everybody=everybody
        )
        return [line for line in found if not queue or line["queue"] == queue]

    _run("instances", look, instances_table, watch=watch, as_json=as_json)


@functions_app.command(epilog=_EPILOG)
def functions(queue: Queue = "", everybody: Everybody = False, watch: Watch = False, as_json: AsJson = False) -> None:
    """List the functions that executors offer: kind, queue, version, by whom, and with how many slots."""

    def look(tables: Tables) -> Lines:
        found = listing.functions(tables.rows[INSTANCES], time.time_ns() // 1_000_000, everybody=everybody)
        return [line for line in found if not queue or line["queue"] == queue]

    _run("functions", look, functions_table, watch=watch, as_json=as_json)


def _run(
    command: str, look: Callable[[Tables], Lines], table: Callable[[Lines], Table], *, watch: bool, as_json: bool
) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with explained(command):
        broker = KafkaBroker(KafkaSettings())
        tables = Tables((INSTANCES,))
        tables.load(broker)
        if not watch:
            found = look(tables)
            print(json.dumps(found, ensure_ascii=False)) if as_json else console.print(table(found))
            return
        try:
            if as_json:
                while True:
                    print(json.dumps(look(tables), ensure_ascii=False), flush=True)
                    _again(broker, tables)
            with Live(table(look(tables)), console=console, auto_refresh=False) as live:
                while True:
                    _again(broker, tables)
                    live.update(table(look(tables)), refresh=True)
        except KeyboardInterrupt:
            return


def _again(broker: KafkaBroker, tables: Tables) -> None:
    """Wait, and read what was written since."""
    time.sleep(EVERY_S)
    tables.load(broker)


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            column, overflow="fold", justify="right" if column in ("slots", "free", "running", "heard") else "left"
        )
    return made


def instances_table(lines: Lines) -> Table:
    """Return a line for each process."""
    table = _table("instance", "service", "state", "queue", "slots", "free", "running", "functions", "heard", "version")
    for line in lines:
        works = line["service"] == listing.EXECUTOR
        table.add_row(
            Text(line["instance_id"]),
            line["service"],
            _state(line["state"]),
            Text(line["queue"]),
            str(line["slots"]) if works else "",
            str(line["free_slots"]) if works else "",
            str(line["running"]) if works else "",
            str(len(line["functions"])) if works else "",
            f"{line['heard_ms_ago'] / 1000:.1f} s ago",
            Text(line["version"]),
        )
    return table


def functions_table(lines: Lines) -> Table:
    """Return a line for each function of a queue and version."""
    table = _table("function", "kind", "queue", "version", "state", "slots", "free", "offered by", "what it does")
    for line in lines:
        table.add_row(
            Text(line["function"]),
            line["kind"],
            Text(line["queue"]),
            Text(line["version"]),
            _state(line["state"]),
            str(line["slots"]),
            str(line["free_slots"]),
            Text(", ".join(line["instances"])),
            Text(line["description"].partition("\n")[0]),
        )
    return table
