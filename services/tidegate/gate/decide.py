"""What the gate decides: pure functions from (ledger, request, policies, free slots) to ledger events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from tidegate.domain import canonical
from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root
from tidegate.domain.messages import (
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
from tidegate.gate import leasing
from tidegate.gate.leasing import LIMIT_RULE
from tidegate.gate.ledger import (
    HELD,
    MAX_SETTLED_MICROS,
    PLACED,
    RESERVED,
    Attempt,
    AttemptKey,
    Incarnation,
    Ledger,
    RunMoney,
)
from tidegate.gate.limits import Desk, LimitError, LimitSet, Obstacle
from tidegate.gate.placement import FreeSlots
from tidegate.gate.policy import MAX_REASON, PolicySet, Verdict
from tidegate.gate.variables import step_variables
from tidegate.gate.waiting import MAX_CALLS_BYTES, place_waiting, placed, position, slot_for

BUDGET_RULE: Final = "budget"
QUEUE_FULL_RULE: Final = "queue_full"
MAX_LOSSES_PER_ENTRY: Final = 500


class _Money:
    """A run's money as it stands inside one decision."""

    __slots__ = ("budget_micros", "closed", "reserved_micros", "settled_micros", "tags", "workflow")

    def __init__(self, run: RunMoney) -> None:
        self.budget_micros = run.budget_micros
        self.reserved_micros = run.reserved_micros
        self.settled_micros = run.settled_micros
        self.workflow = run.workflow
        self.tags = run.tags
        self.closed = run.closed

    def has_room_for(self, micros: int) -> bool:
        return self.budget_micros is None or self.reserved_micros + self.settled_micros + micros <= self.budget_micros


class Draft:
    """The events of one decision as they come, and what they change, so that later items see what earlier ones did."""

    def __init__(
        self, ledger: Ledger, request: GateRequest, policies: PolicySet, slots: FreeSlots, desk: Desk | None = None
    ) -> None:
        self.ledger = ledger
        self.request = request
        self.policies = policies
        self.slots = slots
        self.desk = desk or Desk(ledger, LimitSet(), 0)
        self.joined: Counter[str] = Counter()  # by queue: who began to wait in this decision
        self.events: list[Any] = []
        self.begun: set[AttemptKey] = set()
        self.ended: set[AttemptKey] = set()
        known = ledger.runs.get(request.run_id)
        self.approved = {} if known is None else known.approved
        self.money = None if known is None else _Money(known)

    def key(self, item: Any) -> AttemptKey:
        """Return the key of the attempt that an item of the request names."""
        return AttemptKey(self.request.run_id, item.step_id, item.attempt)

    def open_attempt(self, item: Any) -> Attempt | None:
        """Return the attempt if it has not ended, neither before nor in this decision."""
        key = self.key(item)
        return None if key in self.ended else self.ledger.attempts.get(key)

    def end(self, item: Any, attempt: Attempt, outcome: str = "") -> None:
        """Note that the attempt ends here: its money, its slot and its leases are free for what follows."""
        self.ended.add(self.key(item))
        self.events += leasing.given_back(self.desk, self.key(item), attempt, outcome)
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


def on_request(draft: Draft) -> list[Any]:
    """Return the events that a request causes, its items in order, then placements of what waited for the freed slots."""
    for item in draft.request.items:
        _ITEMS[type(item)](draft, item)
    if draft.ended:  # otherwise nothing became free
        draft.events += place_waiting(draft.ledger, draft.slots, draft.ended, draft.desk)
    return draft.events


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
        )
    )
    draft.money = _Money(RunMoney(draft.request.account, item.budget_micros, item.workflow, item.tags))


def _close_run(draft: Draft, item: CloseRun) -> None:
    if draft.money is None or draft.money.closed:
        return
    draft.money.closed = True
    draft.events.append(
        ev.RunClosed(
            account=draft.request.account, run_id=draft.request.run_id, settled_micros=draft.money.settled_micros
        )
    )


# --- authorise ---------------------------------------------------------------


def _authorise(draft: Draft, item: Authorise) -> None:
    if draft.key(item) in draft.begun or draft.key(item) in draft.ledger.attempts:
        return  # its place, its money or its question is there already; a second one would be entered twice
    draft.begun.add(draft.key(item))
    money = draft.money
    if money is None or money.closed:
        _refuse(draft, item, "unknown_run", "", "the run is not open at the gate")
        return
    verdict = _verdict(draft, item, item.call, money)
    approved_by = ""
    if verdict.effect == "require_approval":
        arguments, approved_by = draft.approved.get(item.step_id, ("", ""))
        if not approved_by or arguments != item.call.arguments:
            draft.events.append(
                ev.ApprovalHeld(
                    **draft.names(item),
                    rule=verdict.rule,
                    policy=verdict.policy,
                    reason=verdict.reason,
                    arguments_hash=canonical.digest(item.call.arguments),
                    call=item.call,
                )
            )
            return
    if verdict.effect == "deny":
        _refuse(draft, item, verdict.rule, verdict.policy, verdict.reason)
        return
    _reserve_and_place(draft, item, item.call, verdict.rule, verdict.policy, approved_by)


def _verdict(draft: Draft, item: Any, call: Call, money: _Money) -> Verdict:
    if not draft.policies:
        return Verdict("allow", "default", "", "no policy is in force")
    return draft.policies.judge(_variables(draft, item, call, money))


def _variables(draft: Draft, item: Any, call: Call, money: _Money) -> dict[str, Any]:
    return step_variables(draft.key(item), draft.request.account, call, money)


def _refuse(draft: Draft, item: Any, rule: str, policy: str, reason: str, retry_after_ms: int = 0) -> None:
    draft.events.append(
        ev.AttemptRefused(
            **draft.names(item), rule=rule, policy=policy, reason=reason[:MAX_REASON], retry_after_ms=retry_after_ms
        )
    )


def _reserve_and_place(draft: Draft, item: Any, call: Call, rule: str, policy: str, approved_by: str) -> None:
    money = draft.money
    if money is None or not money.has_room_for(call.reserve_micros):
        _refuse(draft, item, BUDGET_RULE, policy, _no_room(money, call.reserve_micros))
        return
    entrance = _entrance(draft, item, call)
    if entrance is None:
        return
    money.reserved_micros += call.reserve_micros
    draft.events.append(
        ev.AttemptReserved(
            **draft.names(item),
            reserved_micros=call.reserve_micros,
            rule=rule,
            policy=policy,
            approved_by=approved_by,
        )
    )
    waiting = Attempt(draft.request.account, call, RESERVED, call.reserve_micros, rule, policy, leases=entrance.leases)
    if _place_at_once(draft, draft.key(item), waiting):
        return
    draft.joined[call.queue] += 1
    draft.events.append(
        ev.AttemptQueued(
            **draft.names(item), call=call, leases=entrance.leases, limits_version=draft.desk.limits.version
        )
    )
    if entrance.obstacle is not None:
        ahead = position(draft.ledger, waiting.line, entrance.leases, account_root(draft.request.account))
        draft.events.append(leasing.throttled(draft.key(item), draft.request.account, entrance.obstacle, ahead))


class _Entrance(NamedTuple):
    """What an attempt that may run needs besides a slot, and what is in its way."""

    leases: tuple[Lease, ...]
    obstacle: Obstacle | None


def _entrance(draft: Draft, item: Any, call: Call) -> _Entrance | None:
    """Return how the attempt gets in, or None if it was refused: its queue is full, or a limit says so."""
    desk, money = draft.desk, draft.money
    try:
        leases = (
            desk.limits.leases(_variables(draft, item, call, money), draft.ledger.partition)
            if desk.limits and money
            else ()
        )
    except LimitError as error:
        _refuse(draft, item, LIMIT_RULE, "", f"a limit cannot be evaluated, which denies: {error}")
        return None
    obstacle = desk.obstacle(leases)
    if obstacle is not None and obstacle.denies:
        retry_after_ms = max(0, obstacle.retry_at_ms - desk.now_ms)
        _refuse(draft, item, LIMIT_RULE, "", obstacle.reason, retry_after_ms)
        return None
    queue = desk.limits.queues.get(call.queue)
    if queue is not None:
        depth = draft.ledger.depth.get(call.queue, 0) + draft.joined[call.queue]
        full, retry_after_ms, tokens = desk.admission(call.queue, depth)
        if full and queue.on_full == "reject":
            _refuse(draft, item, QUEUE_FULL_RULE, "", full, retry_after_ms)
            return None
        draft.events += tokens
        if full and obstacle is None:
            here = Lease(draft.ledger.partition, "", "")
            obstacle = Obstacle(here, "queue", full, desk.now_ms + retry_after_ms)
    return _Entrance(leases, obstacle)


def _place_at_once(draft: Draft, key: AttemptKey, attempt: Attempt) -> bool:
    """Place a newcomer if nobody waits for the same function, and nothing of what it needs is decided elsewhere."""
    ledger, desk = draft.ledger, draft.desk
    name = attempt.line
    if name in ledger.waiting or name in ledger.limited or not desk.has_all_here(attempt.leases):
        return False
    if desk.obstacle(attempt.leases) is not None:
        return False
    found = slot_for(desk, draft.slots, attempt)
    if found is None:
        return False
    executor, leases = found
    draft.events += desk.take(leases)
    draft.events.append(placed(key, attempt, executor, leases))
    return True


def _no_room(money: _Money | None, micros: int) -> str:
    if money is None or money.budget_micros is None:
        return "the run is not open at the gate"
    return (
        f"needs {micros} micro-dollars; of the run's {money.budget_micros}, {money.settled_micros} are spent "
        f"and {money.reserved_micros} reserved"
    )


def _approve(draft: Draft, item: Approve) -> None:
    attempt = draft.open_attempt(item)
    if attempt is None or attempt.status != HELD or attempt.call is None or draft.key(item) in draft.begun:
        return
    draft.begun.add(draft.key(item))
    if canonical.digest(attempt.call.arguments) != item.arguments_hash:
        _refuse(draft, item, attempt.rule, attempt.policy, "the approval was given for other arguments")
        draft.ended.add(draft.key(item))
        return
    if draft.money is not None:
        verdict = _verdict(draft, item, attempt.call, draft.money)
        if verdict.effect == "deny":  # somebody said yes, but what is in force now says no
            _refuse(draft, item, verdict.rule, verdict.policy, verdict.reason)
            draft.ended.add(draft.key(item))
            return
    _reserve_and_place(draft, item, attempt.call, attempt.rule, attempt.policy, item.by or "unnamed")


# --- endings ---------------------------------------------------------------


def _settle(draft: Draft, item: Settle) -> None:
    attempt = draft.open_attempt(item)
    reserved_micros = 0 if attempt is None else attempt.reserved_micros
    if attempt is None and not item.actual_micros:
        return
    draft.events.append(
        ev.AttemptSettled(
            **draft.names(item),
            reserved_micros=reserved_micros,
            actual_micros=item.actual_micros,
            overshoot_micros=max(0, item.actual_micros - reserved_micros),
        )
    )
    if draft.money is not None:
        draft.money.settled_micros = min(draft.money.settled_micros + item.actual_micros, MAX_SETTLED_MICROS)
    if attempt is not None:
        draft.end(item, attempt, item.outcome)


def _release(draft: Draft, item: Release) -> None:
    attempt = draft.open_attempt(item)
    if attempt is not None:
        _released(draft, item, attempt, item.reason)


def _released(draft: Draft, item: Any, attempt: Attempt, reason: str) -> None:
    draft.events.append(ev.AttemptReleased(**draft.names(item), reserved_micros=attempt.reserved_micros, reason=reason))
    draft.end(item, attempt)


def _void(draft: Draft, item: Void) -> None:
    """Forget an attempt that waits; tell the executor of one that runs. One that is lost already has no one to be told."""
    attempt = draft.open_attempt(item)
    if attempt is None:
        return
    if attempt.status != PLACED or attempt.lost or attempt.incarnation is None or attempt.call is None:
        _released(draft, item, attempt, "void")
        return
    draft.events.append(
        ev.AttemptCancelTold(
            **draft.names(item),
            queue=attempt.call.queue,
            instance_id=attempt.incarnation.instance_id,
            incarnation=attempt.incarnation.incarnation,
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


# --- losing ---------------------------------------------------------------


def losses(ledger: Ledger, ended: Mapping[Incarnation, str], desk: Desk | None = None) -> list[Any]:
    """Return the losses of attempts whose executor life has ended, as many as an entry may hold.

    Their money is given back when the run answers. A run that is over does not answer any more: there it ends here.
    """
    events: list[Any] = []
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
            names: dict[str, Any] = {
                "account": attempt.account,
                "run_id": key.run_id,
                "step_id": key.step_id,
                "attempt": key.attempt,
            }
            events.append(
                ev.PlacementLost(**names, instance_id=life.instance_id, incarnation=life.incarnation, reason=reason)
            )
            events += leasing.given_back(desk or Desk(ledger, LimitSet(), 0), key, attempt, "lost", "lost")
            if ledger.runs[key.run_id].closed:
                events.append(ev.AttemptReleased(**names, reserved_micros=attempt.reserved_micros, reason="lost"))
    return events
