"""The runbooks, done as they say: the commands of docs/runbooks are those that are run here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from support.stack import WAIT_S, WholeStack, eventually, run_cli
from tidegate.domain.identity import partition_of
from tidegate.embedded.stack import SERVICES
from tidegate.embedded.tools import tool_command
from tidegate.eventlog.settings import KafkaSettings
from tidegate.sdk.errors import RunNotFoundError

pytestmark = [pytest.mark.timeout(300), pytest.mark.feature("K5")]

RUNBOOKS: Final = Path(__file__).parents[2] / "docs" / "runbooks"
OWNERS: Final = ("scheduler", "gate")
ASK: Final = """
policy: ask
version: "1"
rules:
  - name: ask-about-two
    when: step == 'two' && account.startsWith('asked/')
    then: require_approval
"""
DENY: Final = """
policy: stop-shop
version: "1"
rules:
  - name: no-more
    when: account.startsWith('shop/')
    then: deny
    reason: a loop, see the incident
"""


def said(page: str, command: str) -> str:
    """Return a command, which must be on the page as it is."""
    assert command in said_page(page), f"{page} does not say: {command}"
    return command


def said_page(page: str) -> str:
    """Return a page, on one line."""
    return " ".join((RUNBOOKS / f"{page}.md").read_text(encoding="utf-8").split())


def under_a_policy(whole: WholeStack, folder: Path, text: str) -> None:
    file = folder / "policy.yaml"
    file.write_text(text, encoding="utf-8")
    whole.cli("policy", "apply", str(file))


def ended(whole: WholeStack, run_id: str) -> str:
    """Wait for the run's end, whoever it waits for until then, and return how it ended."""
    whole.until(run_id, "RunFinished")
    return whole.wait(run_id).status


def shown(whole: WholeStack, *words: str) -> str:
    """Run a command as somebody on the machine that all of it runs on."""
    return run_cli(whole.stack.settings, *words, TIDEGATE_DATA_DIR=str(whole.stack.data_dir), COLUMNS="200")


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Hold a process still, so that all its files are those of one moment, as in a snapshot of its disk."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def kafka_on(folder: Path) -> Iterator[KafkaSettings]:
    """`tidegate kafka --data-dir COPY`."""
    command = [sys.executable, "-m", "tidegate.cli", "kafka", "--data-dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"Kafka answers at (\S+);", line):
                break
        else:
            pytest.fail(f"no Kafka on the copy: {lines}")
        yield KafkaSettings(bootstrap=found[1])
    finally:
        process.terminate()
        process.wait(WAIT_S)


def test_backup_and_restore_of_the_logs(tmp_path: Path) -> None:
    """A snapshot of the broker's disk, taken while everything runs, is a whole Tidegate of that moment."""
    copy = tmp_path / "copy"
    with WholeStack(tmp_path / "first", services=OWNERS) as whole:
        under_a_policy(whole, tmp_path, ASK)
        whole.client.start("chain", 1, run_id="done")
        whole.client.start("chain", 1, run_id="asked", account="asked/desk")
        assert whole.wait("done").status == "succeeded"
        assert whole.wait("asked").status == "waiting"
        whole.client.start("wait_here", 2.0, run_id="under-way")
        whole.until("under-way", "AttemptDispatched")
        assert whole.stack.kafka is not None
        assert whole.stack.kafka.pid is not None
        with frozen(whole.stack.kafka.pid):
            shutil.copytree(whole.stack.kafka.data_dir, copy)
        whole.client.start("chain", 1, run_id="afterwards")
        assert whole.wait("afterwards").status == "succeeded"
        before = [(event.seq, event.type) for event in whole.events("done")]

    said("backup-and-restore", "`tidegate kafka --data-dir COPY`")
    with kafka_on(copy) as kafka:
        for command in ("tidegate verify", "tidegate audit money"):
            run_cli(kafka, *said("backup-and-restore", command).split()[1:])
        with WholeStack(tmp_path / "second", services=(*OWNERS, "projection"), kafka=kafka) as again:
            assert [(event.seq, event.type) for event in again.events("done")] == before
            again.cli("runs", "approve", "asked")
            for run_id in ("asked", "under-way"):
                assert ended(again, run_id) == "succeeded"
            with pytest.raises(RunNotFoundError):  # acknowledged after the snapshot: it is gone
                again.client.get("afterwards")
            again.client.start("chain", 1, run_id="afterwards")
            assert again.wait("afterwards").status == "succeeded"
            truth = again.truth()
            assert truth.report.ok, truth.report.problems
            assert not truth.books.problems
            smoke = said("backup-and-restore", "tidegate smoke --queue").split()[1:]
            assert "its row is in ClickHouse" in shown(again, *smoke, "nobody")


@pytest.mark.parametrize("noticed", ["at once", "at the next start"])
def test_lost_snapshots_are_no_loss(noticed: str, tmp_path: Path) -> None:
    often = {"TIDEGATE_CHECKPOINT_EVERY_S": "0.5", "TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "5"}
    with WholeStack(tmp_path / "whole", services=OWNERS, env=often) as whole:
        under_a_policy(whole, tmp_path, ASK)
        for number in range(5):
            whole.client.start("chain", number, run_id=f"done-{number}")
            assert whole.wait(f"done-{number}").status == "succeeded"
        whole.client.start("chain", 1, run_id="asked", account="asked/desk")
        assert whole.wait("asked").status == "waiting"
        for topic in ("run-snapshots", "gate-snapshots"):
            arguments = ["--bootstrap-server", whole.stack.settings.bootstrap, "--delete", "--topic", topic]
            subprocess.run(tool_command("topics", arguments), check=True, capture_output=True, timeout=WAIT_S)
        eventually(lambda: not whole.broker.describe(["run-snapshots", "gate-snapshots"]), "the deletion")
        if noticed == "at once":
            whole.client.start("chain", 7, run_id="meanwhile")
        whole.cli(
            *said("lost-partition", "tidegate topics apply").split()[1:], "--queue", "default", "--queue", "nobody"
        )
        if noticed == "at the next start":
            for name in ("scheduler-0", "gate-0"):
                whole.stack.kill(name)
        whole.client.start("chain", 8, run_id="afterwards")
        assert whole.wait("afterwards").status == "succeeded"
        if noticed == "at once":
            assert whole.wait("meanwhile").status == "succeeded"
        whole.cli("runs", "approve", "asked")
        assert ended(whole, "asked") == "succeeded"
        for command in ("tidegate verify", "tidegate audit money"):
            whole.cli(*said("lost-partition", command).split()[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """A whole Tidegate for the runbooks about runs."""
    with WholeStack(tmp_path_factory.mktemp("runbooks"), services=SERVICES) as stack:
        yield stack


def test_what_a_run_waits_for_is_shown(whole: WholeStack, tmp_path: Path) -> None:
    page = "stuck-run"
    under_a_policy(whole, tmp_path, ASK)
    start = whole.client.start
    start("chain", 1, run_id="human", account="asked/desk")
    start("never", 1, run_id="no-slot")
    start("wait_here", 3600.0, run_id="runs")
    show = said(page, "tidegate runs show RUN").split()[1:3]
    for run_id, seen in (("human", "awaiting_approval"), ("no-slot", "requested"), ("runs", "dispatched")):
        said(page, f"`{seen}`")
        eventually(lambda run_id=run_id, seen=seen: seen in shown(whole, *show, run_id), f"{run_id} to be {seen}")
    query = re.search(r'tidegate sql "(select queue[^"]+)"', said_page(page))
    assert query is not None
    eventually(lambda: "default" in shown(whole, "sql", query[1]), "the row of the executor")
    assert "nobody" not in shown(whole, "sql", query[1]), "nobody serves that queue"
    assert whole.wait("human").status == "waiting"
    shown(whole, "runs", "approve", "human")
    assert ended(whole, "human") == "succeeded"
    for run_id in ("no-slot", "runs"):
        shown(whole, *said(page, "tidegate verify RUN").split()[1:2], run_id)
        shown(whole, *said(page, "tidegate runs cancel RUN").split()[1:3], run_id)
        assert whole.wait(run_id).status == "cancelled"
        eventually(lambda run_id=run_id: "cancelled" in shown(whole, *show, run_id), "the live view to show the end")


def test_a_hot_account_is_found_and_stopped(whole: WholeStack, tmp_path: Path) -> None:
    page = "hot-account"
    for number in range(6):
        whole.client.start("wait_here", 3600.0, run_id=f"hot-{number}", account="shop/eu")
    whole.client.start("chain", 1, run_id="cool", account="other/desk")
    assert whole.wait("cool").status == "succeeded"
    query = re.search(r'tidegate sql "(select account[^"]+)"', said_page(page))
    assert query is not None
    rows = eventually(
        lambda: (text := shown(whole, "sql", "-f", "TSV", query[1])) and "shop/eu\t6" in text and text, "rows"
    )
    assert rows.splitlines()[0].startswith("shop/eu\t6"), "the hottest comes first"
    said(page, "`tidegate policy apply`")
    under_a_policy(whole, tmp_path, DENY)
    whole.client.start("wait_here", 3600.0, run_id="hot-denied", account="shop/eu")
    assert whole.wait("hot-denied").status == "failed"
    for number in range(6):
        shown(whole, *said(page, "tidegate runs cancel RUN").split()[1:3], f"hot-{number}")
        assert whole.wait(f"hot-{number}").status == "cancelled"
    # Parts with roots of their own lie on partitions of their own, or may.
    count = whole.counts["gate-requests"]
    assert len({partition_of(root, count) for root in ("shop-eu", "shop-us", "shop-asia", "shop-africa")}) > 1
