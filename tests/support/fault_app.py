"""An app whose functions go wrong in every way, and leave traces of it that nothing in Tidegate has a hand in.

The folder TIDEGATE_FAULT_DIR holds `entered.log`, one line per entry into a function, and `effects/`, one file per idempotency
key that had an effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import decimal
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tidegate import (
    MODEL_RETRIES,
    App,
    CallFailedError,
    NonRetryable,
    Plan,
    Propose,
    RetryRule,
    State,
    ToolCall,
    context,
    idempotency_key,
    merge,
    model_errors,
    report_cost,
    report_usage,
)

app = App("faults")

# What follows the last word of a whole line. One write is not enough: a kernel that copies page by page looks for a deadly
# signal between two pages, so that a process killed as its line crosses a page's end leaves the line's beginning alone.
END = "\t."


def _folder() -> Path:
    return Path(os.environ["TIDEGATE_FAULT_DIR"])


def leave(path: Path, *words: object) -> None:
    """Append a line of words, none of which has tabs or line ends, in one write and apart from a torn one before it."""
    line = ("\n" + "\t".join(map(str, words)) + END).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def left(path: Path) -> list[list[str]]:
    """Return the words of every whole line. A torn one says that its process died before it did anything else."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [line.removesuffix(END).split("\t") for line in lines if line.endswith(END)]


def enter() -> None:
    """Leave a trace before anything else: which attempt, in which process, of which instance."""
    here = context()
    instance = os.environ.get("TIDEGATE_INSTANCE_ID", "")
    leave(_folder() / "entered.log", here.run_id, here.step_id, here.attempt, os.getpid(), instance, idempotency_key())


def have_effect() -> bool:
    """Do something to the outside world that counts once per idempotency key; returns whether it was done now."""
    folder = _folder() / "effects"
    folder.mkdir(exist_ok=True)
    try:
        (folder / idempotency_key()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


# --- what works ---------------------------------------------------------------


@app.step(cost_micros=10, backoff_s=0.05)
def one(n: int) -> int:
    """Add one, and have an effect."""
    enter()
    have_effect()
    return n + 1


@app.step(cost_micros=20, backoff_s=0.05)
def two(n: int) -> int:
    """Double."""
    enter()
    have_effect()
    report_cost(15)
    return n * 2


@app.step(cost_micros=30, backoff_s=0.05)
def three(n: int) -> dict[str, int]:
    """Wrap."""
    enter()
    have_effect()
    return {"n": n}


app.graph("chain").chain(one, two, three)


@app.step(cost_micros=10, backoff_s=0.05)
def propose(change: dict[str, Any]) -> Propose:
    """Propose the change that it is given."""
    enter()
    have_effect()
    return Propose(change, output="proposed")


@app.step(cost_micros=10, backoff_s=0.05)
def charge(order: dict[str, Any]) -> int:
    """Take `cents` from a card whose `number` is nobody's business."""
    enter()
    have_effect()
    return int(order["cents"])


app.graph("charge").node("it", charge)
app.graph("checked").node("one", one).input_schema({"type": "integer", "minimum": 0})


@app.step(cost_micros=40, timeout_s=60)
async def wait_here(seconds: float) -> str:
    """Take this long; can be aborted."""
    enter()
    await asyncio.sleep(seconds)
    have_effect()
    return "done"


@app.flow(steps=[one, wait_here])
async def errands(n: int) -> dict[str, Any]:
    """Call steps one by one and side by side, and say where the last value comes from."""
    first = await one(n)  # type: ignore[misc]  # in a flow, calls are awaited
    second, _ = await asyncio.gather(one(first), wait_here(1.5))  # type: ignore[call-overload]
    third = await one(merge(second.value + first.value, first, second))  # type: ignore[misc]
    return {"value": third.value, "parents": list(third.parents)}


@app.step(cost_micros=40, timeout_s=60)
def block_here(seconds: float) -> str:
    """Take this long, in a thread; cannot be aborted."""
    enter()
    time.sleep(seconds)
    have_effect()
    return "done"


def pay() -> bool:
    """Have an effect that must not be repeated; return whether this is the first attempt, after which it is not over."""
    enter()
    leave(_folder() / "paid.log", context().run_id, context().attempt)
    return context().attempt == 1


@app.step(cost_micros=40, timeout_s=60, idempotent=False)
async def pay_once(seconds: float) -> str:
    """Pay, and take this long afterwards; a second attempt is quick."""
    if pay():
        await asyncio.sleep(seconds)
    return "paid"


@app.step(cost_micros=40, timeout_s=0.5, idempotent=False, retries=5)
async def pay_late(anything: Any) -> str:
    """Pay, and run out of time."""
    if pay():
        await asyncio.sleep(3600)
    return "paid"


@app.step(cost_micros=40, timeout_s=0.5, idempotent=False, retries=5)
def pay_late_in_thread(anything: Any) -> str:
    """Pay, and run out of time where it cannot be aborted."""
    if pay():
        time.sleep(2.0)
    return "paid"


@app.step(cost_micros=40, idempotent=False, retries=5, isolation="subprocess")
def pay_and_die(anything: Any) -> str:
    """Pay, and end in the middle."""
    if pay():
        os.kill(os.getpid(), signal.SIGKILL)
    return "paid"


@app.tool(cost_micros=40, timeout_s=0.5, idempotent=False, retries=5)
async def pay_by_tool() -> str:
    """Pay, and run out of time."""
    if pay():
        await asyncio.sleep(3600)
    return "paid"


@app.agent(tools=[pay_by_tool])
def payer(state: State) -> Plan:
    """Pay once, and say what it was told came of it."""
    enter()
    if not state.history:
        return Plan(tool_calls=[ToolCall("pay_by_tool", {})])
    (call,) = state.history[0].calls
    return Plan(output=[call.ok, call.output, call.error])


@app.step(queue="nobody")
def never(anything: Any) -> None:
    """Wait for an executor that does not exist."""
    enter()


for _function in (wait_here, block_here, pay_once, pay_late, pay_late_in_thread, pay_and_die, never):
    app.graph(_function.__name__).node("it", _function)

app.graph("both").node("left", wait_here, input="${ input.left }").node("right", wait_here, input="${ input.right }")


# --- what does not ---------------------------------------------------------------


class HopelessError(Exception):
    """An exception whose message cannot be read."""

    def __str__(self) -> str:
        raise RuntimeError("no message either")


@app.step(cost_micros=10, retries=2, backoff_s=0.02)
def fail(anything: Any) -> None:
    """Raise every time, having spent something."""
    enter()
    report_cost(3)
    raise ValueError("no luck \ud800 today")


@app.step(cost_micros=10, retries=0, retry_rules=[RetryRule(on=[OSError], retries=5, backoff_s=0.02)])
def fail_twice(n: int) -> int:
    """Raise in the first two attempts."""
    enter()
    if context().attempt <= 2:
        raise OSError("not yet")
    have_effect()
    return n


@app.step(retries=5)
def fail_for_good(anything: Any) -> None:
    """Say that it is of no use."""
    enter()
    raise NonRetryable("the card is stolen")


@app.step(retries=1, backoff_s=0.02)
def fail_unspeakably(anything: Any) -> None:
    """Raise what cannot be printed, then try to end the process."""
    enter()
    if context().attempt == 1:
        raise HopelessError
    raise SystemExit(3)


@app.step(timeout_s=0.3, retries=1, backoff_s=0.02)
async def hang(anything: Any) -> None:
    """Hang beyond the timeout; aborted."""
    enter()
    await asyncio.sleep(3600)


@app.step(timeout_s=0.3, retries=0)
def hang_in_thread(anything: Any) -> None:
    """Hang beyond the timeout where it cannot be aborted."""
    enter()
    time.sleep(2.0)


@app.step(timeout_s=0.3, retries=0)
async def hang_and_complain(anything: Any) -> None:
    """Hang, and answer the abortion with an exception of its own."""
    enter()
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        raise ValueError("how dare you") from None


@app.step(timeout_s=0.3, retries=5)
async def finish_late(anything: Any) -> str:
    """Finish what was begun although aborted, and say so."""
    enter()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
    await asyncio.sleep(0.2)
    have_effect()
    return "done, if late"


@app.step(retries=5, cost_micros=7)
def not_json(what: str) -> Any:
    """Return what is not JSON, after the effect."""
    enter()
    have_effect()
    return {"object": object(), "nan": float("nan"), "surrogate": "\ud800", "bytes": b"\xff", "lambda": enter}[what]


ANY_JSON: dict[str, Any] = {
    "tuple": (1, ("a", None)),
    "moment": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
    "exact": decimal.Decimal("0.10"),
    "null": None,
    "nothing": "",
    "zero": 0,
    "number": 0.1,
    "false": False,
    "list": [],
    "object": {},
    "unicode": "\u0000 \U0001f600 \u2028",
}


@app.step(retries=5)
def returns(what: str) -> Any:
    """Return something that has a form in JSON, after the effect."""
    enter()
    have_effect()
    return ANY_JSON[what]


app.graph("returns").map("it", returns, over="input")


@app.step(retries=5)
def large(size: int) -> str:
    """Return a string of that size."""
    enter()
    return "x" * size


@app.step(cost_micros=100)
def dear(micros: int) -> int:
    """Cost so much, whatever was declared."""
    enter()
    report_cost(micros)
    return micros


for _function in (
    fail,
    fail_twice,
    fail_for_good,
    fail_unspeakably,
    hang,
    hang_in_thread,
    hang_and_complain,
    finish_late,
    not_json,
    large,
):
    app.graph(_function.__name__).node("it", _function)


@app.step(provider="openai", model="gpt-4o")
def talk(n: int) -> int:
    """Say which tokens were used, and not what they cost: the price table knows."""
    enter()
    report_usage(input_tokens=1000 * n, output_tokens=100)
    return n


app.graph("talk").node("it", talk)
app.graph("dear-twice").node("first", dear).node("second", dear, input="${ input }").edge("first", "second")


@app.step()
def length(value: Any) -> int:
    """Measure what it is given."""
    enter()
    return len(value)


app.graph("measure").node("it", length)
_wide = app.graph("wide").node("large", large)
for _number in range(40):
    _wide.node(f"part{_number}", length).edge("large", f"part{_number}")


# --- a little of everything, for crashes in the middle ---------------------------------------------------------------


@app.step(cost_micros=40)
async def dawdle(n: int) -> int:
    """Take a moment, and have an effect at the end of it."""
    enter()
    await asyncio.sleep(0.3)
    have_effect()
    return n


@app.step(cost_micros=10)
def gather(parts: dict[str, int]) -> int:
    """Add up what the branches came to."""
    enter()
    have_effect()
    return sum(parts.values())


_busy = app.graph("busy").node("first", one).node("slow", dawdle).node("shaky", fail_twice).node("last", gather)
_busy.chain("first", "slow", "last").chain("first", "shaky", "last")


# --- agents ---------------------------------------------------------------


@app.tool(cost_micros=5)
def look(n: int) -> int:
    """Look something up."""
    enter()
    return n


@app.agent(tools=[look], max_steps=6)
def confused(state: State) -> Plan:
    """Call tools that do not exist, with arguments that do not fit, under ids that repeat; then say what came of it."""
    enter()
    if state.turn == 1:
        calls = [
            ToolCall("look", {"n": 1}, id="same"),
            ToolCall("look", {"n": "many"}, id="same"),
            ToolCall("rm_rf", {}, id=""),
        ]
        return Plan(content="trying", tool_calls=calls, usage={"input_tokens": 12, "output_tokens": 3})
    return Plan(content="", final=True, output=[[call.ok, call.error] for call in state.history[0].calls])


order_tea = app.outside_tool("order_tea", cost_micros=40)


@app.flow(steps=[one, look, confused, order_tea], workflows=["chain"])
async def papers(n: int) -> dict[str, Any]:
    """Call something of every kind, and wait for somebody in between."""
    advice, found = await asyncio.gather(confused(n), look(n))  # type: ignore[call-overload]  # in a flow, calls are awaited
    await app.sleep(0.3)
    answer, more = await asyncio.gather(app.ask("how many?", schema={"type": "integer"}), app.workflow("chain", found))
    paid = await app.wait_event("paid", key=n, timeout_s=60)
    try:
        await app.wait_event("never", timeout_s=0.2)
    except CallFailedError as error:
        last = await one(answer)  # type: ignore[misc]
        tea = await order_tea(grams=last)
        return {"advice": advice, "more": more, "paid": paid, "tea": tea, "missing": error.node_id}
    return {}


class RateLimitError(Exception):
    """What a client of a model raises: its name and its fields are all that is known of it."""

    status_code = 429

    def __init__(self) -> None:
        super().__init__("slow down")
        self.response = SimpleNamespace(headers={"retry-after": "0.2"})


quote = app.outside_tool(
    "quote", parameters={"type": "object", "required": ["item"]}, output={"type": "integer"}, timeout_s=60
)


@app.agent(tools=[order_tea])
def buyer(state: State) -> Plan:
    """Have tea ordered outside, and say what came of it."""
    enter()
    if state.turn == 1:
        return Plan(tool_calls=[ToolCall("order_tea", {"grams": 100})])
    (call,) = state.observations()
    return Plan(output=[call.ok, call.output, call.error])


@app.agent(tools=[quote], retries=0, retry_rules=MODEL_RETRIES)
def throttled(state: State) -> Plan:
    """Be refused twice by the model in each turn; then have two quotes made outside, under one id."""
    enter()
    with model_errors():
        if context().attempt <= 2:
            raise RateLimitError
    if state.turn == 1:
        return Plan(tool_calls=[ToolCall("quote", {"item": item}, id="same") for item in ("tea", "milk")])
    return Plan(output=[call.output for call in state.observations()])
