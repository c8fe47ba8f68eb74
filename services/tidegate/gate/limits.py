"""Limits: how many at once, how many a second, and circuit breakers. Pure: documents and a folded ledger in, room and events out.

A limit is a document of the topic `policies` with `kind: limit`. It counts per value of a key: of the account, of the
provider and so on. A `Lease` names one such counter and the ledger partition that decides on it: one partition for each, so
that no two owners can give away the same place. Leases are held by attempts and end with them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tidegate.domain import expressions
from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import NAME_PATTERN, partition_of
from tidegate.domain.messages import Lease
from tidegate.gate.documents import Document
from tidegate.gate.ledger import Ledger
from tidegate.gate.rule_index import MAX_KNOWN, Conditions
from tidegate.gate.state import Gauge
from tidegate.gate.variables import PLAIN, Subject, Variables

INSTANCE_PLACE: Final = "{instance}"  # in a key: the executor, which is known only when one was found
MAX_KEY: Final = 256
MAX_LEASES: Final = 16  # of one attempt
T = TypeVar("T")
US: Final = 1_000_000
NO_GAUGE: Final = Gauge()
GAUGES_LOOKED_AT: Final = 16
UNTRIED_MS: Final = 3_600_000  # an open breaker that nobody has tried for so long after its time counts as closed

Part = Literal[
    "account", "workflow", "node", "run", "instance", "provider", "model", "operation", "function", "queue", "kind"
]
# What belongs to one account root is decided where its runs are: no message to another partition is needed.
_LOCAL: Final = frozenset(("account", "run"))


class LimitError(ValueError):
    """A limit cannot be evaluated on a step."""


class _Document(Document):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Breaker(BaseModel):
    """Opens after `failures` failed attempts within `window_s`, for `open_s`; then `probes` at a time show whether it helps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    failures: int = Field(ge=1, le=100)
    window_s: float = Field(default=60.0, gt=0, le=86_400)
    open_s: float = Field(default=30.0, gt=0, le=86_400)
    probes: int = Field(default=1, ge=1, le=100)
    while_open: Literal["wait", "deny"] = "wait"


class Limit(_Document):
    """How many of the steps that it is about may run at once, or start in a second, for each value of its key.

    where: names of step variables and the text (or one of the texts) that they must have. when: CEL over the same variables
    as policies, true for what the limit is about. per: what it counts by; nothing for one count of everything. A part that
    a step does not have (no provider was declared) exempts it. key: CEL, a text to count by besides `per`. account_level: how
    many names of the account path count, 0 for all.
    """

    KIND: ClassVar[str] = "limit"
    NAME_FIELD: ClassVar[str] = "limit"

    kind: Literal["limit"]
    limit: str = Field(pattern=NAME_PATTERN)
    where: dict[str, str | list[str]] = Field(default={}, max_length=16)
    when: str = ""
    per: list[Part] = Field(default=[], max_length=8)
    key: str = ""
    account_level: int = Field(default=0, ge=0, le=8)
    at_once: int | None = Field(default=None, ge=1, le=1_000_000)
    rate_per_s: float | None = Field(default=None, ge=1e-5, le=100_000)
    burst: int = Field(default=1, ge=1, le=100_000)
    breaker: Breaker | None = None

    @field_validator("when", "key")
    @classmethod
    def _compiles(cls, value: str) -> str:
        if value:
            expressions.compile_expression(value)
        return value

    @field_validator("where")
    @classmethod
    def _is_known(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(value) - _TEXTS):
            raise ValueError(f"no such variable: {', '.join(unknown)}; there are {', '.join(sorted(_TEXTS))}")
        return value

    @model_validator(mode="after")
    def _limits_something(self) -> Limit:
        if self.at_once is None and self.rate_per_s is None and self.breaker is None:
            raise ValueError("it limits nothing: give at_once, rate_per_s or breaker")
        if self.rate_per_s is None and "burst" in self.model_fields_set:
            raise ValueError("burst means something only together with rate_per_s")
        if self.account_level and "account" not in self.per:
            raise ValueError("account_level means something only with `account` in `per`")
        return self

    @cached_property
    def interval_us(self) -> int:
        """Return the time in which one token comes back, in microseconds; 0 without a rate."""
        return 0 if self.rate_per_s is None else max(1, round(US / self.rate_per_s))

    @cached_property
    def is_local(self) -> bool:
        """Tell whether all that it counts together belongs to one account root."""
        return not _LOCAL.isdisjoint(self.per)

    @property
    def looks_at(self) -> frozenset[str]:
        """Return the variables that decide what a step needs under it."""
        names = set(self.where)
        names.update(_SOURCES.get(part, part) for part in self.per)
        if "node" in self.per:
            names.add("workflow")
        for source in (self.when, self.key):
            if source:
                names.update(expressions.variables_of(source))
        return frozenset(names - {""})

    def covers(self, variables: Variables) -> bool:
        """Tell whether it is about the step. Raises LimitError if `when` cannot be evaluated."""
        for name, wanted in self.where.items():
            if variables.get(name) not in ((wanted,) if isinstance(wanted, str) else wanted):
                return False
        if not self.when:
            return True
        answer = _conditions(self.when).hold(variables.get)
        return _evaluated(self, "when", self.when, bool, variables) if answer is None else answer

    def value(self, variables: Variables) -> str | None:
        """Return the value of its key for a step; None if the step lacks a part of it. Raises LimitError."""
        parts = []
        for part in self.per:
            text = _part(part, self.account_level, variables)
            if not text:
                return None
            parts.append(text)
        if self.key:
            parts.append(_evaluated(self, "key", self.key, str, variables))
        text = "|".join(parts)
        if len(text) > MAX_KEY:
            raise LimitError(f"limit {self.limit}: its key has {len(text)} characters, {MAX_KEY} are allowed")
        return text


_TEXTS: Final = frozenset(
    (
        "kind",
        "name",
        "tool",
        "queue",
        "step",
        "node",
        "account",
        "workflow",
        "version",
        "provider",
        "model",
        "operation",
    )
)


# Where a part of a key is not the variable of the same name.
_SOURCES: Final[dict[str, str]] = {"function": "name", "instance": ""}
# A limit's `when` taken apart; there are few, and each is asked about every attempt.
_conditions = lru_cache(maxsize=4096)(Conditions.of)


def _part(part: Part, level: int, variables: Variables) -> str:
    get = variables.get
    if part == "account":
        account = str(get("account"))
        return "/".join(account.split("/")[:level]) if level else account
    if part == "run":
        return str(get("run")["id"])
    if part == "instance":
        return INSTANCE_PLACE
    if part == "node":
        return f"{get('workflow')}/{get('node')}"
    return str(get(_SOURCES.get(part, part)))


def _evaluated(limit: Limit, field: str, source: str, kind: type[T], variables: Variables) -> T:
    try:
        value = variables.evaluate(source)
    except expressions.ExpressionError as error:
        raise LimitError(f"limit {limit.limit}: `{field}` could not be evaluated: {error}") from None
    if not isinstance(value, kind):
        wanted = "true or false" if kind is bool else "a text"
        raise LimitError(f"limit {limit.limit}: `{field}` gave {type(value).__name__} instead of {wanted}")
    return value


class Queue(_Document):
    """How much may wait for the executors of a queue, and how fast more may come.

    Counted in each ledger partition by itself, so a gate of n partitions takes up to n times as much. on_full: `reject`
    denies with `queue_full` and when to come again; `wait` lets wait all the same, and says so.
    """

    KIND: ClassVar[str] = "queue"
    NAME_FIELD: ClassVar[str] = "queue"

    kind: Literal["queue"]
    queue: str = Field(pattern=NAME_PATTERN)
    depth: int | None = Field(default=None, ge=1, le=1_000_000)
    rate_per_s: float | None = Field(default=None, ge=1e-5, le=100_000)
    burst: int = Field(default=100, ge=1, le=100_000)
    on_full: Literal["reject", "wait"] = "reject"

    @model_validator(mode="after")
    def _limits_something(self) -> Queue:
        if self.depth is None and self.rate_per_s is None:
            raise ValueError("it limits nothing: give depth or rate_per_s")
        return self

    @cached_property
    def interval_us(self) -> int:
        """Return the time in which one token comes back, in microseconds; 0 without a rate."""
        return 0 if self.rate_per_s is None else max(1, round(US / self.rate_per_s))


class LimitSet:
    """All limits and queues in force. `version` grows with each change of them, so that what waits can be judged anew."""

    __slots__ = ("_known", "_limits", "_looking_closer", "_plain", "partitions", "queues", "version")

    def __init__(self, documents: Iterable[Limit | Queue] = (), partitions: int = 1, version: int = 0) -> None:
        self._limits = {doc.limit: doc for doc in documents if isinstance(doc, Limit)}
        self.queues = {doc.queue: doc for doc in documents if isinstance(doc, Queue)}
        self.partitions = partitions
        self.version = version
        # What most limits look at is the same for most steps: what these need is looked up by it.
        self._plain = [limit for limit in self._limits.values() if limit.looks_at.issubset(PLAIN)]
        self._looking_closer = [limit for limit in self._limits.values() if not limit.looks_at.issubset(PLAIN)]
        self._known: dict[tuple[int, tuple[str, ...]], tuple[Lease, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._limits)

    def get(self, name: str) -> Limit | None:
        """Return the limit of that name, if one is in force."""
        return self._limits.get(name)

    def is_local(self, lease: Lease) -> bool:
        """Tell whether all that hold the lease belong to one account root."""
        limit = self._limits.get(lease.limit)
        return limit is not None and limit.is_local

    def leases(self, subject: Subject, own_partition: int) -> tuple[Lease, ...]:
        """Return what a step needs under all limits, in the order in which it must be asked for. Raises LimitError.

        The order is by partition first: an attempt waits at one partition only while what it holds is of lower ones, so no
        two can wait for each other. To limits, budgets have counted nothing.
        """
        inputs = (own_partition, subject.plain)
        found = self._known.get(inputs)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            variables = Variables.of_step(subject)
            found = self._known[inputs] = _in_order(self._needed(self._plain, variables, own_partition))
        if self._looking_closer:
            variables = Variables.of_step(subject)
            found = _in_order([*found, *self._needed(self._looking_closer, variables, own_partition)])
        if len(found) > MAX_LEASES:
            raise LimitError(f"{len(found)} limits cover this step, {MAX_LEASES} are allowed")
        return found

    def _needed(self, limits: Iterable[Limit], variables: Variables, own_partition: int) -> list[Lease]:
        return [
            Lease(self._partition(limit, value, own_partition), limit.limit, value)
            for limit in limits
            if limit.covers(variables) and (value := limit.value(variables)) is not None
        ]

    def _partition(self, limit: Limit, value: str, own_partition: int) -> int:
        return own_partition if limit.is_local else partition_of(f"{limit.limit}:{value}", self.partitions)

    def on_instance(self, leases: tuple[Lease, ...], instance_id: str, own_partition: int) -> tuple[Lease, ...]:
        """Return the leases with the executor put in where they name one; without those of limits that are gone since."""
        if not [lease for lease in leases if INSTANCE_PLACE in lease.key]:
            return leases
        found = []
        for lease in leases:
            limit = self.get(lease.limit)
            if INSTANCE_PLACE not in lease.key:
                found.append(lease)
            elif limit is not None:
                value = lease.key.replace(INSTANCE_PLACE, instance_id)
                found.append(Lease(self._partition(limit, value, own_partition), lease.limit, value))
        return _in_order(found)


def _in_order(leases: Iterable[Lease]) -> tuple[Lease, ...]:
    return tuple(sorted(leases, key=lambda lease: (lease.partition, lease.limit, lease.key)))


class Obstacle(NamedTuple):
    """Why there is no room. cause: `limit`, `rate` or `breaker`. retry_at_ms: 0 if it depends on what others do."""

    lease: Lease
    cause: str
    reason: str
    retry_at_ms: int
    denies: bool = False


class Desk:
    """The limits of one ledger partition while one decision is made: what is taken and given back in it counts at once.

    soonest_ms: when the first of the obstacles that were met goes away by itself; 0 if none does.
    """

    __slots__ = ("_gauges", "_more", "freed", "ledger", "limits", "now_ms", "soonest_ms")

    def __init__(self, ledger: Ledger, limits: LimitSet, now_ms: int) -> None:
        self.ledger = ledger
        self.limits = limits
        self.now_ms = now_ms
        self.soonest_ms = 0
        self._more: dict[Lease, int] = {}  # how many hold a lease, than before this decision
        self.freed: dict[Lease, None] = {}  # what became free in this decision
        self._gauges: dict[Lease, Gauge] = {}

    def is_ours(self, lease: Lease) -> bool:
        """Tell whether this partition decides on the lease."""
        return lease.partition == self.ledger.partition

    def has_all_here(self, leases: Iterable[Lease]) -> bool:
        """Tell whether this partition decides on all of them, whatever executor is chosen."""
        here, is_alone = self.ledger.partition, self.limits.partitions == 1
        return not [
            lease for lease in leases if lease.partition != here or (INSTANCE_PLACE in lease.key and not is_alone)
        ]

    def held(self, lease: Lease) -> int:
        """Return how many hold the lease now."""
        return self.ledger.held.get(lease, 0) + self._more.get(lease, 0)

    def obstacle(self, leases: Iterable[Lease]) -> Obstacle | None:
        """Return the first of our leases that has no room; those that wait for an executor to be chosen are passed over."""
        here = self.ledger.partition
        for lease in leases:
            if lease.partition == here and INSTANCE_PLACE not in lease.key:
                found = self._obstacle(lease)
                if found is not None:
                    if found.retry_at_ms and not 0 < self.soonest_ms < found.retry_at_ms:
                        self.soonest_ms = found.retry_at_ms
                    return found
        return None

    def _obstacle(self, lease: Lease) -> Obstacle | None:
        limit = self.limits.get(lease.limit)
        if limit is None:
            return None  # it is not in force any more
        breaker = limit.breaker
        if breaker is not None and (gauge := self._gauge(lease)).open_until_ms:
            denies = breaker.while_open == "deny"
            if self.now_ms < gauge.open_until_ms:
                return Obstacle(lease, "breaker", f"{lease.label} is open: {gauge.why}", gauge.open_until_ms, denies)
            if (held := self.held(lease)) >= breaker.probes:
                return Obstacle(lease, "breaker", f"{lease.label} is being tried with {held} at a time", 0, denies)
        if limit.at_once is not None and self.held(lease) >= limit.at_once:
            return Obstacle(lease, "limit", f"{lease.label} allows {limit.at_once} at once", 0)
        if limit.rate_per_s is not None and (wait_us := self._wait_us(self._gauge(lease), limit)) > 0:
            at_ms = self.now_ms + -(-wait_us // 1000)
            return Obstacle(lease, "rate", f"{lease.label} allows {limit.rate_per_s:g} a second", at_ms)
        return None

    def _gauge(self, lease: Lease) -> Gauge:
        return self._gauges.get(lease) or self.ledger.gauges.get((lease.limit, lease.key), NO_GAUGE)

    def _full_at_us(self, gauge: Gauge, limit: Limit | Queue) -> int:
        """Return when the bucket is full again. It was never more than empty, whatever rate was in force before."""
        until_us = min(gauge.until_us, gauge.taken_us + limit.burst * limit.interval_us)
        return max(until_us, self.now_ms * 1000)

    def _wait_us(self, gauge: Gauge, limit: Limit | Queue) -> int:
        """Return how long until a whole token is in the bucket; 0 or less if one is."""
        return self._full_at_us(gauge, limit) - self.now_ms * 1000 - (limit.burst - 1) * limit.interval_us

    def take(self, leases: Iterable[Lease]) -> list[Any]:
        """Take those that are ours, and return the events of the tokens that this costs."""
        events: list[Any] = []
        here, more = self.ledger.partition, self._more
        for lease in leases:
            if lease.partition != here:
                continue
            more[lease] = more.get(lease, 0) + 1
            limit = self.limits.get(lease.limit)
            if limit is not None and limit.rate_per_s is not None:
                events += self._take_token(lease, limit)
        return events

    def _take_token(self, lease: Lease, limit: Limit | Queue) -> list[Any]:
        gauge = self._gauge(lease)
        until_us = self._full_at_us(gauge, limit) + limit.interval_us
        self._gauges[lease] = Gauge(until_us, gauge.failures_ms, gauge.open_until_ms, gauge.why, self.now_ms * 1000)
        events: list[Any] = [ev.TokenTaken(limit=lease.limit, key=lease.key, until_us=until_us)]
        if (lease.limit, lease.key) not in self.ledger.gauges:
            events += self._forgettable()
        return events

    def _forgettable(self) -> list[Any]:
        """Return the end of at most two gauges that say nothing any more. Asked for whenever one comes to be, this keeps
        them as few as there are values in use, and is cheap."""
        events: list[Any] = []
        for (name, key), gauge in self.ledger.oldest_gauges(GAUGES_LOOKED_AT):
            limit = self.limits.get(name)
            window_ms = 0 if limit is None or limit.breaker is None else int(limit.breaker.window_s * 1000)
            latest_ms = gauge.failures_ms[-1] + window_ms if gauge.failures_ms else 0
            open_ms = gauge.open_until_ms and gauge.open_until_ms + UNTRIED_MS
            is_idle = gauge.until_us <= self.now_ms * 1000 and max(latest_ms, open_ms) < self.now_ms
            is_new = any(lease.limit == name and lease.key == key for lease in self._gauges)
            if is_idle and not is_new and len(events) < 2:
                events.append(ev.LimitForgotten(limit=name, key=key))
        return events

    def free(self, leases: Iterable[Lease]) -> None:
        """Count places that become free in this decision."""
        for lease in leases:
            if self.is_ours(lease):
                self._more[lease] = self._more.get(lease, 0) - 1
                self.freed[lease] = None

    # -- queues ---------------------------------------------------------------

    def admission(self, queue: str, depth: int) -> tuple[str, int, list[Any]]:
        """Return why nothing more may join the queue (empty if it may), when to come again, and the events of joining."""
        limit = self.limits.queues.get(queue)
        if limit is None:
            return "", 0, []
        if limit.depth is not None and depth >= limit.depth:
            return f"{depth} wait in queue {queue}, which takes {limit.depth}", 1000, []
        if limit.rate_per_s is None:
            return "", 0, []
        lease = Lease(self.ledger.partition, f"queue:{queue}", "")
        wait_us = self._wait_us(self._gauge(lease), limit)
        if wait_us > 0:
            return f"queue {queue} takes {limit.rate_per_s:g} a second", -(-wait_us // 1000), []
        return "", 0, self._take_token(lease, limit)

    # -- breakers ---------------------------------------------------------------

    def outcome(self, leases: Iterable[Lease], outcome: str) -> list[Any]:
        """Return what an attempt's end means to the breakers among our leases."""
        events: list[Any] = []
        for lease in leases:
            limit = self.limits.get(lease.limit)
            if self.is_ours(lease) and limit is not None and limit.breaker is not None:
                event = self._judge(lease, limit.breaker, outcome)
                if event is not None:
                    events.append(event)
                    if (lease.limit, lease.key) not in self.ledger.gauges:
                        events += self._forgettable()
        return events

    def _judge(self, lease: Lease, breaker: Breaker, outcome: str) -> Any | None:
        gauge = self._gauge(lease)
        names = {"limit": lease.limit, "key": lease.key}
        if gauge.open_until_ms > self.now_ms:
            return None  # it began before the breaker opened, and says nothing new
        if outcome == "succeeded":
            if not gauge.open_until_ms:
                return None
            self._gauges[lease] = Gauge(gauge.until_us, taken_us=gauge.taken_us)
            return ev.BreakerClosed(**names)
        if outcome not in ("failed", "timed_out"):
            return None
        since_ms = self.now_ms - int(breaker.window_s * 1000)
        recent = [at_ms for at_ms in gauge.failures_ms if at_ms > since_ms]
        if not gauge.open_until_ms and len(recent) + 1 < breaker.failures:
            self._gauges[lease] = Gauge(gauge.until_us, [*recent, self.now_ms], taken_us=gauge.taken_us)
            return ev.FailureCounted(**names, keep=len(recent) + 1)
        until_ms = self.now_ms + int(breaker.open_s * 1000)
        why = "a probe failed" if gauge.open_until_ms else f"{len(recent) + 1} failures in {breaker.window_s:g} s"
        self._gauges[lease] = Gauge(gauge.until_us, [], until_ms, why, gauge.taken_us)
        return ev.BreakerOpened(**names, until_ms=until_ms, reason=why)
