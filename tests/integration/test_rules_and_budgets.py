"""Rules and budgets as their users meet them: documents applied, runs held, `why`, answers, top-ups, and what the views show."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support import fault_app
from support.stack import WAIT_S, WholeStack, assert_whole, eventually
from tidegate.cli.__main__ import app
from tidegate.embedded import sql
from tidegate.sdk.client import Run

pytestmark = pytest.mark.timeout(240)
# So that what waits is restored from snapshots when its gate is killed.
ENV = {"TIDEGATE_CHECKPOINT_EVERY_ENTRIES": "5", "TIDEGATE_CHECKPOINT_EVERY_S": "0.3"}
NUMBER = "4111-2222-3333"
STOLEN = "9111-2222-3333"

DOCUMENTS = """
policy: shop
version: "4"
rules:
  - name: stolen-cards
    when: name == 'charge' && args.card.number.startsWith('9')
    then: deny
    reason: the card is stolen
  - name: hide-cards
    when: name == 'charge' && has(args.card)
    then: allow
    redact: [card.number]
  - name: large-charges
    when: name == 'charge' && args.cents > 100
    then: require_approval
    reason: a large charge
  - name: in-time
    when: account == 'late/desk' && step == 'two'
    then: require_approval
    expires_s: 1
    reason: answer at once
  - name: apart
    when: account == 'apart/desk'
    then: allow
    isolation: job
---
kind: budget
budget: team-calls
version: "2"
account: "acme/*"
limits: {calls: 2}
on_exceed: pause
alerts: [50, 100]
---
kind: budget
budget: tight
version: "1"
account: lab
window: day
limits: {money_micros: 50}
---
kind: budget
budget: asking
version: "1"
account: desk
window: run
limits: {calls: 1}
on_exceed: ask
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    folder = tmp_path_factory.mktemp("rules")
    services = ("scheduler", "gate", "gateway", "projection")
    with WholeStack(folder, services=services, env=ENV) as whole:
        file = folder / "documents.yaml"
        file.write_text(DOCUMENTS, encoding="utf-8")
        assert "nothing wrong" in cli(whole, "policy", "validate", str(file))
        cli(whole, "policy", "diff", str(file), code=1)
        cli(whole, "policy", "apply", str(file))
        assert "no differences" in cli(whole, "policy", "diff", str(file))
        yield whole


@pytest.fixture
def whole(stack: WholeStack) -> Iterator[WholeStack]:
    yield stack
    assert_whole(stack)


def cli(whole: WholeStack, *words: str, code: int = 0) -> str:
    environment = {
        "TIDEGATE_KAFKA_BOOTSTRAP": whole.stack.settings.bootstrap,
        "TIDEGATE_DATA_DIR": str(whole.stack.data_dir),
    }
    done = CliRunner().invoke(app, list(words), env=environment)
    assert done.exit_code == code, f"{words}: {done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception}"
    return done.stdout + done.stderr


def over(whole: WholeStack, run_id: str) -> Run:
    """Wait for the run's end, whatever it asks of humans before."""
    return next(run for run, _ in whole.client.follow(run_id, WAIT_S) if run.is_over)


def live(whole: WholeStack, run_id: str) -> dict[str, Any]:
    """Return a run as the live view has it."""
    return dict(json.loads(cli(whole, "runs", "show", run_id, "--json")))


def meters(whole: WholeStack, budget: str, account: str) -> dict[str, Any]:
    """Return what `budget show` says of the one bucket of an account."""
    rows = json.loads(cli(whole, "budget", "show", budget, "--json"))
    (found,) = [row["meters"] for row in rows if row["account"] == account]
    return dict(found)


@pytest.mark.feature("P2", "P6")
def test_a_run_pauses_without_room_and_goes_on_when_somebody_tops_up(whole: WholeStack) -> None:
    run_id = whole.client.start("chain", 1, run_id="pauses", account="acme/support", prefer="executor-default-0")
    whole.until(run_id, "AttemptAwaitsBudget")
    said = cli(whole, "why", run_id, "three")
    assert "three#1  paused for lack of budget" in said
    assert "by team-calls@2/budget:team-calls" in said
    assert '"limit":2' in said
    assert meters(whole, "team-calls", "acme/support")["calls"] == {"limit": 2, "spent": 2, "reserved": 0}
    assert "calls: 2 + 0 of 2" in " ".join(cli(whole, "budget", "list").split())
    body = eventually(
        lambda: (b := live(whole, run_id))["steps"][-1]["waits_for"] and b, "the live view to say why it waits"
    )
    assert "needs 1 calls; of 2, 2 are spent" in body["steps"][-1]["waits_for"]

    whole.kill("gate-0")
    cli(whole, "budget", "topup", "team-calls", "--account", "acme/sales", "--calls", "5")  # of another team
    cli(whole, "budget", "topup", "nothing", "--account", "acme/support", "--calls", "5", code=4)
    cli(whole, "budget", "topup", "team-calls", "--account", "acme/support", code=2)
    assert "topped up team-calls of acme/support" in cli(
        whole,
        "budget",
        "topup",
        "team-calls",
        "--account",
        "acme/support",
        "--calls",
        "1",
        "--reason",
        "launch",
        "--by",
        "bob",
    )
    assert over(whole, run_id).status == "succeeded"
    settled = {"limit": 3, "spent": 3, "reserved": 0}  # the last settlement comes after the end of the run
    eventually(lambda: meters(whole, "team-calls", "acme/support")["calls"] == settled, "the last call to be settled")
    assert ", as preferred" in cli(whole, "why", run_id, "three")
    assert "bob" in cli(whole, "policy", "list")


@pytest.mark.feature("P2", "D3")
def test_without_room_a_strict_budget_denies_and_an_asking_one_asks(whole: WholeStack) -> None:
    """And a run may be approved more than once, each time what it asks then."""
    denied = whole.client.start("chain", 1, run_id="denied", account="lab/ml")
    asks = whole.client.start("chain", 1, run_id="asks", account="desk/a")
    ended = over(whole, denied)
    assert (ended.status, ended.code) == ("failed", "denied"), ended
    assert "needs 30 micros; of 50, 25 are spent and 0 set aside" in ended.reason
    assert "by tight@1/budget:tight" in cli(whole, "why", denied, "three")

    for step in ("two", "three"):
        (question,) = eventually(lambda step=step: open_questions(whole, asks, step), f"the question about {step}")
        assert (question["policy"], question["rule"]) == ("asking@1", "budget:asking")
        cli(whole, "approvals", "approve", asks, step, "--reason", "go on", "--by", "ann")
    assert over(whole, asks).status == "succeeded"
    said = cli(whole, "why", asks, "two")
    assert "approved by ann" in said


@pytest.mark.feature("P2", "P4")
def test_a_top_up_answers_an_open_question(whole: WholeStack) -> None:
    asks = whole.client.start("chain", 1, run_id="answered", account="desk/b")
    eventually(lambda: open_questions(whole, asks, "two"), "the question about two")
    cli(whole, "budget", "topup", "asking", "--account", "desk", "--run", asks, "--calls", "2")
    assert over(whole, asks).status == "succeeded"
    (resolved,) = [event.data for event in whole.client.events(asks) if event.type == "ApprovalResolved"]
    assert (resolved.step_id, resolved.command_id) == ("two", "")
    # The result of the attempt may overtake the gate's message: then the run says which budget had asked. The ledger tells why.
    assert resolved.by.startswith(("topup:", "budget:asking")), resolved
    assert "needs no approval any more, because of topup:" in cli(whole, "why", asks, "two")


@pytest.mark.feature("P2", "G2")
def test_children_spend_the_budget_of_their_parent(whole: WholeStack) -> None:
    chain = next(definition for definition in fault_app.app.definitions() if definition["name"] == "chain")
    family = {
        "name": "family",
        "version": "1",
        "nodes": {
            name: {"kind": "workflow", "workflow": f"chain@{chain['version']}", "input": "${ input }"}
            for name in ("x", "y")
        },
        "edges": [["x", "y"]],
        "functions": {},
        "workflows": {f"chain@{chain['version']}": chain},
    }
    whole.client.publish(family)
    first = whole.client.start("family", 1, run_id="enough", account="kin/a", budget_micros=1_000)
    second = whole.client.start("family", 1, run_id="short", account="kin/a", budget_micros=60)
    assert over(whole, first).status == "succeeded"
    ended = over(whole, second)
    assert (ended.status, ended.code) == ("failed", "child_failed"), ended
    assert "the budget of run short, which this run is a part of: needs" in ended.reason


@pytest.mark.feature("P1", "D2")
def test_a_retry_policy_is_applied_named_and_recorded(whole: WholeStack, tmp_path: Path) -> None:
    file = tmp_path / "patient.yaml"
    rules = "[{on: [ValueError, RuntimeError, BrokenError], name: broken, max_attempts: 2, backoff_ms: 10}]"
    file.write_text(
        f"kind: retry\nretry: patient\nversion: '1'\naccount: trying\nretries:\n  max_attempts: 2\n  retry_rules: {rules}\n",
        encoding="utf-8",
    )
    cli(whole, "policy", "apply", str(file))
    assert '"retry": "patient"' in cli(whole, "policy", "show", "retry:patient")
    wait_until_in_force(whole)
    run_id = whole.client.start("fail", 1, run_id="tries", account="trying/hard")
    assert over(whole, run_id).status == "failed"
    ended = [event.data for event in whole.client.events(run_id) if event.type == "AttemptEnded"]
    assert [event.retry_document for event in ended] == ["patient@1"] * 2
    assert "by patient@1/" in cli(whole, "why", run_id)


def wait_until_in_force(whole: WholeStack) -> None:
    """Wait until the scheduler has read the document: runs are started until an attempt of one is decided by it."""
    numbers = itertools.count()

    def is_in_force() -> bool:
        run_id = whole.client.start("fail", 1, run_id=f"tries-{next(numbers)}", account="trying/first")
        over(whole, run_id)
        return any(getattr(event.data, "retry_document", "") for event in whole.client.events(run_id))

    eventually(is_in_force, "the retry document in force")


def open_questions(whole: WholeStack, run_id: str, step: str) -> list[dict[str, Any]]:
    found = json.loads(cli(whole, "approvals", "list", "--json"))
    return [question for question in found if (question["run_id"], question["step_id"]) == (run_id, step)]


@pytest.mark.feature("P1")
def test_a_question_that_nobody_answers_lapses_and_what_must_run_apart_is_not_entered(whole: WholeStack) -> None:
    late = whole.client.start("chain", 1, run_id="late", account="late/desk")
    apart = whole.client.start("chain", 1, run_id="apart", account="apart/desk")
    ended = over(whole, apart)
    assert (ended.status, ended.code) == ("failed", "not_retryable"), ended
    (attempt,) = [event.data for event in whole.events(apart) if event.type == "AttemptEnded"]
    assert attempt.error_class == "UnsupportedIsolation"
    assert "job" in attempt.error_message
    assert not whole.entered(apart)
    ended = over(whole, late)
    assert (ended.status, ended.code) == ("failed", "approval_expired"), ended
    assert "the approval expired" in cli(whole, "why", late, "two")
    assert [line.step_id for line in whole.entered(late)] == ["one"]
    cli(whole, "approvals", "approve", late, "two", code=4)


@pytest.mark.feature("P1")
@pytest.mark.feature("O1")
def test_what_a_rule_redacts_is_in_no_view(whole: WholeStack) -> None:
    def order(number: str, cents: int) -> dict[str, Any]:
        return {"card": {"number": number, "name": "ann"}, "cents": cents}

    small = whole.client.start("charge", order(NUMBER, 5), run_id="small", account="shop/eu")
    large = whole.client.start("charge", order(NUMBER, 500), run_id="large", account="shop/eu")
    stolen = whole.client.start("charge", order(STOLEN, 5), run_id="stolen", account="shop/eu")
    paused = whole.client.start("charge", order(NUMBER, 5), run_id="no-room", account="acme/none")
    (question,) = eventually(lambda: open_questions(whole, large, "it"), "the question")
    assert (question["policy"], question["rule"]) == ("shop@4", "large-charges")
    cli(whole, "approvals", "approve", large, "it", "--by", "ann")
    assert [over(whole, run_id).status for run_id in (small, large, paused)] == ["succeeded"] * 3
    assert over(whole, stolen).code == "denied"
    said = cli(whole, "why", stolen)
    assert "denied: the card is stolen" in said
    assert STOLEN not in said

    data_dir = whole.stack.data_dir
    sql.wait_caught_up(data_dir, sql.log_ends(whole.broker), WAIT_S)
    runs = "run_id IN ('small', 'large', 'stolen', 'no-room')"
    for view in ("events", "ledger", "steps", "attempts", "approvals", "decisions", "waits"):
        # What a run was started with is nobody's argument.
        where = f"{runs} AND type != 'RunStarted'" if view == "events" else runs
        rows = sql.query(data_dir, f"SELECT * FROM {view} WHERE {where}")
        assert rows or view == "waits", view
        shown = [row for row in rows if NUMBER in json.dumps(row) or STOLEN in json.dumps(row)]
        assert not shown, (view, shown)
    rows = sql.query(data_dir, f"SELECT run_id, arguments FROM steps WHERE {runs}")
    cards = {row["run_id"]: json.loads(row["arguments"])["card"] for row in rows if row["run_id"] != "stolen"}
    hidden = {"number": "(redacted)", "name": "ann"}
    assert cards == {"small": hidden, "large": hidden, "no-room": hidden}
    buckets = sql.query(data_dir, "SELECT budget, account, limit_micros, spent_micros, is_closed FROM account_budgets")
    assert {tuple(row.values()) for row in buckets} >= {
        ("team-calls", "acme/support", None, 55, False),
        ("tight", "lab", 50, 25, False),
        ("asking", "desk", None, 55, True),  # of a run that is over
    }
