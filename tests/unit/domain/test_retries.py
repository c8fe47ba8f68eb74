"""Retries by error class: which rule counts, how long it waits, and when it is over."""

from __future__ import annotations

import pytest

from support.pure import Pair, chain, step
from tidegate.domain import retries
from tidegate.domain.retries import Failure, Retries, Rule, judge
from tidegate.domain.workflow import validate_definition
from tidegate.scheduler import snapshots

LIMITED = Rule(("RateLimited", "Overloaded"), max_attempts=3, backoff_ms=1000, backoff_max_ms=1500)
SETTINGS = Retries(max_attempts=2, backoff_ms=100, no_retry_on=("Hopeless",), retry_rules=(LIMITED,))


@pytest.mark.feature("D2")
def test_a_rule_has_attempts_and_times_of_its_own() -> None:
    first = judge(SETTINGS, Failure("Overloaded"), {}, 0, 0.0)
    second = judge(SETTINGS, Failure("RateLimited"), {"RateLimited": 1}, 1, 1.0)
    third = judge(SETTINGS, Failure("RateLimited"), {"RateLimited": 2}, 2, 0.5)
    assert first == (500, "RateLimited", "", 1, 3)
    assert second == (1500, "RateLimited", "", 2, 3)  # twice as long, cut to its maximum
    assert third == (None, "RateLimited", retries.EXHAUSTED, 3, 3)


@pytest.mark.feature("D2")
def test_what_a_rule_counts_is_not_counted_twice() -> None:
    assert judge(SETTINGS, Failure("ValueError"), {"RateLimited": 2}, 2, 1.0) == (100, "", "", 1, 2)
    assert judge(SETTINGS, Failure("ValueError"), {"RateLimited": 2}, 3, 1.0).code == retries.EXHAUSTED
    assert judge(SETTINGS, Failure("Hopeless"), {}, 0, 1.0).code == retries.NOT_RETRYABLE


@pytest.mark.feature("D2")
def test_a_rule_goes_before_the_list_of_classes_and_what_it_does_not_say_is_as_without_it() -> None:
    settings = Retries(max_attempts=4, backoff_ms=100, retry_on=("ValueError",), retry_rules=(Rule(("Busy",)),))
    assert judge(settings, Failure("Busy"), {"Busy": 2}, 5, 1.0) == (400, "Busy", "", 3, 4)
    assert judge(settings, Failure("Other"), {}, 0, 1.0).code == retries.NOT_RETRYABLE
    assert judge(settings, Failure("Busy", retryable=False), {}, 0, 1.0).code == retries.NOT_RETRYABLE


@pytest.mark.feature("D2")
@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
def test_nobody_comes_back_before_the_time_that_was_named(jitter: float) -> None:
    waits = [judge(SETTINGS, Failure("RateLimited", True, asked), {}, 0, jitter).wait_ms for asked in (0, 600, 30_000)]
    assert waits == [500 + 500 * jitter, 600 + 500 * jitter, 30_000 + 500 * jitter]
    for_ever = judge(SETTINGS, Failure("RateLimited", True, 2**60), {}, 0, jitter).wait_ms
    assert for_ever == retries.MAX_RETRY_AFTER_MS + 500 * jitter


@pytest.mark.feature("D2")
def test_a_factor_beyond_all_numbers_gives_the_longest_back_off() -> None:
    settings = Retries(max_attempts=1000, backoff_factor=100.0)
    assert judge(settings, Failure("E"), {}, 900, 1.0).wait_ms == 60_000


def test_contradictions_are_problems_of_the_definition() -> None:
    rules = [{"on": ["A", "B"]}, {"on": ["B"], "name": "A"}, {"on": ["C"]}]
    definition = chain("a", a=step(retry_rules=rules, no_retry_on=["C", "D"]))
    assert validate_definition(definition) == [
        "functions.a.retry_rules: several rules name 'B'",
        "functions.a.no_retry_on: 'C' has a rule in retry_rules",
        "functions.a.retry_rules: several are called 'A'",
    ]
    too_many = [{"on": [f"E{number}" for number in range(retries.MAX_ERROR_CLASSES + 1)]}]
    (problem,) = validate_definition(chain("a", a=step(retry_rules=too_many)))
    assert problem.startswith("functions.a.retry_rules.0.on: ")


@pytest.mark.feature("D2")
@pytest.mark.feature("T5")
def test_a_run_outlives_errors_that_a_rule_is_about() -> None:
    rule = {"on": ["RateLimited"], "max_attempts": 10, "backoff_ms": 1000, "name": "patience"}
    p = Pair(functions=("step:a",))
    p.start("r", chain("a", a=step(max_attempts=2, retry_rules=[rule])))
    for number in range(1, 6):
        p.answer(p.tasks.popleft(), "failed", error_class="RateLimited", retry_after_ms=7_000)
        kept = snapshots.load(snapshots.dump(p.run("r")), p.runs.definitions).steps["a"]
        assert kept.rule_failures == (("patience", number),)
        due_ms = p.run("r").steps["a"].retry_at_ms
        assert due_ms is not None
        assert due_ms >= p.now_ms + 7_000
        p.pass_time_with_heartbeats(due_ms - p.now_ms)
    p.answer(p.tasks.popleft(), "failed", error_class="ValueError")
    p.pass_time_with_heartbeats(1000)
    p.answer(p.tasks.popleft(), value=1)
    ended = [event.retry_rule for _, event in p.events if type(event).__name__ == "AttemptEnded"]
    assert (p.run("r").status, ended) == ("succeeded", ["patience"] * 5 + [""])


@pytest.mark.feature("D2")
def test_the_reason_names_the_rule_that_gave_up() -> None:
    p = Pair(functions=("step:a",))
    p.start("r", chain("a", a=step(retry_rules=[{"on": ["Busy"], "max_attempts": 1}])))
    p.answer(p.tasks.popleft(), "failed", error_class="Busy", error_message="no")
    found = p.run("r")
    assert (found.status, found.code) == ("failed", "attempts_exhausted")
    assert found.reason == "step a: 1 of 1 attempts failed under the retry rule Busy, the last with Busy: no"


def test_settings_of_a_document_and_of_a_function_have_one_shape() -> None:
    assert set(retries.PROPERTIES) == set(Retries.__struct_fields__)
    assert set(retries.PROPERTIES["retry_rules"]["items"]["properties"]) == set(Rule.__struct_fields__)
