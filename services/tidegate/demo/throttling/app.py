"""The throttling demo's app: one step that calls a slow provider, and notes by itself when it came and went."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from tidegate import App, context

app = App("throttling")

PROVIDER: Final = "slow-models"
CALL_S: Final = float(os.environ.get("TIDEGATE_DEMO_CALL_S", "0.2"))
NOTES: Final = "calls"


class Call(NamedTuple):
    """A call as the provider saw it, on a clock that all processes of the machine share."""

    began_ns: int
    ended_ns: int
    run_id: str


def _note(text: str) -> None:
    """Append a line to this process's own file: one write, so that lines of several functions do not mix."""
    folder = Path(os.environ.get("TIDEGATE_DATA_DIR", ".")) / NOTES
    folder.mkdir(exist_ok=True)
    with (folder / f"{os.getpid()}.txt").open("ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


@app.step(provider=PROVIDER, model="slow-1", operation="chat")
async def ask(number: int) -> int:
    """Ask the provider something."""
    began_ns = time.monotonic_ns()
    await asyncio.sleep(CALL_S)
    _note(f"{began_ns} {time.monotonic_ns()} {context().run_id}")
    return number


app.graph("question").node("ask", ask)


def calls(data_dir: Path) -> list[Call]:
    """Return all calls that were made, by their beginning."""
    found = []
    for path in (data_dir / NOTES).glob("*.txt"):
        for line in path.read_text().splitlines():
            began, ended, run_id = line.split(" ")
            found.append(Call(int(began), int(ended), run_id))
    return sorted(found)


def most_at_once(made: Iterable[Call]) -> int:
    """Return the most calls that were under way at one instant."""
    edges = sorted(
        edge for call in made for edge in ((call.began_ns, 1), (call.ended_ns, -1))
    )  # at equal times, ends count first
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most
