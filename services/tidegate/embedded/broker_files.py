"""The files of one embedded broker: its configuration, its formatted storage, its logs."""

import base64
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tidegate.embedded.ports import LOOPBACK

NODE_ID = 1
MESSAGE_MAX_BYTES = 16 * 1024 * 1024
YEAR_MINUTES = 365 * 24 * 60
LAST_LOG_LINES = 25
LAST_LOG_BYTES = 64 * 1024

# One node, so nothing is replicated. What concerns the internal topics' partitions is fixed at their creation and thus
# may not depend on a profile: a data directory is used with either.
BROKER_CONFIG: dict[str, str] = {
    "process.roles": "broker,controller",
    "node.id": str(NODE_ID),
    "controller.listener.names": "CONTROLLER",
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "1",
    "offsets.retention.minutes": str(YEAR_MINUTES),
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    # The controller refuses the successor of a killed broker until the session of the killed one is over, 9 s.
    "broker.session.timeout.ms": "1500",
    "broker.heartbeat.interval.ms": "250",
    # Topics are declared; one that a typo creates would hide the typo.
    "auto.create.topics.enable": "false",
    "num.partitions": "1",
    "message.max.bytes": str(MESSAGE_MAX_BYTES),
    "replica.fetch.max.bytes": str(MESSAGE_MAX_BYTES),
    # A topic that wants compaction at once sets segment.ms and min.cleanable.dirty.ratio; the cleaner must then not
    # sleep for its usual 15 s, nor take 128 MB of a small heap for its table of keys.
    "log.cleaner.enable": "true",
    "log.cleaner.threads": "1",
    "log.cleaner.backoff.ms": "500",
    "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
    "log.retention.check.interval.ms": "10000",
    # Deleted topics leave their files for this long.
    "log.segment.delete.delay.ms": "5000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
}

LOG4J_CONFIG = """\
status = warn
# Otherwise log4j stops as soon as the process is asked to end, and how Kafka ends is not logged.
shutdownHook = disable
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log_path}
appender.file.filePattern = {log_path}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d %p %m (%c)%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 20MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""


@dataclass(frozen=True, slots=True)
class BrokerFiles:
    """Where a broker keeps what. All below one directory, which may be copied or removed while the broker is down."""

    data_dir: Path

    @property
    def storage(self) -> Path:
        return self.data_dir / "storage"

    @property
    def config(self) -> Path:
        return self.data_dir / "server.properties"

    @property
    def log4j_config(self) -> Path:
        return self.data_dir / "log4j2.properties"

    @property
    def log(self) -> Path:
        """What Kafka logs. Rolled at 20 MB."""
        return self.data_dir / "kafka.log"

    @property
    def output(self) -> Path:
        """What the Java process prints: crashes and warnings of the virtual machine."""
        return self.data_dir / "java.out"

    @property
    def meta(self) -> Path:
        """Kafka's note that the storage is formatted."""
        return self.storage / "meta.properties"

    @property
    def checkpoint(self) -> Path:
        """Which features a new cluster starts with, as Kafka's tool writes it."""
        return self.storage / "bootstrap.checkpoint"

    @property
    def is_formatted(self) -> bool:
        return self.meta.exists()

    @property
    def certificates(self) -> Path:
        """Where a secure broker keeps its certificates and keys."""
        return self.data_dir / "certificates"

    def write_config(self, listeners: Mapping[str, str], controller_port: int, extra: Mapping[str, str]) -> None:
        """Write the configuration. `listeners` are as `plain_listeners` or `secure.listener_config` return them."""
        self.storage.mkdir(parents=True, exist_ok=True)
        config = {
            **BROKER_CONFIG,
            **listeners,
            "controller.quorum.voters": f"{NODE_ID}@{LOOPBACK}:{controller_port}",
            "log.dirs": str(self.storage),
        }
        config |= extra
        write_whole(self.config, "".join(f"{key}={_escaped(value)}\n" for key, value in config.items()).encode())
        write_whole(self.log4j_config, LOG4J_CONFIG.format(log_path=_escaped(str(self.log))).encode())

    def format_from(self, checkpoint: bytes) -> None:
        """Format the storage as Kafka's tool does, given the features' checkpoint that it once wrote.

        Does in a millisecond what takes a Java process of its own otherwise. `meta.properties` comes last and whole:
        it is what says that the storage is formatted.
        """
        self.checkpoint.write_bytes(checkpoint)
        meta = {"version": "1", "node.id": str(NODE_ID), "cluster.id": new_id(), "directory.id": new_id()}
        write_whole(self.meta, "".join(f"{key}={value}\n" for key, value in meta.items()).encode())

    def log_lines(self, *, since: int = 0) -> list[str]:
        """The last lines that Kafka logged after the byte `since` of its log."""
        return _last_lines(self.log, since)

    def output_lines(self) -> list[str]:
        """The last lines that the Java process printed."""
        return _last_lines(self.output, 0)


def plain_listeners(host: str, advertised: str, port: int, controller_port: int) -> dict[str, str]:
    """Return the listeners of a broker that asks nobody anything. `advertised`: the host that clients are told."""
    return {
        "listeners": f"PLAINTEXT://{host}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{advertised}:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
    }


def new_id() -> str:
    """A random id as Kafka writes them. Its command line tools mistake a leading dash for an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not text.startswith("-"):
            return text


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file such that a reader, or we after a crash, sees the old or the new one and nothing in between."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _escaped(value: str) -> str:
    """As a value of a Java properties file."""
    return value.replace("\\", "\\\\").replace("\n", "\\n")


def _last_lines(path: Path, since: int) -> list[str]:
    if not path.exists():
        return []
    size = path.stat().st_size
    if size < since:  # it was rolled in between
        since = 0
    with path.open("rb") as file:
        file.seek(max(since, size - LAST_LOG_BYTES))
        return file.read(LAST_LOG_BYTES).decode(errors="replace").splitlines()[-LAST_LOG_LINES:]
