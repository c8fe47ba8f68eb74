"""The examples of docs/testing-workflows.md are tests themselves: each of them is run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.pages import examples_of

EXAMPLES = examples_of("testing-workflows.md")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_the_example_passes(example: Callable[[], None]) -> None:
    example()
