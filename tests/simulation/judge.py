"""The judge: sees every record as it is written and every function as it is entered, and knows what may not be.

It keeps its own books (epochs, chains, positions, who may run what), apart from three things that it takes from the code: the
codec, the pure folds and decisions (to ask whether an entry is what they give), and the money checker, which is a second
implementation itself. Numbers in brackets are those of the invariants in docs/architecture.md.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from simulation.budgets import PREFIXES, BudgetJudge
from simulation.change_books import ChangeBooks
from simulation.flows import FlowBooks
from simulation.route_books import RouteBooks
from simulation.wait_books import WaitBooks
from simulation.work import BOUNDS, RULES
from support.pure import entries_of
from tidegate import codec
from tidegate.audit.limits import LimitBooks
from tidegate.audit.money import Books
from tidegate.domain import ledger_events as le
from tidegate.domain import run_events as re
from tidegate.domain import states
from tidegate.domain.entry import Checkpoint, Entry, OwnerAnnounced, Position, causes_of
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import (
    Call,
    DeadLetter,
    GateDecision,
    GateLeases,
    GateRequest,
    RunCommand,
    StepResult,
    StepTask,
)
from tidegate.domain.run import RunState
from tidegate.domain.waits import OUTSIDE
from tidegate.eventlog.interface import Message, TopicPartition
from tidegate.eventlog.machine import Tell
from tidegate.eventlog.owned import OwnedPartition
from tidegate.eventlog.shelf import Shelf
from tidegate.eventlog.tables import Tables
from tidegate.gate.fold import apply as apply_ledger
from tidegate.gate.ledger import Ledger
from tidegate.gate.state import HELD
from tidegate.gate.tells import tells as gate_tells
from tidegate.projection import rows
from tidegate.scheduler import decide, holding, waits
from tidegate.scheduler.service import RunsOfPartition, SchedulerMachine
from tidegate.scheduler.snapshots import dump as dump_run
from tidegate.scheduler.snapshots import load as load_run
from tidegate.scheduler.tells import tells as scheduler_tells

if TYPE_CHECKING:
    from simulation.executor import ExecutorLife
    from simulation.processes import Life
    from simulation.world import World

AttemptKey = tuple[str, str, int]  # run, step, attempt
RUN_EVENTS, GATE_LEDGER = "run-events", "gate-ledger"
TELLS = {"gate-requests": RUN_EVENTS, "gate-decisions": GATE_LEDGER, "gate-leases": GATE_LEDGER}
WHEN_TO_LOOK = frozenset({"questions", "window_ends"})
NEVER_ENTERED = frozenset({"busy", "released", "denied"})
OF_COMMANDS = (
    re.RunStarted,
    re.RunRefused,
    re.CommandRefused,
    re.RunCancelRequested,
    re.ApprovalResolved,
    re.ChildEnded,
    re.WaitEnded,
    re.SignalReceived,
    re.RunPaused,
    re.RunResumed,
)


class Violation(BaseException):
    """An invariant does not hold."""


class LogOfPartition:
    """What the judge knows of one partition of a log."""

    def __init__(self, log: str, partition: int) -> None:
        self.log = log
        self.partition = partition
        self.epoch = -1
        self.announced_by: Life | None = (
            None  # the process that announced the epoch in force; None if it was dead by then
        )
        self.heads: dict[str, tuple[int, bytes]] = {}
        self.now_ms = 0
        self.inputs: dict[str, int] = {}
        self.marks: dict[str, int] = {}
        self.causes: set[str] = set()
        self.keys: set[bytes | None] = set()
        self.untold: dict[int, set[Any]] = {}  # offset of an entry -> its tells that nobody has seen yet
        self.void = 0
        self.entries: dict[str, list[int]] = defaultdict(list)  # offsets of the valid entries of each subject
        self.state: Any = RunsOfPartition(partition, Shelf()) if log == RUN_EVENTS else Ledger(partition)
        self.touched: set[str] = set()
        self.compared_epoch = -1  # the owner whose whole state was compared
        self.checkpoint: Checkpoint | None = None
        self.entry_keys: dict[bytes, int] = {}
        self.carried_at = -1  # the last entry that carries everything forward
        self.certified_at = -1  # the last one of these that a checkpoint held
        self.retired: set[int] = set()

    def is_read_back(self, offset: int) -> bool:
        """Tell whether a new owner that finds no snapshots reads the entry: not if a checkpoint says that none are needed."""
        certified = self.checkpoint
        is_needed = certified is None or bool(certified.live or certified.segments) or offset >= certified.read_from
        return is_needed and offset > self.carried_at


class Judge:
    """Checks. Every method raises Violation, or does nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.scheduler = SchedulerMachine(world.run_partitions, world.account_partitions)
        self.logs = {
            (log, partition): LogOfPartition(log, partition)
            for log, count in ((RUN_EVENTS, world.run_partitions), (GATE_LEDGER, world.account_partitions))
            for partition in range(count)
        }
        self.mail: dict[tuple[str, int, int], Message] = {}
        self.expected: dict[tuple[str, Position], tuple[str, int, str, Any]] = {}
        self.letters: dict[tuple[str, int, int], DeadLetter] = {}
        self.rubbish: set[tuple[str, int, int]] = set()
        self.books = Books()
        self.limits = LimitBooks(BOUNDS)
        self.waits = WaitBooks(self.require)
        self.changes = ChangeBooks(self.require)
        self.flows = FlowBooks(self.require)
        self.routes = RouteBooks(self.require)
        self.budgets = BudgetJudge(self.require, self.books.budgets)
        self.effects: Counter[tuple[str, str]] = Counter()
        self.commands: dict[tuple[str, str], RunCommand] = {}
        self.told_commands: dict[tuple[str, str], tuple[LogOfPartition, int]] = {}
        self.sources: set[str] = set()
        self.reserved: set[AttemptKey] = set()
        self.placed: dict[AttemptKey, tuple[str, int]] = {}
        self.lost: set[AttemptKey] = set()
        self.asked: dict[AttemptKey, Call] = {}
        self.held_from_the_start: set[tuple[str, str]] = set()
        self.ended: dict[AttemptKey, str] = {}
        self.definitions: dict[str, str] = {}
        self.wishes: dict[str, str] = {}  # by run: the executor that it prefers
        self.by_rule: Counter[tuple[str, str]] = Counter()  # failures that a retry rule counted
        self.by_document: set[tuple[str, str]] = set()  # steps about which a retry document has decided: see `budgets`
        self.granted: set[AttemptKey] = set()  # unknown outcomes that a human let be repeated
        self.unknown: set[tuple[str, str]] = (
            set()
        )  # steps of which nobody knows, or has said, whether they had their effect
        self.unknown_ends: Counter[str] = Counter()  # how attempts with such an outcome ended
        self.agreed: set[tuple[str, str, str]] = set()  # run, step, hash of the arguments that a human approved
        self.entered_at: dict[AttemptKey, int] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.costs: dict[AttemptKey, int] = {}  # of what results said, as far as they were written
        self.settled: Counter[AttemptKey] = Counter()
        self.facts: dict[tuple[Any, ...], int] = {}  # identity of a valid event -> offset of its entry
        self._policies: list[tuple[int, str, tuple[str, ...] | None]] = []
        self._next_policy: tuple[str, tuple[str, ...] | None] | None = None
        self._tables = Tables(())

    def fail(self, text: str) -> NoReturn:
        raise Violation(text)

    def require(self, holds: object, text: str) -> None:
        if not holds:
            raise Violation(text)

    def runs(self) -> Iterator[RunState]:
        """Yield the runs as the valid entries of the log make them."""
        for part in self.logs.values():
            if part.log == RUN_EVENTS:
                yield from part.state.runs.values()

    def recorded(self, log: str, partition: int, topic: str) -> int:
        """Return up to where a log partition says that its input was read."""
        return self.logs[log, partition].inputs.get(topic, 0)

    def counts(self) -> Counter[str]:
        """Return what there was, for people."""
        runs = list(self.runs())
        return Counter(
            {
                "runs": len(runs),
                "runs over": sum(run.is_over for run in runs),
                "valid entries": sum(len(offsets) for part in self.logs.values() for offsets in part.entries.values()),
                "void entries": sum(part.void for part in self.logs.values()),
                "entries retired": sum(len(part.retired) for part in self.logs.values()),
                "functions entered": len(self.entered_at),
                "attempts lost": len(self.lost),
                "waits ended": self.waits.ended,
                "attempts held back": self.waits.held_back,
                "changes accepted": self.changes.accepted,
                "changes rejected": self.changes.rejected,
                "changes in conflict": self.changes.conflicts,
                "outside calls ended": self.waits.outside,
                "routes taken": self.routes.taken,
                "loops entered": self.routes.loops,
                "turns of flows": self.flows.turns,
                **{f"{kind} called by flows": count for kind, count in self.flows.calls.items()},
                "flows ended": self.flows.ended,
                "outside calls of flows": self.flows.outside,
                **{f"unknown outcomes: {how}": count for how, count in self.unknown_ends.items()},
                "failures under a rule": self.by_rule.total(),
                **self.budgets.counts,
                "dead letters": len(self.letters),
            }
        )

    # -- every record that is written ------------------------------------------------------------

    def written(self, message: Message) -> None:
        """Take note of a record the moment it is in its topic."""
        topic = message.topic
        if (part := self.logs.get((topic, message.partition))) is not None:
            self._logged(part, message)
        elif topic == "policies":
            self._policy_written(message)
        elif topic == "controls":
            self.waits.control_written(message)
        elif message.value is not None:
            self.mail[topic, message.partition, message.offset] = message
            self._mailed(message)

    def _mailed(self, message: Message) -> None:
        topic = message.topic
        if (
            topic not in TELLS
            and not topic.startswith("step-tasks.")
            and topic not in {"run-commands", "dead-letters", "step-results"}
        ):
            return
        try:
            record = codec.decode(message.value)
        except codec.DecodeError:
            return
        if isinstance(record, GateRequest | GateDecision | GateLeases | StepTask):
            self._told(message, record)
        elif isinstance(record, DeadLetter) and topic == "dead-letters":
            self._letter(record)
        elif isinstance(record, RunCommand) and topic == "run-commands":
            self.sources.add(record.source)
            if partition_of(record.run_id, self.world.run_partitions) == message.partition:
                name = (record.run_id, record.command_id)
                self.commands.setdefault(name, record)
                if name in self.told_commands:  # by another run, whose step this one does
                    part, offset = self.told_commands[name]
                    self._seen(part, offset, name)
        elif isinstance(record, StepResult) and topic == "step-results" and record.instance_id != "intruder":
            key = (record.run_id, record.step_id, record.attempt)
            if record.outcome not in NEVER_ENTERED and key in self.entered_at:
                self.costs.setdefault(key, record.actual_micros)

    # -- the logs (1) ------------------------------------------------------------------------------

    def _logged(self, part: LogOfPartition, message: Message) -> None:
        where = f"{part.log}-{part.partition}@{message.offset}"
        if message.value is None:
            self._retired(part, message, where)
            return
        self.require(message.key not in part.keys, f"{where}: compaction would remove an earlier record for it")
        part.keys.add(message.key)
        record = codec.decode(message.value)
        if part.log == GATE_LEDGER:
            problems = self.books.read(message)
            self.require(not problems, f"(5) money: {problems[0] if problems else ''}")
            self.limits.read(message)
            self.require(not self.limits.problems, f"limits: {self.limits.problems[:1]}")
        if isinstance(record, OwnerAnnounced):
            if record.epoch == -1:
                part.announced_by = self.world.running
            part.epoch = max(part.epoch, message.offset if record.epoch == -1 else record.epoch)
            if record.repeat and record.epoch == part.epoch:
                part.inputs.update(record.inputs)
                part.marks.update(record.marks)
                part.checkpoint = record.checkpoint
                if record.checkpoint is not None and record.checkpoint.read_from > part.carried_at:
                    part.certified_at = part.carried_at
            return
        self.require(isinstance(record, Entry), f"{where}: a {type(record).__name__}")
        if record.epoch != part.epoch:
            part.void += 1
            part.entry_keys[message.key or b""] = message.offset
            self.world.note(f"void entry at {where}")
            return
        part.entry_keys[message.key or b""] = message.offset
        if isinstance(record.events[0], le.LedgerCarried):
            part.carried_at = message.offset
        self._chained(part, record, message.value, where)
        self._positions(part, record, where)
        self._decided(part, record, where)
        self._expect_tells(part, record, message.offset)
        part.entries[record.subject].append(message.offset)
        self._commands_in(part, record)
        for index, event in enumerate(record.events):
            self._event(part, record, record.first_seq + index, event, message.offset)
        seq, head = part.heads[record.subject]
        if part.log == RUN_EVENTS:
            part.state.runs[record.subject].head = head
        else:
            part.state.seq, part.state.head = seq, head
        self._note_head(part, record.subject)

    def _retired(self, part: LogOfPartition, message: Message, where: str) -> None:
        """An entry is retired once a later one carries it forward, a checkpoint holds that one, and it was told (5, 7)."""
        offset = part.entry_keys.get(message.key or b"")
        self.require(offset is not None, f"{where}: a tombstone for {message.key!r}, which is no entry")
        assert offset is not None
        self.require(
            offset < part.certified_at, f"{where}: {offset} is retired, but nothing certified carries it forward"
        )
        self.require(offset not in part.untold, f"{where}: {offset} is retired, and its tells are not sent")
        part.retired.add(offset)

    def _chained(self, part: LogOfPartition, entry: Entry, value: bytes, where: str) -> None:
        seq, head = part.heads.get(entry.subject, (0, b""))
        self.require(
            entry.first_seq == seq + 1, f"(1) {where}: {entry.subject} goes on at {entry.first_seq} after {seq}"
        )
        self.require(entry.prev_hash == head, f"(1) {where}: {entry.subject}: the hash chain is broken")
        self.require(len(entry.events) > 0, f"{where}: an entry without events")
        part.heads[entry.subject] = (seq + len(entry.events), hashlib.sha256(value).digest())

    def _positions(self, part: LogOfPartition, entry: Entry, where: str) -> None:
        self.require(entry.now_ms >= part.now_ms, f"{where}: time goes back from {part.now_ms} to {entry.now_ms}")
        part.now_ms = entry.now_ms
        for topic, offset in entry.inputs.items():
            end = self.world.broker.log(TopicPartition(topic, part.partition)).end
            self.require(
                part.inputs.get(topic, 0) <= offset <= end,
                f"(7) {where}: {topic} was read up to {part.inputs.get(topic, 0)}, now {offset}, and ends at {end}",
            )
        for source, rank in entry.marks.items():
            self.require(rank >= part.marks.get(source, -1), f"(4) {where}: the mark of {source} goes back")
        part.inputs.update(entry.inputs)
        part.marks.update(entry.marks)
        for cause in _causes(part, entry):
            self.require(cause not in part.causes, f"(7) {where}: {cause} caused an entry before")
            part.causes.add(cause)
        for offset, missing in part.untold.items():
            self.require(
                offset > entry.told or not missing,
                f"(7) {where}: all is told up to {entry.told}, it says, but {offset} has {len(missing)} tells unsent",
            )

    def _decided(self, part: LogOfPartition, entry: Entry, where: str) -> None:
        """An entry of a run is what deciding on its cause gives, on the fold of the log before it and nothing else (1, 6)."""
        if part.log != RUN_EVENTS:
            return
        state: RunsOfPartition = part.state
        controls = self.scheduler._controls = self.waits.controls(entry.tables["controls"])
        self.scheduler._retries = self.budgets.retries(entry.tables["policies"])
        if entry.cause.startswith("timer:"):
            _, _, step_and_attempt = entry.cause.split(":", 2)
            step_id, _, attempt = step_and_attempt.rpartition(":")
            run = state.runs[entry.subject]
            events = decide.on_timer(run, step_id, int(attempt), entry.now_ms)
            events = holding.finished(run, events, controls, entry.now_ms)
        elif entry.cause.startswith("table:"):
            events = holding.released(state.runs[entry.subject], controls)
        else:
            events = self._decided_on_inputs(state, entry, where)
        self.require(
            tuple(events) == entry.events,
            f"(1) {where}: deciding on {entry.cause} gives {_names(events)}, the log has {_names(entry.events)}",
        )

    def _decided_on_inputs(self, state: RunsOfPartition, entry: Entry, where: str) -> list[Any]:
        """Decide on each input in turn, on what the ones before it made of the run."""
        if entry.parts:
            found = state.find(entry.subject)
            state = RunsOfPartition(state.partition, Shelf())
            if found is not None:
                state.runs[entry.subject] = copy.deepcopy(found, {id(found.workflow): found.workflow})
        events: list[Any] = []
        for one in entries_of(entry):
            topic, partition, offset = one.cause.rsplit(":", 2)
            message = self.mail.get((topic, int(partition), int(offset)))
            if message is None:
                self.fail(f"{where}: {one.cause} was never written")
            decision = self.scheduler.decide(state, codec.decode(message.value), message, entry.now_ms, self._tables)
            decided = () if decision is None else tuple(decision.events)
            self.require(
                decided == one.events,
                f"(1) {where}: deciding on {one.cause} gives {_names(decided)}, the log has {_names(one.events)}",
            )
            if entry.parts:
                for event in decided:
                    self.scheduler.apply(state, entry.subject, entry.account, event, 0, entry.now_ms)
            events += decided
        return events

    def _note_head(self, part: LogOfPartition, subject: str) -> None:
        part.touched.add(subject)
        if part.log == RUN_EVENTS:
            part.state.runs[subject].head = part.heads[subject][1]
        else:
            part.state.head = part.heads[subject][1]

    # -- tells (3) -----------------------------------------------------------------------------------

    def _expect_tells(self, part: LogOfPartition, entry: Entry, offset: int) -> None:
        """What an entry tells is what each of its parts would tell as an entry of its own, numbered through."""
        tells: list[Tell] = []
        for one in entries_of(entry):
            first = len(tells)

            def at(index: int, first: int = first) -> Position:
                return Position(part.partition, offset, first + index)

            if part.log == RUN_EVENTS:
                tells += scheduler_tells(one, at, self.world.account_partitions, self.world.run_partitions)
            else:
                tells += gate_tells(one, at, self.world.run_partitions)
        missing: set[Any] = set()
        for tell in tells:
            if isinstance(tell.record, DeadLetter):
                place = (tell.record.topic, tell.record.partition, tell.record.offset)
                if place not in self.letters:
                    missing.add(place)
            elif isinstance(tell.record, RunCommand):
                name = (tell.record.run_id, tell.record.command_id)
                self.told_commands[name] = (part, offset)
                if self.commands.get(name) != tell.record:
                    missing.add(name)
            else:
                self.expected[part.log, tell.record.source] = (tell.topic, tell.partition, tell.key, tell.record)
                missing.add(tell.record.source)
        if missing:
            part.untold[offset] = missing

    def _told(self, message: Message, record: GateRequest | GateDecision | GateLeases | StepTask) -> None:
        log = RUN_EVENTS if isinstance(record, GateRequest) else GATE_LEDGER
        where = f"{message.topic}-{message.partition}@{message.offset}"
        known = self.expected.get((log, record.source))
        if known is None:
            self.fail(f"(3) {where}: told of {log}-{record.source}, which is no tell of a valid entry")
        self.require(
            known == (message.topic, message.partition, (message.key or b"").decode(), record),
            f"(3) {where}: not what the entry {log}-{record.source} says",
        )
        self._seen(self.logs[log, record.source.partition], record.source.offset, record.source)

    def _seen(self, part: LogOfPartition, offset: int, what: Any) -> None:
        missing = part.untold.get(offset)
        if missing is not None:
            missing.discard(what)
            if not missing:
                del part.untold[offset]

    def _letter(self, letter: DeadLetter) -> None:
        place = (letter.topic, letter.partition, letter.offset)
        self.letters[place] = letter
        if letter.topic in self.world.topics and letter.topic != "run-requests":
            self.require(
                place in self.rubbish,
                f"(7) {place} went to the dead letters, but was no rubbish: {letter.code}: {letter.reason}",
            )
        elif letter.code == "internal_error":
            self.fail(f"(7) {place} could not be judged: {letter.reason}")
        for part in self.logs.values():
            if part.log == RUN_EVENTS:
                for offset in [offset for offset, missing in part.untold.items() if place in missing]:
                    self._seen(part, offset, place)

    # -- events --------------------------------------------------------------------------------------

    def _event(self, part: LogOfPartition, entry: Entry, seq: int, event: Any, offset: int) -> None:
        if part.log == RUN_EVENTS:
            self.facts[entry.subject, seq] = offset
            self._run_event(entry, event)
            self.waits.run_event(entry, seq, event)
            self.budgets.run_event(entry, event)
            self.scheduler.apply(part.state, entry.subject, entry.account, event, seq, entry.now_ms)
        else:
            self.facts[part.partition, seq] = offset
            self._ledger_event(entry, event)
            self.waits.ledger_event(entry, event)
            self.budgets.ledger_event(entry, event)
            apply_ledger(part.state, event, seq, entry.now_ms)

    def _commands_in(self, part: LogOfPartition, entry: Entry) -> None:
        """Count the effect of the command that an entry is about; it may show in several of its events."""
        if part.log != RUN_EVENTS:
            return
        names = {event.command_id for event in entry.events if isinstance(event, OF_COMMANDS) and event.command_id}
        begins = any(isinstance(event, re.RunStarted | re.RunRefused) for event in entry.events)
        allowed = 2 if begins else 1  # a start, after a refusal under its id
        for command_id in names:
            self.effects[entry.subject, command_id] += 1
            count = self.effects[entry.subject, command_id]
            self.require(count <= allowed, f"(7) command {command_id} of {entry.subject} took effect twice")

    def _run_event(self, entry: Entry, event: Any) -> None:
        run_id = entry.subject
        if getattr(event, "code", "") == "internal_error" or getattr(event, "error_class", "") == "InternalError":
            self.fail(f"{run_id}: a decision failed: {event}")
        self.changes.event(run_id, event)
        self.flows.event(run_id, event)
        self.routes.event(run_id, event)
        if isinstance(event, re.RunStarted):
            self.definitions[run_id] = event.definition
            if event.prefer:
                self.wishes[run_id] = event.prefer
        elif isinstance(event, re.StepReady):
            wish = self.wishes.get(run_id)
            self.require(
                wish is None or event.call.preferred[0] == wish, f"{run_id} {event.step_id}: not {wish} is preferred"
            )
            if event.held:
                self.held_from_the_start.add((run_id, event.step_id))
            else:
                self.asked[run_id, event.step_id, 1] = event.call
        elif isinstance(event, re.AttemptRequested):
            self._asked_again(run_id, event)
        elif isinstance(event, re.AttemptEnded):
            self._attempt_ended(run_id, event)
            self._counted_by_rule(run_id, event)
        elif isinstance(event, re.StepSucceeded):
            self.ended[run_id, event.step_id, event.attempt] = "succeeded"
        elif isinstance(event, re.StepFailed):
            name = f"(3) {run_id} {event.step_id}"
            is_known = (run_id, event.step_id) not in self.unknown
            self.require(is_known, f"{name} failed, and nobody was asked whether it had its effect")
        elif isinstance(event, re.ApprovalResolved):
            self._answered(run_id, event)
        elif isinstance(event, re.WaitStarted) and event.kind == OUTSIDE:
            is_allowed = self.placed.get((run_id, event.step_id, 1)) == ("", -1)
            self.require(
                is_allowed, f"(2) {run_id} {event.step_id} waits for somebody outside, and the gate allows no such call"
            )

    def _answered(self, run_id: str, event: re.ApprovalResolved) -> None:
        if event.why == "outcome_unknown":
            self.unknown.discard((run_id, event.step_id))
            if event.approved:
                self.granted.add((run_id, event.step_id, event.attempt))
        elif event.why == "policy" and event.approved and self.budgets.was_about_a_rule(run_id, event.step_id):
            self.agreed.add((run_id, event.step_id, event.arguments_hash))

    def _attempt_ended(self, run_id: str, event: re.AttemptEnded) -> None:
        key = (run_id, event.step_id, event.attempt)
        outcome = self.ended[key] = "died" if event.error_class == "Died" else event.outcome
        self.unknown.discard(key[:2])
        if outcome in ("lost", "timed_out", "died") and not self.asked[key].idempotent:
            self.unknown.add(key[:2])
            self.unknown_ends[outcome] += 1

    def _counted_by_rule(self, run_id: str, event: re.AttemptEnded) -> None:
        """Of the attempts that a retry rule counts, all but the last that it allows are followed by another."""
        if event.retry_document:
            self.by_document.add((run_id, event.step_id))
        if not event.retry_rule or (run_id, event.step_id) in self.by_document:
            return
        call = self.asked[run_id, event.step_id, event.attempt]
        (rule,) = json.loads(self.definitions[run_id])["functions"][call.function]["retry_rules"]
        self.by_rule[run_id, event.step_id] += 1
        left = rule["max_attempts"] - self.by_rule[run_id, event.step_id]
        name = f"{run_id} {event.step_id}: attempt {event.attempt}"
        self.require(
            event.error_class in rule["on"], f"{name} failed with {event.error_class}, counted by {rule['on']}"
        )
        self.require(left >= 0, f"{name} is one more than its retry rule allows")
        self.require(left > 0 or event.retry_at_ms is None, f"{name} is repeated although its retry rule is at its end")

    def _asked_again(self, run_id: str, event: re.AttemptRequested) -> None:
        key = (run_id, event.step_id, event.attempt)
        name = f"{run_id} {event.step_id}: attempt {event.attempt}"
        self.require(key not in self.asked, f"(3) {name} asked for twice")
        outcome = self.ended.get((run_id, event.step_id, event.attempt - 1))
        if event.attempt == 1:
            self.require(key[:2] in self.held_from_the_start, f"(3) {name} asked for, but the step was never ready")
        else:
            self.require(
                outcome is not None and outcome not in ("succeeded", "proposed"),
                f"(3) {name} asked for, the one before {outcome or 'has not ended'}",
            )
        self.asked[key] = event.call

    def _ledger_event(self, entry: Entry, event: Any) -> None:
        if not hasattr(event, "attempt"):
            return
        key = (event.run_id, event.step_id, event.attempt)
        if isinstance(event, le.Reserving):
            self.reserved.add(key)
            self._policy_allows(entry, event, key)
        if isinstance(event, le.Placing):
            self.require(key in self.reserved, f"(2) {key} placed, but nothing is reserved for it")
            self.require(key not in self.placed, f"(3) {key} placed twice")
            self.placed[key] = (event.instance_id, event.incarnation)
        elif isinstance(event, le.PlacementLost):
            self.require(
                self.placed.get(key) == (event.instance_id, event.incarnation), f"(3) {key} lost where it never was"
            )
            self.require(
                not self.world.holds_lease(event.instance_id, event.incarnation),
                f"(3) {key} lost with {event.instance_id} {event.incarnation}, which holds its lease: {event.reason}",
            )
            self.lost.add(key)
        elif isinstance(event, le.AttemptSettled):
            self.settled[key] += event.actual_micros

    # -- policies (2) ----------------------------------------------------------------------------------

    def policy(self, name: str, rules: tuple[str, ...] | None) -> None:
        """Hear what the next record of `policies` says: rules in force, none (removed), or None: it cannot be read."""
        self._next_policy = (name, rules)

    def _policy_written(self, message: Message) -> None:
        if (message.key or b"").startswith(b"limit:"):
            return
        if (message.key or b"").startswith(PREFIXES):
            self.budgets.written(message.offset)
            return
        assert self._next_policy is not None
        self._policies.append((message.offset, *self._next_policy))

    def _policy_allows(self, entry: Entry, event: le.Reserving, key: AttemptKey) -> None:
        """What the policies said at the version that the entry names; a broken one leaves the one of before in force."""
        in_force: dict[str, tuple[str, ...]] = {}
        for offset, name, rules in self._policies:
            if offset < entry.tables.get("policies", 0):
                in_force[name] = in_force.get(name, ()) if rules is None else rules
        call = self.asked.get(key)
        self.require(call, f"(2) {key} reserved, but no run asked for it")
        assert call is not None
        effects = {
            RULES[rule].then
            for names in in_force.values()
            for rule in names
            if RULES[rule].holds(call, key[2], event.account)
        }
        self.require("deny" not in effects, f"(2) {key} allowed although a policy denies it")
        if "require_approval" in effects:
            agreed = (key[0], key[1], hashlib.sha256(call.arguments.encode()).hexdigest()) in self.agreed
            self.require(agreed and event.approved_by, f"(2) {key} allowed although nobody approved it")

    # -- functions (2, 3) --------------------------------------------------------------------------------

    def entered(self, life: ExecutorLife, task: StepTask) -> None:
        """A function is entered: may it be?"""
        key = (task.run_id, task.step_id, task.attempt)
        name = f"{task.run_id} {task.step_id} attempt {task.attempt}"
        incarnation = life.registration.incarnation
        self.require(key not in self.entered_at, f"(3) {name} entered twice")
        self.require(self.placed.get(key) is not None, f"(2) {name} entered without a placement in the ledger")
        self.require(
            self.placed[key] == (life.name, incarnation),
            f"(3) {name} entered by {life.name} {incarnation}, it was placed on {self.placed[key]}",
        )
        self.require(key not in self.lost, f"(3) {name} entered after the ledger said that it is lost")
        self.require(not life.registration.lapsed, f"(3) {name} entered after a noticed lapse")
        self.require(life.boottime_s() < life.lease_until_s, f"(3) {name} entered without a lease")
        self.require((*key[:2], key[2] + 1) not in self.asked, f"(3) {name} entered when its successor was asked for")
        self._repeat_allowed(task, name)
        known = self.keys.setdefault(task.idempotency_key, key[:2])
        self.require(known == key[:2], f"(3) {name} has the idempotency key of {known}")
        first = self.world.keys_of_steps.setdefault(key[:2], task.idempotency_key)
        self.require(first == task.idempotency_key, f"(3) {name} has another idempotency key than the attempts before")
        self.entered_at[key] = self.world.now_ms

    def _repeat_allowed(self, task: StepTask, name: str) -> None:
        call = task.call
        if call is None or call.idempotent:
            return
        for attempt in range(1, task.attempt):
            before = (task.run_id, task.step_id, attempt)
            unknown = before in self.entered_at and self.ended.get(before) != "failed"
            self.require(
                not unknown or before in self.granted,
                f"(3) {name} repeats {call.function}, attempt {attempt} of which may have had its effect",
            )

    # -- projection (8) ---------------------------------------------------------------------------------

    def projected(self, table: str, found: list[rows.Row]) -> None:
        """Rows are inserted: no row of the logs may come from anything but a valid entry."""
        if table == rows.EVENTS:
            for row in found:
                self.require(self.facts.get((row[0], row[1])) == row[3], f"(8) a row of a void event: {row[:4]}")
        elif table == rows.LEDGER:
            for row in found:
                self.require(self.facts.get((row[0], row[1])) == row[2], f"(8) a row of a void event: {row[:4]}")

    # -- what owners have in memory (1) -------------------------------------------------------------------

    def owned(self, part: OwnedPartition) -> None:
        """The state of an owner in force is the fold of the valid entries, in memory or put away; all of it after a restore."""
        known = self.logs[part.machine.log_topic, part.partition]
        if part.doubt or part.unacknowledged or part.epoch != known.epoch:
            return
        if known.compared_epoch != part.epoch:
            known.compared_epoch = part.epoch
            known.touched.update(known.entries)
        for subject in sorted(known.touched):
            if known.log == GATE_LEDGER:
                difference = _difference(_ledger_fields(known.state), _ledger_fields(part.state))
                difference = difference or _unwatched(known.state, part.state)
            else:
                difference = self._run_difference(known.state.runs[subject], part.state)
            self.require(
                not difference,
                f"(1, 8) {subject} at {self.world.name_of(part)} is not the fold of its log: {difference}",
            )
        known.touched.clear()

    def _run_difference(self, ours: RunState, state: RunsOfPartition) -> str:
        theirs = state.find(ours.run_id)
        if theirs is None:
            return "it is not there"
        if ours.is_over or ours.workflow is None:  # of such a run only what late messages need is kept
            ours, theirs = (load_run(dump_run(run), state.definitions) for run in (ours, theirs))
        return _difference(_fields(ours), _fields(theirs))

    # -- at rest ---------------------------------------------------------------------------------------

    def is_something_due(self) -> bool:
        """Tell whether a run goes on by itself when time passes."""
        return any(
            waits.due_ms(run, step) is not None for run in self.runs() if not run.is_over for step in run.steps.values()
        )

    def at_rest(self, waiting: set[tuple[str, str]]) -> None:
        """Everything was let run until nothing moved. `waiting`: the questions that nobody answers."""
        for part in self.logs.values():
            for offset, missing in part.untold.items():
                self.fail(f"(7) {part.log}-{part.partition}@{offset}: never told: {sorted(map(str, missing))}")
        self._runs_are_over(waiting)
        self._commands_took_effect()
        self._nothing_is_lost()
        problem = next(iter(self.books.open_reservations()), None)
        self.require(problem is None, f"(5) {problem} is still reserved")
        in_bucket = next(self.books.budgets.left_open(), None)
        self.require(in_bucket is None, f"(5) {in_bucket}")
        left_over = self.limits.problems_at_rest()
        self.require(not left_over, f"limits: {left_over[:1]}")
        for part in self.logs.values():
            if part.log == GATE_LEDGER:
                left = [key for key, attempt in part.state.attempts.items() if attempt.status != "held"]
                self.require(not left, f"(5) attempts are open at the gate: {left[:3]}")
        for key, cost in self.costs.items():
            self.require(
                self.settled[key] == cost, f"(5) {key} cost {cost}, but {self.settled[key]} were settled for it"
            )

    def _runs_are_over(self, waiting: set[tuple[str, str]]) -> None:
        going_on = {run.run_id for run in self.runs() if not run.is_over}
        for run in self.runs():
            if run.is_over or run.status == states.ABSENT:
                continue
            asking = [*run.open_approvals(), *run.open_waits()]
            unanswered = [step.step_id for step in asking if (run.run_id, step.step_id) in waiting]
            # A step that another run does waits with it; that one is judged by itself.
            unanswered += [step.step_id for step in run.steps.values() if step.child_run_id in going_on]
            picture_of = {step.step_id: step.status for step in run.steps.values()}
            self.require(unanswered, f"(7) run {run.run_id} never ends: {run.status}, {picture_of}")
            others = {
                step.step_id: step.status
                for step in run.steps.values()
                if step.status not in states.STEP_TERMINAL and step.step_id not in unanswered
            }
            self.require(not others, f"(7) run {run.run_id} has steps that never end: {others}")

    def _commands_took_effect(self) -> None:
        known = {run.run_id: run for run in self.runs()}
        for (run_id, command_id), command in self.commands.items():
            if self.effects[run_id, command_id]:
                continue
            run = known.get(run_id)
            same = run is not None and command.type in ("start", "refuse") and run.content_hash == command.content_hash
            self.require(same, f"(7) command {command.type} {command_id} of {run_id} never took effect")

    def _nothing_is_lost(self) -> None:
        for place in self.rubbish:
            self.require(place in self.letters, f"(7) {place} is rubbish, but in no dead letter")
        for topic, partition, offset in self.mail:
            if topic == "run-requests":
                source = f"{topic}:{partition}:{offset}"
                self.require(
                    source in self.sources or (topic, partition, offset) in self.letters,
                    f"(7) request {source} became neither a command nor a dead letter",
                )


def _fields(state: Any) -> dict[str, Any]:
    """Return what a state consists of; a workflow by its hash, because equal ones may be compiled twice."""
    names = getattr(state, "__struct_fields__", None) or type(state).__slots__
    fields = {name: getattr(state, name) for name in names}
    if (workflow := fields.get("workflow")) is not None and not isinstance(workflow, str):
        fields["workflow"] = workflow.definition_hash
    return fields


def _ledger_fields(ledger: Ledger) -> dict[str, Any]:
    """Return what a ledger consists of, but for what only says when to look again, and may name what is over."""
    return {name: value for name, value in _fields(ledger).items() if name not in WHEN_TO_LOOK}


def _unwatched(ours: Ledger, theirs: Ledger) -> str:
    """Return what ends by itself and is not in their heaps; empty if everything is."""
    questions = {(one.expires_at_ms, key) for key, one in ours.attempts.items() if one.status == HELD}
    windows = {(bucket.until_ms, key) for key, bucket in ours.buckets.items() if bucket.until_ms}
    missing = {question for question in questions if question[0]} - set(theirs.questions)
    return ", ".join(map(str, sorted(missing) + sorted(windows - set(theirs.window_ends))))


def _difference(ours: dict[Any, Any], theirs: dict[Any, Any]) -> str:
    """Return in what two states differ; empty if in nothing."""
    found = []
    for name in {**ours, **theirs}:
        here, there = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if here == there:
            continue
        deeper = (
            _difference(here, there)
            if isinstance(here, dict) and isinstance(there, dict)
            else f"{here!r} became {there!r}"
        )
        found.append(f"{name}: {deeper}")
    return "; ".join(found)[:1_000]


def _causes(part: LogOfPartition, entry: Entry) -> list[str]:
    """Return what may cause nothing but this entry.

    What a table caused names its version, and what the gate's clock did only the time: there may be several of each.
    """
    if entry.cause.startswith("timer:") and part.log == RUN_EVENTS:
        return [f"{entry.subject} {entry.cause}"]
    if entry.cause.startswith(("timer:", "table:")):
        return []
    return causes_of(entry)


def _names(events: Any) -> list[str]:
    return [type(event).__name__ for event in events]
