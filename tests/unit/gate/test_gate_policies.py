"""Rules: which one decides, what it says about itself, and that an index changes nothing but the time it takes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from support.pure import Pair, chain, step
from tidegate.domain import ledger_events as ev
from tidegate.domain.expressions import unknown_variables
from tidegate.gate.kinds import parse
from tidegate.gate.policy import Policy, PolicySet, Rule, Verdict
from tidegate.gate.rule_index import Conditions, parts_of
from tidegate.gate.variables import VARIABLES, Variables


def policies(**documents: Any) -> PolicySet:
    """Return policies by name: a list of (rule, when, then) or (rule, when, then, more), or a whole document."""
    found: dict[str, Policy] = {}
    for name, content in documents.items():
        document = (
            content
            if isinstance(content, dict)
            else {
                "rules": [
                    {"name": rule[0], "when": rule[1], "then": rule[2], **(rule[3] if len(rule) > 3 else {})}
                    for rule in content
                ]
            }
        )
        checked = parse({"policy": name, "version": "1"} | document)
        assert isinstance(checked, Policy)
        found[name] = checked
    return PolicySet(found)


def judge(rules: PolicySet, **values: Any) -> Verdict:
    return rules.judge(Variables.of(values))


@pytest.mark.feature("P1")
@pytest.mark.parametrize(
    ("values", "effect", "rule"),
    [
        ({"tool": "pay", "args": {"cents": 5}}, "allow", "small"),
        ({"tool": "pay", "args": {"cents": 50}}, "require_approval", "big"),
        ({"tool": "pay", "args": {"cents": 500}}, "deny", "huge"),
        ({"tool": "pay", "args": {}}, "deny", "small"),  # not evaluable
        ({"tool": "other"}, "allow", "default"),
    ],
)
def test_the_strongest_effect_wins_and_failing_to_evaluate_denies(
    values: dict[str, Any], effect: str, rule: str
) -> None:
    rules = policies(
        a=[("small", 'tool == "pay" && args.cents < 1000', "allow")],
        b=[("big", 'tool == "pay" && args.cents > 10', "require_approval")],
        c=[("huge", 'tool == "pay" && args.cents > 100', "deny")],
    )
    verdict = judge(rules, **values)
    assert (verdict.effect, verdict.rule) == (effect, rule)


@pytest.mark.feature("P1")
def test_a_verdict_shows_what_its_rule_looked_at() -> None:
    rules = policies(a=[("big", 'tool == "pay" && args.cents > 10 && size(tags) == 0 && args.to != "x.y"', "deny")])
    verdict = judge(rules, tool="pay", args={"cents": 11, "to": "bob", "other": 1}, tags={})
    assert json.loads(verdict.values) == {"tool": "pay", "args.cents": 11, "args.to": "bob", "tags": {}}
    assert (verdict.policy, verdict.rule) == ("a@1", "big")
    long = judge(policies(a=[("any", "size(args.text) > 1", "deny")]), args={"text": "x" * 100_000})
    assert json.loads(long.values) == {"args.text": "…"}


@pytest.mark.feature("P1")
def test_obligations_of_all_matching_rules_add_up() -> None:
    rules = policies(
        a=[
            ("card", 'tool == "pay" && args.card.number != ""', "allow", {"redact": ["card.number"]}),
            ("iso", 'kind == "tool"', "allow", {"isolation": "subprocess"}),
            ("job", "args.cents > 10", "require_approval", {"isolation": "job", "redact": ["card"], "expires_s": 60}),
        ]
    )
    verdict = judge(rules, tool="pay", kind="tool", args={"cents": 11, "card": {"number": "4111"}})
    assert (verdict.redact, verdict.isolation, verdict.expires_s) == (("card.number", "card"), "job", 60)
    small = judge(rules, tool="pay", kind="tool", args={"cents": 1, "card": {"number": "4111"}})
    assert (small.effect, small.redact, small.isolation) == ("allow", ("card.number",), "subprocess")
    assert "4111" not in small.values
    whole = policies(a=[("any", "size(args) > 0", "deny", {"redact": ["card.number"]})])
    assert "4111" not in judge(whole, args={"card": {"number": "4111"}}).values


@pytest.mark.feature("P1")
@pytest.mark.parametrize("path", ["card.number", "card", "*.number", "card.*", "*"])
@pytest.mark.parametrize("when", ['args.card.number.startsWith("4")', "args.card.number > 1", "args.card.number"])
def test_who_denies_hides_what_others_hide_and_what_it_would_have_hidden_itself(path: str, when: str) -> None:
    other = ("card", 'tool == "pay"', "allow", {"redact": [path]})
    for rules in (policies(a=[("no", when, "deny"), other]), policies(a=[("no", when, "deny", {"redact": [path]})])):
        verdict = judge(rules, tool="pay", args={"card": {"number": "4111", "name": "ann"}})
        assert (verdict.effect, verdict.rule, verdict.redact) == ("deny", "no", (path,))
        assert "4111" not in verdict.values + verdict.reason


@pytest.mark.feature("P1")
def test_the_default_is_part_of_a_document_and_the_strictest_counts() -> None:
    rules = policies(
        a={"default": "require_approval"},
        b={"default": "deny", "rules": [{"name": "ok", "when": 'tool == "read"', "then": "allow"}]},
    )
    assert judge(rules, tool="read").effect == "allow"
    assert judge(rules, tool="write")[:3] == ("deny", "default", "b@1")
    assert judge(policies(a=[("x", "false", "deny")]), tool="write")[:3] == ("allow", "default", "")


@pytest.mark.parametrize(
    ("source", "by"),
    [
        ('tool == "pay"', ("tool", "==", "pay")),
        ("args.cents > 1 && tool == 'pay'", ("tool", "==", "pay")),
        ('account == "a" && tool == "pay"', ("tool", "==", "pay")),
        ('(args.a || args.b) && workflow == "w"', ("workflow", "==", "w")),
        ('account.startsWith("a/") && tool in ["x", \'y\']', ("tool", "in", frozenset("xy"))),
        ('account.startsWith("a/") && kind == "tool"', ("account", "startsWith", "a/")),
        ('tool == "a" || tool == "b"', None),
        ('tool == "a" && args.x || args.y', None),
        ('args.x ? tool == "a" : true', None),
        ('!(tool == "a")', None),
        ('(tool == "a")', None),
        ('tool == "a\\"b"', None),
        ('tool == "a && b" && args.x', ("tool", "==", "a && b")),
        ('args.x == "||" && tool == "t"', ("tool", "==", "t")),
        ('tool == "a" // && account == "b"', None),
        ('tool == r"a" && kind == "x"', None),
        ('tool != "a"', None),
        ('args.tool == "a"', None),
        ('tool in ["a", 1]', None),
        ("tool in args.tools", None),
        ("tool.startsWith(agent)", None),
    ],
)
def test_only_what_must_hold_is_a_rule_found_by(source: str, by: tuple[str, str, Any] | None) -> None:
    comparison = Conditions.of(source).found_by()
    assert (comparison and (comparison.name, comparison.operator, comparison.literal)) == by
    assert "&&".join(parts_of(source)) == source


NUMBERS = (-(2**63) - 1, -(2**63), -1, 0, 1, 2, 1.0, 1.5, 2**53 + 1, 2**63 - 1, 2**63)
TEXTS = ("", "a", "ab", "b", "A", "é", "𝄞", "\ue000")
ODD = (None, True, False, [], ["a"], {}, {"n": 1})


@pytest.mark.parametrize("seed", range(20))
def test_a_comparison_says_what_cel_says_or_nothing(seed: int) -> None:
    rng = random.Random(seed)
    said = 0
    for _ in range(300):
        text, other = (f'"{rng.choice(TEXTS)}"' for _ in range(2))
        number = rng.choice([number for number in NUMBERS if isinstance(number, int) and abs(number) < 2**63])
        literal = rng.choice((text, str(number)))
        source = rng.choice(
            (
                f"args.v {rng.choice(('==', '!='))} {literal}",
                f"args.v {rng.choice(('<', '<=', '>', '>='))} {number}",
                f"args.v in [{text}, {other}]",
                f"args.v.startsWith({text})",
            )
        )
        arguments = {"v": rng.choice((*NUMBERS, *TEXTS, *ODD)), "w": rng.choice(ODD)}
        variables = Variables.of({"args": arguments if rng.random() < 0.95 else {}})
        answer = Conditions.of(source).hold(variables.get)
        if answer is not None:
            said += 1
            assert variables.evaluate(source) is answer, (source, arguments)
    assert said > 30


@pytest.mark.parametrize("seed", range(40))
def test_an_index_never_changes_a_verdict(seed: int) -> None:
    """Against the same rules made unfindable by a condition that always holds and is no literal: also what a rule looked at
    and what it hides must be the same."""
    rng = random.Random(seed)
    atoms = [
        'tool == "a"',
        'tool == "b"',
        'tool in ["a", "c"]',
        "tool != 'a'",
        'kind == "tool"',
        'account == "x/y"',
        'account.startsWith("x/")',
        'account.startsWith("")',
        'account.startsWith("x/y/z/long")',
        "args.n > 1",
        "args.n <= 2",
        "args.missing > 1",
        'args.s == "a"',
        'args.s.startsWith("a")',
        'args.n == "a"',
        "attempt > 1",
        'tags.env in ["prod"]',
        "run.settled_micros >= 5",
        "size(args.s) > 0",
        'step == "s/1"',
        'step.startsWith("s/")',
        'version in ["1.0.0", "1.1.0"]',
    ]

    def condition(depth: int) -> str:
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(atoms)
        joined = rng.choice((" && ", " && ", " || ")).join(condition(depth - 1) for _ in range(rng.randint(2, 3)))
        return f"({joined})" if rng.random() < 0.5 else joined

    def more() -> dict[str, Any]:
        return {"reason": "why", "redact": rng.choice(([], [], ["s"], ["n", "card.number"]))} | (
            {"isolation": "job"} if rng.random() < 0.2 else {}
        )

    rules = [
        (f"r{n}", condition(2), rng.choice(("allow", "allow", "deny", "require_approval")), more())
        for n in range(rng.choice((1, 3, 30)))
    ]
    plain = policies(p=rules)
    slow = policies(p=[(name, f"[0].exists(x, ({when}))", *rest) for name, when, *rest in rules])
    for _ in range(40):
        values = {
            "tool": rng.choice("abc"),
            "kind": rng.choice(("tool", "step")),
            "account": rng.choice(("x/y", "x", "x/y/z")),
            "attempt": rng.randint(1, 2),
            "args": {"n": rng.choice((0, 1, 2, 3, 2.5, True, "a", None)), "s": rng.choice(("a", "b", 1))},
            "tags": rng.choice(({}, {"env": "prod"}, {"env": "test"})),
            "run": {"settled_micros": rng.randint(4, 6)},
            "step": rng.choice(("s/1", "s/2", "t")),
            "version": rng.choice(("1.0.0", "1.1.0", "2.0.0")),
        }
        found, expected = judge(plain, **values), judge(slow, **values)
        # Why a rule cannot be evaluated is said with its text, which is another one.
        if "could not be evaluated" in expected.reason:
            assert "could not be evaluated" in found.reason
            found, expected = found._replace(reason=""), expected._replace(reason="")
        assert found == expected


@pytest.mark.parametrize(("name", "bad", "good"), [("step", "pay/2", "pay"), ("version", "1.0.0", "2.0.0")])
def test_what_was_found_for_one_step_counts_for_no_other(name: str, bad: str, good: str) -> None:
    """All else is the same: nodes of loops, turns of agents, and runs of another version of a workflow."""
    for order in ((bad, good), (good, bad)):
        rules = policies(p=[("no", f'{name} == "{bad}"', "deny")])
        found = {value: judge(rules, **{name: value}).effect for value in order}
        assert found == {bad: "deny", good: "allow"}


def test_only_the_rules_that_can_match_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    from tidegate.domain import expressions  # noqa: PLC0415 - patched

    seen: list[str] = []
    real = expressions.evaluate_in
    monkeypatch.setattr(
        expressions, "evaluate_in", lambda source, context: seen.append(source) or real(source, context)
    )
    rules = policies(p=[(f"r{n}", f'tool == "t{n}" && size(args.x) > 1', "deny") for n in range(200)])
    assert judge(rules, tool="t7", args={"x": "ab"}).rule == "r7"
    assert seen == ['tool == "t7" && size(args.x) > 1']
    seen.clear()
    rules = policies(p=[(f"r{n}", f'account.startsWith("a/{n}/") && args.x > 1', "deny") for n in range(200)])
    assert judge(rules, account="a/7/b", args={"x": 2}).rule == "r7"
    assert not seen, "comparisons with literals need no CEL"


def test_variables_of_macros_are_no_unknown_ones() -> None:
    assert unknown_variables("args.l.exists(i, i.x > 1) && args.m.map(k, k).size() > 0", VARIABLES) == []
    assert unknown_variables("argz.l.exists(i, j > 1)", VARIABLES) == ["argz", "j"]
    assert Rule(name="x", when="nope", then="deny").when == "nope"


# --- with scheduler and gate ----------------------------------------------------------------------------------------------


@pytest.mark.feature("P1")
def test_rules_see_provider_model_operation_and_what_budgets_counted() -> None:
    pair = Pair(functions=("step:a", "step:b"))
    pair.policy({"kind": "budget", "budget": "daily", "version": "1", "limits": {}, "window": "day"})
    pair.policy(
        {
            "policy": "p",
            "version": "7",
            "rules": [
                {
                    "name": "enough",
                    "when": 'model == "m1" && spent.budgets.daily.micros >= 10 && spent.run_micros >= 10',
                    "then": "deny",
                    "reason": "enough",
                }
            ],
        }
    )
    uses = {"provider": "p1", "model": "m1", "operation": "chat", "reserve_micros": 10}
    pair.start("r", chain("a", "b", a=step(**uses), b=step(**uses)))
    pair.work({"a": lambda _: 1, "b": lambda _: 1})
    assert pair.run("r").status == "failed"
    refused = next(event for event in pair.ledger_events if type(event).__name__ == "AttemptRefused")
    assert (refused.step_id, refused.rule, refused.policy, refused.reason) == ("b", "enough", "p@7", "enough")
    assert json.loads(refused.values)["spent.budgets.daily.micros"] == 10
    ended = next(event for _, event in pair.events if type(event).__name__ == "AttemptEnded")
    assert (ended.rule, ended.policy, ended.values) == ("enough", "p@7", refused.values)


@pytest.mark.feature("P1")
def test_obligations_go_with_the_decision_and_the_task() -> None:
    pair = Pair(slots=1, functions=("step:a",))
    rule = {"name": "r", "when": "true", "then": "allow", "redact": ["secret"], "isolation": "job"}
    pair.policy({"policy": "p", "version": "1", "rules": [rule]})
    pair.start("now", chain("a"), {"secret": 1})
    pair.start("later", chain("a"), {"secret": 1})  # waits for the slot
    pair.work({"a": lambda _: 1})
    dispatched = [event for _, event in pair.events if type(event).__name__ == "AttemptDispatched"]
    assert [(event.redact, event.isolation) for event in dispatched] == [(("secret",), "job")] * 2
    placed = [event for event in pair.ledger_events if isinstance(event, ev.Placing)]
    assert [type(event) for event in placed] == [ev.AttemptGranted, ev.AttemptPlaced]
    assert [(event.redact, event.isolation) for event in placed] == [(("secret",), "job")] * 2


@pytest.mark.feature("P1")
@pytest.mark.parametrize("end", ["AttemptRefused", "AttemptPaused", "ApprovalHeld"])
def test_what_is_not_allowed_says_what_to_hide_too(end: str) -> None:
    pair = Pair(functions=("step:a",))
    rules = [{"name": "hide", "when": "true", "then": "allow", "redact": ["secret"]}]
    if end == "ApprovalHeld":
        rules.append({"name": "ask", "when": "true", "then": "require_approval"})
    pair.policy({"policy": "p", "version": "1", "rules": rules})
    on_exceed = "pause" if end == "AttemptPaused" else "deny"
    limits = {} if end == "ApprovalHeld" else {"calls": 0}
    pair.policy({"kind": "budget", "budget": "b", "version": "1", "limits": limits, "on_exceed": on_exceed})
    pair.start("r", chain("a"), {"secret": 1})
    assert [event.redact for event in pair.ledger_events if type(event).__name__ == end] == [("secret",)]
