"""Facts about runs: what `run-events` holds. Written by the scheduler only.

Every record here has an Avro schema of the same name inside the newest `schemas/avro/RunEntry.v*.avsc`.
"""

from __future__ import annotations

import msgspec

from tidegate.domain.entry import TAG_FIELD
from tidegate.domain.messages import Call


class RunStarted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunStarted", tag_field=TAG_FIELD):
    """The run exists. It carries its definition, so that nothing published later can change what it does.

    failure_mode: instead of the definition's; empty for that. parent_run_id, parent_step_id: the step of another run that this
    one is done for; empty if somebody asked for it. prefer: the instance that should run its steps; empty for any.
    """

    command_id: str
    content_hash: str
    source: str
    workflow: str
    definition_hash: str
    definition: str
    input: str
    budget_micros: int | None
    tags: dict[str, str]
    priority: int = 5
    failure_mode: str = ""
    parent_run_id: str = ""
    parent_step_id: str = ""
    prefer: str = ""


class RunRefused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunRefused", tag_field=TAG_FIELD):
    """A start was wrong and its run id was new: the run ends before it began, with the reason.

    original: the request's bytes, for the dead letter; empty if admission has written that already.
    """

    command_id: str
    content_hash: str
    source: str
    code: str
    reason: str
    original: bytes


class CommandRefused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="CommandRefused", tag_field=TAG_FIELD):
    """A command did not apply. It changes nothing; `original` goes to the dead letters."""

    command_id: str
    type: str
    source: str
    code: str
    reason: str
    original: bytes


class StepReady(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="StepReady", tag_field=TAG_FIELD):
    """A step exists and its first attempt is asked of the gate. wave: longest distance from the start of the run.

    held: it is not asked yet, because the run or the queue is paused; `AttemptRequested` follows when that is over.
    """

    step_id: str
    node_id: str
    wave: int
    call: Call
    held: bool = False


class AttemptRequested(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptRequested", tag_field=TAG_FIELD
):
    """A further attempt (from 2), or the first of a step that was held, is asked of the gate."""

    step_id: str
    attempt: int
    call: Call


class AttemptHeld(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptHeld", tag_field=TAG_FIELD):
    """The next attempt is due, but it is not asked of the gate while the run or the queue is paused.

    attempt: the one that it would be. why: `run` or `queue`.
    """

    step_id: str
    attempt: int
    why: str


class AttemptDispatched(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptDispatched", tag_field=TAG_FIELD
):
    """The gate allowed and placed the attempt."""

    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    instance_id: str
    incarnation: int
    redact: tuple[str, ...] = ()
    isolation: str = ""


class StepThrottled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="StepThrottled", tag_field=TAG_FIELD):
    """The gate lets the attempt wait, and says why: see `Throttled` in `messages.py`."""

    step_id: str
    attempt: int
    cause: str
    limit: str
    key: str
    reason: str
    position: int
    retry_at_ms: int


class AttemptAwaitsBudget(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptAwaitsBudget", tag_field=TAG_FIELD
):
    """A budget has no room for the attempt now; the gate holds it until it has. until_ms: when its window turns, 0 for never."""

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    until_ms: int


class ApprovalRequested(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalRequested", tag_field=TAG_FIELD
):
    """A human is asked. why: `policy` (the gate holds the attempt), `outcome_unknown` (it may already have had its effect) or
    `change` (the attempt has ended, and the change of the graph that it proposes is to be decided on).

    values: what the rule looked at, canonical JSON or empty. expires_at_ms: when the question lapses, 0 for never.
    """

    step_id: str
    attempt: int
    why: str
    rule: str
    policy: str
    reason: str
    arguments_hash: str
    expires_at_ms: int = 0
    values: str = ""


class ApprovalResolved(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalResolved", tag_field=TAG_FIELD
):
    """A human answered the open approval of this attempt; or the gate did (command_id is empty), because a budget that asked has
    room now: then `by` names the document that made it.

    answer: to a question about an unknown outcome `done` (its output is given), `again` or `fail`; else empty.
    """

    command_id: str
    step_id: str
    attempt: int
    why: str
    approved: bool
    by: str
    reason: str
    arguments_hash: str
    answer: str = ""


class ApprovalExpired(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalExpired", tag_field=TAG_FIELD):
    """Nobody answered the open approval of this attempt in time. That is no denial; the step fails all the same."""

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str


class WaitStarted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="WaitStarted", tag_field=TAG_FIELD):
    """A step exists that runs nothing: it waits for an event, a time or a person's answer. wave: as in `StepReady`.

    kind: `wait_event`, `wait_until`, `sleep`, `ask` or `outside`, a tool that somebody outside does. input: canonical JSON; the
    output of a wait for a time, the arguments of a tool. function: the tool; then key is the id that the model gave the call.
    event, key: name and correlation key of the event. prompt, choices, free_text, schema: the question, and what counts as an
    answer (schema: JSON text; empty for none). due_ms: when it ends by itself. timeout_at_ms: when it is given up; on_timeout:
    `fail`, or `value` for going on with timeout_value. after_ms, timeout_ms: what those times were reckoned from, in `now_ms` of
    the entry.
    """

    step_id: str
    node_id: str
    wave: int
    kind: str
    input: str
    event: str = ""
    key: str = ""
    prompt: str = ""
    choices: tuple[str, ...] = ()
    free_text: bool = False
    schema: str = ""
    after_ms: int | None = None
    due_ms: int | None = None
    timeout_ms: int | None = None
    timeout_at_ms: int | None = None
    on_timeout: str = "fail"
    timeout_value: str = "null"
    function: str = ""


class WaitEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="WaitEnded", tag_field=TAG_FIELD):
    """A wait is over; what follows says whether its step succeeded.

    outcome: `due` (its time came), `signalled`, `answered`, `rejected` (whoever does the outside tool could not) or `timed_out`.
    command_id, by, reason: of an answer. signal_seq: seq
    of the kept `SignalReceived` that it took; 0 for none.
    """

    step_id: str
    outcome: str
    command_id: str = ""
    by: str = ""
    reason: str = ""
    signal_seq: int = 0


class SignalReceived(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="SignalReceived", tag_field=TAG_FIELD):
    """Somebody sent the run an event. key: correlation key; null for whatever waits for this name. payload: canonical JSON.

    step_id: the wait that it ends; empty if none was open: then it is kept for the first wait that it fits.
    """

    command_id: str
    event: str
    key: str | None
    payload: str
    by: str
    step_id: str


class AttemptEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="AttemptEnded", tag_field=TAG_FIELD):
    """An attempt ended without success.

    outcome: `failed`, `timed_out`, `released`, `busy`, `lost`, `denied`, `expired` (its approval; the answer crossed the gate's
    clock) or `proposed` (it did what it should; whether its step succeeds depends on the change that it proposes).
    retry_at_ms: when the next attempt is due; null if there is none (yet). started_ms, finished_ms: when it ran, 0 if it did
    not. rule, policy, values: of a denial. retry_rule: the rule for its error class that counts it, if there is one.
    retry_document: the retry document, `name@version`, by which it was decided whether there is a next attempt; empty if it was
    by the settings of the function itself. code_version: of the code that was entered, as its executor says; or empty.
    """

    step_id: str
    attempt: int
    outcome: str
    error_class: str
    error_message: str
    actual_micros: int
    usage: dict[str, int]
    retry_at_ms: int | None
    instance_id: str
    incarnation: int
    started_ms: int = 0
    finished_ms: int = 0
    rule: str = ""
    policy: str = ""
    values: str = ""
    retry_rule: str = ""
    retry_document: str = ""
    code_version: str = ""


class StepSucceeded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="StepSucceeded", tag_field=TAG_FIELD):
    """The step has its output, for good.

    attempt: 0 if no attempt gave it, because the step is a wait or a human gave the output. given_by: that human; else empty.
    goto: the node that it wants to go on with, one of its node's routes; or empty. code_version: of the code that gave it, as its
    executor says; or empty.
    """

    step_id: str
    attempt: int
    output: str
    actual_micros: int
    usage: dict[str, int]
    instance_id: str
    incarnation: int
    started_ms: int
    finished_ms: int
    given_by: str = ""
    goto: str = ""
    code_version: str = ""


class StepFailed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="StepFailed", tag_field=TAG_FIELD):
    """The step will not succeed. code: `attempts_exhausted`, `not_retryable`, `denied`, `rejected`, `bad_plan`, …"""

    step_id: str
    code: str
    reason: str


class StepCancelled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="StepCancelled", tag_field=TAG_FIELD):
    """The step is not wanted any more. attempt: the one that the gate is told to void; 0 if none is out."""

    step_id: str
    attempt: int


class ResultIgnored(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ResultIgnored", tag_field=TAG_FIELD):
    """A result came too late to count. What it cost is settled all the same: spent is spent."""

    step_id: str
    attempt: int
    outcome: str
    actual_micros: int
    reason: str
    instance_id: str
    incarnation: int
    usage: dict[str, int] = {}
    started_ms: int = 0
    finished_ms: int = 0


class RunCancelRequested(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunCancelRequested", tag_field=TAG_FIELD
):
    """Somebody cancelled the run."""

    command_id: str
    by: str
    reason: str


class RunPaused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunPaused", tag_field=TAG_FIELD):
    """Somebody paused the run: nothing new is asked of the gate until it is resumed. What runs may end."""

    command_id: str
    by: str
    reason: str


class RunResumed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunResumed", tag_field=TAG_FIELD):
    """Somebody resumed the run; what was held is asked for now."""

    command_id: str
    by: str
    reason: str


class RunFinished(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="RunFinished", tag_field=TAG_FIELD):
    """The run is over. status: `succeeded`, `failed` or `cancelled`. fingerprint: see `fingerprint.py`."""

    status: str
    output: str
    code: str
    reason: str
    fingerprint: str


class NodeJoined(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="NodeJoined", tag_field=TAG_FIELD):
    """The node begins although not every edge that leads to it was taken, or is decided: its join needed no more.

    used: the nodes that count, whose outputs it sees. What comes later is recorded and not used.
    """

    node_id: str
    visit: int
    used: tuple[str, ...]


class NodeSkipped(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="NodeSkipped", tag_field=TAG_FIELD):
    """No step will run for the node. reason: `not_taken` (nothing leads to it) or `upstream_failed`."""

    node_id: str
    visit: int
    wave: int
    reason: str


class NodeSucceeded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="NodeSucceeded", tag_field=TAG_FIELD):
    """A node that is no single step has its output: a router, or a map whose items are all done."""

    node_id: str
    visit: int
    wave: int
    output: str


class NodeFailed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="NodeFailed", tag_field=TAG_FIELD):
    """The node failed and the run goes on. tolerated: its definition says that this does not count against the run."""

    node_id: str
    visit: int
    wave: int
    code: str
    reason: str
    tolerated: bool


class PathsChosen(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="PathsChosen", tag_field=TAG_FIELD):
    """Which edges of the node are taken, of one that has conditions or routes. The others are not.

    back_to: the node that its router goes back to, if it does; then nothing else is decided.
    """

    node_id: str
    visit: int
    targets: tuple[str, ...]
    back_to: str


class LoopEntered(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LoopEntered", tag_field=TAG_FIELD):
    """What lies between a router and the node that it goes back to begins anew, in its next visit."""

    node_id: str
    router: str
    visit: int


class MapStarted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="MapStarted", tag_field=TAG_FIELD):
    """The node runs its function for each of these items (canonical JSON), a few at a time, in this order."""

    node_id: str
    visit: int
    wave: int
    items: tuple[str, ...]


class ChildStarted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ChildStarted", tag_field=TAG_FIELD):
    """The step is another run, of a workflow that this run's definition holds. It is told to start.

    paused: it is told to start paused, because this run is. prefer: the instance that should run its steps, as of this run's.
    """

    step_id: str
    node_id: str
    wave: int
    child_run_id: str
    workflow: str
    definition_hash: str
    definition: str
    input: str
    budget_micros: int | None
    tags: dict[str, str]
    failure_mode: str
    priority: int
    paused: bool = False
    prefer: str = ""


class ChildPaused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ChildPaused", tag_field=TAG_FIELD):
    """The run that does this step is told to pause, or to resume, because this run was."""

    step_id: str
    child_run_id: str
    paused: bool


class ChildEnded(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ChildEnded", tag_field=TAG_FIELD):
    """The run that does this step told that it is over. status: as of a run."""

    command_id: str
    step_id: str
    child_run_id: str
    status: str
    output: str
    code: str
    reason: str


class ChildCancelled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ChildCancelled", tag_field=TAG_FIELD):
    """The run that does this step is told to cancel."""

    step_id: str
    child_run_id: str
    reason: str


class EndReported(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="EndReported", tag_field=TAG_FIELD):
    """The run that this one was done for is told how it ended; the output is that of the `RunFinished` beside it."""

    parent_run_id: str
    parent_step_id: str
    status: str
    code: str
    reason: str


class GraphChangeProposed(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="GraphChangeProposed", tag_field=TAG_FIELD
):
    """A step wants to have nodes and edges added to the run's graph, or, as a plan or a turn of a flow, calls made.

    kind: `graph`, `plan` or `flow`. nodes: the nodes that it adds; of a plan or a flow, the steps of all its calls. change: as
    canonical JSON `nodes`, `edges` and `because`; empty of a plan, whose calls stand in the output, and of what cannot be read.
    held: a person decides; output and goto are then what the step gives besides, for when that is done.
    """

    step_id: str
    node_id: str
    attempt: int
    kind: str
    nodes: tuple[str, ...]
    change: str = ""
    held: bool = False
    output: str = ""
    goto: str = ""


class GraphChangeAccepted(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="GraphChangeAccepted", tag_field=TAG_FIELD
):
    """What the step proposed is part of the run from here on. kind, nodes: as proposed; of a plan, the calls that can be made.

    graph_hash: SHA-256 of the nodes and edges as they are then; empty of a plan.
    """

    step_id: str
    kind: str
    nodes: tuple[str, ...]
    graph_hash: str = ""


class GraphChangeRejected(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="GraphChangeRejected", tag_field=TAG_FIELD
):
    """What the step proposed is not done. kind: as proposed. nodes: of a plan, the calls that cannot be made.

    code: `evolution_disabled`, `invalid`, `too_large`, `too_many`, `conflict` (it does not go together with an earlier change, of
    step conflicts_with), `rejected` (by a person), `expired` (nobody decided in time) or `bad_calls` (of a plan).
    """

    step_id: str
    kind: str
    code: str
    reason: str
    conflicts_with: str = ""
    nodes: tuple[str, ...] = ()


RunEvent = (
    RunStarted
    | RunRefused
    | CommandRefused
    | StepReady
    | AttemptRequested
    | AttemptDispatched
    | ApprovalRequested
    | ApprovalResolved
    | AttemptEnded
    | StepSucceeded
    | StepFailed
    | StepCancelled
    | ResultIgnored
    | RunCancelRequested
    | RunFinished
    | AttemptHeld
    | ApprovalExpired
    | WaitStarted
    | WaitEnded
    | SignalReceived
    | RunPaused
    | RunResumed
    | StepThrottled
    | NodeJoined
    | NodeSkipped
    | NodeSucceeded
    | NodeFailed
    | PathsChosen
    | LoopEntered
    | MapStarted
    | ChildStarted
    | ChildPaused
    | ChildEnded
    | ChildCancelled
    | EndReported
    | AttemptAwaitsBudget
    | GraphChangeProposed
    | GraphChangeAccepted
    | GraphChangeRejected
)
