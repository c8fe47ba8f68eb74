"""An app as a team would have it: two steps of a graph."""

from __future__ import annotations

from typing import Any

from tidegate import App

app = App("orders")


@app.step(cost_micros=100)
def price(order: dict[str, Any]) -> int:
    """Return what an order costs, in cents."""
    return sum(line["cents"] * line.get("count", 1) for line in order["lines"])


@app.step(retries=2, timeout_s=5)
def label(cents: int) -> str:
    """Return how the order is to be handled."""
    return "large" if cents > 10_000 else "small"


app.graph("classify").chain(price, label)
