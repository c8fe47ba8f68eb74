"""What the gate decides: pure functions from (ledger, request, policies, free slots) to ledger events."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from tidegate.domain import canonical
from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root
from tidegate.domain.messages import (
    Approve,
    Authorise,
    Call,
    CloseRun,
    GateRequest,
    OpenRun,
    Release,
    Settle,
    Void,
)
from tidegate.gate.ledger import HELD, MAX_SETTLED_MICROS, PLACED, Attempt, AttemptKey, Incarnation, Ledger, RunMoney
from tidegate.gate.placement import Executor, FreeSlots
from tidegate.gate.policy import PolicySet, Verdict

BUDGET_RULE: Final = "budget"
MAX_PLACEMENTS_PER_ENTRY: Final = 200
MAX_LOSSES_PER_ENTRY: Final = 500
# Of the calls that an entry, or the run's answer to it, repeats: they must fit into a record (16 MiB) twice over.
MAX_CALLS_BYTES: Final = 6 * 1024 * 1024


class _Money:
    """A run's money as it stands inside one decision."""

    __slots__ = ("budget_micros", "closed", "open_tags", "reserved_micros", "settled_micros", "workflow")

    def __init__(self, run: RunMoney) -> None:
        self.budget_micros = run.budget_micros
        self.reserved_micros = run.reserved_micros
        self.settled_micros = run.settled_micros
        self.workflow = run.workflow
        self.open_tags = run.tags
        self.closed = run.closed

    def has_room_for(self, micros: int) -> bool:
        return self.budget_micros is None or self.reserved_micros + self.settled_micros + micros <= self.budget_micros


class Draft:
    """The events of one decision as they come, and what they change, so that later items see what earlier ones did."""

    def __init__(self, ledger: Ledger, request: GateRequest, policies: PolicySet, slots: FreeSlots) -> None:
        self.ledger = ledger
        self.request = request
        self.policies = policies
        self.slots = slots
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

    def end(self, item: Any, attempt: Attempt) -> None:
        """Note that the attempt ends here: its money and its slot are free for what follows."""
        self.ended.add(self.key(item))
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
    draft.events += place_waiting(draft.ledger, draft.slots, draft.ended)
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
    """Return what a rule may look at. The names are documented in docs/policy.md and never change their meaning."""
    workflow, _, version = money.workflow.partition("@")
    return {
        "kind": call.kind,
        "name": call.function,
        "tool": call.function if call.kind == "tool" else "",
        "args": canonical.loads(call.arguments),
        "queue": call.queue,
        "step": item.step_id,
        "attempt": item.attempt,
        "reserve_micros": call.reserve_micros,
        "account": draft.request.account,
        "workflow": workflow,
        "version": version,
        "tags": money.open_tags,
        "run": {
            "id": draft.request.run_id,
            "settled_micros": money.settled_micros,
            "reserved_micros": money.reserved_micros,
            "budget_micros": -1 if money.budget_micros is None else money.budget_micros,
        },
    }


def _refuse(draft: Draft, item: Any, rule: str, policy: str, reason: str) -> None:
    draft.events.append(ev.AttemptRefused(**draft.names(item), rule=rule, policy=policy, reason=reason))


def _reserve_and_place(draft: Draft, item: Any, call: Call, rule: str, policy: str, approved_by: str) -> None:
    money = draft.money
    if money is None or not money.has_room_for(call.reserve_micros):
        _refuse(draft, item, BUDGET_RULE, policy, _no_room(money, call.reserve_micros))
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
    # Whoever waits already goes first: a newcomer takes a slot only if nobody waits for the same function.
    executor = None
    if (call.queue, call.function) not in draft.ledger.waiting:
        executor = draft.slots.take(call.queue, call.kind, call.function)
    if executor is None:
        draft.events.append(ev.AttemptQueued(**draft.names(item), call=call))
        return
    draft.events.append(
        _placed(draft.key(item), draft.request.account, call, call.reserve_micros, rule, policy, executor)
    )


def _no_room(money: _Money | None, micros: int) -> str:
    if money is None or money.budget_micros is None:
        return "the run is not open at the gate"
    return (
        f"needs {micros} micro-dollars; of the run's {money.budget_micros}, {money.settled_micros} are spent "
        f"and {money.reserved_micros} reserved"
    )


def _placed(
    key: AttemptKey, account: str, call: Call, reserved_micros: int, rule: str, policy: str, executor: Executor
) -> ev.AttemptPlaced:
    return ev.AttemptPlaced(
        account=account,
        run_id=key.run_id,
        step_id=key.step_id,
        attempt=key.attempt,
        reserved_micros=reserved_micros,
        rule=rule,
        policy=policy,
        instance_id=executor.life.instance_id,
        incarnation=executor.life.incarnation,
        task_partition=executor.row.task_partition,
        call=call,
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
        draft.end(item, attempt)


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


# --- waiting and losing ---------------------------------------------------------------


def place_waiting(ledger: Ledger, slots: FreeSlots, ended: set[AttemptKey] | None = None) -> list[Any]:
    """Return placements of waiting attempts on free slots, as many as an entry may hold.

    The account root that holds the fewest slots goes first, of those that hold as many the one that has waited longest: whoever
    asks for a lot does not make others wait behind all of it.
    """
    if not ledger.waiting:
        return []
    gone = ended or set()
    busy = _busy_after(ledger, gone)
    events: list[Any] = []
    size = 0
    # Only lines for which somebody has a slot are looked at: with all slots taken, thousands of them cost nothing.
    queues: dict[tuple[str, str, str], Iterator[tuple[int, AttemptKey]]] = {
        (*name, root): ledger.waiting[name].of(root)
        for name in slots.lines_with_room(ledger.waiting)
        for root in ledger.waiting[name].roots()
    }
    heads = [(busy.get(name[2], 0), *next(queue), name) for name, queue in queues.items()]
    heapq.heapify(heads)
    while heads and len(events) < MAX_PLACEMENTS_PER_ENTRY:
        held, turn, key, name = heapq.heappop(heads)
        queue, function, root = name
        if held != busy.get(root, 0):  # it was given a slot in another line meanwhile
            heapq.heappush(heads, (busy[root], turn, key, name))
            continue
        attempt = ledger.attempts[key]
        if key not in gone and attempt.call is not None:
            executor = slots.take(queue, attempt.call.kind, function)
            if executor is None:
                if not slots.has_room():
                    break
                continue
            size += len(attempt.call.arguments.encode())
            if events and size > MAX_CALLS_BYTES:
                break
            events.append(
                _placed(
                    key, attempt.account, attempt.call, attempt.reserved_micros, attempt.rule, attempt.policy, executor
                )
            )
            busy[root] = busy.get(root, 0) + 1
        following = next(queues[name], None)
        if following is not None:
            heapq.heappush(heads, (busy.get(root, 0), *following, name))
    return events


def _busy_after(ledger: Ledger, ended: set[AttemptKey]) -> dict[str, int]:
    """Return how many slots each account root holds when the attempts that end in this decision have let go of theirs."""
    busy = dict(ledger.busy)
    for key in ended:
        attempt = ledger.attempts.get(key)
        if attempt is not None and attempt.incarnation is not None and not attempt.lost:
            root = account_root(attempt.account)
            busy[root] = busy.get(root, 0) - 1
    return busy


def losses(ledger: Ledger, ended: Mapping[Incarnation, str]) -> list[Any]:
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
            if ledger.runs[key.run_id].closed:
                events.append(ev.AttemptReleased(**names, reserved_micros=attempt.reserved_micros, reason="lost"))
    return events
