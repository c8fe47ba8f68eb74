"""Wiring of the projection: the reader on the main thread, the inserter on one of its own, read-only SQL beside them."""

from __future__ import annotations

import errno
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import structlog

from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.eventlog.settings import KafkaSettings
from tidegate.health import PULSE, Health
from tidegate.process import (
    EXIT_FAILED,
    EXIT_OK,
    ProcessSettings,
    configure_logging,
    log_the_end,
    observed,
    prepare,
    run_service,
    run_until_stopped,
    spare_the_collector,
    stop_on_signals,
)
from tidegate.projection.control import Control, Replays
from tidegate.projection.inserter import Inserter
from tidegate.projection.migrations import MigrationError
from tidegate.projection.replay import Parts
from tidegate.projection.service import FIRST, TOPICS, Limits, Projection
from tidegate.projection.settings import ProjectionSettings
from tidegate.projection.sql_engine import QueryError, SqlEngine
from tidegate.projection.sql_server import SqlServer, write_address
from tidegate.projection.store import Store
from tidegate.registry import Registration

SERVICE = "projection"
GATHER_MS = 100
OPEN_POLL_S = 0.2
_log = structlog.get_logger()


def main() -> int:
    """Run the projection until SIGTERM; returns the exit code. What is not committed then is read again at the next start."""
    process = ProcessSettings()
    instance_id = process.named(SERVICE)
    configure_logging(SERVICE, instance_id, process.log_level)
    stop = stop_on_signals(process.stop_within_s)
    try:
        with observed(process, SERVICE, instance_id) as health:
            _run(process, instance_id, stop, health)
    except (EventLogError, MigrationError, QueryError) as error:
        if stop.is_set():
            return EXIT_OK
        log_the_end(error, restart="goes on from what is committed")
        return EXIT_FAILED
    return EXIT_OK


def _run(process: ProcessSettings, instance_id: str, stop: threading.Event, health: Health) -> None:
    settings, kafka = ProjectionSettings(), KafkaSettings()
    broker = KafkaBroker(kafka)
    prepare(broker, SERVICE, process.broker_wait_s, stop)
    with ExitStack() as stack:
        path = settings.embedded_path
        made = _on_a_server(settings, kafka) if path is None else _embedded(settings, path, kafka, stop, stack)
        if made is None:
            return
        subscription, inserter = made
        registration = Registration(broker, service=SERVICE, instance_id=instance_id)
        registration.start()
        stack.callback(registration.stop)
        projection = Projection(subscription, broker, inserter, _limits(settings), alone=path is not None)
        stack.callback(projection.close)
        _serve_replays(settings, broker, instance_id, stack, subscription)
        health.ready_when(lambda: projection.why_not_ready() or inserter.why_not_open())
        spare_the_collector()
        _log.info("ready")
        run_until_stopped(projection.run_once, stop)
    _log.info("ended", events=projection.counters.events, rows=projection.counters.rows)


def _on_a_server(settings: ProjectionSettings, kafka: KafkaSettings) -> tuple[KafkaSubscription, Inserter]:
    """Join the group at once: the member that has its first partition makes the tables, and the others wait for them."""
    subscription = _subscription(settings, kafka)
    inserter = Inserter(lambda: Store.open(settings, may_migrate=lambda: FIRST in subscription.assigned))
    inserter.start()
    return subscription, inserter


def _embedded(
    settings: ProjectionSettings, path: Path, kafka: KafkaSettings, stop: threading.Event, stack: ExitStack
) -> tuple[KafkaSubscription, Inserter] | None:
    """Open the engine, which nobody else can have, before the group is joined; None if we are told to stop meanwhile."""
    inserter = Inserter(lambda: _open_embedded(settings, path, stack))
    inserter.start()
    while not inserter.wait_opened(OPEN_POLL_S):
        PULSE.beat()
        if stop.is_set():
            inserter.stop(OPEN_POLL_S)
            return None
    return _subscription(settings, kafka), inserter


def _subscription(settings: ProjectionSettings, kafka: KafkaSettings) -> KafkaSubscription:
    return KafkaSubscription(kafka, settings.projection_group, TOPICS, with_headers=False, gather_ms=GATHER_MS)


def _limits(settings: ProjectionSettings) -> Limits:
    return Limits(settings.projection_flush_ms / 1000, settings.projection_batch_rows, settings.projection_batch_bytes)


def _serve_replays(
    settings: ProjectionSettings,
    broker: KafkaBroker,
    instance_id: str,
    stack: ExitStack,
    subscription: KafkaSubscription,
) -> None:
    """Take requests for replays, and go on with one that was begun, if replays are ours to do."""

    def open_store(database: str) -> Store:
        # The tables in place are the inserter's to make; those of a shadow, which nobody else has, are made here.
        in_place = database == settings.clickhouse_database
        return Store.open(
            settings.model_copy(update={"clickhouse_database": database}), may_migrate=lambda: not in_place
        )

    replays = Replays(
        Parts(
            broker,
            open_store,
            settings.clickhouse_database,
            lambda at, time_ms: broker.offset_at(at.topic, at.partition, time_ms),
            _limits(settings),
        ),
        instance_id,
        is_first=lambda: FIRST in subscription.assigned,
        has_company=settings.embedded_path is None,
    )
    stack.callback(replays.close)
    replays.resume()
    try:
        control = Control(replays, settings.control_address_file)
    except OSError as error:
        _log.error("replays cannot be asked for", error=str(error), file=str(settings.control_address_file))
    else:
        stack.callback(control.close)


def _open_embedded(settings: ProjectionSettings, path: Path, stack: ExitStack) -> Store:
    """Open the embedded ClickHouse, and serve it for reading, since no other process can open it."""
    store = Store.open(settings)
    try:
        server = _serve_sql(settings, path)
    except OSError as error:
        # Rows matter more than looking at them: an address that cannot be had must not stop the projection.
        _log.error("read-only SQL is not served", error=str(error))
    else:
        stack.enter_context(server)
    return store


def _serve_sql(settings: ProjectionSettings, path: Path) -> SqlServer:
    engine = SqlEngine(
        path,
        settings.clickhouse_database,
        timeout_s=settings.projection_sql_timeout_s,
        memory_mb=settings.projection_sql_memory_mb,
    )
    host, port = settings.projection_sql_host, settings.projection_sql_port
    try:
        server = SqlServer(engine, host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        server = SqlServer(engine, host, 0)
        _log.warning("port taken, another one is used", taken=port, url=server.url)
    write_address(settings.sql_address_file, server.url, settings.clickhouse_database)
    _log.info("read-only SQL", url=server.url, file=str(settings.sql_address_file))
    return server


if __name__ == "__main__":
    sys.exit(run_service(main))
