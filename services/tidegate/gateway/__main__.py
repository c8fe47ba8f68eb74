"""Wiring of the gateway: Faust's loop on the main thread, heartbeats on their own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from tidegate.eventlog.interface import Broker, EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings, SecretFileError
from tidegate.gateway.faust_app import RUN_EVENTS, TABLES, GatewayApp, make_app, make_tables
from tidegate.gateway.service import Gateway
from tidegate.gateway.settings import GatewaySettings
from tidegate.gateway.web import Api
from tidegate.health import Health, beat_forever
from tidegate.process import (
    EXIT_FAILED,
    EXIT_OK,
    ProcessSettings,
    configure_logging,
    log_the_end,
    observed,
    prepare,
    run_service,
    stop_on_signals,
)
from tidegate.registry import Registration

SERVICE: Final = "gateway"
READY_POLL_S: Final = 0.05
WATCH_EVERY_S: Final = 1.0
PROOFS_POLL_S: Final = 5.0
ASSIGNMENT_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 15.0
_log = structlog.get_logger()


def main() -> int:
    """Run the live view until SIGTERM; returns the exit code."""
    process = ProcessSettings()
    instance_id = process.named(SERVICE)
    configure_logging(SERVICE, instance_id, process.log_level)
    stop = stop_on_signals(process.stop_within_s)
    settings, kafka = GatewaySettings(), KafkaSettings()
    broker = KafkaBroker(kafka)
    try:
        with observed(process, SERVICE, instance_id) as health:
            _run_until(process, settings, kafka, broker, instance_id, stop, health)
    except (EventLogError, OSError) as error:
        if stop.is_set():
            return EXIT_OK
        log_the_end(error, restart="begins where the changelog ends")
        return EXIT_FAILED
    finally:
        broker.close()
    return EXIT_OK


def _run_until(
    process: ProcessSettings,
    settings: GatewaySettings,
    kafka: KafkaSettings,
    broker: KafkaBroker,
    instance_id: str,
    stop: threading.Event,
    health: Health,
) -> None:
    counts = prepare(broker, SERVICE, process.broker_wait_s, stop)
    source = _source(broker, counts)
    with _listen(settings) as listening:
        asyncio.run(_serve(settings, kafka, broker, source, instance_id, listening, stop, health))


async def _serve(
    settings: GatewaySettings,
    kafka: KafkaSettings,
    broker: KafkaBroker,
    source: _Source,
    instance_id: str,
    listening: socket.socket,
    stop: threading.Event,
    health: Health,
) -> None:
    """Run until the event is set. Raises EventLogError if the app fails."""
    url = f"http://{settings.advertised_host}:{listening.getsockname()[1]}"
    app = make_app(kafka, group=source.group, instance_id=instance_id, listening=listening, advertised_url=url)
    gateway = Gateway(
        app,
        make_tables(app, kafka.topic_prefix, source.partition_count),
        broker,
        committed=lambda: broker.committed(source.group, RUN_EVENTS),
        prefix=kafka.topic_prefix,
        log=source.log,
        partition_count=source.partition_count,
        keep_minutes=settings.gateway_keep_h * 60,
    )
    Api(gateway, url)
    health.ready_when(gateway.why_not_ready)
    beating = asyncio.create_task(beat_forever(gateway.measure))
    registration = Registration(broker, service=SERVICE, instance_id=instance_id)
    address = _Address(settings.address_file, url)
    stopping = asyncio.create_task(asyncio.to_thread(stop.wait))
    running = asyncio.create_task(_run(app, gateway, registration, address))
    outdated = asyncio.create_task(_proofs_replaced(kafka))
    try:
        await asyncio.wait({stopping, running, outdated}, return_when=asyncio.FIRST_COMPLETED)
        if outdated.done():
            outdated.result()
            raise EventLogError("the password or a certificate was replaced: beginning again with the new one")
        if running.done():
            running.result()
            raise EventLogError(f"the live view failed: {app.crash_reason!r}")
    finally:
        stop.set()
        running.cancel()
        outdated.cancel()
        beating.cancel()
        address.remove()
        await asyncio.to_thread(registration.stop)
        await _stop(app)


async def _proofs_replaced(kafka: KafkaSettings) -> None:
    """Return when the files hold another password or certificate than we began with; Faust cannot change what it has.

    It does not even tell when it is refused: it tries for ever.
    """
    in_use = kafka.proofs()
    while True:
        await asyncio.sleep(PROOFS_POLL_S)
        with contextlib.suppress(SecretFileError):
            if kafka.proofs() != in_use:
                return


async def _run(app: GatewayApp, gateway: Gateway, registration: Registration, address: _Address) -> None:
    """Start everything, say so when the view is complete, and return when the app has ended."""
    address.write()  # who asks now waits until the web server takes the connection from the socket
    read = await gateway.changelogs.read_on(range(gateway.partition_count))
    _log.info("changelogs read", records=read)
    await app.start()
    if not await _until_ready(app, gateway):
        return
    await asyncio.to_thread(registration.start)
    _log.info("ready", url=address.url, runs=len(gateway.view.rows))
    tending = [asyncio.create_task(gateway.evict_forever()), asyncio.create_task(gateway.keep_standby_forever())]
    try:
        while not app.should_stop:
            await app.sleep(WATCH_EVERY_S)
            _check_assigned(gateway)
            await gateway.read_the_rest()
    finally:
        for task in tending:
            task.cancel()


async def _until_ready(app: GatewayApp, gateway: Gateway) -> bool:
    """Return when the view is complete; False if the app has ended before. Raises EventLogError."""
    while not gateway.is_ready:
        if app.should_stop:
            return False
        _check_assigned(gateway)
        await gateway.read_the_rest()
        await app.sleep(READY_POLL_S)
    return True


def _check_assigned(gateway: Gateway) -> None:
    """Raise EventLogError if the group has forgotten us: Faust's consumer may stop joining without telling anybody."""
    if (gateway.unassigned_s or 0) > ASSIGNMENT_TIMEOUT_S:
        raise EventLogError(f"the consumer group has given this gateway nothing for {ASSIGNMENT_TIMEOUT_S:.0f} s")


async def _stop(app: GatewayApp) -> None:
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await app.stop()
    except TimeoutError:
        _log.warning("Faust does not stop: leaving it", timeout_s=STOP_TIMEOUT_S)
        os._exit(EXIT_FAILED if app.crashed else EXIT_OK)


class _Address:
    """The file that tells local tools where we are."""

    def __init__(self, file: Path, url: str) -> None:
        self.url = url
        self._file = file

    def write(self) -> None:
        """Write the file, whole or not at all. A read-only folder is no reason not to run."""
        _log.info("listening", url=self.url)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new = self._file.with_name(f"{self._file.name}.{os.getpid()}")
            new.write_text(json.dumps({"url": self.url, "pid": os.getpid()}) + "\n", encoding="utf-8")
            new.replace(self._file)
        except OSError as error:
            _log.warning("address not written", file=str(self._file), error=str(error))

    def remove(self) -> None:
        """Remove the file, unless somebody else has written it since."""
        try:
            if json.loads(self._file.read_text(encoding="utf-8"))["pid"] == os.getpid():
                self._file.unlink()
        except (OSError, ValueError, LookupError):
            pass


def _listen(settings: GatewaySettings) -> socket.socket:
    """Return a socket that is bound and listens. Raises OSError that says what to do."""
    try:
        return socket.create_server((settings.gateway_host, settings.gateway_port), backlog=128)
    except OSError as error:
        where = f"{settings.gateway_host}:{settings.gateway_port}"
        raise OSError(
            f"cannot listen on {where}: {error}; set TIDEGATE_GATEWAY_PORT to another port, or 0 for any"
        ) from error


class _Source(NamedTuple):
    """What is read: the id of `run-events`, its partitions, and the group whose committed offsets are good for it."""

    log: str
    partition_count: int
    group: str


def _source(broker: Broker, counts: dict[str, int]) -> _Source:
    """Return what is read. The group's committed offsets are as good as the topics they belong to.

    Its name names all topics' ids: whoever deletes a changelog and makes it again has the view rebuilt from the start.
    Raises EventLogError if the topics do not fit together.
    """
    for name in TABLES:
        if counts[RUN_EVENTS] != counts[name]:
            raise EventLogError(
                f"{name} has {counts[name]} partitions but {RUN_EVENTS} has {counts[RUN_EVENTS]}: delete "
                f"{name} and create it anew with `tidegate topics apply`; it holds nothing that cannot be rebuilt"
            )
    found = broker.describe((RUN_EVENTS, *TABLES))
    ids = " ".join(found[name].topic_id for name in (RUN_EVENTS, *TABLES))
    group = f"tidegate-gateway-{hashlib.sha256(ids.encode()).hexdigest()[:12]}"
    return _Source(found[RUN_EVENTS].topic_id, counts[RUN_EVENTS], group)


if __name__ == "__main__":
    sys.exit(run_service(main))
