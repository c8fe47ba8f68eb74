"""Budgets: documents that bound what runs may use, and the counting of it inside one decision. Pure.

A budget counts in buckets: one for each account (or run) that its pattern tells apart, and for each window. A bucket lives in the
ledger partition of its account root, so one decision sees every bucket that an attempt concerns, and takes all of them or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import (
    ACCOUNT_PATTERN,
    MAX_MICROS,
    NAME_PATTERN,
    RUN_ID_PATTERN,
    account_fits,
    account_root,
)
from tidegate.domain.messages import Amounts, Call
from tidegate.domain.questions import LACK_RULE
from tidegate.gate.documents import Document, name_field
from tidegate.gate.ledger import Ledger
from tidegate.gate.names import bucket_key
from tidegate.gate.state import MAX_SET_ASIDE, METERS, Attempt, Bucket, Learned, tight
from tidegate.gate.windows import ALWAYS, Unit, Window, said_moment, window_at, zone_named
from tidegate.prices import price

OnExceed = Literal["deny", "ask", "pause"]
# Of several budgets without room, the one that says the most decides.
_STRENGTH: Final[dict[str, int]] = {"pause": 0, "ask": 1, "deny": 2}
ACCOUNT_PART: Final = r"(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63})"
SCOPE_PATTERN: Final = rf"^{ACCOUNT_PART}(/{ACCOUNT_PART}){{0,7}}$"
EVERY_ROOT: Final = "*"
MAX_ALERTS: Final = 20
MAX_LEARNED: Final = 10_000  # functions that a ledger partition keeps averages of
AVERAGED_OVER: Final = 100

_Limit = Field(default=None, ge=0, le=MAX_MICROS)


class Limits(BaseModel):
    """The most of each meter; what is left out is only counted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    money_micros: int | None = _Limit
    input_tokens: int | None = _Limit
    output_tokens: int | None = _Limit
    calls: int | None = _Limit
    wall_seconds: int | None = Field(default=None, ge=0, le=MAX_MICROS // 1000)

    def in_order(self) -> tuple[int | None, ...]:
        """Return the limits in the order of METERS."""
        wall_ms = None if self.wall_seconds is None else self.wall_seconds * 1000
        return (self.money_micros, self.input_tokens, self.output_tokens, self.calls, wall_ms)


class Budget(Document):
    """A budget. account: whose runs count: a path and all below it; each `*` in it counts each name there by itself.

    workflow, tags: only runs of that workflow, or with those tags, count. window: when counting begins anew. on_exceed: what
    happens to an attempt for which there is no room. alerts: percent of a limit at which an event says so. expires_s: how long
    the question of `ask` may go unanswered.
    """

    KIND = "budget"
    NAME_FIELD = "budget"

    budget: str = name_field()
    account: str = Field(default=EVERY_ROOT, pattern=SCOPE_PATTERN)
    workflow: str = Field(default="", max_length=128)
    tags: dict[str, str] = Field(default_factory=dict, max_length=20)
    window: Unit = "total"
    time_zone: str = "UTC"
    limits: Limits = Limits()
    on_exceed: OnExceed = "deny"
    alerts: list[int] = Field(default_factory=list, max_length=MAX_ALERTS)
    expires_s: int | None = Field(default=None, ge=1, le=366 * 24 * 3600)

    @field_validator("time_zone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        zone_named(value)
        return value

    @field_validator("alerts")
    @classmethod
    def _are_percents(cls, value: list[int]) -> list[int]:
        if not all(1 <= percent <= 1000 for percent in value):
            raise ValueError("alerts are percents of a limit, from 1 to 1000")
        return sorted(set(value))

    @model_validator(mode="after")
    def _fits_together(self) -> Budget:
        if self.expires_s is not None and self.on_exceed != "ask":
            raise ValueError("expires_s belongs to `on_exceed: ask`: nothing else waits for an answer")
        return self

    def misgivings(self) -> list[tuple[tuple[int | str, ...], str]]:
        """Return what an author surely did not mean."""
        if self.alerts and all(limit is None for limit in self.limits.in_order()):
            return [(("alerts",), "nothing is limited, so nothing can reach a percent of its limit")]
        return []


class TopUp(Document):
    """More room in one bucket of a budget: the one of `account` (and `run`) whose window holds `at_ms`."""

    KIND = "topup"
    NAME_FIELD = "topup"

    topup: str = name_field()
    version: str = "1"
    budget: str = Field(pattern=NAME_PATTERN)
    account: str = Field(pattern=ACCOUNT_PATTERN)
    run: str = Field(default="", pattern=rf"{RUN_ID_PATTERN}|^$")
    at_ms: int = Field(ge=0)
    add: Limits
    by: str = Field(default="", max_length=200)
    reason: str = Field(default="", max_length=500)


class Scope:
    """A budget, the part of a run's account path that it counts by, and the bucket of its present window."""

    __slots__ = ("_key", "_minute", "_window", "account", "budget", "is_per_run")

    def __init__(self, budget: Budget, account: str) -> None:
        self.budget = budget
        self.account = account
        self.is_per_run = budget.window == "run"
        self._minute = -1  # for which the others stand: windows turn at full minutes
        self._window = ALWAYS
        self._key = ""

    def bucket(self, run_id: str, now_ms: int) -> tuple[str, Window]:
        """Return the name of the bucket that counts the run now, and its window."""
        if self.is_per_run:
            return bucket_key(self.budget.budget, self.account, run_id, ALWAYS), ALWAYS
        minute = now_ms // 60_000
        if minute != self._minute:
            self._window = window_at(self.budget.window, self.budget.time_zone, now_ms)
            self._key = bucket_key(self.budget.budget, self.account, "", self._window)
            self._minute = minute
        return self._key, self._window


class Budgets:
    """All budgets in force, found by account."""

    __slots__ = ("_by_name", "_by_root", "_known", "_limits", "_top_ups")

    def __init__(self, budgets: Iterable[Budget], top_ups: Iterable[TopUp] = ()) -> None:
        self._by_root: dict[str, list[Budget]] = {}
        self._by_name = {budget.budget: budget for budget in sorted(budgets, key=lambda budget: budget.budget)}
        self._limits = {name: _ceilings(budget.limits.in_order()) for name, budget in self._by_name.items()}
        for budget in self._by_name.values():
            self._by_root.setdefault(account_root(budget.account), []).append(budget)
        self._top_ups: dict[tuple[str, str, str], list[TopUp]] = {}
        for item in sorted(top_ups, key=lambda top_up: top_up.topup):
            self._top_ups.setdefault((item.budget, item.account, item.run), []).append(item)
        self._known: dict[str, list[Scope]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_root)

    def named(self, name: str) -> Budget | None:
        """Return a budget by its name."""
        return self._by_name.get(name)

    def scopes(self, account: str, workflow: str, tags: Mapping[str, str]) -> list[Scope]:
        """Return the budgets that count a run, in order of name."""
        if not self._by_root:
            return []
        known = self._known.get(account)
        if known is None:
            if len(self._known) > 10_000:
                self._known.clear()
            known = self._known[account] = self._of_account(account)
        return [
            scope
            for scope in known
            if (not (wanted := scope.budget.workflow) or wanted == workflow)
            and (not (fixed := scope.budget.tags) or fixed.items() <= tags.items())
        ]

    def _of_account(self, account: str) -> list[Scope]:
        parts = account.split("/")
        found = []
        for budget in (*self._by_root.get(parts[0], ()), *self._by_root.get(EVERY_ROOT, ())):
            if account_fits(budget.account, account):
                found.append(Scope(budget, "/".join(parts[: budget.account.count("/") + 1])))
        return sorted(found, key=lambda scope: scope.budget.budget)

    def limits_of(self, scope: Scope, run_id: str, window: Window) -> tuple[ev.Ceilings, tuple[str, ...]]:
        """Return a bucket's limits with all its top-ups, and the ids of these."""
        name = scope.budget.budget
        top_ups = self._top_ups.get((name, scope.account, run_id)) if self._top_ups else None
        if top_ups is None:
            return self._limits[name], ()
        limits = list(scope.budget.limits.in_order())
        ids = []
        for item in top_ups:
            if window.holds(item.at_ms):
                ids.append(item.topup)
                for index, more in enumerate(item.add.in_order()):
                    limit = limits[index]
                    if limit is not None and more is not None:
                        limits[index] = min(limit + more, MAX_MICROS)
        return _ceilings(limits), tuple(ids)


def _ceilings(limits: Iterable[int | None]) -> ev.Ceilings:
    return ev.Ceilings(**dict(zip(METERS, limits, strict=True)))


UNUSED: Final = (0,) * len(METERS)
NO_BUDGETS: Final = Budgets(())


# --- estimates ---------------------------------------------------------------


class Estimate(NamedTuple):
    """What to set aside for an attempt, in the order of METERS, and where the amount of money comes from."""

    amounts: tuple[int, ...]
    basis: str


def estimate(call: Call, learned: Learned | None, now_ms: int) -> Estimate:
    """Return what an attempt is expected to use at most.

    Money: what the function declares; else what its model's most tokens cost; else what it cost on average so far. Tokens: what
    it declares, else the average. Calls: one. Time: all that it may take; none for what somebody outside does. Of the call, this
    looks at what `lacking.Alike` holds.
    """
    mean = (0, 0, 0, 0, 0) if learned is None else learned.mean
    input_tokens = call.max_input_tokens or mean[1]
    output_tokens = call.max_output_tokens or mean[2]
    micros, basis = call.reserve_micros, "declared" if call.reserve_micros else ""
    if not micros and call.model and (call.max_input_tokens or call.max_output_tokens):
        priced = price(call.provider, call.model, call.max_input_tokens, call.max_output_tokens, now_ms)
        if priced is not None:
            micros, basis = priced
    if not basis and learned is not None:
        micros, basis = mean[0], "history"
    return Estimate((micros, input_tokens, output_tokens, 1, 0 if call.is_outside else call.timeout_ms), basis)


def learn(learned: Learned | None, used: tuple[int, ...]) -> Learned:
    """Return the average with one attempt more; the last hundred weigh the most."""
    if learned is None:
        return Learned(1, used)
    count = min(learned.count + 1, AVERAGED_OVER)
    return Learned(count, tuple(mean + (new - mean) // count for mean, new in zip(learned.mean, used, strict=True)))


# --- counting ---------------------------------------------------------------


class Lack(NamedTuple):
    """A bucket without room for an attempt."""

    key: str
    bucket: Bucket
    budget: Budget
    meter: str
    needed: int

    @property
    def rule(self) -> str:
        """Return what decisions name as the rule."""
        return f"{LACK_RULE}{self.budget.budget}"

    @property
    def limit(self) -> int:
        """Return how much there may be of it: of what nothing limits, as much as can be counted."""
        said: int | None = getattr(self.bucket.limits, self.meter)
        return MAX_SET_ASIDE if said is None else said

    def said(self) -> str:
        """Return the reason for people."""
        at = METERS.index(self.meter)
        window = f", until {said_moment(self.bucket.until_ms)}" if self.bucket.until_ms else ""
        return (
            f"budget {self.budget.label} of {self.bucket.account}: needs {self.needed} {self.meter}; of {self.limit}, "
            f"{self.bucket.spent[at]} are spent and {self.bucket.reserved[at]} set aside{window}"
        )

    def values(self) -> dict[str, Any]:
        """Return the numbers that decided."""
        at = METERS.index(self.meter)
        return {
            "bucket": self.key,
            "meter": self.meter,
            "needed": self.needed,
            "limit": self.limit,
            "spent": self.bucket.spent[at],
            "reserved": self.bucket.reserved[at],
        }


class Tally:
    """The buckets as they stand inside one decision: what earlier items of it did counts for later ones.

    Events go to `events`, in order; nothing of the ledger is changed.
    """

    __slots__ = ("_budgets", "_changed", "_closed", "_events", "_ledger", "_now_ms")

    def __init__(self, ledger: Ledger, budgets: Budgets, now_ms: int, events: list[Any]) -> None:
        self._ledger = ledger
        self._budgets = budgets
        self._now_ms = now_ms
        self._events = events
        self._changed: dict[str, Bucket] = {}
        self._closed: set[str] = set()

    def get(self, key: str) -> Bucket | None:
        """Return a bucket as it stands here."""
        if key in self._closed:
            return None
        return self._changed.get(key) or self._ledger.buckets.get(key)

    def _own(self, key: str) -> Bucket:
        """Return a bucket that may be changed here."""
        bucket = self._changed.get(key)
        if bucket is None:
            bucket = self._changed[key] = self._ledger.buckets[key].copy()
        return bucket

    def opened(
        self, account: str, run_id: str, workflow: str, tags: Mapping[str, str]
    ) -> list[tuple[str, Bucket, Budget]]:
        """Return the buckets that count a run now, with the limits that are in force; says so in events where they are new."""
        found = []
        for scope in self._budgets.scopes(account, workflow, tags):
            key, window = scope.bucket(run_id, self._now_ms)
            found.append((key, self._current(key, scope, window, run_id), scope.budget))
        return found

    def _current(self, key: str, scope: Scope, window: Window, run_id: str) -> Bucket:
        budget = scope.budget
        bucket = self.get(key)
        limits, top_ups = self._budgets.limits_of(scope, run_id if scope.is_per_run else "", window)
        now = (budget.version, limits, budget.on_exceed, top_ups, window.until_ms)
        if bucket is not None and (
            now == (bucket.version, bucket.limits, bucket.on_exceed, bucket.top_ups, bucket.until_ms)
        ):
            return bucket
        event = ev.BudgetSet(
            account=scope.account,
            bucket=key,
            budget=budget.budget,
            version=budget.version,
            limits=limits,
            on_exceed=budget.on_exceed,
            from_ms=window.from_ms,
            until_ms=window.until_ms,
            run_id=run_id if scope.is_per_run else "",
            top_ups=top_ups,
        )
        self._events.append(event)
        bucket = Bucket.of(event) if bucket is None else bucket.copy()
        bucket.set(event)
        self._changed[key] = bucket
        self._closed.discard(key)
        return bucket

    def lacks(self, opened: Iterable[tuple[str, Bucket, Budget]], amounts: tuple[int, ...]) -> list[Lack]:
        """Return the buckets without room, the most decisive first; each by its first meter that is too small."""
        found = [
            Lack(key, bucket, budget, METERS[at], amounts[at])
            for key, bucket, budget in opened
            if (at := bucket.lacking(amounts)) is not None
        ]
        return sorted(found, key=lambda lack: -_STRENGTH[lack.budget.on_exceed])

    def reserve(self, keys: Iterable[str], amounts: Amounts) -> None:
        """Count what an event sets aside."""
        for key in keys:
            self._own(key).reserve(amounts)

    def settle(
        self, keys: Iterable[str], reserved: Amounts, used_micros: int, used: Amounts, *, is_run_over: bool
    ) -> None:
        """Count the end of a reservation, as an event says it; alert; close the buckets that nothing can come to any more."""
        for key in keys:
            bucket = self._own(key)
            bucket.settle(reserved, used_micros, used)
            budget = self._budgets.named(bucket.budget)
            if budget is not None and budget.alerts:
                self._events += self._alerts(key, bucket, budget.alerts)
            self._close_if_over(key, bucket, is_run_over=is_run_over)

    def release(self, names: Mapping[str, Any], attempt: Attempt, *, is_run_over: bool) -> None:
        """Say that what was set aside for an attempt is free; close the buckets that nothing can come to any more."""
        keys = self.open_of(attempt)
        if keys:
            self._events.append(ev.BudgetsReleased(**names, buckets=keys, amounts=attempt.amounts))
            for key in keys:
                bucket = self._own(key)
                bucket.release(attempt.amounts)
                self._close_if_over(key, bucket, is_run_over=is_run_over)

    def open_of(self, attempt: Attempt) -> tuple[str, ...]:
        """Return the buckets in which something is set aside for an attempt: all that it has, for they do not close before."""
        return tuple([key for key in attempt.buckets if self.get(key) is not None])

    def _close_if_over(self, key: str, bucket: Bucket, *, is_run_over: bool) -> None:
        if is_run_over if bucket.run_id else 0 < bucket.until_ms <= self._now_ms:
            self.close(key)

    def close(self, key: str) -> None:
        """Forget a bucket whose window or run is over, if nothing is set aside in it."""
        bucket = self.get(key)
        if bucket is not None and not bucket.open:
            self._closed.add(key)
            self._events.append(ev.BudgetClosed(account=bucket.account, bucket=key, spent=amounts_of(bucket.spent)))

    def close_buckets(self, run_id: str) -> None:
        """Forget the buckets of a run, or of a family by the run at its top, that is over: those in which nothing is set aside."""
        keys = set(self._ledger.of_run.get(run_id, ()))
        keys.update(key for key, bucket in self._changed.items() if bucket.run_id == run_id)
        for key in sorted(keys):
            self.close(key)

    def _alerts(self, key: str, bucket: Bucket, percents: Iterable[int]) -> Iterator[Any]:
        for at, limit in tight(bucket.limits):
            if not limit:
                continue
            meter = METERS[at]
            reached = bucket.spent[at] * 100 // limit
            told = bucket.alerted.get(meter, 0)
            for percent in percents:
                if told < percent <= reached:
                    alert = ev.BudgetAlerted(
                        account=bucket.account,
                        bucket=key,
                        budget=bucket.budget,
                        meter=meter,
                        percent=percent,
                        spent=bucket.spent[at],
                        limit=limit,
                    )
                    bucket.alert(alert)
                    yield alert

    def seen(self, account: str, run_id: str, workflow: str, tags: Mapping[str, str]) -> dict[str, Any]:
        """Return what the budgets of a run have counted, by budget, for rules to look at."""
        found: dict[str, Any] = {}
        for scope in self._budgets.scopes(account, workflow, tags):
            bucket = self.get(scope.bucket(run_id, self._now_ms)[0])
            spent = UNUSED if bucket is None else bucket.spent
            reserved = UNUSED if bucket is None else bucket.reserved
            found[scope.budget.budget] = dict(zip(METERS, spent, strict=True)) | {"reserved_micros": reserved[0]}
        return found


def amounts_of(values: tuple[int, ...]) -> Amounts:
    """Return amounts from what stands in the order of METERS."""
    micros, input_tokens, output_tokens, calls, wall_ms = values
    return Amounts(micros=micros, input_tokens=input_tokens, output_tokens=output_tokens, calls=calls, wall_ms=wall_ms)
