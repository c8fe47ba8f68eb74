"""Wiring of the gate."""

from __future__ import annotations

from tidegate import quick_start  # noqa: F401 - first, because it makes the imports below quicker

# isort: split
import re
import sys
import threading
import time
from functools import partial

import structlog

from tidegate.eventlog.interface import Broker, EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.owner import OwnerLoop, owner_writers
from tidegate.eventlog.settings import KafkaSettings
from tidegate.gate.measure import measure
from tidegate.gate.placement import Executors
from tidegate.gate.service import INSTANCES, GateMachine
from tidegate.gate.settings import GateSettings
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
from tidegate.registry import Registration, task_topic

SERVICE = "gate"
TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
_log = structlog.get_logger()


def main() -> int:
    """Run the gate until SIGTERM; returns the exit code. Any doubt about the log ends it with 1."""
    process = ProcessSettings()
    instance_id = process.named(SERVICE)
    configure_logging(SERVICE, instance_id, process.log_level)
    stop = stop_on_signals(process.stop_within_s)
    broker = KafkaBroker(KafkaSettings())
    try:
        with observed(process, SERVICE, instance_id) as health:
            _run(process, broker, instance_id, stop, health)
    except EventLogError as error:
        if stop.is_set():
            return EXIT_OK
        log_the_end(error)
        return EXIT_FAILED
    return EXIT_OK


def _run(
    process: ProcessSettings, broker: KafkaBroker, instance_id: str, stop: threading.Event, health: Health
) -> None:
    settings = GateSettings()  # before anything is waited for: it may make no sense
    writers = owner_writers(broker)
    counts = prepare(broker, SERVICE, process.broker_wait_s, stop)
    executors = Executors(
        lease_ms=int(settings.lease_s * 1000),
        monotonic_ms=lambda: time.monotonic_ns() // 1_000_000,
        table_end=lambda: broker.offsets(INSTANCES, 0).end,
        task_partitions=partial(_task_partitions, broker, {}),
    )
    machine = GateMachine(counts["gate-decisions"], counts["gate-ledger"], executors)
    registration = Registration(broker, service=SERVICE, instance_id=instance_id)
    registration.start()
    loop = OwnerLoop(broker, machine, instance_id, measure=partial(measure, executors), writers=writers)
    loop.start()
    health.ready_when(loop.why_not_ready)
    spare_the_collector()
    _log.info("ready")
    run_until_stopped(loop.run_once, stop)
    loop.close()
    registration.stop()


def _task_partitions(broker: Broker, known: dict[str, int], queue: str) -> int:
    """Return how many partitions the topic of a queue's tasks has, 0 if there is none. Blocks when it is first asked."""
    topic = task_topic(queue)
    if topic not in known and TOPIC_NAME.fullmatch(topic):
        found = broker.describe([topic]).get(topic)
        if found is None:
            return 0  # it may still be made
        known[topic] = found.partition_count
    return known.get(topic, 0)


if __name__ == "__main__":
    sys.exit(run_service(main))
