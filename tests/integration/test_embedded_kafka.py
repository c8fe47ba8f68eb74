"""The embedded broker: it starts, keeps its data, survives what happens to it, and goes when we go."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from confluent_kafka import KafkaException

from support.brokers import Broker, create_topic, produce, read_all
from tidegate.embedded.errors import JarsMismatchError, JarsUnavailableError
from tidegate.embedded.jars import KAFKA_VERSION, LockedJar, kafka_jars, load_lock
from tidegate.embedded.kafka import EmbeddedKafka, EmbeddedKafkaError, default_cache_dir

pytestmark = pytest.mark.timeout(180)

WAIT_S = 20.0

OwnKafka = Callable[..., EmbeddedKafka]


def values(bootstrap: str, topic: str) -> list[bytes | None]:
    return [message.value() for message in read_all(bootstrap, topic)]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.02)


def test_a_record_comes_back(bootstrap: str, topic_prefix: str) -> None:
    topic = f"{topic_prefix}events"
    create_topic(bootstrap, topic)
    produce(bootstrap, topic, [("a", b"1"), ("b", b"2")])
    assert values(bootstrap, topic) == [b"1", b"2"]


def test_large_records_fit(bootstrap: str, topic_prefix: str) -> None:
    topic = f"{topic_prefix}payloads"
    create_topic(bootstrap, topic, config={"max.message.bytes": str(12 * 1024 * 1024)})
    large = os.urandom(900_000)
    produce(bootstrap, topic, [("large", large)])
    assert values(bootstrap, topic) == [large]


def test_a_topic_can_be_compacted_at_once(bootstrap: str, topic_prefix: str) -> None:
    topic = f"{topic_prefix}compacted"
    soon = {"cleanup.policy": "compact", "segment.ms": "50", "min.cleanable.dirty.ratio": "0.001"}
    create_topic(bootstrap, topic, config=soon)
    produce(bootstrap, topic, [("key", b"old"), ("key", b"new")])
    time.sleep(0.1)
    # The segment in use is never compacted; a later record closes it.
    produce(bootstrap, topic, [("other", b"closes the segment")])
    wait_until(lambda: b"old" not in values(bootstrap, topic), "compaction")
    assert values(bootstrap, topic) == [b"new", b"closes the segment"]


def test_a_topic_that_nobody_declared_is_not_made(bootstrap: str, topic_prefix: str) -> None:
    with pytest.raises(KafkaException, match=r"UNKNOWN_PARTITION|UNKNOWN_TOPIC"):
        read_all(bootstrap, f"{topic_prefix}typo")


def test_data_survives_restarts_and_kills(own_kafka: OwnKafka, topic_prefix: str) -> None:
    broker = own_kafka()
    address, topic = broker.bootstrap, f"{topic_prefix}kept"
    create_topic(address, topic)
    produce(address, topic, [("k", b"before")])

    broker.restart()
    assert broker.bootstrap == address
    assert values(address, topic) == [b"before"]
    produce(address, topic, [("k", b"after a restart")])

    broker.kill()
    assert not broker.is_running
    assert broker.pid is None
    broker.start()
    assert broker.bootstrap == address
    assert values(address, topic) == [b"before", b"after a restart"]


def test_another_object_continues_on_the_same_data(own_kafka: OwnKafka, topic_prefix: str) -> None:
    first, topic = own_kafka(), f"{topic_prefix}kept"
    create_topic(first.bootstrap, topic)
    produce(first.bootstrap, topic, [("k", b"v")])
    first.stop()
    second = own_kafka(first.data_dir, profile="steady")
    assert values(second.bootstrap, topic) == [b"v"]


def test_two_brokers_never_share_data(own_kafka: OwnKafka) -> None:
    first = own_kafka()
    with pytest.raises(EmbeddedKafkaError, match="Another Kafka is running on"):
        own_kafka(first.data_dir)
    assert first.is_running


def test_start_and_stop_may_be_repeated(own_kafka: OwnKafka) -> None:
    broker = own_kafka()
    pid = broker.pid
    broker.start()
    assert broker.pid == pid
    for _ in range(2):
        broker.stop()
        broker.kill()
        assert not broker.is_running


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_replaced_and_said(own_kafka: OwnKafka, taken_port: int) -> None:
    said: list[str] = []
    broker = own_kafka(port=taken_port, on_progress=said.append)
    assert broker.bootstrap != f"127.0.0.1:{taken_port}"
    assert f"Port {taken_port} is taken: Kafka gets {broker.bootstrap.split(':')[1]}" in said


def test_a_restart_insists_on_its_port(own_kafka: OwnKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidegate.embedded.kafka.PORT_FREED_TIMEOUT_S", 0.2)
    broker = own_kafka()
    broker.stop()
    host, port = broker.bootstrap.split(":")
    with (
        socket.create_server((host, int(port))),
        pytest.raises(EmbeddedKafkaError, match="another process listens there"),
    ):
        broker.restart()


def test_a_bad_setting_is_shown_with_the_last_log_lines(tmp_path: Path) -> None:
    broker = EmbeddedKafka(tmp_path / "kafka", profile="quick", extra_config={"num.io.threads": "none"})
    with pytest.raises(EmbeddedKafkaError, match=r"num\.io\.threads"):
        broker.start()
    assert not broker.is_running


PARENT = """
import sys, threading
from pathlib import Path
from tidegate.embedded.kafka import EmbeddedKafka

def start():  # on a thread that ends: the broker must not end with it
    broker = EmbeddedKafka(Path(sys.argv[1]), profile="quick", heap_mb=256, startup_cache="off")
    broker.start()
    print(broker.pid, flush=True)

thread = threading.Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs a broker, in a process group of its own as a shell would start it."""
    command = [sys.executable, "-c", PARENT, str(tmp_path / "kafka")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, process_group=0) as process:
        yield process
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_a_killed_parent_takes_its_broker_along(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    broker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    assert broker.is_running(), "ended with the thread that started it"
    parent.kill()
    broker.wait(WAIT_S)


def test_ctrl_c_leaves_the_broker_to_its_owner(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    broker = psutil.Process(int(parent.stdout.readline()))
    assert os.getsid(broker.pid) == broker.pid
    assert os.getpgid(broker.pid) != os.getpgid(parent.pid)


# The jars


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing was ever fetched and nothing can be; the empty cache directory."""
    config = tmp_path / "jgo.conf"
    config.write_text("[repositories]\ncentral = http://127.0.0.1:9/maven\n")
    monkeypatch.setenv("JGO_CONFIG_FILE", str(config))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "repository"))
    return tmp_path / "cache"


def test_without_network_it_says_what_is_missing_and_what_to_do(no_network: Path, tmp_path: Path) -> None:
    with pytest.raises(EmbeddedKafkaError) as failure:
        EmbeddedKafka(tmp_path / "kafka", cache_dir=no_network).start()
    message = str(failure.value)
    assert isinstance(failure.value, JarsUnavailableError)
    assert all(jar.coordinate in message for jar in load_lock())
    assert "mvn dependency:get" in message
    assert "jgo.conf" in message


def test_the_cache_alone_suffices(no_network: Path, kafka: Broker) -> None:
    lock = load_lock()
    assert len(kafka_jars(default_cache_dir())) == len(lock)
    assert f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}" in {jar.coordinate for jar in lock}
    # One Kafka, and the binding without which it logs nothing.
    assert {jar.version for jar in lock if jar.artifact == "kafka-clients"} == {KAFKA_VERSION}
    assert any(jar.artifact == "log4j-slf4j-impl" for jar in lock)


def test_a_jar_of_the_local_maven_repository_is_used_if_it_is_the_right_one(no_network: Path, tmp_path: Path) -> None:
    jar = LockedJar(
        "org.example", "thing", "1.0", sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    path = tmp_path / "repository" / jar.repository_path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    assert [found.read_bytes() for found in kafka_jars(no_network, lock=[jar])] == [b"abc"]
    path.write_bytes(b"abd")
    with pytest.raises(JarsUnavailableError, match=r"org\.example:thing:1\.0"):
        kafka_jars(no_network / "other", lock=[jar])


def test_a_changed_jar_is_refused(kafka: Broker, tmp_path: Path) -> None:
    jar = load_lock()[0]
    directory = tmp_path / f"kafka-{KAFKA_VERSION}" / "jars"
    directory.mkdir(parents=True)
    (directory / jar.filename).write_bytes(b"not a jar")
    with pytest.raises(JarsMismatchError, match=f"{jar.filename}.*{jar.sha256}"):
        EmbeddedKafka(tmp_path / "kafka", cache_dir=tmp_path).start()
