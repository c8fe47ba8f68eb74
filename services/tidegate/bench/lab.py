"""Where it is measured: everything started in a folder of its own, a producer of requests, and a reader of the log."""

from __future__ import annotations

import itertools
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tidegate.bench.app import app
from tidegate.bench.processes import Meter
from tidegate.bench.watcher import RunWatcher
from tidegate.domain import canonical
from tidegate.domain.identity import partition_of
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.embedded.supervisor import ProcessSpec
from tidegate.eventlog.interface import Record
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.app import App
from tidegate.sdk.client import Client

APP: Final = "tidegate.bench.app:app"
ACCOUNTS: Final = tuple(f"bench-{number}/load" for number in range(16))
BUDGET_MICROS: Final = 1_000_000
RUN_REQUESTS: Final = "run-requests"
SERVICES: Final = ("scheduler", "gate", "projection")
EXECUTOR: Final = "executor-default-0"
DEFAULT_SLOTS: Final = 512
FLUSH_S: Final = 60.0
STOP_GRACE_S: Final = 30.0

Say = Callable[[str], None]


class BenchStack(Stack):
    """A stack whose processes can be profiled."""

    def __init__(self, data_dir: Path, *, profile_dir: Path | None = None, **options: object) -> None:
        super().__init__(data_dir, **options)  # type: ignore[arg-type]  # handed through as they are
        self._profile_dir = profile_dir

    def _spec(self, name: str, argv: list[str], env: Mapping[str, str]) -> ProcessSpec:
        if self._profile_dir is not None:
            argv = ["-m", "tidegate.bench.profiled", str(self._profile_dir), *argv[1:]]
        return super()._spec(name, argv, env)


class Lab:
    """Kafka, the services and one executor, started when it is entered and gone when it is left; the folder stays."""

    def __init__(
        self,
        data_dir: Path,
        *,
        slots: int = DEFAULT_SLOTS,
        say: Say,
        profile_dir: Path | None = None,
        with_services: bool = True,
        published: App = app,
        pools: Sequence[ExecutorPool] = (),
    ) -> None:
        """with_services: False for Kafka alone, to look at what is there. published, pools: another app than the benchmark's, and
        the executors that run it."""
        self.data_dir = data_dir
        self.say = say
        self.profile_dir = profile_dir
        # The start-up cache first, so that making it does not disturb what is measured.
        self.kafka = EmbeddedKafka(data_dir / "kafka", startup_cache="before", on_progress=say)
        self._pools = tuple(pools) or (ExecutorPool(APP, slots=slots),)
        self._published = published
        self._with_services = with_services
        self._stack: BenchStack | None = None
        self._exit = ExitStack()
        self._services = ExitStack()
        self._names = itertools.count(1)
        self._lot = uuid.uuid4().hex[:6]

    def __enter__(self) -> Self:
        try:
            self._exit.callback(self.kafka.stop)
            self.kafka.start()
            self.settings = KafkaSettings(bootstrap=self.kafka.bootstrap)
            self.broker = KafkaBroker(self.settings)
            self._exit.callback(self.broker.close)
            if self._with_services:
                self.start_services()
                self._publish()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self.stop_services()
        self._exit.close()

    def start_services(self, env: Mapping[str, str] | None = None) -> None:
        """Start scheduler, gate, projection and executors, and wait until they are registered. Raises StackError."""
        self._stack = self._start(self.data_dir, SERVICES, self._pools, env or {})

    def start_projection(self, data_dir: Path, group: str = "") -> None:
        """Start nothing but a projection: the one there was, or another with a folder and a group of its own. Raises StackError."""
        self._stack = self._start(data_dir, ("projection",), (), {"TIDEGATE_PROJECTION_GROUP": group} if group else {})

    def _start(
        self, data_dir: Path, services: Sequence[str], pools: Sequence[ExecutorPool], env: Mapping[str, str]
    ) -> BenchStack:
        stack = BenchStack(
            data_dir,
            services=services,
            pools=pools,
            kafka=self.settings,
            env={**self._bytecode_env(), **env},
            on_progress=self.say,
            profile_dir=self.profile_dir,
        )
        self._services.enter_context(stack)
        return stack

    def _bytecode_env(self) -> dict[str, str]:
        """Have modules compiled once and for all, as an installation does, whatever this shell is set to."""
        return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.data_dir / "bytecode")}

    def stop_services(self) -> None:
        """Stop the services; Kafka stays."""
        self._services.close()
        self._stack = None

    def _publish(self) -> None:
        with Client(self.settings, by="bench") as client:
            client.publish(self._published)
        self._writer = self.broker.writer()
        self._exit.callback(self._writer.close)
        self._request_partitions = self.broker.describe([RUN_REQUESTS])[RUN_REQUESTS].partition_count
        self._run_watcher = RunWatcher(self.broker)
        self._exit.callback(self._run_watcher.close)

    # -- runs ---------------------------------------------------------------

    def request(self, workflow: str, value: object = None, account: str = "") -> tuple[str, float]:
        """Ask for a run through `run-requests`, as any producer would; return its id and when it was asked for.

        workflow: `agent:NAME` for an agent alone. value: its input; its number if it is None. account: one of ACCOUNTS if it is
        empty.
        """
        number = next(self._names)
        run_id = f"bench-{self._lot}-{number}"
        what = {"agent": workflow.removeprefix("agent:")} if workflow.startswith("agent:") else {"workflow": workflow}
        request = {
            **what,
            "run_id": run_id,
            "input": number if value is None else value,
            "account": account or ACCOUNTS[number % len(ACCOUNTS)],
            "budget_micros": BUDGET_MICROS,
        }
        asked_at_s = time.monotonic()
        self.send(run_id, canonical.dumps(request).encode())
        return run_id, asked_at_s

    def send(self, run_id: str, request: bytes) -> None:
        """Send a request about a run. Does not block; `flush` does, until it is in the log."""
        partition = partition_of(run_id, self._request_partitions)
        self._writer.send(Record(RUN_REQUESTS, partition, run_id.encode(), request))
        self._writer.poll()

    def request_many(self, workflow: str, count: int) -> dict[str, float]:
        """Ask for runs as fast as the log takes them; return when each was asked for. Blocks until all are in the log."""
        asked = dict(self.request(workflow) for _ in range(count))
        self.flush()
        return asked

    def flush(self) -> None:
        """Block until all that was asked for is in the log."""
        self._writer.flush(FLUSH_S)

    def wait(self, run_ids: Mapping[str, float], timeout_s: float, *, may_fail: bool = False) -> dict[str, float]:
        """See `RunWatcher.wait`."""
        return self._run_watcher.wait(run_ids.keys(), timeout_s, may_fail=may_fail)

    def take_ended(self) -> list[str]:
        """See `RunWatcher.take_ended`."""
        return self._run_watcher.take_ended()

    # -- processes ---------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL; it is started again at once."""
        if self._stack is not None:
            self._stack.kill(name)

    def terminate(self, name: str) -> None:
        """End a process with SIGTERM, as a rolling restart does; it is started again at once."""
        if self._stack is not None:
            self._stack.terminate(name)

    def scale(self, service: str, count: int, *, kill: bool = False) -> None:
        """Have so many processes of a service. Blocks until those that go are gone."""
        if self._stack is not None:
            self._stack.scale(service, count, grace_s=0.0 if kill else STOP_GRACE_S)

    def pid(self, name: str) -> int | None:
        """Return the pid of a process that runs."""
        return None if self._stack is None else self._stack.pid(name)

    def meter(self) -> Meter:
        """Return a meter of every process that takes part, the broker and this one included."""
        return Meter(self._pids)

    def _pids(self) -> dict[str, int | None]:
        statuses = self._stack.status() if self._stack is not None else []
        services = {_short(status.name): status.pid for status in statuses}
        return {"kafka": self.kafka.pid, "bench": os.getpid(), **services}

    def log_path(self, name: str) -> Path:
        """Return the log file of a process."""
        return self.data_dir / "logs" / f"{name}.log"


def _short(name: str) -> str:
    """Return the service of a process that is the only one of it, else its name."""
    service, _, rest = name.partition("-")
    return service if rest in {"0", "default-0"} else name


def say_on_stderr(line: str) -> None:
    """Show progress without touching standard output, which carries the figures."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
