"""Work that a whole Tidegate is given while something is done to it, and what must have come of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from support.stack import (
    LEDGER,
    RUNS,
    Ends,
    Truth,
    WholeStack,
    assert_tells_follow_from_the_logs,
    assert_whole,
    eventually,
    valid_entries,
)
from tidegate import codec
from tidegate.audit.money import AttemptName
from tidegate.domain.entry import OwnerAnnounced
from tidegate.domain.run_events import AttemptEnded

STEPS = ("first", "slow", "shaky", "last")
BUDGET_MICROS = 1_000
# Against hanging only: work that is killed again and again on a busy machine takes its time.
LONG_S = 360.0
LOGS = {"scheduler": RUNS, "gate": LEDGER}


class Load:
    """Runs that all do the same work, spread over all partitions of both logs."""

    def __init__(self, stack: WholeStack, run_count: int = 100) -> None:
        """Ask for all of them at once."""
        self._stack = stack
        self._effects_before = len(stack.effects())
        self.began_at = stack.ends()
        name = uuid.uuid4().hex[:8]
        self.runs = [f"busy-{name}-{number}" for number in range(run_count)]
        common = {"workflow": "busy", "input": 1, "budget_micros": BUDGET_MICROS}
        stack.requests(
            [{**common, "run_id": run_id, "account": f"org{n % 16}/app"} for n, run_id in enumerate(self.runs)]
        )

    def until_effects(self, per_run: float) -> None:
        """Wait until the functions have had so many effects on average: a whole run has one per step."""
        eventually(lambda: self.has_effects(per_run), f"{per_run} effects per run", LONG_S)

    def has_effects(self, per_run: float) -> bool:
        """Tell whether the functions have had so many effects on average."""
        return len(self._stack.effects()) - self._effects_before >= int(per_run * len(self.runs))

    def finish(self, *, may_restart: Iterable[str] = ()) -> Truth:
        """Wait for the end of all runs, then check them and everything else.

        may_restart: processes that the design allows to have ended and come back.
        """
        self.until_effects(len(STEPS))
        self._stack.expect_any_pid(may_restart)
        truth = assert_whole(self._stack)
        assert_tells_follow_from_the_logs(self._stack, self.began_at)
        ended = [truth.runs[run_id] for run_id in self.runs]
        assert {(run.status, run.output) for run in ended} == {("succeeded", "4")}
        assert len({run.fingerprint for run in ended}) == 1, "the same work came to something else"
        # Not those of the truth: what was entered is read before the logs are, and they may have gone on.
        keys = {(line.run_id, line.step_id): line.key for line in self._stack.entered()}
        effects = self._stack.effects()
        missing = [(run_id, step) for run_id in self.runs for step in STEPS if keys[run_id, step] not in effects]
        assert not missing, f"runs that succeeded without the effect of a step: {missing}"
        return truth

    def lost(self) -> dict[AttemptName, str]:
        """Return the attempts whose outcome the runs never learned, with the reason that they give."""
        runs = set(self.runs)
        return {
            AttemptName(entry.subject, event.step_id, event.attempt): event.error_message
            for entry in valid_entries(self._stack.log(RUNS)).values()
            for event in entry.events
            if isinstance(event, AttemptEnded) and event.outcome == "lost" and entry.subject in runs
        }

    def assert_was_in_the_middle(self, ends: Ends) -> None:
        """Show by the log that many runs were begun and not over when it ended at `ends`."""
        before: set[str] = set()
        after: set[str] = set()
        for (partition, offset), entry in valid_entries(self._stack.log(RUNS)).items():
            (before if offset < ends[RUNS, partition] else after).add(entry.subject)
        straddling = before & after & set(self.runs)
        assert len(straddling) >= len(self.runs) // 10, f"{len(before)} runs were begun, {len(after)} went on"


def owners(stack: WholeStack, service: str, since: Ends | None = None) -> dict[int, str]:
    """Return who announced itself last for each partition of a service's log, of those announced (since then)."""
    found = {}
    for messages in stack.log(LOGS[service], since):
        for message in messages:
            record = codec.decode(message.value)
            if isinstance(record, OwnerAnnounced) and not record.repeat:
                found[message.partition] = record.instance_id
    return found
