"""The limits, recomputed: who held what, and how fast things started, from the bytes of `gate-ledger` alone.

As in `money.py`, nothing of the gate is used: a limit is what its document says, and a lease lasts from the record that gave
it to the record that ended it. A lease is decided on in one partition, so the order of that partition's records is the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from tidegate.audit.money import AttemptName, Problem, record_fields
from tidegate.eventlog.interface import Message
from tidegate.eventlog.validity import EpochTracker

ENDS: Final = frozenset({"AttemptSettled", "AttemptReleased", "PlacementLost", "LeaseEnded"})


class Bound(NamedTuple):
    """What a limit allows: at once, and as a token bucket; None for no bound of that kind."""

    at_once: int | None = None
    rate_per_s: float | None = None
    burst: int = 1


@dataclass(slots=True)
class LeaseBooks:
    """What is known of one value of a limit's key. peak: the most that ever held it at one time. starts: how many did."""

    holders: set[tuple[int, AttemptName]] = field(default_factory=set)
    peak: int = 0
    starts: int = 0
    tokens: float = 0.0
    at_ms: int = -1
    accounts: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class LimitBooks:
    """The books of all partitions together. Fed record by record, each partition from its first on, in any mixture."""

    bounds: dict[str, Bound]
    leases: dict[tuple[str, str], LeaseBooks] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    throttled: int = 0
    _held: dict[tuple[int, AttemptName, bool], list[tuple[str, str]]] = field(default_factory=dict)
    _epochs: dict[int, EpochTracker] = field(default_factory=dict)
    _given: set[tuple[AttemptName, str, str]] = field(default_factory=set)
    _used: dict[tuple[AttemptName, str, str], str] = field(default_factory=dict)

    def read(self, message: Message) -> None:
        """Take the next record of its partition into the books. Does not raise; what is wrong is noted in `problems`."""
        if message.value is None:
            return
        where = f"{message.topic}-{message.partition}@{message.offset}"
        epochs = self._epochs.setdefault(message.partition, EpochTracker())
        try:
            kind, fields = record_fields(message.value)
        except Exception as error:  # whatever is wrong with the bytes: a lease may hide in them
            self.problems.append(Problem(where, "", f"cannot be read: {type(error).__name__}: {error}"))
            return
        if kind == "OwnerAnnounced":
            epochs.announced(message.offset, fields["epoch"])
        elif epochs.is_valid(fields["epoch"]):
            for name, event in fields["events"]:
                self._event(where, message.partition, fields["now_ms"], name.rpartition(".")[2], event)

    def _event(self, where: str, partition: int, now_ms: int, kind: str, event: dict[str, Any]) -> None:
        self.throttled += kind == "AttemptThrottled"
        if kind in ("AttemptGranted", "AttemptPlaced", "LeaseGiven"):
            self._begin(where, partition, kind == "LeaseGiven", event)
        elif kind in ENDS:
            self._end(partition, kind == "LeaseEnded", event)
        elif kind == "TokenTaken":
            self._start(where, now_ms, event)

    def _begin(self, where: str, partition: int, is_given: bool, event: dict[str, Any]) -> None:
        name = AttemptName(event["run_id"], event["step_id"], event["attempt"])
        for lease in event.get("leases", ()):
            limit = (lease["limit"], lease["key"])
            if lease["partition"] != partition:
                self._used[name, *limit] = where
                continue
            if is_given:
                self._given.add((name, *limit))
            elif limit in self._held.get((partition, name, True), ()):
                continue  # it asked for them before it was placed, as others do
            books = self.leases.setdefault(limit, LeaseBooks())
            books.holders.add((partition, name))
            books.starts += 1
            books.peak = max(books.peak, len(books.holders))
            books.accounts[event["account"]] = books.accounts.get(event["account"], 0) + 1
            self._held.setdefault((partition, name, is_given), []).append(limit)
            bound = self.bounds.get(lease["limit"], Bound())
            if bound.at_once is not None and len(books.holders) > bound.at_once:
                text = f"{len(books.holders)} hold {lease['limit']}[{lease['key']}], {bound.at_once} may"
                self.problems.append(Problem(where, name.run_id, text))

    def _end(self, partition: int, is_given: bool, event: dict[str, Any]) -> None:
        name = AttemptName(event["run_id"], event["step_id"], event["attempt"])
        for limit in self._held.pop((partition, name, is_given), ()):
            self.leases[limit].holders.discard((partition, name))

    def _start(self, where: str, now_ms: int, event: dict[str, Any]) -> None:
        bound = self.bounds.get(event["limit"], Bound())
        if bound.rate_per_s is None:
            return
        books = self.leases.setdefault((event["limit"], event["key"]), LeaseBooks())
        if books.at_ms < 0:
            books.tokens = float(bound.burst)
        else:
            books.tokens = min(bound.burst, books.tokens + (now_ms - books.at_ms) * bound.rate_per_s / 1000)
        books.at_ms = now_ms
        books.tokens -= 1
        if books.tokens < -1e-3:
            text = f"{event['limit']}[{event['key']}] started one more than {bound.rate_per_s:g} a second, {bound.burst} at once"
            self.problems.append(Problem(where, "", text))

    def problems_at_rest(self) -> list[Problem]:
        """Return what is wrong if nothing is under way any more: leases still held, or used without having been given."""
        left = [
            Problem("at the end", name.run_id, f"{name} still holds {limit}[{key}]")
            for (limit, key), books in self.leases.items()
            for _, name in sorted(books.holders)
        ]
        return left + [
            Problem(
                where, used[0].run_id, f"{used[0]} was placed under {used[1]}[{used[2]}], which was never given to it"
            )
            for used, where in self._used.items()
            if used not in self._given
        ]


def audit_limits(partitions: Iterable[Iterable[Message]], bounds: dict[str, Bound]) -> LimitBooks:
    """Read every partition of the ledger from its first record on, and return the books. Blocks as its readers do."""
    books = LimitBooks(bounds)
    for messages in partitions:
        for message in messages:
            books.read(message)
    return books
