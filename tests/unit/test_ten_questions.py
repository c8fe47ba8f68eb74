"""The page of ten questions: every panel and recipe that it sends people to is there. What they answer is tested where they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.projection.dashboards.boards import BOARDS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "ten-questions.md").read_text(encoding="utf-8")


def anchors(page: str) -> dict[str, str]:
    """Return the headings of a page by the anchors that they get."""
    headings = re.findall(r"^#{2,3} (.+)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}


@pytest.mark.feature("O1")
def test_ten_questions_each_with_a_place_that_answers_it() -> None:
    parts = re.split(r"^\*\*(\d+)\. ", PAGE, flags=re.MULTILINE)
    questions = dict(zip(map(int, parts[1::2]), parts[2::2], strict=True))
    assert list(questions) == list(range(1, 11))
    for number, text in questions.items():
        assert re.search(r"sql-cookbook\.md#|\*\w+: ", text), f"question {number} names neither a panel nor a recipe"


def test_every_panel_that_is_named_is_on_its_dashboard() -> None:
    panels = {f"{board.slug}: {panel.title}" for board in BOARDS for panel in board.all_panels}
    named = {" ".join(name.split()) for name in re.findall(r"(?<!\*)\*(\w+: [^*]+)\*(?!\*)", PAGE)}
    assert len(named) > 8
    assert named <= panels, named - panels


def test_every_recipe_that_is_linked_is_in_the_cookbook_under_that_name() -> None:
    linked = re.findall(r"\[([^\]]+)\]\((\S+?\.md)#([\w-]+)\)", PAGE)
    assert len(linked) > 10
    for text, page, anchor in linked:
        assert anchor in anchors(page), f"{page}#{anchor}"
        if page == "sql-cookbook.md":
            assert " ".join(text.split()) == anchors(page)[anchor]
