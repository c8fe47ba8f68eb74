"""What accounts and functions did, minute by minute: money, attempts, errors, runs. Pure.

A tally is what one partition of `run-events` says of an account, or of a function, in one hour. It is guarded by the offset
of the last entry that counts in it: an entry that it holds already changes nothing, so reading any part of the log again is
harmless. The figures of an account are sums over the tallies of all partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import run_events as ev
from tidegate.domain import states
from tidegate.domain.entry import Entry
from tidegate.domain.identity import NAMED_TOOL, function_in_step

MINUTE_MS: Final = 60_000
HOUR_MINUTES: Final = 60
MAX_SPENT: Final = 2**63 - 1  # what a changelog can hold; no honest log gets there
ACCOUNT: Final = "account"
STEP: Final = "step"
TOOL: Final = "tool"
ERRORS: Final = frozenset({"failed", "timed_out", "lost"})
DENIED: Final = "denied"


class Figures(msgspec.Struct, array_like=True):
    """What is counted. Fields may be added at the end only, with defaults: tallies in changelogs are lists of numbers.

    attempts: that ended in success, or as one of `errors`: failed, timed out or lost. denied: by the gate; they ran nothing.
    runs: that are over, refused ones not counted; failed_runs: of them. In tallies of functions these two are 0.
    """

    spent_micros: int = 0
    attempts: int = 0
    errors: int = 0
    denied: int = 0
    runs: int = 0
    failed_runs: int = 0

    def add(self, other: Figures) -> None:
        """Add another one's numbers to these."""
        for name in FIELDS:
            setattr(self, name, min(getattr(self, name) + getattr(other, name), MAX_SPENT))


FIELDS: Final = Figures.__struct_fields__


class Name(NamedTuple):
    """Whom figures are about. kind: `account`, or of a function how it was called: `step`, `agent`, `tool` and so on."""

    kind: str
    name: str


class Tally(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the entries of one log partition up to offset `as_of` say of somebody in one hour.

    hour: since 1970. log: id of the topic that the offset is one of. minutes: of the hour, from 0.
    """

    partition: int
    kind: str
    name: str
    hour: int
    log: str
    as_of: int = -1
    minutes: dict[int, Figures] = {}

    @property
    def key(self) -> str:
        """Return the key of its row in the changelog."""
        return tally_key(self.partition, Name(self.kind, self.name), self.hour)

    def is_older_than(self, other: Tally) -> bool:
        """Tell whether the other one knows more of the same log."""
        return self.log == other.log and self.as_of < other.as_of


def tally_key(partition: int, name: Name, hour: int) -> str:
    """Return the key of a tally. It names the partition, because its row lies in the changelog's partition of that number."""
    return f"{partition}:{name.kind}:{hour}:{name.name}"


def partition_of_tally(key: str) -> int:
    """Return the partition that a key of a tally names."""
    return int(key.partition(":")[0])


# --- what counts -------------------------------------------------------------------------------------------------------


def learn(functions: dict[str, str], events: Iterable[Any]) -> bool:
    """Note which functions nodes call, as `kind:function`; tell whether one was new. Doing it again changes nothing.

    What needs no note is not noted: that a node called like its function is a step of it.
    """
    before = len(functions)
    for event in events:
        if isinstance(event, ev.StepReady) and not function_in_step(event.step_id):
            called = f"{event.call.kind}:{event.call.function}"
            if called != f"{STEP}:{event.node_id}":
                functions[event.node_id] = called
    return len(functions) > before


def called_by(functions: Mapping[str, str], step_id: str) -> Name:
    """Return the function of a step: its id says which, or the notes of `learn` do."""
    function = function_in_step(step_id)
    if function:
        return Name(TOOL if NAMED_TOOL in step_id else STEP, function)
    node_id = step_id.partition("/")[0]
    kind, _, function = functions.get(node_id, f"{STEP}:{node_id}").partition(":")
    return Name(kind, function)


def _ended(event: ev.AttemptEnded) -> Figures:
    is_error = event.outcome in ERRORS
    return Figures(attempts=is_error, errors=is_error, denied=event.outcome == DENIED)


_COUNTED: Final[dict[type, Callable[[Any], Figures]]] = {
    ev.StepSucceeded: lambda event: Figures(attempts=event.attempt > 0),
    ev.AttemptEnded: _ended,
    ev.RunFinished: lambda event: Figures(runs=1, failed_runs=event.status == states.FAILED),
}


def figures_of(event: Any) -> Figures | None:
    """Return what an event counts; None for nothing. Money counts whatever event tells of it."""
    count = _COUNTED.get(type(event))
    micros = getattr(event, "actual_micros", 0)
    if count is None and micros <= 0:
        return None
    found = Figures() if count is None else count(event)
    found.spent_micros = min(max(0, micros), MAX_SPENT)
    return found


# --- all tallies of some partitions ----------------------------------------------------------------------------------------


class Tallies:
    """Tallies by key, and their sums. `log` is the id of the topic that is read: what is of another one counts as none."""

    def __init__(self, tallies: Iterable[Tally] = (), log: str = "") -> None:
        self._log = log
        self.rows = {tally.key: tally for tally in tallies if tally.log == log}
        self._sums = {key: _sum(tally.minutes.values()) for key, tally in self.rows.items()}

    def take(self, entry: Entry, functions: Mapping[str, str], partition: int, offset: int) -> list[Tally]:
        """Count an entry, unless it is counted already; return the tallies that changed."""
        counted: dict[Name, Figures] = {}
        for event in entry.events:
            found = figures_of(event)
            if found is None:
                continue
            names = [Name(ACCOUNT, entry.account)] if entry.account else []
            step_id = getattr(event, "step_id", "")
            if step_id:
                names.append(called_by(functions, step_id))
            for name in names:
                counted.setdefault(name, Figures()).add(found)
        hour, minute = divmod(entry.now_ms // MINUTE_MS, HOUR_MINUTES)
        changed = []
        for name, figures in counted.items():
            tally = self._tally(partition, name, hour)
            if offset > tally.as_of:
                tally.as_of = offset
                tally.minutes.setdefault(minute, Figures()).add(figures)
                self._sums[tally.key].add(figures)
                changed.append(tally)
        return changed

    def _tally(self, partition: int, name: Name, hour: int) -> Tally:
        key = tally_key(partition, name, hour)
        tally = self.rows.get(key)
        if tally is None:
            tally = self.rows[key] = Tally(
                partition=partition, kind=name.kind, name=name.name, hour=hour, log=self._log, minutes={}
            )
            self._sums[key] = Figures()
        return tally

    def outdated(self, before_minute: int) -> list[str]:
        """Return the keys of tallies whose hour ended before a minute."""
        return [key for key, tally in self.rows.items() if (tally.hour + 1) * HOUR_MINUTES <= before_minute]

    def forget(self, key: str) -> None:
        """Remove a tally."""
        self.rows.pop(key, None)
        self._sums.pop(key, None)

    def windows(
        self, fits: Callable[[Tally], bool], sizes: Sequence[int], until_minute: int
    ) -> dict[Name, list[Figures]]:
        """Return the sums of the last so many minutes, up to and with `until_minute`, for each size, of all that fit.

        Who has nothing in any of the windows is left out.
        """
        found: dict[Name, list[Figures]] = {}
        since = [until_minute - size + 1 for size in sizes]
        for key, tally in self.rows.items():
            first = tally.hour * HOUR_MINUTES
            last = first + HOUR_MINUTES - 1
            if last < min(since) or first > until_minute or not fits(tally):
                continue
            sums = found.setdefault(Name(tally.kind, tally.name), [Figures() for _ in sizes])
            for sum_, begin in zip(sums, since, strict=True):
                if begin <= first and last <= until_minute:
                    sum_.add(self._sums[key])
                else:
                    for minute, figures in tally.minutes.items():
                        if begin <= first + minute <= until_minute:
                            sum_.add(figures)
        return {name: sums for name, sums in found.items() if any(sum_ != _NOTHING for sum_ in sums)}

    def spent(self, fits: Callable[[Tally], bool], since_minute: int) -> dict[str, dict[int, int]]:
        """Return account -> minute -> micro-dollars, of the accounts that fit, from a minute on."""
        found: dict[str, dict[int, int]] = {}
        for tally in self.rows.values():
            if tally.kind == ACCOUNT and fits(tally):
                for minute, micros in _spent(tally, since_minute):
                    windows = found.setdefault(tally.name, {})
                    windows[minute] = windows.get(minute, 0) + micros
        return {account: dict(sorted(windows.items())) for account, windows in found.items()}


_NOTHING: Final = Figures()


def _sum(figures: Iterable[Figures]) -> Figures:
    total = Figures()
    for one in figures:
        total.add(one)
    return total


def _spent(tally: Tally, since_minute: int) -> Iterator[tuple[int, int]]:
    for minute, figures in tally.minutes.items():
        at = tally.hour * HOUR_MINUTES + minute
        if at >= since_minute and figures.spent_micros:
            yield at, figures.spent_micros


def is_at_or_below(account: str, path: str) -> bool:
    """Tell whether an account is the one of a path, or below it; every account is below the empty path."""
    return not path or account == path or account.startswith(f"{path}/")
