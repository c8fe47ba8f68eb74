"""The budget demo's app: a run of four calls that cost a cent each."""

from __future__ import annotations

import time
from typing import Final

from tidegate import App, report_cost

app = App("budget")

CALL_MICROS: Final = 10_000
CALL_S: Final = 0.3
CALLS: Final = 4


@app.step(cost_micros=CALL_MICROS)
def call(number: int) -> int:
    """Ask a model something for a cent, long enough for somebody to press a key."""
    time.sleep(CALL_S)
    report_cost(CALL_MICROS)
    return number + 1


_names: Final = [f"call-{number}" for number in range(1, CALLS + 1)]
_graph = app.graph("work")
for _name in _names:
    _graph.node(_name, call)
_graph.chain(*_names)
