"""Budgets, recomputed: what every bucket of every budget held at every instant, from the fields of the ledger's events alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

METERS: Final = ("micros", "input_tokens", "output_tokens", "calls", "wall_ms")
NOTHING: Final = dict.fromkeys(METERS, 0)
LARGEST: Final = 2**63 - 1  # what a field can hold: sums stop there

Amounts = dict[str, int]
Name = tuple[str, str, int]  # run, step, attempt


@dataclass(slots=True)
class BucketBooks:
    """What a bucket may hold, and what it holds. open: what is set aside, by attempt. overshoot: spent beyond reservations.

    until_ms: when its window is over; 0 if it has none, or if nothing says.
    """

    account: str
    limits: dict[str, int | None]
    spent: Amounts = field(default_factory=lambda: dict(NOTHING))
    overshoot: Amounts = field(default_factory=lambda: dict(NOTHING))
    exceeded: Amounts = field(default_factory=lambda: dict(NOTHING))
    open: dict[Name, Amounts] = field(default_factory=dict)
    alerted: set[tuple[str, int]] = field(default_factory=set)
    until_ms: int = 0

    def reserved(self, meter: str) -> int:
        """Return what is set aside of a meter."""
        return sum(amounts[meter] for amounts in self.open.values())


@dataclass(slots=True)
class BudgetBooks:
    """The books of all buckets that are not closed; closed: what each that was came to in the end. now_ms: of the entry that is
    read."""

    now_ms: int = 0
    buckets: dict[str, BucketBooks] = field(default_factory=dict)
    closed: dict[str, Amounts] = field(default_factory=dict)
    _by_attempt: dict[Name, set[str]] = field(default_factory=dict)
    _ended: list[Name] = field(default_factory=list)
    _unclaimed: set[tuple[str, Name]] = field(default_factory=set)

    def post(self, kind: str, event: dict[str, Any]) -> Iterable[str]:
        """Take an event into the books; return what is wrong with it."""
        return list(BUDGET_EVENTS[kind](self, event))

    def attempt(self, kind: str, event: dict[str, Any]) -> Iterator[str]:
        """Take what an attempt's event changes in buckets into the books. Those of earlier versions change nothing there: events
        of the buckets do, one for each.
        """
        if kind == "AttemptGranted" or (kind == "AttemptReserved" and event.get("counts")):
            exceeds = set(event["exceeds"])
            if exceeds - set(event["buckets"]):
                yield f"{_said(_name(event))}: exceeds {sorted(exceeds)}, and is set aside in {event['buckets']}"
            for key in event["buckets"]:
                yield from self._reserved(event | {"bucket": key, "exceeds": key in exceeds})
        elif kind == "AttemptSettled":
            for key in event.get("buckets", ()):
                used = event["used"] | {"micros": event["actual_micros"]}
                yield from self._settled(event | {"bucket": key, "reserved": event["set_aside"], "used": used})

    def reserved_for(self, name: Name, event: dict[str, Any]) -> Iterator[str]:
        """Compare what an attempt says to have set aside with what its buckets hold for it. Older ones say nothing."""
        said = set(event.get("buckets", ()))
        there = self._by_attempt.get(name, set())
        if said != there:
            yield f"set aside in {sorted(said)}, but held in {sorted(there)}"
        amounts = event.get("amounts", NOTHING)
        for key in said & there:
            if self.buckets[key].open[name] != amounts:
                yield f"{key} holds {self.buckets[key].open[name]} for it, not {amounts}"
            if event["reserved_micros"] != amounts["micros"]:
                yield f"{event['reserved_micros']} set aside, {amounts['micros']} of it in {key}"
            if (key, name) in self._unclaimed and not event["approved_by"]:
                yield f"exceeds {key}, which nobody approved"
            self._unclaimed.discard((key, name))

    def ended(self, name: Name) -> None:
        """Note that an attempt ended: with its entry, no bucket may hold anything for it."""
        self._ended.append(name)

    def end_of_entry(self) -> Iterator[tuple[str, str]]:
        """Return (run, what is wrong) of what should have been complete with the entry: buckets are taken all or none."""
        for name in self._ended:
            for key in sorted(self._by_attempt.get(name, ())):
                yield name[0], f"{_said(name)}: ended, {key} still holds {self.buckets[key].open[name]} for it"
        for key, name in sorted(self._unclaimed):
            yield name[0], f"{_said(name)}: exceeds {key} without an allowed attempt"
        self._ended.clear()
        self._unclaimed.clear()

    def forget(self, keys: Iterable[str]) -> None:
        """Forget buckets, with all that is set aside in them."""
        for key in keys:
            bucket = self.buckets.pop(key, None)
            for name in () if bucket is None else bucket.open:
                self._by_attempt[name].discard(key)

    def begin(self, carried: dict[str, Any]) -> None:
        """Begin a bucket with what was carried forward of it; what is set aside in it comes with its attempts."""
        self.buckets[carried["bucket"]] = BucketBooks(carried["account"], carried["limits"], dict(carried["spent"]))

    def hold(self, name: Name, keys: Iterable[str], amounts: Amounts) -> None:
        """Note what an attempt that was carried forward holds in buckets."""
        for key in keys:
            self.buckets[key].open[name] = amounts
            self._by_attempt.setdefault(name, set()).add(key)

    def left_open(self) -> Iterator[tuple[Name, str]]:
        """Return what is still set aside in buckets."""
        for key, bucket in self.buckets.items():
            for name, amounts in bucket.open.items():
                yield name, f"{_said(name)}: {amounts} still set aside in {key}"

    # -- one method for each kind of event ------------------------------------------------------

    def _set(self, event: dict[str, Any]) -> Iterator[str]:
        key, limits = event["bucket"], event["limits"]
        if any(limit is not None and limit < 0 for limit in limits.values()):
            yield f"{key}: limits {limits}"
        bucket = self.buckets.setdefault(key, BucketBooks(event["account"], limits))
        bucket.limits, bucket.until_ms = limits, event["until_ms"]

    def _reserved(self, event: dict[str, Any]) -> Iterator[str]:
        key, name, amounts = event["bucket"], _name(event), event["amounts"]
        bucket = self.buckets.get(key)
        if bucket is None:
            yield f"{_said(name)}: set aside in {key}, which there is not"
            return
        if min(amounts.values()) < 0 or amounts["calls"] != 1:
            yield f"{_said(name)}: {amounts} set aside in {key}"
        if name in bucket.open:
            yield f"{_said(name)}: set aside in {key} twice"
        if not (event["account"] == bucket.account or event["account"].startswith(bucket.account + "/")):
            yield f"{_said(name)}: of {event['account']}, counted for {bucket.account}"
        bucket.open[name] = amounts
        self._by_attempt.setdefault(name, set()).add(key)
        exceeded = {
            meter: bucket.reserved(meter) + bucket.spent[meter] - limit
            for meter, limit in bucket.limits.items()
            if limit is not None and bucket.reserved(meter) + bucket.spent[meter] > limit
        }
        if exceeded and not event["exceeds"]:
            yield (
                f"{_said(name)}: {amounts} set aside in {key}; with that it exceeds {bucket.limits} by {exceeded} "
                f"({bucket.spent} are spent)"
            )
        if event["exceeds"]:
            self._unclaimed.add((key, name))
            for meter, more in exceeded.items():
                bucket.exceeded[meter] = max(bucket.exceeded[meter], more)

    def _settled(self, event: dict[str, Any]) -> Iterator[str]:
        key, name, used = event["bucket"], _name(event), event["used"]
        bucket = self.buckets.get(key)
        if bucket is None:
            yield f"{_said(name)}: settled in {key}, which there is not"
            return
        expected = bucket.open.pop(name, NOTHING)
        held = self._by_attempt.get(name, set())
        held.discard(key)
        if not held:
            self._by_attempt.pop(name, None)
        if event["reserved"] != expected:
            yield f"{_said(name)}: settled in {key} against {event['reserved']}, {expected} were set aside"
        if min(used.values()) < 0:
            yield f"{_said(name)}: {used} used"
        for meter in METERS:
            bucket.spent[meter] = min(bucket.spent[meter] + used[meter], LARGEST)
            bucket.overshoot[meter] += max(0, used[meter] - expected[meter])

    def _released(self, event: dict[str, Any]) -> Iterator[str]:
        for key in event["buckets"]:
            yield from self._settled(event | {"bucket": key, "reserved": event["amounts"], "used": NOTHING})

    def _alerted(self, event: dict[str, Any]) -> Iterator[str]:
        key, meter, percent = event["bucket"], event["meter"], event["percent"]
        bucket = self.buckets.get(key)
        if bucket is None:
            yield f"{key}: an alert, but there is no such bucket"
            return
        spent, limit = bucket.spent[meter], bucket.limits[meter]
        if (meter, percent) in bucket.alerted:
            yield f"{key}: {percent} percent of {meter} told twice"
        if (event["spent"], event["limit"]) != (spent, limit) or limit is None or spent * 100 < limit * percent:
            yield f"{key}: {percent} percent of {meter} told at {event['spent']} of {event['limit']}, it is {spent} of {limit}"
        bucket.alerted.add((meter, percent))

    def _closed_down(self, event: dict[str, Any]) -> Iterator[str]:
        key = event["bucket"]
        bucket = self.buckets.pop(key, None)
        if bucket is None:
            yield f"{key}: closed, but there is no such bucket"
            return
        if self.now_ms < bucket.until_ms:
            yield f"{key}: closed at {self.now_ms}, its window is over at {bucket.until_ms}: what is spent in it is forgotten"
        if bucket.open:
            yield f"{key}: closed with {len(bucket.open)} reservations in it"
        for name in bucket.open:
            self._by_attempt[name].discard(key)
        if event["spent"] != bucket.spent:
            yield f"{key}: closed with {event['spent']} spent, {bucket.spent} were"
        self.closed[key] = bucket.spent

    def _learned(self, event: dict[str, Any]) -> Iterator[str]:
        if event["count"] < 1 or min(event["mean"].values()) < 0:
            yield f"{event['function']}: an average of {event['mean']} over {event['count']}"


BUDGET_EVENTS: Final[dict[str, Callable[[BudgetBooks, dict[str, Any]], Iterator[str]]]] = {
    "BudgetSet": BudgetBooks._set,
    "BudgetReserved": BudgetBooks._reserved,
    "BudgetSettled": BudgetBooks._settled,
    "BudgetsReleased": BudgetBooks._released,
    "BudgetAlerted": BudgetBooks._alerted,
    "BudgetClosed": BudgetBooks._closed_down,
    "UsageLearned": BudgetBooks._learned,
}


def _name(event: dict[str, Any]) -> Name:
    return (event["run_id"], event["step_id"], event["attempt"])


def _said(name: Name) -> str:
    return f"{name[0]} {name[1]}#{name[2]}"
