"""`tidegate kafka`: the embedded broker alone, in the foreground."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.process import stop_on_signals

app = typer.Typer(add_completion=False)


@app.command()
def kafka(
    data_dir: Annotated[Path, typer.Option(help="Where its data is kept.")] = Path(".tidegate/kafka"),
    port: Annotated[int | None, typer.Option(help="Port to listen on; a free one if taken or not given.")] = None,
) -> None:
    """Run an embedded Apache Kafka until Ctrl-C. One node, for development and tests, not for data that matters."""
    stop = stop_on_signals()
    broker = EmbeddedKafka(data_dir, port=port, on_progress=typer.echo)
    try:
        broker.start()
    except EmbeddedKafkaError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    typer.echo(f"Kafka answers at {broker.bootstrap}; Ctrl-C stops it")
    while not stop.is_set() and broker.is_running:
        time.sleep(0.2)
    broker.stop()
    raise typer.Exit(0 if stop.is_set() else 1)
