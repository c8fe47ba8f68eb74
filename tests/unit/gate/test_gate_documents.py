"""Documents of the gate: what is wrong is said with its line, all at once; what was good once stays good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from support.cluster import Cluster
from tidegate.cli import policy as policy_cli
from tidegate.gate.kinds import DocumentError, Policy, parse, read

POLICY = """\
policy: money
version: "3"
rules:
  - name: big
    when: tool == "refund" && args.cents > 100
    then: require_approval
"""


@pytest.mark.feature("P1")
def test_all_problems_are_reported_with_their_lines() -> None:
    text = """\
policy: money
version: 3
rules:
  - name: big
    when: args.items.exists(i, i > 3
    then: denyx
  - name: other
    when: nothing_of_ours > 3 && args.list.all(x, x > 1)
    then: deny
---
kind: budget
budget: daily
version: "1"
time_zone: Nowhere/Town
limits:
  money_micros: -3
---
kind: nothing
"""
    with pytest.raises(DocumentError) as error:
        read(text)
    said = [(problem.line, problem.text.split(":")[0]) for problem in error.value.problems]
    assert said == [
        (2, "version"),
        (5, "rules.0.when"),
        (6, "rules.0.then"),
        (14, "time_zone"),
        (16, "limits.money_micros"),
        (18, "kind"),
    ]
    with pytest.raises(DocumentError) as error:  # what is well formed, but surely not meant
        read(text.replace("version: 3", 'version: "3"').replace("i > 3\n", "i > 3)\n").replace("denyx", "deny"))
    assert (8, "rules.1.when: unknown: nothing_of_ours") in [
        (problem.line, problem.text.partition(";")[0]) for problem in error.value.problems
    ]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("policy: a\npolicy: b\n", 2, "policy: is there twice"),
        ("a: [1\n", 2, "no YAML"),
        ("", 0, "there is no document"),
        ("- 1\n", 1, "a document must be an object"),
        (POLICY + "---\n" + POLICY, 0, "money is there twice"),
        ("policy: a\nversion: '1'\n", 1, "document: a policy needs rules or a default"),
        ("[" * 5000, 0, "no YAML"),
    ],
)
def test_what_is_no_document_is_said_so(text: str, line: int, said: str) -> None:
    with pytest.raises(DocumentError) as error:
        read(text)
    assert error.value.problems[0].line == line
    assert said in error.value.problems[0].text


def test_json_is_yaml_and_a_document_without_a_kind_is_a_policy() -> None:
    value = yaml.safe_load(POLICY)
    assert read(POLICY) == [parse(value)]
    assert isinstance(parse(value), Policy)
    assert parse({"kind": "policy", **value}).topic_key == "money"


def test_a_published_rule_about_something_unknown_stays_readable_for_gates() -> None:
    rule = {"name": "r", "when": "gone > 3", "then": "deny"}
    assert parse({"policy": "p", "version": "1", "rules": [rule]}).label == "p@1"


# --- the command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Any:
    broker = Cluster().broker
    monkeypatch.setattr(policy_cli, "KafkaBroker", lambda _: broker)
    return lambda *words: CliRunner().invoke(policy_cli.app, [str(word) for word in words])


@pytest.mark.feature("P1")
def test_apply_diff_list_show_remove(shell: Any, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(POLICY + "---\nkind: budget\nbudget: daily\nversion: '1'\nlimits: {calls: 3}\n")
    before = shell("diff", file)
    assert before.exit_code == 1
    assert "+budget: daily" in before.stdout
    assert "budget daily@1" in shell("apply", file).stdout
    assert shell("diff", file).stdout == "no differences\n"
    file.write_text(POLICY.replace("> 100", "> 200"))
    changed = shell("diff", file)
    assert changed.exit_code == 1
    assert "args.cents > 200" in changed.stdout
    listed = shell("list").stdout
    assert "budget:daily" in listed
    assert "money" in listed
    assert '"calls": 3' in shell("show", "budget:daily").stdout
    assert shell("remove", "budget:daily").exit_code == 0
    missing = shell("show", "budget:daily")
    assert missing.exit_code == 4
    assert "money" in missing.stderr


def test_nothing_is_applied_if_anything_is_wrong(shell: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(POLICY)
    bad.write_text("policy: x\nversion: '1'\nrules:\n  - name: a\n    when: tool ==\n    then: deny\n")
    for command in ("validate", "apply"):
        result = shell(command, good, bad)
        assert result.exit_code == 2
        assert f"{bad}:5: rules.0.when: " in result.stderr
    assert "money" not in shell("list").stdout
    assert shell("validate", good).stdout == "1 document, nothing wrong\n"


@pytest.mark.feature("P1")
def test_cases_are_tried_offline(shell: Any, tmp_path: Path) -> None:
    (tmp_path / "money.yaml").write_text(POLICY)
    cases = tmp_path / "cases.yaml"
    cases.write_text(
        """\
policies: [money.yaml]
cases:
  - name: small
    step: {tool: refund, args: {cents: 100}}
    expect: allow
  - name: big
    step: {tool: refund, args: {cents: 101}}
    expect: {effect: require_approval, rule: big, policy: money@3}
"""
    )
    result = shell("test", cases)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("2 cases, 0 failed\n")
    cases.write_text(cases.read_text().replace("cents: 100}", "cents: 1000}"))
    result = shell("test", cases)
    assert result.exit_code == 1
    assert "FAILED  small: require_approval by money@3/big" in result.stdout
    assert '"args.cents":1000' in result.stdout
    cases.write_text(cases.read_text().replace("args:", "arguments:"))
    result = shell("test", cases)
    assert result.exit_code == 2
    assert f"{cases}:4: cases.0.step: " in result.stderr
    assert "unknown: arguments" in result.stderr


@pytest.mark.feature("P1", "D2")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("failed: [E], expect: again", "ok      c: again in 100 to 200 ms by the function's own settings"),
        ("failed: [E], retry: p, expect: again", "ok      c: again in 500 to 1000 ms by p@1"),
        ("failed: [E], tags: {t: x}, expect: again", "ok      c: again in 25 to 50 ms by tagged@1"),
        ("failed: [E, E], retry: p, expect: stop", "ok      c: stop after failure 2 (attempts_exhausted) by p@1"),
        ("failed: [{error: E, retryable: false}], retry: p, expect: stop", "(not_retryable) by p@1"),
        ("failed: [{error: Full, times: 3}], retry: p, expect: again", "again in 3500 to 7000 ms by p@1/full"),
        ("failed: [Full, E, Full], retry: p, expect: again", "again in 3500 to 7000 ms by p@1/full"),
        ("failed: [{error: E, times: 3}], retry: p, expect: stop", "it stops after failure 2 of 3"),
        ("failed: [E], retry: p, expect: stop", "next 'again' instead of 'stop'"),
        ("failed: [E], retry: p, expect: {next: again, wait_ms: [1, 2]}", "wait_ms [500, 1000] instead of [1, 2]"),
        ("failed: [E], settings: {max_attempt: 1}, expect: again", "cases.0.settings: "),
        ("failed: [], expect: again", "cases.0.failed: "),
        (
            "failed: [E, {error: T, outcome: died}], idempotent: false, expect: ask",
            "ok      c: ask a human after failure 2 (outcome_unknown)",
        ),
        ("failed: [{error: T, outcome: timed_out}], expect: ask", "next 'again' instead of 'ask'"),
        ("failed: [{error: T, outcome: died}, E], idempotent: false, expect: ask", "it asks after failure 1 of 2"),
    ],
)
def test_retry_documents_are_tried_offline(shell: Any, tmp_path: Path, case: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(
        """kind: retry
retry: p
version: "1"
retries:
  max_attempts: 2
  backoff_ms: 1000
  retry_rules: [{on: [Full], name: full, max_attempts: 9, backoff_ms: 7000, backoff_factor: 1}]
---
{kind: retry, retry: tagged, version: "1", tags: {t: x}, retries: {backoff_ms: 50}}
"""
    )
    cases = tmp_path / "cases.yaml"
    cases.write_text(f"policies: [p.yaml]\ncases:\n  - {{name: c, {case}}}\n")
    result = shell("test", cases)
    assert said in result.stdout + result.stderr
    assert result.exit_code == (0 if "ok  " in result.stdout else 2 if "cases.0" in result.stderr else 1)
    if "ok  " in result.stdout:
        shown = json.loads(shell("test", cases, "--json").stdout)
        assert shown[0]["next"] in ("again", "stop", "ask")
