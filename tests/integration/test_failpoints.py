"""Every failpoint in the source: a process is killed exactly there while runs are under way, and nothing is lost or doubled.

One process of each service, as by default: nobody else can go on while it is away.
"""

from __future__ import annotations

import ast
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

import tidegate
from support.arming import Arming, until_stopped
from support.load import LONG_S, STEPS, Load, owners
from support.stack import WholeStack, eventually
from tidegate.cli.addresses import AddressError, read_address
from tidegate.cli.live_view import LiveView, LiveViewError
from tidegate.embedded import sql
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.eventlog.settings import KafkaSettings
from tidegate.registry.process import boottime_s

RUN_COUNT = 30
# Where others must notice that somebody is gone: soon, but not so soon that a busy machine looks like a death.
SHORT_S = 4
MISSED_SOON = {"TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": str(SHORT_S * 1000), "TIDEGATE_EXECUTOR_LEASE_S": str(SHORT_S)}
EXIT_LEASE_LAPSED = 70
EXECUTOR, PROJECTION, GATEWAY = "executor-default-0", "projection-0", "gateway-0"
OWNERS = ("scheduler-0", "gate-0")
# What an owner reads that others write, by process: where bytes that are no Avro become a dead letter.
INPUTS = {"scheduler-0": "run-commands", "gate-0": "gate-requests"}


class Edge(NamedTuple):
    """Who comes to a failpoint, and when.

    work: in the middle of the runs, at the `at`-th pass. start: when it is started again under load. untold: at a start after
    a death that left tells unsent. letter: when it is given what it cannot read. term: when it is told to end.
    """

    processes: tuple[str, ...]
    when: Literal["work", "start", "untold", "letter", "term"] = "work"
    at: int = 1


EDGES = {
    "owner.after-poll": Edge(OWNERS, at=20),
    "owner.before-entry": Edge(OWNERS, at=20),
    "owner.before-log": Edge(OWNERS, at=20),
    "owner.after-log": Edge(OWNERS, at=10),
    "owner.between-tells": Edge(OWNERS, at=20),
    "owner.after-tell": Edge(OWNERS, at=10),
    "owner.before-commit": Edge(OWNERS),
    "owner.after-commit": Edge(OWNERS),
    "owner.before-dead-letter": Edge(OWNERS, "letter"),
    "owner.after-dead-letter": Edge(OWNERS, "letter"),
    "owner.after-announce": Edge(OWNERS, "start", at=2),
    "owner.after-restore": Edge(OWNERS, "start", at=2),
    "owner.before-telling-again": Edge(OWNERS, "untold"),
    "owner.after-telling-again": Edge(OWNERS, "untold"),
    "owner.after-take-over": Edge(OWNERS, "start", at=2),
    "owner.before-close": Edge(OWNERS, "term"),
    "owner.after-announce-again": Edge(OWNERS, at=2),
    "owner.after-last-flush": Edge(OWNERS, "term"),
    "checkpoint.begun": Edge(OWNERS, at=2),
    "checkpoint.before-certify": Edge(OWNERS, at=2),
    "checkpoint.after-certify": Edge(OWNERS, at=2),
    "admission.after-poll": Edge(("scheduler-0",)),
    "admission.before-flush": Edge(("scheduler-0",)),
    "admission.before-commit": Edge(("scheduler-0",)),
    "admission.after-commit": Edge(("scheduler-0",)),
    "registry.before-register": Edge((EXECUTOR,), "start"),
    "registry.after-register": Edge((EXECUTOR,), "start"),
    "registry.before-heartbeat": Edge((EXECUTOR,)),
    "registry.before-heartbeat-ack": Edge((EXECUTOR,)),
    "registry.before-farewell": Edge((EXECUTOR,), "term"),
    "registry.after-farewell": Edge((EXECUTOR,), "term"),
    "executor.task-received": Edge((EXECUTOR,), at=20),
    "executor.task-taken": Edge((EXECUTOR,), at=20),
    "executor.before-enter": Edge((EXECUTOR,), at=20),
    "executor.after-function": Edge((EXECUTOR,), at=20),
    "executor.before-result": Edge((EXECUTOR,), at=20),
    "executor.before-result-ack": Edge((EXECUTOR,), at=20),
    "executor.after-result-ack": Edge((EXECUTOR,), at=20),
    "executor.draining": Edge((EXECUTOR,), "term"),
    "executor.before-close": Edge((EXECUTOR,), "term"),
    "executor.after-last-results": Edge((EXECUTOR,), "term"),
    "projection.after-poll": Edge((PROJECTION,), at=3),
    "projection.before-insert": Edge((PROJECTION,), at=2),
    "projection.between-tables": Edge((PROJECTION,), at=2),
    "projection.after-insert": Edge((PROJECTION,), at=2),
    "projection.before-commit": Edge((PROJECTION,), at=2),
    "projection.after-commit": Edge((PROJECTION,), at=2),
    "projection.before-last-commit": Edge((PROJECTION,), "term"),
    "gateway.after-restore": Edge((GATEWAY,), "start"),
    "gateway.before-fold": Edge((GATEWAY,), at=2),
    "gateway.before-changelog-acks": Edge((GATEWAY,), at=2),
    "gateway.after-changelog-acks": Edge((GATEWAY,), at=2),
    "gateway.after-acks": Edge((GATEWAY,), at=2),
}


def together(*columns: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the failpoints to be killed at in the same runs, joined: one of each column, as no process is in two of them."""
    names = [[point for point, edge in EDGES.items() if edge.processes in column] for column in columns]
    return ["+".join(filter(None, points)) for points in itertools.zip_longest(*names)]


CORE_CASES = together([("scheduler-0",), OWNERS], [(EXECUTOR,)])
VIEW_CASES = together([(PROJECTION,)], [(GATEWAY,)])


def failpoints_in_source() -> list[str]:
    """Return the names of all failpoints. Each must be written where it is, so that it can be found."""
    found = []
    for path in sorted(Path(tidegate.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}:{node.lineno}: a failpoint's name must be a literal"
                found.append(str(name.value))
    return found


def test_every_failpoint_in_the_source_is_killed_at() -> None:
    found = failpoints_in_source()
    assert len(found) == len(set(found)), "two failpoints have one name"
    others = "".join((Path(__file__).parent / name).read_text() for name in ("test_replay.py", "test_retirement.py"))
    elsewhere = {name for name in found if f'"{name}=kill' in others}
    assert set(found) == EDGES.keys() | elsewhere
    assert sorted("+".join(CORE_CASES + VIEW_CASES).split("+")) == sorted(EDGES)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """A broker that lets groups notice deaths soon."""
    config = {"group.min.session.timeout.ms": "1000"}
    with EmbeddedKafka(tmp_path_factory.mktemp("broker"), profile="quick", extra_config=config) as broker:
        yield broker


# So that every life of an owner begins with a snapshot, too.
OFTEN = {"TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "20", "TIDEGATE_CHECKPOINT_EVERY_S": "0.5"}


@contextmanager
def a_stack(broker: EmbeddedKafka, folder: Path, names: Sequence[str], **options: Any) -> Iterator[Armed]:
    kafka = KafkaSettings(bootstrap=broker.bootstrap, topic_prefix=f"{folder.name}.")
    arming = Arming(folder / "armed", names)
    with WholeStack(folder / "stack", kafka=kafka, slots=24, process_env=arming.process_env, **options) as stack:
        yield Armed(stack, arming)


class Armed(NamedTuple):
    """A stack whose processes can be armed."""

    stack: WholeStack
    arming: Arming


@pytest.fixture(scope="module")
def core(broker: EmbeddedKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    """One of everything that runs need."""
    with a_stack(broker, tmp_path_factory.mktemp("core"), (*OWNERS, EXECUTOR), env=OFTEN) as armed:
        yield armed


@pytest.fixture(scope="module")
def views(broker: EmbeddedKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    """One of everything, to look at the views."""
    services = ("scheduler", "gate", "projection", "gateway")
    folder = tmp_path_factory.mktemp("views")
    with a_stack(broker, folder, (PROJECTION, GATEWAY), services=services, env=MISSED_SOON) as armed:
        yield armed


@pytest.fixture(scope="module")
def pairs(broker: EmbeddedKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    """Two of everything that runs need."""
    instances = {"scheduler": 2, "gate": 2}
    folder = tmp_path_factory.mktemp("pairs")
    with a_stack(
        broker, folder, (*OWNERS, EXECUTOR), instances=instances, executors=2, env=MISSED_SOON | OFTEN
    ) as armed:
        yield armed


# --- killed ---------------------------------------------------------------


@pytest.mark.feature("D1")
@pytest.mark.parametrize("points", CORE_CASES)
def test_killed_at_failpoints(core: Armed, points: str) -> None:
    """Where several processes come to a failpoint, all of them die there."""
    kill_at(core, points.split("+"))


@pytest.mark.feature("D1", "O1")
@pytest.mark.parametrize("points", VIEW_CASES)
def test_views_killed_at_failpoints(views: Armed, points: str) -> None:
    load = kill_at(views, points.split("+"))
    assert_seen(views.stack, load)


def kill_at(armed: Armed, points: Sequence[str]) -> Load:
    stack, arming = armed
    stack.expect_any_pid(stack.pids)  # whatever became of the test before
    deaths = [(process, point, EDGES[point]) for point in points for process in EDGES[point].processes]
    letters = []
    for process, point, edge in deaths:
        if edge.when in ("work", "letter"):
            arming.now(stack, process, f"{point}=kill@{edge.at}")
        if edge.when == "letter":
            letters.append(stack.produce(INPUTS[process], b"no Avro at all", partition=0))
    load = Load(stack, RUN_COUNT)
    if any(edge.when not in ("work", "letter") for _, _, edge in deaths):
        load.until_effects(0.5)
    for process, point, edge in deaths:
        if edge.when not in ("work", "letter"):
            bring(armed, process, f"{point}=kill@{edge.at}", edge.when)
    for process, point, _ in deaths:
        stack.expect_other_pid(process)
        assert stack.last_exit(process) == -signal.SIGKILL, f"{process} did not die at {point}:\n{stack.log_tail()}"
    load.finish()
    for letter in letters:
        stack.letter(letter)
    return load


def bring(armed: Armed, process: str, failpoint: str, when: str) -> None:
    """Bring a process that is at work to where its failpoint is."""
    stack, arming = armed
    if when == "start":
        arming.at_start(process, failpoint)
        stack.kill(process)
    elif when == "untold":
        arming.now(stack, process, "owner.after-log=kill")
        arming.at_start(process, failpoint)
        stack.expect_other_pid(process)
    else:
        arming.now(stack, process, failpoint)
        os.kill(stack.pids[process], signal.SIGTERM)


def assert_seen(stack: WholeStack, load: Load) -> None:
    """Check that tables and live view show the runs as they ended, and every event once."""
    sql.wait_caught_up(stack.stack.data_dir, sql.log_ends(stack.broker), 60.0)
    prefix = load.runs[0].rpartition("-")[0]
    query = f"SELECT run_id, count() AS n, max(seq) AS last FROM events WHERE startsWith(run_id, '{prefix}') GROUP BY run_id"
    rows = sql.query(stack.stack.data_dir, query)
    assert {row["run_id"] for row in rows} == set(load.runs)
    assert all(int(row["n"]) == int(row["last"]) for row in rows), rows
    eventually(lambda: set(load.runs) <= succeeded(stack), "the live view of all runs")


def succeeded(stack: WholeStack) -> set[str]:
    """Return the runs that the live view shows as succeeded; none while it is away or being restored."""
    try:
        url = read_address(stack.stack.data_dir / "gateway.json", "gateway")["url"]
        found: list[dict[str, Any]] = LiveView(url).runs({"limit": 2 * RUN_COUNT, "status": "succeeded"})["runs"]
    except (AddressError, LiveViewError):
        return set()
    return {run["run_id"] for run in found}


# What was logged is not told yet, what was admitted and what was done are not acknowledged.
AGAIN = {
    "scheduler-0": "owner.after-log=kill@120,admission.before-commit=kill@2",
    "gate-0": "owner.after-log=kill@100",
    EXECUTOR: "executor.before-result-ack=kill@150",
}


@pytest.mark.feature("D1", "T3")
def test_killed_again_and_again_where_it_hurts_most(core: Armed) -> None:
    """Every life of each process ends at its edge, as long as there is work."""
    stack, arming = core
    before = {status.name: status.restarts for status in stack.stack.status()}
    for process, edges in AGAIN.items():
        arming.now(stack, process, edges)
    load = Load(stack)

    def are_done() -> bool:
        for process, edges in AGAIN.items():
            if arming.is_heard(process):
                arming.at_start(process, edges)
        return load.has_effects(len(STEPS))

    eventually(are_done, "all effects", LONG_S)
    stack.expect_any_pid(AGAIN)
    for process in AGAIN:
        arming.now(stack, process, "")
    load.finish(may_restart=AGAIN)
    for status in stack.stack.status():
        if status.name in AGAIN:
            assert status.restarts > before[status.name], f"{status.name} never came to its edge"


# --- stopped ---------------------------------------------------------------

# Where an owner is stopped, and where an executor is: others take their work over while they sleep, and then they go on.
STOPS = {
    "owner.after-poll": "executor.task-received",
    "owner.before-entry": "executor.task-taken",
    "owner.after-log": "executor.before-enter",
    "owner.between-tells": "executor.after-function",
    "checkpoint.before-certify": "executor.before-result",
    "owner.after-announce": "executor.before-result-ack",
    "owner.after-restore": "registry.before-heartbeat",
}


@pytest.mark.feature("D1", "T3")
@pytest.mark.parametrize("point", STOPS)
def test_who_wakes_at_a_failpoint_after_others_took_over_does_no_harm(pairs: Armed, point: str) -> None:
    stack, arming = pairs
    when, void_before = EDGES[point].when, stack.truth().report.void_entries
    its_own = {process: partitions_of(stack, process) for process in OWNERS}
    if when == "work":
        for process in OWNERS:
            arming.now(stack, process, f"{point}=stop@3")
    arming.now(stack, EXECUTOR, f"{STOPS[point]}=stop@2")
    load = Load(stack, RUN_COUNT)
    if when != "work":
        load.until_effects(0.5)
        for process in OWNERS:
            bring(pairs, process, f"{point}=stop", when)
    sleepers = (*OWNERS, EXECUTOR)
    try:
        for process in sleepers:
            until_stopped(stack.pids[process])
        asleep_s = boottime_s()
        for process in OWNERS:
            eventually(
                lambda process=process: not its_own[process] & partitions_of(stack, process),
                f"the partitions of {process} to be taken over",
            )
        eventually(lambda: boottime_s() > asleep_s + SHORT_S, "the end of the executor's lease")
    finally:
        for process in sleepers:
            os.kill(stack.pids[process], signal.SIGCONT)
    stack.expect_other_pid(EXECUTOR)
    assert stack.last_exit(EXECUTOR) == EXIT_LEASE_LAPSED
    truth = load.finish(may_restart=OWNERS)
    if point == "owner.before-entry":
        assert truth.report.void_entries > void_before, "the sleepers wrote nothing: the test shows nothing"


def partitions_of(stack: WholeStack, process: str) -> set[int]:
    """Return what an owner owns, by its log: the partitions that it announced itself for, and nobody after it."""
    return {partition for partition, owner in owners(stack, process[:-2]).items() if owner == process}
