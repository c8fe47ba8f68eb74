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
from tidegate.projection.service import TOPICS, Limits, Projection
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
        inserter = Inserter(lambda: _open_store(settings, stack))
        inserter.start()
        while not inserter.wait_opened(OPEN_POLL_S):
            PULSE.beat()
            if stop.is_set():
                inserter.stop(OPEN_POLL_S)
                return
        registration = Registration(broker, service=SERVICE, instance_id=instance_id)
        registration.start()
        stack.callback(registration.stop)
        projection = Projection(
            KafkaSubscription(kafka, settings.projection_group, TOPICS, with_headers=False, gather_ms=GATHER_MS),
            broker,
            inserter,
            Limits(
                settings.projection_flush_ms / 1000, settings.projection_batch_rows, settings.projection_batch_bytes
            ),
        )
        stack.callback(projection.close)
        _serve_replays(settings, broker, instance_id, stack)
        health.ready_when(projection.why_not_ready)
        spare_the_collector()
        _log.info("ready")
        run_until_stopped(projection.run_once, stop)
    _log.info("ended", events=projection.counters.events, rows=projection.counters.rows)


def _serve_replays(settings: ProjectionSettings, broker: KafkaBroker, instance_id: str, stack: ExitStack) -> None:
    """Take requests for replays, and go on with one that this instance had begun."""
    replays = Replays(
        Parts(
            broker,
            lambda database: Store.open(settings.model_copy(update={"clickhouse_database": database})),
            settings.clickhouse_database,
            lambda at, time_ms: broker.offset_at(at.topic, at.partition, time_ms),
            Limits(
                settings.projection_flush_ms / 1000, settings.projection_batch_rows, settings.projection_batch_bytes
            ),
        ),
        instance_id,
    )
    stack.callback(replays.close)
    replays.resume()
    try:
        control = Control(replays, settings.control_address_file)
    except OSError as error:
        _log.error("replays cannot be asked for", error=str(error), file=str(settings.control_address_file))
    else:
        stack.callback(control.close)


def _open_store(settings: ProjectionSettings, stack: ExitStack) -> Store:
    """Open ClickHouse; the embedded one is also served for reading, since no other process can open it."""
    store = Store.open(settings)
    path = settings.embedded_path
    if path is None:
        return store
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
