"""What a service must be to run under the owner loop: its own part of the log-then-tell protocol."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol

import msgspec

from tidegate.domain.entry import Entry, Part, Position, parts_of
from tidegate.eventlog.interface import EventLogError, Message
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables


class Standing(Enum):
    """What is to become of a unit's state."""

    ACTIVE = "active"  # it is in the state, and goes on
    DONE = "done"  # it is over, and only a late message can still concern it
    GONE = "gone"  # there is nothing of it in the state


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What a machine decided on one input: events of one subject, which go into one entry, with others of that subject or alone.

    is_complete: the entry is to record all marks, not only those that changed, for the ones before it may be retired.
    """

    subject: str
    account: str
    events: Sequence[Any]
    is_complete: bool = False


class Retirement(NamedTuple):
    """What may be retired: entries before the last one that changed `unit`, once they are older than keep_ms."""

    unit: str
    keep_ms: int


class Tell(msgspec.Struct, frozen=True, gc=False):
    """A message that follows from an entry; `position` numbering is the order of the list it stands in."""

    topic: str
    partition: int
    key: str
    record: Any


def tells_of_parts(
    entry: Entry, at: Callable[[int], Position], tells: Callable[[Part, Callable[[int], Position]], list[Tell]]
) -> list[Tell]:
    """Return what each part of an entry tells, numbered through. Receivers see what one input caused, however it was logged.

    tells: says what a part tells.
    """
    found: list[Tell] = []
    for part in parts_of(entry):
        found += tells(part, _from(len(found), at) if found else at)
    return found


def _from(first: int, at: Callable[[int], Position]) -> Callable[[int], Position]:
    """Return what numbers messages that come behind `first` others."""
    return lambda index: at(first + index)


class Machine(Protocol):
    """A service's own part. `decide` and `due` look at the state and mutate nothing; `apply` alone changes it."""

    @property
    def service(self) -> str:
        """Return the service's name."""

    @property
    def entry_kind(self) -> str:
        """Return the schema of the log's entries: `RunEntry` or `LedgerEntry`."""

    @property
    def log_topic(self) -> str:
        """Return the topic of the log."""

    @property
    def lead_topic(self) -> str:
        """Return the input topic by whose partitions ownership is given."""

    @property
    def other_topics(self) -> tuple[str, ...]:
        """Return the input topics that are read along with the lead topic, by the same partition numbers."""

    @property
    def snapshot_topic(self) -> str:
        """Return the topic that the state of units is written to, partitioned as the log."""

    @property
    def table_topics(self) -> tuple[str, ...]:
        """Return the global tables that decisions look at."""

    @property
    def marked_topics(self) -> dict[str, str]:
        """Return input topic -> the log whose tells it carries: those are deduplicated by position (rule 7)."""

    @property
    def patient_topic(self) -> str:
        """Return the input topic some of whose messages may wait a moment for others of their subject; empty for none."""

    def may_wait(self, state: Any, record: Any) -> bool:
        """Tell whether an input of the patient topic may wait: nobody is kept waiting by it. Those behind it wait as well."""

    def subject_of(self, record: Any) -> str:
        """Return whom an input is about: those that wait are decided on before another one about the same subject."""

    def new_state(self, partition: int, shelf: Shelf) -> Any:
        """Return the state of a log partition that holds nothing yet. Units that were put away are found on the shelf."""

    def decide(self, state: Any, record: Any, message: Message, now_ms: int, tables: Tables) -> Decision | None:
        """Return the events that an input causes; None if it changes nothing."""

    def may_be_followed(self, events: Sequence[Any]) -> bool:
        """Tell whether an entry that ends with these events may go on with what the next input causes."""

    def instead(self, state: Any, record: Any, refused: Decision, error: Exception) -> Decision | None:
        """Return what is logged in place of a decision that cannot be: what it was about must not wait for it for ever.

        record: the input that it follows from, None if it was `due`. None: nothing can be; an input becomes a dead letter then.
        """

    def due(self, state: Any, now_ms: int, tables: Tables) -> tuple[str, Decision] | None:
        """Return what time or a changed table causes now, with its cause; None if nothing does. Called until it is None."""

    def dropped(self, partition: int) -> None:
        """Hear that the state of a partition was thrown away."""

    def next_due_ms(self, state: Any) -> int | None:
        """Return when `due` is to be asked again at the latest, Unix milliseconds; None for no time."""

    def apply(
        self,
        state: Any,
        subject: str,
        account: str,
        event: Any,
        seq: int,
        now_ms: int,
        covered: Container[str] = (),
    ) -> None:
        """Change the state by one event, the `seq`-th of its subject.

        covered: units that hold the event already, because they come from newer snapshots; not all that it changes are among them.
        """

    def head(self, state: Any, subject: str) -> tuple[int, bytes]:
        """Return the seq of the subject's last event and the SHA-256 of its last entry; 0 and empty if it has none."""

    def set_head(self, state: Any, subject: str, seq: int, digest: bytes) -> None:
        """Note the end of the subject's chain."""

    def own_subject(self, state: Any) -> str | None:
        """Return the subject that the whole partition is chained by; None if every unit has a chain of its own."""

    def units_of(self, subject: str, event: Any) -> Sequence[str]:
        """Return the units (runs, mostly) whose state an event changes: each as the event and that unit say, whatever the others
        are. The state is a set of units and of nothing else.
        """

    def standing(self, state: Any, unit: str) -> Standing:
        """Return how a unit stands that changed or that is in memory."""

    def quiet_since_ms(self, state: Any, unit: str) -> int | None:
        """Return since when an active unit in memory waits for a person or a time, Unix milliseconds; None if it does not."""

    def dump(self, state: Any, unit: str) -> bytes:
        """Return the unit's state; of one that is over, only what further messages to it need."""

    def load(self, state: Any, unit: str, data: bytes) -> None:
        """Put a unit into a state into which nothing was folded yet. Any exception says that the bytes are no good."""

    def load_resting(self, state: Any, unit: str, data: bytes, quiet_before_ms: int) -> bool:
        """Take of a unit only what must be known while it lies on the shelf, if it may lie there; returns whether it may.

        It may if it has waited since before that time. Any exception says that the bytes are no good.
        """

    def loaded(self, state: Any) -> None:
        """Derive what follows from all units together. Called once, after the last `load`."""

    def unload(self, state: Any, unit: str) -> None:
        """Forget a unit that was put on the shelf."""

    def parts(self, state: Any) -> Mapping[str, str]:
        """Return the texts that the dumped states refer to by name, because several units share them. Grows only."""

    def load_part(self, state: Any, name: str, text: str) -> None:
        """Take what `parts` returned once; called before any `load`."""

    def carries(self, entry: Entry) -> bool:
        """Tell whether an entry says all that the partition's state is: with it, nothing before it is needed."""

    def load_carried(self, state: Any, entry: Entry) -> list[str]:
        """Put what an entry carries into an empty state, and return its units. Raises CorruptLogError."""

    def retirement(self, state: Any) -> Retirement | None:
        """Return what of the log may be retired; None for nothing."""

    def tells(self, entry: Entry, at: Callable[[int], Position]) -> list[Tell]:
        """Return the messages that follow from an entry; `at(index)` is the position of the index-th of them."""

    def table_changed(self, topic: str, key: str, row: Any | None, offset: int) -> None:
        """Hear of a changed row of a global table (None: removed)."""

    def tables_loaded(self) -> None:
        """Hear that all rows which were there at the start were told; what is heard from here on is news."""


class CorruptLogError(EventLogError):
    """The log contradicts itself (a broken chain, a gap in seq): people must look before anything goes on."""


class RefusedToStartError(EventLogError):
    """The log or its inputs are not what they were (rule 10). The message says what happened and what can be done."""


class EntryRefusedError(ValueError):
    """A decision cannot become an entry. `decide` bounds what it returns, so this is a defect that must not spread."""
