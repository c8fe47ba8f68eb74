"""The projection as a process of its own, on a real broker, into a real (embedded) ClickHouse."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest

from support.clickhouse import StandIn
from support.logs import POLICY, Decided, LogWriter, Story, dead_letter_record, instance_record
from support.projections import ProjectionProcess, SqlFailedError, Topics, ask
from support.stack import eventually
from tidegate.domain.states import ABSENT
from tidegate.eventlog.interface import Record, TopicPartition
from tidegate.eventlog.kafka.subscription import KafkaSubscription
from tidegate.projection.migrations import migrations
from tidegate.projection.service import TOPICS
from tidegate.projection.tables import REBUILT_VIEWS as VIEWS

pytestmark = pytest.mark.timeout(300)
OTHER_LEDGER = "wayne/labs"  # an account whose ledger is another partition than `acme` and `umbrella`


@pytest.fixture
def topics(bootstrap: str, topic_prefix: str) -> Iterator[Topics]:
    made = Topics(bootstrap, topic_prefix)
    yield made
    made.close()


@pytest.fixture
def projection(topics: Topics, tmp_path: Path) -> Iterator[ProjectionProcess]:
    with ProjectionProcess(topics, tmp_path / "data") as process:
        yield process


def long_story(count: int = 25) -> Story:
    """Return runs of every kind among many plain ones."""
    story = Story()
    for number in range(1, count):
        story.pass_time(1)
        story.play_plain(number, "acme/support" if number % 2 else OTHER_LEDGER)
    story.play_all()
    return story


def by_run(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["run_id"]: row for row in rows}


# --- the tables are right ------------------------------------------------------------------------------------------------


@pytest.mark.feature("O1")
def test_the_tables_say_what_the_folded_logs_say(topics: Topics, projection: ProjectionProcess) -> None:
    story, log = long_story(), LogWriter(3, 2)
    topics.write(log.take(story.decided, trouble=0.3))
    topics.write([instance_record("ex-1"), dead_letter_record(5, b'\xff{"bad'), dead_letter_record(9, b"{")])
    assert log.void_count > 10

    projection.start().wait_caught_up()

    check_runs(story, projection)
    check_steps(story, projection)
    check_events(log.valid, projection)
    check_money(log.valid, projection)
    check_humans(projection)
    for view in VIEWS:
        assert projection.value(f"SELECT count() FROM {view} WHERE toString(tuple(*)) ILIKE '%zombie%'") == 0
    assert projection.value("SELECT count() FROM unreadable") == 0


def check_runs(story: Story, projection: ProjectionProcess) -> None:
    shown = by_run(projection.rows("SELECT * FROM runs"))
    expected = {run_id: run for run_id, run in story.runs.runs.items() if run.status != ABSENT}
    assert set(shown) == set(expected)
    for run_id, run in expected.items():
        row = shown[run_id]
        assert (row["status"], row["last_seq"]) == (run.status, run.seq), run_id
        assert (row["code"], row["reason"], row["output"]) == (run.code, run.reason, run.output)
        assert (row["fingerprint"], row["budget_micros"], row["tags"]) == (run.fingerprint, run.budget_micros, run.tags)
        assert row["finished_at"] is None or run.is_over
        if run.workflow is not None:
            assert (row["workflow"], row["version"], row["input"]) == ("chain", "1", run.input)


def check_steps(story: Story, projection: ProjectionProcess) -> None:
    shown = {(row["run_id"], row["step_id"]): row for row in projection.rows("SELECT * FROM steps")}
    expected = {(run_id, s.step_id): s for run_id, run in story.runs.runs.items() for s in run.steps.values()}
    assert set(shown) == set(expected)
    for key, step in expected.items():
        row = shown[key]
        assert (row["status"], row["attempts"], row["wave"]) == (step.status, step.attempt, step.wave), key
        assert (row["output"], row["function"]) == (step.output or "", step.call.function)
        assert row["arguments"] == step.call.arguments
    attempts = projection.rows("SELECT * FROM attempts")
    assert {(r["run_id"], r["step_id"], r["attempt"]) for r in attempts} == {
        (*key, number) for key, step in expected.items() for number in range(1, step.attempt + 1)
    }
    outcomes = {(r["run_id"], r["step_id"], r["attempt"]): r for r in attempts}
    assert outcomes["s-lost", "a", 1]["outcome"] == "lost"
    assert outcomes["s-lost", "a", 1]["late_outcome"] == "succeeded"
    assert outcomes["s-lost", "a", 1]["actual_micros"] == 70
    assert outcomes["s-lost", "a", 2]["incarnation"] == 2
    assert outcomes["s-unknown", "once", 1]["outcome"] == "succeeded"
    assert outcomes["s-unknown-open", "once", 1]["outcome"] == "lost"
    assert outcomes["s-retried", "flaky", 1]["error_class"] == "Timeout"
    assert outcomes["s-retried", "flaky", 2]["usage"] == {"tokens": 30}
    assert outcomes["s-rejected", "ask", 1]["outcome"] == "rejected"
    assert outcomes["s-withdrawn", "ask", 1]["outcome"] == "cancelled"
    assert outcomes["s-denied", "forbidden", 1]["outcome"] == "denied"


def check_events(valid: list[Decided], projection: ProjectionProcess) -> None:
    expected: dict[str, list[str]] = defaultdict(list)
    for decided in valid:
        if decided.log == "run-events":
            expected[decided.subject] += [type(event).__name__ for event in decided.events]
    shown: dict[str, list[str]] = defaultdict(list)
    for row in projection.rows("SELECT run_id, seq, type FROM events ORDER BY run_id, seq"):
        shown[row["run_id"]].append(row["type"])
        assert row["seq"] == len(shown[row["run_id"]])
    assert shown == expected


def check_money(valid: list[Decided], projection: ProjectionProcess) -> None:
    reserved: dict[str, int] = defaultdict(int)
    settled: dict[str, int] = defaultdict(int)
    decisions: list[str] = []
    names = dict.fromkeys(("AttemptGranted", "AttemptPlaced"), "allow")
    names |= {"AttemptRefused": "deny", "ApprovalHeld": "require_approval"}
    for event in (e for d in valid if d.log == "gate-ledger" for e in d.events):
        name = type(event).__name__
        if name in ("AttemptGranted", "AttemptReserved"):
            reserved[event.run_id] += event.reserved_micros
        elif name in ("AttemptSettled", "AttemptReleased"):
            reserved[event.run_id] -= event.reserved_micros
            settled[event.run_id] += getattr(event, "actual_micros", 0)
        if name in names:
            decisions.append(names[name])
    rows = by_run(projection.rows("SELECT * FROM budgets"))
    by_function: dict[str, int] = defaultdict(int)
    for row in projection.rows("SELECT * FROM spend"):
        by_function[row["run_id"]] += row["settled_micros"]
    assert {run: micros for run, micros in by_function.items() if micros} == {r: m for r, m in settled.items() if m}
    assert {run: row["reserved_micros"] for run, row in rows.items() if row["reserved_micros"]} == {
        run: micros for run, micros in reserved.items() if micros
    }
    assert {run: row["settled_micros"] for run, row in rows.items() if row["settled_micros"]} == {
        run: micros for run, micros in settled.items() if micros
    }
    # The two logs agree about what was spent, the one by results, the other by settlements.
    spent = {r["run_id"]: r["spent_micros"] for r in projection.rows("SELECT run_id, spent_micros FROM runs")}
    assert {run: micros for run, micros in spent.items() if micros} == {r: m for r, m in settled.items() if m}
    assert sorted(r["decision"] for r in projection.rows("SELECT decision FROM decisions")) == sorted(decisions)
    denied = projection.rows("SELECT rule, reason FROM decisions WHERE decision = 'deny' AND run_id = 's-denied'")
    assert [row["reason"] for row in denied] == ["not here"]


def check_humans(projection: ProjectionProcess) -> None:
    shown = by_run(projection.rows("SELECT * FROM approvals"))
    assert {run: row["status"] for run, row in shown.items()} == {
        "s-approved": "approved",
        "s-rejected": "rejected",
        "s-asking": "open",
        "s-withdrawn": "withdrawn",
        "s-unknown": "withdrawn",
        "s-unknown-open": "open",
    }
    assert shown["s-approved"]["answered_by"] == "ann"
    assert shown["s-asking"]["question"] == POLICY["rules"][0]["reason"]
    assert shown["s-asking"]["function"] == "ask"
    (row,) = projection.rows("SELECT * EXCEPT body FROM instances WHERE instance_id = 'ex-1'")
    assert (row["incarnation"], row["slots"], row["free_slots"]) == (0, 8, 3)
    letters = projection.rows("SELECT * FROM dead_letters ORDER BY offset")
    assert [row["offset"] for row in letters] == [5, 9]
    assert letters[0]["original"] == '\ufffd{"bad'
    own = "SELECT service, state FROM instances WHERE service = 'projection'"
    eventually(lambda: [row["state"] for row in projection.rows(own)] == ["ready"], "its own word of itself")


@pytest.mark.feature("O1")
def test_tombstones_remove_instances_and_dead_letters(topics: Topics, projection: ProjectionProcess) -> None:
    topics.write(
        [instance_record("ex-1"), instance_record("ex-2"), dead_letter_record(5, b"a"), dead_letter_record(6, b"b")]
    )
    topics.write([Record("instances", 0, b"ex-1", None), Record("dead-letters", 0, b"run-requests:0:5", None)])

    projection.start().wait_caught_up()

    shown = "SELECT instance_id FROM instances WHERE service = 'executor'"
    eventually(lambda: projection.rows(shown) == [{"instance_id": "ex-2"}], "the instance to be gone")
    assert projection.rows("SELECT offset FROM dead_letters") == [{"offset": 6}]


@pytest.mark.feature("O1")
def test_new_events_appear_and_the_freshness_follows(topics: Topics, projection: ProjectionProcess) -> None:
    story, log = long_story(3), LogWriter(3, 2)
    topics.write(log.take(story.decided[:30]))
    projection.start().wait_caught_up()
    before = projection.value("SELECT count() FROM events")

    topics.write(log.take(story.decided[30:]))
    projection.wait_caught_up()

    assert projection.value("SELECT count() FROM events") > before
    check_runs(story, projection)
    # Its own heartbeats are among what it reads: one may just have come.
    eventually(lambda: projection.value("SELECT max(lag) FROM freshness") == 0, "nothing to be left")
    latest = max(decided.now_ms for decided in log.valid if decided.log == "run-events")
    shown = "SELECT toUnixTimestamp64Milli(max(last_event_at)) FROM freshness WHERE topic = 'run-events'"
    assert projection.value(shown) == latest


def test_records_that_cannot_be_read_are_shown_and_the_rest_goes_on(
    topics: Topics, projection: ProjectionProcess
) -> None:
    story, log = Story(), LogWriter(3, 2)
    story.play_all()
    topics.write(log.take(story.decided))
    topics.write(
        [Record("run-events", 1, b"x", b"rubbish"), Record("gate-ledger", 0, b"y", dead_letter_record(1, b"").value)]
    )
    more = Story("later")
    more.play_all()

    projection.start().wait_caught_up()

    noted = projection.rows("SELECT topic, partition, reason, size FROM unreadable ORDER BY topic")
    assert [(row["topic"], row["partition"]) for row in noted] == [("gate-ledger", 0), ("run-events", 1)]
    assert "DeadLetter has no business in gate-ledger" in noted[0]["reason"]
    assert '"record skipped"' in projection.log.read_text()
    check_runs(story, projection)


# --- rebuilding ----------------------------------------------------------------------------------------------------------


@pytest.mark.feature("L4")
@pytest.mark.feature("O1")
def test_an_operator_who_resets_the_group_to_the_start_gets_equal_tables(
    topics: Topics, projection: ProjectionProcess, tmp_path: Path
) -> None:
    story, log = long_story(), LogWriter(3, 2)
    cut = len(story.decided) // 2
    topics.write([instance_record("ex-1"), dead_letter_record(5, b"x")])
    topics.write(log.take(story.decided[:cut], trouble=0.3))
    projection.start().wait_caught_up()
    first = projection.contents()
    refused = topics.reset_to_earliest()
    assert "inactive" in refused.stdout + refused.stderr, "a group that reads cannot be reset"
    projection.stop()

    # At once: a member that closes leaves the group. Into tables that have it all already.
    shown = topics.reset_to_earliest()
    assert shown.returncode == 0, shown
    moved = [line.split()[-1] for line in shown.stdout.splitlines() if topics.settings.topic_prefix in line]
    assert moved == ["0"] * len(topics.ends())
    projection.start().wait_caught_up()
    assert projection.contents() == first

    # The logs grow meanwhile; and once more, into empty tables.
    for start in range(cut, len(story.decided), 20):
        topics.write(log.take(story.decided[start : start + 20], trouble=0.3))
    projection.wait_caught_up()
    grown = projection.contents()
    check_runs(story, projection)
    projection.stop()
    shutil.rmtree(tmp_path / "data" / "clickhouse")
    assert topics.reset_to_earliest().returncode == 0
    projection.start().wait_caught_up()
    assert projection.contents() == grown


@pytest.mark.feature("L4")
@pytest.mark.feature("O1")
def test_an_empty_database_behind_a_group_that_has_read_everything_is_not_fresh_until_it_is_filled_up(
    topics: Topics, projection: ProjectionProcess, tmp_path: Path
) -> None:
    story, log = long_story(), LogWriter(3, 2, 4)
    cut = len(story.decided) // 2
    topics.write(log.take(story.decided[:cut], trouble=0.3))
    projection.start().wait_caught_up()
    assert projection.value("SELECT sum(missing) FROM freshness") == 0
    before = projection.contents()
    stood = topics.ends()
    projection.stop()

    # The same tables, and a group that stands where they end: nothing is missing after a restart.
    projection.start()
    topics.write(log.take(story.decided[cut : cut + 40], trouble=0.3))
    projection.wait_caught_up()
    assert projection.value("SELECT sum(missing) FROM freshness") == 0
    stood = topics.ends()
    grown = projection.contents()
    assert grown != before
    projection.stop()

    # Other tables, the same group: it looks up to date, and knows nothing of what was before.
    shutil.rmtree(tmp_path / "data" / "clickhouse")
    projection.start()
    topics.write(log.take(story.decided[cut + 40 :], trouble=0.3))
    projection.wait_caught_up()
    lacking = "SELECT topic, partition, missing, whole_to, lag FROM freshness WHERE topic != 'instances'"

    def short() -> dict[TopicPartition, int]:
        found = projection.rows(lacking)
        return {TopicPartition(row["topic"], row["partition"]): row["missing"] for row in found if row["missing"]}

    wanted = {at: end for at, end in topics.ends().items() if at in stood and at.topic != "instances"}
    eventually(lambda: short() == wanted, "every record to be missing, the new ones too: nobody knows what lies before")
    assert all(row["whole_to"] == 0 for row in projection.rows(lacking) if row["missing"])

    def said() -> set[TopicPartition]:
        lines = [json.loads(line) for line in projection.log.read_text().splitlines() if '"what_to_do"' in line]
        assert {line["what_to_do"] for line in lines} <= {"tidegate replay projection --from earliest"}
        return {TopicPartition(line["topic"], line["partition"]) for line in lines}

    eventually(lambda: said() >= set(wanted), "the log to say it of every partition, which comes after the rows")
    assert "tidegate replay projection --from earliest" in top(projection)

    # A replay of what is there already does not help; what is said to help does, and the tables stay whole.
    middle = str(min(stood.values()) // 2)
    assert projection.replay("--from", middle).returncode == 0
    assert short() == wanted
    assert projection.replay("--from", "earliest").returncode == 0
    eventually(lambda: not short(), "nothing to be missing")
    check_runs(story, projection)
    assert "tidegate replay" not in top(projection)
    projection.stop()
    projection.start()
    topics.write(LogWriter(3, 2, 9).take(long_story(3).decided))
    projection.wait_caught_up()
    assert not short()


def top(projection: ProjectionProcess) -> str:
    """Return what `tidegate top` shows."""
    environment = {**os.environ, "TIDEGATE_DATA_DIR": str(projection.data_dir), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tidegate.cli", "top", "--once"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.feature("L4")
def test_a_group_reset_to_the_middle_changes_nothing(topics: Topics, projection: ProjectionProcess) -> None:
    story, log = long_story(), LogWriter(3, 2, 2)
    topics.write(log.take(story.decided, trouble=0.5))
    projection.start().wait_caught_up()
    first = projection.contents()
    projection.stop()

    rng = random.Random(2)
    topics.reset_group({at: rng.randint(0, end) for at, end in topics.ends().items()})
    projection.start().wait_caught_up()

    assert projection.contents() == first


# --- crashes -------------------------------------------------------------------------------------------------------------

RUN_COUNT = 20  # of all that `support.logs` plays
EDGES = ("before-insert", "after-insert", "before-commit", "after-commit")


@pytest.mark.feature("O1")
def test_killed_at_any_edge_it_loses_and_doubles_nothing(bootstrap: str, topic_prefix: str, tmp_path: Path) -> None:
    # Side by side: most of the time is the group's, which misses a killed member only after its session.
    with ThreadPoolExecutor(len(EDGES)) as pool:
        done = [pool.submit(_kill_at, edge, bootstrap, f"{edge}-{topic_prefix}", tmp_path / edge) for edge in EDGES]
    for future in done:
        future.result()


def _kill_at(edge: str, bootstrap: str, prefix: str, folder: Path) -> None:
    topics = Topics(bootstrap, prefix)
    story, log = long_story(10), LogWriter(3, 2)
    topics.write(log.take(story.decided, trouble=0.2))
    with ProjectionProcess(topics, folder) as projection:
        # Small batches, so that a death in the third leaves some inserted and some not.
        small = {"TIDEGATE_PROJECTION_BATCH_ROWS": "40", "TIDEGATE_PROJECTION_FLUSH_MS": "10"}
        projection.start(**small, TIDEGATE_FAILPOINTS=f"projection.{edge}=kill@3")
        more = threading.Thread(target=_keep_writing, args=(topics, projection))
        more.start()
        assert projection.wait_dead() == -9
        more.join()
        projection.start().wait_caught_up()

        check_runs(story, projection)
        check_events(log.valid, projection)
        check_money(log.valid, projection)
        for table, view, key in (("event_facts", "events", "run_id, seq"), ("ledger_facts", "ledger", "ledger, seq")):
            assert projection.value(f"SELECT uniqExact({key}) FROM {table}") == projection.value(
                f"SELECT count() FROM {view}"
            )
    topics.close()


def _keep_writing(topics: Topics, projection: ProjectionProcess) -> None:
    """Write heartbeats until the projection is dead, so that it has a third batch in any case."""
    while projection.process.poll() is None:
        topics.write([instance_record("ex-1")])
        time.sleep(0.05)


@pytest.mark.feature("O1")
def test_killed_again_and_again_while_it_catches_up_it_ends_up_exact(
    topics: Topics, projection: ProjectionProcess
) -> None:
    story, log = long_story(60), LogWriter(3, 2)
    topics.write(log.take(story.decided, trouble=0.05))
    rng = random.Random(7)

    for _ in range(3):
        projection.start(TIDEGATE_PROJECTION_BATCH_ROWS="50", TIDEGATE_PROJECTION_FLUSH_MS="10")
        assert projection.url
        time.sleep(rng.uniform(0.0, 0.4))
        projection.kill()
    catch_up_under_a_supervisor(projection)

    check_runs(story, projection)
    check_steps(story, projection)
    check_events(log.valid, projection)
    check_money(log.valid, projection)


def catch_up_under_a_supervisor(projection: ProjectionProcess) -> None:
    """Start it, and again when it takes for company what was killed while it joined: that has a share until its session ends."""
    for _ in range(30):
        projection.start()
        try:
            return projection.wait_caught_up()
        except (AssertionError, OSError):
            projection.kill()
            said = projection.log.read_text().splitlines()[-1]
            assert "another projection is in the group" in said, said
    raise AssertionError("it has company for ever")


# --- a ClickHouse server -------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "server")
    yield stand_in
    stand_in.close()


def wait_for_rows(server: StandIn, query: str, expected: int) -> None:
    deadline = time.monotonic() + 60
    found: int | None = None
    while found != expected:
        assert found is None or found <= expected
        assert time.monotonic() < deadline, f"{found} of {expected}"
        time.sleep(0.1)
        with suppress(RuntimeError):  # the tables are not there yet
            found = int(next(iter(server.rows(query)[0].values())))


def event_count(valid: list[Decided]) -> int:
    return sum(len(decided.events) for decided in valid if decided.log == "run-events")


@pytest.mark.feature("O1")
def test_a_server_that_is_away_for_a_while_loses_nothing(topics: Topics, tmp_path: Path, server: StandIn) -> None:
    story, log = long_story(60), LogWriter(3, 2)
    third = len(story.decided) // 3
    with ProjectionProcess(topics, tmp_path / "data", TIDEGATE_CLICKHOUSE_URL=server.url) as projection:
        with server.away("hang up", 0.5):  # already at the start
            projection.start()
        topics.write(log.take(story.decided[:third]))
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))

        # A bound of few rows: both batches are full soon, and reading pauses.
        with server.away("hang up", 2.0):
            topics.write(log.take(story.decided[third:]))
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))

        assert projection.process.poll() is None
        assert "trying again" in projection.log.read_text()
        projection.stop()
    statuses = {row["run_id"]: row["status"] for row in server.rows("SELECT run_id, status FROM runs")}
    assert statuses == {run_id: run.status for run_id, run in story.runs.runs.items() if run.status != ABSENT}


@pytest.mark.feature("O1")
def test_while_the_server_is_away_memory_is_bounded_and_the_group_is_kept(
    topics: Topics, tmp_path: Path, server: StandIn
) -> None:
    story, log = long_story(80), LogWriter(3, 2)
    bounds = {"TIDEGATE_PROJECTION_BATCH_ROWS": "30", "TIDEGATE_KAFKA_MAX_POLL_INTERVAL_MS": "6000"}
    with ProjectionProcess(topics, tmp_path / "data", TIDEGATE_CLICKHOUSE_URL=server.url, **bounds) as projection:
        projection.start()
        topics.write(log.take(story.decided[:50]))
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        # Longer than the group would keep a member that does not poll.
        met = server.faults_met
        with server.away("refuse", 8.0):
            topics.write(log.take(story.decided[50:200]))
            eventually(lambda: server.faults_met > met, "a batch that is refused")
            topics.write(
                log.take(story.decided[200:])
            )  # more than another one: the one before may have all that was there
            eventually(lambda: "reading pauses" in projection.log.read_text(), "both batches to be full")
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        eventually(lambda: "reading goes on" in projection.log.read_text(), "it to say so: the rows may come first")
        said = projection.log.read_text()
        projection.stop()
    assert said.count('"partitions assigned"') == 1, "it lost its place in the group"


@pytest.mark.feature("L4")
@pytest.mark.feature("K1")
def test_two_members_share_the_work_and_one_takes_over_from_the_other(
    topics: Topics, tmp_path: Path, server: StandIn
) -> None:
    story, log = long_story(60), LogWriter(3, 2)
    url = {"TIDEGATE_CLICKHOUSE_URL": server.url, "TIDEGATE_PROJECTION_BATCH_ROWS": "100"}
    members = [
        ProjectionProcess(topics, tmp_path / name, **url, TIDEGATE_INSTANCE_ID=f"projection-{name}") for name in "ab"
    ]
    chunk = len(story.decided) // 6 + 1
    chunks = [story.decided[i : i + chunk] for i in range(0, len(story.decided), chunk)]
    with members[0], members[1]:
        topics.write(log.take(chunks[0], trouble=0.3))
        for member in members:  # at once, on a server that has no tables
            member.start()
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        eventually(lambda: all(shares(member) for member in members), "each to have some of the partitions")
        for part in chunks[1:4]:
            topics.write(log.take(part, trouble=0.3))
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        assert sum(member.log.read_text().count('"migration applied"') for member in members) == len(migrations())
        eventually(
            lambda: server.rows("SELECT sum(missing) AS n FROM freshness") == [{"n": 0}], "nothing to be missing"
        )

        # Who is asked is not who does it; a replay of one is seen by both, and there is one at a time.
        first, second = sorted(members, key=lambda member: "run-events-0" not in shares(member))
        begun = second.replay("--detach", "--json")
        assert begun.returncode == 0, begun
        for member in members:
            ended = member.replay("--follow", "--json")
            assert ended.returncode == 0, (ended, member.log.read_text()[-2000:])
            assert json.loads(ended.stdout)["replay_id"] == json.loads(begun.stdout)["replay_id"]
            assert all(one["equal"] for one in json.loads(ended.stdout)["comparisons"])
        (done,) = server.rows("SELECT instance_id, phase FROM replays FINAL")
        assert done == {"instance_id": f"projection-{first.data_dir.name}", "phase": "done"}

        first.kill()
        for part in chunks[4:]:
            topics.write(log.take(part, trouble=0.3))
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        assert shares(second) >= {"run-events-0", "run-events-2", "gate-ledger-0", "gate-ledger-1"}
        second.stop()
    statuses = {row["run_id"]: row["status"] for row in server.rows("SELECT run_id, status FROM runs")}
    assert statuses == {run_id: run.status for run_id, run in story.runs.runs.items() if run.status != ABSENT}

    # One alone, of a group of its own, makes the same tables.
    other = {"TIDEGATE_CLICKHOUSE_DATABASE": "one", "TIDEGATE_PROJECTION_GROUP": "one"}
    with ProjectionProcess(topics, tmp_path / "c", **url, **other) as alone:
        alone.start()
        events = event_count(log.valid)
        eventually(
            (lambda: bool(server.rows("SELECT 1 FROM system.tables WHERE name = 'freshness' AND database = 'one'"))),
            "tables",
        )
        wait_for_rows(server, "SELECT count() FROM one.events", events)
        wanted = server.rows("SELECT count() AS n FROM ledger")
        eventually(lambda: server.rows("SELECT count() AS n FROM one.ledger") == wanted, "the ledger")
        alone.stop()
    for view in VIEWS:
        where = "WHERE service = 'executor'" if view == "instances" else ""
        shown = [
            server.rows(f"SELECT * FROM {database}.{view} {where} ORDER BY ALL") for database in ("tidegate", "one")
        ]
        assert shown[0] == shown[1], view


def shares(member: ProjectionProcess) -> set[str]:
    """Return the partitions that a member was given last."""
    lines = [json.loads(line) for line in member.log.read_text().splitlines() if '"partitions assigned"' in line]
    return set(lines[-1]["partitions"]) if lines else set()


@pytest.mark.feature("K1")
def test_a_second_projection_is_refused_where_clickhouse_is_embedded(
    topics: Topics, projection: ProjectionProcess, tmp_path: Path
) -> None:
    story, log = long_story(3), LogWriter(3, 2)
    half = len(story.decided) // 2
    topics.write(log.take(story.decided[:half]))
    projection.start().wait_caught_up()
    with ProjectionProcess(topics, tmp_path / "other", TIDEGATE_INSTANCE_ID="projection-other") as second:
        second.start()
        topics.write(log.take(story.decided[half:]))
        assert second.wait_dead() == 1
        assert "another projection is in the group" in second.log.read_text()
        assert "TIDEGATE_PROJECTION_GROUP" in second.log.read_text()

    projection.wait_caught_up()
    check_runs(story, projection)
    check_events(log.valid, projection)
    assert projection.value("SELECT sum(missing) FROM freshness") == 0
    assert "another projection has joined the group" in projection.log.read_text()


def test_a_database_of_a_newer_version_is_left_alone(topics: Topics, tmp_path: Path, server: StandIn) -> None:
    server.run("CREATE DATABASE tidegate", b"", {})
    server.run(
        "CREATE TABLE tidegate.schema_migrations (version Int32, name String, checksum String, applied_at DateTime64(3, 'UTC')) "
        "ENGINE = ReplacingMergeTree ORDER BY version",
        b"",
        {},
    )
    server.run("INSERT INTO tidegate.schema_migrations SELECT 999, 'x', 'y', now64(3)", b"", {})
    with ProjectionProcess(topics, tmp_path / "data", TIDEGATE_CLICKHOUSE_URL=server.url) as projection:
        projection.start()

        assert projection.wait_dead() == 1

    assert "a newer projection was here" in projection.log.read_text()
    assert server.rows("SELECT count() AS n FROM system.tables WHERE database = 'tidegate'") == [{"n": 1}]


# --- the subscription ----------------------------------------------------------------------------------------------------


def test_a_subscription_reads_from_what_the_group_committed(topics: Topics) -> None:
    topics.write([instance_record(f"ex-{number}") for number in range(10)])
    at = TopicPartition("instances", 0)

    first = KafkaSubscription(topics.settings, "g", TOPICS)
    read = _read(first, 10)
    assert [message.offset for message in read] == list(range(10))
    assert dict(read[0].headers)["type"] == b"Instance"
    assert at in first.assigned
    assert first.take_changes().gained[at] is None
    assert first.take_changes().gained == {}
    assert first.ends()[at] == 10
    first.commit({at: 4, TopicPartition("instances", 7): 3})
    first.close()

    second = KafkaSubscription(topics.settings, "g", TOPICS, with_headers=False)
    again = _read(second, 6)
    assert second.take_changes().gained[at] == 4
    assert [message.offset for message in again] == list(range(4, 10))
    assert again[0].headers == ()
    second.pause()
    topics.write([instance_record("ex-10")])
    assert second.poll(10, 1.0) == []
    second.resume()
    assert [message.offset for message in _read(second, 1)] == [10]
    second.close()


def _read(subscription: KafkaSubscription, count: int) -> list[Any]:
    found: list[Any] = []
    deadline = time.monotonic() + 30
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count}"
        found += subscription.poll(100, 0.2)
    return found


# --- read-only SQL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sql(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProjectionProcess]:
    """A projection that the tests of its SQL share; they can only read."""
    topics = Topics(bootstrap, "projection-sql.")
    story, log = Story(), LogWriter(3, 2)
    story.play_all()
    topics.write(log.take(story.decided))
    settings = {"TIDEGATE_PROJECTION_SQL_TIMEOUT_S": "2", "TIDEGATE_PROJECTION_SQL_MEMORY_MB": "128"}
    with ProjectionProcess(topics, tmp_path_factory.mktemp("sql") / "data", **settings) as process:
        process.start().wait_caught_up()
        yield process
    topics.close()


HOSTILE = [
    "INSERT INTO run_state (run_id) VALUES ('x')",
    "CREATE TABLE x (a Int8) ENGINE = Memory",
    "CREATE TEMPORARY TABLE x (a Int8)",
    "CREATE VIEW x AS SELECT 1",
    "CREATE FUNCTION f AS x -> x",
    "DROP TABLE event_facts",
    "DROP DATABASE tidegate",
    "TRUNCATE TABLE event_facts",
    "ALTER TABLE event_facts DELETE WHERE 1",
    "DELETE FROM event_facts WHERE 1",
    "OPTIMIZE TABLE event_facts FINAL",
    "RENAME TABLE event_facts TO x",
    "EXCHANGE TABLES run_state AND step_state",
    "DETACH TABLE event_facts",
    "ATTACH TABLE x",
    "SYSTEM FLUSH LOGS",
    "SYSTEM SHUTDOWN",
    "KILL QUERY WHERE 1",
    "SET readonly = 0",
    "SET max_execution_time = 0",
    "USE system",
    "GRANT ALL ON *.* TO default",
    "BACKUP DATABASE tidegate TO File('{dir}/stolen')",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE event_facts",
    "SELECT 1 SETTINGS readonly = 0",
    "SELECT 1 SETTINGS max_execution_time = 1000",
    "SELECT 1 SETTINGS max_memory_usage = 0",
    "SELECT * FROM (SELECT 1 SETTINGS readonly = 0)",
    "SELECT 1 INTO OUTFILE '{dir}/stolen'",
    "SELECT 1 /* */ INTO\nOUTFILE '{dir}/stolen' TRUNCATE FORMAT CSV",
    "SELECT 1 INTO OUTFILE '{dir}/stolen' -- hidden",
    "SELECT * FROM file('{dir}/secret', 'TSV', 'a String')",
    "SELECT file('{dir}/secret')",
    "SELECT `file`('{dir}/secret')",
    "SELECT \"file\"('{dir}/secret')",
    "SELECT FILE/**/('{dir}/secret')",
    "SELECT file -- x\n('{dir}/secret')",
    "WITH file('{dir}/secret') AS x SELECT x",
    "WITH (x -> file(x)) AS f SELECT f('{dir}/secret')",
    "SELECT arrayMap(x -> file(x), ['{dir}/secret'])",
    "SELECT arrayMap(file, ['{dir}/secret'])",
    "SELECT * APPLY(file) FROM (SELECT '{dir}/secret')",
    "SELECT COLUMNS('.*') APPLY file FROM (SELECT '{dir}/secret' AS a)",
    "EXPLAIN SYNTAX SELECT file('{dir}/secret')",
    "EXPLAIN SELECT * FROM file('{dir}/secret')",
    "DESCRIBE file('{dir}/secret')",
    "DESCRIBE TABLE file('{dir}/secret', 'TSV')",
    "DESCRIBE default.`{dir}/secret`",
    "SELECT * FROM default.`{dir}/secret`",
    "SELECT * FROM '{dir}/secret'",
    "SHOW CREATE TABLE default.`{dir}/secret`",
    "SELECT * FROM view(SELECT file('{dir}/secret'))",
    "INSERT INTO FUNCTION file('{dir}/stolen', 'TSV', 'a Int8') SELECT 1",
    "SELECT * FROM url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "SELECT * FROM s3('http://127.0.0.1:1/bucket/a', 'TSV', 'a String')",
    "SELECT * FROM remote('127.0.0.1:1', system.one)",
    "SELECT * FROM executable('cat {dir}/secret', 'TSV', 'a String')",
    "SELECT * FROM sqlite('{dir}/secret', 'x')",
    "SELECT * FROM python('x')",
    "SELECT * FROM eval('SELECT 1')",
    "SELECT * FROM system.stack_trace",
    "SELECT 1 FORMAT Template SETTINGS format_template_row = '{dir}/secret'",
    "SELECT 1 AS a FORMAT CapnProto SETTINGS format_schema = '{dir}/secret:x'",
    "SELECT 1 FORMAT DataFrame",
    "SELECT 1 PARALLEL WITH DROP TABLE event_facts",
    "",
    ";",
    "-- nothing",
    "SELECT",
    "\x00",
]


@pytest.mark.feature("O1")
@pytest.mark.parametrize("query", HOSTILE)
def test_hostile_queries_are_refused_and_leave_nothing(sql: ProjectionProcess, tmp_path: Path, query: str) -> None:
    (tmp_path / "secret").write_text("the-secret\n")
    before = sql.value("SELECT count() FROM events")

    with pytest.raises(SqlFailedError) as caught:
        ask(sql.url, query.replace("{dir}", str(tmp_path)))

    assert caught.value.code.isdigit()
    assert "the-secret" not in caught.value.text
    assert not (tmp_path / "stolen").exists()
    assert sql.value("SELECT count() FROM events") == before
    assert sql.value("SELECT getSetting('readonly')") == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"readonly": "0"},
        {"max_execution_time": "0"},
        {"max_memory_usage": "0"},
        {"output_format_schema": "/x"},
        {"format_template_row": "/etc/passwd"},
        {"max_threads": "64"},
        {"no_such_setting": "1"},
    ],
)
def test_settings_of_a_request_cannot_widen_anything(sql: ProjectionProcess, setting: dict[str, str]) -> None:
    name = next(iter(setting))
    shown = "1" if name == "no_such_setting" else f"toString(getSetting('{name}'))"

    plain = ask(sql.url, f"SELECT {shown}")

    assert ask(sql.url, f"SELECT {shown}", **setting) == plain


def test_settings_that_change_how_a_result_looks_are_honoured(sql: ProjectionProcess) -> None:
    query = "SELECT toInt64(1) AS a FORMAT JSONEachRow"

    assert ask(sql.url, query, output_format_json_quote_64bit_integers="1") == b'{"a":"1"}\n'
    assert ask(sql.url, query, output_format_json_quote_64bit_integers="0") == b'{"a":1}\n'


@pytest.mark.parametrize(
    "query",
    [
        "SELECT count() FROM numbers(1000000000000) WHERE NOT ignore(sipHash64(number))",
        "SELECT groupArray(number) FROM numbers(100000000)",
        "SELECT number FROM numbers(10000000000) FORMAT Native",
    ],
)
def test_queries_have_bounds_and_projecting_goes_on(sql: ProjectionProcess, query: str) -> None:
    story, log = Story(f"meanwhile{abs(hash(query))}"), []
    story.play_plain(1)
    found: list[SqlFailedError] = []

    def run() -> None:
        try:
            ask(sql.url, query)
        except SqlFailedError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    sql.topics.write([instance_record(story.name)])
    deadline = time.monotonic() + 20
    while not sql.rows(f"SELECT 1 FROM instances WHERE instance_id = '{story.name}'"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    thread.join()

    assert [error.code in ("159", "241", "396") for error in found] == [True], log


def test_more_queries_than_turns_wait_for_theirs(sql: ProjectionProcess) -> None:
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(sql.url, "SELECT sleep(0.2)"))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == [b"0\n"] * 12


@pytest.mark.feature("O1")
def test_clickhouse_connect_works_unchanged(sql: ProjectionProcess) -> None:
    host, _, port = sql.url.removeprefix("http://").partition(":")

    with clickhouse_connect.get_client(host=host, port=int(port)) as client:
        result = client.query(
            "SELECT run_id, status, tags, started_at FROM runs WHERE run_id = {id:String}", {"id": "s-plain-0"}
        )
        assert result.column_names == ("run_id", "status", "tags", "started_at")
        assert result.first_row[:3] == ("s-plain-0", "succeeded", {"team": "x", "n": "0"})
        assert client.command("SELECT count() FROM runs") == RUN_COUNT
        assert client.ping()
        assert len(client.query("SELECT number FROM numbers(200000)").result_rows) == 200_000
        assert client.query("SELECT * FROM runs WHERE 0").result_rows == []
        assert b"s-plain-0" in client.raw_query("SELECT run_id FROM runs", fmt="CSV")
        with pytest.raises(clickhouse_connect.driver.exceptions.DatabaseError, match=r"READONLY|only SELECT"):
            client.command("DROP TABLE event_facts")
        with pytest.raises(clickhouse_connect.driver.exceptions.DatabaseError):
            client.insert("run_state", [["x"]], column_names=["run_id"])


def test_the_http_interface_behaves_like_clickhouses(sql: ProjectionProcess) -> None:
    def get(path: str, **headers: str) -> Any:
        request = urllib.request.Request(sql.url + path, headers=headers)  # noqa: S310 - http, by construction
        return urllib.request.urlopen(request, timeout=20)  # noqa: S310 - see above

    with get("/ping") as answer:
        assert answer.read() == b"Ok.\n"
    with get("/") as answer:
        assert answer.read() == b"Ok.\n"
    with get("/?query=SELECT%201%20AS%20a%20FORMAT%20JSON") as answer:
        assert json.loads(answer.read())["data"] == [{"a": 1}]
        assert answer.headers["X-ClickHouse-Format"] == "JSON"
        assert answer.headers["Content-Type"].startswith("application/json")
    with get("/?query=SELECT+currentDatabase()&database=system&query_id=mine") as answer:
        assert answer.read() == b"system\n"
        assert answer.headers["X-ClickHouse-Query-Id"] == "mine"
        assert int(json.loads(answer.headers["X-ClickHouse-Summary"])["read_rows"]) >= 0
    with get(
        "/?query=SELECT+number+FROM+numbers(5000)&enable_http_compression=1", **{"Accept-Encoding": "gzip"}
    ) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert len(gzip.decompress(answer.read()).splitlines()) == 5000
    with get("/?query=SELECT+1+AS+a&default_format=CSVWithNames") as answer:
        assert answer.read() == b'"a"\n1\n'
    # The query begins in the address and ends in the body; parameters hold anything.
    assert ask(sql.url, "FORMAT CSV", query="SELECT {a:String}, 2", param_a="it's") == b'"it\'s",2\n'
    for query, status, code in (
        ("SELEC 1", 400, "62"),
        ("SELECT * FROM nope", 404, "60"),
        ("DROP TABLE x", 403, "164"),
    ):
        with pytest.raises(SqlFailedError) as caught:
            ask(sql.url, query)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert caught.value.text.startswith(f"Code: {code}. DB::Exception: ")
    with pytest.raises(SqlFailedError) as caught:
        ask(sql.url, "SELECT 1", compress="1")
    assert caught.value.code == "48"
    with pytest.raises(SqlFailedError) as caught:
        ask(sql.url, "SELECT 1" + " " * 2_000_000)
    assert "at most" in caught.value.text


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_works_unchanged(sql: ProjectionProcess) -> None:
    def curl(*arguments: str, data: bytes | None = None) -> str:
        done = subprocess.run(["curl", "-sS", *arguments], input=data, capture_output=True, check=True, timeout=30)
        return done.stdout.decode()

    assert curl(sql.url, "-d", "SELECT count() FROM runs") == f"{RUN_COUNT}\n"
    assert curl(f"{sql.url}/?query=SELECT%201") == "1\n"
    assert (
        curl("--compressed", sql.url, "--data-binary", "@-", data=b"SELECT 'a'\nFORMAT JSONEachRow")
        == '{"\'a\'":"a"}\n'
    )
    assert curl("-H", "Transfer-Encoding: chunked", sql.url, "-d", "SELECT 3") == "3\n"
    assert curl("-G", sql.url, "--data-urlencode", "query=SELECT 4") == "4\n"


@pytest.mark.feature("O1")
def test_tidegate_sql_prints_tables_and_formats(sql: ProjectionProcess, tmp_path: Path) -> None:
    def tidegate(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "PYTHONPATH": ":".join(sys.path), **variables}
        command = [sys.executable, "-m", "tidegate.cli", "sql", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, input=stdin, env=environment, timeout=60, cwd=tmp_path, check=False
        )

    here = {"TIDEGATE_DATA_DIR": str(sql.data_dir)}
    table = tidegate("select run_id, status, finished_at, tags from runs order by run_id", **here)
    assert table.returncode == 0, table.stderr
    assert "s-plain-0" in table.stdout
    assert "NULL" in table.stdout
    assert f"{RUN_COUNT} rows" in table.stdout
    assert tidegate("select 1 as a", "--format", "JSONEachRow", **here).stdout == '{"a":1}\n'
    assert tidegate("select 1 as a format CSVWithNames", **here).stdout == '"a"\n1\n'
    assert tidegate(stdin="select 2 format TSV", TIDEGATE_SQL_URL=sql.url).stdout == "2\n"
    wrong = tidegate("select * from nope", **here)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "nope" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    nobody = tidegate("select 1")
    assert nobody.returncode == 1
    assert "tidegate dev" in nobody.stderr
    silent = tidegate("select 1", TIDEGATE_SQL_URL="http://127.0.0.1:9")
    assert silent.returncode == 1
    assert "nothing answers at http://127.0.0.1:9" in silent.stderr


def test_a_taken_port_is_no_reason_to_stop(topics: Topics, tmp_path: Path, sql: ProjectionProcess) -> None:
    taken = sql.url.rpartition(":")[2]
    with ProjectionProcess(topics, tmp_path / "data", TIDEGATE_PROJECTION_SQL_PORT=taken) as projection:
        projection.start(TIDEGATE_PROJECTION_SQL_PORT=taken)

        assert projection.value("SELECT 1") == 1
        assert not projection.url.endswith(f":{taken}")
        projection.stop()
