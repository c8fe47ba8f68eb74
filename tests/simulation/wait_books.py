"""The judge's books of waits, kept signals and pauses: what each entry may say of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simulation.definitions import QUEUES
from tidegate import codec
from tidegate.domain import ledger_events as le
from tidegate.domain import run_events as re
from tidegate.domain.controls import Controls
from tidegate.domain.entry import Entry
from tidegate.domain.messages import Control
from tidegate.eventlog.interface import Message

EVERYTHING = "*"
StepKey = tuple[str, str]


class WaitBooks:
    """Takes note of records and events. require: raises its text if its condition does not hold.

    The table `controls` is kept as it was at every version, because entries name the one that they went by.
    """

    def __init__(self, require: Callable[[object, str], None]) -> None:
        self._require = require
        self._rows: list[tuple[int, str, bool]] = []
        self._paused_runs: set[str] = set()
        self._begun: dict[StepKey, re.WaitStarted] = {}
        self._over: set[StepKey] = set()
        self._kept: dict[str, dict[int, re.SignalReceived]] = {}
        self.ended = 0
        self.held_back = 0
        self.outside = 0  # calls of outside tools that were answered or rejected

    # -- controls ---------------------------------------------------------------

    def control_written(self, message: Message) -> None:
        """Take a record of `controls`. What is no control, or names nothing, changes nothing."""
        key = (message.key or b"").decode()
        if key not in (*QUEUES, EVERYTHING):
            return
        if message.value is None:
            self._rows.append((message.offset, key, False))
            return
        try:
            row = codec.decode(message.value)
        except codec.DecodeError:
            return
        if isinstance(row, Control):
            self._rows.append((message.offset, key, row.paused))

    def paused_at(self, version: int) -> set[str]:
        """Return the keys under which something was paused when the table had been read up to `version`."""
        latest = {key: paused for offset, key, paused in self._rows if offset < version}
        return {key for key, paused in latest.items() if paused}

    def controls(self, version: int) -> Controls:
        """Return the same as the scheduler takes it, to ask what it decides."""
        controls = Controls()
        for key in self.paused_at(version):
            controls.take(key, Control(queue=key, paused=True, by="", reason="", at_ms=0))
        return controls

    def _may_begin(self, entry: Entry, what: str, queue: str) -> None:
        paused = self.paused_at(entry.tables["controls"])
        self._require(not paused & {queue, EVERYTHING}, f"{what} although queue {queue} is paused")

    # -- events of runs and of the ledger ---------------------------------------------------------------

    def ledger_event(self, entry: Entry, event: Any) -> None:
        """Nothing of a paused queue is placed."""
        if isinstance(event, le.Placing):
            self._may_begin(entry, f"{event.run_id} {event.step_id} attempt {event.attempt} placed", event.call.queue)

    def run_event(self, entry: Entry, seq: int, event: Any) -> None:
        """Nothing of a paused run or queue is asked of the gate; each wait ends once, and for a reason."""
        run_id = entry.subject
        if isinstance(event, re.RunPaused):
            self._paused_runs.add(run_id)
        elif isinstance(event, re.RunResumed):
            self._paused_runs.discard(run_id)
        elif isinstance(event, re.AttemptRequested) or (isinstance(event, re.StepReady) and not event.held):
            what = f"{run_id} {event.step_id} asked of the gate"
            self._require(run_id not in self._paused_runs, f"{what} although the run is paused")
            self._may_begin(entry, what, event.call.queue)
        elif isinstance(event, re.StepReady | re.AttemptHeld):
            self.held_back += 1
        elif isinstance(event, re.WaitStarted):
            self._require((run_id, event.step_id) not in self._begun, f"{run_id} {event.step_id} waits twice")
            self._begun[run_id, event.step_id] = event
        elif isinstance(event, re.SignalReceived) and not event.step_id:
            self._kept.setdefault(run_id, {})[seq] = event
        elif isinstance(event, re.WaitEnded):
            self._wait_ended(entry, event)

    def _wait_ended(self, entry: Entry, event: re.WaitEnded) -> None:
        key = (entry.subject, event.step_id)
        name = f"the wait {entry.subject} {event.step_id}"
        self._require(key not in self._over, f"{name} ended twice")
        self._require(key in self._begun, f"{name} ended, but never began")
        wait = self._begun[key]
        self._over.add(key)
        self.ended += 1
        outputs = [e.output for e in entry.events if isinstance(e, re.StepSucceeded) and e.step_id == event.step_id]
        if event.outcome == "due":
            self._require(wait.due_ms is not None and wait.due_ms <= entry.now_ms, f"{name} ended before its time")
        elif event.outcome == "timed_out":
            at_ms = wait.timeout_at_ms
            self._require(at_ms is not None and at_ms <= entry.now_ms, f"{name} timed out before its time")
            wanted = [wait.timeout_value] if wait.on_timeout == "value" else []
            self._require(outputs == wanted, f"{name} timed out and gave {outputs}, not {wanted}")
        elif event.outcome == "signalled":
            signal = self._signal_for(entry, event, name)
            fits = signal.event == wait.event and signal.key in (None, wait.key)
            self._require(fits, f"{name} for {wait.event} {wait.key!r} ended by {signal.event} {signal.key!r}")
            self._require(outputs == [signal.payload], f"{name} gave {outputs}, its signal {signal.payload}")
        else:
            self._answered(entry, event, wait, outputs)

    def _answered(self, entry: Entry, event: re.WaitEnded, wait: re.WaitStarted, outputs: list[str]) -> None:
        name = f"the wait {entry.subject} {event.step_id}"
        self._require(
            event.outcome in ("answered", "rejected") and wait.due_ms is None, f"{name} ended by {event.outcome}"
        )
        at_ms = wait.timeout_at_ms
        if wait.kind == "outside":
            self.outside += 1
            self._require(
                len(outputs) == (event.outcome == "answered"), f"{name} was {event.outcome} and gave {outputs}"
            )
            self._require(at_ms is not None, f"{name} for an outside tool has no end")
        else:
            self._require(event.outcome == "answered", f"{name} was {event.outcome}, and is no tool")

    def _signal_for(self, entry: Entry, event: re.WaitEnded, name: str) -> re.SignalReceived:
        """Return the signal that ended a wait: the one kept longest that was not taken before, or one that came just now."""
        if event.signal_seq:
            kept, wait = self._kept.get(entry.subject, {}), self._begun[entry.subject, event.step_id]
            fitting = [seq for seq, s in kept.items() if s.event == wait.event and s.key in (None, wait.key)]
            self._require(
                event.signal_seq == min(fitting, default=0),
                f"{name} took signal {event.signal_seq} of {fitting}",
            )
            signal = kept.pop(event.signal_seq, None)
            self._require(
                signal is not None, f"{name} took signal {event.signal_seq}, which was not kept, or taken before"
            )
            assert signal is not None
            return signal
        came = [e for e in entry.events if isinstance(e, re.SignalReceived) and e.step_id == event.step_id]
        self._require(len(came) == 1, f"{name} ended by a signal, of which {len(came)} came")
        return came[0]
