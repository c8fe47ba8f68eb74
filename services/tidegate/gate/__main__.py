"""Wiring of the gate."""

from __future__ import annotations

import sys
import time

import structlog

from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.owner import OwnerLoop
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gate.placement import Executors
from tidegate.gate.service import INSTANCES, POLICIES, GateMachine
from tidegate.gate.settings import GateSettings
from tidegate.process import (
    EXIT_FAILED,
    EXIT_OK,
    ProcessSettings,
    configure_logging,
    prepare,
    run_until_stopped,
    spare_the_collector,
    stop_on_signals,
)
from tidegate.registry import Registration

SERVICE = "gate"
_log = structlog.get_logger()


def main() -> int:
    """Run the gate until SIGTERM; returns the exit code. Any doubt about the log ends it with 1."""
    process = ProcessSettings()
    instance_id = process.named(SERVICE)
    configure_logging(SERVICE, instance_id, process.log_level)
    stop = stop_on_signals()
    settings = GateSettings()
    broker = KafkaBroker(KafkaSettings())
    try:
        counts = prepare(
            broker,
            ("run-events", "gate-requests", "gate-ledger", "gate-decisions", "dead-letters", INSTANCES, POLICIES),
            process.broker_wait_s,
            stop,
        )
        executors = Executors(
            lease_ms=int(settings.lease_s * 1000),
            monotonic_ms=lambda: time.monotonic_ns() // 1_000_000,
            table_end=lambda: broker.offsets(INSTANCES, 0).end,
        )
        machine = GateMachine(counts["gate-decisions"], counts["gate-ledger"], executors)
        registration = Registration(broker, service=SERVICE, instance_id=instance_id)
        registration.start()
        loop = OwnerLoop(broker, machine, instance_id)
        loop.start()
        spare_the_collector()
        _log.info("ready")
        run_until_stopped(loop.run_once, stop)
        loop.close()
        registration.stop()
    except EventLogError as error:
        if stop.is_set():
            return EXIT_OK
        _log.exception("ending: a restart takes over afresh", error=str(error))
        return EXIT_FAILED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
