"""How each event changes a ledger. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Container
from typing import Any, TypeVar

from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root
from tidegate.domain.messages import Call
from tidegate.gate import family
from tidegate.gate.lacking import Shortage
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import (
    HELD,
    MAX_SETTLED_MICROS,
    OUTSIDE,
    PAUSED,
    PLACED,
    QUEUED,
    RESERVED,
    Ask,
    Attempt,
    AttemptKey,
    Bucket,
    Carried,
    Gauge,
    Incarnation,
    Learned,
    Leases,
    Line,
    Name,
    RunMoney,
    meters_of,
)

K = TypeVar("K")
_ABSENT = object()


def apply(ledger: Ledger, event: Any, seq: int, now_ms: int = 0, covered: Container[str] = ()) -> None:
    """Change the ledger by its `seq`-th event. Raises KeyError on an event that its state does not allow.

    covered: units (see `snapshots.units_of_event`) that the event has changed already.
    """
    ledger.seq = seq
    kind = type(event)
    handler = _SHARED_HANDLERS.get(kind)  # the commonest
    if handler is not None:
        handler(ledger, event, covered)
    elif (timed := _TIMED_HANDLERS.get(kind)) is not None:
        timed(ledger, event, now_ms)
    else:
        _HANDLERS[kind](ledger, event)


def derive(ledger: Ledger) -> None:
    """Make what follows from runs and attempts, which were put in by themselves: who waits, and who holds what."""
    for key, attempt in sorted(ledger.attempts.items(), key=lambda item: item[1].turn):
        if attempt.status == QUEUED:
            _join_queue(ledger, key, attempt)
        elif attempt.status == PAUSED:
            _lack(ledger, key, attempt, attempt.paused_on, is_asked=False)
        elif attempt.status == HELD:
            _note_question(ledger, key, attempt)
        elif attempt.incarnation is not None and not attempt.lost:
            _hold(ledger, attempt.incarnation, key, attempt)
    for key, ask in sorted(ledger.asks.items(), key=lambda item: item[1].turn):
        if ask.given:
            _count_ask(ledger, ask, 1)
        else:
            _join_asks(ledger, key, ask)
    for name, bucket in ledger.buckets.items():
        _note_bucket(ledger, name, bucket)
    family.derive(ledger)


def _note_question(ledger: Ledger, key: AttemptKey, attempt: Attempt) -> None:
    if attempt.exceeds:
        _lack(ledger, key, attempt, attempt.exceeds[0], is_asked=True)
    if attempt.expires_at_ms:
        heapq.heappush(ledger.questions, (attempt.expires_at_ms, key))


def _lack(ledger: Ledger, key: AttemptKey, attempt: Attempt, bucket: str, *, is_asked: bool) -> None:
    assert attempt.call is not None  # noqa: S101 - what waits has a call
    found = ledger.buckets.get(bucket)
    lack = Shortage(bucket, 0 if found is None else found.until_ms)
    ledger.lacking.add(key, lack, attempt.turn, ledger.runs[key.run_id], attempt.call, is_asked=is_asked)


def _note_bucket(ledger: Ledger, name: str, bucket: Bucket) -> None:
    if bucket.until_ms:
        heapq.heappush(ledger.window_ends, (bucket.until_ms, name))
    elif bucket.run_id:
        ledger.of_run.setdefault(bucket.run_id, {})[name] = None


def _forget_answered(ledger: Ledger) -> None:
    """Take questions that were answered from the top of the heap, so that its top is the next one to lapse."""
    while ledger.questions:
        expires_at_ms, key = ledger.questions[0]
        attempt = ledger.attempts.get(key)
        if attempt is not None and attempt.status == HELD and attempt.expires_at_ms == expires_at_ms:
            return
        heapq.heappop(ledger.questions)


def _hold(ledger: Ledger, life: Incarnation, key: AttemptKey, attempt: Attempt) -> None:
    ledger.held_by.setdefault(life, {})[key] = None
    _count_placed(ledger, attempt, 1)


def _count_placed(ledger: Ledger, attempt: Attempt, by: int) -> None:
    # Its ask counts for its root already; whoever does outside tools has no slots.
    if ledger.partition not in attempt.granted and attempt.incarnation != OUTSIDE:
        _count(ledger.busy, by, account_root(attempt.account))
    if attempt.leases or attempt.needs:
        for lease in held_by_itself(attempt, ledger.partition):
            _count(ledger.held, by, lease)


def held_by_itself(attempt: Attempt, partition: int) -> Leases:
    """Return the leases of its own partition that an attempt holds since it was placed: without those that it had to ask for
    before, which its ask holds."""
    return attempt.needs if partition in attempt.granted else leases_of(attempt.leases, partition)


def leases_of(leases: Leases, partition: int) -> Leases:
    """Return those of the leases that a partition decides on."""
    found = [lease for lease in leases if lease.partition == partition]
    return leases if len(found) == len(leases) else tuple(found)


def _count(counts: dict[K, int], by: int, name: K) -> None:
    count = counts.get(name, 0) + by
    if count:
        counts[name] = count
    else:
        del counts[name]


def _let_go(ledger: Ledger, life: Incarnation, key: AttemptKey, attempt: Attempt) -> None:
    """The attempt holds a slot no more, if it did."""
    held = ledger.held_by.get(life)
    if held is None or held.pop(key, _ABSENT) is _ABSENT:
        return
    if not held:
        del ledger.held_by[life]
    _count_placed(ledger, attempt, -1)


def _key(event: Any) -> AttemptKey:
    # Past the named tuple's own `__new__`, which takes three times as long: asked for with every event.
    return tuple.__new__(AttemptKey, (event.run_id, event.step_id, event.attempt))


def _run_opened(ledger: Ledger, event: ev.RunOpened) -> None:
    ledger.runs[event.run_id] = RunMoney(
        event.account,
        event.budget_micros,
        event.workflow,
        event.tags,
        priority=event.priority,
        parent_run_id=event.parent_run_id,
        has_children=event.has_children,
    )
    family.opened(ledger, event.run_id)


def _new_attempt(ledger: Ledger, key: AttemptKey, account: str, call: Call | None, status: str) -> Attempt:
    attempt = ledger.attempts[key] = Attempt(account, call, status)
    ledger.runs[key.run_id].open[key] = None
    return attempt


def _reserved(ledger: Ledger, event: ev.AttemptReserved, covered: Container[str]) -> None:
    if event.counts:
        _set_aside(ledger, event, covered)
    if event.run_id not in covered:
        _reserved_for_run(ledger, _key(event), event)


def _granted(ledger: Ledger, event: ev.AttemptGranted, covered: Container[str]) -> None:
    _set_aside(ledger, event, covered)
    if event.run_id not in covered:
        key = _key(event)
        attempt = _reserved_for_run(ledger, key, event)
        attempt.leases = event.leases
        _place(ledger, key, attempt, event)


def _set_aside(ledger: Ledger, event: ev.Reserving, covered: Container[str]) -> None:
    for name in event.buckets:
        if name not in covered:
            ledger.buckets[name].reserve(event.amounts)


def _reserved_for_run(ledger: Ledger, key: AttemptKey, event: ev.Reserving) -> Attempt:
    attempt = ledger.attempts.get(key) or _new_attempt(ledger, key, event.account, None, RESERVED)
    ledger.lacking.discard(key)
    attempt.status = RESERVED
    attempt.reserved_micros = event.reserved_micros
    attempt.rule, attempt.policy = event.rule, event.policy
    attempt.buckets, attempt.amounts, attempt.basis = event.buckets, event.amounts, event.basis
    attempt.redact, attempt.isolation = event.redact, event.isolation
    run = ledger.runs[event.run_id]
    run.reserved_micros += event.reserved_micros
    family.bill(ledger, run, reserved_micros=event.reserved_micros)
    # What was approved beyond a budget was approved for this attempt; what a rule asked for, for the step.
    if event.approved_by and attempt.call is not None and not attempt.exceeds:
        run.approved[event.step_id] = (attempt.call.arguments, event.approved_by)
    _forget_answered(ledger)
    return attempt


def _refused(ledger: Ledger, event: ev.AttemptRefused) -> None:
    _end(ledger, _key(event))


def _held(ledger: Ledger, event: ev.ApprovalHeld) -> None:
    key = _key(event)
    attempt = ledger.attempts.get(key) or _new_attempt(ledger, key, event.account, event.call, HELD)
    ledger.lacking.discard(key)
    attempt.status, attempt.turn = HELD, ledger.seq
    attempt.rule, attempt.policy = event.rule, event.policy
    attempt.exceeds, attempt.expires_at_ms, attempt.redact = event.exceeds, event.expires_at_ms, event.redact
    _note_approval(ledger, event)
    _note_question(ledger, key, attempt)
    _forget_answered(ledger)


def _paused(ledger: Ledger, event: ev.AttemptPaused) -> None:
    key = _key(event)
    attempt = ledger.attempts.get(key) or _new_attempt(ledger, key, event.account, event.call, RESERVED)
    ledger.lacking.discard(key)
    attempt.status, attempt.paused_on, attempt.turn = PAUSED, event.bucket, ledger.seq
    attempt.rule, attempt.policy = event.rule, event.policy
    attempt.expires_at_ms, attempt.exceeds = 0, ()
    _lack(ledger, key, attempt, event.bucket, is_asked=False)
    _note_approval(ledger, event)
    _forget_answered(ledger)


def _answered(ledger: Ledger, event: ev.QuestionAnswered) -> None:
    """What follows in the same entry says how it goes on."""
    attempt = ledger.attempts[_key(event)]
    ledger.lacking.discard(_key(event))
    attempt.exceeds, attempt.expires_at_ms = (), 0
    _forget_answered(ledger)


def _note_approval(ledger: Ledger, event: ev.ApprovalHeld | ev.AttemptPaused) -> None:
    """A rule's question was answered, and now it is a budget that holds the attempt: nobody is asked twice."""
    if event.approved_by:
        ledger.runs[event.run_id].approved[event.step_id] = (event.call.arguments, event.approved_by)


def _queued(ledger: Ledger, event: ev.AttemptQueued, now_ms: int) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    if attempt.status == QUEUED:  # its limits changed: it keeps its place
        _leave_queue(ledger, key, attempt)
    else:
        attempt.status = QUEUED
        attempt.call = event.call
        attempt.turn, attempt.queued_ms = ledger.seq, now_ms
        attempt.priority = ledger.runs[event.run_id].priority
    attempt.leases, attempt.limits_version = event.leases, event.limits_version
    _join_queue(ledger, key, attempt)


def _join_queue(ledger: Ledger, key: AttemptKey, attempt: Attempt) -> None:
    """Count it as waiting; it stands in line unless it is being asked for leases elsewhere."""
    name = attempt.line
    ledger.waiting_count += 1
    _count(ledger.depth, 1, name[0])
    if not attempt.throttled:
        ledger.unnoticed.setdefault(name, {})[key] = None
    if attempt.asked >= 0 or attempt.granted:
        _count(ledger.asking, 1, name)
    if attempt.asked >= 0:
        return
    if attempt.granted:
        ledger.granted[key] = attempt.granted_ms
    needs = attempt.awaited
    line = _limited_line(ledger, name, needs) if needs else ledger.waiting.get(name)
    if line is None:
        line = ledger.waiting[name] = Line()
    line.add(account_root(attempt.account), key, attempt.turn, attempt.rank, attempt.priority)


def _limited_line(ledger: Ledger, name: Name, needs: Leases) -> Line:
    lines = ledger.limited.setdefault(name, {})
    if needs not in lines:
        lines[needs] = Line()
        for lease in needs:
            ledger.lines_of.setdefault(lease, {})[name, needs] = None
    return lines[needs]


def _placed(ledger: Ledger, event: ev.AttemptPlaced) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    if attempt.status == QUEUED:
        _leave_queue(ledger, key, attempt)
    attempt.leases, attempt.pinned = event.leases, ""
    if ledger.partition not in attempt.granted:
        attempt.needs = ()
    attempt.asked, attempt.granted_ms = -1, 0
    _place(ledger, key, attempt, event)


def _place(ledger: Ledger, key: AttemptKey, attempt: Attempt, event: ev.Placing) -> None:
    attempt.status = PLACED
    attempt.call = event.call
    life = attempt.incarnation = tuple.__new__(Incarnation, (event.instance_id, event.incarnation))  # as in `_key`
    attempt.task_partition = event.task_partition
    attempt.turn = ledger.seq
    _hold(ledger, life, key, attempt)


def _leave_queue(ledger: Ledger, key: AttemptKey, attempt: Attempt) -> None:
    """The reverse of `_join_queue`; the attempt must be as it was then."""
    name = attempt.line
    ledger.waiting_count -= 1
    _count(ledger.depth, -1, name[0])
    if not attempt.throttled:
        _notice(ledger, name, key)
    if attempt.asked >= 0 or attempt.granted:
        _count(ledger.asking, -1, name)
    if attempt.asked >= 0:
        return
    if attempt.granted:
        ledger.granted.pop(key, None)
    needs = attempt.awaited
    line = ledger.limited[name][needs] if needs else ledger.waiting[name]
    line.remove(account_root(attempt.account), key, attempt.priority)
    if line:
        return
    if not needs:
        del ledger.waiting[name]
        return
    del ledger.limited[name][needs]
    if not ledger.limited[name]:
        del ledger.limited[name]
    for lease in needs:
        lines = ledger.lines_of[lease]
        del lines[name, needs]
        if not lines:
            del ledger.lines_of[lease]


def _notice(ledger: Ledger, name: Name, key: AttemptKey) -> None:
    unnoticed = ledger.unnoticed.get(name)
    if unnoticed is not None:
        unnoticed.pop(key, None)
        if not unnoticed:
            del ledger.unnoticed[name]


def _throttled(ledger: Ledger, event: ev.AttemptThrottled) -> None:
    attempt = ledger.attempts[_key(event)]
    attempt.throttled = True
    _notice(ledger, attempt.line, _key(event))


def _settled(ledger: Ledger, event: ev.AttemptSettled, covered: Container[str]) -> None:
    for name in event.buckets:
        if name not in covered:
            ledger.buckets[name].settle(event.set_aside, event.actual_micros, event.used)
            ledger.lacking.stir(name)
    if event.run_id not in covered:
        _settled_for_run(ledger, event)


def _settled_for_run(ledger: Ledger, event: ev.AttemptSettled) -> None:
    run = ledger.runs.get(event.run_id)
    if run is not None:
        before = run.settled_micros
        run.settled_micros = min(before + event.actual_micros, MAX_SETTLED_MICROS)
        family.bill(ledger, run, settled_micros=run.settled_micros - before)
    _end(ledger, _key(event))


def _released(ledger: Ledger, event: ev.AttemptReleased) -> None:
    _end(ledger, _key(event))


def _end(ledger: Ledger, key: AttemptKey) -> None:
    """End the attempt, if it is still open: its money is no longer set aside, its slot is free."""
    attempt = ledger.attempts.pop(key, None)
    if attempt is None:
        return
    if attempt.status == QUEUED and attempt.call is not None:
        _leave_queue(ledger, key, attempt)
    ledger.lacking.discard(key)
    _forget_answered(ledger)
    if attempt.incarnation is not None:
        _let_go(ledger, attempt.incarnation, key, attempt)
    run = ledger.runs[key.run_id]
    run.reserved_micros -= attempt.reserved_micros
    family.bill(ledger, run, reserved_micros=-attempt.reserved_micros)
    del run.open[key]
    _forget_if_done(ledger, key.run_id, run)


def _cancel_told(ledger: Ledger, event: ev.AttemptCancelTold) -> None:
    """The executor was told; its answer, or its loss, ends the attempt."""
    ledger.attempts[_key(event)].cancelled = True


def _lost(ledger: Ledger, event: ev.PlacementLost) -> None:
    attempt = ledger.attempts[_key(event)]
    attempt.lost = True
    if attempt.incarnation is not None:
        _let_go(ledger, attempt.incarnation, _key(event), attempt)


def _closed(ledger: Ledger, event: ev.RunClosed) -> None:
    run = ledger.runs[event.run_id]
    run.closed = True
    _forget_if_done(ledger, event.run_id, run)


def _forget_if_done(ledger: Ledger, run_id: str, run: RunMoney) -> None:
    if family.is_done(run):
        family.done(ledger, run_id)


def _family_over(ledger: Ledger, event: ev.FamilyOver) -> None:
    family.forgotten(ledger, event.run_id)


def _leases_asked(ledger: Ledger, event: ev.LeasesAsked) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    _leave_queue(ledger, key, attempt)
    attempt.asked, attempt.pinned, attempt.needs = event.partition, event.instance_id, event.local
    _join_queue(ledger, key, attempt)


def _leases_granted(ledger: Ledger, event: ev.LeasesGranted, now_ms: int) -> None:
    key = _key(event)
    attempt = ledger.attempts[key]
    _leave_queue(ledger, key, attempt)
    attempt.asked, attempt.granted_ms = -1, now_ms
    attempt.granted = (*attempt.granted, event.partition)
    _join_queue(ledger, key, attempt)


def _leases_returned(ledger: Ledger, event: ev.LeasesReturned) -> None:
    """What has no leases of others any more stands in line as if it had never asked."""
    key = _key(event)
    attempt = ledger.attempts.get(key)
    if attempt is None:
        return
    is_queued = attempt.status == QUEUED
    if is_queued:
        _leave_queue(ledger, key, attempt)
    if attempt.asked == event.partition:
        attempt.asked = -1
    attempt.granted = tuple(partition for partition in attempt.granted if partition != event.partition)
    if attempt.asked < 0 and not attempt.granted:
        attempt.pinned, attempt.needs, attempt.granted_ms = "", (), 0
    if is_queued:
        _join_queue(ledger, key, attempt)


def _lease_heard(ledger: Ledger, event: ev.LeaseHeard, now_ms: int) -> None:
    ask = Ask(event.account, event.partition, event.priority, event.leases, now_ms, ledger.seq)
    ledger.asks[_key(event)] = ask
    _join_asks(ledger, _key(event), ask)


def _join_asks(ledger: Ledger, key: AttemptKey, ask: Ask) -> None:
    line = ledger.ask_lines.setdefault(ask.leases, Line())
    line.add(account_root(ask.account), key, ask.turn, ask.rank, ask.priority)


def _leave_asks(ledger: Ledger, key: AttemptKey, ask: Ask) -> None:
    line = ledger.ask_lines[ask.leases]
    line.remove(account_root(ask.account), key, ask.priority)
    if not line:
        del ledger.ask_lines[ask.leases]


def _count_ask(ledger: Ledger, ask: Ask, by: int) -> None:
    _count(ledger.busy, by, account_root(ask.account))
    for lease in ask.leases:
        _count(ledger.held, by, lease)


def _lease_given(ledger: Ledger, event: ev.LeaseGiven) -> None:
    ask = ledger.asks[_key(event)]
    _leave_asks(ledger, _key(event), ask)
    ask.given = True
    _count_ask(ledger, ask, 1)


def _lease_ended(ledger: Ledger, event: ev.LeaseEnded | ev.LeaseRefused) -> None:
    ask = ledger.asks.pop(_key(event), None)
    if ask is None:
        return
    if ask.given:
        _count_ask(ledger, ask, -1)
    else:
        _leave_asks(ledger, _key(event), ask)


def _gauge(ledger: Ledger, event: Any) -> Gauge:
    """Return the gauge that the event changes, as the latest one."""
    name = (event.limit, event.key)
    gauge = ledger.gauges[name] = ledger.gauges.pop(name, Gauge(failures_ms=[]))
    return gauge


def _token_taken(ledger: Ledger, event: ev.TokenTaken, now_ms: int) -> None:
    gauge = _gauge(ledger, event)
    gauge.until_us, gauge.taken_us = event.until_us, now_ms * 1000


def _failure_counted(ledger: Ledger, event: ev.FailureCounted, now_ms: int) -> None:
    gauge = _gauge(ledger, event)
    gauge.failures_ms = [*gauge.failures_ms, now_ms][-event.keep :]


def _breaker_opened(ledger: Ledger, event: ev.BreakerOpened) -> None:
    gauge = _gauge(ledger, event)
    gauge.failures_ms, gauge.open_until_ms, gauge.why = [], event.until_ms, event.reason


def _breaker_closed(ledger: Ledger, event: ev.BreakerClosed) -> None:
    gauge = _gauge(ledger, event)
    gauge.failures_ms, gauge.open_until_ms, gauge.why = [], 0, ""


def _limit_forgotten(ledger: Ledger, event: ev.LimitForgotten) -> None:
    ledger.gauges.pop((event.limit, event.key), None)


def _scale_out_wanted(ledger: Ledger, event: ev.ScaleOutWanted, now_ms: int) -> None:
    if event.wanted:
        ledger.scale_out[event.queue] = now_ms
    else:
        ledger.scale_out.pop(event.queue, None)


def _lapsed(ledger: Ledger, event: ev.ApprovalLapsed) -> None:
    _end(ledger, _key(event))


def _budget_set(ledger: Ledger, event: ev.BudgetSet) -> None:
    bucket = ledger.buckets.get(event.bucket)
    if bucket is None:
        bucket = ledger.buckets[event.bucket] = Bucket.of(event)
        _note_bucket(ledger, event.bucket, bucket)
    elif bucket.until_ms != event.until_ms:  # of a budget that has another window now, which began at the same time
        heapq.heappush(ledger.window_ends, (event.until_ms, event.bucket))
    bucket.set(event)
    _forget_ended(ledger)
    ledger.lacking.stir(event.bucket)


def _budget_reserved(ledger: Ledger, event: ev.BudgetReserved) -> None:
    ledger.buckets[event.bucket].reserve(event.amounts)


def _budget_settled(ledger: Ledger, event: ev.BudgetSettled) -> None:
    ledger.buckets[event.bucket].settle(event.reserved, event.used.micros, event.used)
    ledger.lacking.stir(event.bucket)


def _budgets_released(ledger: Ledger, event: ev.BudgetsReleased, covered: Container[str]) -> None:
    for name in event.buckets:
        if name not in covered:
            ledger.buckets[name].release(event.amounts)
            ledger.lacking.stir(name)


def _budget_alerted(ledger: Ledger, event: ev.BudgetAlerted) -> None:
    ledger.buckets[event.bucket].alert(event)


def _budget_closed(ledger: Ledger, event: ev.BudgetClosed) -> None:
    bucket = ledger.buckets.pop(event.bucket)
    ledger.lacking.stir(event.bucket)
    if bucket.run_id and event.bucket in ledger.of_run.get(bucket.run_id, ()):
        del ledger.of_run[bucket.run_id][event.bucket]
        if not ledger.of_run[bucket.run_id]:
            del ledger.of_run[bucket.run_id]
    _forget_ended(ledger)


def _forget_ended(ledger: Ledger) -> None:
    """Take ends of windows that are none any more from the top of the heap, so that its top is the next one."""
    while ledger.window_ends and not ledger.is_window_end(*ledger.window_ends[0]):
        heapq.heappop(ledger.window_ends)


def _usage_learned(ledger: Ledger, event: ev.UsageLearned) -> None:
    ledger.learned[event.function] = Learned(event.count, meters_of(event.mean))
    ledger.lacking.stir_function(event.function)


def _ledger_carried(ledger: Ledger, event: ev.LedgerCarried, now_ms: int) -> None:
    """It says what there is anyway; only that it was said is new."""
    ledger.carried = Carried(now_ms, ledger.seq, event.policy)


_HANDLERS: dict[type, Any] = {
    ev.ApprovalLapsed: _lapsed,
    ev.QuestionAnswered: _answered,
    ev.AttemptPaused: _paused,
    ev.BudgetSet: _budget_set,
    ev.BudgetReserved: _budget_reserved,
    ev.BudgetSettled: _budget_settled,
    ev.BudgetAlerted: _budget_alerted,
    ev.BudgetClosed: _budget_closed,
    ev.UsageLearned: _usage_learned,
    ev.RunOpened: _run_opened,
    ev.AttemptRefused: _refused,
    ev.ApprovalHeld: _held,
    ev.AttemptPlaced: _placed,
    ev.AttemptReleased: _released,
    ev.AttemptCancelTold: _cancel_told,
    ev.PlacementLost: _lost,
    ev.RunClosed: _closed,
    ev.FamilyOver: _family_over,
    ev.AttemptThrottled: _throttled,
    ev.LeasesAsked: _leases_asked,
    ev.LeasesReturned: _leases_returned,
    ev.LeaseGiven: _lease_given,
    ev.LeaseRefused: _lease_ended,
    ev.LeaseEnded: _lease_ended,
    ev.BreakerOpened: _breaker_opened,
    ev.BreakerClosed: _breaker_closed,
    ev.LimitForgotten: _limit_forgotten,
}
# Those that change several units, each by itself.
_SHARED_HANDLERS: dict[type, Any] = {
    ev.AttemptReserved: _reserved,
    ev.AttemptGranted: _granted,
    ev.AttemptSettled: _settled,
    ev.BudgetsReleased: _budgets_released,
}
# Those to whom the time of the entry matters.
_TIMED_HANDLERS: dict[type, Any] = {
    ev.AttemptQueued: _queued,
    ev.LeasesGranted: _leases_granted,
    ev.LeaseHeard: _lease_heard,
    ev.TokenTaken: _token_taken,
    ev.FailureCounted: _failure_counted,
    ev.ScaleOutWanted: _scale_out_wanted,
    ev.LedgerCarried: _ledger_carried,
}
