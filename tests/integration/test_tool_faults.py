"""Functions that go wrong, people who answer, money that runs out: on a whole system, with the books kept a second time."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from integration.conftest import LONG_RUN
from support.fault_app import ANY_JSON
from support.stack import WholeStack, assert_whole, eventually
from tidegate.audit.money import REFUSED, AttemptName


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


def run_of(whole: WholeStack, workflow: str, run_input: Any = None, **options: Any) -> Any:
    return whole.client.run(workflow, run_input, run_id=new_id(workflow), timeout_s=180, **options)


# --- functions ---------------------------------------------------------------


@pytest.mark.feature("D2")
def test_a_function_that_always_raises_is_tried_as_often_as_declared(whole: WholeStack) -> None:
    run = run_of(whole, "fail")
    assert (run.status, run.code) == ("failed", "attempts_exhausted")
    assert "no luck" in run.reason
    assert run.spent_micros == 9
    assert [line.attempt for line in whole.entered(run.run_id)] == [1, 2, 3]
    assert len({line.key for line in whole.entered(run.run_id)}) == 1


@pytest.mark.feature("D2")
def test_a_function_that_recovers_succeeds_and_has_its_effect_once(whole: WholeStack) -> None:
    run = run_of(whole, "fail_twice", 5)
    assert (run.status, run.output) == ("succeeded", 5)
    (key,) = {line.key for line in whole.entered(run.run_id)}
    assert (whole.fault_dir / "effects" / key).exists()


@pytest.mark.feature("D2")
@pytest.mark.parametrize(
    ("workflow", "run_input", "code", "says", "entries"),
    [
        ("fail_for_good", None, "not_retryable", "the card is stolen", 1),
        ("fail_unspeakably", None, "attempts_exhausted", "SystemExit", 2),
        ("hang", None, "attempts_exhausted", "not finished after 0.3 s", 2),
        ("hang_in_thread", None, "attempts_exhausted", "not finished after 0.3 s", 1),
        ("hang_and_complain", None, "attempts_exhausted", "not finished after 0.3 s", 1),
        ("not_json", "object", "not_retryable", "NotJson", 1),
        ("not_json", "nan", "not_retryable", "NotJson", 1),
        ("not_json", "surrogate", "not_retryable", "NotJson", 1),
        ("not_json", "bytes", "not_retryable", "NotJson", 1),
        ("not_json", "lambda", "not_retryable", "NotJson", 1),
        ("not_json", {"bad": "arguments"}, "not_retryable", "BadArguments", 0),
        ("large", 600_000, "not_retryable", "OutputTooLarge", 1),
    ],
)
def test_a_function_that_goes_wrong_ends_its_run_with_the_reason(
    whole: WholeStack, workflow: str, run_input: Any, code: str, says: str, entries: int
) -> None:
    run = run_of(whole, workflow, run_input)
    assert (run.status, run.code) == ("failed", code)
    assert says in run.reason
    assert len(whole.entered(run.run_id)) == entries
    assert len({line.pid for line in whole.entered(run.run_id)}) <= 1


@pytest.mark.feature("T2")
@pytest.mark.parametrize(
    ("workflow", "says"),
    [
        ("pay_late", "TimedOut: not finished after 0.5 s"),
        ("pay_late_in_thread", "it may still be running"),
        ("pay_and_die", "Died: its process was ended by SIGKILL"),
    ],
)
@pytest.mark.parametrize("answer", ["again", "fail", {"done": "paid by hand"}])
def test_what_must_not_be_repeated_asks_after_a_time_out_and_a_death(
    whole: WholeStack, workflow: str, says: str, answer: Any
) -> None:
    run = run_of(whole, workflow)
    assert (run.status, whole.paid(run.run_id)) == ("waiting", [1])
    (asked,) = run.approvals
    assert (asked.step_id, asked.attempt, asked.why) == ("it", 1, "outcome_unknown")
    assert says in asked.reason
    whole.client.respond(run.run_id, answer, attempt=1, why="outcome_unknown")
    run = whole.wait(run.run_id)
    expected = {"again": ("succeeded", "paid", [1, 2]), "fail": ("failed", None, [1])}
    assert (run.status, run.output, whole.paid(run.run_id)) == expected.get(
        str(answer), ("succeeded", "paid by hand", [1])
    )


@pytest.mark.feature("T2")
def test_an_agent_hears_what_a_human_says_of_a_payment_that_timed_out(whole: WholeStack) -> None:
    run = whole.client.run(agent="payer", run_id=new_id("payer"), timeout_s=180)
    assert (run.status, [asked.why for asked in run.approvals]) == ("waiting", ["outcome_unknown"])
    whole.client.reject(run.run_id, reason="no such account")
    run = whole.wait(run.run_id)
    assert (run.status, run.output[:2], whole.paid(run.run_id)) == ("succeeded", [False, None], [1])
    assert "no such account" in run.output[2]


@pytest.mark.feature("T4")
def test_what_finishes_while_it_is_aborted_has_finished(whole: WholeStack) -> None:
    """Its effect is known: calling that a timeout would have it done again."""
    run = run_of(whole, "finish_late")
    assert (run.status, run.output) == ("succeeded", "done, if late")
    assert [line.attempt for line in whole.entered(run.run_id)] == [1]


@pytest.mark.feature("T2")
def test_an_agent_that_calls_nonsense_is_told_so(whole: WholeStack) -> None:
    run = whole.client.run(agent="confused", run_id=new_id("confused"), timeout_s=180)
    assert run.status == "succeeded"
    (good, bad, unknown) = run.output
    assert good == [True, None]
    assert not bad[0]
    assert "n" in bad[1]
    assert not unknown[0]
    assert "rm_rf" in unknown[1]
    # Ids that repeat or are empty make no turn come again.
    assert [line.step_id for line in whole.entered(run.run_id)] == ["confused/1", "confused/1/tool:look", "confused/2"]


@pytest.mark.feature("G3")
def test_outputs_of_every_kind_are_kept_and_have_cost_one_entry(whole: WholeStack) -> None:
    run = run_of(whole, "returns", list(ANY_JSON))
    assert (run.status, run.reason) == ("succeeded", "")
    rest = [value for what, value in ANY_JSON.items() if what not in ("tuple", "moment", "exact")]
    assert run.output == [[1, ["a", None]], "2026-01-02T03:04:05+00:00", "0.10", *rest]
    assert sorted(line.attempt for line in whole.entered(run.run_id)) == [1] * len(ANY_JSON)


@pytest.mark.feature("D6")
def test_outputs_that_are_too_large_together_end_the_run_and_not_the_scheduler(whole: WholeStack) -> None:
    """Forty steps that each get half a megabyte do not fit into one entry of the log."""
    run = run_of(whole, "wide", 500_000)
    assert (run.status, run.code) == ("failed", "too_large")
    small = run_of(whole, "wide", 50_000)
    assert small.status == "succeeded"


@pytest.mark.feature("D6")
def test_many_large_calls_that_wait_do_not_burst_the_ledger(whole: WholeStack) -> None:
    """More work than slots: what waits is placed in portions that fit into an entry."""
    text = "x" * 900_000
    blocker = whole.client.start("wait_here", 2.0, run_id=new_id("blocker"))
    whole.until(blocker, "AttemptDispatched")
    runs = [whole.client.start("measure", text, run_id=new_id("measure")) for _ in range(30)]
    assert {whole.wait(run_id).output for run_id in runs} == {len(text)}
    assert whole.wait(blocker).status == "succeeded"


# --- control ---------------------------------------------------------------


@pytest.mark.feature("D4")
def test_cancel_aborts_what_runs(whole: WholeStack) -> None:
    run_id = whole.client.start("wait_here", 50.0, run_id=new_id("cancel"), budget_micros=1000)
    whole.until(run_id, "AttemptDispatched")
    whole.client.cancel(run_id, reason="changed my mind")
    run = whole.wait(run_id)
    assert (run.status, run.reason) == ("cancelled", "changed my mind")
    eventually(lambda: "ResultIgnored" in whole.types(run_id), "the abortion's report")
    assert not whole.client.get(run_id).spent_micros


@pytest.mark.feature("D4")
def test_cancel_of_what_cannot_be_aborted_settles_what_it_cost(whole: WholeStack) -> None:
    run_id = whole.client.start("block_here", 1.0, run_id=new_id("cancel"))
    whole.until(run_id, "AttemptDispatched")
    eventually(lambda: whole.entered(run_id), "the function to be entered")
    whole.client.cancel(run_id)
    assert whole.wait(run_id).status == "cancelled"
    eventually(lambda: whole.client.get(run_id).spent_micros == 40, "what it cost")


@pytest.mark.feature("D4")
def test_cancel_reaches_every_branch(whole: WholeStack) -> None:
    run_id = whole.client.start("both", {"left": 50.0, "right": 50.0}, run_id=new_id("both"))
    whole.until(run_id, "AttemptDispatched", 2)
    whole.client.cancel(run_id)
    assert whole.wait(run_id).status == "cancelled"
    eventually(lambda: whole.types(run_id).count("ResultIgnored") == 2, "both abortions' reports")


# --- approvals and policy ---------------------------------------------------------------


@pytest.mark.feature("P4")
@pytest.mark.parametrize("answer", ["approve", "reject", "cancel"])
def test_what_waits_for_a_human_takes_one_answer(whole: WholeStack, ask_policy: str, answer: str) -> None:
    run_id = whole.client.start("chain", 1, run_id=new_id(answer), account=f"{ask_policy}/a", budget_micros=60)
    run = whole.wait(run_id)
    assert run.status == "waiting"
    (asked,) = run.approvals
    assert (asked.step_id, asked.function, asked.arguments, asked.why) == ("two", "two", 2, "policy")
    assert asked.reason == "somebody must look"
    wrong = whole.request({"type": "approve", "run_id": run_id, "step_id": "three"})
    assert whole.letter(wrong).code == "no_such_approval"
    getattr(whole.client, answer)(run_id, reason="so be it")
    run = whole.wait(run_id)
    assert run.status == {"approve": "succeeded", "reject": "failed", "cancel": "cancelled"}[answer]
    assert run.code == {"approve": "", "reject": "rejected", "cancel": "cancelled"}[answer]
    assert len(whole.entered(run_id)) == {"approve": 3, "reject": 1, "cancel": 1}[answer]
    late = whole.request({"type": "approve", "run_id": run_id})
    assert whole.letter(late).code == "run_is_over"


@pytest.mark.feature("P1")
def test_policy_denies_before_anything_runs(whole: WholeStack, ask_policy: str) -> None:
    run = run_of(whole, "chain", 1, account=f"{ask_policy}/denied")
    assert (run.status, run.code) == ("failed", "denied")
    assert "never-three" in run.reason
    assert "not for this account" in run.reason
    assert not whole.entered(run.run_id)


@pytest.mark.feature("P1")
def test_a_wrong_policy_file_changes_nothing_and_names_every_problem(whole: WholeStack, tmp_path: Any) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("policy: bad\nversion: '1'\nrules:\n- {name: r, when: '1 +', then: maybe}\n", encoding="utf-8")
    said = whole.cli("policy", "apply", str(file), code=2)
    assert "then" in said
    assert "when" in said
    assert run_of(whole, "chain", 1).status == "succeeded"


# --- money ---------------------------------------------------------------


@pytest.mark.feature("P2")
def test_a_budget_that_does_not_suffice_denies_the_next_step(whole: WholeStack) -> None:
    run = run_of(whole, "chain", 1, budget_micros=29)
    assert (run.status, run.code) == ("failed", "denied")
    assert "budget" in run.reason
    assert run.spent_micros == 10
    assert [line.step_id for line in whole.entered(run.run_id)] == ["one"]


@pytest.mark.feature("P2")
def test_a_function_dearer_than_declared_is_recorded_and_closes_the_budget(whole: WholeStack) -> None:
    run = run_of(whole, "dear-twice", 5_000, budget_micros=1_000)
    assert (run.status, run.code, run.spent_micros) == ("failed", "denied", 5_000)
    books = whole.truth().books
    assert books.runs[run.run_id].overshoot_micros == 4_900
    assert len(whole.entered(run.run_id)) == 1


@pytest.mark.feature("P2")
def test_parallel_branches_cannot_spend_the_same_money(whole: WholeStack) -> None:
    run = run_of(whole, "both", {"left": 0.3, "right": 0.3}, budget_micros=79)
    assert (run.status, run.code) == ("failed", "denied")
    whole.under_way.add(run.run_id)  # the allowed branch is aborted, its report is on the way
    eventually(lambda: run.run_id not in {n.run_id for n in whole.truth().books.open_reservations()}, "its money")
    whole.under_way.discard(run.run_id)
    attempts = whole.truth().books.attempts
    refused = [attempts[AttemptName(run.run_id, step, 1)].status == REFUSED for step in ("left", "right")]
    assert sorted(refused) == [False, True]


# --- longer than the lease ---------------------------------------------------------------


@pytest.mark.feature("D1")
def test_a_function_longer_than_the_lease_runs_once_while_heartbeats_go_on(whole: WholeStack) -> None:
    """Begun when the stack was: its executor kept its lease all the while, so nobody may run it again."""
    whole.under_way.discard(LONG_RUN)
    run = whole.wait(LONG_RUN)
    assert run.status == "succeeded"
    assert [line.attempt for line in whole.entered(LONG_RUN)] == [1]
    assert "AttemptEnded" not in whole.types(LONG_RUN)
    assert_whole(whole)
