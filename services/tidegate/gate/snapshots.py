"""The units of a ledger as bytes and back. Disposable: a format that changed only means to fold the ledger.

A run's money and open attempts; an attempt of another partition that asks for leases; what a limit knows of one value of
its key; a queue that wants executors; a bucket of a budget; what was learned of a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final, cast

import msgspec

from tidegate.domain import ledger_events as ev
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import Ask, Attempt, AttemptKey, Bucket, Carried, Gauge, Learned, RunMoney

# Counts up with every change of the fields of RunMoney and Attempt, or of what they mean.
SNAPSHOT_FORMAT: Final = 4
# Entries that carry balances forward hold units for ever: who raises the format goes on reading these.
READABLE_FORMATS: Final = (4,)

_State = tuple[RunMoney, list[Attempt]]


# Units besides runs. A run id has no colon.
_LIMIT, _ASK, _SCALE_OUT = "limit:", "ask:", "scale-out:"
CARRIED: Final = "carried:ledger"


def _limit_unit(event: Any) -> str:
    return f"{_LIMIT}{event.limit}\n{event.key}"


def _ask_unit(event: Any) -> str:
    return f"{_ASK}{event.run_id}\n{event.step_id}\n{event.attempt}"


def _carried_unit(_: Any) -> str:
    return CARRIED


def _queue_unit(event: Any) -> str:
    return f"{_SCALE_OUT}{event.queue}"


# Buckets of budgets, and what was learned of functions, have a bar in their names, and no colon before it.
# By the type of an event, what names the unit that it changes; of others, that is its run.
NAMED: Final[dict[type, Callable[[Any], str]]] = {
    **dict.fromkeys(
        (ev.BudgetSet, ev.BudgetReserved, ev.BudgetSettled, ev.BudgetAlerted, ev.BudgetClosed), attrgetter("bucket")
    ),
    ev.UsageLearned: attrgetter("function"),
    **dict.fromkeys(
        (ev.TokenTaken, ev.FailureCounted, ev.BreakerOpened, ev.BreakerClosed, ev.LimitForgotten), _limit_unit
    ),
    **dict.fromkeys((ev.LeaseHeard, ev.LeaseGiven, ev.LeaseRefused, ev.LeaseEnded), _ask_unit),
    ev.ScaleOutWanted: _queue_unit,
    ev.LedgerCarried: _carried_unit,
}


def units_of_event(event: Any) -> Sequence[str]:
    """Return the units that an event changes, each by itself."""
    kind = type(event)
    if kind is ev.AttemptGranted or kind is ev.AttemptSettled or (kind is ev.AttemptReserved and event.counts):
        return (event.run_id, *event.buckets)
    if kind is ev.BudgetsReleased:
        return cast("tuple[str, ...]", event.buckets)
    named = NAMED.get(kind)  # asked for every event: nearly all concern a run
    return (event.run_id,) if named is None else (named(event),)


def units_of(ledger: Ledger) -> list[str]:
    """Return all units that a ledger holds anything of."""
    return [
        *ledger.runs,
        *(f"{_ASK}{key.run_id}\n{key.step_id}\n{key.attempt}" for key in ledger.asks),
        *(f"{_LIMIT}{limit}\n{key}" for limit, key in ledger.gauges),
        *(f"{_SCALE_OUT}{queue}" for queue in ledger.scale_out),
        *ledger.buckets,
        *ledger.learned,
    ]


def is_there(ledger: Ledger, unit: str) -> bool:
    """Tell whether the ledger holds anything of a unit."""
    if _is_run(unit):
        return unit in ledger.runs
    if unit == CARRIED:
        return ledger.carried is not None
    if _is_of_budgets(unit):
        return unit in ledger.buckets or unit in ledger.learned
    kind, _, name = unit.partition(":")
    return name in ledger.scale_out if kind == _SCALE_OUT[:-1] else _named(ledger, unit) is not None


def _is_run(unit: str) -> bool:
    return ":" not in unit and "|" not in unit


def _is_of_budgets(unit: str) -> bool:
    head, bar, _ = unit.partition("|")
    return bool(bar) and ":" not in head


def _named(ledger: Ledger, unit: str) -> Ask | Gauge | None:
    kind, _, name = unit.partition(":")
    parts = name.split("\n")
    if kind == _ASK[:-1]:
        return ledger.asks.get(_ask_key(parts))
    return ledger.gauges.get((parts[0], "\n".join(parts[1:])))


def _ask_key(parts: list[str]) -> AttemptKey:
    return AttemptKey(parts[0], "\n".join(parts[1:-1]), int(parts[-1]))


def dump(ledger: Ledger, unit: str) -> bytes:
    """Return a unit's state."""
    if _is_run(unit):
        return _dump_run(ledger, unit)
    if unit == CARRIED:
        return msgspec.msgpack.encode((SNAPSHOT_FORMAT, ledger.carried))
    if _is_of_budgets(unit):
        return msgspec.msgpack.encode((SNAPSHOT_FORMAT, ledger.buckets.get(unit) or ledger.learned[unit]))
    if unit.startswith(_SCALE_OUT):
        return msgspec.msgpack.encode((SNAPSHOT_FORMAT, ledger.scale_out[unit.removeprefix(_SCALE_OUT)]))
    return msgspec.msgpack.encode((SNAPSHOT_FORMAT, _named(ledger, unit)))


def load(ledger: Ledger, unit: str, data: bytes) -> None:
    """Put a unit into a ledger. Raises ValueError on another format, msgspec.DecodeError."""
    if _is_run(unit):
        _load_run(ledger, unit, data)
        return
    kind, _, name = unit.partition(":")
    version, raw = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw])
    _check_format(version)
    parts = name.split("\n")
    if unit == CARRIED:
        ledger.carried = msgspec.msgpack.decode(raw, type=Carried)
    elif _is_of_budgets(unit):
        if unit.startswith("|"):
            ledger.learned[unit] = msgspec.msgpack.decode(raw, type=Learned)
        else:
            ledger.buckets[unit] = msgspec.msgpack.decode(raw, type=Bucket)
    elif kind == _SCALE_OUT[:-1]:
        ledger.scale_out[name] = msgspec.msgpack.decode(raw, type=int)
    elif kind == _ASK[:-1]:
        ledger.asks[_ask_key(parts)] = msgspec.msgpack.decode(raw, type=Ask)
    else:
        ledger.gauges[parts[0], "\n".join(parts[1:])] = msgspec.msgpack.decode(raw, type=Gauge)


def _check_format(version: int) -> None:
    if version not in READABLE_FORMATS:
        raise ValueError(f"a snapshot of format {version}, not {SNAPSHOT_FORMAT}")


def _dump_run(ledger: Ledger, run_id: str) -> bytes:
    """Return the run's money and its open attempts, these in the order of their keys in `RunMoney.open`."""
    run = ledger.runs[run_id]
    attempts = [ledger.attempts[key] for key in run.open]
    money = msgspec.structs.replace(run, open={})
    return msgspec.msgpack.encode((SNAPSHOT_FORMAT, money, [key[1:] for key in run.open], attempts))


def _load_run(ledger: Ledger, run_id: str, data: bytes) -> None:
    """Put the run into a ledger. Raises ValueError on another format, msgspec.DecodeError."""
    version, _, _, _ = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw, msgspec.Raw, msgspec.Raw])
    _check_format(version)
    _, run, names, attempts = msgspec.msgpack.decode(
        data, type=tuple[int, RunMoney, list[tuple[str, int]], list[Attempt]]
    )
    ledger.runs[run_id] = run
    for (step_id, number), attempt in zip(names, attempts, strict=True):
        key = AttemptKey(run_id, step_id, number)
        run.open[key] = None
        ledger.attempts[key] = attempt
