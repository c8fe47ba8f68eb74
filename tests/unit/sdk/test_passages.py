"""Passages: merging and composing depend on nothing but what they are given, and never exceed the budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate import App
from tidegate.sdk.passages import Passage, composed, composing, estimated_tokens, merged, merging, retrieving
from tidegate.testing import Rehearsal

A, B, C = (Passage(f"{name} " * 10, f"{name}.md", score) for name, score in (("a", 0.1), ("b", 0.9), ("c", 0.5)))


@pytest.mark.feature("G7")
def test_what_stands_high_in_several_lists_goes_first() -> None:
    found = merged([[A, B], [C, B], [B]])
    assert [passage.source for passage in found] == ["b.md", "a.md", "c.md"]
    assert found[0].score == pytest.approx(1 / 62 + 1 / 62 + 1 / 61)
    assert [passage.source for passage in merged([[A, B, C]], rank="score", top=2)] == ["b.md", "c.md"]


@pytest.mark.feature("G7")
def test_the_same_passage_is_there_once() -> None:
    again = Passage("a  " * 10, "a.md", 3.0)
    elsewhere = Passage(A.text, "other.md")
    assert [p.source for p in merged([[A, again, elsewhere], [again]])] == ["a.md", "other.md"]
    assert merged([[A], [again]], rank="score")[0].score == 3.0


def test_equals_stay_in_their_order() -> None:
    equal = [Passage(str(n), str(n)) for n in range(5)]
    assert [p.source for p in merged([equal], rank="score")] == ["0", "1", "2", "3", "4"]


def test_a_prompt_within_its_budget_is_whole() -> None:
    prompt = composed([A, B], max_characters=1_000, head="Read:", tail="Answer.")
    assert prompt.text == f"Read:\n\n[1] a.md\n{A.text}\n\n[2] b.md\n{B.text}\n\nAnswer."
    assert (prompt.used, prompt.left_out, prompt.is_cut, prompt.size) == ((A, B), (), False, len(prompt.text))


LONG = Passage("word " * 50, "long.md")


@pytest.mark.feature("G7")
@pytest.mark.parametrize(
    ("cut", "used", "left_out", "is_cut"),
    [
        ("skip", ["a.md", "b.md"], ["long.md"], False),
        ("stop", ["a.md"], ["long.md", "b.md"], False),
        ("text", ["a.md", "long.md"], ["b.md"], True),
    ],
)
def test_what_does_not_fit_is_dealt_with_by_the_rule(
    cut: Any, used: list[str], left_out: list[str], is_cut: bool
) -> None:
    prompt = composed([A, LONG, B], max_characters=100, cut=cut)
    assert [passage.source for passage in prompt.used] == used
    assert (list(prompt.left_out), prompt.is_cut) == (left_out, is_cut)
    assert prompt.size <= 100
    if is_cut:
        assert prompt.used[-1].text.split() == ["word"] * len(prompt.used[-1].text.split())
        assert prompt.used[-1].text in prompt.text


passages = st.lists(st.builds(Passage, st.text(max_size=80), st.sampled_from(["a", "b", "{text}"])), max_size=6)


@given(passages, st.integers(0, 200), st.sampled_from(["skip", "stop", "text"]), st.booleans())
def test_no_budget_is_exceeded_and_nothing_is_lost(found: list[Passage], limit: int, cut: Any, in_tokens: bool) -> None:
    budget = {"max_tokens" if in_tokens else "max_characters": limit}
    prompt = composed(found, cut=cut, **budget)
    assert (estimated_tokens if in_tokens else len)(prompt.text) == prompt.size <= limit
    assert sorted([*(one.source for one in prompt.used), *prompt.left_out]) == sorted(one.source for one in found)
    assert prompt == composed(found, cut=cut, **budget)


@given(passages)
def test_merging_a_merger_changes_nothing(found: list[Passage]) -> None:
    once = merged([found], top=100, rank="score")
    assert merged([once], top=100, rank="score") == once


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "max_tokens or max_characters"),
        ({"max_tokens": 1, "max_characters": 1}, "max_tokens or max_characters"),
        ({"max_characters": 3, "head": "four"}, "head and tail have 4 of the 3"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        composed([], **options)


@pytest.mark.feature("G7")
def test_each_part_is_a_step_of_its_own_in_the_log() -> None:
    app = App("a")

    async def by_meaning(query: str) -> list[Passage]:
        return [B, C]

    meaning = retrieving(app, "by_meaning", by_meaning)
    words = retrieving(app, "by_words", lambda query: [A, B], top=2, retries=1)
    merge = merging(app, "merge", top=2)
    compose = composing(app, "compose", max_tokens=40)
    graph = app.graph("prompt").node("words", words).node("meaning", meaning).node("merge", merge)
    graph.node("compose", compose, input={"passages": "${ nodes.merge }", "tail": "${ input }"})
    for source, target in (("words", "merge"), ("meaning", "merge"), ("merge", "compose")):
        graph.edge(source, target)
    with Rehearsal(app) as rehearsal:
        outcome = rehearsal.run("prompt", "why?")
    assert outcome.status == "succeeded", outcome.reason
    assert outcome.steps["words"].output[0]["source"] == "a.md"
    assert [one["source"] for one in outcome.output["used"]] == ["b.md", "a.md"]
    assert outcome.output["text"].endswith("why?")
    assert all(a.text != b.text for a, b in itertools.pairwise((A, B, C)))
