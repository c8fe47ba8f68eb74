"""Faults of the broker and of the way to it: what services say, that they do no harm, and that they go on when it is mended."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from support.load import Load
from support.lossy import LossyWay
from support.stack import RUNS, WholeStack, assert_whole, eventually
from tidegate import codec
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import RunCommand
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog import owner
from tidegate.eventlog.interface import EventLogError, Message, Record, TopicPartition, WriteFailedError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.eventlog.owner import OwnerLoop
from tidegate.eventlog.settings import KafkaSettings
from tidegate.scheduler.service import SchedulerMachine
from tidegate.sdk.client import Client
from tidegate.topics.apply import apply
from tidegate.topics.declaration import load_topics

SCHEDULER, GATE, EXECUTOR = "scheduler-0", "gate-0", "executor-default-0"
RUN_COUNT = 40
STILL_S = 12.0  # sessions and leases are 10
# Far more than the services say, far less than their clients' tries: those are 36 a second in each process.
FEW_LINES = 30
FULL_MB = 192


class Logs:
    """What the processes of a stack have logged since this was made."""

    def __init__(self, stack: WholeStack) -> None:
        self._stack = stack
        self._began = {name: self._path(name).stat().st_size for name in stack.pids}

    def _path(self, name: str) -> Path:
        return self._stack.stack.log_path(name)

    def lines(self, name: str) -> list[str]:
        """Return the lines of a process."""
        with self._path(name).open(encoding="utf-8", errors="replace") as file:
            file.seek(self._began[name])
            return file.read().splitlines()

    def says(self, name: str, pattern: str) -> bool:
        """Tell whether some line of a process matches."""
        return any(re.search(pattern, line) for line in self.lines(name))

    def until(self, name: str, pattern: str) -> None:
        """Wait until a process says so."""
        eventually(lambda: self.says(name, pattern), f"{name} to say {pattern!r}", 120.0)

    def until_all(self, pattern: str) -> None:
        """Wait until every process has said so."""
        for name in self._began:
            self.until(name, pattern)


# --- away for a while ---------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """One of everything, and the broker that the other tests of this module use too, under prefixes of their own."""
    with WholeStack(tmp_path_factory.mktemp("faults"), slots=24) as stack:
        yield stack


def kafka_of(stack: WholeStack) -> EmbeddedKafka:
    assert stack.stack.kafka is not None
    return stack.stack.kafka


@pytest.mark.feature("D1")
def test_the_broker_is_killed_under_load(stack: WholeStack) -> None:
    """If that takes longer than leases and deadlines, processes may end and come back; nothing else changes."""
    load, logs = Load(stack), Logs(stack)
    load.until_effects(1.0)
    ends = stack.ends()
    kafka_of(stack).kill()
    logs.until_all("Connection refused|Disconnected|disconnected")
    kafka_of(stack).restart()
    load.finish(may_restart=list(stack.pids))
    load.assert_was_in_the_middle(ends)
    for name in stack.pids:
        client_lines = [line for line in logs.lines(name) if '"logger": "tidegate.eventlog' in line]
        assert len(client_lines) <= FEW_LINES, "\n".join(client_lines[-FEW_LINES:])


@pytest.mark.feature("D1")
def test_the_broker_stands_still_for_longer_than_any_session(stack: WholeStack) -> None:
    """As when its machine is moved, or its disk hangs: every lease and every place in a group lapses at once."""
    load = Load(stack, RUN_COUNT)
    load.until_effects(1.0)
    ends, pid = stack.ends(), kafka_of(stack).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STILL_S)
    os.kill(pid, signal.SIGCONT)
    later = Load(stack, RUN_COUNT)  # whoever reads requests has its place back too
    later.until_effects(1.0)
    for runs in (load, later):
        runs.finish(may_restart=list(stack.pids))
    load.assert_was_in_the_middle(ends)


@pytest.mark.parametrize(
    "ask",
    [
        lambda broker: broker.describe(["run-events"]),
        lambda broker: broker.offsets("run-events", 0),
        lambda broker: Client(broker).pause_queue("default"),
    ],
    ids=["topics", "offsets", "a row to be written"],
)
def test_a_wrong_address_is_said_at_once_and_with_the_reason(ask: Callable[[KafkaBroker], object]) -> None:
    broker = KafkaBroker(KafkaSettings(bootstrap="127.0.0.1:1"))
    with pytest.raises(EventLogError, match=r"no broker answers at 127\.0\.0\.1:1 .*Connection refused.*BOOTSTRAP"):
        ask(broker)


def test_offsets_are_not_waited_for_for_ever(stack: WholeStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who resets them has scaled somebody down, and must come back to scale it up."""
    start = {TopicPartition(RUNS, 0): 0}
    pid = kafka_of(stack).pid
    assert pid is not None
    with monkeypatch.context() as patched:
        patched.setattr("tidegate.eventlog.kafka.clients.REQUEST_TIMEOUT_S", 1.0)
        patched.setattr("tidegate.eventlog.kafka.clients.LEAVE_TIMEOUT_S", 1.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(EventLogError, match=r"no answer about .* nobody .*whether they were set is not known"):
                stack.broker.reset_group("nobody", start)
        finally:
            os.kill(pid, signal.SIGCONT)
    stack.broker.reset_group("nobody", start)
    assert stack.broker.committed("nobody", RUNS) == {0: 0}


# --- a full disk ---------------------------------------------------------------


class Disk:
    """A place for a broker's files that can be made full, and empty again."""

    def __init__(self, folder: Path, *, is_mounted: bool) -> None:
        self.folder = folder
        self.is_mounted = is_mounted

    def fill(self, kafka: EmbeddedKafka) -> None:
        """Let no byte more be written."""
        if not self.is_mounted:
            assert kafka.pid is not None
            resource.prlimit(kafka.pid, resource.RLIMIT_FSIZE, (0, 0))
            return
        for name, size in (("filler", 1 << 20), ("crumbs", 1 << 8)):
            with suppress(OSError), (self.folder / name).open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(size))

    def make_room(self) -> None:
        """A broker that is started after this can write again."""
        for name in ("filler", "crumbs"):
            (self.folder / name).unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small file system of its own if we may mount one (root); else a limit on the size of the broker's files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={FULL_MB}m", "tidegate-test", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(mounting, check=False, capture_output=True).returncode == 0
    yield Disk(folder, is_mounted=is_mounted)
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.feature("D1")
def test_a_full_disk_stops_everything_and_harms_nothing(disk: Disk, tmp_path: Path) -> None:
    with EmbeddedKafka(disk.folder / "kafka", profile="quick") as kafka:
        settings = KafkaSettings(bootstrap=kafka.bootstrap)
        with WholeStack(tmp_path / "stack", kafka=settings, slots=24) as stack:
            load, logs = Load(stack), Logs(stack)
            load.until_effects(1.0)
            ends = stack.ends()
            disk.fill(kafka)
            eventually(lambda: not kafka.is_running, "the broker to give up", 120.0)
            logs.until_all("Connection refused|Disconnected|disconnected")
            if disk.is_mounted:
                with pytest.raises(EmbeddedKafkaError, match="The disk is full"):
                    kafka.restart()
            disk.make_room()
            kafka.restart()
            load.finish(may_restart=list(stack.pids))
            load.assert_was_in_the_middle(ends)


# --- answers that get lost ---------------------------------------------------------------


@pytest.fixture
def lossy_broker(lossy: LossyWay, topic_prefix: str) -> Iterator[KafkaBroker]:
    broker = KafkaBroker(KafkaSettings(bootstrap=lossy.address, topic_prefix=topic_prefix))
    apply(broker, load_topics(queues=["default"]))
    yield broker
    broker.close()


def test_a_writer_whose_answers_get_lost_doubles_and_loses_nothing(lossy: LossyWay, lossy_broker: KafkaBroker) -> None:
    writer = lossy_broker.writer()
    acked: list[int] = []
    lossy.lose_every = 3
    before = lossy.lost
    for batch in range(40):
        for number in range(10):
            writer.send(Record(RUNS, 0, b"k", b"%d" % (batch * 10 + number)), acked.append)
        writer.flush(60.0)
    lossy.lose_every = 0
    writer.close()
    assert lossy.lost - before >= 10
    assert acked == list(range(400))
    written = [int(message.value or b"") for message in lossy_broker.read(RUNS, 0, 0, 400)]
    assert written == list(range(400))
    assert lossy_broker.offsets(RUNS, 0).end == 400


@pytest.mark.feature("D1")
def test_runs_go_on_while_answers_to_all_services_get_lost(lossy: LossyWay, topic_prefix: str, tmp_path: Path) -> None:
    settings = KafkaSettings(bootstrap=lossy.address, topic_prefix=topic_prefix)
    with WholeStack(tmp_path / "stack", kafka=settings, slots=24) as stack:
        before = lossy.lost
        lossy.lose_every = 10
        load = Load(stack, RUN_COUNT)
        load.until_effects(4)
        lossy.lose_every = 0
        load.finish(may_restart=list(stack.pids))
        assert lossy.lost - before >= 10


@pytest.mark.feature("D1")
def test_an_owner_that_never_hears_of_its_entry_ends_and_the_next_one_finds_it(
    lossy: LossyWay, lossy_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {name: found.partition_count for name, found in lossy_broker.describe([RUNS, "gate-requests"]).items()}

    def an_owner() -> OwnerLoop:
        loop = OwnerLoop(lossy_broker, SchedulerMachine(counts[RUNS], counts["gate-requests"]), SCHEDULER)
        loop.start()
        eventually(lambda: (loop.run_once(0.05), len(loop.owned) == counts[RUNS])[1], "all partitions")
        return loop

    first = an_owner()
    partition, end = 0, lossy_broker.offsets(RUNS, 0).end
    command(lossy_broker, partition)
    monkeypatch.setattr(owner, "WRITE_DEADLINE_S", 2.0)
    lossy.lose_every = -1
    with pytest.raises(WriteFailedError, match="not acknowledged"):
        eventually(lambda: first.run_once(0.05) < 0, "the owner to give up")
    lossy.lose_every = 0
    monkeypatch.undo()
    for part in (first._inbox, first._log_writer, first._tell_writer):
        part.close()
    assert lossy_broker.offsets(RUNS, partition).end == end + 1, "the broker has it: only the answer was lost"

    second = an_owner()
    for _ in range(5):
        second.run_once(0.05)
    records = [codec.decode(m.value) for m in lossy_broker.read(RUNS, partition, end, end + 2)]
    assert [type(record).__name__ for record in records] == ["Entry", "OwnerAnnounced"]
    assert lossy_broker.offsets(RUNS, partition).end == end + 2, "it decided again on what was decided"
    second.close()


@pytest.mark.feature("D1")
def test_a_reader_whose_group_moves_while_it_asks_for_its_offsets_reads_on(
    lossy: LossyWay, lossy_broker: KafkaBroker, topic_prefix: str
) -> None:
    """Kafka's own client asks once (librdkafka issue 5586), and would then read nothing for as long as it lives."""
    settings = KafkaSettings(bootstrap=lossy.address, topic_prefix=topic_prefix)
    first = KafkaSubscription(settings, "readers", ["run-requests"], "reader-0")
    writer = lossy_broker.writer()

    def read(subscription: KafkaSubscription, value: bytes) -> Message:
        writer.send(Record("run-requests", 1, b"k", value))
        writer.flush(60.0)
        found: list[Message] = []
        eventually(lambda: found.extend(subscription.poll(10, 0.1)) or found, "a message", 60.0)
        (message,) = found
        assert message.value == value
        return message

    def begin(subscription: KafkaSubscription) -> dict[TopicPartition, int | None]:
        eventually(lambda: subscription.poll(10, 0.1) or subscription.assigned, "partitions", 60.0)
        return dict(subscription.take_changes().gained)

    at = TopicPartition("run-requests", 1)
    lossy.deny_offsets = 2
    gained = begin(first)
    assert (lossy.deny_offsets, gained.keys(), set(gained.values())) == (0, first.assigned, {None})
    first.commit({at: read(first, b"one").offset + 1})
    first.close()

    second = KafkaSubscription(settings, "readers", ["run-requests"], "reader-0")
    lossy.deny_offsets = 2
    assert begin(second)[at] == 1
    assert read(second, b"two").offset == 1, "what was committed is not read again"
    second.close()


def test_a_reader_whose_place_another_process_took_ends(
    lossy: LossyWay, topic_prefix: str, lossy_broker: KafkaBroker
) -> None:
    settings = KafkaSettings(bootstrap=lossy.address, topic_prefix=topic_prefix, heartbeat_interval_ms=200)
    first = KafkaSubscription(settings, "readers", ["run-requests"], "reader-0")
    eventually(lambda: first.poll(10, 0.1) or first.assigned, "partitions", 60.0)
    second = KafkaSubscription(settings, "readers", ["run-requests"], "reader-0")
    eventually(lambda: second.poll(10, 0.1) or second.assigned, "partitions", 60.0)
    with pytest.raises(EventLogError, match="fenced by other consumer"):
        eventually(lambda: first.poll(10, 0.1), "the first one to end", 60.0)
    second.close()
    first.close()


def command(broker: KafkaBroker, partition: int) -> None:
    """Ask for something that a run which does not exist refuses: one entry, and nothing else."""
    count = broker.describe([RUNS])[RUNS].partition_count
    run_id = next(name for n in itertools.count() if partition_of(name := f"nobody-{n}", count) == partition)
    wish = RunCommand(
        run_id=run_id,
        command_id=uuid.uuid4().hex,
        type="cancel",
        source="run-requests:0:0",
        content_hash="",
        original=b"",
    )
    writer = broker.writer()
    writer.send(Record("run-commands", partition, wish.command_id.encode(), codec.encode(wish)))
    writer.flush(60.0)
    writer.close()


# --- topics that are not what they were ---------------------------------------------------------------


@pytest.fixture
def beside(stack: WholeStack, topic_prefix: str, tmp_path: Path) -> Iterator[WholeStack]:
    """A small stack on the module's broker whose topics a test may ruin."""
    settings = KafkaSettings(bootstrap=stack.stack.settings.bootstrap, topic_prefix=topic_prefix)
    variables = {"TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": "6000"}
    with WholeStack(tmp_path / "beside", kafka=settings, slots=8, env=variables) as small:
        for number in range(12):
            small.client.start("chain", number, run_id=f"before-{number}", budget_micros=1_000)
        for number in range(12):
            small.wait(f"before-{number}")
        yield small


def delete(stack: WholeStack, topic: str) -> None:
    physical = stack.broker.physical_name(topic)
    stack.broker.admin_client().delete_topics([physical])[physical].result(60)
    eventually(lambda: not stack.broker.describe([topic]), f"{topic} to be gone")


def make_again(stack: WholeStack, topic: str) -> None:
    apply(stack.broker, [declared for declared in load_topics(queues=["default"]) if declared.name == topic])


@pytest.mark.feature("D1")
def test_topics_that_hold_no_truth_may_be_deleted_and_made_again(beside: WholeStack) -> None:
    """Tasks, the registry, snapshots: who reads them says what happened, ends, and goes on with the new ones."""
    for topic, reader in (("step-tasks.default", EXECUTOR), ("instances", GATE)):
        logs = Logs(beside)
        delete(beside, topic)
        make_again(beside, topic)
        logs.until(reader, rf"{topic} .*(made again|does not exist)")
        beside.wait(beside.client.start("chain", 1, run_id=f"after-{topic}", budget_micros=1_000))
    delete(beside, "run-snapshots")
    make_again(beside, "run-snapshots")
    beside.expect_any_pid(beside.pids)
    beside.kill(SCHEDULER)
    beside.wait(beside.client.start("chain", 1, run_id="after-run-snapshots", budget_micros=1_000))
    assert_whole(beside)


@pytest.mark.feature("D1")
@pytest.mark.parametrize(("log", "process"), [("run-events", SCHEDULER), ("gate-ledger", GATE)])
def test_a_log_that_was_made_again_is_refused_for_good(beside: WholeStack, log: str, process: str) -> None:
    """To go on would repeat everything that is still in the inputs: days of it."""
    entered, logs = len(beside.entered()), Logs(beside)
    delete(beside, log)
    make_again(beside, log)
    for number in range(12):
        beside.client.start("chain", number, run_id=f"after-{number}", budget_micros=1_000)
    logs.until(process, f"{log} was deleted and made again while its owner was at work.*Restore it from a backup")
    # What it was surprised in the middle of may be in the new one.
    logs.until(process, f"{log}(-. begins with an entry.*)?: it was deleted and made again.*Restore it from a backup")
    written = {message.key for messages in beside.log(log) for message in messages}
    assert not [key for key in written if b"before-" in (key or b"")], "it has begun to repeat"
    assert len(beside.entered()) == entered


@pytest.mark.feature("D1")
def test_an_input_that_was_cut_or_made_again_is_refused(beside: WholeStack) -> None:
    os.kill(beside.pids[SCHEDULER], signal.SIGSTOP)
    partition = max(range(beside.counts["run-commands"]), key=lambda p: beside.broker.offsets("run-commands", p).end)
    command(beside.broker, partition)
    end = beside.broker.offsets("run-commands", partition).end
    assert end > 1
    cut = KafkaPartition(beside.broker.physical_name("run-commands"), partition, end)
    for future in beside.broker.admin_client().delete_records([cut]).values():
        future.result(60)
    logs = Logs(beside)
    beside.kill(SCHEDULER)
    logs.until(SCHEDULER, f"run-commands-{partition} begins at offset {end}, but run-events has consumed it only up to")
    assert logs.says(SCHEDULER, "messages were deleted unread. Restore the topic")

    delete(beside, "run-commands")
    make_again(beside, "run-commands")
    logs = Logs(beside)
    for _ in range(2 * end):  # beyond what the log has consumed of the old one
        command(beside.broker, partition)
    logs.until(SCHEDULER, "run-commands had the topic id .* when an owner of run-events began to consume it")
    assert logs.says(SCHEDULER, "offsets mean nothing in it. Restore it from a backup")


@pytest.mark.feature("D1")
def test_a_topic_that_is_missing_is_waited_for(beside: WholeStack) -> None:
    logs = Logs(beside)
    delete(beside, "run-commands")
    beside.client.start("chain", 1, budget_micros=1_000)
    # The client may tell of the broker that it needs no more before it tells of the topic.
    logs.until(SCHEDULER, "writing to .*run-commands .* failed: (.*it does not exist|_DESTROY)")
    logs.until(SCHEDULER, "topics missing: run-commands; create them with `tidegate topics apply`")


# --- settings that could lose what was acknowledged ---------------------------------------------------------------


@pytest.mark.feature("K2")
def test_unsafe_settings_are_refused_at_start_in_production(beside: WholeStack, tmp_path: Path) -> None:
    unsafe = {
        ("run-events", "unclean.leader.election.enable"): "true",
        ("run-events", "cleanup.policy"): "compact,delete",
        ("run-commands", "retention.ms"): "1000",
        ("run-commands", "min.compaction.lag.ms"): "1000",
        ("step-results", "retention.bytes"): "1000000",
    }
    for (topic, name), value in unsafe.items():
        resource_ = ConfigResource(ResourceType.TOPIC, beside.broker.physical_name(topic))
        resource_.add_incremental_config(ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET))
        for future in beside.broker.admin_client().incremental_alter_configs([resource_]).values():
            future.result(60)
    settings = beside.stack.settings
    environment = {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": settings.bootstrap,
        "TIDEGATE_KAFKA_TOPIC_PREFIX": settings.topic_prefix,
        "TIDEGATE_INSTANCE_ID": "scheduler-1",
        "TIDEGATE_TOPICS_PRODUCTION": "true",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tidegate.scheduler"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    (said,) = [json.loads(line)["error"] for line in done.stderr.splitlines() if '"level": "error"' in line]
    for topic, name in unsafe:
        assert f"{topic}: {name} is" in said
    assert "run-events: replication factor is 1, declared is 3" in said
    assert "run-events: min.insync.replicas is 1, declared is 2" in said
