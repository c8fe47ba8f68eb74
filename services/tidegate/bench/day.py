"""What is asked for on the dataset's day, by whom, and what goes wrong: pure functions of the seed and the number of a run.

So a day can be told again from anywhere in it, and a making that was cut short goes on where it was: the same requests under the
same ids change nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

Request = dict[str, Any]

RUN_BUDGET_MICROS: Final = 20_000
# Of so many runs so many are of a kind.
KINDS: Final[Mapping[str, int]] = {
    "mail": 8_100,
    "order": 900,
    "clerk": 300,
    "translator": 200,
    "report": 80,
    "contract": 80,
    "invoice": 80,
    "reminder": 60,
    "research": 120,
    "attachment": 50,
    "film": 2,
    "unknown": 18,
    "broken": 10,
}
ACCOUNTS: Final[Mapping[str, int]] = {
    "acme/support/mail": 300,
    "acme/support/chat": 150,
    "acme/sales/eu": 90,
    "acme/sales/us": 60,
    "globex/shop/web": 120,
    "globex/shop/app": 60,
    "globex/labs/proto": 20,
    "initech/desk/one": 80,
    "initech/desk/two": 40,
    "initech/interns/july": 10,
    "umbrella/research/lab": 20,
    "hooli/mail/in": 30,
    "hooli/mail/out": 10,
    "stark/parts/line": 10,
}
EXPERIMENTS, INTERNS, RESEARCHERS = "globex/labs", "initech/interns", "umbrella/research"
PEOPLE: Final = ("ann", "bob", "cem", "dora")
RELEASE_AT: Final = 0.5  # of the day: from here on orders are of version 2
OUTAGE: Final = (0.40, 0.45)  # of the day, in which the search provider answers nobody
TOPUP_AT: Final = 0.7
NIGHT_AT: Final = 0.985  # of the day: from here on nobody answers questions
LARGE_REFUND_CENTS: Final = 10_000
CANCELLED_SHARE: Final = 0.003
PAID_SHARE: Final = 0.9  # of invoices
APPROVED_SHARE: Final = 0.75
# What a run costs on average, in micro-dollars, and so where the budgets of those who shall feel theirs are set.
AVERAGE_MICROS: Final = 540

_KINDS: Final = (tuple(KINDS), tuple(KINDS.values()))
_ACCOUNTS: Final = (tuple(ACCOUNTS), tuple(ACCOUNTS.values()))


class Later(NamedTuple):
    """A further request about a run, when so many more runs have been asked for."""

    after_runs: int
    request: Request


class Wish(NamedTuple):
    """A run that is asked for. ends: whether it is over in seconds whatever people do; raw: what is sent instead of JSON."""

    run_id: str
    request: Request
    ends: bool
    later: tuple[Later, ...] = ()
    raw: bytes = b""


class Day(NamedTuple):
    """A day of so many runs."""

    seed: int
    runs: int

    def run_id(self, number: int) -> str:
        """Return the id of a run."""
        return f"day-{self.seed}-{number:06}"

    def wish(self, number: int) -> Wish:
        """Return the run that is asked for at this place of the day, which counts from 0."""
        rng = random.Random(f"wish/{self.seed}/{number}")  # noqa: S311 - a plan, not a secret
        run_id, at = self.run_id(number), number / self.runs
        kind = rng.choices(*_KINDS)[0]
        account = rng.choices(*_ACCOUNTS)[0]
        if kind == "broken":
            return Wish(run_id, {}, ends=False, raw=b'{"workflow": "mail", "run_id": "' + run_id.encode())
        given, later, ends = self._input(rng, kind, run_id, at)
        request = {
            "type": "start",
            "run_id": run_id,
            **_target(kind, at),
            "input": given,
            "account": account,
            "budget_micros": RUN_BUDGET_MICROS,
            "tags": {"team": account.split("/")[1], "channel": rng.choice(("web", "mail", "phone"))},
            "priority": rng.choices((5, 2, 8), (90, 7, 3))[0],
        }
        if rng.random() < CANCELLED_SHARE:
            cancel = {
                "type": "cancel",
                "run_id": run_id,
                "command_id": f"{run_id}-cancel",
                "by": "customer",
                "reason": "not now",
            }
            later = (*later, Later(rng.randint(0, 3), cancel))
        # Those whose account's budget lets them wait, or asks, depend on people.
        return Wish(run_id, request, ends and not account.startswith((EXPERIMENTS, RESEARCHERS)), later)

    def _input(self, rng: random.Random, kind: str, run_id: str, at: float) -> tuple[Request, tuple[Later, ...], bool]:
        """Return the input of a run, what follows, and whether it ends by itself."""
        given: Request = {"ms": min(2_000, round(rng.lognormvariate(3.4, 0.7))), "tokens": rng.randint(80, 900)}
        later: tuple[Later, ...] = ()
        ends = True
        if kind in ("mail", "reminder", "report", "unknown"):
            given["about"] = rng.choice(("order", "invoice", "complaint", "praise", "other"))
        if kind == "order":
            given |= {"stumbles": rng.choices((0, 1, 2, 4), (86, 7, 3, 4))[0], "heavy": rng.random() < 0.05}
            given["nobody"] = rng.random() < 0.03
        elif kind == "clerk":
            cents = rng.choice((900, 2_500, 4_900, 9_900, 12_500, 30_000))
            given |= {"order_id": run_id, "amount_cents": cents}
            ends = cents <= LARGE_REFUND_CENTS
        elif kind == "report":
            given["parts"] = [{"ms": given["ms"], "tokens": given["tokens"]} for _ in range(rng.randint(2, 6))]
        elif kind == "contract":
            given, ends = {"id": run_id}, False
        elif kind == "invoice":
            given = {"id": run_id}
            if rng.random() < PAID_SHARE:
                paid = {
                    "type": "signal",
                    "run_id": run_id,
                    "command_id": f"{run_id}-paid",
                    "event": "paid",
                    "key": run_id,
                }
                later = (Later(rng.randint(1, 300), paid | {"payload": {"cents": rng.randint(100, 99_999)}}),)
        elif kind == "reminder":
            given["seconds"] = rng.randint(1, 15)
        elif kind == "research":
            given["stumbles"] = 9 if OUTAGE[0] <= at < OUTAGE[1] else rng.choices((0, 1), (95, 5))[0]
        elif kind == "attachment":
            given["huge"] = rng.random() < 0.2
        elif kind in ("film", "unknown"):
            ends = False
        return given, later, ends

    def answer(self, run_id: str, step_id: str, is_approval: bool) -> Request | None:
        """Return how a person answers what a run, or a child of one, asks; None if it is night by then."""
        number = int(run_id.partition(".")[0].rpartition("-")[2])
        if number >= NIGHT_AT * self.runs:
            return None
        rng = random.Random(f"answer/{self.seed}/{run_id}/{step_id}")  # noqa: S311 - a plan, not a secret
        approves = rng.random() < APPROVED_SHARE
        request: Request = {"run_id": run_id, "step_id": step_id, "by": rng.choice(PEOPLE), "reason": "looked at"}
        if not is_approval:
            return {"type": "respond", "value": "yes" if approves else "no", **request}
        return {"type": "approve" if approves else "reject", **request}

    def documents(self) -> str:
        """Return the policies, budgets and limits that are in force, as a file for `tidegate policy apply`."""
        return DOCUMENTS.format(
            experiments=self._share_micros("globex/labs/proto", 0.5),
            interns=self._share_micros("initech/interns/july", 0.8),
            researchers=self._share_micros("umbrella/research/lab", 0.9),
        )

    def topup(self, at_ms: int) -> dict[str, Any]:
        """Return the document that somebody publishes for those who ran out of money."""
        return {
            "kind": "topup",
            "topup": "launch-day",
            "budget": "experiments",
            "account": EXPERIMENTS,
            "at_ms": at_ms,
            "add": {"money_micros": self._share_micros("globex/labs/proto", 0.45)},
            "by": "ann",
            "reason": "launch day",
        }

    def _share_micros(self, account: str, part: float) -> int:
        """Return a part of what the account's runs cost in a day, about."""
        return max(1_000, round(self.runs * ACCOUNTS[account] / sum(ACCOUNTS.values()) * AVERAGE_MICROS * part))


def _target(kind: str, at: float) -> Request:
    if kind in ("clerk", "translator"):
        return {"agent": kind}
    if kind == "order":
        return {"workflow": "order@1" if at < RELEASE_AT else "order@2"}
    return {"workflow": {"unknown": "male"}.get(kind, kind)}


DOCUMENTS: Final = """\
policy: house-rules
version: "3"
rules:
  - name: interns-refund-nothing
    when: tool == "issue_refund" && account.startsWith("initech/interns")
    then: deny
    reason: interns do not refund
  - name: large-refunds
    when: tool == "issue_refund" && args.amount_cents > 10000
    then: require_approval
    reason: refunds above 100 dollars need a human
---
kind: budget
budget: teams
version: "1"
account: "*/*"
window: day
limits: {{money_micros: 500000000}}
---
kind: budget
budget: experiments
version: "1"
account: globex/labs
window: total
limits: {{money_micros: {experiments}}}
on_exceed: pause
---
kind: budget
budget: interns
version: "1"
account: initech/interns
window: total
limits: {{money_micros: {interns}}}
on_exceed: deny
---
kind: budget
budget: researchers
version: "1"
account: umbrella/research
window: total
limits: {{money_micros: {researchers}}}
on_exceed: ask
---
kind: limit
limit: openai-calls
version: "1"
where: {{provider: openai}}
per: [model]
at_once: 60
---
kind: limit
limit: reports-of-a-team
version: "1"
where: {{name: summarise}}
per: [account]
account_level: 2
at_once: 2
---
kind: limit
limit: web-search
version: "1"
where: {{provider: websearch}}
per: [provider]
at_once: 10
breaker: {{failures: 5, window_s: 30, open_s: 1, probes: 1, while_open: wait}}
"""
