"""What a dashboard and its panels are, and their JSON for Grafana."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

WIDTH: Final = 24  # columns of Grafana's grid
PLUGIN: Final = "grafana-clickhouse-datasource"
PLUGIN_VERSION: Final = "4.0.0"
SCHEMA_VERSION: Final = 39  # Grafana 10.4, and understood by all later ones
RUN_LINK: Final = (
    "/d/tidegate-run/tidegate-one-run?var-run_id=${__value.raw}&${datasource:queryparam}&${database:queryparam}"
)
SCOPE: Final = "$__conditionalAll(account IN (${account:singlequote}), $account)"

STAT, TABLE, SERIES, BARS, TIMELINE, GAUGE = "stat", "table", "timeseries", "barchart", "state-timeline", "bargauge"


@dataclass(frozen=True, slots=True)
class Panel:
    """A query and how it is shown.

    `:scope` in the query stands for the chosen accounts. units: by column, or for all of them under "". A column `run_id` links
    to the dashboard of that run.
    """

    title: str
    kind: str
    sql: str
    description: str
    width: int = 12
    height: int = 8
    units: dict[str, str] = field(default_factory=dict)
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of panels. by_account: whether it can be narrowed to accounts; by_run: whether it shows one run."""

    slug: str
    title: str
    description: str
    panels: Sequence[Panel]
    by_account: bool = True
    by_run: bool = False
    since: str = "now-24h"

    @property
    def all_panels(self) -> tuple[Panel, ...]:
        """The panels, the line that says how far the tables are before all others."""
        return (FRESHNESS, *self.panels)


FRESHNESS: Final = Panel(
    "Freshness",
    STAT,
    """
SELECT
    max(last_event_at) AS "last event",
    sum(lag) AS "records behind",
    sum(missing) AS "records missing",
    dateDiff('second', max(written_at), now()) AS "tables written before"
FROM ${database}.freshness
WHERE topic != 'instances'
""",
    "How far the tables are: when the newest event in them happened, how many records of the logs are not in them yet, and how "
    "long ago the projection last wrote. It writes every few seconds, events or not: an age that grows says that it is away. "
    "Records missing are those that its group has passed and these tables never got: `tidegate replay projection` brings them.",
    width=WIDTH,
    height=4,
    units={"last event": "dateTimeAsIso", "tables written before": "s"},
)


def query_of(panel: Panel) -> str:
    """Return the panel's query with Grafana's macros and variables still in it."""
    return panel.sql.strip().replace(":scope", SCOPE)


def as_json(board: Dashboard) -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    return {
        "uid": f"tidegate-{board.slug}",
        "title": f"Tidegate: {board.title}",
        "description": board.description,
        "tags": ["tidegate"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": board.since, "to": "now"},
        "links": [_to_the_others()],
        "templating": {"list": _variables(board)},
        "annotations": {"list": []},
        "panels": [
            _panel(number, panel, at)
            for number, (panel, at) in enumerate(zip(board.all_panels, _places(board.all_panels), strict=True), 1)
        ],
    }


def _to_the_others() -> dict[str, Any]:
    return {
        "type": "dashboards",
        "title": "Tidegate",
        "tags": ["tidegate"],
        "asDropdown": True,
        "includeVars": True,
        "keepTime": True,
        "targetBlank": False,
    }


def _places(panels: Sequence[Panel]) -> list[dict[str, int]]:
    """Return where each panel lies: from left to right, in rows as high as their highest."""
    places, x, y, height = [], 0, 0, 0
    for panel in panels:
        if x + panel.width > WIDTH:
            x, y, height = 0, y + height, 0
        places.append({"x": x, "y": y, "w": panel.width, "h": panel.height})
        x, height = x + panel.width, max(height, panel.height)
    return places


_DATASOURCE: Final = {"type": PLUGIN, "uid": "${datasource}"}


def _variables(board: Dashboard) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name": "datasource", "label": "ClickHouse", "type": "datasource", "query": PLUGIN, "hide": 0, "refresh": 1},
        {
            "name": "database",
            "label": "Database",
            "type": "textbox",
            "query": "tidegate",
            "current": {"text": "tidegate", "value": "tidegate"},
            "hide": 0,
        },
    ]
    if board.by_account:
        found.append(
            {
                "name": "account",
                "label": "Account",
                "type": "query",
                "datasource": _DATASOURCE,
                "query": "SELECT DISTINCT account FROM ${database}.runs ORDER BY account LIMIT 1000",
                "includeAll": True,
                "multi": True,
                "refresh": 2,
                "sort": 1,
                "current": {"text": ["All"], "value": ["$__all"]},
                "hide": 0,
            }
        )
    if board.by_run:
        empty = {"text": "", "value": ""}
        found.append({"name": "run_id", "label": "Run", "type": "textbox", "query": "", "current": empty, "hide": 0})
    return found


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    is_series = panel.kind == SERIES
    found: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": "A",
                "datasource": _DATASOURCE,
                "editorType": "sql",
                "queryType": "timeseries" if is_series else "table",
                "format": 0 if is_series else 1,
                "pluginVersion": PLUGIN_VERSION,
                "rawSql": query_of(panel),
            }
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _OPTIONS.get(panel.kind, {}),
    }
    if panel.kind == TIMELINE:
        found["transformations"] = [{"id": "partitionByValues", "options": {"fields": ["step"], "keepFields": False}}]
    return found


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "" in panel.units:
        found["unit"] = panel.units[""]
    if panel.kind == SERIES:
        found["custom"] = {
            "drawStyle": "bars" if panel.stacked else "line",
            "fillOpacity": 60 if panel.stacked else 10,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
        found["min"] = 0
    return found


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    found = [_override(name, [{"id": "unit", "value": unit}]) for name, unit in panel.units.items() if name]
    if panel.kind == TABLE:
        link = [{"title": "This run", "url": RUN_LINK}]
        found.append(_override("run_id", [{"id": "links", "value": link}]))
    return found


def _override(column: str, properties: list[dict[str, Any]]) -> dict[str, Any]:
    return {"matcher": {"id": "byName", "options": column}, "properties": properties}


_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    STAT: {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "/.*/", "values": False},
        "colorMode": "none",
        "graphMode": "none",
        "textMode": "value_and_name",
    },
    TABLE: {"cellHeight": "sm", "showHeader": True},
    SERIES: {"legend": {"displayMode": "table", "placement": "right", "calcs": ["sum"]}, "tooltip": {"mode": "multi"}},
    BARS: {"orientation": "horizontal", "legend": {"showLegend": False}},
    GAUGE: {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "/.*/", "values": True},
        "orientation": "horizontal",
        "displayMode": "basic",
    },
    TIMELINE: {"mergeValues": True, "showValue": "auto", "legend": {"showLegend": False}},
}
