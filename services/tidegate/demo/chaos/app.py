"""The chaos demo's app: orders that stumble, wait, ask a human and move money, and leave a trace of every step they take."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any, Final

from tidegate import App, Plan, State, ToolCall, context, idempotency_key, report_cost
from tidegate.demo.chaos.provider import Call, Payment, Provider

app = App("chaos")

POLICY: Final[dict[str, Any]] = {
    "policy": "chaos",
    "version": "1",
    "rules": [
        {
            "name": "ask-before-shipping",
            "when": "name == 'ship'",
            "then": "require_approval",
            "reason": "somebody must look at the parcel",
        }
    ],
}
# Functions that move money: each at most once per run, and exactly once where its step succeeded.
PAYING: Final = frozenset({"charge", "stock", "ship", "stamp", "refund"})
# What fails here may fail again: the demo is about what is lost, not about what is given up.
PATIENT: Final[dict[str, Any]] = {"retries": 20, "backoff_s": 0.2, "backoff_factor": 1.5, "backoff_max_s": 2.0}


def _provider() -> Provider:
    return Provider(Path(os.environ.get("TIDEGATE_DATA_DIR", ".")) / "world")


def _enter() -> None:
    here = context()
    instance_id = os.environ.get("TIDEGATE_INSTANCE_ID", "")
    _provider().note(Call(here.run_id, here.step_id, here.attempt, instance_id, idempotency_key()))


def _pay(function: str, cents: int) -> None:
    here = context()
    _provider().pay(Payment(here.run_id, here.step_id, function, cents, idempotency_key()))


@app.step(cost_micros=100, **PATIENT)
async def take(order: dict[str, Any]) -> dict[str, Any]:
    """Take an order; the warehouse does not answer at first."""
    _enter()
    await asyncio.sleep(0.2)
    if context().attempt <= order["stumbles"]:
        report_cost(20)
        raise OSError("the warehouse does not answer")
    return order


@app.step(cost_micros=500, **PATIENT)
def charge(order: dict[str, Any]) -> int:
    """Charge the card, in a thread that nobody can abort; the provider is slow to answer after the money has moved."""
    _enter()
    _pay("charge", order["cents"])
    time.sleep(0.5)
    return int(order["cents"])


@app.step(cost_micros=300, **PATIENT)
async def stock(order: dict[str, Any]) -> str:
    """Buy what is missing; the answer to the first order sometimes breaks off, and then it costs more than was declared."""
    _enter()
    await asyncio.sleep(0.3)
    _pay("stock", 7)
    if order["breaks_off"] and context().attempt == 1:
        report_cost(450)
        raise ConnectionError("the answer broke off")
    return "in stock"


@app.step(cost_micros=400, **PATIENT)
async def ship(cents: int) -> str:
    """Pay the carrier: asks a human first."""
    _enter()
    await asyncio.sleep(0.2)
    _pay("ship", 490)
    return f"shipped for {cents}"


@app.step(cost_micros=200, **{**PATIENT, "idempotent": False})
async def stamp(order: dict[str, Any]) -> str:
    """Buy a stamp, which must not be repeated blindly: when it is not known whether it was bought, a human is asked."""
    _enter()
    _pay("stamp", 110)
    await asyncio.sleep(0.6)
    return "stamped"


@app.step(cost_micros=50, **PATIENT)
async def close(parts: Any) -> Any:
    """Close the order."""
    _enter()
    await asyncio.sleep(0.1)
    return parts


_parcel = app.graph("parcel").node("take", take).node("charge", charge).node("stock", stock).node("ship", ship)
_parcel.node("close", close).chain("take", "charge", "ship", "close").chain("take", "stock", "close")

app.graph("letter").node("take", take).node("stamp", stamp).node("close", close).chain("take", "stamp", "close")


@app.tool(cost_micros=50, **PATIENT)
async def look_up(order_id: str) -> dict[str, Any]:
    """Return what the shop knows of an order."""
    _enter()
    await asyncio.sleep(0.2)
    return {"order_id": order_id, "cents": 1_900}


@app.tool(cost_micros=300, **PATIENT)
def refund(order_id: str, cents: int) -> str:
    """Pay the customer back."""
    _enter()
    _pay("refund", cents)
    time.sleep(0.3)
    return f"refunded {cents} for {order_id}"


@app.agent(tools=[look_up, refund], cost_micros=1_000, **PATIENT)
def clerk(state: State) -> Plan:
    """Handle a complaint: look up, refund, say so."""
    _enter()
    order_id = state.input["order_id"]
    order = state.output_of("look_up")
    if order is None:
        return Plan(content="I look.", tool_calls=[ToolCall("look_up", {"order_id": order_id})], cost_micros=600)
    if state.output_of("refund") is None:
        call = ToolCall("refund", {"order_id": order_id, "cents": order["cents"]})
        return Plan(content="I refund.", tool_calls=[call], cost_micros=600)
    return Plan(content="Done.", final=True, cost_micros=600)
