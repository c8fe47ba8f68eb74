"""docs/clickhouse.md is what the migrations make."""

from pathlib import Path

import pytest

from tidegate.projection.schema_page import DESCRIPTIONS, page
from tidegate.projection.tables import VIEWS


@pytest.mark.feature("O1")
def test_the_page_of_the_tables_is_what_the_migrations_make() -> None:
    written = (Path(__file__).parents[3] / "docs" / "clickhouse.md").read_text(encoding="utf-8")

    assert written == page(), "run: make docs"
    assert set(DESCRIPTIONS) == set(VIEWS)
