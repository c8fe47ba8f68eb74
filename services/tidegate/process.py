"""What every service process does alike: settings, logs, signals, waiting for the broker and its topics."""

from __future__ import annotations

import contextvars
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import structlog
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidegate.domain.identity import INSTANCE_ID_PATTERN
from tidegate.eventlog.interface import Broker, EventLogError, TopicDescription
from tidegate.eventlog.machine import CorruptLogError, RefusedToStartError
from tidegate.eventlog.schemas import exchange_schemas
from tidegate.health import MAIN_LOOP, PULSE, Health, served
from tidegate.topics.access import used_by
from tidegate.topics.administration import AdministeredBroker
from tidegate.topics.apply import TopicsError, apply_command, check_at_start
from tidegate.topics.continuity import check_logs
from tidegate.topics.declaration import read_topic_files
from tidegate.topics.settings import TopicsSettings

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)

_log = structlog.get_logger()
# Without the values of local variables: passwords and customers' data can be among them.
_EXCEPTIONS: Final = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


class ProcessSettings(BaseSettings):
    """Settings that every service has."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_", extra="ignore")

    instance_id: str = Field(
        default="",
        pattern=rf"{INSTANCE_ID_PATTERN}|^$",
        description="Stable name of this process, unique among those that run; default SERVICE-0. A process that restarts "
        "under its old name has its partitions again at once.",
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    broker_wait_s: float = Field(
        default=60.0, gt=0, description="How long to wait for the broker and the topics at start."
    )
    stop_within_s: float = Field(
        default=30.0,
        gt=0,
        description="So long after SIGTERM a scheduler, gate, projection or gateway ends at the latest, even if it waits for a "
        "Kafka that is away: what it has not written then is read or told again. Executors: TIDEGATE_EXECUTOR_DRAIN_S.",
    )
    http_host: str = Field(
        default="127.0.0.1", description="Address that health and metrics are served on; 0.0.0.0 for everywhere."
    )
    http_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port of `/health/live`, `/health/ready` and `/metrics`, which every service has; 0 for a free one, which "
        "the log names; not served if not set.",
    )
    http_stuck_after_s: float = Field(
        default=120.0,
        gt=0,
        description="`/health/live` fails when a loop of the process has not advanced for so long. Longer than any wait for "
        "Kafka, which is no reason to kill a process.",
    )

    def named(self, service: str) -> str:
        """Return the instance id, or the service's default one."""
        return self.instance_id or f"{service}-0"


def settings_problems(error: ValidationError) -> list[str]:
    """Return a line for each setting that makes no sense: the variable, what is wrong with it, and never its value."""
    prefixes = {one.__name__: str(one.model_config.get("env_prefix", "")) for one in BaseSettings.__subclasses__()}
    prefix = prefixes.get(error.title, "TIDEGATE_")
    return [
        f"{prefix}{'.'.join(map(str, problem['loc']))}".upper() + f": {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    ]


def run_service(main: Callable[[], int]) -> int:
    """Run a service's `main`; settings that make no sense are lines on standard error and EXIT_USAGE, not a traceback.

    After a failure the process ends here: freeing the clients of a Kafka that refuses us may take for ever.
    """
    try:
        code = main()
    except ValidationError as error:
        for line in settings_problems(error):
            sys.stderr.write(f"error: {line}\n")
        return EXIT_USAGE
    if code != EXIT_OK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def configure_logging(service: str, instance_id: str, level: str) -> None:
    """Write structured logs as JSON lines to standard error, each naming the service and the instance."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise SystemExit(f"TIDEGATE_LOG_LEVEL: unknown level {level!r}; use debug, info, warning or error")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _EXCEPTIONS,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, instance=instance_id)
    _log_libraries({"service": service, "instance": instance_id}, number)


def _log_libraries(names: Mapping[str, str], level: int) -> None:
    """Write what libraries log as JSON too: warnings only, unless we are asked for details."""

    def name_service(_: Any, __: str, line: MutableMapping[str, Any]) -> Mapping[str, Any]:
        return {**names, **line}

    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                name_service,
                _EXCEPTIONS,
            ],
            processor=structlog.processors.JSONRenderer(),
        )
    )
    logging.basicConfig(handlers=[handler], level=level if level <= logging.DEBUG else max(level, logging.WARNING))


def spare_the_collector() -> None:
    """Have the garbage collector look seldom: what owners make is in no cycles (a test), and looking through it costs a tenth.

    Called when everything is loaded: that is never looked at again.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()  # see `quick_start`


def stop_on_signals(within_s: float | None = None) -> threading.Event:
    """Return an event that SIGTERM or SIGINT sets; a second signal ends the process at once.

    within_s: the process ends with EXIT_OK at the latest so long after the first one, whatever it waits for. Only for those who
    lose nothing by it. The main thread may be inside a client that waits for Kafka: handlers run in between, so a thread is
    told of signals by the system.
    """
    stop = threading.Event()

    def handle(_: int, __: object) -> None:
        stop.set()

    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in _STOPPING:
        signal.signal(number, handle)
    in_context = contextvars.copy_context().run  # what the thread logs names the service
    threading.Thread(target=in_context, args=(_end, told, stop, within_s), name="signals", daemon=True).start()
    return stop


def _end(told: int, stop: threading.Event, within_s: float | None) -> None:
    """Follow the signals whose numbers come through a pipe."""
    _await_signal(told, None)
    stop.set()
    again = _await_signal(told, within_s)
    if again is None:
        _log.warning("leaving without a clean end, which lasts too long: is Kafka away?", after_s=within_s)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_OK if again is None else 128 + again)


def _await_signal(told: int, timeout_s: float | None) -> int | None:
    """Return the number of the next signal that asks for the end; None if none comes in time."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while select.select([told], [], [], None if deadline is None else max(0.0, deadline - time.monotonic()))[0]:
        number = os.read(told, 1)[0]
        if number in _STOPPING:
            return number
    return None


def wait_for_topics(
    broker: Broker, topics: Sequence[str], wait_s: float, stop: threading.Event
) -> dict[str, TopicDescription]:
    """Return what the broker says of the topics once all of them exist. Blocks up to `wait_s`.

    Raises EventLogError that names what is missing and what to do.
    """
    deadline = time.monotonic() + wait_s
    said = False
    while True:
        try:
            found = broker.describe(topics)
            missing = [topic for topic in topics if topic not in found]
            reason = f"topics missing: {', '.join(missing)}; create them with `{apply_command(missing)}`"
        except EventLogError as error:
            missing, reason = list(topics), f"the broker does not answer: {error}"
        if not missing:
            return found
        if time.monotonic() >= deadline or stop.is_set():
            raise EventLogError(reason)
        if not said:
            said = True
            _log.info("waiting", reason=reason)
        PULSE.beat()
        stop.wait(0.2)


def prepare(
    broker: AdministeredBroker, service: str, wait_s: float, stop: threading.Event, queue: str | None = None
) -> dict[str, int]:
    """Wait for the topics that a service is declared to write or read, check that they are fit for use, exchange schemas.

    queue: whose tasks an executor takes. Returns the topics' partition counts. Raises EventLogError with everything that is
    wrong. Blocks up to `wait_s` for the topics, then for some round trips.
    """
    topics = used_by(service, read_topic_files(), queue)
    found = wait_for_topics(broker, topics, wait_s, stop)
    check_at_start(broker, topics, production=TopicsSettings().production, found=found)
    check_logs(broker, topics)
    exchange_schemas(broker)
    return {topic: description.partition_count for topic, description in found.items()}


def log_the_end(error: Exception, restart: str = "takes over afresh") -> None:
    """Say why a service ends: a restart does what `restart` says, or it refuses to go on until somebody has done something."""
    if isinstance(error, RefusedToStartError | CorruptLogError | TopicsError):
        _log.error("refusing to go on: somebody must look", error=str(error))
    else:
        _log.exception(f"ending: a restart {restart}", error=str(error))


@contextmanager
def observed(process: ProcessSettings, service: str, instance_id: str) -> Iterator[Health]:
    """Serve health and metrics, if a port is set, for as long as the block takes. Raises SystemExit if that cannot be."""
    health = Health(service, process.http_stuck_after_s)
    with served(health, instance_id, process.http_host, process.http_port):
        yield health


def run_until_stopped(turn: Callable[[], object], stop: threading.Event, loop: str = MAIN_LOOP) -> None:
    """Call `turn` until the event is set. What it raises ends the process: state in memory is never repaired.

    loop: under which name `/health/live` watches whether it advances. Raises EventLogError if another thread finds a reason to
    end.
    """
    known = len(PULSE.reasons_to_end)
    while not stop.is_set():
        PULSE.beat(loop)
        if len(PULSE.reasons_to_end) > known:
            raise EventLogError(PULSE.reasons_to_end[-1])
        turn()
