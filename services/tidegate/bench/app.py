"""The benchmark's app: steps that do nothing, in a graph of three and in a chain of a thousand, one that waits for an executor, and
one that sleeps."""

from __future__ import annotations

from typing import Any, Final

from tidegate import App

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
