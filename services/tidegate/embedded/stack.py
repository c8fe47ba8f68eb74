"""All of Tidegate on one machine: Kafka, the services as processes of their own, the development app's executor.

`tidegate dev`, the demos, the benchmark and the tests of whole runs start the same thing through `Stack`.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tidegate.domain import canonical
from tidegate.domain.messages import Instance
from tidegate.embedded.data_folder import DataFolder, DataFolderError
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.embedded.supervisor import ProcessSpec, ProcessStatus, Supervisor
from tidegate.eventlog.interface import EventLogError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import publish_schemas
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.topics.apply import apply
from tidegate.topics.declaration import load_topics
from tidegate.topics.settings import TopicsSettings

INSTANCES: Final = "instances"
ADDRESS_FILES: Final = ("sql.json", "gateway.json")
READY_TIMEOUT_S: Final = 90.0  # since something last went on
LOOK_EVERY_S: Final = 2.0
TELL_AFTER_S: Final = 10.0
SERVICES: Final = ("scheduler", "gate", "projection", "gateway")


class StackError(RuntimeError):
    """Something did not start; the message says what, and the last lines of its log."""


class Patience:
    """Until when to wait: for so long since less was left to do than ever before."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        self._limit_s = limit_s
        self._since_s = now_s
        self._least: int | None = None

    def note(self, left: int | None, now_s: float) -> None:
        """Take notice of how much is left; None if that is not known."""
        if left is not None and (self._least is None or left < self._least):
            self._least, self._since_s = left, now_s

    def is_over(self, now_s: float) -> bool:
        """Tell whether nothing has gone on for too long."""
        return now_s - self._since_s > self._limit_s


def records_left(data_dir: Path) -> int | None:
    """Return how many records the live view of a folder has to read until it is whole, as it says. Blocks for an answer.

    None if there is no view, or it does not know yet.
    """
    try:
        url = canonical.loads((data_dir / "gateway.json").read_text(encoding="utf-8"))["url"]
        with urllib.request.urlopen(f"{url}/ready", timeout=LOOK_EVERY_S) as answer:  # noqa: S310 - our own file's
            body = answer.read()
    except urllib.error.HTTPError as error:  # 503: not yet
        body = error.read()
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return None
    try:
        left = canonical.loads(body)["lag"]
    except (ValueError, LookupError, TypeError):
        return None
    return left if isinstance(left, int) else None


@dataclass(frozen=True, slots=True)
class ExecutorPool:
    """Executors of one app on one queue."""

    app: str
    queue: str = "default"
    slots: int = 16
    count: int = 1
    env: Mapping[str, str] = field(default_factory=dict)

    def instance_ids(self) -> list[str]:
        """Return the names of the pool's processes."""
        return [f"executor-{self.queue}-{number}" for number in range(self.count)]


class Stack:
    """Starts everything, keeps it running, stops it. Data lives in `data_dir` and survives; one stack at a time uses it.

    kafka: the settings of an existing Kafka to be used instead of the embedded one. instances: how many processes of a
    service there are, 1 if it is not named. process_env: further variables of single processes, by name (`gate-0`).
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        pools: Sequence[ExecutorPool] = (),
        services: Sequence[str] = SERVICES,
        kafka: KafkaSettings | None = None,
        kafka_port: int | None = None,
        sql_port: int = 0,
        gateway_port: int = 0,
        profile: str = "steady",
        env: Mapping[str, str] | None = None,
        instances: Mapping[str, int] | None = None,
        process_env: Mapping[str, Mapping[str, str]] | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = DataFolder(data_dir)
        self.data_dir = self._folder.path
        self.pools = tuple(pools)
        self._services = tuple(services)
        self._instances = dict(instances or {})
        self._process_env = dict(process_env or {})
        self._external = kafka
        self._on_progress = on_progress
        self.kafka = (
            None
            if kafka is not None
            else EmbeddedKafka(
                self.data_dir / "kafka",
                port=kafka_port,
                profile="quick" if profile == "quick" else "steady",
                on_progress=on_progress,
            )
        )
        self._env = {
            "TIDEGATE_DATA_DIR": str(self.data_dir),
            "TIDEGATE_CLICKHOUSE_URL": f"chdb://{self.data_dir}/clickhouse",
            "TIDEGATE_PROJECTION_SQL_PORT": str(sql_port),
            "TIDEGATE_GATEWAY_PORT": str(gateway_port),
            **(env or {}),
        }
        self.supervisor: Supervisor | None = None
        self.settings: KafkaSettings = kafka or KafkaSettings()

    # -- life ---------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait until all of it is registered. Raises StackError, EventLogError, EmbeddedKafkaError."""
        try:
            self._folder.hold()
        except DataFolderError as error:
            raise StackError(str(error)) from None
        for name in ADDRESS_FILES:  # of the last time
            (self.data_dir / name).unlink(missing_ok=True)
        if self.kafka is not None:
            self.kafka.start()
            self.settings = KafkaSettings(bootstrap=self.kafka.bootstrap)
        broker = KafkaBroker(self.settings)
        self._on_progress("Applying topics")
        queues = sorted({pool.queue for pool in self.pools} | {"default"})
        apply(broker, load_topics(queues=queues, settings=TopicsSettings()))
        publish_schemas(broker)
        self.supervisor = Supervisor(self._specs(), self.data_dir / "logs", on_progress=self._on_progress)
        began_ms = time.time_ns() // 1_000_000
        self._on_progress("Starting services")
        self.supervisor.start()
        self._wait_registered(broker, began_ms)

    def stop(self) -> None:
        """Stop everything, the services before the broker. Idempotent."""
        if self.supervisor is not None:
            self.supervisor.stop()
        if self.kafka is not None:
            self.kafka.stop()
        self._folder.release()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- looking at it ------------------------------------------------------------------

    def status(self) -> list[ProcessStatus]:
        """Return a line per process."""
        return [] if self.supervisor is None else self.supervisor.status()

    def pid(self, name: str) -> int | None:
        """Return the pid of a process that runs, None if there is none at this moment."""
        return next((status.pid for status in self.status() if status.name == name), None)

    def kill(self, name: str) -> int | None:
        """Kill a process with SIGKILL, by pid; the supervisor starts it again. Returns the pid."""
        return None if self.supervisor is None else self.supervisor.kill(name)

    def terminate(self, name: str) -> int | None:
        """End a process with SIGTERM, by pid; the supervisor starts it again. Returns the pid."""
        return None if self.supervisor is None else self.supervisor.terminate(name)

    def scale(self, service: str, count: int, *, grace_s: float = 10.0) -> None:
        """Start or end processes of a service until there are `count`; the last ones go first, with 0 s of grace by SIGKILL.

        Blocks until those that end are gone, not until those that start are ready. Raises StackError if nothing runs.
        """
        if self.supervisor is None:
            raise StackError("the stack is not started")
        there = self._instances.get(service, 1)
        for number in range(there, count):
            self.supervisor.add(self._service_spec(service, number))
        for number in reversed(range(count, there)):
            self.supervisor.remove(f"{service}-{number}", grace_s)
        self._instances[service] = count

    def _service_spec(self, service: str, number: int) -> ProcessSpec:
        return self._spec(f"{service}-{number}", ["-m", f"tidegate.{service}"], {})

    def log_path(self, name: str) -> Path:
        """Return the file that a process writes its log to."""
        return self.data_dir / "logs" / f"{name}.log"

    # -- parts --------------------------------------------------------------------------

    def _specs(self) -> list[ProcessSpec]:
        specs = [
            self._service_spec(service, number)
            for service in self._services
            for number in range(self._instances.get(service, 1))
        ]
        for pool in self.pools:
            argv = ["-m", "tidegate.executor", "--app", pool.app, "--queue", pool.queue, "--slots", str(pool.slots)]
            specs += [self._spec(name, argv, pool.env) for name in pool.instance_ids()]
        return specs

    def _spec(self, name: str, argv: list[str], env: Mapping[str, str]) -> ProcessSpec:
        kafka = {
            "TIDEGATE_KAFKA_BOOTSTRAP": self.settings.bootstrap,
            "TIDEGATE_KAFKA_TOPIC_PREFIX": self.settings.topic_prefix,
        }
        return ProcessSpec(
            name=name,
            argv=[sys.executable, *argv],
            env={**self._env, **kafka, "TIDEGATE_INSTANCE_ID": name, **env, **self._process_env.get(name, {})},
        )

    def _wait_registered(self, broker: KafkaBroker, since_ms: int) -> None:
        """Wait until every process has a line in `instances` that is newer than this start.

        A gateway has one when its view is whole. After a long day without it that takes minutes: it says how far it is.
        """
        names = {spec.name for spec in self._specs()}
        table = Tables((INSTANCES,))
        looked_s = told_s = time.monotonic()
        patience = Patience(READY_TIMEOUT_S, looked_s)
        pause = threading.Event()
        while True:
            try:
                table.load(broker)
            except EventLogError as error:
                self._on_progress(f"Waiting for {INSTANCES}: {error}")
            rows: dict[str, Instance] = table.rows[INSTANCES]
            missing = {name for name in names if name not in rows or rows[name].started_ms < since_ms - 1000}
            if not missing:
                return
            bad = [s for s in self.status() if s.name in missing and s.state in ("crash-looping", "exited")]
            now_s = time.monotonic()
            if bad or patience.is_over(now_s):
                raise StackError(self._explain(sorted(missing)))
            if now_s - looked_s > LOOK_EVERY_S:
                looked_s, left = now_s, records_left(self.data_dir)
                patience.note(left, now_s)
                if left and now_s - told_s > TELL_AFTER_S:
                    told_s = now_s
                    self._on_progress(f"The live view reads the log: {left:,} records left")
            pause.wait(0.1)

    def _explain(self, missing: list[str]) -> str:
        lines = [f"did not start: {', '.join(missing)}"]
        for name in missing:
            path = self.log_path(name)
            if path.exists():
                tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                lines += [f"-- the end of {path}:", *tail]
        return "\n".join(lines)
