"""Making the start-up cache of `java.py`: once per machine, Java, Kafka and profile, out of everybody's way."""

import fcntl
import logging
import os
import shutil
import threading
import time
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tidegate.embedded.broker_files import BrokerFiles, plain_listeners
from tidegate.embedded.broker_process import BrokerProcess, format_if_needed
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.java import Java
from tidegate.embedded.ports import LOOPBACK, choose_port

TRAINING_HEAP_MB = 256
TRAINING_START_TIMEOUT_S = 180.0
TRAINING_END_TIMEOUT_S = 300.0
EXERCISE_TIMEOUT_S = 30.0
UNUSED_DAYS = 30

_log = logging.getLogger(__name__)


def train_in_background(java: Java, work_dir: Path, checkpoint_path: Path) -> None:
    """Begin `train_or_go_on` on a thread of its own, if the cache is not there. Does not block.

    If this process ends first, so does the training; the next process begins again.
    """
    if not java.aot_cache.exists():
        arguments = (java, work_dir, checkpoint_path)
        threading.Thread(
            target=train_or_go_on, args=arguments, kwargs={"idle": True}, name="tidegate-aot-training", daemon=True
        ).start()


def train(java: Java, work_dir: Path, checkpoint_path: Path, *, idle: bool) -> bool:
    """Run a broker on an empty directory, exercise it, and keep what its virtual machine learnt as `java.aot_cache`.

    Blocks for 10 s of processor time; with `idle`, of time that nobody else wants. Returns False at once if another
    process is at it. The cache appears by a rename, whole or not at all. Raises EmbeddedKafkaError, KafkaException or
    OSError.
    """
    work_dir.parent.mkdir(parents=True, exist_ok=True)
    with work_dir.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if java.aot_cache.exists():
            return True
        try:
            return _record(java, work_dir, checkpoint_path, idle=idle)
        finally:
            # Also what a killed predecessor left.
            shutil.rmtree(work_dir, ignore_errors=True)


def train_or_go_on(java: Java, work_dir: Path, checkpoint_path: Path, *, idle: bool) -> None:
    """As `train`, but what goes wrong is only logged: a broker starts without a cache too, just slower."""
    try:
        train(java, work_dir, checkpoint_path, idle=idle)
    except (EmbeddedKafkaError, OSError, KafkaException) as error:
        _log.info("No start-up cache for Kafka was made, starts stay slower: %s", error)


def mark_used(java: Java) -> None:
    """Remember that the cache is in use, so that `_forget_unused` leaves it."""
    if java.aot_cache.exists():
        os.utime(java.aot_cache)


def _record(java: Java, work_dir: Path, checkpoint_path: Path, *, idle: bool) -> bool:
    shutil.rmtree(work_dir, ignore_errors=True)
    files = BrokerFiles(work_dir / "broker")
    recorded = work_dir / java.aot_cache.name
    port = choose_port()
    controller_port = choose_port(avoid=frozenset({port}))
    files.write_config(plain_listeners(LOOPBACK, LOOPBACK, port, controller_port), controller_port, {})
    format_if_needed(java, files, checkpoint_path)
    broker = BrokerProcess.launch(java, files, port, heap_mb=TRAINING_HEAP_MB, record_to=recorded, idle=idle)
    broker.wait_ready(TRAINING_START_TIMEOUT_S)
    try:
        _exercise(f"{LOOPBACK}:{port}")
        ended = broker.terminate(TRAINING_END_TIMEOUT_S)
    finally:
        broker.kill()
    if not ended or not recorded.exists():
        raise EmbeddedKafkaError(f"Java recorded no start-up cache: {' '.join(files.output_lines()[-3:])}")
    java.aot_cache.parent.mkdir(parents=True, exist_ok=True)
    recorded.replace(java.aot_cache)
    _forget_unused(java.aot_cache.parent)
    return True


def _exercise(bootstrap: str) -> None:
    """What every user of a broker does first: topics, records, a consumer group."""
    connect: dict[str, str | int | float | bool] = {"bootstrap.servers": bootstrap, "log_level": 0}
    topic = NewTopic("training", num_partitions=2, config={"cleanup.policy": "compact"})
    admin = AdminClient(connect)
    admin.create_topics([topic])["training"].result(EXERCISE_TIMEOUT_S)
    producer = Producer(connect | {"enable.idempotence": True})
    for index in range(100):
        producer.produce("training", key=str(index % 10), value=b"x" * 100)
    producer.flush(EXERCISE_TIMEOUT_S)
    consumer = Consumer(connect | {"group.id": "training", "auto.offset.reset": "earliest"})
    consumer.subscribe(["training"])
    deadline = time.monotonic() + EXERCISE_TIMEOUT_S
    consumed = 0
    while consumed < 100 and time.monotonic() < deadline:
        consumed += len(consumer.consume(100, timeout=0.2))
    consumer.close()


def _forget_unused(directory: Path) -> None:
    """Remove the caches of Javas, profiles and versions that nobody started lately: 60 MB each."""
    long_ago = time.time() - UNUSED_DAYS * 24 * 3600
    for path in directory.glob("*.aot"):
        if path.stat().st_mtime < long_ago:
            path.unlink(missing_ok=True)
