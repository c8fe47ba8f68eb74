"""A projection as its own process, asked over its own SQL endpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import AdminClient

from support.brokers import create_topics_of
from tidegate.embedded.tools import tool_command
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.projection.service import INSTANCES, TOPICS
from tidegate.projection.tables import REBUILT_VIEWS

GROUP = "tidegate-projection"
WAIT_S = 180.0
EAGER = {
    "segment.ms": "200",
    "min.cleanable.dirty.ratio": "0",
    "delete.retention.ms": "0",
    "min.compaction.lag.ms": "0",
}


class SqlFailedError(AssertionError):
    """The endpoint refused a query."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(f"HTTP {status}, code {code}: {text}")
        self.status = status
        self.code = code
        self.text = text


class Topics:
    """The projection's topics under a prefix of the test's own, and what is written to them."""

    def __init__(
        self, bootstrap: str, prefix: str, *, run_partitions: int = 3, ledger_partitions: int = 2, eager: bool = False
    ) -> None:
        """eager: Kafka compacts them as soon as there is something to compact."""
        self.settings = KafkaSettings(bootstrap=bootstrap, topic_prefix=prefix, session_timeout_ms=6_000)
        self.broker = KafkaBroker(self.settings)
        self.counts = {"run-events": run_partitions, "gate-ledger": ledger_partitions}
        config = {"segment.ms": "604800000"} | (EAGER if eager else {})
        create_topics_of("projection", bootstrap, prefix, partitions=self.counts, config=config)
        self.written_instances = 0  # up to where the test wrote to the registry; the projection's own heartbeats go on

    def write(self, records: Iterable[Record]) -> None:
        """Write records and wait for all acknowledgements."""
        writer = self.broker.writer()
        for record in records:
            writer.send(record, self._wrote_instance if record.topic == INSTANCES else None)
        writer.flush(WAIT_S)
        writer.close()

    def _wrote_instance(self, offset: int) -> None:
        self.written_instances = max(self.written_instances, offset + 1)

    def ends(self) -> dict[TopicPartition, int]:
        """Return the next offset of every partition that holds something."""
        found = {}
        for topic in TOPICS:
            for partition in range(self.counts.get(topic, 1)):
                end = self.broker.offsets(topic, partition).end
                if end:
                    found[TopicPartition(topic, partition)] = end
        return found

    def reset_to_earliest(self) -> subprocess.CompletedProcess[str]:
        """Do what an operator does: Kafka's own tool. What it says is for the caller to judge."""
        return self.reset("--to-earliest --all-topics")

    def reset(self, where: str) -> subprocess.CompletedProcess[str]:
        """Reset the group with Kafka's own tool, with its options that say where to and which topics."""
        arguments = f"--bootstrap-server {self.settings.bootstrap} --group {self.settings.topic_prefix}{GROUP} "
        arguments += f"--reset-offsets {where} --execute"
        command = tool_command("consumer-groups", arguments.split())
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    def reset_group(self, offset: int | Mapping[TopicPartition, int] = 0) -> None:
        """Set the stopped group's offsets; refused while it has members."""
        admin = AdminClient({"bootstrap.servers": self.settings.bootstrap})
        partitions = [
            KafkaPartition(
                self.settings.topic_prefix + at.topic,
                at.partition,
                min(end, offset if isinstance(offset, int) else offset.get(at, end)),
            )
            for at, end in self.ends().items()
        ]
        request = ConsumerGroupTopicPartitions(self.settings.topic_prefix + GROUP, partitions)
        for future in admin.alter_consumer_group_offsets([request]).values():
            for answer in future.result(WAIT_S).topic_partitions:
                if answer.error is not None:
                    raise KafkaException(answer.error)

    def close(self) -> None:
        self.broker.close()


class ProjectionProcess:
    """`python -m tidegate.projection` on a data folder."""

    def __init__(self, topics: Topics, data_dir: Path, **variables: str) -> None:
        self.topics = topics
        self.data_dir = data_dir
        self.log = data_dir.with_suffix(".log")
        self._variables = variables
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **variables: str) -> ProjectionProcess:
        """Start it; does not wait for anything."""
        settings = self.topics.settings
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")},
            "TIDEGATE_KAFKA_BOOTSTRAP": settings.bootstrap,
            "TIDEGATE_KAFKA_TOPIC_PREFIX": settings.topic_prefix,
            "TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": str(settings.session_timeout_ms),
            "TIDEGATE_DATA_DIR": str(self.data_dir),
            "TIDEGATE_PROJECTION_SQL_PORT": "0",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **self._variables,
            **variables,
        }
        self.data_dir.mkdir(parents=True, exist_ok=True)
        (self.data_dir / "sql.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tidegate.projection"], env=environment, stderr=log, stdout=log
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def replay(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tidegate replay projection` as somebody on this machine would."""
        environment = {**os.environ, "TIDEGATE_DATA_DIR": str(self.data_dir), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tidegate.cli.__main__", "replay", "projection", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)

    def stop(self) -> None:
        """End it in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(WAIT_S) == 0, self.log.read_text()[-3000:]

    def kill(self) -> None:
        """End it as a crash would, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)

    def wait_dead(self) -> int:
        """Wait until it ended by itself (a failpoint killed it) and return how."""
        return self.process.wait(WAIT_S)

    @property
    def url(self) -> str:
        deadline = time.monotonic() + WAIT_S
        file = self.data_dir / "sql.json"
        while not file.exists():
            self._check_alive(deadline, "an SQL address")
            time.sleep(0.05)
        return str(json.loads(file.read_text())["url"])

    def wait_caught_up(self) -> None:
        """Wait until the freshness says that everything written so far is in the tables."""
        deadline = time.monotonic() + WAIT_S
        wanted = {at: end for at, end in self.topics.ends().items() if at.topic != INSTANCES}
        wanted[TopicPartition(INSTANCES, 0)] = self.topics.written_instances
        while True:
            found = {
                TopicPartition(row["topic"], row["partition"]): row["next_offset"]
                for row in self.rows("SELECT topic, partition, next_offset FROM freshness")
            }
            behind = {at: (found.get(at), end) for at, end in wanted.items() if (found.get(at) or 0) < end}
            if not behind:
                return
            self._check_alive(deadline, f"{behind} (have, want)")
            time.sleep(0.1)

    def rows(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        text = ask(self.url, query, default_format="JSONEachRow").decode()
        return [json.loads(line) for line in text.splitlines()]

    def value(self, query: str) -> Any:
        """Return the one value of a query."""
        (row,) = self.rows(query)
        (value,) = row.values()
        return value

    def contents(self, *, but_instances: bool = True) -> dict[str, str]:
        """Return everything that every view shows, in a fixed order. Processes' own lines in `instances` come and go."""
        shown = {}
        for view in REBUILT_VIEWS:
            where = "WHERE service = 'executor'" if view == "instances" and but_instances else ""
            shown[view] = ask(self.url, f"SELECT * FROM {view} {where} ORDER BY ALL FORMAT JSONEachRow").decode()
        return shown

    def _check_alive(self, deadline: float, what: str) -> None:
        ended = self.process.poll()
        assert ended is None, f"the projection ended with {ended} before {what}: {self.log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain for {what}: {self.log.read_text()[-3000:]}"

    def __enter__(self) -> ProjectionProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def ask(url: str, query: str, /, **parameters: str) -> bytes:
    """Ask an SQL endpoint. Raises SqlFailedError."""
    address = f"{url}/?{urllib.parse.urlencode(parameters)}"
    request = urllib.request.Request(address, data=query.encode())  # noqa: S310 - http, by construction
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:  # noqa: S310 - see above
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        raise SqlFailedError(error.code, error.headers.get("X-ClickHouse-Exception-Code", ""), text) from None
