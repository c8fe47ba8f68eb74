"""The refund demo's app: an agent that looks an order up, refunds it, and writes to the customer.

The agent's model is scripted, so that the demo needs no network; it decides from what it observes, as a model would.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tidegate import App, Plan, State, ToolCall, context, idempotency_key
from tidegate.demo.payments import Payments

app = App("refunds")

# How long the payment provider takes to answer after it has moved the money: the moment in which the demo kills.
PROVIDER_DELAY_S = float(os.environ.get("TIDEGATE_DEMO_PROVIDER_DELAY_S", "0"))


def _payments() -> Payments:
    return Payments(Path(os.environ.get("TIDEGATE_DATA_DIR", ".")) / "payments.sqlite")


@app.tool(cost_micros=200)
def lookup_order(order_id: str) -> dict[str, Any]:
    """Return what the shop knows of an order."""
    return {"order_id": order_id, "amount_cents": 4_200, "customer": "sam@example.com", "delivered": False}


@app.tool(cost_micros=500, timeout_s=20)
def issue_refund(order_id: str, amount_cents: int) -> dict[str, Any]:
    """Pay the customer back. The provider honours the idempotency key, so a second dispatch moves no money."""
    moved = _payments().refund(order_id, amount_cents, idempotency_key())
    if moved and PROVIDER_DELAY_S:
        time.sleep(PROVIDER_DELAY_S)
    return {"refunded_cents": amount_cents, "attempt": context().attempt}


@app.tool(cost_micros=100)
def email_customer(to: str, text: str) -> dict[str, Any]:
    """Tell the customer."""
    return {"sent_to": to, "characters": len(text)}


@app.agent(tools=[lookup_order, issue_refund, email_customer], cost_micros=3_000)
def support(state: State) -> Plan:
    """Handle one complaint: look up, refund if it was not delivered, write."""
    order_id = state.input["order_id"]
    order = state.output_of("lookup_order")
    if order is None:
        return _plan("I look the order up.", ToolCall("lookup_order", {"order_id": order_id}))
    if order["delivered"]:
        return Plan(content="It was delivered: nothing to refund.", final=True, cost_micros=2_000)
    if state.output_of("issue_refund") is None:
        amount = {"order_id": order_id, "amount_cents": order["amount_cents"]}
        return _plan("It never arrived: I refund it.", ToolCall("issue_refund", amount))
    if state.output_of("email_customer") is None:
        letter = {"to": order["customer"], "text": f"We have refunded order {order_id}."}
        return _plan("I tell the customer.", ToolCall("email_customer", letter))
    return Plan(content=f"Refunded {order['amount_cents']} cents for order {order_id}.", final=True, cost_micros=2_000)


def _plan(content: str, call: ToolCall) -> Plan:
    return Plan(content=content, tool_calls=[call], cost_micros=2_000, usage={"input_tokens": 800, "output_tokens": 60})


@app.step()
def add(numbers: list[int]) -> int:
    """Add numbers: the smallest workflow there is, for a first try."""
    return sum(numbers)


app.graph("sums").node("add", add)
