"""Writes the dashboards as Grafana imports them: `python -m tidegate.projection.dashboards FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tidegate.projection.dashboards.boards import BOARDS
from tidegate.projection.dashboards.panels import Dashboard, as_json


def text_of(board: Dashboard) -> str:
    """Return what the dashboard's file holds."""
    return json.dumps(as_json(board), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Write a file per dashboard into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (folder / f"{board.slug}.json").write_text(text_of(board), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
