"""Retry documents: which one counts for an attempt, what it changes, and what the log says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.pure import Pair, chain, step
from tidegate.domain import retries
from tidegate.domain.messages import PolicyPublished
from tidegate.domain.retry_documents import Attempted, RetryDocuments
from tidegate.domain.workflow import Function
from tidegate.eventlog.tables import Unreadable
from tidegate.gate.kinds import DocumentError, parse, read

FUNCTIONS = ("step:a", "step:b")


def document(name: str = "patient", **fields: Any) -> dict[str, Any]:
    settings = fields.pop("retries", {"max_attempts": 3, "backoff_ms": 1000, "backoff_factor": 1})
    return {"kind": "retry", "retry": name, "version": "1", "retries": settings} | fields


def row(fields: dict[str, Any]) -> PolicyPublished:
    return PolicyPublished(policy_id="x", version="1", document=json.dumps(fields), by="t", at_ms=0)


def in_force(*documents: dict[str, Any]) -> RetryDocuments:
    found = RetryDocuments()
    for fields in documents:
        assert found.take(f"retry:{fields['retry']}", row(fields)) == ""
    return found


def fail(pair: Pair, times: int, error_class: str = "Flaky") -> list[int]:
    """Let the step fail; returns how long each back-off was."""
    waited = []
    for _ in range(times):
        pair.answer(pair.tasks.popleft(), "failed", error_class=error_class, error_message="m")
        ended = [event for _, event in pair.events if type(event).__name__ == "AttemptEnded"][-1]
        if ended.retry_at_ms is None:
            waited.append(-1)
            continue
        waited.append(ended.retry_at_ms - pair.now_ms)
        pair.pass_time_with_heartbeats(ended.retry_at_ms - pair.now_ms)
    return waited


def ends(pair: Pair) -> list[tuple[str, str]]:
    return [
        (event.retry_document, event.retry_rule) for _, event in pair.events if type(event).__name__ == "AttemptEnded"
    ]


@pytest.mark.feature("P1", "D2")
def test_a_document_in_force_says_how_attempts_are_repeated_and_the_log_names_it() -> None:
    pair = Pair(functions=FUNCTIONS)
    pair.policy(document(account="acme/*"))
    pair.start("r", chain("a", a=step(backoff_ms=10, max_attempts=9)))
    waited = fail(pair, 3)
    assert all(500 <= ms <= 1000 for ms in waited[:2])
    assert waited[2] == -1
    assert ends(pair) == [("patient@1", "")] * 3
    assert pair.run("r").status == "failed"
    assert "3 of 3 attempts failed of patient@1" in pair.run("r").reason


@pytest.mark.feature("P1", "D2")
def test_other_versions_take_effect_with_the_next_failure_and_none_with_the_removal() -> None:
    pair = Pair(functions=FUNCTIONS)
    pair.policy(document(account="*", retries={"max_attempts": 100}))
    pair.start("r", chain("a", a=step(backoff_ms=10, max_attempts=4)))
    fail(pair, 1)
    pair.policy(document(version="2", account="*", retries={"max_attempts": 50}))
    fail(pair, 1)
    pair.forget("retry:patient")
    fail(pair, 2)
    assert ends(pair) == [("patient@1", ""), ("patient@2", ""), ("", ""), ("", "")]
    assert pair.run("r").status == "failed"


@pytest.mark.feature("P1", "D2")
def test_a_rule_of_a_document_is_named_with_it() -> None:
    pair = Pair(functions=FUNCTIONS)
    rules = [{"on": ["RateLimited"], "name": "slow-down", "max_attempts": 20, "backoff_ms": 60_000}]
    pair.policy(document(functions=["a"], retries={"retry_rules": rules}))
    pair.start("r", chain("a", a=step(backoff_ms=10)))
    waited = fail(pair, 1, "RateLimited") + fail(pair, 1, "Other")
    assert waited[0] >= 30_000
    assert waited[1] <= 20
    assert ends(pair) == [("patient@1", "slow-down"), ("patient@1", "")]


@pytest.mark.feature("P1")
@pytest.mark.parametrize(
    ("fields", "is_chosen"),
    [
        ({}, False),  # only for functions that name it
        ({"account": "*"}, True),
        ({"account": "acme"}, True),
        ({"account": "*/support/*"}, False),
        ({"account": "beta"}, False),
        ({"functions": ["f", "g"]}, True),
        ({"functions": ["g"]}, False),
        ({"workflow": "w"}, True),
        ({"workflow": "v"}, False),
        ({"tags": {"env": "prod"}}, True),
        ({"tags": {"env": "test"}}, False),
        ({"account": "acme", "functions": ["g"]}, False),
    ],
)
def test_what_a_document_is_for(fields: dict[str, Any], is_chosen: bool) -> None:
    documents = in_force(document(**fields))
    attempted = Attempted("f", "acme/support", "w", {"env": "prod", "a": "b"})
    assert (documents.choose(Function(kind="step"), attempted).document != "") == is_chosen
    assert documents.choose(Function(kind="step", retry="patient"), attempted).document == "patient@1"


@pytest.mark.feature("P1")
def test_who_is_named_comes_first_then_the_first_by_name() -> None:
    documents = in_force(document("z", account="*"), document("b", account="*"), document("named"))
    attempted = Attempted("f", "acme", "w", {})
    assert documents.choose(Function(kind="step"), attempted).document == "b@1"
    assert documents.choose(Function(kind="step", retry="named"), attempted).document == "named@1"
    assert documents.choose(Function(kind="step", retry="gone"), attempted).document == "b@1"


@pytest.mark.feature("P1")
def test_what_a_document_does_not_say_is_as_the_function_says() -> None:
    function = Function(kind="step", max_attempts=7, backoff_ms=3, retry_on=("A",), queue="q")
    chosen = in_force(document(account="*", retries={"backoff_ms": 9})).choose(
        function, Attempted("f", "acme", "w", {})
    )
    assert (chosen.settings.max_attempts, chosen.settings.backoff_ms, chosen.settings.retry_on) == (7, 9, ("A",))


@pytest.mark.parametrize(
    "fields",
    [
        document(retries={"max_attempts": 10**9}),
        document(retries={"patience": 1}),
        document(retries={}),
        document(retries={"retry_on": ["E"] * (retries.MAX_ERROR_CLASSES + 1)}),
        document(retries={"retry_rules": [{"on": ["E"]}, {"on": ["E"]}]}),
        document(retries=[1]),
        document(retries={"max_attempts": 3.0}),  # no integer, as soon as it is to be one
    ],
)
def test_a_document_that_is_none_is_refused_by_authors_tools_and_counts_for_nobody(fields: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        parse(fields)
    documents = in_force(document(account="*"))
    assert documents.take("retry:patient", row(fields)) != ""
    assert documents.choose(Function(kind="step"), Attempted("f", "acme", "w", {})).document == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"retry":"patient","version":"1","retries":{"a":' + "[" * 5000 + "]" * 5000 + "}}",
        json.dumps(document(version="1" * 100_000, account="*")),
        json.dumps(document("another", account="*")),
    ],
    ids=["deep", "long", "another's"],
)
def test_no_record_of_a_hostile_writer_stops_whoever_reads_documents(text: str) -> None:
    documents = RetryDocuments()
    hostile = PolicyPublished(policy_id="x", version="1", document=text, by="t", at_ms=0)
    assert documents.take("retry:patient", hostile) != ""
    assert documents.choose(Function(kind="step"), Attempted("f", "acme", "w", {})).document == ""


def test_a_row_that_cannot_be_read_counts_for_nobody_and_denies_nothing() -> None:
    pair = Pair(functions=FUNCTIONS)
    unreadable = Unreadable("policies", "retry:patient", 4, "no record")
    assert RetryDocuments().take("retry:patient", unreadable) == str(unreadable)
    pair._publish("retry:patient", unreadable)  # type: ignore[arg-type] # as a table has it
    pair.start("r", chain("a"))
    assert [task.step_id for task in pair.tasks] == ["a"]


def test_problems_are_said_with_their_place() -> None:
    text = "kind: retry\nretry: p\nversion: '1'\nretries:\n  max_attempts: 0\n  backoff_ms: x\n"
    with pytest.raises(DocumentError) as caught:
        read(text)
    assert [problem.line for problem in caught.value.problems] == [4]
    assert "retries.max_attempts" in str(caught.value)
    assert "retries.backoff_ms" in str(caught.value)


def test_on_need_not_be_quoted_in_yaml() -> None:
    text = "kind: retry\nretry: p\nversion: '1'\nretries:\n  retry_rules:\n    - on: [E]\n      max_attempts: 3\n"
    (found,) = read(text)
    assert json.loads(found.to_json())["retries"] == {"retry_rules": [{"on": ["E"], "max_attempts": 3}]}
