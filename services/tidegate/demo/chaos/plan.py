"""Who is hit when, and what customers want: pure functions of the seed, so that a storm can be repeated.

What a storm meets when it hits is not: that depends on the machine. A seed repeats the blows, not their consequences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

KAFKA: Final = "kafka"
KILL, STOP, FREEZE = "kill -9", "SIGTERM", "SIGSTOP"

SHORT_FREEZE_S: Final = (0.3, 3.0)
# Longer than the lease of executors and the session of owners (6 s each here): others take over, and zombies wake.
LONG_FREEZE_S: Final = (7.5, 10.0)
KAFKA_AWAY_S: Final = (0.0, 3.0)
KAFKA_START_S: Final = 6.0  # the next blow to it comes after that at the earliest
FIRST_BLOW_S: Final = 2.0
# Of the blows that are left when everybody had theirs.
WEIGHTS: Final = {KILL: 5, STOP: 2, FREEZE: 3}
LONG_SHARE: Final = 0.4


class Blow(NamedTuple):
    """What happens to a process, so many seconds after the storm began. hold_s: how long it stays frozen, or away."""

    at_s: float
    kind: str
    target: str
    hold_s: float = 0.0

    @property
    def is_long(self) -> bool:
        """Tell whether it is a freeze that outlasts leases and sessions."""
        return self.kind == FREEZE and self.hold_s >= LONG_FREEZE_S[0]


class Wish(NamedTuple):
    """A request, so many seconds after the storm began."""

    at_s: float
    request: dict[str, Any]


class Question(NamedTuple):
    """What a run asks a human."""

    run_id: str
    step_id: str
    attempt: int
    why: str


def service_of(process: str) -> str:
    """Return the service of a process: `executor-default-0` is an `executor`."""
    return process.partition("-")[0]


def blows(seed: int, seconds: float, count: int, processes: Sequence[str]) -> tuple[Blow, ...]:
    """Return the blows of a storm in order of time, at least `count` if that is enough for everybody's share.

    Every process is killed and restarted at least once, every service is frozen for long, and Kafka is killed: once, and
    once more for each further minute. No process is hit while it is frozen or away.
    """
    rng = random.Random(f"blows/{seed}")  # noqa: S311 - a plan, not a secret
    deck = [(kind, process) for process in processes for kind in (KILL, STOP)]
    services = sorted({service_of(process) for process in processes})
    held = [(FREEZE, rng.choice([p for p in processes if service_of(p) == service])) for service in services]
    kafka_kills = 1 + int(seconds // 60)
    rest = max(0, count - len(deck) - len(held) - kafka_kills)
    deck += [(rng.choices(*zip(*WEIGHTS.items(), strict=True))[0], rng.choice(processes)) for _ in range(rest)]
    planned = [(FREEZE, process, rng.uniform(*LONG_FREEZE_S)) for _, process in held]
    planned += [(KILL, KAFKA, rng.uniform(*KAFKA_AWAY_S)) for _ in range(kafka_kills)]
    planned += [(kind, target, _hold_s(rng, kind)) for kind, target in deck]
    taken: dict[str, list[tuple[float, float]]] = {}
    return tuple(sorted(_timed(rng, seconds, taken, *one) for one in planned))


def _hold_s(rng: random.Random, kind: str) -> float:
    if kind != FREEZE:
        return 0.0
    return rng.uniform(*(LONG_FREEZE_S if rng.random() < LONG_SHARE else SHORT_FREEZE_S))


def _timed(
    rng: random.Random,
    seconds: float,
    taken: dict[str, list[tuple[float, float]]],
    kind: str,
    target: str,
    hold_s: float,
) -> Blow:
    """Give a blow its time: one at which its target stands, if a hundred tries find one."""
    needs_s = hold_s + (KAFKA_START_S if target == KAFKA else 0.0)
    latest_s = max(FIRST_BLOW_S, seconds - needs_s)
    for _ in range(100):
        at_s = rng.uniform(FIRST_BLOW_S, latest_s)
        if all(at_s > end or at_s + needs_s < begin for begin, end in taken.get(target, [])):
            break
    taken.setdefault(target, []).append((at_s, at_s + needs_s))
    return Blow(round(at_s, 2), kind, target, round(hold_s, 2))


# --- customers ---------------------------------------------------------------

ACCOUNTS: Final = 16
BUDGET_MICROS: Final = 100_000
DOUBLED_SHARE: Final = 0.1  # of requests that are sent twice
CANCELLED_SHARE: Final = 0.05
REJECTED_SHARE: Final = 0.15  # of questions
ORDERING_SHARE: Final = 0.8  # of the storm, during which orders come
BURST: Final = 10  # orders that come at once: who is frozen then has much to do when it wakes


def run_ids(count: int) -> list[str]:
    """Return the names of the runs."""
    return [f"order-{number:03}" for number in range(count)]


def wishes(seed: int, count: int, seconds: float) -> list[Wish]:
    """Return everything that customers ask for, in order of time: orders, some of them twice, and second thoughts."""
    rng = random.Random(f"wishes/{seed}")  # noqa: S311 - a plan, not a secret
    found = []
    for number, run_id in enumerate(run_ids(count)):
        at_s = seconds * ORDERING_SHARE * (number - number % BURST) / count
        start = _start(rng, number, run_id)
        found.append(Wish(at_s, start))
        if rng.random() < DOUBLED_SHARE:
            found.append(Wish(at_s + rng.uniform(0.0, 5.0), start))
        if rng.random() < CANCELLED_SHARE:
            cancel = {"type": "cancel", "run_id": run_id, "command_id": f"{run_id}-cancel", "by": "customer"}
            found.append(Wish(at_s + rng.uniform(0.2, 8.0), cancel))
    return sorted(found, key=lambda wish: wish.at_s)


def _start(rng: random.Random, number: int, run_id: str) -> dict[str, Any]:
    order = {
        "order_id": run_id,
        "cents": rng.randint(500, 20_000),
        "stumbles": rng.choice((0, 0, 1, 2, 3)),
        "breaks_off": rng.random() < 0.3,
    }
    kind = ("parcel", "parcel", "parcel", "letter", "clerk")[number % 5]
    target = {"agent": kind} if kind == "clerk" else {"workflow": kind}
    account = f"shop{number % ACCOUNTS}/orders"
    return {
        "type": "start",
        "run_id": run_id,
        **target,
        "input": order,
        "account": account,
        "budget_micros": BUDGET_MICROS,
    }


def answer(seed: int, question: Question) -> tuple[float, dict[str, Any]]:
    """Return after how many seconds a human answers a question, and how. The same question gets the same answer."""
    rng = random.Random(f"answer/{seed}/{question.run_id}/{question.step_id}")  # noqa: S311 - a plan, not a secret
    verdict = "reject" if rng.random() < REJECTED_SHARE else "approve"
    request = {
        "type": verdict,
        "run_id": question.run_id,
        "step_id": question.step_id,
        "command_id": f"{question.run_id}-{question.step_id}-{question.attempt}-{question.why}",
        "by": "clerk",
        "reason": "looked at it",
    }
    return rng.uniform(0.1, 2.0), request
