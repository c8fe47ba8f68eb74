"""The embedded broker: it starts, keeps its data, survives what happens to it, and goes when we go."""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
from confluent_kafka import KafkaException

from support.brokers import Broker, create_topic, produce, read_all
from support.ends import is_gone
from tidegate.embedded.errors import JarsMismatchError, JarsUnavailableError
from tidegate.embedded.jars import KAFKA_VERSION, LockedJar, kafka_jars, load_lock
from tidegate.embedded.java import find_java
from tidegate.embedded.kafka import EmbeddedKafka, EmbeddedKafkaError, default_cache_dir
from tidegate.embedded.ports import choose_port
from tidegate.embedded.startup_cache import train

pytestmark = pytest.mark.timeout(180)

WAIT_S = 90.0

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


@pytest.mark.kafka
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


@pytest.mark.kafka
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the children of a killed parent")
def test_a_killed_parent_takes_its_broker_along(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    broker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    assert broker.is_running(), "ended with the thread that started it"
    parent.kill()
    wait_until(lambda: is_gone(broker), "the broker's end")


@pytest.mark.kafka
def test_ctrl_c_leaves_the_broker_to_its_owner(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    broker = psutil.Process(int(parent.stdout.readline()))
    assert os.getsid(broker.pid) == broker.pid
    assert os.getpgid(broker.pid) != os.getpgid(parent.pid)


# The start-up cache


@pytest.fixture
def own_cache(kafka: Broker, tmp_path: Path) -> Path:
    """A cache directory with the jars and nothing else. (The session's broker has fetched them.)"""
    jars = Path(f"kafka-{KAFKA_VERSION}", "jars")
    cache_dir = tmp_path / "cache"
    (cache_dir / jars).mkdir(parents=True)
    for jar in kafka_jars(default_cache_dir()):
        (cache_dir / jars / jar.name).symlink_to(jar)
    return cache_dir


def test_the_start_up_cache_is_made_once_by_one_of_many(own_cache: Path, tmp_path: Path) -> None:
    java = find_java(kafka_jars(own_cache), "quick", own_cache / "aot")
    with ThreadPoolExecutor() as pool:
        work = (own_cache / "training", tmp_path / "checkpoint")
        made = list(pool.map(lambda _: train(java, *work, idle=False), range(3)))
    assert sorted(made) == [False, False, True]
    assert [path.name for path in (own_cache / "aot").iterdir()] == [java.aot_cache.name]
    assert not work[0].exists()
    with EmbeddedKafka(tmp_path / "kafka", cache_dir=own_cache, profile="quick") as broker:
        assert broker.pid is not None
        assert f"-XX:AOTCache={java.aot_cache}" in psutil.Process(broker.pid).cmdline()
    # Java did not refuse it.
    assert java.aot_cache.exists()


def test_a_damaged_start_up_cache_does_not_prevent_a_start(own_cache: Path, tmp_path: Path) -> None:
    java = find_java(kafka_jars(own_cache), "quick", own_cache / "aot")
    java.aot_cache.parent.mkdir()
    java.aot_cache.write_bytes(b"damaged")
    with EmbeddedKafka(tmp_path / "kafka", cache_dir=own_cache, profile="quick", startup_cache="off"):
        assert not java.aot_cache.exists()


# The jars


class Repository(ThreadingHTTPServer):
    """A Maven repository on the loopback interface that serves what a test puts into it, and counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RepositoryHandler)
        self.files: dict[str, bytes] = {}
        self.served: list[str] = []

    def add(self, name: str, content: bytes, *, locked: bytes | None = None) -> LockedJar:
        jar = LockedJar("org.example", name, "1.0", sha256=hashlib.sha256(locked or content).hexdigest())
        self.files[f"/{jar.repository_path}"] = content
        return jar


class RepositoryHandler(BaseHTTPRequestHandler):
    server: Repository

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if content is not None:
            self.server.served.append(self.path)
            time.sleep(0.05)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """The only Maven repository that this machine reaches, as its user has configured it."""
    with Repository() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        use_repository(server.server_port, tmp_path, monkeypatch)
        yield server
        server.shutdown()


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was ever fetched and nothing can be."""
    use_repository(choose_port(), tmp_path, monkeypatch)


def use_repository(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "jgo.conf"
    config.write_text(f"[repositories]\ncentral = http://127.0.0.1:{port}\n")
    monkeypatch.setenv("JGO_CONFIG_FILE", str(config))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "local"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("no_network")
def test_without_network_it_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedKafkaError) as failure:
        EmbeddedKafka(tmp_path / "kafka", cache_dir=tmp_path / "cache").start()
    message = str(failure.value)
    assert isinstance(failure.value, JarsUnavailableError)
    assert all(jar.coordinate in message for jar in load_lock())
    assert "Connection refused" in message
    assert "mvn dependency:get" in message
    assert "jgo.conf" in message


@pytest.mark.usefixtures("no_network", "kafka")
def test_the_cache_alone_suffices() -> None:
    assert len(kafka_jars(default_cache_dir())) == len(load_lock())


def test_the_lock_is_one_kafka_that_can_log() -> None:
    lock = load_lock()
    assert {jar.version for jar in lock if jar.group == "org.apache.kafka"} == {KAFKA_VERSION}
    assert {"kafka_2.13", "kafka-clients", "log4j-core", "log4j-slf4j-impl"} <= {jar.artifact for jar in lock}


def test_two_processes_fetch_each_jar_once(repository: Repository, tmp_path: Path) -> None:
    lock = [repository.add(f"jar-{index}", f"content {index}".encode()) for index in range(8)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda _: kafka_jars(tmp_path, lock=lock), range(2)))
    assert results[0] == results[1]
    assert [path.read_text() for path in results[0]] == [f"content {index}" for index in range(8)]
    assert len(repository.served) == 8
    assert len(list(results[0][0].parent.iterdir())) == 8


def test_what_the_repository_lacks_is_named(repository: Repository, tmp_path: Path) -> None:
    there, gone = repository.add("there", b"1"), repository.add("gone", b"2")
    del repository.files[f"/{gone.repository_path}"]
    with pytest.raises(JarsUnavailableError) as failure:
        kafka_jars(tmp_path, lock=[there, gone])
    assert gone.coordinate in str(failure.value)
    assert there.coordinate not in str(failure.value)


def test_a_repository_that_serves_another_jar_is_not_believed(repository: Repository, tmp_path: Path) -> None:
    jar = repository.add("changed", b"evil", locked=b"good")
    with pytest.raises(JarsMismatchError, match=f"repository serves as {jar.coordinate}"):
        kafka_jars(tmp_path, lock=[jar])
    assert not any(tmp_path.rglob(jar.filename))


def test_a_jar_that_changed_in_the_cache_is_refused(repository: Repository, tmp_path: Path) -> None:
    jar = repository.add("thing", b"good")
    [path] = kafka_jars(tmp_path, lock=[jar])
    path.write_bytes(b"evil")
    with pytest.raises(JarsMismatchError, match=f"{path} is not the released {jar.coordinate}.*{jar.sha256}"):
        kafka_jars(tmp_path, lock=[jar])


def test_the_local_maven_repository_comes_first_if_its_jar_is_right(repository: Repository, tmp_path: Path) -> None:
    jars = [repository.add("right", b"right"), repository.add("partial", b"partial")]
    for jar, content in zip(jars, (b"right", b"part"), strict=True):
        path = tmp_path / "local" / jar.repository_path
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    assert [path.read_bytes() for path in kafka_jars(tmp_path, lock=jars)] == [b"right", b"partial"]
    assert repository.served == [f"/{jars[1].repository_path}"]
