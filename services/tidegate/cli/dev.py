"""`tidegate dev`: everything on this machine, for development."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tidegate.cli.addresses import DATA_DIR_VARIABLE, DEFAULT_DATA_DIR, AddressError, read_address
from tidegate.cli.options import port_option
from tidegate.cli.wording import counted
from tidegate.domain.workflow import AGENT_PREFIX
from tidegate.embedded.data_folder import DataFolder, DataFolderError
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.ports import PortTakenError, check_ports
from tidegate.embedded.stack import ExecutorPool, Stack, StackError
from tidegate.embedded.supervisor import ProcessStatus
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.settings import KafkaSettings
from tidegate.process import stop_on_signals
from tidegate.sdk.client import Client
from tidegate.sdk.errors import AppError, PublishConflictError
from tidegate.sdk.loading import load_app

app = typer.Typer(add_completion=False)
DEMO_APP = "tidegate.demo.app:app"


@app.command()
def dev(
    app_name: Annotated[str, typer.Option("--app", help="Your app: module:attribute or file.py:attribute.")] = DEMO_APP,
    slots: Annotated[
        int, typer.Option(help="How many attempts the executor runs at the same time.", min=1, max=1000)
    ] = 16,
    data_dir: Annotated[Path, typer.Option(envvar=DATA_DIR_VARIABLE, help="Where everything is kept.")] = Path(
        DEFAULT_DATA_DIR
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Empty the data folder first, if `tidegate dev` made it.")
    ] = False,
    kafka_port: Annotated[int, port_option("Port of Kafka; a free one if it is taken, or 0.")] = 9092,
    sql_port: Annotated[int, port_option("Port of the SQL endpoint; 0 for a free one.")] = 0,
    gateway_port: Annotated[int, port_option("Port of the live view; 0 for a free one.")] = 0,
) -> None:
    """Start Kafka, ClickHouse, all services and one executor of your app; Ctrl-C stops them, the data stays.

    An existing Kafka is used if TIDEGATE_KAFKA_BOOTSTRAP names it.

    A line is printed for every part, and whenever one changes its state.

    Exit codes: 1 something does not start; 2 wrong usage, an app that cannot
    be loaded, a port that is taken, or a data folder that must not be emptied.
    """
    stop = stop_on_signals()
    kafka = KafkaSettings() if os.environ.get("TIDEGATE_KAFKA_BOOTSTRAP") else None
    try:
        loaded = load_app(app_name)
        check_ports(
            {"--sql-port": sql_port, "--gateway-port": gateway_port},
            wished={} if kafka else {"--kafka-port": kafka_port},
        )
        if fresh:
            DataFolder(data_dir).empty()
    except (AppError, PortTakenError, DataFolderError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    console = Console(soft_wrap=True)  # lines are read by programs, too, and hold paths: never broken
    stack = Stack(
        data_dir,
        pools=[ExecutorPool(app_name, slots=slots)],
        kafka=kafka,
        kafka_port=kafka_port,
        sql_port=sql_port,
        gateway_port=gateway_port,
        on_progress=lambda line: console.print(f"[dim]{escape(line)}[/dim]"),
    )
    try:
        with stack:
            with Client(stack.settings) as client:
                published = client.publish(loaded)
            _show(console, stack, app_name, published)
            _watch(console, stack, stop.wait)
            console.print("[dim]stopping …[/dim]")
    except EventLogError as error:
        typer.echo(f"error: Kafka at {stack.settings.bootstrap}: {error}", err=True)
        if stack.kafka is None:
            typer.echo("TIDEGATE_KAFKA_BOOTSTRAP names it, so none is started here: unset it to have one", err=True)
        raise typer.Exit(1) from None
    except (StackError, AddressError, EmbeddedKafkaError, PublishConflictError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _show(console: Console, stack: Stack, app_name: str, published: list[str]) -> None:
    console.print(f"\n[bold]Tidegate is up.[/bold] Data: {escape(str(stack.data_dir))}")
    console.print(f"  Kafka      {stack.settings.bootstrap}")
    for name, file in (("SQL", "sql.json"), ("live view", "gateway.json")):
        console.print(f"  {name:<10} {read_address(stack.data_dir / file, name)['url']}")
    console.print(f"  workflows  {', '.join(published)}")
    console.print("\nIn another terminal:")
    for name, value in _needed(stack).items():
        console.print(f"  [bold]export {name}={escape(shlex.quote(value))}[/bold]")
    if app_name == DEMO_APP:
        console.print('  tidegate runs start --agent support --input \'{"order_id": "order-1"}\' --wait')
    else:
        graphs = [label for label in published if not label.startswith(AGENT_PREFIX)]
        first = shlex.quote((graphs or published)[0])
        console.print(f"  tidegate runs start {first} --input '…' --wait     # '…': what it gets, as JSON")
    console.print('  tidegate sql "select run_id, status, spent_micros from runs"\n')
    for status in stack.status():
        console.print(_line(status))


def _needed(stack: Stack) -> dict[str, str]:
    """Return the variables with which commands find this stack from any folder."""
    needed = {"TIDEGATE_KAFKA_BOOTSTRAP": stack.settings.bootstrap, DATA_DIR_VARIABLE: str(stack.data_dir)}
    prefix = stack.settings.topic_prefix
    return {**needed, "TIDEGATE_KAFKA_TOPIC_PREFIX": prefix} if prefix else needed


def _watch(console: Console, stack: Stack, wait: object) -> None:
    """Print a line whenever a part changes its state, until we are asked to stop."""
    seen = {status.name: (status.state, status.restarts) for status in stack.status()}
    assert callable(wait)  # noqa: S101 - Event.wait
    while not wait(0.5):
        for status in stack.status():
            if seen.get(status.name) != (status.state, status.restarts):
                seen[status.name] = (status.state, status.restarts)
                console.print(f"{time.strftime('%H:%M:%S')} {_line(status)}")


def _line(status: ProcessStatus) -> str:
    colour = "green" if status.state == "running" else "yellow" if status.state in ("starting", "restarting") else "red"
    again = f", started again {counted(status.restarts, 'time')}" if status.restarts else ""
    log = escape(str(status.log_path))
    return f"  [{colour}]{status.state:<13}[/{colour}] {status.name:<20} pid {status.pid}{again}  log {log}"
