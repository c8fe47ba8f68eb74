"""The smallest app there is: `tidegate smoke` serves it and runs it to show that an installation works."""

from __future__ import annotations

import os

from tidegate import App

_queue = os.environ.get("TIDEGATE_SMOKE_QUEUE", "smoke")
app = App("smoke", queue=_queue)


@app.step(cost_micros=1)
def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


# A version for each queue: what a name and version mean never changes, and the queue is part of it.
app.graph("tidegate-smoke", version=_queue).node("double", double)
