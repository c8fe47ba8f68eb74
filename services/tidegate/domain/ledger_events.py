"""Facts about decisions, money and placements: what `gate-ledger` holds. Written by the gate only.

Every record here has an Avro schema of the same name inside `schemas/avro/LedgerEntry.v1.avsc`.
"""

from __future__ import annotations

import msgspec

from tidegate.domain.entry import TAG_FIELD
from tidegate.domain.messages import Call


class RunOpened(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunOpened", tag_field=TAG_FIELD):
    """A run may ask for attempts. budget_micros: its own limit, null for none."""

    account: str
    run_id: str
    budget_micros: int | None
    workflow: str
    tags: dict[str, str]


class AttemptReserved(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptReserved", tag_field=TAG_FIELD):
    """Policy allowed the attempt and its money is set aside. approved_by: who approved it, empty if nobody had to."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    approved_by: str


class AttemptRefused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptRefused", tag_field=TAG_FIELD):
    """Policy or budget denied the attempt (the decision `deny`)."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str


class ApprovalHeld(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalHeld", tag_field=TAG_FIELD):
    """The attempt is held until a human approves exactly these arguments (the decision `require_approval`)."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    arguments_hash: str
    call: Call


class AttemptQueued(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptQueued", tag_field=TAG_FIELD):
    """The attempt is allowed but no executor of its queue has a free slot: it waits, first come first served."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    call: Call


class AttemptPlaced(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptPlaced", tag_field=TAG_FIELD):
    """The attempt belongs to this executor incarnation for good, and is told to it (the decision `allow`)."""

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


class AttemptSettled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptSettled", tag_field=TAG_FIELD):
    """The reservation ended with what was spent. overshoot_micros: what it cost beyond the reservation."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    reserved_micros: int
    actual_micros: int
    overshoot_micros: int


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
)
