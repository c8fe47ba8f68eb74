"""The live view on a whole system: it follows runs, answers over HTTP, and is the same after kill -9."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import pytest

from support.stack import RUNS, WAIT_S, WholeStack, assert_whole, eventually
from tidegate.cli.run_output import money
from tidegate.gateway.figures import FIELDS, MINUTE_MS
from tidegate.gateway.view import LiveView, PartitionReader

GATEWAY = "gateway-0"
SESSION_TIMEOUT_MS = "6000"
DAY_MINUTES = 24 * 60
KEPT_MINUTES = DAY_MINUTES // 2  # so that a window that ended some minutes ago is kept whole


class Answer(NamedTuple):
    status: int
    body: Any


class View:
    """A live view as seen from outside, wherever it answers at the moment."""

    def __init__(self, address_file: Path) -> None:
        self._file = address_file

    @property
    def url(self) -> str:
        return str(json.loads(self._file.read_text(encoding="utf-8"))["url"])

    @property
    def pid(self) -> int:
        return int(json.loads(self._file.read_text(encoding="utf-8"))["pid"])

    def ask(self, path: str, **query: Any) -> Answer:
        """Ask once. Raises OSError if nobody answers."""
        url = urlsplit(self.url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=WAIT_S)
        try:
            connection.request("GET", f"{path}?{urlencode(query)}")
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return Answer(response.status, json.loads(data) if is_json else data.decode())

    def ask_if_there(self, path: str, **query: Any) -> Answer | None:
        """Ask once; returns None if nobody answers, or one who is being restored."""
        try:
            answer = self.ask(path, **query)
        except (OSError, http.client.HTTPException):
            return None
        return None if answer.status == 503 else answer

    def get(self, path: str, **query: Any) -> Any:
        """Ask until the view is there and restored; returns the body of an answer that is not an error."""
        answer = eventually(lambda: self.ask_if_there(path, **query), f"the live view to answer {path}")
        assert answer is not None
        assert answer.status == 200, answer
        return answer.body

    def run(self, run_id: str, fits: Callable[[Any], object]) -> Any:
        """Return a run's body as soon as it fits."""

        def ask() -> Any:
            answer = self.ask_if_there(f"/v1/runs/{run_id}", wait_ms=1000)
            return answer is not None and answer.status == 200 and fits(answer.body) and answer.body

        return eventually(ask, f"the live view to show {run_id}")

    def checksum(self) -> str:
        """Return a digest of everything that it knows: all runs with their steps, and all windows of spend."""
        listed = self.get("/v1/runs", limit=1000)
        assert listed["partitions_missing"] == []
        everything = {
            "runs": [self.get(f"/v1/runs/{run['run_id']}") for run in listed["runs"]],
            "spend": self.get("/v1/spend", minutes=KEPT_MINUTES)["accounts"],
            "figures": sorted(self.figures(listed["runs"][0]["updated_ms"]).items()),
        }
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def figures(self, until_ms: int) -> dict[tuple[str, str], list[int]]:
        """Return the figures of all accounts and functions over the hours that end with a minute, when none is missing."""

        def ask(what: str) -> Any:
            answer = self.ask_if_there(f"/v1/{what}", minutes=KEPT_MINUTES, until_ms=until_ms)
            return answer is not None and answer.status == 200 and not answer.body["partitions_missing"] and answer.body

        found = {}
        for what in ("accounts", "functions"):
            for row in eventually(lambda what=what: ask(what), f"the figures of all {what}")[what]:
                found[row["kind"], row["name"]] = [row["windows"][0][field] for field in FIELDS]
        return found


def folded(whole: WholeStack, until_ms: int) -> dict[tuple[str, str], list[int]]:
    """Return what the figures must be: those of all logs, folded here from their beginning."""
    view = LiveView()
    for partition in range(whole.counts[RUNS]):
        reader = PartitionReader(0)
        start, end = whole.broker.offsets(RUNS, partition)
        for message in whole.broker.read(RUNS, partition, start, end):
            entry = reader.take(message.offset, message.value)
            if entry is not None:
                view.take(entry, partition, message.offset)
    found = view.tallies.windows(lambda _: True, [KEPT_MINUTES], until_ms // MINUTE_MS)
    return {tuple(name): list(msgspec.structs.astuple(sums)) for name, (sums,) in found.items()}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    env = {"TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": SESSION_TIMEOUT_MS}
    folder = tmp_path_factory.mktemp("live")
    with WholeStack(folder, services=("scheduler", "gate", "gateway"), env=env) as whole:
        policy = folder / "ask.yaml"
        policy.write_text(ASK, encoding="utf-8")
        whole.cli("policy", "apply", str(policy))
        yield whole


@pytest.fixture
def whole(stack: WholeStack) -> Iterator[WholeStack]:
    """The stack of this module, checked after the test: see `assert_whole`."""
    yield stack
    assert_whole(stack)


@pytest.fixture
def view(stack: WholeStack) -> View:
    return View(stack.stack.data_dir / "gateway.json")


ASK = """
policy: ask
version: "1"
rules:
  - name: ask-about-two
    when: account.startsWith('asked') && step == 'two'
    then: require_approval
    reason: somebody must look
"""


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


# --- what it shows --------------------------------------------------------------------------------------------------------


@pytest.mark.feature("O4")
def test_it_follows_a_run_to_its_end(whole: WholeStack, view: View) -> None:
    run_id = whole.client.start("chain", 1, run_id=new_id("chain"), account="live/one", budget_micros=1000)
    truth = whole.wait(run_id)
    body = view.run(run_id, lambda found: found["seq"] == truth.seq)
    assert (body["status"], body["workflow"], body["account"]) == ("succeeded", truth.workflow, "live/one")
    assert json.loads(body["output"]) == truth.output
    assert [(step["step_id"], step["status"]) for step in body["steps"]] == [
        (name, "succeeded") for name in ("one", "two", "three")
    ]
    assert (body["step_count"], body["succeeded_count"]) == (3, 3)
    assert (body["spent_micros"], body["budget_micros"]) == (truth.spent_micros, 1000)
    assert (body["started_ms"], body["finished_ms"]) == (truth.started_ms, truth.finished_ms)
    assert body["incomplete"] is False
    listed = view.get("/v1/runs", account="live/one")["runs"]
    assert [run["run_id"] for run in listed] == [run_id]


@pytest.mark.feature("P4")
def test_it_shows_questions_and_takes_them_away_when_they_are_answered(whole: WholeStack, view: View) -> None:
    run_id = whole.client.start("chain", 1, run_id=new_id("asked"), account="asked/here")
    assert whole.wait(run_id).needs_human
    body = view.run(run_id, lambda found: found["status"] == "waiting")
    (question,) = body["approvals"]
    assert (question["step_id"], question["attempt"], question["why"]) == ("two", 1, "policy")
    assert (question["policy"], question["rule"], question["reason"]) == (
        "ask@1",
        "ask-about-two",
        "somebody must look",
    )
    assert run_id in [run["run_id"] for run in view.get("/v1/runs", status="waiting")["runs"]]

    whole.client.reject(run_id, reason="no")
    body = view.run(run_id, lambda found: found["status"] == "failed")
    assert body["approvals"] == []
    assert body["code"] == "rejected"
    assert run_id not in [run["run_id"] for run in view.get("/v1/runs", status="waiting")["runs"]]


@pytest.mark.feature("O4")
def test_refused_starts_are_runs_and_refused_commands_are_none(whole: WholeStack, view: View) -> None:
    refused, nobody = new_id("refused"), new_id("nobody")
    whole.client.start("no-such-workflow", run_id=refused)
    body = view.run(refused, lambda found: found["status"] == "refused")
    assert body["code"] == "unknown_workflow"
    whole.client.answer(nobody, whole.client.cancel(nobody), WAIT_S)
    assert view.ask(f"/v1/runs/{nobody}", wait_ms=1000).status == 404


@pytest.mark.feature("P2")
def test_spend_is_summed_per_minute_over_an_account_and_all_below_it(whole: WholeStack, view: View) -> None:
    root = new_id("spend")
    runs = [
        whole.wait(whole.client.start("chain", 1, account=account))
        for account in (root, f"{root}/a", f"{root}/a", f"{root}/b")
    ]
    for run in runs:
        view.run(run.run_id, lambda found, seq=run.seq: found["seq"] == seq)
    each = runs[0].spent_micros
    assert each > 0
    found = view.get("/v1/spend", account=root)
    assert found["total_micros"] == 4 * each
    assert {one["account"]: one["total_micros"] for one in found["accounts"]} == {
        root: each,
        f"{root}/a": 2 * each,
        f"{root}/b": each,
    }
    assert all(window["start_ms"] % MINUTE_MS == 0 for one in found["accounts"] for window in one["windows"])
    assert view.get("/v1/spend", account=f"{root}/a")["total_micros"] == 2 * each
    later = (runs[-1].finished_ms // MINUTE_MS + 2) * MINUTE_MS
    assert view.get("/v1/spend", account=root, since_ms=later)["accounts"] == []


@pytest.mark.feature("O4")
@pytest.mark.feature("P2")
def test_accounts_and_functions_have_figures_of_the_last_minutes(whole: WholeStack, view: View) -> None:
    root = new_id("figures")
    good = [whole.wait(whole.client.start("chain", n, account=f"{root}/a")) for n in range(2)]
    bad = [whole.wait(whole.client.start("fail", 1, account=f"{root}/b")) for _ in range(2)]
    talk = whole.wait(whole.client.start("talk", 2, account=f"{root}/c"))  # its tokens have a price, and it says none
    for run in (*good, *bad, talk):
        view.run(run.run_id, lambda found, seq=run.seq: found["seq"] == seq)
    spent = sum(run.spent_micros for run in (*good, *bad, talk))

    def in_the_ledger() -> int:
        books = whole.truth().books.runs.get(talk.run_id)
        return books.settled_micros if books else 0

    settled = eventually(in_the_ledger, "the ledger to settle what the tokens cost")
    assert talk.spent_micros == view.get(f"/v1/runs/{talk.run_id}")["spent_micros"] == settled > 0

    found = view.get(f"/v1/accounts/{root}")
    assert [row["name"] for row in found["accounts"]] == [f"{root}/a", f"{root}/b", f"{root}/c"]
    assert [window["minutes"] for window in found["total"]] == [5, 60, DAY_MINUTES]
    hour = found["total"][1]
    assert {field: hour[field] for field in FIELDS} == {
        "spent_micros": spent,
        "attempts": 2 * 3 + 2 * 3 + 1,
        "errors": 2 * 3,
        "denied": 0,
        "runs": 5,
        "failed_runs": 2,
    }
    assert hour["error_rate"] == 6 / 13
    address = ("--url", view.url, "--minutes", "60")
    assert json.loads(whole.cli("figures", "accounts", root, "--json", *address))["total"] == [hour]
    assert f"talk step 1 h {money(settled)} 1 0 0.0% 0" in " ".join(
        whole.cli("figures", "functions", "talk", *address).split()
    )
    below = view.get(f"/v1/accounts/{root}/a", minutes=60)["total"]
    assert [(window["errors"], window["error_rate"], window["runs"]) for window in below] == [(0, 0.0, 2)]

    (failing,) = view.get("/v1/functions/fail", minutes=60)["functions"]
    assert failing["kind"] == "step"
    assert failing["windows"][0]["attempts"] == failing["windows"][0]["errors"] >= 6
    assert failing["windows"][0]["error_rate"] == 1.0
    names = {row["name"] for row in view.get("/v1/functions", kind="step")["functions"]}
    assert {"one", "two", "three", "fail"} <= names
    assert view.get("/v1/functions", kind="tool")["functions"] == []
    assert view.figures(bad[-1].finished_ms) == folded(whole, bad[-1].finished_ms)
    assert view.ask(f"/v1/accounts/{root}/nobody").status == 404
    assert view.ask("/v1/accounts", minutes="0").status == 400


@pytest.mark.feature("O4")
def test_who_waits_is_told_of_the_next_change_and_of_none_after_the_time(whole: WholeStack, view: View) -> None:
    run_id = whole.client.start("chain", 1, run_id=new_id("wait"), account="asked/wait")
    assert whole.wait(run_id).needs_human
    seq = view.run(run_id, lambda found: found["status"] == "waiting")["seq"]
    assert view.ask(f"/v1/runs/{run_id}", after_seq=seq, wait_ms=50).body["seq"] == seq

    answers: list[Answer] = []
    asking = threading.Thread(
        target=lambda: answers.append(view.ask(f"/v1/runs/{run_id}", after_seq=seq, wait_ms=30_000))
    )
    asking.start()
    whole.client.approve(run_id)
    asking.join(timeout=WAIT_S)
    assert answers[0].body["seq"] > seq
    assert whole.client.wait(run_id, WAIT_S).status == "succeeded"


@pytest.mark.parametrize(
    ("path", "query", "status", "code"),
    [
        ("/v1/runs/no-such-run", {}, 404, "unknown_run"),
        ("/v1/runs/" + quote("ä/%?\n"), {}, 404, None),
        ("/v1/runs/x", {"wait_ms": "²"}, 400, "bad_request"),
        ("/v1/runs/x", {"wait_ms": "30001"}, 400, "bad_request"),
        ("/v1/runs/x", {"after_seq": "-1"}, 400, "bad_request"),
        ("/v1/runs", {"limit": "0"}, 400, "bad_request"),
        ("/v1/runs", {"limit": "9" * 5000}, 400, "bad_request"),
        ("/v1/spend", {"minutes": "all"}, 400, "bad_request"),
        ("/v1/spend", {"since_ms": "0"}, 400, "bad_request"),
        ("/v1/accounts", {"minutes": "2880"}, 400, "bad_request"),
        ("/v1/nothing", {}, 404, None),
    ],
)
def test_a_bad_question_gets_a_clear_answer(
    view: View, path: str, query: Mapping[str, str], status: int, code: str | None
) -> None:
    answer = view.ask(path, **query)
    assert answer.status == status
    if code is not None:
        assert answer.body["code"] == code
        assert answer.body["message"]


def test_it_tells_that_it_is_ready(stack: WholeStack, view: View) -> None:
    assert view.get("/ready") == {"ready": True, "lag": 0}
    health = view.get("/health")
    assert health["ready"] is True
    assert health["partitions"] == list(range(stack.counts[RUNS]))


# --- what it survives -----------------------------------------------------------------------------------------------------


@pytest.mark.feature("D1")
@pytest.mark.feature("O4")
def test_a_kill_changes_nothing_that_it_knows(whole: WholeStack, view: View) -> None:
    ids = [whole.client.start("chain", n, account=f"kill/{n % 3}") for n in range(20)]
    waiting = whole.client.start("chain", 1, account="asked/kill")
    for run_id in [*ids, waiting]:
        seq = whole.wait(run_id).seq
        view.run(run_id, lambda found, seq=seq: found["seq"] == seq)
    before = view.checksum()
    read_before = view.get("/health")["entries"]

    whole.kill(GATEWAY)
    assert view.checksum() == before
    assert view.get("/health")["entries"] < read_before, "it has read the log again instead of its changelog"

    # What was under way goes on where it was.
    whole.client.approve(waiting)
    run = whole.client.wait(waiting, WAIT_S)
    body = view.run(waiting, lambda found: found["seq"] == run.seq)
    assert (body["status"], body["incomplete"]) == ("succeeded", False)


@pytest.mark.feature("D1")
def test_killed_again_and_again_under_load_it_ends_with_the_truth(whole: WholeStack, view: View) -> None:
    root = new_id("load")
    ids = []
    for _ in range(2):
        ids += [whole.client.start("chain", n, account=root) for n in range(40)]
        view.run(ids[-40], lambda found: found["seq"])  # it has begun to follow them
        whole.kill(GATEWAY)
    spent = 0
    for run_id in ids:
        truth = whole.wait(run_id)
        spent += truth.spent_micros
        body = view.run(run_id, lambda found, seq=truth.seq: found["seq"] >= seq)
        assert (body["seq"], body["status"], body["spent_micros"]) == (truth.seq, "succeeded", truth.spent_micros)
        assert (body["succeeded_count"], body["incomplete"]) == (3, False)
    assert view.get("/v1/spend", account=root)["total_micros"] == spent
    assert len(view.get("/v1/runs", account=root, limit=1000)["runs"]) == len(ids)


@pytest.mark.feature("D1")
def test_a_stop_is_clean_and_quick_to_come_back_from(whole: WholeStack, view: View) -> None:
    before = view.checksum()
    os.kill(whole.pids[GATEWAY], signal.SIGTERM)
    whole.expect_other_pid(GATEWAY)
    assert view.checksum() == before
    assert view.pid == whole.pids[GATEWAY]


# Dots would lead elsewhere on the other gateway, slashes and signs mean something there.
NOBODYS_NAMES = {
    f"/v1/{what}/{name}": code
    for what, code in (("runs", "unknown_run"), ("accounts", "nothing_counted"), ("functions", "nothing_counted"))
    for name in (
        "..",
        ".",
        "%2e%2e",
        "..%2f..%2fhealth",
        "x%2f..%2f..%2f..%2fhealth",
        "a%2fb",
        "%3fx=1%23%25",
        "%ff",
        "%00",
    )
} | {"/v1/accounts/../runs": "nothing_counted", "/v1/accounts/a/../../../health": "nothing_counted"}


@pytest.mark.feature("O4")
def test_two_gateways_share_the_runs_and_each_answers_for_both(whole: WholeStack, view: View, tmp_path: Path) -> None:
    ids = [whole.client.start("chain", n, account="shared/team") for n in range(8)]
    seqs = {run_id: whole.wait(run_id).seq for run_id in ids}
    with second_gateway(whole, tmp_path) as second:
        other = View(tmp_path / "gateway.json")
        every = set(range(whole.counts[RUNS]))

        def shared() -> bool:
            mine, theirs = (set(one.get("/health")["partitions"]) for one in (view, other))
            return bool(mine) and bool(theirs) and mine | theirs == every and not mine & theirs

        eventually(shared, "the two to share the partitions")
        for one in (view, other):
            answer = eventually(lambda one=one: complete(one, "shared", len(ids)), "all runs from either")
            assert {run["run_id"] for run in answer["runs"]} == set(ids)
            eventually(lambda one=one: spend_of(one) == spend_of(view) != {}, "the same spend from either")
            for run_id, seq in seqs.items():
                assert one.get(f"/v1/runs/{run_id}")["seq"] == seq
            assert [row["name"] for row in one.get("/v1/accounts/shared/team")["accounts"]] == ["shared/team"]
            wrong = {path: one.ask(path) for path in NOBODYS_NAMES}
            assert {
                path: (status, body["code"] if isinstance(body, dict) else body)
                for path, (status, body) in wrong.items()
            } == {path: (404, code) for path, code in NOBODYS_NAMES.items()}
        second.terminate()
        assert second.wait(WAIT_S) == 0
    # The one that is left takes over what the other had.
    eventually(lambda: set(view.get("/health")["partitions"]) == every, "the first to own everything again")
    answer = eventually(lambda: complete(view, "shared", len(ids)), "all runs from the one that is left")
    assert {run["run_id"] for run in answer["runs"]} == set(ids)


@pytest.mark.feature("D1")
@pytest.mark.feature("O4")
def test_a_gateway_that_is_killed_has_its_share_taken_over_and_no_figure_counts_twice(
    whole: WholeStack, view: View, tmp_path: Path
) -> None:
    """Both are killed in turn while runs are under way: the one that nobody restarts, and the one that comes back."""
    root = new_id("takeover")
    every = set(range(whole.counts[RUNS]))
    ids: list[str] = []

    def start_some() -> None:
        ids.extend(whole.client.start("chain" if n % 3 else "fail", n, account=f"{root}/{n % 4}") for n in range(24))

    def until_seen() -> int:
        runs = [whole.wait(run_id) for run_id in ids]
        for run in runs:
            view.run(run.run_id, lambda found, seq=run.seq: found["seq"] == seq)
        return max(run.finished_ms for run in runs)

    start_some()
    with second_gateway(whole, tmp_path) as second:
        other = View(tmp_path / "gateway.json")

        def shared() -> bool:
            mine, theirs = (one.get("/health") for one in (view, other))
            kept = set(mine["standby"]) == set(theirs["partitions"]) and set(theirs["standby"]) == set(
                mine["partitions"]
            )
            return kept and bool(theirs["partitions"]) and set(mine["partitions"]) | set(theirs["partitions"]) == every

        eventually(shared, "the two to share the partitions, each with a copy of the other's")
        start_some()
        until_ms = until_seen()
        truth = folded(whole, until_ms)
        assert view.figures(until_ms) == truth
        assert other.figures(until_ms) == truth, "who does not own a partition asks who does"

        start_some()
        whole.kill(GATEWAY)
        until_ms = until_seen()
        # The other one would ask it at its old address, which here is another one after each start: see the room's README.
        assert view.figures(until_ms) == folded(whole, until_ms)

        start_some()
        before = view.get("/health")
        second.kill()
        second.wait(WAIT_S)
        start_some()
    eventually(lambda: set(view.get("/health")["partitions"]) == every, "the first to own everything again")
    after = view.get("/health")
    # It had a copy: it read what the other one wrote in its last moments, and not all that both ever wrote.
    read = after["changelog_records"] - before["changelog_records"]
    assert read < (after["runs"] + after["tallies"]) / 2, (before, after)
    until_ms = until_seen()
    assert view.figures(until_ms) == folded(whole, until_ms)
    total = view.get(f"/v1/accounts/{root}", until_ms=until_ms)["total"][-1]
    assert (total["runs"], total["failed_runs"]) == (len(ids), len(ids) // 3)


def spend_of(view: View) -> dict[str, int]:
    """Return what the accounts spent; nothing while a partition has no answer. From when on is counted changes every minute."""
    answer = view.get("/v1/spend", account="shared")
    return {} if answer["partitions_missing"] else {row["account"]: row["total_micros"] for row in answer["accounts"]}


def complete(view: View, account: str, count: int) -> Any:
    """Return the runs of an account if none is missing."""
    answer = view.get("/v1/runs", account=account)
    return answer["partitions_missing"] == [] and len(answer["runs"]) == count and answer


@contextmanager
def second_gateway(whole: WholeStack, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A further gateway beside the stack's own; killed at the end if it still runs."""
    environment = {
        **os.environ,
        "TIDEGATE_KAFKA_BOOTSTRAP": whole.stack.settings.bootstrap,
        "TIDEGATE_KAFKA_SESSION_TIMEOUT_MS": SESSION_TIMEOUT_MS,
        "TIDEGATE_DATA_DIR": str(folder),
        "TIDEGATE_GATEWAY_PORT": "0",
        "TIDEGATE_INSTANCE_ID": "gateway-second",
    }
    with (folder / "second.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "tidegate.gateway"], env=environment, stderr=log, stdout=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT_S)
