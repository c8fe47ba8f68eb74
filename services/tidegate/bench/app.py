"""The benchmark's app: steps that do nothing, in a graph of three and in a chain of a thousand, one that waits for an executor, and
one that sleeps.

For the dataset, which is to look like a day of real work, there are also some that fail, and an agent.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate import App, NonRetryable, Plan, State, ToolCall, context

STEPS_OF_THREE: Final = 3
STEPS_OF_CHAIN: Final = 1000
# Every step sets money aside and spends all of it, so that what is measured pays for its bookkeeping, too.
COST_MICROS: Final = 10

app = App("bench")


@app.step(cost_micros=COST_MICROS)
async def nothing(value: Any) -> Any:
    """Return what it is given. Async, as a step that waits for a model would be."""
    return value


@app.step(queue="parked", cost_micros=COST_MICROS)
async def parked(value: Any) -> Any:
    """Never run: no executor serves its queue, so a run of it stays alive for as long as one likes."""
    return value


three = app.graph("three").node("a", nothing).node("b", nothing).node("c", nothing).chain("a", "b", "c")

_CHAIN_NODES: Final = [f"n{number}" for number in range(1, STEPS_OF_CHAIN + 1)]

thousand = app.graph("thousand", max_steps=STEPS_OF_CHAIN)
for _node in _CHAIN_NODES:
    thousand.node(_node, nothing)
thousand.chain(*_CHAIN_NODES)

asleep = app.graph("asleep").wait_until("w", "${ input }")
alive = app.graph("alive").node("a", parked)


# --- for the dataset only -------------------------------------------------------------------------------------------------


@app.step(cost_micros=COST_MICROS, retries=3, backoff_s=0.02)
async def shaky(value: Any) -> Any:
    """Fail in the first attempt."""
    if context().attempt == 1:
        raise OSError("not yet")
    return value


@app.step(cost_micros=COST_MICROS)
async def hopeless(value: Any) -> Any:
    """Fail for good."""
    raise NonRetryable("of no use")


@app.tool(cost_micros=COST_MICROS)
def look_up(number: int) -> int:
    """Look something up."""
    return number


@app.agent(tools=[look_up], cost_micros=5 * COST_MICROS)
def clerk(state: State) -> Plan:
    """Look something up, then say so."""
    usage = {"input_tokens": 100 * state.turn, "output_tokens": 20}
    if state.turn == 1:
        return Plan(content="I look it up.", tool_calls=[ToolCall("look_up", {"number": 7})], usage=usage)
    return Plan(content="It is 7.", final=True, usage=usage)


app.graph("shaky").node("a", nothing).node("b", shaky).chain("a", "b")
app.graph("hopeless").node("a", nothing).node("b", hopeless).chain("a", "b")
