"""The folded ledger of one partition: runs' money, attempts and where they are. Changed by `fold.apply` alone."""

from __future__ import annotations

import itertools

from tidegate.domain.messages import Lease
from tidegate.gate.lacking import Lacking
from tidegate.gate.state import (
    Ask,
    Attempt,
    AttemptKey,
    Below,
    Bucket,
    Carried,
    Gauge,
    Incarnation,
    Learned,
    Leases,
    Line,
    Name,
    RunMoney,
)


class Ledger:
    """The state of one ledger partition. `waiting` holds queued attempts by (queue, function).

    busy: how many attempts of an account root hold a slot here, or leases for one elsewhere. seq, head: the end of the
    partition's hash chain. limited: queued attempts that need leases of ours besides a slot, by (queue, function) and those;
    lines_of: where somebody needs a lease.
    asks, ask_lines: attempts of other partitions that need leases of ours, and those of them that wait. held: how many hold
    a lease of ours. gauges: by limit and key. asking: how many of a line are on their way to leases of others; granted:
    those that have them all and are not placed, by when. unnoticed: queued attempts that were not told why they wait.
    scale_out: queues that want more executors. depth: how many wait for a queue.

    lacking: attempts that wait for room in a budget, or about which one asks. questions, window_ends: heaps of (when, what):
    questions that lapse and buckets whose window ends; what does not stand any more may still be in them. of_run: buckets of
    single runs, or of families, by the run at its top. below: what the runs below a run come to, by run, those that have any.
    families_over: of families of which nothing can change any more, the run at the top. carried: when balances were carried
    forward last.
    """

    __slots__ = (
        "ask_lines",
        "asking",
        "asks",
        "attempts",
        "below",
        "buckets",
        "busy",
        "carried",
        "depth",
        "families_over",
        "gauges",
        "granted",
        "head",
        "held",
        "held_by",
        "lacking",
        "learned",
        "limited",
        "lines_of",
        "of_run",
        "partition",
        "questions",
        "runs",
        "scale_out",
        "seq",
        "unnoticed",
        "waiting",
        "waiting_count",
        "window_ends",
    )

    def __init__(self, partition: int) -> None:
        self.partition = partition
        self.seq = 0
        self.head = b""
        self.runs: dict[str, RunMoney] = {}
        self.attempts: dict[AttemptKey, Attempt] = {}
        self.held_by: dict[Incarnation, dict[AttemptKey, None]] = {}
        self.busy: dict[str, int] = {}
        self.waiting: dict[Name, Line] = {}
        self.limited: dict[Name, dict[Leases, Line]] = {}
        self.lines_of: dict[Lease, dict[tuple[Name, Leases], None]] = {}
        self.waiting_count = 0
        self.asks: dict[AttemptKey, Ask] = {}
        self.ask_lines: dict[Leases, Line] = {}
        self.held: dict[Lease, int] = {}
        self.gauges: dict[tuple[str, str], Gauge] = {}  # the one that changed last comes last
        self.asking: dict[Name, int] = {}
        self.granted: dict[AttemptKey, int] = {}
        self.unnoticed: dict[Name, dict[AttemptKey, None]] = {}
        self.scale_out: dict[str, int] = {}
        self.depth: dict[str, int] = {}
        self.buckets: dict[str, Bucket] = {}
        self.learned: dict[str, Learned] = {}
        self.of_run: dict[str, dict[str, None]] = {}
        self.below: dict[str, Below] = {}
        self.families_over: dict[str, None] = {}
        self.lacking = Lacking()
        self.questions: list[tuple[int, AttemptKey]] = []
        self.window_ends: list[tuple[int, str]] = []
        self.carried: Carried | None = None

    @property
    def subject(self) -> str:
        """Return what the ledger's hash chain and seqs are counted by."""
        return f"ledger-{self.partition}"

    def oldest_gauges(self, count: int) -> list[tuple[tuple[str, str], Gauge]]:
        """Return the gauges that have not changed for the longest time."""
        return list(itertools.islice(self.gauges.items(), count))

    def is_window_end(self, until_ms: int, name: str) -> bool:
        """Tell whether a bucket's window ends then. What it was to end before stays in the heap until that is its top."""
        bucket = self.buckets.get(name)
        return bucket is not None and bucket.until_ms == until_ms

    def has_waiting(self) -> bool:
        """Tell whether anybody waits here, for a slot or a lease."""
        return bool(self.waiting_count or self.ask_lines)
