"""What services say to each other. Every record here has an Avro schema of the same name in `schemas/avro`.

JSON values (inputs, arguments, outputs) travel as canonical JSON text. Money is integer micro-dollars (`_micros`), time is
Unix milliseconds (`_ms`).
"""

from __future__ import annotations

import msgspec

from tidegate.domain.entry import TAG_FIELD, Position


class Call(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an executor is to do for a step, and what the gate judges.

    kind: `step`, `agent` or `tool`. arguments: canonical JSON; for a step its input, for an agent its State, for a tool an
    object of arguments. reserve_micros: what to set aside before it runs. idempotent: whether it may be repeated when the
    outcome of an attempt is unknown. provider, model, operation: what it uses, as declared; limits, rules and prices look at
    them. prefer: the instance that should run it if it has a free slot; several, the first first, with commas between them.
    agent: whose turn it is, or who called the tool; empty for a step. max_input_tokens, max_output_tokens: the most that one
    attempt uses; 0 if not said. queue: whose executors have the function; empty for a tool that somebody outside
    does.
    """

    kind: str
    function: str
    queue: str
    arguments: str
    timeout_ms: int
    reserve_micros: int
    idempotent: bool
    provider: str = ""
    model: str = ""
    operation: str = ""
    prefer: str = ""
    agent: str = ""
    max_input_tokens: int = 0
    max_output_tokens: int = 0

    @property
    def is_outside(self) -> bool:
        """Tell whether no executor does it, but whoever posts its answer: the gate judges it, and nothing is entered."""
        return not self.queue and self.kind == "tool"

    @property
    def preferred(self) -> list[str]:
        """Return the instances that should run it, the first first."""
        return self.prefer.split(",") if self.prefer else []


class Amounts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How much of everything that budgets count: money, tokens, calls, time that functions ran."""

    micros: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    calls: int = 0
    wall_ms: int = 0


NOTHING = Amounts()


class Lease(msgspec.Struct, frozen=True, gc=False):
    """A place under a limit: its name, the value of its key, and the ledger partition that decides on it."""

    partition: int
    limit: str
    key: str

    @property
    def label(self) -> str:
        """Return what people call it."""
        return f"{self.limit}[{self.key}]" if self.key else self.limit


class RunCommand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A validated wish (`run-commands`), written by admission, one per request, or told by another run.

    type: `start`, `cancel`, `approve`, `reject`, `respond`, `signal`, `pause`, `resume`, or `refuse` (a start that admission
    found wrong: `code` and `reason` say why). A run starts and cancels the runs that do its steps (such a start names
    parent_run_id and parent_step_id), and they tell it `child_ended`, with status, output, code and reason. source:
    `topic:partition:offset` of the request, or of the entry that tells it. original: the request's bytes, for the dead letter
    if it is refused (cut to a bound). content_hash: SHA-256 of the canonical request, to tell a repeated start from another one
    with its id. attempt, why, question: of the question that is answered; 0 and empty if the answer does not name them. value:
    canonical JSON, the answer or the event's payload. event, key: the event's name and correlation key; a null key fits every wait
    of the name.
    paused: whether the run that starts is paused from its beginning. prefer: the instance that should run its steps; empty for any.
    """

    run_id: str
    command_id: str
    type: str
    source: str
    content_hash: str
    original: bytes
    account: str = ""
    workflow: str = ""
    definition_hash: str = ""
    definition: str = ""
    input: str = "null"
    budget_micros: int | None = None
    tags: dict[str, str] = {}
    step_id: str = ""
    by: str = ""
    reason: str = ""
    code: str = ""
    at_ms: int = 0
    attempt: int = 0
    why: str = ""
    value: str = "null"
    event: str = ""
    key: str | None = None
    priority: int = 5
    failure_mode: str = ""
    parent_run_id: str = ""
    parent_step_id: str = ""
    status: str = ""
    output: str = ""
    paused: bool = False
    question: str = ""
    prefer: str = ""


# --- scheduler to gate ---------------------------------------------------------------


class OpenRun(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="OpenRun", tag_field=TAG_FIELD):
    """A run begins. budget_micros: the most that its steps and the runs below it may cost together; null for no limit of its own.

    priority: 0 to 9, more goes first among the runs of its account root. request_id: the command that started it.
    parent_run_id: the run that it does a step of; empty for none.
    has_children: whether steps of it may be runs.
    """

    budget_micros: int | None
    workflow: str
    tags: dict[str, str]
    priority: int = 5
    request_id: str = ""
    parent_run_id: str = ""
    has_children: bool = False


class Authorise(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Authorise", tag_field=TAG_FIELD):
    """May this attempt run, and where?"""

    step_id: str
    attempt: int
    call: Call


class Approve(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Approve", tag_field=TAG_FIELD):
    """A human allowed the attempt that the gate holds for approval. Good for exactly these arguments."""

    step_id: str
    attempt: int
    by: str
    arguments_hash: str


class Settle(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Settle", tag_field=TAG_FIELD):
    """The attempt ended and cost this much. outcome: as in `StepResult`; circuit breakers count it.

    used: the rest of what it used; its `micros` are `actual_micros`, not said twice.
    """

    step_id: str
    attempt: int
    actual_micros: int
    outcome: str = ""
    used: Amounts = NOTHING


class Release(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Release", tag_field=TAG_FIELD):
    """The attempt ended and is known or taken to have cost nothing: lost, handed back or refused by a full executor."""

    step_id: str
    attempt: int
    reason: str


class Void(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Void", tag_field=TAG_FIELD):
    """The attempt is no longer wanted: forget it if it waits, abort it if it runs."""

    step_id: str
    attempt: int


class CloseRun(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="CloseRun", tag_field=TAG_FIELD):
    """The run ended; nothing further will be authorised for it."""


GateItem = OpenRun | Authorise | Approve | Settle | Release | Void | CloseRun


class GateRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that one run entry tells the gate (`gate-requests`), in order."""

    run_id: str
    account: str
    source: Position
    items: tuple[GateItem, ...]


# --- gate to scheduler ---------------------------------------------------------------


class Allowed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Allowed", tag_field=TAG_FIELD):
    """The attempt was placed on this executor incarnation, which alone may run it.

    redact: paths of arguments that projections must not show. isolation: how it must be run; empty for as usual.
    """

    step_id: str
    attempt: int
    reserved_micros: int
    rule: str
    policy: str
    instance_id: str
    incarnation: int
    redact: tuple[str, ...] = ()
    isolation: str = ""


class Denied(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Denied", tag_field=TAG_FIELD):
    """The attempt must not run. rule: the policy rule, `budget`, `limit` or `queue_full`. retry_after_ms: when asking again
    may help; 0 if that is not known. values: what the rule looked at, canonical JSON or empty."""

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    retry_after_ms: int = 0
    values: str = ""


class ApprovalRequired(
    msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="ApprovalRequired", tag_field=TAG_FIELD
):
    """A human must approve these exact arguments first, until `expires_at_ms` (0: whenever)."""

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    arguments_hash: str
    expires_at_ms: int = 0
    values: str = ""


class Lost(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Lost", tag_field=TAG_FIELD):
    """The incarnation that held the attempt is gone. Final for this placement."""

    step_id: str
    attempt: int
    instance_id: str
    incarnation: int
    reason: str


class Throttled(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Throttled", tag_field=TAG_FIELD):
    """The attempt is allowed, but waits. cause: `limit`, `rate`, `breaker`, `no_executor` or `queue`. Said once per attempt.

    limit, key: which limit, and for which value of its key. position: how many stood before it, from 0; -1 if not known.
    retry_at_ms: when it may go on at the earliest; 0 if that depends on others.
    """

    step_id: str
    attempt: int
    cause: str
    limit: str
    key: str
    reason: str
    position: int
    retry_at_ms: int


class BudgetPaused(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="BudgetPaused", tag_field=TAG_FIELD):
    """The attempt waits for room in a budget: for a top-up, for what others give back, or for the window to turn.

    until_ms: when the window turns, 0 if it does not.
    """

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str
    until_ms: int


class Unanswered(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Unanswered", tag_field=TAG_FIELD):
    """Nobody answered the question about the attempt in time. It will not run; nobody said no either."""

    step_id: str
    attempt: int
    rule: str
    policy: str
    reason: str


class Answered(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="Answered", tag_field=TAG_FIELD):
    """The question about the attempt needs no answer any more: a budget has room for it now. by: the document that made it so."""

    step_id: str
    attempt: int
    by: str
    reason: str


DecisionItem = Allowed | Denied | ApprovalRequired | Lost | Throttled | BudgetPaused | Unanswered | Answered


class GateDecision(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that one ledger entry tells the scheduler about one run (`gate-decisions`), in order."""

    run_id: str
    source: Position
    items: tuple[DecisionItem, ...]


# --- gate to gate ---------------------------------------------------------------


class LeaseAsk(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseAsk", tag_field=TAG_FIELD):
    """The attempt needs all of these leases, which the receiver decides on, or none."""

    account: str
    run_id: str
    step_id: str
    attempt: int
    priority: int
    leases: tuple[Lease, ...]


class LeaseGrant(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseGrant", tag_field=TAG_FIELD):
    """The attempt has the leases that it asked the sender for, until they are returned."""

    run_id: str
    step_id: str
    attempt: int


class LeaseWait(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseWait", tag_field=TAG_FIELD):
    """The attempt stands in line at the sender. The fields are those of `Throttled`."""

    run_id: str
    step_id: str
    attempt: int
    cause: str
    limit: str
    key: str
    reason: str
    position: int
    retry_at_ms: int


class LeaseRefusal(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseRefusal", tag_field=TAG_FIELD):
    """The limit refuses instead of letting wait: the attempt is denied."""

    run_id: str
    step_id: str
    attempt: int
    limit: str
    key: str
    reason: str
    retry_after_ms: int


class LeaseReturn(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="LeaseReturn", tag_field=TAG_FIELD):
    """The attempt needs the receiver's leases no more, whether it has them or waits. outcome: how it ended, if it ran."""

    run_id: str
    step_id: str
    attempt: int
    outcome: str


LeaseItem = LeaseAsk | LeaseGrant | LeaseWait | LeaseRefusal | LeaseReturn


class GateLeases(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that one ledger entry tells another ledger partition about leases (`gate-leases`), in order."""

    source: Position
    items: tuple[LeaseItem, ...]


# --- gate to executors ---------------------------------------------------------------


class StepTask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Authorised work for one executor incarnation (`step-tasks.QUEUE`). type: `run` or `cancel`.

    result_partition: where the result goes in `step-results`. idempotency_key: the same for all attempts of the step.
    isolation: how it must be run; empty for as usual. An executor that does not know the word refuses the task. rule, policy: what
    allowed it; `default` and empty if no rule was about it. reserved_micros: what is set aside for it.
    """

    type: str
    run_id: str
    step_id: str
    attempt: int
    account: str
    instance_id: str
    incarnation: int
    source: Position
    result_partition: int
    idempotency_key: str
    call: Call | None
    isolation: str = ""
    rule: str = ""
    policy: str = ""
    reserved_micros: int = 0


class StepResult(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How an attempt ended (`step-results`).

    outcome: `succeeded`, `failed`, `timed_out`, `died` (where the function ran ended without an answer), `cancelled`, `released`
    (drained before it began) or `busy` (no free slot).
    output: canonical JSON, empty unless it succeeded. retryable: false if a repetition cannot help (bad arguments, say).
    actual_micros: what it cost. usage: tokens and calls by name. goto: the node to go on with, if the step chose one. change: the
    nodes and edges that it proposes to add to the run's graph, JSON; empty for none.
    retry_after_ms: how long whoever refused it wants to be left alone; 0 if that was not said. code_version: of the code that
    was entered; empty if none was, or if it has none.
    """

    run_id: str
    step_id: str
    attempt: int
    account: str
    instance_id: str
    incarnation: int
    outcome: str
    output: str = ""
    error_class: str = ""
    error_message: str = ""
    retryable: bool = True
    actual_micros: int = 0
    usage: dict[str, int] = {}
    started_ms: int = 0
    finished_ms: int = 0
    goto: str = ""
    retry_after_ms: int = 0
    change: str = ""
    code_version: str = ""


# --- everybody ---------------------------------------------------------------


class Running(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An attempt that an executor holds right now, and the ledger partition that placed it there."""

    run_id: str
    step_id: str
    attempt: int
    ledger_partition: int = 0


class EndedIncarnation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Proof, given at registration, that an older incarnation of the same instance cannot run any more."""

    incarnation: int
    evidence: str


class FunctionDetail(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an executor says of a function it offers. schema: JSON Schema of its arguments as text, empty if too long."""

    name: str
    version: str = ""
    description: str = ""
    schema: str = ""


class Instance(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A process's line in `instances`, keyed by instance id: first a registration, then heartbeats, last a farewell.

    state: `ready`, `draining` or `gone`. incarnation: -1 in a registration, whose own offset it then is. task_partition and
    task_offset: from where an executor reads its tasks, read before registering. marks: highest task position (rank) seen
    per ledger partition. ended: older incarnations proven dead. functions: what an executor offers, `kind:name`.
    details: more about them, bounded, because every heartbeat repeats it.
    """

    instance_id: str
    service: str
    incarnation: int
    state: str
    host: str
    boot_id: str
    pid: int
    pid_started: float
    started_ms: int
    at_ms: int
    queue: str = ""
    slots: int = 0
    task_partition: int = 0
    task_offset: int = 0
    free_slots: int = 0
    running: tuple[Running, ...] = ()
    marks: dict[str, int] = {}
    ended: tuple[EndedIncarnation, ...] = ()
    functions: tuple[str, ...] = ()
    version: str = ""
    details: tuple[FunctionDetail, ...] = ()


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What could not be used (`dead-letters`), keyed `topic:partition:offset` of the original.

    code: a stable word (`malformed`, `unknown_workflow`, `too_large`, …). original: the value's bytes, cut to a bound;
    original_size tells the true size.
    """

    topic: str
    partition: int
    offset: int
    service: str
    code: str
    reason: str
    run_id: str
    original: bytes
    original_size: int
    original_key: bytes
    headers: dict[str, bytes]
    at_ms: int


class WorkflowPublished(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A workflow definition (`workflows`), keyed `name@version`. definition: canonical JSON; hash: its SHA-256, hex."""

    name: str
    version: str
    definition_hash: str
    definition: str
    by: str
    at_ms: int


class Control(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Whether a queue is paused (`controls`), keyed by the queue, or by `*` for everything."""

    queue: str
    paused: bool
    by: str
    reason: str
    at_ms: int


class PolicyPublished(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A document of the gate (`policies`): a policy, a budget and so on. document: canonical JSON.

    policy_id: its key, a policy's name or `kind:name`.
    """

    policy_id: str
    version: str
    document: str
    by: str
    at_ms: int
