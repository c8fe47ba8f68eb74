"""What the throttling demo shows while it goes on: a bar for each account in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from tidegate.demo.throttling.demo import AT_ONCE, SHARES, Picture

LINE_EVERY_S: Final = 1.0


class ThrottlingScreen:
    """A context in which lines are said above one bar for the provider and one for each account."""

    def __init__(self, *, to_stderr: bool) -> None:
        self._console = Console(stderr=to_stderr, soft_wrap=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._provider = self._progress.add_task("provider", total=AT_ONCE, state="")
        self._tasks: dict[str, TaskID] = {
            account: self._progress.add_task(account, total=1, state="") for account in SHARES
        }
        self._said_s = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bars away. Idempotent."""
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(escape(line))

    def show(self, picture: Picture) -> None:
        """Show how things stand; without a terminal every second."""
        for line in picture.said:
            self.say(line)
        self._progress.update(self._provider, completed=picture.running, state="calls under way")
        for account, standing in picture.accounts.items():
            state = f"{standing.running} running, {standing.throttled} throttled"
            self._progress.update(self._tasks[account], total=standing.runs, completed=standing.over, state=state)
        if not self._console.is_terminal and time.monotonic() - self._said_s >= LINE_EVERY_S:
            self._said_s = time.monotonic()
            each = ", ".join(f"{account} {s.over}/{s.runs}" for account, s in picture.accounts.items())
            self.say(f"{picture.running} of {AT_ONCE} calls under way; over: {each}")

    def summarise(self, summary: dict[str, Any]) -> None:
        """Print what came of it, each line with where it comes from."""
        self.close()
        ended = ", ".join(f"{count} {status}" for status, count in sorted(summary["ended"].items()))
        self.say(
            f"\n{summary['runs']} runs ({ended}) in {summary['seconds']:.1f} s, {summary['throttled']} of them throttled"
        )
        self.say(f"  the limit                    {summary['limit']} at once")
        self.say(f"  most that held it            {summary['most_held']}   (recomputed from the ledger's bytes)")
        self.say(
            f"  most calls under way         {summary['most_at_once']}   (measured by the step itself, in both executors)"
        )
        halfway = ", ".join(f"{account} {count}" for account, count in sorted(summary["halfway"].items()))
        self.say(f"  the first half of the calls  {halfway}")
        self.say(f"  the account that asked last was through after {summary['done_after']} of {summary['calls']} calls")
        for problem in summary["problems"][:10]:
            self.say(f"  PROBLEM: {problem}")
        self.say("Never exceeded, and everybody had a turn." if summary["ok"] else "It does NOT hold.")
