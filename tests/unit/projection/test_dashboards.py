"""Dashboards as Grafana gets them: the files are what the panels say, and what Grafana puts into queries is put in here alike."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tidegate.projection.dashboards.__main__ import text_of
from tidegate.projection.dashboards.boards import BOARDS
from tidegate.projection.dashboards.macros import ALL, Range, substituted
from tidegate.projection.dashboards.panels import PLUGIN, WIDTH, Dashboard

pytestmark = pytest.mark.feature("O1")
FOLDER = Path(__file__).parents[3] / "charts" / "tidegate" / "dashboards"
SHOWN = Range(1_000, 2_000, 15)


def test_the_files_of_the_chart_are_what_the_panels_say() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}

    assert written == {f"{board.slug}.json": text_of(board) for board in BOARDS}, "run: make manifests"


@pytest.mark.parametrize("board", BOARDS, ids=[board.slug for board in BOARDS])
def test_a_dashboard_is_whole(board: Dashboard) -> None:
    made: dict[str, Any] = json.loads(text_of(board))
    panels = made["panels"]

    assert panels[0]["title"] == "Freshness"
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    known = {variable["name"] for variable in made["templating"]["list"]}
    assert {"datasource", "database"} <= known
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == panel["targets"][0]["datasource"] == {"type": PLUGIN, "uid": "${datasource}"}
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= WIDTH
        query = panel["targets"][0]["rawSql"]
        assert "${database}." in query
        assert ":scope" not in query
        # Whatever is asked of Grafana is defined, and whoever lists runs leads to them.
        substituted(query, SHOWN, dict.fromkeys(known, "x"))
        if panel["type"] == "table" and " run_id" in query:
            links = [
                link
                for one in panel["fieldConfig"]["overrides"]
                for p in one["properties"]
                if p["id"] == "links"
                for link in p["value"]
            ]
            assert any("/d/tidegate-run/" in link["url"] for link in links), panel["title"]
    cells = [
        {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        for p in (panel["gridPos"] for panel in panels)
    ]
    assert not any(one & other for one, other in itertools.combinations(cells, 2)), "panels lie on each other"


def test_what_runs_link_to_is_there() -> None:
    made = {f"tidegate-{board.slug}": json.loads(text_of(board)) for board in BOARDS}

    assert {"run_id", "datasource", "database"} == {v["name"] for v in made["tidegate-run"]["templating"]["list"]}


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("$__timeFilter(at)", "at >= toDateTime(1000) AND at <= toDateTime(2000)"),
        ("$__timeInterval(a.at)", "toStartOfInterval(toDateTime(a.at), INTERVAL 15 second)"),
        ("$__fromTime, $__toTime, $__interval_s", "toDateTime(1000), toDateTime(2000), 15"),
        ("${one}.x = ${one:singlequote}", "it's\\.x = 'it\\'s\\\\'"),
        ("IN (${many:singlequote})", "IN ('a','b')"),
        ("$__conditionalAll(account IN (${many:singlequote}), $many) AND x", "account IN ('a','b') AND x"),
        ("$__conditionalAll(account IN (${all:singlequote}), $all) AND x", "1=1 AND x"),
    ],
)
def test_macros_and_variables_become_what_grafana_makes_of_them(sql: str, expected: str) -> None:
    variables = {"one": "it's\\", "many": ["a", "b"], "all": [ALL]}

    assert substituted(sql, SHOWN, variables) == expected


@pytest.mark.parametrize("sql", ["${nobody}", "$__unknown(at)", "$__conditionalAll(a IN (${x}), $x)"])
def test_what_nobody_knows_is_an_error(sql: str) -> None:
    with pytest.raises(LookupError):
        substituted(sql, SHOWN, {})
