"""The app of the dataset's day: a shop's mail, orders, refunds, reports and contracts, on two queues and some models.

What goes wrong is told by the input, so that the day can be planned: functions do as they are told, for as long as they are told.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from tidegate import App, NonRetryable, Plan, State, ToolCall, context, report_cost, report_usage

MODELS_QUEUE: Final = "models"
UNSERVED_QUEUE: Final = "gpu"
SMALL, LARGE = "gpt-4o-mini", "gpt-4o"

app = App("day")


async def _take(given: dict[str, Any]) -> None:
    await asyncio.sleep(given["ms"] / 1000)


def _stumble(given: dict[str, Any]) -> None:
    if context().attempt <= given.get("stumbles", 0):
        raise ConnectionError("the provider does not answer")


# --- functions ------------------------------------------------------------------------------------------------------------


@app.step(provider="openai", model=SMALL, operation="chat", queue=MODELS_QUEUE, retries=3, backoff_s=0.1)
async def tag(given: dict[str, Any]) -> str:
    """Say what a mail is about, by a small model."""
    await _take(given)
    report_usage(input_tokens=given["tokens"], output_tokens=12)
    return str(given["about"])


@app.step(cost_micros=20)
async def check(given: dict[str, Any]) -> dict[str, Any]:
    """Look an order's customer up; one that does not exist never will."""
    await _take(given)
    if given.get("nobody"):
        raise NonRetryable("no such customer")
    return given


@app.step(cost_micros=900, provider="stripe", operation="charge", retries=2, backoff_s=0.1)
async def charge(given: dict[str, Any]) -> dict[str, Any]:
    """Charge the card; a try that breaks off costs a little, too."""
    await _take(given)
    if context().attempt <= given.get("stumbles", 0):
        report_cost(50)
        raise ConnectionError("the provider does not answer")
    return given


@app.step(cost_micros=900, provider="stripe", operation="charge", retries=5, backoff_s=0.1)
async def charge_patiently(given: dict[str, Any]) -> dict[str, Any]:
    """Charge the card, with more patience: what version 2 of an order does."""
    await _take(given)
    _stumble(given)
    return given


@app.step(cost_micros=400, idempotent=False, timeout_s=5.0)
async def ship(given: dict[str, Any]) -> str:
    """Hand the parcel to the carrier, which must not be repeated; sometimes it costs more than was said."""
    await _take(given)
    report_cost(550 if given.get("heavy") else 400)
    return "shipped"


@app.step(provider="openai", model=LARGE, operation="chat", queue=MODELS_QUEUE, retries=2, backoff_s=0.1)
async def summarise(given: dict[str, Any]) -> str:
    """Sum up a part of a report, by a large model."""
    await _take(given)
    report_usage(input_tokens=given["tokens"], output_tokens=150)
    return "a summary"


@app.step(cost_micros=10)
async def file(given: Any) -> str:
    """Put something into its folder."""
    return "filed"


@app.step(provider="websearch", operation="search", cost_micros=100, retries=2, backoff_s=0.2)
async def search(given: dict[str, Any]) -> list[str]:
    """Search the web; when the provider is out of order, it is for all."""
    await _take(given)
    _stumble(given)
    return ["a page"]


@app.step(timeout_s=0.3, retries=1, backoff_s=0.1, cost_micros=30)
async def scan(given: dict[str, Any]) -> str:
    """Scan an attachment; large ones take longer than is allowed."""
    await asyncio.sleep(2.0 if given.get("huge") else given["ms"] / 1000)
    return "clean"


@app.step(queue=UNSERVED_QUEUE, cost_micros=5_000)
async def render(given: Any) -> str:
    """Never run: no executor serves its queue."""
    return "rendered"


@app.tool(cost_micros=30)
async def look_up(order_id: str, amount_cents: int) -> dict[str, Any]:
    """Return what the shop knows of an order."""
    return {"order_id": order_id, "amount_cents": amount_cents}


@app.tool(cost_micros=300)
async def issue_refund(order_id: str, amount_cents: int) -> str:
    """Pay the customer back."""
    return f"refunded {amount_cents}"


@app.agent(tools=[look_up, issue_refund], provider="openai", model=LARGE, queue=MODELS_QUEUE)
async def clerk(state: State) -> Plan:
    """Handle a complaint: look up, refund, say so."""
    given = state.input
    await _take(given)
    usage = {"input_tokens": given["tokens"] * state.turn, "output_tokens": 60}
    arguments = {"order_id": given["order_id"], "amount_cents": given["amount_cents"]}
    if state.turn == 1:
        return Plan(content="I look.", tool_calls=[ToolCall("look_up", arguments)], usage=usage)
    if state.turn == 2:
        return Plan(content="I refund.", tool_calls=[ToolCall("issue_refund", arguments)], usage=usage)
    return Plan(content="Done.", final=True, usage=usage)


@app.agent(provider="openai", model=LARGE, queue=MODELS_QUEUE)
async def translator(state: State) -> Plan:
    """Translate a letter in one turn."""
    await _take(state.input)
    return Plan(content="Sehr geehrte Damen und Herren", final=True, usage={"input_tokens": 300, "output_tokens": 320})


# --- workflows ------------------------------------------------------------------------------------------------------------

mail = app.graph("mail").node("tag", tag)
app.graph("order").node("check", check).node("charge", charge).node("ship", ship).chain("check", "charge", "ship")
app.graph("order", "2").node("check", check).node("charge", charge_patiently).node("ship", ship).chain(
    "check", "charge", "ship"
)
app.graph("report").map("parts", summarise, over="input.parts", at_once=3).workflow(
    "tag", mail, input="${ input }"
).node("file", file).chain("parts", "tag", "file")
app.graph("contract").ask("sign", "${ 'Sign contract ' + input.id + '?' }", choices=["yes", "no"]).node(
    "file", file
).chain("sign", "file")
app.graph("invoice").wait_event("paid", "paid", key="${ input.id }", timeout_s=20).node("file", file).chain(
    "paid", "file"
)
app.graph("reminder").sleep("later", "${ input.seconds }").node("tag", tag).chain("later", "tag")
app.graph("research").node("search", search).node("file", file).chain("search", "file")
app.graph("attachment").node("scan", scan)
app.graph("film").node("render", render)
