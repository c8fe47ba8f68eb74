"""The gate as a machine of the owner loop: policies and executors are its tables, a ledger partition its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import structlog

from tidegate.domain import canonical
from tidegate.domain.entry import Entry, Position
from tidegate.domain.identity import account_root, partition_of
from tidegate.domain.messages import GateRequest, PolicyPublished
from tidegate.eventlog.interface import Message
from tidegate.eventlog.owner import Decision, Tell
from tidegate.eventlog.tables import Tables
from tidegate.gate import decide
from tidegate.gate.ledger import Ledger, apply
from tidegate.gate.placement import Executors
from tidegate.gate.policy import MAX_REASON, Policy, PolicyError, PolicySet, Rule, parse
from tidegate.gate.tells import tells

_log = structlog.get_logger()

INSTANCES: Final = "instances"
POLICIES: Final = "policies"


class MisroutedError(ValueError):
    """A message lies in another partition than its account's: its writer computed the partition wrongly."""


class GateMachine:
    """See `eventlog.owner.Machine`."""

    service: Final = "gate"
    entry_kind: Final = "LedgerEntry"
    log_topic: Final = "gate-ledger"
    lead_topic: Final = "gate-requests"
    other_topics: Final[tuple[str, ...]] = ()
    table_topics: Final = (POLICIES, INSTANCES)
    marked_topics: Final = {"gate-requests": "run-events"}

    def __init__(self, run_partitions: int, account_partitions: int, executors: Executors) -> None:
        self._run_partitions = run_partitions
        self._account_partitions = account_partitions
        self.executors = executors
        self._documents: dict[str, Policy] = {}
        self._policies = PolicySet({})
        self._ledgers: dict[int, Ledger] = {}

    def new_state(self, partition: int) -> Ledger:
        """Return an empty ledger."""
        ledger = self._ledgers[partition] = Ledger(partition)
        return ledger

    def dropped(self, partition: int) -> None:
        """Forget the ledger: its placements are somebody else's to count now."""
        self._ledgers.pop(partition, None)

    def decide(self, state: Ledger, record: Any, message: Message, now_ms: int, tables: Tables) -> Decision | None:
        """Return what a request causes. Raises MisroutedError for a message of another partition's account."""
        if not isinstance(record, GateRequest):
            raise TypeError(f"a {type(record).__name__} has no business in {message.topic}")
        if partition_of(account_root(record.account), self._account_partitions) != state.partition:
            raise MisroutedError(f"account {record.account} belongs to another partition than {state.partition}")
        draft = decide.Draft(state, record, self._policies, self.executors.free_slots(self._ledgers))
        events = decide.on_request(draft)
        return Decision(state.subject, "", events) if events else None

    def due(self, state: Ledger, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return losses of executors that ended, then placements that became possible."""
        if state.held_by:
            self.executors.watch(state.held_by)
            self.executors.expire(tables.versions[INSTANCES])
            lost = decide.losses(state, self.executors.ended)
            if lost:
                return f"table:{INSTANCES}:{tables.versions[INSTANCES]}", Decision(state.subject, "", lost)
        if state.waiting_count:
            placed = decide.place_waiting(state, self.executors.free_slots(self._ledgers))
            if placed:
                return f"table:{INSTANCES}:{tables.versions[INSTANCES]}", Decision(state.subject, "", placed)
        return None

    def next_due_ms(self, state: Ledger) -> int | None:
        """Leases are looked at in every turn; a turn comes at least every 200 ms."""
        return None

    def apply(self, state: Ledger, subject: str, account: str, event: Any, now_ms: int) -> None:
        """Change the ledger by one event."""
        apply(state, event)

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry."""
        return tells(entry, at, self._run_partitions)

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """Take note of a policy or of an instance."""
        if topic == INSTANCES:
            self.executors.take(key, row, offset)
        elif topic == POLICIES:
            self._policy_changed(key, row)

    def tables_loaded(self) -> None:
        """From here on, what is heard of executors is news."""
        self.executors.listen()

    def _policy_changed(self, key: str, row: PolicyPublished | None) -> None:
        """Put a policy in force. A broken one is ignored loudly: the one of before stays, since dropping it would allow more.

        After a restart the one of before is not known any more. Then everything is denied, and says which policy is broken.
        """
        if row is None:
            self._documents.pop(key, None)
        else:
            try:
                self._documents[key] = parse(canonical.loads(row.document))
            except (PolicyError, canonical.NotJsonError) as error:
                _log.error("policy ignored, the one of before stays in force", policy=key, error=str(error))
                if key not in self._documents:
                    self._documents[key] = _unreadable(key)
        self._policies = PolicySet(self._documents)
        _log.info("policies in force", policies=sorted(f"{p.policy}@{p.version}" for p in self._documents.values()))


def _unreadable(key: str) -> Policy:
    """Return what stands in for a policy that this version cannot read and whose earlier text is not known."""
    reason = f"policy {key!r} cannot be read by this gate; apply it again, or remove it"
    rule = Rule(name="unreadable", when="true", then="deny", reason=reason[:MAX_REASON])
    return Policy(policy="unreadable", version="0", rules=[rule])
