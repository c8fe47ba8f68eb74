"""`tidegate kafka`: the embedded broker alone, in the foreground."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import port_option
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.kafka import EmbeddedKafka, default_cache_dir
from tidegate.embedded.ports import LOOPBACK
from tidegate.embedded.secure import ADMIN
from tidegate.process import stop_on_signals

app = typer.Typer(add_completion=False)


@app.command()
def kafka(
    data_dir: Annotated[Path, typer.Option(help="Where its data is kept.")] = Path(".tidegate/kafka"),
    port: Annotated[int | None, port_option("Port to listen on; a free one if taken or not given.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for everywhere, which is for containers of its own.")
    ] = LOOPBACK,
    advertised_host: Annotated[
        str, typer.Option(help="Name by which clients reach it, if that is not the address it listens on.")
    ] = "",
    heap_mb: Annotated[int, typer.Option(min=128, help="Memory of the Java process for its objects.")] = 512,
    secure: Annotated[
        bool,
        typer.Option(
            "--secure",
            help="Let in only who has a certificate, and let nobody do anything without an ACL but `tidegate-admin`.",
        ),
    ] = False,
    certificate: Annotated[
        list[str] | None,
        typer.Option(
            help="With --secure: make a client's certificate under this name; repeatable. It is then User:NAME."
        ),
    ] = None,
    fetch_only: Annotated[
        bool,
        typer.Option(
            "--fetch-only", help="Start nothing: have all in the cache that starts need, which may then be read-only."
        ),
    ] = False,
) -> None:
    """Run an embedded Apache Kafka until Ctrl-C. One node, for development and tests, not for data that matters."""
    stop = stop_on_signals()
    advertised = advertised_host or (LOOPBACK if host in {"0.0.0.0", "::", ""} else host)  # noqa: S104 - compared with
    broker = EmbeddedKafka(
        data_dir,
        port=port,
        on_progress=typer.echo,
        heap_mb=heap_mb,
        secure=secure,
        host=host,
        advertised_host=advertised,
        startup_cache="background" if host == LOOPBACK else "off",  # a container has no use for one
    )
    try:
        if fetch_only:
            broker.fetch()
            typer.echo(f"All that a start needs is in {default_cache_dir()}")
            return
        broker.start()
    except EmbeddedKafkaError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if secure:
        _say_how_to_get_in(broker, certificate or [])
    else:
        typer.echo(f"Kafka answers at {broker.bootstrap}; Ctrl-C stops it")
    while not stop.is_set() and broker.is_running:
        time.sleep(0.2)
    broker.stop()
    raise typer.Exit(0 if stop.is_set() else 1)


def _say_how_to_get_in(broker: EmbeddedKafka, names: list[str]) -> None:
    typer.echo("Kafka asks who you are. Each of these, exported, lets a process in; Ctrl-C stops it")
    for name in (ADMIN, *names):
        files = broker.certificates.issue(name)
        typer.echo(
            f"  User:{name}: TIDEGATE_KAFKA_BOOTSTRAP={broker.certificate_bootstrap} TIDEGATE_KAFKA_SECURITY_PROTOCOL=ssl "
            f"TIDEGATE_KAFKA_SSL_CA_LOCATION={files.ca} TIDEGATE_KAFKA_SSL_CERTIFICATE_LOCATION={files.certificate} "
            f"TIDEGATE_KAFKA_SSL_KEY_LOCATION={files.key}"
        )
