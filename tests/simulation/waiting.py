"""People whom runs wait for, and who make them wait: signals, answers, pauses of runs, of queues and of everything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from simulation.definitions import CHOICES, EVENTS, KEYS, QUEUES
from tidegate import codec
from tidegate.domain import states
from tidegate.domain.messages import Control, WorkflowPublished
from tidegate.domain.waits import OUTSIDE

if TYPE_CHECKING:
    from simulation.work import Work
    from tidegate.domain.run import StepState

EVERYTHING: Final = "*"


class Patience:
    """People who answer, signal, pause and resume. Each method does one such thing, whether it makes sense just now or not."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.world = work.world
        self.rng = work.rng
        self.unanswered: set[tuple[str, str]] = set()  # waits that nobody will ever end

    def signal(self) -> None:
        """Send an event to a run: early, in time, late, twice, to nobody."""
        fields = {
            "type": "signal",
            "run_id": self._some_run(),
            "event": self.rng.choice(EVENTS),
            "payload": {"n": self.rng.randint(0, 9)},
        }
        if self.rng.random() < 0.7:
            fields["key"] = self.rng.choice(KEYS)
        if self.rng.random() < 0.4:
            fields["command_id"] = f"signal-{self.rng.randint(0, 5)}"
        self._send(fields)

    def respond(self) -> None:
        """Answer an open wait, mostly; rightly, mostly; one for an outside tool rather than others, for there are few."""
        found = self._open()
        outside = [(run_id, step) for run_id, step in found if step.wait is not None and step.wait.kind == OUTSIDE]
        if outside and self.rng.random() < 0.7:
            found = outside
        run_id, step = self.rng.choice(found) if found and self.rng.random() < 0.9 else (self._some_run(), None)
        self._respond(run_id, step, is_right=self.rng.random() < 0.7)

    def _respond(self, run_id: str, step: StepState | None, *, is_right: bool) -> None:
        wrong = ("perhaps", "", 7, None, {"done": 1})
        fields: dict[str, Any] = {"type": "respond", "run_id": run_id, "by": "ann"}
        if step is not None and step.wait is not None and step.wait.kind == OUTSIDE and self.rng.random() < 0.2:
            self._send({**fields, "type": "reject", "step_id": step.step_id})
            return
        fields["value"] = self.rng.choice(CHOICES) if is_right else self.rng.choice(wrong)
        if step is not None and self.rng.random() < 0.8:
            fields["step_id"] = step.step_id
        elif self.rng.random() < 0.3:
            fields["step_id"] = self.rng.choice(("n0", "n1", "elsewhere"))
        if self.rng.random() < 0.3:
            fields["command_id"] = f"respond-{self.rng.randint(0, 5)}"
        self._send(fields)

    def pause_run(self) -> None:
        self._send({"type": self.rng.choice(("pause", "pause", "resume")), "run_id": self._some_run(), "by": "bob"})

    def resume_run(self) -> None:
        paused = [run.run_id for run in self.world.judge.runs() if run.paused is not None and not run.is_over]
        if paused:
            self._send({"type": "resume", "run_id": self.rng.choice(paused), "by": "bob"})

    def control(self) -> None:
        """Pause or resume a queue or everything; or write what is no control, which changes nothing.

        What is no control has a key of its own: under a queue's, compaction would take the row of before away.
        """
        key = self.rng.choice((*QUEUES, EVERYTHING))
        chance = self.rng.random()
        if chance < 0.1:
            foreign = WorkflowPublished(name="x", version="1", definition_hash="", definition="", by="", at_ms=0)
            value = self.rng.choice((b"", b"\xc3\x01", codec.encode(foreign)))
            self.world.write("controls", 0, "no queue!", value)
        else:
            self._control(key, None if chance < 0.2 else chance < 0.35)

    def _control(self, key: str, paused: bool | None) -> None:
        row = None if paused is None else Control(queue=key, paused=paused, by="bob", reason="", at_ms=0)
        self.world.write("controls", 0, key, None if row is None else codec.encode(row))

    def resume_queues(self) -> None:
        """Let every queue go on: everything is to come to rest."""
        for key in (*QUEUES, EVERYTHING):
            self._control(key, self.rng.choice((None, False)))

    def answer_all(self) -> bool:
        """Resume every run and end every wait but those that nobody ever will; returns whether there was any."""
        paused = [run.run_id for run in self.world.judge.runs() if run.paused is not None and not run.is_over]
        for run_id in paused:
            self._send({"type": "resume", "run_id": run_id, "by": "bob"})
        found = self._open()
        for run_id, step in found:
            if self.rng.random() < 0.1:
                self.unanswered.add((run_id, step.step_id))
            elif step.wait is not None and step.wait.event and self.rng.random() < 0.5:
                fields = {"type": "signal", "run_id": run_id, "event": step.wait.event, "key": step.wait.key}
                self._send({**fields, "payload": {"n": 6}})
            else:
                self._respond(run_id, step, is_right=True)
        return bool(paused or found)

    def _open(self) -> list[tuple[str, StepState]]:
        """Return the waits that somebody may end."""
        return [
            (run.run_id, step)
            for run in self.world.judge.runs()
            if run.status == states.WAITING
            for step in run.open_waits()
            if is_open_ended(step) and (run.run_id, step.step_id) not in self.unanswered
        ]

    def _some_run(self) -> str:
        return self.rng.choice(self.work.started[-12:]) if self.work.started and self.rng.random() < 0.95 else "nobody"

    def _send(self, fields: dict[str, Any]) -> None:
        self.work.request(json.dumps(fields).encode())


def is_open_ended(step: StepState) -> bool:
    """Tell whether a wait is for somebody, and not for a time."""
    return step.wait is not None and step.wait.due_ms is None
