"""W8: one gate partition by itself, in this process, on the log in memory: what deciding costs without any broker.

Counted is all that a gate does with a request: decode, judge, reserve, place, encode the entry, fold it, encode its tells. Not
counted, because it is not there: Kafka, the network, a disk. Every request settles the attempt before and asks for the next
one, as a running chain does, so one decision here is one step's whole share of the gate.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from typing import Any, Final

import structlog

from tidegate import codec
from tidegate.bench.processes import Meter
from tidegate.domain import canonical
from tidegate.domain.entry import Position
from tidegate.domain.messages import Amounts, Authorise, Call, GateRequest, Instance, OpenRun, PolicyPublished, Settle
from tidegate.eventlog.interface import Record
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.owner import OwnerLoop
from tidegate.gate.placement import MAX_SLOTS, Executors
from tidegate.gate.service import GateMachine
from tidegate.process import spare_the_collector

RULES: Final = 200
RUNS: Final = 200
DECISIONS: Final = 20_000
WARM_UP: Final = 2_000
TOOLS: Final = 100
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


def _measured(count: int, documents: list[dict[str, Any]]) -> float:
    """Return the seconds of this process's processor that `count` decisions take, after a warm-up."""
    broker = MemoryBroker(clock_ms=lambda: time.time_ns() // 1_000_000)
    for name in TOPICS:
        broker.create_topic(name, 1)
    writer = broker.writer()
    for document in documents:
        kind = document.get("kind", "policy")
        row = PolicyPublished(
            policy_id=str(document[kind]), version="1", document=canonical.dumps(document), by="bench", at_ms=0
        )
        writer.send(Record("policies", 0, str(document[kind]).encode(), codec.encode(row)))
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
    writer.send(Record("instances", 0, b"executor-0", codec.encode(executor)))
    writer.flush(10.0)
    executors = Executors(10**9, lambda: 0, lambda: 0)
    loop = OwnerLoop(broker, GateMachine(1, 1, executors), "gate-0")
    loop.start()
    loop.run_once(0.0)
    for number, value in enumerate(_requests(count + WARM_UP)):
        writer.send(Record("gate-requests", 0, b"%d" % number, value))
    writer.flush(60.0)
    entries = 0
    while entries < WARM_UP:
        entries += loop.run_once(0.0)
    gc.collect()
    left = count + WARM_UP - entries
    began_s = time.process_time()
    entries = 0
    while entries < left:
        entries += loop.run_once(0.0)
    seconds = (time.process_time() - began_s) * count / left
    loop.close()
    return seconds


def _requests(count: int) -> list[bytes]:
    """Return requests of 200 chains in turn, each of which settles its last attempt and asks for the next."""
    found = []
    for number in range(count):
        chain, link = number % RUNS, number // RUNS
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
        step = Authorise(step_id=f"triage/{link}", attempt=1, call=call)
        before = Settle(
            step_id=f"triage/{link - 1}",
            attempt=1,
            actual_micros=80,
            used=Amounts(output_tokens=200, calls=1, wall_ms=500),
        )
        opened = OpenRun(budget_micros=None, workflow="triage@1", tags={"env": "bench"})
        request = GateRequest(
            run_id=f"run-{chain}",
            account=f"acme/team-{chain % 10}/app-{chain // 10 % 5}",
            source=Position(0, number + 1, 0),
            items=(before, step) if link else (opened, step),
        )
        found.append(codec.encode(request))
    return found
