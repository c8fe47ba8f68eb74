"""`tidegate why`, `approvals` and `budget`: what they say, read from logs that scheduler and gate wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from support.cluster import Cluster
from tidegate import codec
from tidegate.cli import approvals, budget, why
from tidegate.domain import canonical
from tidegate.domain.messages import PolicyPublished
from tidegate.eventlog.interface import Record


class Shell:
    """The commands, on a cluster in memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = Cluster()
        self.cluster.now_ms = 1_790_000_000_000
        for module in (why, budget):
            monkeypatch.setattr(module, "KafkaBroker", lambda _: self.cluster.broker)
        monkeypatch.setattr(budget.time, "time_ns", lambda: self.cluster.now_ms * 1_000_000)

    def publish(self, document: dict[str, Any]) -> None:
        kind = document.get("kind", "policy")
        key = document[kind] if kind == "policy" else f"{kind}:{document[kind]}"
        row = PolicyPublished(policy_id=key, version="1", document=canonical.dumps(document), by="t", at_ms=0)
        self.cluster.writer.send(Record("policies", 0, key.encode(), codec.encode(row)))
        self.cluster.writer.flush(1.0)
        self.cluster.incarnation = self.cluster.register()
        self.cluster.settle()

    def __call__(self, app: Any, *words: str) -> Any:
        return CliRunner().invoke(app, words)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(monkeypatch)


DAILY = {
    "kind": "budget",
    "budget": "daily",
    "version": "3",
    "window": "day",
    "limits": {"money_micros": 5},
    "on_exceed": "pause",
}


# What it costs is not declared: it was 2 on average so far.
VALUES = {
    "bucket": "daily|acme|1789948800000",
    "meter": "micros",
    "needed": 2,
    "limit": 5,
    "spent": 4,
    "reserved": 0,
}


@pytest.mark.feature("P1")
@pytest.mark.feature("P2")
def test_one_command_says_why(shell: Shell) -> None:
    shell.publish(DAILY)
    rule = {"name": "never-c", "when": 'step == "c" && account == "acme"', "then": "deny", "reason": "no c"}
    shell.publish({"policy": "shop", "version": "7", "rules": [rule]})
    shell.cluster.start_run("r")
    shell.cluster.settle()
    said = shell(why.app, "r", "c")
    assert said.exit_code == 0, said.output
    assert "c#1  denied: no c; by shop@7/never-c" in said.stdout
    assert 'input from nodes.b\n    it was {"ok": true}' in said.stdout
    assert 'it looked at {"account":"acme","step":"c"}' in said.stdout
    shell.cluster.start_run("t", "a")
    shell.cluster.settle()
    lines = [json.loads(line) for line in shell(why.app, "t", "--json").stdout.splitlines()]
    assert [line["rule"] for line in lines] == ["budget:daily"]
    assert lines[0]["policy"] == "daily@3"
    assert json.loads(lines[0]["values"]) == VALUES
    assert "paused for lack of budget; the next window begins at 2026-09-22T00:00:00+00:00: " in lines[0]["said"]
    never = shell(why.app, "t", "nothing")
    assert never.exit_code == 4
    assert "never asked about step nothing of run t" in never.stderr
    assert shell(why.app, "nobody").exit_code == 4


@pytest.mark.feature("P2")
def test_a_top_up_is_a_command_and_lets_what_is_paused_go_on(shell: Shell) -> None:
    shell.publish(DAILY)
    assert "nothing counted yet" in shell(budget.app, "list").stdout
    for run in ("r", "s"):
        shell.cluster.start_run(run, "a")
        shell.cluster.settle()
    shown = json.loads(shell(budget.app, "show", "daily", "--json").stdout)
    assert shown[0]["meters"]["micros"] == {"limit": 5, "spent": 4, "reserved": 0}
    shell.cluster.start_run("u", "a")
    shell.cluster.settle()
    assert shell.cluster.verified()[1]["u"].status == "running"
    done = shell(budget.app, "topup", "daily", "--account", "acme", "--dollars", "0.00001", "--reason", "more")
    assert done.exit_code == 0, done.output
    shell.cluster.settle()
    assert shell.cluster.verified()[1]["u"].status == "succeeded"
    shown = json.loads(shell(budget.app, "show", "daily", "--json").stdout)
    assert shown[0]["meters"]["micros"] == {"limit": 15, "spent": 6, "reserved": 0}
    shell.cluster.now_ms += 24 * 3_600_000
    shell(budget.app, "topup", "daily", "--account", "acme", "--dollars", "0.00001")
    left = [key for key in budget.in_force(shell.cluster.broker) if key.startswith("topup:")]
    assert len(left) == 1  # the one of yesterday says nothing any more


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("topup", "weekly", "--account", "acme", "--calls", "1"), 4, "there are: daily"),
        (("topup", "daily", "--account", "acme"), 2, "say how much"),
        (("topup", "daily", "--account", "acme", "--dollars", "inf"), 2, "less than or equal to"),
        (("topup", "daily", "--account", "*", "--calls", "1"), 2, "account"),
        (("topup", "daily", "--account", "acme", "--calls", "1", "--run", "r"), 2, "not counted per run"),
        (("show", "weekly"), 4, "there is no budget 'weekly'"),
    ],
)
def test_wrong_usage_is_said(shell: Shell, words: tuple[str, ...], code: int, said: str) -> None:
    shell.publish(DAILY)
    result = shell(budget.app, *words)
    assert result.exit_code == code
    assert said in result.stderr


@pytest.mark.feature("P4")
def test_open_questions_are_listed_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    question = {
        "step_id": "a",
        "attempt": 1,
        "why": "policy",
        "rule": "big",
        "policy": "money@3",
        "reason": "too [big]",
    }

    class View:
        def __init__(self, url: str) -> None:
            assert url == "http://there"

        def runs(self, query: dict[str, Any]) -> dict[str, Any]:
            assert query == {"status": "waiting", "limit": 1000, "account": "acme"}
            row = {"account": "acme/x", "open_approvals": 1}
            return {
                "runs": [row | {"run_id": name} for name in ("new", "old")] + [{"run_id": "w", "open_approvals": 0}]
            }

        def run(self, run_id: str) -> dict[str, Any]:
            since = {"new": 2_000, "old": 1_000}[run_id]
            return {"approvals": [question | {"since_ms": since, "expires_at_ms": 0 if run_id == "old" else 99_000}]}

    monkeypatch.setattr(approvals, "LiveView", View)
    words = ["list", "--account", "acme", "--url", "http://there"]
    found = json.loads(CliRunner().invoke(approvals.app, [*words, "--json"]).stdout)
    assert [(q["run_id"], q["expires_at_ms"]) for q in found] == [("old", 0), ("new", 99_000)]
    table = CliRunner().invoke(approvals.app, words, env={"COLUMNS": "200"})
    assert "rule big of money@3" in table.stdout
    assert "too [big]" in table.stdout
    helped = CliRunner().invoke(approvals.app, ["approve", "--help"])
    assert helped.exit_code == 0


@pytest.mark.feature("P1")
@pytest.mark.feature("D2")
def test_why_names_the_document_and_the_rule_that_an_attempt_is_repeated_by(shell: Shell) -> None:
    rules = [{"on": ["Flaky"], "name": "slow-down", "max_attempts": 2, "backoff_ms": 100}]
    shell.publish(
        {"kind": "retry", "retry": "patient", "version": "4", "account": "*", "retries": {"retry_rules": rules}}
    )
    shell.cluster.fails = {"a": "Flaky"}
    shell.cluster.start_run("r", "a")
    shell.cluster.settle()
    said = [line for line in shell(why.app, "r", "a").stdout.splitlines() if "Flaky" in line]
    assert len(said) == 2
    assert "a#1  failed with Flaky: again at 2026-" in said[0]
    assert "a#2  failed with Flaky: not again," in said[1]
    assert all(line.endswith(" by patient@4/slow-down") for line in said)
