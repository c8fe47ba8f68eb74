"""Wiring of the scheduler: admission on a thread of its own, the owner loop on the main one."""

from __future__ import annotations

from tidegate import quick_start  # noqa: F401 - first, because it makes the imports below quicker

# isort: split
import os
import sys
import threading

import structlog

from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.owner import OwnerLoop, owner_writers
from tidegate.eventlog.settings import KafkaSettings
from tidegate.health import Health
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
from tidegate.registry import Registration
from tidegate.scheduler.admission import Admission
from tidegate.scheduler.measure import measure
from tidegate.scheduler.service import SchedulerMachine
from tidegate.scheduler.settings import SchedulerSettings

SERVICE = "scheduler"
_log = structlog.get_logger()


def main() -> int:
    """Run the scheduler until SIGTERM; returns the exit code. Any doubt about the log ends it with 1."""
    process = ProcessSettings()
    instance_id = process.named(SERVICE)
    configure_logging(SERVICE, instance_id, process.log_level)
    stop = stop_on_signals(process.stop_within_s)
    kafka = KafkaSettings()
    broker = KafkaBroker(kafka)
    try:
        with observed(process, SERVICE, instance_id) as health:
            _run(process, kafka, broker, instance_id, stop, health)
    except EventLogError as error:
        if stop.is_set():
            return EXIT_OK
        log_the_end(error)
        return EXIT_FAILED
    return EXIT_OK


def _run(
    process: ProcessSettings,
    kafka: KafkaSettings,
    broker: KafkaBroker,
    instance_id: str,
    stop: threading.Event,
    health: Health,
) -> None:
    settings = SchedulerSettings()  # before anything is waited for: it may make no sense
    writers = owner_writers(broker)
    counts = prepare(broker, SERVICE, process.broker_wait_s, stop)
    machine = SchedulerMachine(counts["run-events"], counts["gate-requests"])
    registration = Registration(broker, service=SERVICE, instance_id=instance_id)
    registration.start()
    loop = OwnerLoop(broker, machine, instance_id, measure=measure, writers=writers)
    loop.start()
    admission = Admission(broker, kafka, settings, counts["run-commands"], instance_id)
    health.ready_when(lambda: loop.why_not_ready() or admission.why_not_ready())
    threading.Thread(target=_admit, args=(admission, stop), name="admission", daemon=True).start()
    spare_the_collector()
    _log.info("ready")
    run_until_stopped(loop.run_once, stop)
    loop.close()
    registration.stop()


def _admit(admission: Admission, stop: threading.Event) -> None:
    """Run admission until the event is set; its failure ends the process, because half a scheduler helps nobody."""
    try:
        run_until_stopped(admission.run_once, stop, "admission")
        admission.close()
    except Exception:
        _log.exception("admission failed: ending")
        os._exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(run_service(main))
