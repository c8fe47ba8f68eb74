"""Attempts that wait for room in budgets, in lines of those that lack the same. Pure.

All of a line are alike: the same budgets count them, and they are expected to use as much. So if the first one lacks what the
line waits for, all of it do, and none but the first need be tried. A line is looked at again only when there may be more of
what it lacks. That makes the work depend on how many lines there are to look at, and not on who waits in them.

Where an attempt stands is what was found when it was looked at last, and no fact of the ledger: whoever restores one looks at
all of them anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from tidegate.gate.names import learned_key, scope_of

if TYPE_CHECKING:
    from tidegate.domain.messages import Call
    from tidegate.gate.state import AttemptKey, RunMoney


class Alike(NamedTuple):
    """What decides which budgets count an attempt, and what it is expected to use."""

    account: str
    workflow: str
    tags: tuple[tuple[str, str], ...]
    kind: str
    function: str
    provider: str
    model: str
    reserve_micros: int
    max_input_tokens: int
    max_output_tokens: int
    timeout_ms: int
    is_outside: bool


class Scope(NamedTuple):
    """A bucket in whichever window, or what else is lacking. is_asked: a human is asked about those that lack it."""

    lacks: str
    is_asked: bool


class Spot(NamedTuple):
    """Names a line."""

    scope: Scope
    alike: Alike


class Shortage(NamedTuple):
    """What an attempt was found to lack, and when its window turns; 0 for never."""

    bucket: str
    until_ms: int


class Look(NamedTuple):
    """What was found of lines. events: what becomes of the first attempt that lacks nothing any more; served: its line.

    without_room: lines whose first attempt lacks what they wait for. moved: attempts that lack something else.
    """

    events: list[Any]
    served: Spot | None
    without_room: list[tuple[Spot, Shortage]]
    moved: list[tuple[AttemptKey, Shortage]]


class _Lines:
    """The lines of one scope, by account: those to be looked at, and those that were since there may have been room.

    Accounts take turns, and the lines of each: who makes a thousand lines by tags of their own keeps nobody waiting by that.
    """

    __slots__ = ("done", "todo")

    def __init__(self) -> None:
        self.todo: dict[str, dict[Alike, None]] = {}
        self.done: dict[str, dict[Alike, None]] = {}

    def __bool__(self) -> bool:
        return bool(self.todo or self.done)

    def stir(self) -> None:
        # Whoever is in `done` was looked at meanwhile, which costs more than this.
        for account, lines in self.done.items():
            self.todo.setdefault(account, {}).update(lines)
        self.done.clear()

    def put(self, alike: Alike, *, is_done: bool) -> None:
        """Put a line behind the others of its account, and that behind the other accounts if it was not there."""
        self.drop(alike)
        where = self.done if is_done else self.todo
        where.setdefault(alike.account, {})[alike] = None

    def drop(self, alike: Alike) -> None:
        """Forget a line, if it is there."""
        for where in (self.todo, self.done):
            lines = where.get(alike.account)
            if lines is not None and alike in lines:
                del lines[alike]
                if not lines:
                    del where[alike.account]

    def served(self, alike: Alike) -> None:
        """Put a line, and its account, behind all others."""
        self.put(alike, is_done=False)
        self.todo[alike.account] = self.todo.pop(alike.account)

    def is_done(self, alike: Alike) -> bool:
        """Tell whether a line was looked at since there may have been room."""
        return alike in self.done.get(alike.account, ())

    def in_turn(self) -> Iterator[Alike]:
        """Return the lines to look at: the first of each account, then the second ones, and so on."""
        accounts = []
        for lines in self.todo.values():
            following = iter(lines)
            yield next(following)
            accounts.append(following)
        while accounts:
            left = []
            for following in accounts:
                alike = next(following, None)
                if alike is not None:
                    yield alike
                    left.append(following)
            accounts = left


class Lacking:
    """All lines of one ledger. Two of them are equal if the same attempts stand in them, wherever."""

    __slots__ = (
        "_all",
        "_lines",
        "_members",
        "_next_end_ms",
        "_of_function",
        "_spots",
        "_stirred",
        "_unsorted",
        "_until_ms",
    )

    def __init__(self) -> None:
        self._spots: dict[AttemptKey, Spot] = {}
        self._members: dict[Spot, dict[AttemptKey, int]] = {}  # with their turns
        self._unsorted: set[Spot] = set()
        self._lines: dict[Scope, _Lines] = {}
        self._of_function: dict[str, dict[Spot, None]] = {}
        self._stirred: dict[Scope, None] = {}
        self._until_ms: dict[Scope, int] = {}
        self._next_end_ms = 0  # the first of these; 0 for none
        self._all = True

    def __bool__(self) -> bool:
        return bool(self._spots)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lacking):
            return NotImplemented
        return self._whom() == other._whom()

    __hash__ = None  # type: ignore[assignment] # it changes

    def _whom(self) -> dict[AttemptKey, bool]:
        return {key: spot.scope.is_asked for key, spot in self._spots.items()}

    # -- who stands where ---------------------------------------------------------------

    def add(self, key: AttemptKey, lack: Shortage, turn: int, run: RunMoney, call: Call, *, is_asked: bool) -> None:
        """Stand in the line of those that are alike and lack the same, by turn. It lacks that now: there is nothing to look at
        until something is stirred or the window turns."""
        alike = Alike(
            run.account,
            run.workflow.partition("@")[0],
            tuple(sorted(run.tags.items())),
            call.kind,
            call.function,
            call.provider,
            call.model,
            call.reserve_micros,
            call.max_input_tokens,
            call.max_output_tokens,
            call.timeout_ms,
            call.is_outside,
        )
        scope = Scope(scope_of(lack.bucket), is_asked)
        self._stand(key, turn, Spot(scope, alike))
        self._note_end(scope, lack)

    def _stand(self, key: AttemptKey, turn: int, spot: Spot) -> None:
        self._spots[key] = spot
        members = self._members.get(spot)
        if members is None:
            members = self._members[spot] = {}
            self._lines.setdefault(spot.scope, _Lines()).put(spot.alike, is_done=True)
            self._of_function.setdefault(_function(spot), {})[spot] = None
        if members and members[next(reversed(members))] > turn:
            self._unsorted.add(spot)
        members[key] = turn

    def discard(self, key: AttemptKey) -> None:
        """Leave, if it stands anywhere."""
        spot = self._spots.pop(key, None) if self._spots else None
        if spot is None:
            return
        members = self._members[spot]
        del members[key]
        if members:
            return
        del self._members[spot]
        self._unsorted.discard(spot)
        lines = self._lines[spot.scope]
        lines.drop(spot.alike)
        if not lines.todo:
            self._stirred.pop(spot.scope, None)
        if not lines:
            del self._lines[spot.scope]
            self._until_ms.pop(spot.scope, None)
        spots = self._of_function[_function(spot)]
        del spots[spot]
        if not spots:
            del self._of_function[_function(spot)]

    # -- what may have changed ---------------------------------------------------------------

    def stir(self, bucket: str) -> None:
        """There may be more room in a bucket."""
        if self._spots:
            for is_asked in (False, True):
                self._stir(Scope(scope_of(bucket), is_asked))

    def _stir(self, scope: Scope) -> None:
        lines = self._lines.get(scope)
        if lines is not None:
            lines.stir()
            self._stirred[scope] = None

    def stir_function(self, name: str) -> None:
        """Attempts of a function, by the name of what was learned of it, may be expected to use less."""
        for spot in self._of_function.get(name, ()):
            lines = self._lines[spot.scope]
            if lines.is_done(spot.alike):
                lines.put(spot.alike, is_done=False)
            self._stirred[spot.scope] = None

    def stir_all(self) -> None:
        """Anything may have changed."""
        self._all = True

    def wake(self, now_ms: int) -> bool:
        """Stir those whose window has turned; tells whether there is any line to look at."""
        if self._all:
            self._all = False
            for scope in self._lines:
                self._stir(scope)
        if 0 < self._next_end_ms <= now_ms:
            for scope in [scope for scope, until_ms in self._until_ms.items() if until_ms <= now_ms]:
                del self._until_ms[scope]
                self._stir(scope)
            self._next_end_ms = min(self._until_ms.values(), default=0)
        return bool(self._stirred)

    # -- looking ---------------------------------------------------------------

    def to_look_at(self) -> Iterator[tuple[Spot, Iterable[AttemptKey]]]:
        """Return the lines to look at, with their members, the first one first. Before those that a human is asked about come
        those that just wait: they are sure to be wanted."""
        for is_asked in (False, True):
            for scope in self._stirred:
                if scope.is_asked is is_asked:
                    for alike in self._lines[scope].in_turn():
                        spot = Spot(scope, alike)
                        self._sort(spot)
                        yield spot, self._members[spot]

    def _sort(self, spot: Spot) -> None:
        if spot in self._unsorted:
            self._members[spot] = dict(sorted(self._members[spot].items(), key=itemgetter(1)))
            self._unsorted.discard(spot)

    def looked(self, look: Look) -> None:
        """Take note of what was found. A line that was served, and its account, go behind all others."""
        for spot, shortage in look.without_room:
            lines = self._lines[spot.scope]
            lines.put(spot.alike, is_done=True)
            if self._stirred.pop(spot.scope, 0) is None and lines.todo:
                self._stirred[spot.scope] = None  # behind the others: a scope that is stirred all the time hides nobody
            self._note_end(spot.scope, shortage)
        for key, shortage in look.moved:
            before = self._spots[key]
            turn = self._members[before][key]
            self.discard(key)
            scope = Scope(scope_of(shortage.bucket), before.scope.is_asked)
            self._stand(key, turn, Spot(scope, before.alike))
            self._note_end(scope, shortage)
        if look.served is not None and look.served.scope in self._stirred:
            lines = self._lines[look.served.scope]
            lines.served(look.served.alike)
            del self._stirred[look.served.scope]
            self._stirred[look.served.scope] = None

    def _note_end(self, scope: Scope, shortage: Shortage) -> None:
        if shortage.until_ms:
            self._until_ms[scope] = shortage.until_ms
            # Too early is harmless: `wake` finds out.
            self._next_end_ms = min(self._next_end_ms or shortage.until_ms, shortage.until_ms)


def _function(spot: Spot) -> str:
    return learned_key(spot.alike.kind, spot.alike.function)
