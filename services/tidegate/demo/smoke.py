"""The smallest app there is: `tidegate smoke` serves it and runs it to show that an installation works."""

from __future__ import annotations

import os

from tidegate import App

app = App("smoke", queue=os.environ.get("TIDEGATE_SMOKE_QUEUE", "smoke"))


@app.step(cost_micros=1)
def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


app.graph("tidegate-smoke").node("double", double)
