"""`tidegate runs …` and `tidegate workflow …` on a whole system, as people and scripts use them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from support import fault_app
from support.stack import WAIT_S, WholeStack, assert_whole, eventually
from tidegate.cli.__main__ import app

OK, FAILED, USAGE, NO_ANSWER, REFUSED, CANCELLED, NEEDS_HUMAN, TIMEOUT = range(8)

POLICY = """
policy: ask
version: "1"
rules:
  - name: ask-about-two
    when: account.startsWith('asked') && step == 'two'
    then: require_approval
    reason: somebody must look
  - name: never
    when: account == 'denied'
    then: deny
    reason: not for this account
"""

pytestmark = pytest.mark.feature("O4")


class Cli:
    """The command in this process, which is quicker than a process each. What it prints on both outputs is kept apart."""

    def __init__(self, whole: WholeStack) -> None:
        self.environment = {
            "TIDEGATE_KAFKA_BOOTSTRAP": whole.stack.settings.bootstrap,
            "TIDEGATE_DATA_DIR": str(whole.stack.data_dir),
        }

    def __call__(self, *words: str, code: int = OK, text: str | None = None, **variables: str) -> Result:
        done = CliRunner().invoke(app, list(words), input=text, env={**self.environment, **variables})
        assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception}"
        return done

    def json(self, *words: str, code: int = OK) -> Any:
        return json.loads(self(*words, "--json", code=code).stdout)

    def shown(self, run_id: str) -> dict[str, Any]:
        """Return what `show` says; nothing as long as the live view is so far behind that it has no such run."""
        done = CliRunner().invoke(app, ["runs", "show", run_id, "--json"], env=self.environment)
        assert done.exit_code in (OK, REFUSED), f"{done.exit_code}\n{done.stderr}\n{done.exception}"
        return dict(json.loads(done.stdout)) if done.exit_code == OK else {}

    def spawn(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tidegate.cli", *words],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    folder = tmp_path_factory.mktemp("cli")
    with WholeStack(folder, services=("scheduler", "gate", "gateway")) as whole:
        policy = folder / "ask.yaml"
        policy.write_text(POLICY, encoding="utf-8")
        whole.cli("policy", "apply", str(policy))
        yield whole


@pytest.fixture
def whole(stack: WholeStack) -> Iterator[WholeStack]:
    yield stack
    assert_whole(stack)


@pytest.fixture
def cli(whole: WholeStack) -> Cli:
    return Cli(whole)


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


def view_of(cli: Cli, run_id: str, status: str) -> Any:
    """Return what `show` says, once the live view has come so far."""
    return eventually(lambda: (body := cli.shown(run_id)).get("status") == status and body, f"it is {status}")


# --- starting -------------------------------------------------------------------------------------------------------------


def test_start_prints_the_id_and_wait_the_events_and_the_output(cli: Cli) -> None:
    run_id = cli("runs", "start", "chain", "--input", "1").stdout.strip()
    done = cli("runs", "wait", run_id)
    lines = done.stdout.splitlines()
    assert next(line.split()[2] for line in lines if " ms " in line) == "RunStarted"
    assert "RunFinished" in done.stdout
    assert f"run {run_id} succeeded, $0.000055 spent" in lines
    assert json.loads("\n".join(lines[lines.index("{") :])) == {"n": 4}


def test_everything_that_a_request_can_say_is_recorded(cli: Cli, whole: WholeStack) -> None:
    run_id = new_id("all")
    words = ["--account", "cli/all", "--budget-micros", "500", "--tag", "team=x", "--tag", "n=1=2"]
    run = cli.json("runs", "start", "chain", "-i", "1", "--run-id", run_id, *words, "--wait")
    assert run == {
        "run_id": run_id,
        "status": "succeeded",
        "workflow": run["workflow"],
        "account": "cli/all",
        "output": {"n": 4},
        "code": "",
        "reason": "",
        "approvals": [],
        "waits": [],
        "changes": [],
        "paused": False,
        "held": [],
        "spent_micros": 55,
        "seq": run["seq"],
        "started_ms": run["started_ms"],
        "finished_ms": run["finished_ms"],
    }
    started = whole.events(run_id)[0].data
    assert (started.budget_micros, started.tags) == (500, {"team": "x", "n": "1=2"})


@pytest.mark.feature("T1")
def test_an_agent_alone(cli: Cli) -> None:
    run = cli.json("runs", "start", "--agent", "confused", "--wait")
    assert (run["status"], run["workflow"].partition("@")[0]) == ("succeeded", "agent:confused")


def test_input_comes_from_a_file_or_from_standard_input(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text("20", encoding="utf-8")
    assert cli.json("runs", "start", "chain", "--input", f"@{file}", "--wait")["output"] == {"n": 42}
    done = cli("runs", "start", "chain", "--input", "-", "--json", text="30\n")
    assert cli.json("runs", "wait", json.loads(done.stdout)["run_id"])["output"] == {"n": 62}


def test_the_same_again_runs_once_and_other_content_is_told(cli: Cli, whole: WholeStack) -> None:
    run_id = new_id("again")
    first = cli.json("runs", "start", "chain", "-i", "1", "--run-id", run_id, "--wait")
    assert cli.json("runs", "start", "chain", "-i", "1", "--run-id", run_id, "--wait") == first
    other = cli("runs", "start", "chain", "-i", "2", "--run-id", run_id, "--wait", code=REFUSED)
    assert f"run {run_id} is there already, with other content" in other.stderr
    assert len(whole.entered(run_id)) == 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["fail", "--account", "cli"], FAILED, "attempts_exhausted"),
        (["chain", "--account", "denied", "-i", "1"], FAILED, "not for this account"),
        (["no-such-workflow"], REFUSED, "unknown_workflow"),
        (["checked", "-i", "-1"], REFUSED, "invalid_input"),
        (["chain", "-i", "1", "--account", "asked/exit"], NEEDS_HUMAN, "tidegate approvals approve"),
    ],
    ids=["failed", "denied", "unknown workflow", "bad input", "needs a human"],
)
def test_the_exit_code_says_how_it_ended(cli: Cli, words: list[str], code: int, says: str) -> None:
    assert says in cli("runs", "start", *words, "--wait", code=code).stdout


def test_waiting_can_be_given_up_and_the_run_goes_on(cli: Cli) -> None:
    run_id = new_id("slow")
    done = cli("runs", "start", "never", "--run-id", run_id, "--wait", "--timeout", "0.5", code=TIMEOUT)
    assert f"run {run_id} did not end within 0.5 s" in done.stderr
    cli("runs", "cancel", run_id, "--reason", "nobody comes")
    run = cli.json("runs", "wait", run_id, code=CANCELLED)
    assert "nobody comes" in run["reason"]


# --- a human ----------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("P4")
def test_a_question_is_shown_approved_and_recorded(cli: Cli, whole: WholeStack) -> None:
    run_id = new_id("approve")
    run = cli.json(
        "runs", "start", "chain", "-i", "1", "--run-id", run_id, "--account", "asked/a", "--wait", code=NEEDS_HUMAN
    )
    (question,) = run["approvals"]
    assert (question["step_id"], question["function"], question["reason"]) == ("two", "two", "somebody must look")
    view_of(cli, run_id, "waiting")
    how = f"tidegate approvals approve {run_id} two --question {question['question']}"
    listed = cli("approvals", "list", "--account", "asked/a").stdout
    for shown in (cli("runs", "show", run_id).stdout, listed):
        assert "rule ask-about-two of ask@1: somebody must look" in shown
        assert f"arguments {question['arguments_hash']}" in shown
        assert how in shown
    stale = cli("approvals", "approve", run_id, "two", "--question", "0123456789abcdef", code=REFUSED)
    assert f"by rule ask-about-two of ask@1, question {question['question']}" in stale.stderr
    wrong = cli("runs", "approve", run_id, "three", code=REFUSED)
    assert "no_such_approval" in wrong.stderr
    assert "open: two" in wrong.stderr
    assert cli("runs", "wait", run_id, code=NEEDS_HUMAN)
    done = cli("runs", "approve", run_id, "--by", "ann", "--reason", "fine")
    about = f"rule ask-about-two of ask@1, arguments {question['arguments_hash']}"
    assert done.stdout == f"approved: two (attempt 1) of run {run_id}: {about}\n"
    assert cli.json("runs", "wait", run_id)["output"] == {"n": 4}
    (resolved,) = [event.data for event in whole.events(run_id) if event.type == "ApprovalResolved"]
    assert (resolved.approved, resolved.by, resolved.reason) == (True, "ann", "fine")
    assert "run_is_over" in cli("runs", "approve", run_id, code=REFUSED).stderr


@pytest.mark.feature("P4")
def test_a_question_is_rejected(cli: Cli) -> None:
    run_id = new_id("reject")
    cli("runs", "start", "chain", "-i", "1", "--run-id", run_id, "--account", "asked/r", "--wait", code=NEEDS_HUMAN)
    assert cli("runs", "reject", run_id, "two", "--reason", "no way").stdout.startswith("rejected: two")
    run = cli.json("runs", "wait", run_id, code=FAILED)
    assert run["code"] == "rejected"
    assert "no way" in run["reason"]


@pytest.mark.feature("D4")
def test_commands_to_runs_that_are_not_there_or_over_say_so(cli: Cli) -> None:
    nobody = new_id("nobody")
    for command in ("approve", "reject", "cancel"):
        assert f"unknown_run: there is no run {nobody}" in cli("runs", command, nobody, code=REFUSED).stderr
    over = cli.json("runs", "start", "chain", "-i", "1", "--wait")["run_id"]
    assert "run_is_over" in cli("runs", "cancel", over, code=REFUSED).stderr


# --- looking ------------------------------------------------------------------------------------------------------------------


def test_events_are_those_of_the_log(cli: Cli, whole: WholeStack) -> None:
    run_id = cli.json("runs", "start", "chain", "-i", "1", "--wait")["run_id"]
    lines = cli("runs", "events", run_id, "--json").stdout.splitlines()
    printed = [json.loads(line) for line in lines]
    truth = whole.events(run_id)
    assert [(one["seq"], one["type"], one["at_ms"]) for one in printed] == [(e.seq, e.type, e.at_ms) for e in truth]
    assert json.loads(printed[-1]["data"]["output"]) == {"n": 4}
    assert "-type" not in printed[0]["data"]
    assert len(cli("runs", "events", run_id).stdout.splitlines()) == len(truth)
    assert cli("runs", "events", run_id, "--follow", "--json").stdout.splitlines() == lines
    assert "the log has no run" in cli("runs", "events", new_id("nobody"), code=REFUSED).stderr


def test_list_and_show_say_what_the_live_view_says(cli: Cli) -> None:
    account = new_id("list")
    first = cli.json("runs", "start", "chain", "-i", "1", "--account", account, "--wait")["run_id"]
    second = cli.json("runs", "start", "chain", "-i", "1", "--account", f"{account}/b", "--wait")["run_id"]
    for run_id in (first, second):  # of two partitions, the later one may be read first
        view_of(cli, run_id, "succeeded")
    found = cli.json("runs", "list", "--account", account)["runs"]
    assert [run["run_id"] for run in found] == [second, first]
    assert [run["run_id"] for run in cli.json("runs", "list", "--account", account, "-n", "1")["runs"]] == [second]
    assert cli.json("runs", "list", "--account", account, "-s", "failed", "-s", "running")["runs"] == []
    assert len(cli.json("runs", "list", "--account", account, "--workflow", "chain")["runs"]) == 2
    table = cli("runs", "list", "--account", account).stdout
    assert first in table
    assert "$0.000055" in table
    page = cli("runs", "show", first).stdout
    for word in (first, "succeeded", "three", '{"n":4}', "$0.000055"):
        assert word in page
    assert "no run" in cli("runs", "show", new_id("nobody"), code=REFUSED).stderr


def test_watch_follows_a_run_over_a_kill_of_the_gateway(cli: Cli, whole: WholeStack) -> None:
    run_id = new_id("watched")
    cli("runs", "start", "chain", "-i", "1", "--run-id", run_id, "--account", "asked/w", "--wait", code=NEEDS_HUMAN)
    watching = cli.spawn("runs", "watch", run_id, "--json")
    said: list[Any] = []
    assert watching.stdout is not None
    reading = threading.Thread(target=lambda: said.extend(map(json.loads, watching.stdout or ())))
    reading.start()
    eventually(lambda: any(body["status"] == "waiting" for body in said), "the question to be shown")
    whole.kill("gateway-0")
    cli("runs", "approve", run_id)
    assert watching.wait(WAIT_S) == OK
    reading.join(timeout=WAIT_S)
    assert said[-1]["status"] == "succeeded"
    seqs = [body["seq"] for body in said]
    assert seqs == sorted(set(seqs)), "a change was told twice, or out of order"
    assert "Waiting for it" in (watching.stderr.read() if watching.stderr else "")


def test_watch_ends_with_the_exit_code_of_the_run(cli: Cli) -> None:
    failed = cli.json("runs", "start", "fail", "--wait", code=FAILED)["run_id"]
    view_of(cli, failed, "failed")
    done = cli("runs", "watch", failed, code=FAILED)
    assert f"run {failed} failed" in done.stdout
    assert "no run" in cli("runs", "watch", new_id("nobody"), code=REFUSED).stderr
    asked = cli.json("runs", "start", "chain", "-i", "1", "--account", "asked/x", "--wait", code=NEEDS_HUMAN)["run_id"]
    view_of(cli, asked, "waiting")  # half a second is not enough for a view that is behind
    done = cli("runs", "watch", asked, "--timeout", "0.5", code=TIMEOUT)
    assert "asks for approval" in done.stdout
    assert "still waiting" in done.stderr


# --- workflows ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("G1")
def test_definitions_are_published_from_files_and_shown(cli: Cli, tmp_path: Path) -> None:
    name = new_id("flow").replace("-", "_")
    definition = {
        "name": name,
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "one"}},
        "functions": {"one": {"kind": "step"}},
    }
    as_json, as_yaml = tmp_path / "flow.json", tmp_path / "flow.yaml"
    as_json.write_text(json.dumps(definition), encoding="utf-8")
    as_yaml.write_text(
        f"- {json.dumps(definition)}\n- {json.dumps({**definition, 'version': '2'})}\n", encoding="utf-8"
    )
    assert cli("workflow", "publish", str(as_json)).stdout == f"{name}@1\n"
    assert cli.json("workflow", "publish", str(as_yaml)) == [f"{name}@1", f"{name}@2"]
    assert json.loads(cli("workflow", "show", name).stdout)["version"] == "2"
    assert json.loads(cli("workflow", "show", f"{name}@1").stdout) == definition
    listed = [row for row in cli.json("workflow", "list") if row["name"] == name]
    assert [(row["version"], row["is_latest"]) for row in listed] == [("1", False), ("2", True)]
    assert cli.json("runs", "start", name, "-i", "1", "--wait")["workflow"] == f"{name}@2"

    as_json.write_text(json.dumps({**definition, "max_steps": 7}), encoding="utf-8")
    assert "other content" in cli("workflow", "publish", str(as_json), code=REFUSED).stderr
    as_json.write_text(json.dumps({**definition, "version": "3", "edges": [["a", "b"]]}), encoding="utf-8")
    assert "unknown node" in cli("workflow", "publish", str(as_json), code=USAGE).stderr
    assert "no workflow 'nope'" in cli("workflow", "show", "nope", code=REFUSED).stderr


@pytest.mark.feature("G1")
def test_an_app_is_published_by_its_name(cli: Cli, whole: WholeStack) -> None:
    assert cli("workflow", "publish", f"{fault_app.__file__}:app").stdout.split() == whole.labels
    assert "chain" in cli("workflow", "list").stdout


# --- who is there, and what waits for nobody ------------------------------------------------------------------------------


@pytest.mark.feature("P7")
def test_processes_and_functions_are_listed(cli: Cli) -> None:
    lines = {line["instance_id"]: line for line in cli.json("instances")}
    assert {line["service"] for line in lines.values()} >= {"scheduler", "gate", "gateway", "executor"}
    executor = next(line for line in lines.values() if line["service"] == "executor")
    assert (executor["state"], executor["queue"]) == ("registered", "default")
    assert executor["slots"] > 0
    offered = cli.json("functions")
    assert {f"{line['kind']}:{line['function']}" for line in offered} == set(executor["functions"])
    assert all(line["version"] and executor["instance_id"] in line["instances"] for line in offered)
    assert executor["instance_id"] in cli("instances").stdout
    assert offered[0]["function"] in cli("functions", "--queue", "default").stdout
    assert cli.json("functions", "--queue", "nowhere") == []


@pytest.mark.feature("P6")
@pytest.mark.feature("P7")
def test_work_that_nobody_offers_is_shown_waiting(cli: Cli, tmp_path: Path) -> None:
    definition = {
        "name": "lonely",
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "nobody_does_this"}},
        "functions": {"nobody_does_this": {"kind": "step"}},
    }
    file = tmp_path / "lonely.json"
    file.write_text(json.dumps(definition), encoding="utf-8")
    cli("workflow", "publish", str(file))
    run_id = cli("runs", "start", "lonely", "--priority", "8").stdout.strip()
    reason = "no executor of queue default offers step:nobody_does_this"
    eventually(lambda: reason in [step["waits_for"] for step in cli.shown(run_id).get("steps", ())], "it says why")
    assert f"waits: {reason}" in " ".join(cli("runs", "show", run_id).stdout.split())
    assert "StepThrottled" in cli("runs", "events", run_id).stdout
    cli("runs", "cancel", run_id)
    view_of(cli, run_id, "cancelled")


@pytest.mark.feature("P3")
def test_limits_are_checked_published_and_removed(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "limit.yaml"
    file.write_text("kind: limit\nlimit: few\nversion: '1'\nper: [account]\nat_once: 1\n", encoding="utf-8")
    cli("policy", "apply", str(file))
    assert "limit:few" in cli("policy", "list").stdout
    runs = [cli("runs", "start", "chain", "--input", "1").stdout.strip() for _ in range(4)]
    for run_id in runs:
        cli("runs", "wait", run_id)
    cli("policy", "remove", "limit:few")
    file.write_text("kind: limit\nlimit: few\nversion: '1'\n", encoding="utf-8")
    assert "it limits nothing" in cli("policy", "apply", str(file), code=USAGE).stderr
