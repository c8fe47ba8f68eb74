"""Rebuilding the tables: by hand with Kafka's own tool, and without downtime with `tidegate replay projection`."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_projection import (
    check_events,
    check_humans,
    check_money,
    check_runs,
    check_steps,
    event_count,
    long_story,
    wait_for_rows,
)
from support.clickhouse import StandIn
from support.fake_cluster import FakeCluster, serving
from support.logs import LogWriter, dead_letter_record, instance_record
from support.projections import ProjectionProcess, Topics
from support.stack import eventually
from tidegate.cli.replay_offsets import PAUSED, PAUSED_BEFORE
from tidegate.eventlog.interface import Record
from tidegate.projection.tables import REBUILT_VIEWS as VIEWS

pytestmark = [pytest.mark.timeout(300), pytest.mark.feature("L4")]
RETIRED = "s-plain-3"  # a run that is over


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandIn]:
    stand_in = StandIn(tmp_path / "server")
    yield stand_in
    stand_in.close()


def retire(topics: Topics, log: LogWriter, run_id: str) -> None:
    """Remove a run from its log as retention does, and wait until Kafka's cleaner was there."""

    def left() -> list[Record]:
        return [
            Record("run-events", number, message.key or b"", None)
            for number in range(topics.counts["run-events"])
            for message in topics.broker.read("run-events", number, 0, topics.broker.offsets("run-events", number).end)
            if (message.key or b"").startswith(f"{run_id}:".encode()) and message.value is not None
        ]

    tombstones = left()
    assert tombstones
    topics.write(tombstones)
    time.sleep(0.3)  # the segment's age: the next record begins another one, and the cleaner may have this one
    topics.write([Record("run-events", tombstones[0].partition, b"filler", None)])
    eventually(lambda: not left(), "the cleaner")
    partition = tombstones[0].partition
    log.others_wrote("run-events", partition, topics.broker.offsets("run-events", partition).end)


def without(contents: dict[str, str], run_id: str) -> dict[str, str]:
    """Return what the views show of everything but a run and its money."""
    return {
        view: "\n".join(line for line in shown.splitlines() if json.loads(line).get("run_id") != run_id)
        for view, shown in contents.items()
    }


def test_resets_by_hand_give_the_same_tables(bootstrap: str, topic_prefix: str, tmp_path: Path) -> None:
    topics = Topics(bootstrap, topic_prefix, eager=True)
    story, log = long_story(), LogWriter(3, 2)
    third = len(story.decided) // 3
    topics.write([instance_record("ex-1", at_ms=1), instance_record("ex-1"), dead_letter_record(5, b"x")])
    topics.write(log.take(story.decided[:third], trouble=0.4))
    time.sleep(1.1)  # the tool takes whole seconds
    middle = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000")
    topics.write(log.take(story.decided[third : 2 * third], trouble=0.4))
    assert log.void_count > 10
    with ProjectionProcess(topics, tmp_path / "data") as projection:
        projection.start().wait_caught_up()
        projection.stop()

        retire(topics, log, RETIRED)
        shown = topics.reset("--to-earliest --all-topics")
        assert shown.returncode == 0, shown
        projection.start()
        topics.write(log.take(story.decided[2 * third :], trouble=0.4))  # new runs arrive meanwhile
        projection.wait_caught_up()
        check_runs(story, projection)
        check_steps(story, projection)
        check_events(log.valid, projection)
        check_money(log.valid, projection)
        whole = projection.contents()
        projection.stop()

        for where in (f"--to-datetime {middle} --all-topics", f"--to-offset 7 --topic {topic_prefix}run-events"):
            shown = topics.reset(where)
            assert shown.returncode == 0, shown
            projection.start().wait_caught_up()
            assert projection.contents() == whole, where
            projection.stop()

        # Into empty tables: what compaction has taken is not there any more, and nothing else is missing.
        assert topics.reset("--to-earliest --all-topics").returncode == 0
    with ProjectionProcess(topics, tmp_path / "empty") as anew:
        anew.start().wait_caught_up()
        assert without(anew.contents(), RETIRED)["events"] == without(whole, RETIRED)["events"]
        assert without(anew.contents(), RETIRED) == without(whole, RETIRED)
    topics.close()


def test_a_replay_beside_the_embedded_projection(bootstrap: str, topic_prefix: str, tmp_path: Path) -> None:
    topics = Topics(bootstrap, topic_prefix, eager=True)
    story, log = long_story(), LogWriter(3, 2)
    half = len(story.decided) // 2
    topics.write([instance_record("ex-1"), dead_letter_record(5, b'\xff{"bad'), dead_letter_record(9, b"{")])
    topics.write(log.take(story.decided[:half], trouble=0.3))
    with ProjectionProcess(topics, tmp_path / "data") as projection:
        projection.start().wait_caught_up()
        retire(topics, log, RETIRED)
        before = projection.contents()

        plan = projection.replay("--dry-run")
        assert plan.returncode == 0, plan
        assert "event_facts" in plan.stdout
        assert projection.replay("--tables", "nonsense", "--dry-run").returncode == 2
        checked = projection.replay("--check", "--json")
        assert checked.returncode == 0, checked
        assert all(one["equal"] for one in json.loads(checked.stdout)["comparisons"])
        assert projection.value("SELECT uuid FROM system.tables WHERE name = 'event_facts'")

        begun = projection.replay("--from", "earliest", "--detach")
        assert begun.returncode == 0, begun
        topics.write(log.take(story.decided[half:], trouble=0.3))
        ended = projection.replay("--follow", "--json")
        assert ended.returncode == 0, ended
        assert json.loads(ended.stdout)["phase"] == "done"
        projection.wait_caught_up()
        check_runs(story, projection)
        check_steps(story, projection)
        check_events(log.valid, projection)
        check_money(log.valid, projection)
        check_humans(projection)
        assert RETIRED in before["events"]
        whole = projection.contents()

        for options in (
            ["--from", "7", "--tables", "run_state,step_state"],
            ["--from", "1h"],
            ["--from", "2025-01-01"],
        ):
            ended = projection.replay(*options)
            assert ended.returncode == 0, ended
            assert projection.contents() == whole, options

        assert projection.replay("--forget-retired").returncode == 0
        assert RETIRED not in projection.contents()["events"]
        projection.stop()
        assert not (tmp_path / "data" / "projection.json").exists()
    assert set(whole) == set(VIEWS)
    topics.close()


def test_a_replay_that_is_killed_goes_on_and_repairs_what_was_wrong(
    bootstrap: str, topic_prefix: str, tmp_path: Path, server: StandIn
) -> None:
    topics = Topics(bootstrap, topic_prefix)
    story, log = long_story(40), LogWriter(3, 2)
    half = len(story.decided) // 2
    topics.write(log.take(story.decided[:half], trouble=0.3))
    small = {"TIDEGATE_CLICKHOUSE_URL": server.url, "TIDEGATE_PROJECTION_BATCH_ROWS": "100"}
    with ProjectionProcess(topics, tmp_path / "data", **small) as projection:
        projection.start(TIDEGATE_FAILPOINTS="replay.saved=kill")
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        server.run("TRUNCATE TABLE tidegate.attempt_state", b"", {})
        eventually((tmp_path / "data" / "projection.json").exists, "the control address")
        assert projection.replay("--detach").returncode == 0
        assert projection.wait_dead() == -9
        pieces = iter(
            [story.decided[half : half + 40], story.decided[half + 40 : half + 80], story.decided[half + 80 :]]
        )
        for edge in ("replay.compare=kill", "replay.between-exchanges=kill@2", "replay.catch-up=kill"):
            topics.write(log.take(next(pieces), trouble=0.3))
            projection.start(TIDEGATE_FAILPOINTS=edge)
            assert projection.wait_dead() == -9, edge
        projection.start()
        eventually(lambda: projection.replay("--follow").returncode in (0, 1), "it to go on")
        (row,) = server.rows("SELECT phase, body FROM replays FINAL")
        assert row["phase"] == "done"
        differing = [one["table"] for one in json.loads(row["body"])["comparisons"] if not one["equal"]]
        assert "attempt_state" in differing
        wait_for_rows(server, "SELECT count() FROM events", event_count(log.valid))
        check_runs(story, server)  # type: ignore[arg-type]  # it is asked for rows alone
        check_steps(story, server)  # type: ignore[arg-type]
        check_events(log.valid, server)  # type: ignore[arg-type]
        check_money(log.valid, server)  # type: ignore[arg-type]
        assert server.rows("SELECT count() AS n FROM system.databases WHERE name = 'tidegate_replay'") == [{"n": 0}]
        projection.stop()
    topics.close()


def replay_offsets(topics: Topics, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": topics.settings.bootstrap,
        "TIDEGATE_KAFKA_TOPIC_PREFIX": topics.settings.topic_prefix,
        "PYTHONPATH": os.pathsep.join(sys.path),
        **variables,
    }
    command = [sys.executable, "-m", "tidegate.cli", "replay", "offsets", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_reset_by_command_scales_down_and_up_and_goes_on_when_it_was_killed(
    bootstrap: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = Topics(bootstrap, topic_prefix)
    topics.write(LogWriter(3, 2).take(long_story().decided, trouble=0.3))
    name = "statefulsets/tidegate-projection"
    asked = ("--workload", "statefulset/tidegate-projection", "-n", "here")
    with (
        ProjectionProcess(topics, tmp_path / "data") as projection,
        serving(FakeCluster("here", tmp_path), monkeypatch) as cluster,
    ):
        projection.start().wait_caught_up()
        before = projection.contents()
        refused = replay_offsets(topics, "--wait-s", "1")
        assert (refused.returncode, "has members" in refused.stderr) == (1, True), refused
        workload = {"metadata": {"name": "tidegate-projection"}, "spec": {"replicas": 1}}
        scaler: dict[str, Any] = {"metadata": {"name": "tidegate-projection"}}
        cluster.workloads |= {name: workload, "scaledobjects/tidegate-projection": scaler}
        scaled: list[int] = []

        def scale(_: str, replicas: int) -> None:
            if replicas != (scaled[-1] if scaled else 1):
                projection.start() if replicas else projection.stop()
            scaled.append(replicas)

        cluster.on_scale = scale
        for edge in ("replay-offsets.scaled-down=kill", "replay-offsets.reset=kill"):
            killed = replay_offsets(topics, *asked, TIDEGATE_FAILPOINTS=edge)
            assert killed.returncode == -signal.SIGKILL, killed
            assert workload["spec"] == {"replicas": 0}
            assert scaler["metadata"]["annotations"] == {PAUSED: "0", PAUSED_BEFORE: ""}
        done = replay_offsets(topics, *asked)
        assert done.returncode == 0, done
        assert workload == {"metadata": {"name": "tidegate-projection", "annotations": {}}, "spec": {"replicas": 1}}
        assert scaler["metadata"]["annotations"] == {}
        assert scaled == [0, 0, 0, 1]
        assert "run-events:2  to 0 of " in done.stdout
        assert "caught up" in done.stdout
        projection.wait_caught_up()
        assert projection.contents() == before

        projection.stop()
        by_hand = replay_offsets(topics, "--to", "7")
        assert by_hand.returncode == 0, by_hand
        committed = topics.broker.committed("tidegate-projection", "run-events")
        ends = topics.ends()
        assert committed == {at.partition: min(7, end) for at, end in ends.items() if at.topic == "run-events"}
        assert replay_offsets(topics, "--to", "yesterday").returncode == 2
        assert replay_offsets(topics, "--workload", "pod/x").returncode == 2
    topics.close()
