"""The gate as a machine of the owner loop: policies and executors are its tables, a ledger partition its state."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final

import structlog

from tidegate import metrics
from tidegate.domain.controls import Controls
from tidegate.domain.entry import Entry, Position
from tidegate.domain.identity import account_root, partition_of
from tidegate.domain.ledger_events import carried_by
from tidegate.domain.messages import GateLeases, GateRequest, PolicyPublished
from tidegate.eventlog.interface import Message
from tidegate.eventlog.machine import CorruptLogError, Decision, Retirement, Standing, Tell
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables, Unreadable
from tidegate.gate import carrying, decide, leasing, snapshots, waiting
from tidegate.gate.fold import apply, derive
from tidegate.gate.in_force import POLICIES, DocumentsInForce
from tidegate.gate.ledger import Ledger
from tidegate.gate.limits import Desk
from tidegate.gate.placement import Executors
from tidegate.gate.tells import tells

_log = structlog.get_logger()

INSTANCES: Final = "instances"
CONTROLS: Final = "controls"
QUEUES_EVERY_MS: Final = 500
WINDOWS_EVERY_MS: Final = 1_000
CARRY_AGAIN_MS: Final = 60_000
LOOK_AGAIN_MS: Final = 10_000


class MisroutedError(ValueError):
    """A message lies in another partition than its account's: its writer computed the partition wrongly."""


class GateMachine:
    """See `eventlog.owner.Machine`."""

    service: Final = "gate"
    entry_kind: Final = "LedgerEntry"
    log_topic: Final = "gate-ledger"
    lead_topic: Final = "gate-requests"
    other_topics: Final = ("gate-leases",)
    snapshot_topic: Final = "gate-snapshots"
    table_topics: Final = (POLICIES, INSTANCES, CONTROLS)
    marked_topics: Final = {"gate-requests": "run-events", "gate-leases": "gate-ledger"}

    patient_topic: Final = ""

    def __init__(self, run_partitions: int, account_partitions: int, executors: Executors) -> None:
        self._run_partitions = run_partitions
        self._account_partitions = account_partitions
        self.executors = executors
        self._controls = Controls()
        self.documents = DocumentsInForce(account_partitions)
        self._is_loaded = False
        self._soonest_ms: dict[int, int] = {}
        self._look_at_queues_ms: dict[int, int] = {}
        self._ledgers: dict[int, Ledger] = {}
        self._carry_not_before_ms: dict[int, int] = {}
        self._may_hold_orphans: set[int] = set()  # partitions that were not looked through since they are ours
        self._look_not_before_ms: dict[tuple[int, str], int] = {}

    def new_state(self, partition: int, shelf: Shelf) -> Ledger:
        """Return an empty ledger."""
        ledger = self._ledgers[partition] = Ledger(partition)
        self._may_hold_orphans.add(partition)
        return ledger

    def dropped(self, partition: int) -> None:
        """Forget the ledger: its placements are somebody else's to count now."""
        self._ledgers.pop(partition, None)

    def may_wait(self, state: Ledger, record: Any) -> bool:
        """Somebody waits for every answer."""
        return False

    def subject_of(self, record: Any) -> str:
        """Never called: nothing waits."""
        raise TypeError("no input of a gate waits for another")

    def decide(self, state: Ledger, record: Any, message: Message, now_ms: int, tables: Tables) -> Decision | None:
        """Return what an input causes. Raises MisroutedError for a request of another partition's account."""
        desk = Desk(state, self.documents.limits, now_ms)
        if isinstance(record, GateLeases):
            answers = decide.with_budgets_freed(state, leasing.on_leases(desk, record), self.documents.budgets, now_ms)
            return Decision(state.subject, "", answers) if answers else None
        if not isinstance(record, GateRequest):
            raise TypeError(f"a {type(record).__name__} has no business in {message.topic}")
        if partition_of(account_root(record.account), self._account_partitions) != state.partition:
            raise MisroutedError(f"account {record.account} belongs to another partition than {state.partition}")
        slots = self.executors.free_slots(self._ledgers)
        draft = decide.Draft(state, record, self.documents.policies, slots, desk, self.documents.budgets)
        events = decide.on_request(draft)
        return Decision(state.subject, "", events) if events else None

    def may_be_followed(self, events: Sequence[Any]) -> bool:
        """An entry holds what a turn decides."""
        return True

    def instead(self, state: Ledger, record: Any, refused: Decision, error: Exception) -> Decision | None:
        """Return None: what is asked of the gate was written by a scheduler before, in an entry that was larger."""
        return None

    def due(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return losses of executors that ended, then placements that became possible, then what is to be said of the rest.

        What cannot be decided is said loudly and left alone for a while; everything else goes on.
        """
        for name, look in _LOOKS:
            if now_ms < self._look_not_before_ms.get((state.partition, name), 0):
                continue
            try:
                found = look(self, state, now_ms, tables)
            except Exception:
                self._look_not_before_ms[state.partition, name] = now_ms + LOOK_AGAIN_MS
                metrics.gate_undecided.labels(name).inc()
                _log.exception("nothing decided", about=name, partition=state.partition, again_in_ms=LOOK_AGAIN_MS)
                continue
            if found is not None:
                return found
        return None

    def _orphaned(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        if state.partition not in self._may_hold_orphans:
            return None
        events = leasing.orphaned(Desk(state, self.documents.limits, now_ms))
        if not events:
            self._may_hold_orphans.discard(state.partition)
        return _due(state, tables, INSTANCES, events)

    def _lost(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        if not state.held_by:
            return None
        self.executors.watch(state.held_by)
        self.executors.expire(tables.versions[INSTANCES], tables.unread[INSTANCES])
        desk = Desk(state, self.documents.limits, now_ms)
        lost = decide.losses(state, self.executors.ended, desk, self.documents.budgets)
        return _due(state, tables, INSTANCES, lost)

    def _timely(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        timely = decide.lapses(state, now_ms) or decide.family_end(state, now_ms)
        return (f"timer:{now_ms}", Decision(state.subject, "", timely)) if timely else None

    def _closed(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        if not state.window_ends or state.window_ends[0][0] > now_ms:
            return None
        events = decide.closings(state, now_ms)
        if not events:  # what is still needed closes with what is set aside in it
            self._look_not_before_ms[state.partition, "closed"] = now_ms + WINDOWS_EVERY_MS
        return (f"timer:{now_ms}", Decision(state.subject, "", events)) if events else None

    def _resumed(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        if not state.lacking or not state.lacking.wake(now_ms):
            return None
        slots = self.executors.free_slots(self._ledgers)
        desk = Desk(state, self.documents.limits, now_ms)
        look = decide.resumption(decide.Turn(state, self.documents.policies, self.documents.budgets, slots, desk))
        state.lacking.looked(look)
        return _due(state, tables, POLICIES, look.events)

    def _waiting(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        self._soonest_ms.pop(state.partition, None)
        if not state.has_waiting():
            return None
        slots = self.executors.free_slots(self._ledgers)
        desk = Desk(state, self.documents.limits, now_ms)
        events = waiting.place_waiting(state, slots, desk=desk)
        events = decide.with_budgets_freed(state, events, self.documents.budgets, now_ms)
        if not events:
            if desk.soonest_ms:
                self._soonest_ms[state.partition] = desk.soonest_ms
            events = leasing.idle(state, now_ms) or waiting.unserved(state, slots, now_ms)
        return _due(state, tables, INSTANCES, events)

    def _scale_out(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        if not (state.depth or state.scale_out) or now_ms < self._look_at_queues_ms.get(state.partition, 0):
            return None
        # All lines are walked for this, so not in every turn.
        self._look_at_queues_ms[state.partition] = now_ms + QUEUES_EVERY_MS
        desk = Desk(state, self.documents.limits, now_ms)
        events = waiting.scale_out(state, desk, self.executors.free_slots(self._ledgers))
        return _due(state, tables, INSTANCES, events)

    def _carry_forward(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        retention = self.documents.retention
        if retention is None or now_ms < self._carry_not_before_ms.get(state.partition, 0):
            return None
        if not carrying.is_due(state, retention, now_ms):
            return None
        event = carrying.carried(state, retention.label, self.documents.retention_by)
        if event is None:
            self._carry_not_before_ms[state.partition] = now_ms + CARRY_AGAIN_MS
            _log.warning("too much is open to carry the ledger forward in one entry", partition=state.partition)
            return None
        return f"table:{POLICIES}:{tables.versions[POLICIES]}", Decision(state.subject, "", [event], is_complete=True)

    def next_due_ms(self, state: Ledger) -> int | None:
        """Return when a rate or a breaker lets the next one through. Leases are looked at in every turn, at least every 200 ms."""
        return self._soonest_ms.get(state.partition)

    def apply(
        self,
        state: Ledger,
        subject: str,
        account: str,
        event: Any,
        seq: int,
        now_ms: int,
        covered: Container[str] = (),
    ) -> None:
        """Change the ledger by one event, but for the units that it has changed already."""
        apply(state, event, seq, now_ms, covered)

    # -- units: a run's money is one; the chain is the partition's ------------------------------

    def head(self, state: Ledger, subject: str) -> tuple[int, bytes]:
        """Return the end of the ledger's chain."""
        return state.seq, state.head

    def set_head(self, state: Ledger, subject: str, seq: int, digest: bytes) -> None:
        """Note the end of the ledger's chain."""
        state.seq, state.head = seq, digest

    def own_subject(self, state: Ledger) -> str:
        """Return the name of the ledger's chain."""
        return state.subject

    def units_of(self, subject: str, event: Any) -> Sequence[str]:
        """Return the run whose money it is, buckets that count it, or what else of the ledger it changes."""
        return snapshots.units_of_event(event)

    def standing(self, state: Ledger, unit: str) -> Standing:
        """A run that is closed, and of which nothing is open, is forgotten by the ledger itself."""
        return Standing.ACTIVE if snapshots.is_there(state, unit) else Standing.GONE

    def quiet_since_ms(self, state: Ledger, unit: str) -> None:
        """An open run's money is small, and is asked about together with everybody else's: it stays in memory."""

    def dump(self, state: Ledger, unit: str) -> bytes:
        """Return the run's money and attempts as bytes."""
        return snapshots.dump(state, unit)

    def load(self, state: Ledger, unit: str, data: bytes) -> None:
        """Take a run's money and attempts."""
        snapshots.load(state, unit, data)

    def load_resting(self, state: Ledger, unit: str, data: bytes, quiet_before_ms: int) -> bool:
        """Nothing of the ledger lies on the shelf."""
        return False

    def loaded(self, state: Ledger) -> None:
        """Sort out who waits and who holds what."""
        derive(state)

    def unload(self, state: Ledger, unit: str) -> None:
        """Never called: nothing of the ledger is put on the shelf."""
        raise TypeError(f"{unit}: the ledger puts nothing on the shelf")

    def parts(self, state: Ledger) -> Mapping[str, str]:
        """Runs share nothing at the gate."""
        return {}

    def load_part(self, state: Ledger, name: str, text: str) -> None:
        """There are no parts."""

    # -- retirement ---------------------------------------------------------------

    def carries(self, entry: Entry) -> bool:
        """Tell whether an entry carries the ledger forward."""
        return carried_by(entry.events) is not None

    def load_carried(self, state: Ledger, entry: Entry) -> list[str]:
        """Put what an entry carries into an empty ledger."""
        try:
            return carrying.load(state, entry.events[0])
        except carrying.CarriedError as error:
            raise CorruptLogError(f"the entry of {entry.subject} at seq {entry.first_seq}: {error}") from error

    def retirement(self, state: Ledger) -> Retirement | None:
        """Return what may be retired, as the document says that is in force."""
        retention = self.documents.retention
        if retention is None or state.carried is None:
            return None
        return Retirement(snapshots.CARRIED, retention.keep_s * 1000)

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry."""
        return tells(entry, at, self._run_partitions)

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """Take note of a policy, of an instance or of what is paused."""
        if topic == INSTANCES:
            self.executors.take(key, row, offset)
        elif topic == POLICIES:
            self._document_changed(key, row, offset)
        elif topic == CONTROLS:
            self._controls.take(key, row, is_unknown=isinstance(row, Unreadable))
            self.executors.pause(self._controls.is_paused)

    def tables_loaded(self) -> None:
        """From here on, what is heard of executors is news."""
        self.executors.listen()
        self._is_loaded = True
        _log.info("documents in force", documents=len(self.documents))

    def _document_changed(self, key: str, row: PolicyPublished | Unreadable | None, offset: int) -> None:
        self.documents.take(key, row, offset)
        for ledger in self._ledgers.values():
            ledger.lacking.stir_all()  # there may be room that was not there before
        if self._is_loaded:
            _log.info("documents in force", changed=key, documents=len(self.documents))


_LOOKS: Final = tuple(
    [
        (look.__name__.lstrip("_"), look)
        for look in (
            GateMachine._orphaned,
            GateMachine._lost,
            GateMachine._timely,
            GateMachine._closed,
            GateMachine._resumed,
            GateMachine._waiting,
            GateMachine._scale_out,
            GateMachine._carry_forward,
        )
    ]
)


def _due(state: Ledger, tables: Tables, topic: str, events: list[Any]) -> tuple[str, Decision] | None:
    """Return a decision that a table's rows led to, with that as its cause; None if there are no events."""
    return (f"table:{topic}:{tables.versions[topic]}", Decision(state.subject, "", events)) if events else None
