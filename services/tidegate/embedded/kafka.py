"""Apache Kafka as a child process: one node, from its released jars, for development and tests."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tidegate.embedded import startup_cache
from tidegate.embedded.broker_files import BrokerFiles, plain_listeners
from tidegate.embedded.broker_process import (
    HINTS,
    BrokerProcess,
    BrokerStartError,
    format_if_needed,
    refuse_shared_data,
)
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.jars import KAFKA_VERSION, kafka_jars
from tidegate.embedded.java import Java, Profile, find_java
from tidegate.embedded.ports import LOOPBACK, choose_port, is_free
from tidegate.embedded.secure import ADMIN, Certificates, listener_config, security_config

__all__ = ["EmbeddedKafka", "EmbeddedKafkaError", "default_cache_dir"]

START_TIMEOUT_S = 90.0
START_TRIES = 3
STOP_TIMEOUT_S = 20.0
PORT_FREED_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Where jars and start-up caches are kept: TIDEGATE_CACHE_DIR, else `tidegate` in the user's cache directory."""
    if configured := os.environ.get("TIDEGATE_CACHE_DIR"):
        return Path(configured).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tidegate"


class EmbeddedKafka:
    """A broker of our own on a loopback port, with its data in `data_dir`.

    `start` returns when it answers. It dies with this process, however this process ends; Ctrl-C in a terminal does not
    reach it, so that services can finish before `stop`. What is in `data_dir` survives everything but its removal.
    Not thread-safe: one thread starts and stops it. (It need not outlive its thread: see `children.py`.)

    `port`: the wish; if it is taken a free one is used and `on_progress` is told. None and 0 ask for a free one.
    `profile`: `quick` starts and runs with the least processor time, for tests; `steady` compiles well, for long runs.
    `secure`: it asks who one is and what one may do, as `secure.py` says; `bootstrap` is then for SCRAM, and
    `certificate_bootstrap` for certificates, which `certificates` issues.
    `host`, `advertised_host`: where it listens, and what clients are told; loopback if not given, as nothing but a container
    of its own is a place for anything else.
    `startup_cache`: starts take less than half the time with the cache of `java.py`. `background` makes it, if it is
    missing, at the lowest priority while the broker runs; `before` makes it first (10 s, once), so that nothing
    disturbs what follows; `off` uses one but makes none.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        cache_dir: Path | None = None,
        heap_mb: int = 512,
        profile: Profile = "steady",
        extra_config: Mapping[str, str] | None = None,
        on_progress: Callable[[str], None] = _log.info,
        startup_cache: Literal["background", "before", "off"] = "background",
        start_timeout_s: float = START_TIMEOUT_S,
        secure: bool = False,
        host: str = LOOPBACK,
        advertised_host: str = LOOPBACK,
    ) -> None:
        self._files = BrokerFiles(data_dir.absolute())
        self._port = port
        self._cache_dir = (cache_dir or default_cache_dir()).absolute()
        self._heap_mb = heap_mb
        self._profile: Profile = profile
        self._extra_config = dict(extra_config or {})
        self._on_progress = on_progress
        self._startup_cache = startup_cache
        self._start_timeout_s = start_timeout_s
        self._secure = secure
        self._host = host
        self._advertised_host = advertised_host
        self._certificate_port: int | None = None
        self._broker: BrokerProcess | None = None
        self.certificates = Certificates(self._files.certificates)

    @property
    def bootstrap(self) -> str:
        """The address for clients. Stays the same over `restart`. Raises EmbeddedKafkaError before the first start."""
        if self._port is None:
            raise EmbeddedKafkaError("The embedded Kafka has no address before it was started.")
        return f"{self._advertised_host}:{self._port}"

    @property
    def certificate_bootstrap(self) -> str:
        """The address for clients with certificates. Raises EmbeddedKafkaError if there is none (yet)."""
        if self._certificate_port is None:
            raise EmbeddedKafkaError("Only a secure embedded Kafka that was started has an address for certificates.")
        return f"{self._advertised_host}:{self._certificate_port}"

    @property
    def pid(self) -> int | None:
        """The Java process, or None while there is none."""
        return self._broker.pid if self._broker is not None and self._broker.is_running else None

    @property
    def is_running(self) -> bool:
        return self.pid is not None

    @property
    def data_dir(self) -> Path:
        return self._files.data_dir

    @property
    def log_path(self) -> Path:
        """What Kafka logs. Grows over restarts, rolled at 20 MB."""
        return self._files.log

    def start(self) -> None:
        """Block until the broker answers a metadata request; fetch Kafka first if need be. Does nothing if it runs.

        Raises EmbeddedKafkaError, whose message says what failed, what was logged last and what can be done.
        """
        self._start(choose_port)

    def fetch(self) -> None:
        """Have everything in the cache that a first start fetches or computes there, so that later it can be read-only.

        Blocks for a download and for one run of Kafka's formatting tool. Raises EmbeddedKafkaError.
        """
        java = self._prepare()
        with tempfile.TemporaryDirectory() as folder:
            files = BrokerFiles(Path(folder))
            files.write_config(plain_listeners(LOOPBACK, LOOPBACK, 9092, 9093), 9093, {})
            format_if_needed(java, files, self._checkpoint_path)

    def stop(self) -> None:
        """Shut the broker down in order, or kill it after a bound. Blocks until it is gone. Idempotent."""
        if self._broker is not None and not self._broker.terminate(STOP_TIMEOUT_S):
            self._on_progress(f"Kafka did not stop within {STOP_TIMEOUT_S:.0f} s and was killed")

    def kill(self) -> None:
        """End the broker as a crash would (SIGKILL). Blocks until it is gone. Idempotent."""
        if self._broker is not None:
            self._broker.kill()

    def restart(self) -> None:
        """Stop the broker if it runs, start it again on the same port and data. Blocks and raises as `start`.

        Another process that takes the port in between is an error: clients know the broker by its address.
        """
        self.stop()
        self._start(_same_port)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, choose: Callable[[int | None], int]) -> None:
        if self.is_running:
            return
        try:
            self._launch(choose)
        except OSError as error:
            hint = HINTS.get(error.strerror or "", "Choose another data directory, or make this one writable.")
            raise EmbeddedKafkaError(f"Kafka cannot write to {self.data_dir}: {error}. {hint}") from error

    def _launch(self, choose: Callable[[int | None], int]) -> None:
        java = self._prepare()
        for tries_left in reversed(range(START_TRIES)):
            port = self._claim_port(choose)
            format_if_needed(java, self._files, self._checkpoint_path)
            self._on_progress(f"Starting Apache Kafka {KAFKA_VERSION} on {self.bootstrap}")
            self._broker = self._launched(java, port)
            try:
                self._broker.wait_ready(self._start_timeout_s)
                break
            except BrokerStartError as error:
                if not tries_left or not error.may_pass:
                    raise
                self._on_progress("Kafka did not start: trying once more")
        if self._startup_cache == "background":
            startup_cache.train_in_background(java, self._training_dir, self._checkpoint_path)

    def _launched(self, java: Java, port: int) -> BrokerProcess:
        if self._certificate_port is None:
            return BrokerProcess.launch(java, self._files, port, heap_mb=self._heap_mb)
        admin = self.certificates.issue(ADMIN).config()
        # Probed on this machine, whatever name others know it by.
        return BrokerProcess.launch(
            java, self._files, self._certificate_port, heap_mb=self._heap_mb, client_config=admin
        )

    def _prepare(self) -> Java:
        """Have everything that a broker needs but its port. Blocks, possibly for a download."""
        jars = kafka_jars(self._cache_dir, on_progress=self._on_progress)
        java = find_java(jars, self._profile, self._cache_dir / "aot")
        if self._startup_cache == "before" and not java.aot_cache.exists():
            self._on_progress("Preparing Kafka for quick starts (10 s, once)")
            startup_cache.train_or_go_on(java, self._training_dir, self._checkpoint_path, idle=False)
        startup_cache.mark_used(java)
        self._files.storage.mkdir(parents=True, exist_ok=True)
        refuse_shared_data(self._files)
        return java

    def _claim_port(self, choose: Callable[[int | None], int]) -> int:
        """Settle on the ports and write them into the configuration."""
        asked = self._port
        self._port = choose(asked)
        if asked and asked != self._port:
            self._on_progress(f"Port {asked} is taken: Kafka gets {self._port}")
        controller_port = choose_port(avoid=frozenset({self._port}))
        if not self._secure:
            listeners = plain_listeners(self._host, self._advertised_host, self._port, controller_port)
            self._files.write_config(listeners, controller_port, self._extra_config)
            return self._port
        self.certificates.make([LOOPBACK, "localhost", self._advertised_host])
        taken = frozenset({self._port, controller_port})
        self._certificate_port = choose_port(self._certificate_port, avoid=taken)
        listeners = listener_config(
            self._host, self._advertised_host, self._port, self._certificate_port, controller_port
        )
        self._files.write_config(listeners, controller_port, security_config(self.certificates) | self._extra_config)
        return self._port

    @property
    def _release_dir(self) -> Path:
        return self._cache_dir / f"kafka-{KAFKA_VERSION}"

    @property
    def _checkpoint_path(self) -> Path:
        return self._release_dir / "bootstrap.checkpoint"

    @property
    def _training_dir(self) -> Path:
        return self._release_dir / f"training-{self._profile}"


def _same_port(asked: int | None) -> int:
    """The asked port, as soon as it is free. Blocks for a bounded time. Raises EmbeddedKafkaError."""
    if asked is None:
        return choose_port()
    deadline = time.monotonic() + PORT_FREED_TIMEOUT_S
    while not is_free(asked):
        if time.monotonic() > deadline:
            raise EmbeddedKafkaError(
                f"Kafka cannot come back on {LOOPBACK}:{asked}: another process listens there now. End that one."
            )
        time.sleep(0.02)
    return asked
