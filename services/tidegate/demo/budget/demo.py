"""Three teams with three cents each ask for four: one is denied, one asks a human, one waits until somebody tops up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tidegate.audit.money import Books, audit
from tidegate.cli.documents import publish
from tidegate.demo.budget import app as budget_app
from tidegate.demo.budget.app import CALL_MICROS, CALLS
from tidegate.demo.by_hand import ByHand
from tidegate.demo.refund import DemoError, Say
from tidegate.domain import states
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.gate.kinds import Document, parse
from tidegate.sdk.client import Client, Event, Run

APP: Final = "tidegate.demo.budget.app:app"
LEDGER: Final = "gate-ledger"
ORG: Final = "acme"
ORG_MICROS: Final = 200_000
TEAM_MICROS: Final = 30_000
TIMEOUT_S: Final = 60.0
LOOK_S: Final = 0.1
QUEUE: Final = "default"


class _CancelledError(Exception):
    """Somebody cancelled the runs."""


class Team(NamedTuple):
    """An account below the org, what its budget does without room, how its run ends, and what it is to have spent then."""

    account: str
    on_exceed: str
    status: str
    calls: int


SALES: Final = Team("acme/sales", "deny", states.FAILED, CALLS - 1)
SUPPORT: Final = Team("acme/support", "ask", states.SUCCEEDED, CALLS)
OPS: Final = Team("acme/ops", "pause", states.SUCCEEDED, CALLS)
TEAMS: Final = (SALES, SUPPORT, OPS)


def make_stack(data_dir: Path, on_progress: Say) -> Stack:
    """Return the stack: a scheduler, a gate and one executor."""
    services = ("scheduler", "gate")
    return Stack(
        data_dir, pools=[ExecutorPool(APP, slots=4)], services=services, profile="quick", on_progress=on_progress
    )


def documents() -> list[Document]:
    """Return the budgets: one for the org, one for each team below it."""
    org = {"kind": "budget", "budget": "org", "version": "1", "account": ORG, "limits": {"money_micros": ORG_MICROS}}
    teams = [
        {
            "kind": "budget",
            "budget": budget_of(team),
            "version": "1",
            "account": team.account,
            "limits": {"money_micros": TEAM_MICROS},
            "on_exceed": team.on_exceed,
        }
        for team in TEAMS
    ]
    return [parse(document) for document in (org, *teams)]


def budget_of(team: Team) -> str:
    """Return the name of a team's budget."""
    return team.account.rpartition("/")[2]


class BudgetDemo:
    """One demonstration on a started stack. `say` gets every line for people as it happens."""

    def __init__(self, stack: Stack, say: Say, keys: Callable[[], str] = lambda: "") -> None:
        """keys: returns what was typed since it was last asked (see `ByHand`)."""
        self._stack = stack
        self._say = say
        self._broker = KafkaBroker(stack.settings)
        self._by_hand = ByHand(keys, QUEUE)

    def run(self) -> dict[str, Any]:
        """Run it and return the proof. Blocks for some seconds. Raises DemoError, EventLogError."""
        began_s = time.monotonic()
        publish(self._broker, documents())
        self._say(
            f"{ORG} may spend {cents(ORG_MICROS)}; each of {', '.join(t.account for t in TEAMS)} {cents(TEAM_MICROS)}"
        )
        with Client(self._stack.settings, by="demo") as client:
            client.publish(budget_app.app)
            runs = {team: client.start("work", 0, account=team.account) for team in TEAMS}
            self._say(f"each team starts a run of {CALLS} calls, {cents(CALL_MICROS)} each")
            with self._obeying(list(runs.values())):
                ended = self._play(client, runs)
        for team, run in ended.items():
            later = " and what was under way" if run.status == states.CANCELLED else ""
            self._say(f"{run.status.upper():<10}{team.account}: spent {cents(run.spent_micros)}{later}")
        return self._prove(ended, time.monotonic() - began_s)

    def _play(self, client: Client, runs: dict[Team, str]) -> dict[Team, Run]:
        """Let the teams run out of money; returns how their runs ended. Whoever cancels them ends the play."""
        with contextlib.suppress(_CancelledError):
            denied = self._seen(client, runs[SALES], lambda run: run.is_over)
            self._say(f"DENIED    {SALES.account}: {denied.reason}")
            asked = self._seen(client, runs[SUPPORT], lambda run: run.approvals)
            self._say(f"ASKED     {SUPPORT.account}: {asked.approvals[0].reason}")
            client.approve(runs[SUPPORT], reason="this once")
            self._say("APPROVED  by demo: this call may exceed the budget, no other")
            self._say(f"PAUSED    {OPS.account}: {self._pause_of(client, runs[OPS])}")
            self._top_up()
            return {team: self._seen(client, run_id, lambda run: run.is_over) for team, run_id in runs.items()}
        return {team: list(client.follow(run_id, TIMEOUT_S))[-1][0] for team, run_id in runs.items()}

    @contextlib.contextmanager
    def _obeying(self, run_ids: list[str]) -> Iterator[None]:
        """Do what keys say meanwhile, in a thread of its own: the demo itself waits for its runs."""
        is_over = threading.Event()

        def obey() -> None:
            with Client(self._stack.settings, by="demo") as client:
                while not is_over.wait(LOOK_S):
                    for line in self._by_hand.obey(client, run_ids):
                        self._say(line)

        thread = threading.Thread(target=obey, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _seen(self, client: Client, run_id: str, is_so: Callable[[Run], object]) -> Run:
        """Follow a run until it is so. Raises DemoError if it ends before that, or takes too long."""
        run: Run | None = None
        for run, _ in self._followed(client, run_id):
            if is_so(run):
                return run
        stands = "the log has nothing of it" if run is None else f"it is {run.status} {run.code} {run.reason}".rstrip()
        raise DemoError(f"run {run_id} did not get as far as it should within {TIMEOUT_S:.0f} s: {stands}")

    def _followed(self, client: Client, run_id: str) -> Iterator[tuple[Run, list[Event]]]:
        """Follow a run, for as long as the queue is paused if it is. Raises _CancelledError once the runs were cancelled."""
        while True:
            for found in client.follow(run_id, TIMEOUT_S):
                if self._by_hand.was_cancelled:
                    raise _CancelledError
                yield found
            if not self._by_hand.is_paused:
                return

    def _pause_of(self, client: Client, run_id: str) -> str:
        """Wait until a budget lets the run wait; returns why. Raises DemoError if that does not come."""
        for _, events in self._followed(client, run_id):
            for event in events:
                if event.type == "AttemptAwaitsBudget":
                    return str(event.data.reason)
        raise DemoError(f"no budget paused run {run_id} within {TIMEOUT_S:.0f} s")

    def _top_up(self) -> None:
        document = {
            "kind": "topup",
            "topup": "one-more-call",
            "budget": budget_of(OPS),
            "account": OPS.account,
            "at_ms": time.time_ns() // 1_000_000,
            "add": {"money_micros": CALL_MICROS},
            "reason": "the demo goes on",
        }
        publish(self._broker, [parse(document)])
        self._say(f"TOPPED UP {OPS.account} by {cents(CALL_MICROS)}: what waits goes on by itself")

    # -- the proof ----------------------------------------------------------------------

    def _prove(self, ended: dict[Team, Run], seconds: float) -> dict[str, Any]:
        books = self._books_at_rest()
        spent = {bucket.account: bucket.spent["micros"] for bucket in books.budgets.buckets.values()}
        wanted = {team.account: team.calls * CALL_MICROS for team in TEAMS}
        wanted[ORG] = sum(wanted.values())
        problems = [str(problem) for problem in (*books.problems, *books.problems_at_rest())]
        exceeded = {bucket.account: bucket.exceeded["micros"] for bucket in books.budgets.buckets.values()}
        proof = {
            "ended": {team.account: run.status for team, run in ended.items()},
            "spent_micros": dict(sorted(spent.items())),
            "exceeded_micros": {account: micros for account, micros in exceeded.items() if micros},
            "problems": problems,
            "seconds": round(seconds, 2),
        }
        is_played = (
            spent == wanted
            and proof["exceeded_micros"] == {SUPPORT.account: CALL_MICROS}
            and all(run.status == team.status for team, run in ended.items())
        )
        ok = not problems and (is_played or self._by_hand.was_cancelled)
        self._say("\nthe ledger's bytes, recomputed with nothing of the gate:")
        for account, micros in sorted(spent.items()):
            beyond = f", {cents(exceeded[account])} of it approved beyond its limit" if exceeded[account] else ""
            self._say(f"  {account:<14} {cents(micros):>12}{beyond}")
        for problem in problems:
            self._say(f"  WRONG: {problem}")
        return {"ok": ok, **proof}

    def _books_at_rest(self) -> Books:
        """Read the ledger until nothing is set aside any more: what a run tells when it is over takes a moment."""
        deadline_s = time.monotonic() + 10.0
        while True:
            count = self._broker.describe([LEDGER])[LEDGER].partition_count
            books = audit(self._broker.read(LEDGER, n, *self._broker.offsets(LEDGER, n)) for n in range(count))
            if not books.problems_at_rest() or time.monotonic() > deadline_s:
                return books
            time.sleep(LOOK_S)


def cents(micros: int) -> str:
    """Return an amount for people."""
    return f"{micros / 10_000:g} cent{'' if micros == 10_000 else 's'}"
