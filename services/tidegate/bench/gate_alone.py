"""W8 and GM: one gate partition by itself, in this process, on the log in memory: what deciding costs and keeps without a broker.

Counted is all that a gate does with a request: decode, judge, reserve, place, encode the entry, fold it, encode its tells. Not
counted, because it is not there: Kafka, the network, a disk. Every request settles the attempt before and asks for the next
one, as a running chain does, so one decision here is one step's whole share of the gate.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import structlog

from tidegate import codec
from tidegate.bench.processes import Meter
from tidegate.domain import canonical
from tidegate.domain.entry import Position
from tidegate.domain.messages import (
    Amounts,
    Authorise,
    Call,
    CloseRun,
    GateItem,
    GateRequest,
    Instance,
    OpenRun,
    PolicyPublished,
    Settle,
)
from tidegate.eventlog.interface import Record
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.owner import OwnerLoop
from tidegate.gate import snapshots
from tidegate.gate.placement import MAX_SLOTS, Executors
from tidegate.gate.service import GateMachine
from tidegate.process import spare_the_collector

RULES: Final = 200
RUNS: Final = 200
DECISIONS: Final = 20_000
WARM_UP: Final = 2_000
TOOLS: Final = 100
MEMORY_RUNS: Final = 100_000
MEMORY_PORTIONS: Final = 100
STEPS_OF_RUN: Final = 10
TOPICS: Final = (
    "gate-requests",
    "gate-ledger",
    "gate-snapshots",
    "gate-decisions",
    "step-tasks.default",
    "instances",
    "policies",
    "controls",
    "gate-leases",
)


def w8_decisions(decisions: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figure: decisions a second with 200 rules, 3 budgets and 3 limits that match, and with no document at all."""
    count = decisions or DECISIONS
    load = os.getloadavg()[0]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    spare_the_collector()
    with Meter(lambda: {"bench": os.getpid()}) as meter:
        say(f"W8: {count:,} decisions of a gate alone, with {RULES} rules, 3 budgets and 3 limits")
        governed = _measured(count, _documents())
        say(f"W8: {count:,} decisions of a gate alone, with no document")
        plain = _measured(count, [])
    return {
        "work": "W8",
        "load_before": round(load, 2),
        "decisions": count,
        "rules": RULES,
        "budgets": 3,
        "limits": 3,
        "decisions_per_s": round(count / governed),
        "us_per_decision": round(governed / count * 1e6, 1),
        "plain_us_per_decision": round(plain / count * 1e6, 1),
        "processes": {name: cost._asdict() for name, cost in meter.costs().items()},
    }


def _documents() -> list[dict[str, Any]]:
    """Return rules of three forms, three budgets and three limits.

    Half of the rules name a tool, a quarter two, a quarter the accounts below a path. Two to four can match a decision, one of
    which sees that it does not only by the arguments.
    """
    much = {"money_micros": 10**12, "calls": 10**9, "output_tokens": 10**12}
    budgets: list[dict[str, Any]] = [
        {"budget": "org", "account": "*", "window": "month"},
        {"budget": "team", "account": "*/*", "window": "day", "alerts": [80, 100]},
        {"budget": "each", "account": "*", "window": "run"},
    ]
    limits: list[dict[str, Any]] = [
        {"limit": "root", "per": ["account"], "account_level": 1, "at_once": 100_000},
        {"limit": "provider", "where": {"provider": ["openai", "anthropic"]}, "per": ["provider"], "at_once": 100_000},
        {"limit": "model", "when": 'kind == "tool"', "per": ["model"], "rate_per_s": 100_000, "burst": 100_000},
    ]
    return [
        {"policy": "bench", "version": "1", "rules": [_rule(number) for number in range(RULES)]},
        *({"kind": "budget", "version": "1", "limits": much, **budget} for budget in budgets),
        *({"kind": "limit", "version": "1", **limit} for limit in limits),
    ]


def _rule(number: int) -> dict[str, Any]:
    tool = number % TOOLS
    if number < RULES // 2:
        when, then = f'tool == "t{tool}" && args.amount > 1000', "deny"
    elif number < RULES * 3 // 4:
        when, then = f'tool in ["t{tool}", "t{(tool + 1) % TOOLS}"] && args.amount < 1000', "allow"
    else:
        path = f"acme/team-{number % 10}/app-{number // 10 % 5}"
        when, then = f'account.startsWith("{path}") && kind == "tool"', "allow"
    return {"name": f"r{number}", "when": when, "then": then}


class _Alone:
    """One partition of a gate with documents in force and one executor, on a log in memory."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        self.broker = MemoryBroker(clock_ms=lambda: time.time_ns() // 1_000_000)
        for name in TOPICS:
            self.broker.create_topic(name, 1)
        self._writer = self.broker.writer()
        for document in documents:
            kind = document.get("kind", "policy")
            row = PolicyPublished(
                policy_id=str(document[kind]), version="1", document=canonical.dumps(document), by="bench", at_ms=0
            )
            self._writer.send(Record("policies", 0, str(document[kind]).encode(), codec.encode(row)))
        executor = Instance(
            instance_id="executor-0",
            service="executor",
            incarnation=-1,
            state="ready",
            host="h",
            boot_id="b",
            pid=1,
            pid_started=0.0,
            started_ms=0,
            at_ms=time.time_ns() // 1_000_000,
            queue="default",
            slots=MAX_SLOTS,
            functions=tuple(f"tool:t{number}" for number in range(TOOLS)),
        )
        self._writer.send(Record("instances", 0, b"executor-0", codec.encode(executor)))
        self._writer.flush(10.0)
        self.loop = OwnerLoop(self.broker, GateMachine(1, 1, Executors(10**9, lambda: 0, lambda: 0)), "gate-0")
        self.loop.start()
        self.loop.run_once(0.0)

    def ask(self, requests: Iterable[GateRequest]) -> int:
        """Write requests; returns how many."""
        asked = 0
        for request in requests:
            key = b"%d" % request.source.offset
            self._writer.send(Record("gate-requests", 0, key, codec.encode(request)))
            asked += 1
        self._writer.flush(60.0)
        return asked

    def work(self, least: int) -> int:
        """Decide on at least so many requests, a turn's worth at a time; returns how many it were."""
        before = self._decided()
        while self._decided() - before < least:
            self.loop.run_once(0.0)
        return self._decided() - before

    def _decided(self) -> int:
        return self.loop.owned[0].inputs["gate-requests"]

    def forget(self) -> None:
        """Let go of what the logs hold that was read: a real broker has it on its disk."""
        for name in TOPICS:
            self.broker.delete_before(name, 0, self.broker.offsets(name, 0).end)


def _measured(count: int, documents: list[dict[str, Any]]) -> float:
    """Return the seconds of this process's processor that `count` decisions take, after a warm-up."""
    alone = _Alone(documents)
    left = alone.ask(_requests(count + WARM_UP)) - alone.work(WARM_UP)
    gc.collect()
    began_s = time.process_time()
    alone.work(left)
    seconds = (time.process_time() - began_s) * count / left
    alone.loop.close()
    return seconds


def gate_memory(runs: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figure: what the process holds while reservations are settled, a hundred portions of them, with all documents.

    Every run has `STEPS_OF_RUN` steps and ends, and has a bucket of its own.
    """
    count = runs or MEMORY_RUNS
    load = os.getloadavg()[0]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    spare_the_collector()
    resident: list[float] = []
    with Meter(lambda: {"bench": os.getpid()}) as meter:
        alone = _Alone(_documents())
        portion = max(1, count // MEMORY_PORTIONS)
        for first in range(0, count, portion):
            runs_now = range(first, min(count, first + portion))
            alone.work(alone.ask(_requests_of_runs(runs_now)))
            alone.forget()
            resident.append(meter.resident_mib()["bench"])
            if len(resident) % 10 == 0:
                say(f"GM: {runs_now.stop * STEPS_OF_RUN:,} of {count * STEPS_OF_RUN:,} settled, {resident[-1]} MiB")
        state = alone.loop.owned[0].state
        units = len(snapshots.units_of(state))
        alone.loop.close()
    return {
        "work": "GM",
        "load_before": round(load, 2),
        "settled": count * STEPS_OF_RUN,
        "units_left": units,
        "resident_mib": resident,
        "growth_mib": round(resident[-1] - resident[len(resident) // 2], 1),
        "processes": {name: cost._asdict() for name, cost in meter.costs().items()},
    }


def _requests(count: int) -> Iterator[GateRequest]:
    """Yield requests of 200 chains in turn, each of which settles its last attempt and asks for the next."""
    for number in range(count):
        chain, link = number % RUNS, number // RUNS
        items = (_settle(link - 1) if link else _opened(), _step(link, number))
        yield _request(chain, number, items)


def _requests_of_runs(runs: range) -> Iterator[GateRequest]:
    """Yield all requests of runs, one run after the other: each settles an attempt and asks for the next, the last one closes."""
    for run in runs:
        number = run * (STEPS_OF_RUN + 1)
        yield _request(run, number, (_opened(), _step(0, number)))
        for link in range(1, STEPS_OF_RUN):
            yield _request(run, number + link, (_settle(link - 1), _step(link, number + link)))
        yield _request(run, number + STEPS_OF_RUN, (_settle(STEPS_OF_RUN - 1), CloseRun()))


def _request(run: int, number: int, items: tuple[GateItem, ...]) -> GateRequest:
    account = f"acme/team-{run % 10}/app-{run // 10 % 5}"
    return GateRequest(run_id=f"run-{run}", account=account, source=Position(0, number + 1, 0), items=items)


def _opened() -> OpenRun:
    return OpenRun(budget_micros=None, workflow="triage@1", tags={"env": "bench"})


def _settle(link: int) -> Settle:
    used = Amounts(output_tokens=200, calls=1, wall_ms=500)
    return Settle(step_id=f"triage/{link}", attempt=1, actual_micros=80, used=used)


def _step(link: int, number: int) -> Authorise:
    call = Call(
        kind="tool",
        function=f"t{number % TOOLS}",
        queue="default",
        arguments=f'{{"amount":100,"order_id":"order-{number}"}}',
        timeout_ms=30_000,
        reserve_micros=100,
        idempotent=True,
        agent="triage",
        provider="openai",
        model="gpt-4o",
        max_output_tokens=500,
    )
    return Authorise(step_id=f"triage/{link}", attempt=1, call=call)
