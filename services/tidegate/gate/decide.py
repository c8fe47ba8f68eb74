"""What the gate decides: pure functions from (ledger, request, policies, free slots) to ledger events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tidegate.domain import canonical
from tidegate.domain import ledger_events as ev
from tidegate.domain.entry import Position
from tidegate.domain.identity import account_root
from tidegate.domain.messages import (
    NOTHING,
    Approve,
    Authorise,
    Call,
    CloseRun,
    GateRequest,
    Lease,
    OpenRun,
    Release,
    Settle,
    Void,
)
from tidegate.domain.questions import LACK_RULE
from tidegate.gate import family, lacking, leasing
from tidegate.gate.budgets import (
    MAX_LEARNED,
    NO_BUDGETS,
    Budget,
    Budgets,
    Estimate,
    Lack,
    Tally,
    TopUp,
    amounts_of,
    estimate,
    learn,
)
from tidegate.gate.lacking import Look, Scope, Spot
from tidegate.gate.leasing import LIMIT_RULE
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import Desk, LimitError, LimitSet, Obstacle
from tidegate.gate.names import FAMILY, RULE_WAIT, family_wait, learned_key, scope_of
from tidegate.gate.placement import FreeSlots
from tidegate.gate.policy import MAX_REASON, PolicySet, Verdict
from tidegate.gate.state import (
    HELD,
    MAX_SETTLED_MICROS,
    OUTSIDE,
    PLACED,
    RESERVED,
    Attempt,
    AttemptKey,
    Bucket,
    Incarnation,
    Leases,
    RunMoney,
    line_of,
    meters_of,
)
from tidegate.gate.variables import Subject, Variables
from tidegate.gate.waiting import MAX_CALLS_BYTES, Place, place_waiting, position, slot_for
from tidegate.prices import price

BUDGET_RULE: Final = "budget"
QUEUE_FULL_RULE: Final = "queue_full"
MAX_LOSSES_PER_ENTRY: Final = 500
MAX_LAPSES_PER_ENTRY: Final = 100
MAX_LOOKED_AT: Final = 500  # attempts that wait for a budget, in one decision
NO_POLICY: Final = Verdict("allow", "default", "", "no policy is in force")
NO_POSITION: Final = Position(0, 0, 0)
NO_KEY: Final = AttemptKey("", "", 0)


class _Money:
    """A run's money as it stands inside one decision."""

    __slots__ = (
        "budget_micros",
        "closed",
        "is_alone",
        "parent_run_id",
        "reserved_micros",
        "settled_micros",
        "tags",
        "workflow",
    )

    def __init__(self, run: RunMoney) -> None:
        self.parent_run_id = run.parent_run_id
        self.is_alone = run.is_alone
        self.budget_micros = run.budget_micros
        self.reserved_micros = run.reserved_micros
        self.settled_micros = run.settled_micros
        self.workflow = run.workflow
        self.tags = run.tags
        self.closed = run.closed


class Draft:
    """The events of one decision as they come, and what they change, so that later items see what earlier ones did."""

    __slots__ = (
        "_item",
        "_key",
        "_subject",
        "approved",
        "begun",
        "budgets",
        "desk",
        "ended",
        "events",
        "joined",
        "ledger",
        "money",
        "now_ms",
        "policies",
        "request",
        "slots",
        "tally",
    )

    def __init__(
        self,
        ledger: Ledger,
        request: GateRequest,
        policies: PolicySet,
        slots: FreeSlots,
        desk: Desk | None = None,
        budgets: Budgets = NO_BUDGETS,
    ) -> None:
        self.ledger = ledger
        self.request = request
        self.policies = policies
        self.slots = slots
        self.desk = Desk(ledger, LimitSet(), 0) if desk is None else desk
        self.budgets = budgets
        self.now_ms = self.desk.now_ms
        self.joined: dict[str, int] = {}  # by queue: who began to wait in this decision
        self.events: list[Any] = []
        self.tally = Tally(ledger, budgets, self.now_ms, self.events)
        self.begun: set[AttemptKey] = set()
        self.ended: set[AttemptKey] = set()
        known = ledger.runs.get(request.run_id)
        self._item: Any = None  # whose key was asked for last, and that
        self._key = NO_KEY
        self._subject: Subject | None = None
        self.approved = {} if known is None else known.approved
        self.money = None if known is None else _Money(known)

    @property
    def family(self) -> str:
        """Return the run at the top of the family, by which budgets per run count; the run itself if it is alone."""
        run_id = self.request.run_id
        return (
            run_id
            if self.money is None or not self.money.parent_run_id
            else family.root(self.ledger, run_id, self.money.parent_run_id)
        )

    def key(self, item: Any) -> AttemptKey:
        """Return the key of the attempt that an item of the request names."""
        if item is not self._item:
            key: AttemptKey = tuple.__new__(AttemptKey, (self.request.run_id, item.step_id, item.attempt))  # see `fold`
            self._item, self._key = item, key
        return self._key

    def subject(self, item: Any, call: Call, money: _Money) -> Subject:
        """Return what rules and limits look at."""
        key = self.key(item)
        if self._subject is None or self._subject.key is not key:
            self._subject = Subject.of(key, self.request.account, call, money)
        return self._subject

    def open_attempt(self, item: Any) -> Attempt | None:
        """Return the attempt if it has not ended, neither before nor in this decision."""
        key = self.key(item)
        return None if key in self.ended else self.ledger.attempts.get(key)

    def end(self, item: Any, attempt: Attempt, outcome: str = "") -> None:
        """Note that the attempt ends here: its slot and its leases are free for what follows."""
        key = self.key(item)
        self.ended.add(key)
        self.events += leasing.given_back(self.desk, key, attempt, outcome)
        if self.money is not None:
            self.money.reserved_micros -= attempt.reserved_micros
        if attempt.incarnation is not None and not attempt.lost:
            self.slots.give_back(attempt.incarnation)

    def names(self, item: Any) -> dict[str, Any]:
        """Return the fields by which every ledger event names its attempt."""
        return {
            "account": self.request.account,
            "run_id": self.request.run_id,
            "step_id": item.step_id,
            "attempt": item.attempt,
        }


def _ends_its_buckets(run: RunMoney | _Money | None) -> bool:
    """Tell whether what is set aside last for a run ends what budgets count for it: those of a family end with the family."""
    return run is None or (run.closed and run.is_alone)


def on_request(draft: Draft) -> list[Any]:
    """Return the events that a request causes, its items in order, then placements of what waited for the freed slots."""
    for item in draft.request.items:
        _ITEMS[type(item)](draft, item)
    if draft.ended:  # otherwise nothing became free
        placements = place_waiting(draft.ledger, draft.slots, draft.ended, draft.desk)
        draft.events += placements
        _free_budgets(draft.tally, draft.ledger, placements)
    return draft.events


def with_budgets_freed(ledger: Ledger, events: list[Any], budgets: Budgets, now_ms: int) -> list[Any]:
    """Return events with the ends of what those of the attempts that they refuse had set aside in budgets."""
    tally = Tally(ledger, budgets, now_ms, events)
    _free_budgets(tally, ledger, list(events))
    return events


def _free_budgets(tally: Tally, ledger: Ledger, events: list[Any]) -> None:
    """An attempt that waits for a slot or a limit may still be refused; its reservation ends with that."""
    for event in events:
        if type(event) is not ev.AttemptRefused:
            continue
        key = AttemptKey(event.run_id, event.step_id, event.attempt)
        attempt = ledger.attempts.get(key)
        if attempt is None or not attempt.buckets:
            continue
        is_run_over = _ends_its_buckets(ledger.runs.get(event.run_id))
        tally.release(leasing.names(key, event.account), attempt, is_run_over=is_run_over)


def _open_run(draft: Draft, item: OpenRun) -> None:
    if draft.money is not None:
        return
    draft.events.append(
        ev.RunOpened(
            account=draft.request.account,
            run_id=draft.request.run_id,
            budget_micros=item.budget_micros,
            workflow=item.workflow,
            tags=item.tags,
            priority=item.priority,
            request_id=item.request_id,
            parent_run_id=item.parent_run_id,
            has_children=item.has_children,
        )
    )
    draft.money = _Money(
        RunMoney(
            draft.request.account,
            item.budget_micros,
            item.workflow,
            item.tags,
            parent_run_id=item.parent_run_id,
            has_children=item.has_children,
        )
    )


def _close_run(draft: Draft, item: CloseRun) -> None:
    if draft.money is None or draft.money.closed:
        return
    draft.money.closed = True
    draft.events.append(
        ev.RunClosed(
            account=draft.request.account, run_id=draft.request.run_id, settled_micros=draft.money.settled_micros
        )
    )
    if draft.money.is_alone:
        draft.tally.close_buckets(draft.request.run_id)


# --- authorise ---------------------------------------------------------------


def _authorise(draft: Draft, item: Authorise) -> None:
    key = draft.key(item)
    if key in draft.begun or key in draft.ledger.attempts:
        return  # its place, its money or its question is there already; a second one would be entered twice
    draft.begun.add(key)
    if draft.money is None or draft.money.closed:
        _refuse(draft, item, "unknown_run", "", "the run is not open at the gate")
        return
    _judge_and_reserve(draft, item, item.call, draft.money)


def _judge_and_reserve(draft: Draft, item: Any, call: Call, money: _Money) -> None:
    """Ask the rules, then the budgets, then for a place."""
    verdict = _verdict(draft, item, call, money)
    approved_by = ""
    if verdict.effect == "require_approval":
        approved_by = _approved_by(draft, item, call)
        if not approved_by:
            expires_at_ms = draft.now_ms + verdict.expires_s * 1000 if verdict.expires_s else 0
            _ask(draft, item, call, verdict, expires_at_ms)
            return
    if verdict.effect == "deny":
        _refuse(draft, item, verdict.rule, verdict.policy, verdict.reason, values=verdict.values, redact=verdict.redact)
        return
    _reserve_and_place(draft, item, call, verdict, approved_by)


def _approved_by(draft: Draft, item: Any, call: Call) -> str:
    """Return who allowed the step with these arguments before; empty if nobody did."""
    arguments, approved_by = draft.approved.get(item.step_id, ("", ""))
    return approved_by if arguments == call.arguments else ""


def _ask(draft: Draft, item: Any, call: Call, verdict: Verdict, expires_at_ms: int, **more: Any) -> None:
    draft.events.append(
        ev.ApprovalHeld(
            **draft.names(item),
            rule=verdict.rule,
            policy=verdict.policy,
            reason=verdict.reason,
            arguments_hash=canonical.digest(call.arguments),
            call=call,
            values=verdict.values,
            expires_at_ms=expires_at_ms,
            redact=verdict.redact,
            **more,
        )
    )


def _verdict(draft: Draft, item: Any, call: Call, money: _Money) -> Verdict:
    if not draft.policies:
        return NO_POLICY
    subject = draft.subject(item, call, money)._replace(spent=lambda: _counted(draft, money))
    return draft.policies.judge(Variables.of_step(subject))


def _counted(draft: Draft, money: _Money) -> dict[str, Any]:
    return draft.tally.seen(draft.request.account, draft.family, money.workflow.partition("@")[0], money.tags)


def _refuse(
    draft: Draft,
    item: Any,
    rule: str,
    policy: str,
    reason: str,
    retry_after_ms: int = 0,
    values: str = "",
    redact: tuple[str, ...] = (),
) -> None:
    draft.events.append(
        ev.AttemptRefused(
            **draft.names(item),
            rule=rule,
            policy=policy,
            reason=reason[:MAX_REASON],
            retry_after_ms=retry_after_ms,
            values=values,
            redact=redact,
        )
    )
    if draft.key(item) in draft.ledger.attempts:  # it was held, or paused
        draft.ended.add(draft.key(item))


def _reserve_and_place(
    draft: Draft, item: Any, call: Call, verdict: Verdict, approved_by: str, exceeds: tuple[str, ...] = ()
) -> None:
    money = draft.money
    if money is None:
        _refuse(draft, item, "unknown_run", verdict.policy, "the run is not open at the gate")
        return
    above_id = family.not_open(draft.ledger, money)
    if above_id:
        _await_family(draft, item, call, above_id, verdict, "" if exceeds else approved_by)
        return
    opened, wanted, lacks = _room(draft, call, money)
    micros = wanted.amounts[0]
    no_room = family.without_room(draft.ledger, draft.request.run_id, money, micros)
    if no_room is not None:
        values = canonical.dumps(no_room.values())
        _refuse(draft, item, BUDGET_RULE, "", no_room.said(), values=values, redact=verdict.redact)
        return
    if any(lack.key not in exceeds for lack in lacks):
        # Who let it exceed other budgets answered no rule's question.
        _without_room(draft, item, call, lacks, verdict, "" if exceeds else approved_by)
        return
    entrance = _entrance(draft, item, call, verdict.redact)
    if entrance is None:
        return
    money.reserved_micros += micros
    account, run_id = draft.request.account, draft.request.run_id
    buckets = tuple([key for key, _, _ in opened])
    amounts = amounts_of(wanted.amounts) if opened else NOTHING
    draft.tally.reserve(buckets, amounts)
    reserved = {
        "account": account,
        "run_id": run_id,
        "step_id": item.step_id,
        "attempt": item.attempt,
        "reserved_micros": micros,
        "rule": verdict.rule,
        "policy": verdict.policy,
        "approved_by": approved_by,
        "amounts": amounts,
        "basis": wanted.basis,
        "buckets": buckets,
        "redact": verdict.redact,
        "isolation": verdict.isolation,
        "values": verdict.values,
        "exceeds": tuple([lack.key for lack in lacks]),
    }
    found = None if entrance.is_limited else _place_at_once(draft, account, call, entrance.leases)
    if found is None:
        draft.events.append(ev.AttemptReserved(**reserved, counts=bool(buckets)))
        _stand_in_line(draft, item, call, entrance)
        return
    place, leases = found
    draft.events += draft.desk.take(leases)
    draft.events.append(ev.AttemptGranted(**reserved, **place.fields(), call=call, leases=leases))


def _stand_in_line(draft: Draft, item: Any, call: Call, entrance: _Entrance) -> None:
    """Wait for a slot or a place, with what was reserved."""
    draft.joined[call.queue] = draft.joined.get(call.queue, 0) + 1
    draft.events.append(
        ev.AttemptQueued(
            **draft.names(item), call=call, leases=entrance.leases, limits_version=draft.desk.limits.version
        )
    )
    if entrance.obstacle is not None:
        ahead = position(draft.ledger, line_of(call), entrance.leases, account_root(draft.request.account))
        draft.events.append(leasing.throttled(draft.key(item), draft.request.account, entrance.obstacle, ahead))


def _opened(draft: Draft, money: _Money) -> list[tuple[str, Bucket, Budget]]:
    """Return the buckets that count the run now, with the limits that are in force."""
    if not draft.budgets:
        return []
    return draft.tally.opened(draft.request.account, draft.family, money.workflow.partition("@")[0], money.tags)


class _Room(NamedTuple):
    """The buckets that count an attempt, what it is expected to use, and those that have no room for that."""

    opened: list[tuple[str, Bucket, Budget]]
    wanted: Estimate
    lacks: list[Lack]


def _room(draft: Draft, call: Call, money: _Money) -> _Room:
    opened = _opened(draft, money)
    learned = draft.ledger.learned.get(learned_key(call.kind, call.function)) if opened else None
    wanted = estimate(call, learned, draft.now_ms)
    return _Room(opened, wanted, draft.tally.lacks(opened, wanted.amounts) if opened else [])


def _without_room(draft: Draft, item: Any, call: Call, lacks: list[Lack], verdict: Verdict, approved_by: str) -> None:
    """Do what the strictest of the budgets without room says."""
    lack = lacks[0]
    reason, values = lack.said(), canonical.dumps(lack.values())
    if lack.budget.on_exceed == "deny":
        _refuse(draft, item, lack.rule, lack.budget.label, reason, values=values, redact=verdict.redact)
    elif lack.budget.on_exceed == "ask":
        expires_at_ms = draft.now_ms + lack.budget.expires_s * 1000 if lack.budget.expires_s else 0
        question = Verdict("require_approval", lack.rule, lack.budget.label, reason, values, verdict.redact)
        exceeds = tuple(other.key for other in lacks)
        _ask(draft, item, call, question, expires_at_ms, exceeds=exceeds, approved_by=approved_by)
    else:
        waits = verdict._replace(rule=lack.rule, policy=lack.budget.label, reason=reason, values=values)
        _pause(draft, item, call, waits, lack.key, lack.bucket.until_ms, approved_by)


def _await_family(draft: Draft, item: Any, call: Call, above_id: str, verdict: Verdict, approved_by: str) -> None:
    """Let it wait for a run above its own: for its beginning, or for the cancellation that follows from its end."""
    reason = f"run {above_id}, which this run is a part of, is not open at the gate"
    waits = verdict._replace(rule=FAMILY, policy="", reason=reason, values="")
    _pause(draft, item, call, waits, family_wait(above_id), 0, approved_by)


def _pause(draft: Draft, item: Any, call: Call, why: Verdict, bucket: str, until_ms: int, approved_by: str) -> None:
    draft.events.append(
        ev.AttemptPaused(
            **draft.names(item),
            rule=why.rule,
            policy=why.policy,
            reason=why.reason[:MAX_REASON],
            bucket=bucket,
            until_ms=until_ms,
            call=call,
            values=why.values,
            approved_by=approved_by,
            redact=why.redact,
        )
    )


class _Entrance(NamedTuple):
    """What an attempt that may run needs besides a slot, and what is in its way. is_limited: whether that is a limit."""

    leases: tuple[Lease, ...]
    obstacle: Obstacle | None
    is_limited: bool


UNLIMITED: Final = _Entrance((), None, is_limited=False)


def _entrance(draft: Draft, item: Any, call: Call, redact: tuple[str, ...]) -> _Entrance | None:
    """Return how the attempt gets in, or None if it was refused: its queue is full, or a limit says so.

    redact: what a refusal says that nobody may see of the arguments.
    """
    desk, money = draft.desk, draft.money
    if not desk.limits and not desk.limits.queues:
        return UNLIMITED
    try:
        leases = (
            desk.limits.leases(draft.subject(item, call, money), draft.ledger.partition)
            if desk.limits and money
            else ()
        )
    except LimitError as error:
        _refuse(draft, item, LIMIT_RULE, "", f"a limit cannot be evaluated, which denies: {error}", redact=redact)
        return None
    obstacle = desk.obstacle(leases)
    is_limited = obstacle is not None
    if obstacle is not None and obstacle.denies:
        retry_after_ms = max(0, obstacle.retry_at_ms - desk.now_ms)
        _refuse(draft, item, LIMIT_RULE, "", obstacle.reason, retry_after_ms, redact=redact)
        return None
    queue = desk.limits.queues.get(call.queue)
    if queue is not None:
        depth = draft.ledger.depth.get(call.queue, 0) + draft.joined.get(call.queue, 0)
        full, retry_after_ms, tokens = desk.admission(call.queue, depth)
        if full and queue.on_full == "reject":
            _refuse(draft, item, QUEUE_FULL_RULE, "", full, retry_after_ms, redact=redact)
            return None
        draft.events += tokens
        if full and obstacle is None:
            here = Lease(draft.ledger.partition, "", "")
            obstacle = Obstacle(here, "queue", full, desk.now_ms + retry_after_ms)
    return _Entrance(leases, obstacle, is_limited)


def _place_at_once(draft: Draft, account: str, call: Call, leases: Leases) -> tuple[Place, Leases] | None:
    """Take a slot for a newcomer that no limit holds up, if nobody waits for the same function and nothing of what it needs is
    decided elsewhere; return where, and its leases there."""
    ledger, desk = draft.ledger, draft.desk
    name = line_of(call)
    if name in ledger.waiting or name in ledger.limited or not desk.has_all_here(leases):
        return None
    return slot_for(desk, draft.slots, Attempt(account, call, RESERVED, leases=leases))


def _approve(draft: Draft, item: Approve) -> None:
    attempt = draft.open_attempt(item)
    if attempt is None or attempt.status != HELD or attempt.call is None or draft.key(item) in draft.begun:
        return
    draft.begun.add(draft.key(item))
    if canonical.digest(attempt.call.arguments) != item.arguments_hash:
        _refuse(draft, item, attempt.rule, attempt.policy, "the approval was given for other arguments")
        return
    if draft.money is None or draft.money.closed:
        _refuse(draft, item, "unknown_run", "", "the run is not open at the gate")
        return
    verdict = _verdict(draft, item, attempt.call, draft.money)
    if verdict.effect == "deny":  # somebody said yes, but what is in force now says no
        _refuse(draft, item, verdict.rule, verdict.policy, verdict.reason, values=verdict.values, redact=verdict.redact)
        return
    if verdict.effect == "require_approval" and attempt.exceeds and item.step_id not in draft.approved:
        # Somebody let it exceed a budget; a rule that came into force meanwhile asks another question.
        _judge_and_reserve(draft, item, attempt.call, draft.money)
        return
    verdict = verdict._replace(rule=attempt.rule, policy=attempt.policy)
    _reserve_and_place(draft, item, attempt.call, verdict, item.by or "unnamed", attempt.exceeds)


# --- endings ---------------------------------------------------------------


def _settle(draft: Draft, item: Settle) -> None:
    attempt = draft.open_attempt(item)
    if attempt is None and not (item.actual_micros or item.used.input_tokens or item.used.output_tokens):
        return
    reserved_micros = 0 if attempt is None else attempt.reserved_micros
    call = None if attempt is None else attempt.call
    actual_micros, basis = _cost(item, call, draft.now_ms)
    buckets = _counted_now(draft) if attempt is None else draft.tally.open_of(attempt)
    set_aside = NOTHING if attempt is None else attempt.amounts
    draft.events.append(
        ev.AttemptSettled(
            account=draft.request.account,
            run_id=draft.request.run_id,
            step_id=item.step_id,
            attempt=item.attempt,
            reserved_micros=reserved_micros,
            actual_micros=actual_micros,
            overshoot_micros=max(0, actual_micros - reserved_micros),
            used=item.used,
            basis=basis,
            buckets=buckets,
            set_aside=set_aside,
        )
    )
    if draft.money is not None:
        draft.money.settled_micros = min(draft.money.settled_micros + actual_micros, MAX_SETTLED_MICROS)
    is_run_over = _ends_its_buckets(draft.money)
    draft.tally.settle(buckets, set_aside, actual_micros, item.used, is_run_over=is_run_over)
    if attempt is None:
        return
    draft.end(item, attempt, item.outcome)
    if attempt.buckets and call is not None and attempt.basis != "declared":
        _learn(draft, call, (actual_micros, *meters_of(item.used)[1:]))


def _cost(item: Settle, call: Call | None, now_ms: int) -> tuple[int, str]:
    """Return what an attempt cost, and by which prices if it is what its tokens cost: the scheduler asks the same table.

    One of an earlier version does not, and settles tokens without an amount.
    """
    used = item.used
    if call is None or not call.model or not (used.input_tokens or used.output_tokens):
        return item.actual_micros, ""
    priced = price(call.provider, call.model, used.input_tokens, used.output_tokens, now_ms)
    return (item.actual_micros, "") if priced is None or item.actual_micros not in (0, priced.micros) else priced


def _counted_now(draft: Draft) -> tuple[str, ...]:
    """Return the buckets in which the cost of an attempt counts that was given up before: its own may be over."""
    if draft.money is None:
        return ()  # nothing is known of the run any more but its account; its cost stays in the ledger
    return tuple([key for key, _, _ in _opened(draft, draft.money)])


def _learn(draft: Draft, call: Call, used: tuple[int, ...]) -> None:
    key = learned_key(call.kind, call.function)
    known = draft.ledger.learned
    if key not in known and len(known) >= MAX_LEARNED:
        return
    now = learn(known.get(key), used)
    draft.events.append(
        ev.UsageLearned(account=draft.request.account, function=key, count=now.count, mean=amounts_of(now.mean))
    )


def _release(draft: Draft, item: Release) -> None:
    attempt = draft.open_attempt(item)
    if attempt is not None:
        _released(draft, item, attempt, item.reason)


def _released(draft: Draft, item: Any, attempt: Attempt, reason: str) -> None:
    names = draft.names(item)
    draft.events.append(ev.AttemptReleased(**names, reserved_micros=attempt.reserved_micros, reason=reason))
    draft.tally.release(names, attempt, is_run_over=_ends_its_buckets(draft.money))
    draft.end(item, attempt)


def _void(draft: Draft, item: Void) -> None:
    """Forget an attempt that waits; tell the executor of one that runs. Of one that is lost, or done outside, nobody is told."""
    attempt = draft.open_attempt(item)
    if attempt is None:
        return
    life = attempt.incarnation
    if attempt.status != PLACED or attempt.lost or life is None or life == OUTSIDE or attempt.call is None:
        _released(draft, item, attempt, "void")
        return
    draft.events.append(
        ev.AttemptCancelTold(
            **draft.names(item),
            queue=attempt.call.queue,
            instance_id=life.instance_id,
            incarnation=life.incarnation,
            task_partition=attempt.task_partition,
        )
    )


_ITEMS: Final[dict[type, Callable[[Draft, Any], None]]] = {
    OpenRun: _open_run,
    CloseRun: _close_run,
    Authorise: _authorise,
    Approve: _approve,
    Settle: _settle,
    Release: _release,
    Void: _void,
}


# --- what time, or another document, causes ---------------------------------------------------------------


class Waiter(NamedTuple):
    """Names an attempt that the gate holds, as an item of a request would."""

    step_id: str
    attempt: int


def lapses(ledger: Ledger, now_ms: int) -> list[Any]:
    """Return the ends of questions that nobody answered in time, as many as an entry may hold."""
    if not ledger.questions or ledger.questions[0][0] > now_ms:
        return []
    # A set: who is asked again in the same millisecond is noted twice, and lapses once.
    due = sorted({question for question in ledger.questions if question[0] <= now_ms})
    events: list[Any] = []
    for expires_at_ms, key in due[:MAX_LAPSES_PER_ENTRY]:
        attempt = ledger.attempts.get(key)
        if attempt is None or attempt.status != HELD or attempt.expires_at_ms != expires_at_ms:
            continue
        events.append(
            ev.ApprovalLapsed(
                account=attempt.account,
                run_id=key.run_id,
                step_id=key.step_id,
                attempt=key.attempt,
                rule=attempt.rule,
                policy=attempt.policy,
                reason="nobody answered in time",
            )
        )
    return events


def closings(ledger: Ledger, now_ms: int) -> list[Any]:
    """Return the ends of buckets whose window is over and that nothing is set aside in, as many as an entry may hold; the others
    end with what is. All windows are looked through for this."""
    events: list[Any] = []
    tally = Tally(ledger, NO_BUDGETS, now_ms, events)
    for until_ms, key in sorted(end for end in ledger.window_ends if end[0] <= now_ms):
        if ledger.is_window_end(until_ms, key):
            tally.close(key)
        if len(events) == MAX_LAPSES_PER_ENTRY:
            break
    return events


def family_end(ledger: Ledger, now_ms: int) -> list[Any]:
    """Return the end of a family that is over, all of it in one entry: a part would be missed in what the rest may spend."""
    run_id = next(iter(ledger.families_over), "")
    if not run_id:
        return []
    events: list[Any] = []
    Tally(ledger, NO_BUDGETS, now_ms, events).close_buckets(run_id)
    return events + [
        ev.FamilyOver(account=ledger.runs[each].account, run_id=each) for each in family.members(ledger, run_id)
    ]


class Turn(NamedTuple):
    """All that deciding about attempts besides a request rests on."""

    ledger: Ledger
    policies: PolicySet
    budgets: Budgets
    slots: FreeSlots
    desk: Desk

    def draft(self, key: AttemptKey, attempt: Attempt) -> Draft:
        """Return the draft of a decision about an attempt that is there already, as a request of its run would have it."""
        request = GateRequest(run_id=key.run_id, account=attempt.account, source=NO_POSITION, items=())
        return Draft(self.ledger, request, self.policies, self.slots, self.desk, self.budgets)


def resumption(turn: Turn) -> Look:
    """Return what becomes of the first attempt that waits for a budget, or about which one asks, and that need not any more,
    and what was found of the others on the way there. Looks at no more than `MAX_LOOKED_AT`.
    """
    without_room: list[tuple[Spot, lacking.Shortage]] = []
    moved: list[tuple[AttemptKey, lacking.Shortage]] = []
    looked_at = 0
    for spot, members in turn.ledger.lacking.to_look_at():
        for key in members:
            looked_at += 1
            if looked_at > MAX_LOOKED_AT:
                return Look([], None, without_room, moved)
            attempt = turn.ledger.attempts[key]
            lack = _lacks_now(turn, key, attempt, spot.scope)
            if lack is None:
                answer = [_answered(turn, key, attempt)] if spot.scope.is_asked else []
                return Look(answer + _judged_again(turn, key, attempt), spot, without_room, moved)
            if scope_of(lack.bucket) == spot.scope.lacks:
                without_room.append((spot, lack))
                break
            moved.append((key, lack))
    return Look([], None, without_room, moved)


def _judged_again(turn: Turn, key: AttemptKey, attempt: Attempt) -> list[Any]:
    assert attempt.call is not None  # noqa: S101 - what waits has a call
    draft = turn.draft(key, attempt)
    _judge_and_reserve(draft, Waiter(key.step_id, key.attempt), attempt.call, _Money(turn.ledger.runs[key.run_id]))
    return draft.events


def _lacks_now(turn: Turn, key: AttemptKey, attempt: Attempt, scope: Scope) -> lacking.Shortage | None:
    """Return what an attempt that waits for `scope` lacks as it is now: that if it still does, else something else."""
    draft = turn.draft(key, attempt)  # thrown away
    if draft.money is None or attempt.call is None:
        return lacking.Shortage(scope.lacks, 0)
    above_id = family.not_open(turn.ledger, draft.money)
    if above_id:
        return lacking.Shortage(family_wait(above_id), 0)
    lacks = _room(draft, attempt.call, draft.money).lacks
    if not lacks:
        return lacking.Shortage(RULE_WAIT, 0) if scope.is_asked and _would_ask(turn, key, attempt) else None
    if not scope.is_asked and lacks[0].budget.on_exceed != "pause":
        return None  # it is denied by now, or asked about
    found = next((lack for lack in lacks if scope_of(lack.key) == scope.lacks), lacks[0])
    return lacking.Shortage(found.key, found.bucket.until_ms)


def _would_ask(turn: Turn, key: AttemptKey, attempt: Attempt) -> bool:
    """Tell whether a rule has a question by now that nobody answered. The answer to a budget's may be on its way: it must not be
    taken for one to the rule's, so the budget's stays open until it is there."""
    draft = turn.draft(key, attempt)
    if draft.money is None or attempt.call is None:
        return True
    waiter = Waiter(key.step_id, key.attempt)
    verdict = _verdict(draft, waiter, attempt.call, draft.money)
    return verdict.effect == "require_approval" and not _approved_by(draft, waiter, attempt.call)


def _answered(turn: Turn, key: AttemptKey, attempt: Attempt) -> ev.QuestionAnswered:
    """Return the answer to a budget's question, which there is room for now, by the document that made it."""
    name = attempt.rule.removeprefix(LACK_RULE)
    budget = turn.budgets.named(name)
    draft = turn.draft(key, attempt)
    opened = () if draft.money is None else _opened(draft, draft.money)
    bucket = next((bucket for bucket_key, bucket, _ in opened if bucket_key == attempt.exceeds[0]), None)
    if budget is None:
        by, reason = f"{LACK_RULE}{name}", f"budget {name} is not in force any more"
    elif bucket is None:
        by, reason = f"{LACK_RULE}{budget.label}", f"{budget.label} counts it elsewhere or not at all now"
    else:
        is_topped_up = bool(bucket.top_ups) and budget.label == attempt.policy
        by = f"{TopUp.KIND}:{bucket.top_ups[-1]}" if is_topped_up else f"{LACK_RULE}{budget.label}"
        reason = f"{budget.label} has room for it now"
    return ev.QuestionAnswered(**leasing.names(key, attempt.account), by=by, reason=reason)


# --- losing ---------------------------------------------------------------


def losses(
    ledger: Ledger, ended: Mapping[Incarnation, str], desk: Desk | None = None, budgets: Budgets = NO_BUDGETS
) -> list[Any]:
    """Return the losses of attempts whose executor life has ended, as many as an entry may hold.

    Their money is given back when the run answers. A run does not answer for what it has cancelled, nor when it is over: there
    it ends here.
    """
    events: list[Any] = []
    tally = Tally(ledger, budgets, 0 if desk is None else desk.now_ms, events)
    size = 0
    for life, keys in ledger.held_by.items():
        reason = ended.get(life)
        if reason is None:
            continue
        for key in keys:
            attempt = ledger.attempts[key]
            size += 0 if attempt.call is None else len(attempt.call.arguments.encode())
            if events and (size > MAX_CALLS_BYTES or len(events) >= MAX_LOSSES_PER_ENTRY):
                return events
            names = leasing.names(key, attempt.account)
            events.append(
                ev.PlacementLost(**names, instance_id=life.instance_id, incarnation=life.incarnation, reason=reason)
            )
            events += leasing.given_back(desk or Desk(ledger, LimitSet(), 0), key, attempt, "lost", "lost")
            run = ledger.runs[key.run_id]
            if run.closed or attempt.cancelled:
                events.append(ev.AttemptReleased(**names, reserved_micros=attempt.reserved_micros, reason="lost"))
                tally.release(names, attempt, is_run_over=run.closed and run.is_alone)
    return events
