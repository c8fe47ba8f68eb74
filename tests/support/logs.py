"""Logs as the scheduler and the gate write them, without running either: what is in them comes from their real deciders.

`Story` plays runs of many kinds. `LogWriter` turns its decisions into records of the two logs, with owners that change,
announcements that are repeated, and zombies whose entries are void.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any, NamedTuple

from support.pure import Pair, chain, step
from tidegate import codec
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.domain.identity import account_root, entry_key, partition_of
from tidegate.domain.ledger_events import RunClosed
from tidegate.domain.messages import DeadLetter, EndedIncarnation, Instance, StepTask
from tidegate.domain.run_events import ResultIgnored
from tidegate.eventlog.interface import Record

FUNCTIONS = tuple(f"step:{name}" for name in ("a", "b", "c", "ask", "forbidden", "once", "flaky"))
POLICY = {
    "policy": "house",
    "version": "3",
    "rules": [
        {"name": "ask-first", "when": "step == 'ask'", "then": "require_approval", "reason": "ask a human"},
        {"name": "never", "when": "step == 'forbidden'", "then": "deny", "reason": "not here"},
    ],
}
DAY_MS = 24 * 3600 * 1000
START_MS = 1_767_100_000_000  # the end of a month is near: rows come to lie in two monthly partitions


class Decided(NamedTuple):
    """One decision: which log it goes to, and what it holds."""

    log: str
    subject: str
    account: str
    events: tuple[Any, ...]
    now_ms: int


class Story(Pair):
    """Runs of every kind, played to the end or left open. `decided` has everything in order; `runs` the folded truth."""

    def __init__(self, name: str = "s", slots: int = 1000) -> None:
        self.decided: list[Decided] = []
        self.name = name
        self.slots = slots
        super().__init__(slots=slots, functions=FUNCTIONS)
        self.life = 1
        self.pass_time(START_MS - self.now_ms)
        self.policy(POLICY)

    def _take(self, machine: Any, state: Any, decision: Any) -> None:
        is_run = machine is self.scheduler
        log = "run-events" if is_run else "gate-ledger"
        account = decision.account or getattr(decision.events[0], "account", "")
        self.now_ms += 7
        self.decided.append(Decided(log, decision.subject, account, tuple(decision.events), self.now_ms))
        super()._take(machine, state, decision)

    def pass_time(self, ms: int) -> None:
        """Let time go by, with a heartbeat of the executor at the end, so that it is not taken for dead."""
        self.now_ms += ms
        self.register("worker-0", self.life, self.slots, FUNCTIONS)

    def task(self, run_id: str) -> StepTask:
        """Take the oldest task of a run out of the executor's hands."""
        found = next(task for task in self.tasks if task.run_id == run_id and task.type == "run")
        self.tasks.remove(found)
        return found

    def begin(self, kind: str, *functions: str, account: str = "acme/support", **fields: Any) -> str:
        """Start a run of these functions in a row, named after its kind."""
        run_id = f"{self.name}-{kind}"
        settings = {name: step(reserve_micros=1000, idempotent=name != "once") for name in functions}
        self.start(
            run_id,
            chain(*functions, **settings),
            {"order": kind, "note": 'ä "quoted"\\\n\ttext'},
            account=account,
            **fields,
        )
        return run_id

    def do(self, run_id: str, outcome: str = "succeeded", cost: int = 300, **fields: Any) -> None:
        """Let the executor answer the run's oldest task."""
        task = self.task(run_id)
        value = {"done": task.step_id, "by": "å"} if outcome == "succeeded" else None
        self.answer(
            task,
            outcome,
            value,
            actual_micros=cost,
            usage={"tokens": cost // 10},
            started_ms=self.now_ms - 5,
            finished_ms=self.now_ms,
            **fields,
        )

    def lose_executor(self) -> None:
        """The executor dies; its successor proves it."""
        ended = (EndedIncarnation(incarnation=self.life, evidence="pid gone"),)
        self.life += 1
        self.register("worker-0", self.life, self.slots, FUNCTIONS, ended=ended)

    def play_all(self) -> None:
        """Play one run of every kind."""
        self.play_plain(0)
        self.play_failures()
        self.play_losses()
        self.play_humans()
        self.play_ends()
        self.play_changes()
        self.play_queue()

    def play_queue(self) -> None:
        """Play a run that waits until another one gives the last slot back."""
        slots, self.slots = self.slots, 1 + sum(len(keys) for keys in self.ledger.held_by.values())
        self.pass_time(0)
        for run_id in (self.begin("in-time", "a"), self.begin("in-line", "a")):
            self.do(run_id)
        self.slots = slots
        self.pass_time(0)

    def play_changes(self) -> None:
        """Play a step that adds a node to its run's graph, where it may and where it may not."""
        for kind, mode in (("changed", "optional"), ("unchanged", "disabled")):
            run_id = f"{self.name}-{kind}"
            definition = chain("a", "b") | {"evolution": {"mode": mode}}
            self.start(run_id, definition, {"order": kind})
            self.do(run_id, change='{"nodes":{"x":{"kind":"step","function":"b"}},"because":"it was asked for"}')
            while any(task.run_id == run_id and task.type == "run" for task in self.tasks):
                self.do(run_id)

    def play_plain(self, number: int, account: str = "acme/support") -> str:
        """Play a run of three steps that succeeds."""
        run = self.begin(
            f"plain-{number}",
            "a",
            "b",
            "c",
            account=account,
            budget_micros=50_000,
            tags={"team": "x", "n": str(number)},
        )
        for _ in range(3):
            self.do(run)
        return run

    def play_failures(self) -> None:
        """Play a retry that helps, one that does not, a denial and a spent budget."""
        run = self.begin("retried", "flaky", "b")
        self.do(run, "failed", 120, error_class="Timeout", error_message="too slow")
        self.pass_time(60_000)
        self.do(run)
        self.do(run)
        run = self.begin("failed", "a", "flaky")
        self.do(run)
        self.do(run, "failed", 10, error_class="ValueError", error_message="bad 'input'", retryable=False)
        self.begin("denied", "forbidden")
        self.begin("broke", "a", account="umbrella/lab", budget_micros=10)

    def play_losses(self) -> None:
        """Play lost executors: a repeated step, a late result, an unknown outcome that turns up and one that does not."""
        run = self.begin("lost", "a")
        late = self.task(run)
        unknown, open_ = self.begin("unknown", "once"), self.begin("unknown-open", "once")
        turned_up = self.task(unknown)
        self.task(open_)
        self.lose_executor()
        self.do(run)
        self.answer(late, "succeeded", "late", actual_micros=70)
        self.answer(turned_up, "succeeded", "after all", actual_micros=44)

    def play_humans(self) -> None:
        """Play approvals: given, refused, open, and withdrawn by a cancellation."""
        for kind in ("approved", "rejected", "asking", "withdrawn"):
            self.begin(kind, "ask", "b", account="umbrella/lab")
        self.command(f"{self.name}-approved", "approve", by="ann", reason="fine")
        self.do(f"{self.name}-approved")
        self.command(f"{self.name}-rejected", "reject", by="bob", reason="no way")
        self.command(f"{self.name}-withdrawn", "cancel", by="cid", reason="never mind")

    def play_ends(self) -> None:
        """Play a cancellation of what runs, refused starts and commands, and runs that are still on their way."""
        run = self.begin("cancelled", "a", "b")
        self.command(run, "cancel", by="ann", reason="enough")
        self.do(run, "cancelled", 33)
        self.start(f"{self.name}-refused", {"name": "x", "version": "1", "nodes": {}, "functions": {}}, None)
        self.command(f"{self.name}-nobody", "cancel", account="acme/support", by="ann")
        self.begin("running", "a")
        self.pass_time(3 * DAY_MS)
        run = self.begin("later", "a", "b")
        self.do(run)


class _Partition:
    """One partition of a log: its owner's epoch, the subjects' heads, and the offset that the next record will get."""

    def __init__(self, log: str, partition: int, next_offset: int = 0) -> None:
        self.log = log
        self.partition = partition
        self.next_offset = next_offset
        self.epoch = -1
        self.old_epochs: list[int] = []
        self.heads: dict[str, tuple[int, bytes]] = {}
        self.repeats = 0
        self.records: list[Record] = []

    def _add(self, key: str, value: bytes, kind: str, epoch: int) -> None:
        headers = (("type", kind.encode()), ("epoch", b"%d" % epoch))
        self.records.append(Record(self.log, self.partition, key.encode(), value, headers))
        self.next_offset += 1

    def announce(self) -> None:
        """A new owner takes over."""
        if self.epoch >= 0:
            self.old_epochs.append(self.epoch)
        epoch, self.repeats = self.next_offset, 0
        self._announcement(-1, f"owner:new:{self.next_offset}")
        self.epoch = epoch

    def repeat(self, epoch: int | None = None) -> None:
        """The owner (or, with an old epoch, a zombie) repeats its announcement."""
        self.repeats += 1
        epoch = self.epoch if epoch is None else epoch
        self._announcement(epoch, f"owner:{epoch}:{self.repeats}")

    def _announcement(self, epoch: int, key: str) -> None:
        record = OwnerAnnounced(
            log=self.log,
            partition=self.partition,
            epoch=epoch,
            repeat=self.repeats,
            topic_id="t",
            partition_count=1,
            instance_id="owner",
            at_ms=START_MS,
        )
        self._add(key, codec.encode(record), "OwnerAnnounced", epoch)

    def entry(self, decided: Decided) -> None:
        """The owner logs a decision."""
        subject = decided.subject if self.log == "run-events" else f"ledger-{self.partition}"
        seq, head = self.heads.get(subject, (0, b""))
        value = self._entry_bytes(subject, decided, seq + 1, head, self.epoch, decided.events)
        self.heads[subject] = (seq + len(decided.events), hashlib.sha256(value).digest())
        self._add(entry_key(subject, seq + 1, self.epoch), value, self._kind, self.epoch)

    def zombie_entry(self, decided: Decided, epoch: int) -> None:
        """An owner of before logs something else under the seq that the real owner uses next."""
        subject = decided.subject if self.log == "run-events" else f"ledger-{self.partition}"
        seq, head = self.heads.get(subject, (0, b""))
        events: tuple[Any, ...]
        if self.log == "run-events":
            events = (
                ResultIgnored(
                    step_id="zombie",
                    attempt=9,
                    outcome="succeeded",
                    actual_micros=9_999_999,
                    reason="void",
                    instance_id="z",
                    incarnation=0,
                ),
            )
        else:
            events = (RunClosed(account="zombie", run_id="zombie", settled_micros=9_999_999),)
        value = self._entry_bytes(subject, decided, seq + 1, head, epoch, events)
        self._add(entry_key(subject, seq + 1, epoch), value, self._kind, epoch)

    @property
    def _kind(self) -> str:
        return "RunEntry" if self.log == "run-events" else "LedgerEntry"

    def _entry_bytes(
        self, subject: str, decided: Decided, first_seq: int, head: bytes, epoch: int, events: tuple[Any, ...]
    ) -> bytes:
        entry = Entry(
            subject=subject,
            account=decided.account if self.log == "run-events" else "",
            first_seq=first_seq,
            epoch=epoch,
            now_ms=decided.now_ms,
            prev_hash=head,
            inputs={"run-commands": first_seq, "step-results": 7},
            marks={"gate-ledger-0": first_seq << 12},
            told=self.next_offset - 1,
            tables={"policies": 1},
            cause=f"run-commands:{self.partition}:{first_seq}",
            events=events,
        )
        return codec.encode_entry(self._kind, entry)


class LogWriter:
    """Both logs, partition by partition. `take` returns the new records in an order in which they may be written."""

    def __init__(self, run_partitions: int, ledger_partitions: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._logs = {
            "run-events": [_Partition("run-events", number) for number in range(run_partitions)],
            "gate-ledger": [_Partition("gate-ledger", number) for number in range(ledger_partitions)],
        }
        self.valid: list[Decided] = []
        self.void_count = 0

    def take(self, decided: list[Decided], *, trouble: float = 0.1) -> list[Record]:
        """Turn decisions into records. `trouble`: how often owners change, zombies write and announcements are repeated."""
        for one in decided:
            part = self._partition_of(one)
            if part.epoch < 0 or self._random.random() < trouble / 2:
                part.announce()
            if part.old_epochs and self._random.random() < trouble * 2:
                part.zombie_entry(one, self._random.choice(part.old_epochs))
                self.void_count += 1
            if self._random.random() < trouble:
                part.repeat()
            if part.old_epochs and self._random.random() < trouble / 2:
                part.repeat(self._random.choice(part.old_epochs))
            part.entry(one)
            self.valid.append(one)
        return self._taken()

    def others_wrote(self, log: str, partition: int, end: int) -> None:
        """Take note that records of others (tombstones, say) lie in a partition now, up to its end."""
        self._logs[log][partition].next_offset = end

    def _partition_of(self, decided: Decided) -> _Partition:
        parts = self._logs[decided.log]
        name = decided.subject if decided.log == "run-events" else account_root(decided.account)
        return parts[partition_of(name, len(parts))]

    def _taken(self) -> list[Record]:
        records = []
        for part in (part for parts in self._logs.values() for part in parts):
            records += part.records
            part.records = []
        return records


def instance_record(instance_id: str, *, incarnation: int = -1, state: str = "ready", at_ms: int = START_MS) -> Record:
    """Return a line of `instances`."""
    row = Instance(
        instance_id=instance_id,
        service="executor",
        incarnation=incarnation,
        state=state,
        host="host-1",
        boot_id="b",
        pid=77,
        pid_started=1.5,
        started_ms=START_MS,
        at_ms=at_ms,
        queue="default",
        slots=8,
        free_slots=3,
        functions=FUNCTIONS,
        version="0.1.0",
    )
    return Record("instances", 0, instance_id.encode(), codec.encode(row), (("type", b"Instance"),))


def dead_letter_record(offset: int, original: bytes) -> Record:
    """Return a dead letter of a request at this offset."""
    letter = DeadLetter(
        topic="run-requests",
        partition=0,
        offset=offset,
        service="scheduler",
        code="malformed",
        reason="not JSON: ä",
        run_id="",
        original=original,
        original_size=len(original),
        original_key=b"k\xff",
        headers={"h": b"\x00\xfe"},
        at_ms=START_MS + offset,
    )
    key = f"run-requests:0:{offset}".encode()
    return Record("dead-letters", 0, key, codec.encode(letter), (("type", b"DeadLetter"),))
