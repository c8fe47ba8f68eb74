"""One run of the broker's Java process, from the command line to the exit status."""

import fcntl
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tidegate.embedded.broker_files import BrokerFiles, new_id, write_whole
from tidegate.embedded.children import Child, spawn
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.java import BROKER_CLASS, FORMAT_CLASS, Java
from tidegate.embedded.ports import LOOPBACK

FORMAT_TIMEOUT_S = 60.0
FORMAT_HEAP_MB = 128
PROBE_INTERVAL_S = 0.02
METADATA_TIMEOUT_S = 2.0
CACHE_REFUSED = "error has occurred while processing the AOT cache"

PORT_TAKEN = "Address already in use"
HINTS = {
    PORT_TAKEN: "Another process took the port at the same moment: start again.",
    "No space left on device": "The disk is full: make room, or choose another data directory.",
    "OutOfMemoryError": "The broker ran out of memory: give it more with heap_mb.",
    "INCONSISTENT_CLUSTER_ID": "The data directory mixes files of two brokers: remove it if its data is not needed.",
    "CorruptRecordException": "A file in the data directory is damaged: remove it all if its data is not needed.",
}


class BrokerStartError(EmbeddedKafkaError):
    """The process ended, or did not answer in time. `may_pass` says whether another try could fare better."""

    def __init__(self, message: str, *, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class BrokerProcess:
    """A broker that was launched. It is killed with us, and Ctrl-C in our terminal does not reach it."""

    def __init__(
        self,
        child: Child,
        files: BrokerFiles,
        port: int,
        log_start: int,
        aot_cache: Path | None,
        client_config: Mapping[str, str],
    ) -> None:
        self._child = child
        self._files = files
        self._port = port
        self._client_config = client_config
        self._log_start = log_start
        self._aot_cache = aot_cache

    @classmethod
    def launch(
        cls,
        java: Java,
        files: BrokerFiles,
        port: int,
        *,
        heap_mb: int,
        record_to: Path | None = None,
        idle: bool = False,
        client_config: Mapping[str, str] = MappingProxyType({}),
    ) -> Self:
        """Start the process on files that are configured and formatted. Does not wait for it to answer.

        client_config: how to be let in at `port`, for `wait_ready`.
        """
        aot_cache = java.aot_cache if record_to is None and java.aot_cache.exists() else None
        command = java.command(
            BROKER_CLASS,
            [str(files.config)],
            heap_mb=heap_mb,
            log4j_config=files.log4j_config,
            aot_cache=aot_cache,
            record_to=record_to,
        )
        log_start = files.log.stat().st_size if files.log.exists() else 0
        with files.output.open("wb") as output:
            child = spawn(command, output=output, idle=idle)
        return cls(child, files, port, log_start, aot_cache, client_config)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_running(self) -> bool:
        return self._child.poll() is None

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the broker answers a metadata request. Raises BrokerStartError; the process is then killed."""
        deadline = time.monotonic() + timeout_s
        client: AdminClient | None = None
        try:
            while self.is_running:
                if client is None and _accepts_connections(self._port):
                    client = _client(self._port, self._client_config)
                if client is not None and _answers_metadata(client):
                    self._drop_refused_cache()
                    return
                if time.monotonic() > deadline:
                    raise self._start_error(f"did not answer within {timeout_s:.0f} s")
                time.sleep(PROBE_INTERVAL_S)
            raise self._start_error(f"ended at its start with {_said_status(self._child.returncode)}")
        except BaseException:
            self.kill()
            raise

    def terminate(self, timeout_s: float) -> bool:
        """Ask the process to end, kill it after `timeout_s`. Says whether it ended by itself. Blocks; idempotent."""
        if self.is_running:
            self._child.send_signal(signal.SIGTERM)
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def kill(self) -> None:
        """End the process as a crash would, and wait until it is gone. Idempotent."""
        self._child.kill()
        self._child.wait()

    def _drop_refused_cache(self) -> None:
        """Remove the start-up cache if Java said that it went on without: another one will be made."""
        if self._aot_cache is not None and any(CACHE_REFUSED in line for line in self._files.output_lines()):
            self._aot_cache.unlink(missing_ok=True)

    def _start_error(self, what: str) -> BrokerStartError:
        logged = self._files.log_lines(since=self._log_start)
        printed = self._files.output_lines()
        text = "\n".join((*logged, *printed))
        may_pass = PORT_TAKEN in text
        crashed = (self._child.poll() or 0) < 0
        if self._aot_cache is not None and (crashed or not logged):
            # Java itself failed, and not Kafka. A damaged cache can do that, so the next try does without.
            self._aot_cache.unlink(missing_ok=True)
            may_pass = True
        message = (
            f"The embedded Kafka ({LOOPBACK}:{self._port}) {what}.",
            *(hint for sign, hint in HINTS.items() if sign in text),
            f"The last lines of {self._files.log} and {self._files.output}:",
            *(f"  {line}" for line in (*logged, *printed) or ["(nothing was logged)"]),
        )
        return BrokerStartError("\n".join(message), may_pass=may_pass)


def format_if_needed(java: Java, files: BrokerFiles, checkpoint_path: Path) -> None:
    """Make the storage usable by a broker, unless it is already; data that is there stays. Blocks.

    The first time on a machine Kafka's own tool does it, and the one file that it computes is kept at
    `checkpoint_path` (it depends on Kafka's version only). Raises EmbeddedKafkaError if the tool fails.
    """
    if files.is_formatted:
        return
    if not checkpoint_path.exists():
        _format_by_tool(java, files)
        checkpoint_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(checkpoint_path, files.checkpoint.read_bytes())
        files.meta.unlink()
    files.format_from(checkpoint_path.read_bytes())


def refuse_shared_data(files: BrokerFiles) -> None:
    """Raise EmbeddedKafkaError if another broker has the data open: Kafka would say so only after seconds."""
    lock_path = files.storage / ".lock"
    if not lock_path.exists():
        return
    with lock_path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EmbeddedKafkaError(
                f"Another Kafka is running on {files.data_dir}. Stop it, use it by setting its address, or choose "
                "another data directory."
            ) from error


def _format_by_tool(java: Java, files: BrokerFiles) -> None:
    arguments = ["format", "--cluster-id", new_id(), "--config", str(files.config), "--ignore-formatted"]
    with files.output.open("wb") as output:
        child = spawn(java.command(FORMAT_CLASS, arguments, heap_mb=FORMAT_HEAP_MB), output=output)
    try:
        status: int | None = child.wait(FORMAT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        child.kill()
        child.wait()
    if status != 0:
        raise EmbeddedKafkaError(
            "\n".join(
                (
                    f"Kafka's storage tool could not format {files.storage} ({_said_status(status)}):",
                    *(f"  {line}" for line in files.output_lines()),
                )
            )
        )


def _said_status(status: int | None) -> str:
    if status is None:
        return "no end in time"
    if status < 0:
        name = signal.Signals(-status).name
        return f"{name} (out of memory on this machine?)" if name == "SIGKILL" else name
    return f"exit status {status}"


def _accepts_connections(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _client(port: int, client_config: Mapping[str, str]) -> AdminClient:
    # Silent, and quick to try again: what goes wrong here is said by the caller.
    return AdminClient(
        {
            **client_config,
            "bootstrap.servers": f"{LOOPBACK}:{port}",
            "client.id": "tidegate-embedded-probe",
            "log_level": 0,
            "reconnect.backoff.ms": 10,
            "reconnect.backoff.max.ms": 100,
        }
    )


def _answers_metadata(client: AdminClient) -> bool:
    try:
        metadata = client.list_topics(timeout=METADATA_TIMEOUT_S)
    except KafkaException:
        return False
    return bool(metadata.brokers)
