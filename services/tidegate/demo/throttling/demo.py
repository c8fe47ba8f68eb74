"""Starts everything, publishes one limit, asks for many runs at once, and shows that the limit held and was shared fairly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tidegate.audit.limits import Bound, LimitBooks, audit_limits
from tidegate.cli.documents import publish
from tidegate.demo.by_hand import ByHand
from tidegate.demo.chaos.observer import Observer
from tidegate.demo.refund import DemoError
from tidegate.demo.throttling import app as throttling_app
from tidegate.demo.throttling.app import PROVIDER, Call, calls, most_at_once
from tidegate.domain import states
from tidegate.domain.run import RunState
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.interface import Message
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.gate.kinds import parse
from tidegate.sdk.client import Client

APP: Final = "tidegate.demo.throttling.app:app"
LIMIT: Final = "provider-calls"
AT_ONCE: Final = 5
QUEUE: Final = "default"
LEDGER: Final = "gate-ledger"
# Of a hundred runs. The one with the most asks first, so first come first served would make the others wait behind it.
SHARES: Final = {"north/web": 55, "south/app": 25, "east/ops": 15, "west/lab": 5}
TIMEOUT_S: Final = 120.0
LOOK_S: Final = 0.1
LINES_SHOWN: Final = 8


@dataclass(slots=True)
class Standing:
    """How the runs of an account stand."""

    runs: int
    over: int = 0
    running: int = 0
    throttled: int = 0


@dataclass(slots=True)
class Picture:
    """What people see at one moment. `said`: new lines."""

    accounts: dict[str, Standing] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def running(self) -> int:
        """Return how many hold the limit, by the log."""
        return sum(standing.running for standing in self.accounts.values())


Show = Callable[[Picture], None]


def make_stack(data_dir: Path, on_progress: Callable[[str], None]) -> Stack:
    """Return the stack: two executors with far more slots than the limit allows, and two gates that share the accounts."""
    pool = ExecutorPool(APP, slots=20, count=2)
    services = ("scheduler", "gate")
    return Stack(
        data_dir, pools=[pool], services=services, instances={"gate": 2}, profile="quick", on_progress=on_progress
    )


def wanted(runs: int) -> list[tuple[str, str]]:
    """Return (run id, account) of all runs, in the order in which they are asked for: account by account."""
    found = []
    for account, percent in SHARES.items():
        count = max(1, round(runs * percent / 100))
        found += [(f"{account.replace('/', '-')}-{number:03d}", account) for number in range(count)]
    return found


class ThrottlingDemo:
    """One demonstration on a started stack."""

    def __init__(self, stack: Stack, runs: int, show: Show, keys: Callable[[], str] = lambda: "") -> None:
        """keys: returns what was typed since it was last asked (see `ByHand`)."""
        self._by_hand = ByHand(keys, QUEUE)
        self._stack = stack
        self._wanted = wanted(runs)
        self._show = show
        self._broker = KafkaBroker(stack.settings)
        self._told: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Run it and return the summary. Blocks for some seconds. Raises DemoError, EventLogError."""
        self._publish_limit()
        observer = Observer(self._broker)
        began_s = time.monotonic()
        try:
            with Client(self._stack.settings, by="demo") as client:
                client.publish(throttling_app.app)
                for number, (run_id, account) in enumerate(self._wanted):
                    client.start("question", number, run_id=run_id, account=account)
                self._watch(observer, client)
        finally:
            observer.close()
        return self._summary(observer, time.monotonic() - began_s)

    def _publish_limit(self) -> None:
        limit = {"kind": "limit", "limit": LIMIT, "version": "1", "per": ["provider"], "at_once": AT_ONCE}
        publish(self._broker, [parse(limit)])

    def _watch(self, observer: Observer, client: Client) -> None:
        """Show how things stand until all runs are over. Raises DemoError."""
        run_ids = [run_id for run_id, _ in self._wanted]
        deadline_s = time.monotonic() + TIMEOUT_S
        said: list[str] = []
        while True:
            picture = observer.look(self._picture)
            picture.said += said
            self._show(picture)
            left = observer.unfinished(run_ids)
            if not left:
                return
            said = self._by_hand.obey(client, left)
            if said or self._by_hand.is_paused:
                deadline_s = time.monotonic() + TIMEOUT_S
            if observer.failure or time.monotonic() > deadline_s:
                raise DemoError(
                    observer.failure or f"{len(left)} runs did not end within {TIMEOUT_S:.0f} s: {left[:5]}"
                )
            time.sleep(LOOK_S)

    def _picture(self, runs: dict[str, RunState]) -> Picture:
        picture = Picture({account: Standing(0) for account in SHARES})
        for run_id, account in self._wanted:
            standing = picture.accounts[account]
            standing.runs += 1
            run = runs.get(run_id)
            if run is None:
                continue
            steps = list(run.steps.values())
            standing.over += run.is_over
            standing.running += any(step.status == states.DISPATCHED for step in steps)
            waits_for = next((step.waits_for for step in steps if step.waits_for), "")
            standing.throttled += bool(waits_for)
            if waits_for and run_id not in self._told:
                self._told.add(run_id)
                if len(self._told) <= LINES_SHOWN:
                    picture.said.append(f"THROTTLED  {run_id:<16} {account:<10} {waits_for}")
        return picture

    # -- what came of it -------------------------------------------------------------------

    def _summary(self, observer: Observer, seconds: float) -> dict[str, Any]:
        books = self._audited()
        made = calls(self._stack.data_dir)
        accounts = dict(self._wanted)
        lease = books.leases.get((LIMIT, PROVIDER))
        ended = observer.statuses()
        smallest = min(SHARES, key=lambda account: SHARES[account])
        turns = [number for number, call in enumerate(made, 1) if accounts[call.run_id] == smallest]
        problems = [str(problem) for problem in (*books.problems, *books.problems_at_rest())]
        summary: dict[str, Any] = {
            "runs": len(self._wanted),
            "ended": dict(ended),
            "limit": AT_ONCE,
            "most_held": 0 if lease is None else lease.peak,
            "most_at_once": most_at_once(made),
            "calls": len(made),
            "throttled": len({call.run_id for call in made} & self._told) or books.throttled,
            "problems": problems,
            "done_after": turns[-1] if turns else 0,
            "halfway": shares_halfway(made, accounts),
            "seconds": round(seconds, 2),
        }
        is_kept = not problems and summary["most_held"] <= AT_ONCE and summary["most_at_once"] <= AT_ONCE
        # By turns, the account that asked last and for least is through long before the one that asked for most.
        is_shared = books.throttled > 0 and 0 < summary["done_after"] <= len(made) * 0.75
        is_done = ended == {states.SUCCEEDED: len(self._wanted)} and len(made) == len(self._wanted)
        return {"ok": is_kept and (self._by_hand.was_cancelled or (is_done and is_shared)), **summary}

    def _audited(self) -> LimitBooks:
        """Read the ledger until nobody holds anything any more: what a run tells when it is over takes a moment."""
        deadline_s = time.monotonic() + 10.0
        while True:
            count = self._broker.describe([LEDGER])[LEDGER].partition_count
            books = audit_limits((self._messages(number) for number in range(count)), {LIMIT: Bound(at_once=AT_ONCE)})
            if not books.problems_at_rest() or time.monotonic() > deadline_s:
                return books
            time.sleep(LOOK_S)

    def _messages(self, partition: int) -> Iterator[Message]:
        start, end = self._broker.offsets(LEDGER, partition)
        yield from self._broker.read(LEDGER, partition, start, end)


def shares_halfway(made: list[Call], accounts: dict[str, str]) -> dict[str, int]:
    """Return how many of the first half of all calls were of which account."""
    return dict(Counter(accounts[call.run_id] for call in made[: len(made) // 2]))
