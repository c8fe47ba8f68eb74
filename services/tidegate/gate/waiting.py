"""Who of those that wait goes next, and what is said to those that do not. Pure.

An attempt waits for a slot, and perhaps for room under limits; both are taken in one decision. Between account roots the one
that holds the least goes first; among the runs of one root, priority and waiting time decide.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from tidegate.domain import ledger_events as ev
from tidegate.domain.identity import account_root
from tidegate.domain.messages import Lease
from tidegate.gate import leasing
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import INSTANCE_PLACE, Desk, LimitError, LimitSet, Obstacle
from tidegate.gate.placement import Executor, FreeSlots
from tidegate.gate.state import OUTSIDE, Attempt, AttemptKey, Incarnation, Leases, Line, Name
from tidegate.gate.variables import Subject

MAX_PLACEMENTS_PER_ENTRY: Final = 200
MAX_NOTICES_PER_ENTRY: Final = 100
# Of the calls that an entry, or the run's answer to it, repeats: they must fit into a record (16 MiB) twice over.
MAX_CALLS_BYTES: Final = 6 * 1024 * 1024
UNSERVED_MS: Final = 2_000  # executors that are about to register are given this long
SCALE_OUT_MS: Final = 5_000

ASKS: Final = ("", "*")  # the line of attempts of other partitions, which need no slot of ours


class Place(NamedTuple):
    """Where an attempt goes: the life of an executor, and the partition of its tasks."""

    life: Incarnation
    task_partition: int

    def fields(self) -> dict[str, Any]:
        """Return the fields by which events name it."""
        return {
            "instance_id": self.life.instance_id,
            "incarnation": self.life.incarnation,
            "task_partition": self.task_partition,
        }


def placed(key: AttemptKey, attempt: Attempt, place: Place, leases: Leases) -> ev.AttemptPlaced:
    """Return the placement of an attempt that was reserved."""
    assert attempt.call is not None  # noqa: S101 - what waits has a call
    return ev.AttemptPlaced(
        account=attempt.account,
        run_id=key.run_id,
        step_id=key.step_id,
        attempt=key.attempt,
        reserved_micros=attempt.reserved_micros,
        rule=attempt.rule,
        policy=attempt.policy,
        **place.fields(),
        call=attempt.call,
        leases=leases,
        queued_ms=attempt.queued_ms,
        redact=attempt.redact,
        isolation=attempt.isolation,
    )


def slot_for(desk: Desk, slots: FreeSlots, attempt: Attempt) -> tuple[Place, Leases] | None:
    """Take a slot for an attempt and return where, with all leases that it needs there; None if there is no slot.

    What is done outside needs none; limits on executors are not about it.
    """
    assert attempt.call is not None  # noqa: S101 - what waits has a call
    call, here = attempt.call, desk.ledger.partition
    if call.is_outside:
        leases = tuple(lease for lease in attempt.leases if INSTANCE_PLACE not in lease.key)
        return None if slots.is_paused(call.queue) else (Place(OUTSIDE, 0), leases)
    if not attempt.leases:
        free = slots.take(call.queue, call.kind, call.function, prefer=call.preferred, only=attempt.pinned)
        return None if free is None else (_place(free), ())
    open_keys = tuple([lease for lease in attempt.leases if INSTANCE_PLACE in lease.key])
    executor = slots.take(
        call.queue,
        call.kind,
        call.function,
        prefer=call.preferred,
        only=attempt.pinned,
        accepts=(lambda name: desk.obstacle(desk.limits.on_instance(open_keys, name, here)) is None)
        if open_keys and not attempt.pinned
        else None,
    )
    return (
        None
        if executor is None
        else (_place(executor), desk.limits.on_instance(attempt.leases, executor.life.instance_id, here))
    )


def _place(executor: Executor) -> Place:
    return Place(executor.life, executor.row.task_partition)


def place_waiting(
    ledger: Ledger, slots: FreeSlots, ended: set[AttemptKey] | None = None, desk: Desk | None = None
) -> list[Any]:
    """Return placements of waiting attempts on free slots, and leases for those of others, as many as an entry may hold.

    The account root that holds the fewest slots goes first, of those that hold as many the one whose turn it is by priority
    and waiting time: whoever asks for a lot does not make others wait behind all of it.

    ended: attempts that end in this very decision. If it is given, of those that wait for limits only those are looked at
    that wait for what became free; the others are when `ended` is None, once in every turn.
    """
    if not ledger.has_waiting():
        return []
    return _Round(ledger, slots, ended, desk or Desk(ledger, LimitSet(), 0)).play()


# The first of those of an account root that wait for the same, by how many slots the root holds, by rank and by turn; then the
# line, what it needs, whose it is, and who comes behind the first, once somebody has asked.
_Head = tuple[int, int, int, AttemptKey, Name, Leases, str, Line, Iterator[tuple[int, int, AttemptKey]] | None]


class _Round:
    """One decision about everybody who waits. Only lines that somebody could go on from are looked at: with all slots taken,
    thousands of them cost nothing."""

    __slots__ = (
        "count",
        "desk",
        "events",
        "gone",
        "heads",
        "is_slotless",
        "ledger",
        "more",
        "only_freed",
        "size",
        "slots",
    )

    def __init__(self, ledger: Ledger, slots: FreeSlots, ended: set[AttemptKey] | None, desk: Desk) -> None:
        self.ledger = ledger
        self.slots = slots
        self.gone = ended or set()
        self.only_freed = ended is not None
        self.desk = desk
        self.events: list[Any] = []
        self.count = 0
        self.size = 0
        self.more = _given_back(ledger, self.gone)  # slots by account root, than before this decision
        self.heads: list[_Head] = []
        self.is_slotless = False  # whether any of them needs no slot of ours

    def play(self) -> list[Any]:
        """Return the events."""
        self._open_lines()
        heads = self.heads
        heapq.heapify(heads)
        while heads and self.count < MAX_PLACEMENTS_PER_ENTRY:
            held, _, _, key, name, needs, root, line, behind = head = heapq.heappop(heads)
            if held != self._held(root):  # it was given a slot in another line meanwhile
                heapq.heappush(heads, (self._held(root), *head[1:]))
                continue
            if needs and self.desk.obstacle(needs) is not None:
                continue  # nobody in this line can go on now
            if key not in self.gone:
                attempt = None if name == ASKS else self.ledger.attempts[key]
                if self._is_too_much(attempt):
                    break
                is_served = self._serve(key, attempt, root)
                if not self.is_slotless and not self.slots.has_room():
                    break
                if not is_served:
                    continue
            if behind is None:  # most rounds place one, who goes before all others
                behind = line.of(root)
                next(behind)
            following = next(behind, None)
            if following is not None:
                heapq.heappush(heads, (self._held(root), *following, name, needs, root, line, behind))
        return self.events

    def _held(self, root: str) -> int:
        return self.ledger.busy.get(root, 0) + self.more.get(root, 0)

    def _open_lines(self) -> None:
        for name in self.slots.lines_with_room(self.ledger.waiting):
            self._open(name, (), self.ledger.waiting[name])
        for name, needs in self._limited():
            line = self.ledger.limited[name][needs]
            obstacle = self.desk.obstacle(needs)
            if obstacle is None:
                self._open(name, needs, line)
            else:
                self._say_why(line, obstacle)
        for needs, line in self.ledger.ask_lines.items():
            if self.desk.obstacle(needs) is None:
                self._open(ASKS, needs, line)

    def _limited(self) -> Iterable[tuple[Name, Leases]]:
        if not self.ledger.limited:
            return ()
        with_room = sorted(self.slots.lines_with_room(self.ledger.limited))
        if not self.only_freed:
            return [(name, needs) for name in with_room for needs in self.ledger.limited[name]]
        found = {where: None for lease in self.desk.freed for where in self.ledger.lines_of.get(lease, ())}
        return [where for where in found if where[0] in with_room]

    def _open(self, name: Name, needs: Leases, line: Line) -> None:
        self.is_slotless = self.is_slotless or not name[0]
        for root, head in line.heads():
            self.heads.append((self._held(root), *head, name, needs, root, line, None))

    def _say_why(self, line: Line, obstacle: Obstacle) -> None:
        """Whoever comes to be the first of a line that stands still learns why, if it was not told when it came."""
        for root in line.roots():
            _, _, key = next(line.of(root))
            attempt = self.ledger.attempts[key]
            if not attempt.throttled and key not in self.gone and len(self.events) < MAX_NOTICES_PER_ENTRY:
                self.events.append(leasing.throttled(key, attempt.account, obstacle, 0))

    def _is_too_much(self, attempt: Attempt | None) -> bool:
        """Count the call, which the entry repeats; tells whether the entry is full without it."""
        self.size += 0 if attempt is None or attempt.call is None else len(attempt.call.arguments.encode())
        return bool(self.events) and self.size > MAX_CALLS_BYTES

    def _serve(self, key: AttemptKey, attempt: Attempt | None, root: str) -> bool:
        """Let an attempt, or (None) one of another partition, go on; tells whether those behind it may go on too."""
        if attempt is None:
            self._give(key)
            self._hold(root)
            return True
        if not attempt.granted and attempt.limits_version != self.desk.limits.version:
            changed = self._judged_anew(key, attempt)
            if changed is not None:
                self.events.append(changed)
                self.count += 1
                return True
        found = slot_for(self.desk, self.slots, attempt)
        if found is None:
            return False
        place, leases = found
        has_asked_here = False
        if attempt.leases:  # as few need
            pinned = place.life.instance_id if any(INSTANCE_PLACE in lease.key for lease in attempt.leases) else ""
            question = leasing.ask(self.desk, key, attempt, leases, pinned, attempt.granted)
            if question is not None:
                return self._ask(question, attempt)
            has_asked_here = self.ledger.partition in attempt.granted
            self.events += self.desk.take(attempt.needs if has_asked_here else leases)
        if not has_asked_here and place.life != OUTSIDE:  # else its ask counts for its root, or it has no slot
            self._hold(root)
        self.events.append(placed(key, attempt, place, leases))
        self.count += 1
        return True

    def _hold(self, root: str) -> None:
        self.more[root] = self.more.get(root, 0) + 1

    def _ask(self, question: ev.LeasesAsked, attempt: Attempt) -> bool:
        """Ask for leases elsewhere, but for no more attempts than there are slots: what is held without one helps nobody."""
        assert attempt.call is not None  # noqa: S101 - what waits has a call
        name, call = attempt.line, attempt.call
        free = self.slots.left(call.queue, call.kind, call.function)  # besides the one that was just taken
        if not call.is_outside and free < self.ledger.asking.get(name, 0):
            return False
        self.events.append(question)
        self.count += 1
        return True

    def _judged_anew(self, key: AttemptKey, attempt: Attempt) -> Any | None:
        """Return what changes because other limits are in force than when it joined; None if nothing does."""
        assert attempt.call is not None  # noqa: S101 - what waits has a call
        run = self.ledger.runs[key.run_id]
        fields = leasing.names(key, attempt.account)
        try:
            subject = Subject.of(key, attempt.account, attempt.call, run)
            leases = self.desk.limits.leases(subject, self.ledger.partition)
        except LimitError as error:
            reason = f"a limit cannot be evaluated, which denies: {error}"[:500]
            return ev.AttemptRefused(**fields, rule=leasing.LIMIT_RULE, policy="", reason=reason)
        if leases == attempt.leases:
            return None
        return ev.AttemptQueued(**fields, call=attempt.call, leases=leases, limits_version=self.desk.limits.version)

    def _give(self, key: AttemptKey) -> None:
        ask = self.ledger.asks[key]
        self.events += self.desk.take(ask.leases)
        self.events.append(ev.LeaseGiven(**leasing.names(key, ask.account), partition=ask.partition, leases=ask.leases))
        self.count += 1


def _given_back(ledger: Ledger, ended: set[AttemptKey]) -> dict[str, int]:
    """Return how many slots more account roots hold when the attempts that end in this decision have let go of theirs: fewer."""
    more: dict[str, int] = {}
    for key in ended:
        attempt = ledger.attempts.get(key)
        holds_slot = attempt is not None and attempt.incarnation not in (None, OUTSIDE) and not attempt.lost
        if attempt is not None and holds_slot and ledger.partition not in attempt.granted:
            root = account_root(attempt.account)
            more[root] = more.get(root, 0) - 1
    return more


def position(ledger: Ledger, name: Name, leases: Leases, root: str) -> int:
    """Return how many of the same account root wait for the same."""
    line = ledger.limited.get(name, {}).get(leases) if leases else ledger.waiting.get(name)
    return 0 if line is None else line.count(root)


# --- what is said about waiting ---------------------------------------------------------------


def unserved(ledger: Ledger, slots: FreeSlots, now_ms: int) -> list[Any]:
    """Return notices to attempts that no executor offers the function of, once each and not at once."""
    events: list[Any] = []
    for (queue, function), keys in ledger.unnoticed.items():
        first = ledger.attempts[next(iter(keys))]
        if first.call is None or first.call.is_outside or slots.offered(queue, first.call.kind, function):
            continue
        for key in keys:
            attempt = ledger.attempts[key]
            if now_ms - attempt.queued_ms < UNSERVED_MS:
                break
            reason = f"no executor of queue {queue} offers {first.call.kind}:{function}"
            obstacle = Obstacle(Lease(ledger.partition, "", ""), "no_executor", reason, 0)
            events.append(leasing.throttled(key, attempt.account, obstacle, position(ledger, attempt.line, (), "")))
            if len(events) >= MAX_NOTICES_PER_ENTRY:
                return events
    return events


def scale_out(ledger: Ledger, desk: Desk, slots: FreeSlots) -> list[Any]:
    """Return what changed about queues that want more executors: work for which only a slot is missing waits for long."""
    wanting = {
        queue
        for queue in ledger.depth
        if queue and not slots.is_paused(queue) and _wants_more(ledger, desk, slots, queue)
    }
    events: list[Any] = []
    for queue in sorted(wanting ^ set(ledger.scale_out)):
        wanted = queue in wanting
        waiting = ledger.depth.get(queue, 0)
        events.append(ev.ScaleOutWanted(queue=queue, wanted=wanted, waiting=waiting, slots=slots.slots_of(queue)))
    return events


def _wants_more(ledger: Ledger, desk: Desk, slots: FreeSlots, queue: str) -> bool:
    lines = [line for name, line in ledger.waiting.items() if name[0] == queue]
    for name, by_needs in ledger.limited.items():
        if name[0] == queue:
            lines += [line for needs, line in by_needs.items() if desk.obstacle(needs) is None]
    for line in lines:
        _, _, key = next(line.of(line.roots()[0]))
        attempt = ledger.attempts[key]
        if attempt.call is None or desk.now_ms - attempt.queued_ms < SCALE_OUT_MS:
            continue
        if not slots.left(queue, attempt.call.kind, attempt.call.function):
            return True
    return False
