"""Passages for prompts: retrieved, merged and composed by ordinary steps, so that what a prompt was made of is in the log.

`merged` and `composed` are pure and can be used anywhere; `retrieving`, `merging` and `composing` register them as steps.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from tidegate.sdk.app import App

RANK_CONSTANT: Final = 60  # of reciprocal rank fusion: how little a first place in one list counts alone
BYTES_PER_TOKEN: Final = 4  # an estimate for those who give no counter of their own
DEFAULT_TOP: Final = 10
DEFAULT_TEMPLATE: Final = "[{number}] {source}\n{text}"
SEPARATOR: Final = "\n\n"

Rank = Literal["fusion", "score"]
Cut = Literal["skip", "stop", "text"]
Retriever = Callable[[str], "Sequence[Passage] | Awaitable[Sequence[Passage]]"]


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document. source: where it is from, such as a path or an address. score: how well it fits, more is better."""

    text: str
    source: str = ""
    score: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What passages were composed to.

    used: the passages in the text, in its order, each as far as it is there. left_out: sources of those that are not. is_cut: the
    text of the last one ends early. size: of the text, in the unit of the budget.
    """

    text: str
    used: tuple[Passage, ...]
    left_out: tuple[str, ...]
    is_cut: bool
    size: int


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has: a quarter of its bytes in UTF-8, rounded up."""
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def merged(lists: Sequence[Sequence[Passage]], *, top: int = DEFAULT_TOP, rank: Rank = "fusion") -> list[Passage]:
    """Return the best passages of several lists, each once.

    Two passages are the same if source and text are, but for white space. rank: `fusion` orders by the places that a passage has
    in the lists, the sum of 1 / (60 + place), and sets that as score, because the scores of different retrievers cannot be
    compared; `score` by the highest score. Whoever stands first in an earlier list goes first among equals.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    first: dict[tuple[str, str], Passage] = {}
    scores: dict[tuple[str, str], float] = {}
    for passages in lists:
        seen: set[tuple[str, str]] = set()
        for place, passage in enumerate(passages, 1):
            key = (passage.source, " ".join(passage.text.split()))
            if key in seen:
                continue
            seen.add(key)
            first.setdefault(key, passage)
            if rank == "fusion":
                scores[key] = scores.get(key, 0.0) + 1 / (RANK_CONSTANT + place)
            else:
                scores[key] = max(scores.get(key, passage.score), passage.score)
    order = sorted(first, key=lambda key: -scores[key])  # sorting is stable: the first stay first
    return [replace(first[key], score=scores[key]) for key in order[:top]]


def composed(
    passages: Sequence[Passage],
    *,
    max_tokens: int | None = None,
    max_characters: int | None = None,
    cut: Cut = "skip",
    template: str = DEFAULT_TEMPLATE,
    head: str = "",
    tail: str = "",
    count: Callable[[str], int] = estimated_tokens,
) -> Prompt:
    """Return a text made of passages, in their order, that is within a budget of tokens or of characters.

    head, tail: texts before and after them; they always stay. template: of a passage, with `number`, `source` and `text`. count:
    how tokens are counted. What does not fit is dealt with by one rule, `cut`: `skip` leaves a passage out that does not fit as a
    whole and goes on with the next; `stop` leaves that one out and all after it; `text` ends its text at the last word that
    fits, and leaves out all after it. Raises ValueError if there is not exactly one budget, or head and tail alone exceed it.
    """
    if (max_tokens is None) == (max_characters is None):
        raise ValueError("give max_tokens or max_characters")
    limit = max_characters if max_tokens is None else max_tokens
    measure = len if max_tokens is None else count
    assert limit is not None  # noqa: S101 - one of them is there
    parts: list[str] = []
    used: list[Passage] = []
    is_cut = False

    def whole(more: str) -> str:
        return SEPARATOR.join(text for text in (head, *parts, more, tail) if text)

    if measure(whole("")) > limit:
        raise ValueError(f"head and tail have {measure(whole(''))} of the {limit} that the prompt may have")
    left_out: list[str] = []
    for number, passage in enumerate(passages, 1):
        if (is_cut or cut != "skip") and left_out:
            left_out.append(passage.source)
            continue
        kept = passage
        if measure(whole(_shown(template, len(used) + 1, kept))) > limit:
            kept = replace(passage, text=_fitting(passage, template, len(used) + 1, whole, measure, limit))
            if cut != "text" or not kept.text:
                left_out.append(passage.source)
                continue
            is_cut = True
        parts.append(_shown(template, len(used) + 1, kept))
        used.append(kept)
        if is_cut:
            left_out += [other.source for other in passages[number:]]
            break
    text = whole("")
    return Prompt(text, tuple(used), tuple(left_out), is_cut, measure(text))


def _shown(template: str, number: int, passage: Passage) -> str:
    values = {"number": str(number), "source": passage.source, "text": passage.text}
    pieces = template.split("{")  # no str.format: what stands in braces in a template of somebody's is text
    made = pieces[0]
    for piece in pieces[1:]:
        name, brace, rest = piece.partition("}")
        made += values[name] + rest if brace and name in values else "{" + piece
    return made


def _fitting(
    passage: Passage, template: str, number: int, whole: Callable[[str], str], measure: Callable[[str], int], limit: int
) -> str:
    """Return the beginning of a passage's text, in whole words, with which the prompt is within its limit; empty if none is."""
    ends = [index for index, letter in enumerate(passage.text) if letter.isspace()]
    low, high = 0, len(ends)
    while low < high:  # the more words, the larger
        middle = (low + high + 1) // 2
        shorter = replace(passage, text=passage.text[: ends[middle - 1]].rstrip())
        if measure(whole(_shown(template, number, shorter))) <= limit:
            low = middle
        else:
            high = middle - 1
    return passage.text[: ends[low - 1]].rstrip() if low else ""


# --- as steps ---------------------------------------------------------------


def retrieving(
    app: App, name: str, retriever: Retriever, *, top: int = DEFAULT_TOP, **options: Any
) -> Callable[..., Any]:
    """Register a step that retrieves: its input is the query, its output the first `top` passages that `retriever` gives.

    retriever: a function, or a coroutine function, from a query to passages, best first. options: as of `@app.step`. Returns what
    graphs are built with.
    """

    async def retrieve(query: str) -> list[Passage]:
        found = retriever(query)
        passages = await found if isinstance(found, Awaitable) else found
        return list(passages)[:top]

    return app.step(name=name, **options)(retrieve)


def merging(
    app: App, name: str, *, top: int = DEFAULT_TOP, rank: Rank = "fusion", **options: Any
) -> Callable[..., Any]:
    """Register a step that merges what the nodes before it retrieved: see `merged`. Their order is that of their names."""

    def merge(found: dict[str, list[Passage]] | list[Passage]) -> list[Passage]:
        lists = [found] if isinstance(found, list) else [found[node] for node in sorted(found)]
        return merged(lists, top=top, rank=rank)

    return app.step(name=name, **options)(merge)


def composing(
    app: App,
    name: str,
    *,
    max_tokens: int | None = None,
    max_characters: int | None = None,
    cut: Cut = "skip",
    template: str = DEFAULT_TEMPLATE,
    count: Callable[[str], int] = estimated_tokens,
    **options: Any,
) -> Callable[..., Any]:
    """Register a step that composes a prompt: see `composed`. Its input is an object of `passages`, and of `head` and `tail` if
    there are any; its output a `Prompt`.
    """

    def compose(passages: list[Passage], head: str = "", tail: str = "") -> Prompt:
        return composed(
            passages,
            max_tokens=max_tokens,
            max_characters=max_characters,
            cut=cut,
            template=template,
            head=head,
            tail=tail,
            count=count,
        )

    composed([], max_tokens=max_tokens, max_characters=max_characters, count=count)  # a wrong budget is said now
    return app.step(name=name, **options)(compose)
