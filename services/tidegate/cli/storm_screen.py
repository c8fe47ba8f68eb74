"""What a storm shows while it goes on: a bar and the blows in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tidegate.demo.chaos.demo import Screen

LINE_EVERY_S: Final = 5.0
MAX_BREACHES_SHOWN: Final = 10


class StormScreen:
    """A context in which lines are said above a bar of runs. Thread-safe as far as rich is."""

    def __init__(self, runs: int, *, to_stderr: bool) -> None:
        self._console = Console(stderr=to_stderr, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("runs over"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[states]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._runs = runs
        self._task = self._progress.add_task("runs", total=runs, states="")
        self._said_s = time.monotonic()
        self.screen = Screen(self.say, self.show)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(escape(line))

    def show(self, over: int, statuses: Counter[str]) -> None:
        """Show how many runs are over, and how many are in which state; without a terminal every few seconds."""
        states = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
        self._progress.update(self._task, completed=over, states=states)
        if not self._console.is_terminal and time.monotonic() - self._said_s >= LINE_EVERY_S:
            self._said_s = time.monotonic()
            self.say(f"          {over} of {self._runs} runs over: {states}")

    def summarise(self, summary: dict[str, Any]) -> None:
        """Print what was done to everybody, and what came of it."""
        self.close()
        self.say("\nWhat was done:")
        for what, services in summary["done"].items():
            each = ", ".join(f"{service} {count}" for service, count in services.items())
            self.say(f"  {what:<32} {sum(services.values()):>4}   {each}")
        self.say(
            f"  {'processes started again':<32} {summary['restarts']:>4}\n"
            f"  {'attempts':<32} {summary['attempts']:>4}   {summary['attempts_lost']} lost, "
            f"{summary['attempts_failed']} failed, {summary['late_results']} results came too late"
        )
        self.say("\nWhat came of it:")
        for check, breaches in summary["breaches"].items():
            self._console.print(f"  {check:<32} {len(breaches):>4}", style="red" if breaches else "green")
            for breach in breaches[:MAX_BREACHES_SHOWN]:
                self.say(f"    {breach}")
            if len(breaches) > MAX_BREACHES_SHOWN:
                self.say(f"    … and {len(breaches) - MAX_BREACHES_SHOWN} more; --json names all")
        ended = ", ".join(f"{count} {status}" for status, count in sorted(summary["ended"].items()))
        self.say(
            f"\n{summary['runs']} runs ({ended}), {summary['payments']} payments, {summary['events']:,} events, "
            f"{summary['void_entries']} void entries, {summary['settled_micros']:,} micro-dollars, "
            f"{summary['seconds']:.0f} s, seed {summary['seed']}"
        )
        self.say("Nothing was lost and nothing came twice." if summary["ok"] else "It does NOT hold.")
