"""Facts about decisions, money and placements: what `gate-ledger` holds. Written by the gate only.

Every record here has an Avro schema of the same name inside the newest `schemas/avro/LedgerEntry.v*.avsc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tidegate.domain.entry import TAG_FIELD
from tidegate.domain.messages import NOTHING, Amounts, Call, Lease


class RunOpened(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunOpened", tag_field=TAG_FIELD):
    """A run may ask for attempts. budget_micros: its own limit, null for none, which bounds it and all runs below it together.

    request_id: the command that started it. parent_run_id: the run that it does a step of; empty for none.
    has_children: whether steps of it may be runs.
    """

    account: str
    run_id: str
    budget_micros: int | None
    workflow: str
    tags: dict[str, str]
    priority: int = 5
    request_id: str = ""
    parent_run_id: str = ""
    has_children: bool = False


class AttemptReserved(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptReserved", tag_field=TAG_FIELD):
    """Policy allowed the attempt and its money is set aside. approved_by: who approved it, empty if nobody had to.

    amounts: all that is set aside in its budgets, nothing if it has none. basis: where the amount of money comes from:
    `declared`, `price:…` (with the version of the price table), `history`, or empty (there is none). buckets: the budget
    buckets that it is set aside in. redact, isolation: what the rules demand. values: what the deciding
    rule looked at, canonical JSON; empty if none matched. counts: this event sets the amounts aside in the buckets; of earlier
    versions, a BudgetReserved for each did. exceeds: those of the buckets whose limits a human let it go beyond.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    approved_by: str
    amounts: Amounts = NOTHING
    basis: str = ""
    buckets: tuple[str, ...] = ()
    redact: tuple[str, ...] = ()
    isolation: str = ""
    values: str = ""
    counts: bool = False
    exceeds: tuple[str, ...] = ()


class AttemptRefused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptRefused", tag_field=TAG_FIELD):
    """Policy, budget, limit or a full queue denied the attempt (the decision `deny`).

    values: what the rule looked at, canonical JSON or empty. redact: paths of arguments that projections must not show.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    retry_after_ms: int = 0
    values: str = ""
    redact: tuple[str, ...] = ()


class ApprovalHeld(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalHeld", tag_field=TAG_FIELD):
    """The attempt is held until a human approves exactly these arguments (the decision `require_approval`).

    expires_at_ms: when the question lapses, 0 for never. exceeds: the buckets that an approval lets this attempt exceed; empty
    if it was a rule that asked. approved_by: who has answered a rule's question about it before; empty if nobody.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    arguments_hash: str
    call: Call
    values: str = ""
    expires_at_ms: int = 0
    exceeds: tuple[str, ...] = ()
    redact: tuple[str, ...] = ()
    approved_by: str = ""


class AttemptQueued(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptQueued", tag_field=TAG_FIELD):
    """The attempt is allowed, but there is no free slot or no room under a limit: it waits. Once more if its limits changed.

    leases: what it needs besides a slot; `{instance}` in a key stands for the executor that it will be placed on.
    limits_version: the version of the limits in force that they follow from.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    call: Call
    leases: tuple[Lease, ...] = ()
    limits_version: int = 0


class AttemptPlaced(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptPlaced", tag_field=TAG_FIELD):
    """The attempt belongs to this executor incarnation for good, and is told to it (the decision `allow`).

    leases: held from here until it is settled, released or lost. queued_ms: since when it waited; 0 if it did not.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    instance_id: str
    incarnation: int
    task_partition: int
    call: Call
    leases: tuple[Lease, ...] = ()
    queued_ms: int = 0
    redact: tuple[str, ...] = ()
    isolation: str = ""


class AttemptGranted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptGranted", tag_field=TAG_FIELD):
    """The attempt is reserved and placed at once (the decision `allow`): AttemptReserved and AttemptPlaced in one.

    Whatever waits between the two has both instead. The fields are theirs; what is set aside is set aside in all `buckets`.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    approved_by: str
    instance_id: str
    incarnation: int
    task_partition: int
    call: Call
    amounts: Amounts = NOTHING
    basis: str = ""
    buckets: tuple[str, ...] = ()
    exceeds: tuple[str, ...] = ()
    leases: tuple[Lease, ...] = ()
    redact: tuple[str, ...] = ()
    isolation: str = ""
    values: str = ""


# What sets aside for an attempt, and what places it: one event does both where nothing is waited for in between.
Reserving = AttemptReserved | AttemptGranted
Placing = AttemptPlaced | AttemptGranted


class AttemptSettled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptSettled", tag_field=TAG_FIELD):
    """The reservation ended with what was spent. overshoot_micros: what it cost beyond the reservation.

    used: the rest of what was used; its `micros` are `actual_micros`. basis: empty if the executor reported the amount,
    `price:…` if it reported tokens only and the price table says what they cost. buckets: those of budgets in which `set_aside`
    is no longer set aside and what was used is spent; of earlier versions, a BudgetSettled for each said that.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    actual_micros: int
    overshoot_micros: int
    used: Amounts = NOTHING
    basis: str = ""
    buckets: tuple[str, ...] = ()
    set_aside: Amounts = NOTHING


class AttemptReleased(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptReleased", tag_field=TAG_FIELD):
    """The reservation ended with nothing spent; a held or waiting attempt ended without ever being placed."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    reason: str


class AttemptCancelTold(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptCancelTold", tag_field=TAG_FIELD
):
    """The executor that holds the attempt is told to abort it. Its money stays reserved until it reports or is lost."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    queue: str
    instance_id: str
    incarnation: int
    task_partition: int


class PlacementLost(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="PlacementLost", tag_field=TAG_FIELD):
    """The incarnation that held the attempt is gone. Final for this placement; the reservation ends with the run's answer."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    instance_id: str
    incarnation: int
    reason: str


class RunClosed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunClosed", tag_field=TAG_FIELD):
    """The run ended. settled_micros: all that it spent so far."""

    account: str
    run_id: str
    settled_micros: int


class FamilyOver(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="FamilyOver", tag_field=TAG_FIELD):
    """Nothing can change any more about this run, those above it and those below it: it is forgotten, what it spent with it.

    Once for each run of the family, in one entry. A run that is alone is forgotten without it, as soon as it can be.
    """

    account: str
    run_id: str


class AttemptThrottled(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptThrottled", tag_field=TAG_FIELD
):
    """The waiting attempt is told why (the decision `throttle`). Once per attempt; the fields are those of `Throttled`."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    cause: str
    limit: str
    key: str
    reason: str
    position: int
    retry_at_ms: int


# --- leases of other partitions: at the partition that needs them -------------------------------------


class LeasesAsked(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeasesAsked", tag_field=TAG_FIELD):
    """The waiting attempt asks another ledger partition for leases. instance_id: where it is to run, if a lease names that."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    priority: int
    leases: tuple[Lease, ...]
    instance_id: str
    local: tuple[Lease, ...]


class LeasesGranted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeasesGranted", tag_field=TAG_FIELD):
    """The other partition gave the leases."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int


class LeasesReturned(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeasesReturned", tag_field=TAG_FIELD):
    """The attempt gives back what it has of, or asked for at, another partition. outcome: how it ended, if it ran."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    outcome: str
    reason: str


# --- leases for other partitions: at the partition that decides on them -------------------------------


class LeaseHeard(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseHeard", tag_field=TAG_FIELD):
    """An attempt of another partition stands in line for leases. The fields from `cause` on: why it waits, empty if not."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    priority: int
    leases: tuple[Lease, ...]
    cause: str = ""
    limit: str = ""
    key: str = ""
    reason: str = ""
    position: int = 0
    retry_at_ms: int = 0


class LeaseGiven(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseGiven", tag_field=TAG_FIELD):
    """It has them."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    leases: tuple[Lease, ...]


class LeaseRefused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseRefused", tag_field=TAG_FIELD):
    """It cannot have them, and shall not wait."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    limit: str
    key: str
    reason: str
    retry_after_ms: int


class LeaseEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseEnded", tag_field=TAG_FIELD):
    """It gave them back, or left the line."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    partition: int
    outcome: str


# --- limits and queues ---------------------------------------------------------------


class TokenTaken(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="TokenTaken", tag_field=TAG_FIELD):
    """A start was counted by a rate. until_us: when the bucket is full again if nobody takes more, Unix microseconds."""

    limit: str
    key: str
    until_us: int


class FailureCounted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="FailureCounted", tag_field=TAG_FIELD):
    """A breaker that is closed counted a failure. keep: of its latest failures, this one included, how many still matter."""

    limit: str
    key: str
    keep: int


class BreakerOpened(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BreakerOpened", tag_field=TAG_FIELD):
    """Nothing more is let through until `until_ms`; then a few probes decide."""

    limit: str
    key: str
    until_ms: int
    reason: str


class BreakerClosed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BreakerClosed", tag_field=TAG_FIELD):
    """A probe succeeded."""

    limit: str
    key: str


class LimitForgotten(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LimitForgotten", tag_field=TAG_FIELD):
    """Nothing that is known of this value of the limit's key matters any more."""

    limit: str
    key: str


class ScaleOutWanted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ScaleOutWanted", tag_field=TAG_FIELD):
    """Work of a queue has waited for a slot for a while, or (`wanted` false) does so no more. Once per change."""

    queue: str
    wanted: bool
    waiting: int
    slots: int


class ApprovalLapsed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalLapsed", tag_field=TAG_FIELD):
    """Nobody answered in time: the hold ends. Not a denial, and it does not come back."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str


class QuestionAnswered(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="QuestionAnswered", tag_field=TAG_FIELD
):
    """A budget asked about the attempt, and needs no answer any more: it has room now, or does not count the run.

    by: the document that made it so: `topup:NAME`, or `budget:NAME@VERSION`, without a version if it was removed.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    by: str
    reason: str


class AttemptPaused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptPaused", tag_field=TAG_FIELD):
    """A budget has no room for the attempt now: it waits, first come first served, with nothing set aside.

    bucket: the one that has no room; `family:RUN` if it waits for that run, which is above its own, to be open. until_ms: when
    its window turns, 0 for never. approved_by: who has answered a rule's question about it before; empty if nobody. redact:
    paths of arguments that projections must not show.
    """

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    bucket: str
    until_ms: int
    call: Call
    values: str = ""
    approved_by: str = ""
    redact: tuple[str, ...] = ()


class Ceilings(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The most that a bucket may hold of each; null for no limit."""

    micros: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    calls: int | None = None
    wall_ms: int | None = None


class BudgetSet(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetSet", tag_field=TAG_FIELD):
    """A bucket of a budget begins, or its limits are others from here on: another version, or a top-up.

    bucket: `budget|account|window`. account: the path that it counts for, below it everything. from_ms, until_ms: its window;
    until 0 for no end. run_id: the only run that it counts, empty for all. top_ups: the ids of those that are in the limits.
    """

    account: str
    bucket: str
    budget: str
    version: str
    limits: Ceilings
    on_exceed: str
    from_ms: int
    until_ms: int
    run_id: str = ""
    top_ups: tuple[str, ...] = ()


class BudgetReserved(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetReserved", tag_field=TAG_FIELD):
    """An attempt's amounts are set aside in a bucket. exceeds: whether a human let it go beyond the limits.

    Of earlier versions: AttemptReserved says it now, for all its buckets.
    """

    account: str
    bucket: str
    run_id: str
    step_id: str
    attempt: int
    amounts: Amounts
    exceeds: bool = False


class BudgetSettled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetSettled", tag_field=TAG_FIELD):
    """An attempt's reservation in a bucket ended: `reserved` is no longer set aside, `used` is spent (nothing if released).

    Of earlier versions: AttemptSettled and BudgetsReleased say it now, for all buckets of the attempt.
    """

    account: str
    bucket: str
    run_id: str
    step_id: str
    attempt: int
    reserved: Amounts
    used: Amounts


class BudgetsReleased(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetsReleased", tag_field=TAG_FIELD):
    """An attempt ended and used nothing: what its buckets had set aside for it is free."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    buckets: tuple[str, ...]
    amounts: Amounts


class BudgetAlerted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetAlerted", tag_field=TAG_FIELD):
    """What a bucket spent reached a threshold, for the first time. meter: which of the amounts; percent: of its limit."""

    account: str
    bucket: str
    budget: str
    meter: str
    percent: int
    spent: int
    limit: int


class BudgetClosed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetClosed", tag_field=TAG_FIELD):
    """The bucket's window (or its run) is over and nothing is set aside in it: it is forgotten. spent: all that it came to."""

    account: str
    bucket: str
    spent: Amounts


class UsageLearned(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="UsageLearned", tag_field=TAG_FIELD):
    """What attempts of a function used on average so far, for the next estimate. function: `|kind:name`."""

    account: str
    function: str
    count: int
    mean: Amounts


class CarriedAttempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An attempt that has not ended, as it is carried forward. amounts: what each of the buckets holds for it."""

    step_id: str
    attempt: int
    status: str
    reserved_micros: int
    buckets: tuple[str, ...]
    amounts: Amounts


class CarriedRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A run that the ledger still knows, as it is carried forward: what it may spend, has set aside and has spent."""

    account: str
    run_id: str
    budget_micros: int | None
    reserved_micros: int
    settled_micros: int
    closed: bool
    parent_run_id: str
    has_children: bool
    attempts: tuple[CarriedAttempt, ...]


class CarriedBucket(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a bucket of a budget counted, as it is carried forward. open: how many reservations in it have not ended."""

    account: str
    bucket: str
    limits: Ceilings
    reserved: Amounts
    spent: Amounts
    open: int


class CarriedUnit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A unit of the ledger with all that its owner needs to know of it, in the owner's own form."""

    unit: str
    state: bytes


class LedgerCarried(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LedgerCarried", tag_field=TAG_FIELD):
    """All that the partition's ledger says up to here: who reads it from here on needs no entry before this one.

    runs, buckets: the money, for everybody to read. units: the whole state, for the next owner. policy: the document
    (`name@version`) that asked for it; by: who published that.
    """

    policy: str
    by: str
    runs: tuple[CarriedRun, ...]
    buckets: tuple[CarriedBucket, ...]
    units: tuple[CarriedUnit, ...]


LedgerEvent = (
    RunOpened
    | AttemptReserved
    | AttemptRefused
    | ApprovalHeld
    | AttemptQueued
    | AttemptPlaced
    | AttemptSettled
    | AttemptReleased
    | AttemptCancelTold
    | PlacementLost
    | RunClosed
    | AttemptThrottled
    | LeasesAsked
    | LeasesGranted
    | LeasesReturned
    | LeaseHeard
    | LeaseGiven
    | LeaseRefused
    | LeaseEnded
    | TokenTaken
    | FailureCounted
    | BreakerOpened
    | BreakerClosed
    | LimitForgotten
    | ScaleOutWanted
    | ApprovalLapsed
    | AttemptPaused
    | BudgetSet
    | BudgetReserved
    | BudgetSettled
    | BudgetAlerted
    | BudgetClosed
    | UsageLearned
    | LedgerCarried
    | FamilyOver
    | QuestionAnswered
    | BudgetsReleased
    | AttemptGranted
)


def carried_by(events: Sequence[Any]) -> LedgerCarried | None:
    """Return what an entry with these events carries forward; None if it does not. Foreign entries may have no events at all."""
    return events[0] if events and isinstance(events[0], LedgerCarried) else None
