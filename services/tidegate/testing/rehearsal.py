"""Rehearsals: runs of an app's workflows under the real scheduler, gate and executor code, without Kafka and without waiting."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tidegate import codec
from tidegate.domain import canonical, states, waits
from tidegate.domain import run_events as ev
from tidegate.domain.messages import PolicyPublished, StepTask, WorkflowPublished
from tidegate.domain.requests import DEFAULT_MAX_BYTES
from tidegate.domain.run import RunState
from tidegate.domain.workflow import validate_definition, with_children
from tidegate.eventlog.interface import Message
from tidegate.gate.kinds import Document, parse, read
from tidegate.scheduler.admit import admit
from tidegate.sdk import json_form
from tidegate.sdk.app import App, functions_of
from tidegate.sdk.bound_inputs import bound_inputs
from tidegate.sdk.errors import AppError, GraphError, RunNotFoundError
from tidegate.sdk.functions import Function
from tidegate.sdk.graph import Graph
from tidegate.sdk.reading import RUN_EVENTS, Event, RunReader, ValidEntries
from tidegate.testing.outcome import Outcome, step_of
from tidegate.testing.stage import Stage
from tidegate.testing.stubs import Stub

DEFAULT_START: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
MAX_JUMPS: Final = 10_000
_VALUES: Final = frozenset({"value", "payload"})  # null is one
_SAID_EMPTY: Final = frozenset({"key"})  # an empty text says something

Documents = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


class CommandRefusedError(ValueError):
    """The run refused what was asked of it, as it would in production; `code` and `reason` say why."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


class Rehearsal:
    """A stage for the workflows of some apps. Runs follow one another on it, and share its clock, policies and budgets.

    Nothing takes real time but the functions themselves: when nothing can go on, the clock jumps to when something is due, a
    back-off or a wait for a time. It does not jump while somebody is asked or an event is waited for: then `run` returns with
    status `waiting`, and the test answers (`respond`, `approve`, `signal`) or lets time pass (`pass_time`). Functions are
    entered one after the other. Not thread-safe.
    """

    def __init__(
        self,
        *apps: App,
        policies: Sequence[Documents] = (),
        workflows: Sequence[Mapping[str, Any]] = (),
        start_at: datetime.datetime = DEFAULT_START,
    ) -> None:
        """policies: documents of any kind in force from the start (see `apply`). workflows: definitions besides the apps' own.

        Raises AppError, GraphError and DocumentError if something is wrong with them.
        """
        self._functions: dict[str, Function] = {}
        for app in apps:
            app.check()
            self._functions |= app.functions
        self._definitions = _definitions(apps, workflows)
        self._outside = {
            name: function
            for definition in self._definitions.values()
            for name, function in definition["functions"].items()
            if function.get("outside")
        }
        self._answered: set[tuple[str, str]] = set()
        self._stubs: dict[str, Stub] = {}
        self._numbers = itertools.count()
        self._runs: list[str] = []
        documents = [document for given in policies for document in _documents(given)]
        self._stage = Stage(_offered(apps), _ms(start_at))
        self._write(documents)

    def __enter__(self) -> Rehearsal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread that functions run in. Idempotent; the end of the process does it too."""
        self._stage.close()

    @property
    def now(self) -> datetime.datetime:
        """Return the rehearsal's time."""
        return datetime.datetime.fromtimestamp(self._stage.now_ms / 1000, datetime.UTC)

    # -- what is prepared ---------------------------------------------------------------

    def stub(self, name: str, **act: Any) -> Stub:
        """Put a stand-in in a function's place; see `Stub.then` for what it can do. Raises AppError for an unknown name."""
        if name not in self._functions and name not in self._outside:
            known = _listed({**self._functions, **self._outside})
            raise AppError(f"there is no function {name!r} to stand in for; known: {known}")
        self._stubs[name] = Stub(name).then(**act)
        return self._stubs[name]

    def apply(self, documents: Documents) -> None:
        """Put documents in force: policies, budgets, limits, top-ups. A file, YAML text, or documents as values.

        Raises DocumentError.
        """
        self._write(_documents(documents))

    def _write(self, documents: Sequence[Document]) -> None:
        for document in documents:
            row = PolicyPublished(
                policy_id=document.topic_key,
                version=document.version,
                document=document.to_json(),
                by="rehearsal",
                at_ms=self._stage.now_ms,
            )
            self._stage.write("policies", row.policy_id, row)
        self._settle()

    # -- what is played ---------------------------------------------------------------

    def run(
        self,
        workflow: str | Graph | None = None,
        input: Any = None,  # noqa: A002 - the word of the request
        *,
        agent: str | None = None,
        **options: Any,
    ) -> Outcome:
        """Start a run of a workflow, or of an agent alone, and play it until it is over or waits for somebody.

        options: as of `Client.start` (run_id, account, budget_micros, tags, priority, failure_mode). Raises AppError for a
        workflow that nobody knows, CommandRefusedError for a request that is wrong.
        """
        wanted = workflow.label if isinstance(workflow, Graph) else workflow
        if (wanted is None) == (agent is None):
            raise ValueError("give a workflow or an agent, not both")
        if self._published(wanted or f"agent:{agent}") is None:
            raise AppError(f"there is no workflow {wanted or agent!r}; known: {_listed(self._definitions)}")
        run_id = options.pop("run_id", None) or f"run-{len(self._runs) + 1}"
        given = {"workflow": wanted, "agent": agent, **options}
        request = {name: value for name, value in given.items() if value is not None}
        self._ask({"type": "start", "run_id": run_id, "input": json_form.to_json(input, "input"), **request})
        self._runs = [*(known for known in self._runs if known != run_id), run_id]
        return self._played(run_id)

    def approve(self, step_id: str | None = None, *, run_id: str | None = None, reason: str = "") -> Outcome:
        """Allow the attempt that waits; step_id may be left out if only one does. Raises CommandRefusedError, as all commands.

        run_id: the run that is meant, here and elsewhere; the one started last if it is left out.
        """
        return self._command("approve", run_id, step_id=step_id, reason=reason)

    def reject(self, step_id: str | None = None, *, run_id: str | None = None, reason: str = "") -> Outcome:
        """Refuse the attempt that waits; its step fails."""
        return self._command("reject", run_id, step_id=step_id, reason=reason)

    def respond(self, value: Any, step_id: str | None = None, *, run_id: str | None = None) -> Outcome:
        """Answer what a step waits for; step_id may be left out if only one can be answered."""
        return self._command("respond", run_id, step_id=step_id, value=json_form.to_json(value, "value"))

    def signal(self, event: str, payload: Any = None, *, key: str | None = None, run_id: str | None = None) -> Outcome:
        """Send the run an event. What nothing waits for yet is kept for what will."""
        return self._command("signal", run_id, event=event, key=key, payload=json_form.to_json(payload, "payload"))

    def cancel(self, *, run_id: str | None = None, reason: str = "") -> Outcome:
        """Cancel the run."""
        return self._command("cancel", run_id, reason=reason)

    def pause(self, *, run_id: str | None = None, reason: str = "") -> Outcome:
        """Let nothing further of the run start."""
        return self._command("pause", run_id, reason=reason)

    def resume(self, *, run_id: str | None = None, reason: str = "") -> Outcome:
        """Let a paused run go on."""
        return self._command("resume", run_id, reason=reason)

    def pass_time(self, seconds: float, *, run_id: str | None = None) -> Outcome:
        """Let time pass, whoever is waited for: what falls due meanwhile happens, in its order."""
        until_ms = self._stage.now_ms + round(seconds * 1000)
        for _ in range(MAX_JUMPS):
            due_ms = self._stage.next_due_ms()
            if due_ms is None or due_ms >= until_ms:
                break
            self._jump(due_ms)
        self._jump(until_ms)
        return self._played(run_id)

    # -- what came of it ---------------------------------------------------------------

    def outcome(self, run_id: str | None = None) -> Outcome:
        """Return a run as it stands. Raises RunNotFoundError."""
        wanted = self._named(run_id)
        reader, events = self._read(wanted)
        steps = {
            step.step_id: step_of(step, bound_inputs(reader.state, step.step_id))
            for step in reader.state.steps.values()
        }
        children = (step.child_run_id for step in reader.state.steps.values() if step.child_run_id)
        ledger = (event for message in self._valid("gate-ledger") for event in codec.decode(message.value).events)
        return Outcome(
            run=reader.run(),
            events=tuple(events),
            steps=steps,
            ledger=tuple(event for event in ledger if getattr(event, "run_id", "") == wanted),
            at_ms=self._stage.now_ms,
            children=tuple(children),
        )

    def _read(self, run_id: str) -> tuple[RunReader, list[Event]]:
        reader, events = RunReader(run_id), list[Event]()
        for message in self._valid(RUN_EVENTS):
            if (message.key or b"").startswith(f"{run_id}:".encode()):
                events += reader.read([message])
        if not reader.exists:
            raise RunNotFoundError(f"there is no run {run_id}")
        return reader, events

    def _valid(self, topic: str) -> Iterator[Message]:
        valid = ValidEntries()
        return (message for message in self._stage.messages(topic) if valid.admits(message))

    # -- how ---------------------------------------------------------------

    def _named(self, run_id: str | None) -> str:
        if run_id is None and not self._runs:
            raise RunNotFoundError("no run was started yet")
        return self._runs[-1] if run_id is None else run_id

    def _command(self, kind: str, run_id: str | None, **fields: Any) -> Outcome:
        wanted = self._named(run_id)
        self._commanded(kind, wanted, **fields)
        return self._played(wanted)

    def _commanded(self, kind: str, wanted: str, **fields: Any) -> None:
        """Send a command. Raises CommandRefusedError if it is refused."""
        left_out = [
            name for name, value in fields.items() if value is None or (value == "" and name not in _SAID_EMPTY)
        ]
        said = {name: value for name, value in fields.items() if name not in left_out or name in _VALUES}
        command_id = f"command-{next(self._numbers)}"
        self._ask({"type": kind, "run_id": wanted, "command_id": command_id, "by": "rehearsal", **said})
        self._settle()
        for event in self.outcome(wanted).seen("CommandRefused"):
            if event.command_id == command_id:
                raise CommandRefusedError(event.code, event.reason)

    def _ask(self, request: Mapping[str, Any]) -> None:
        """Send a request the way all come: through admission. Raises CommandRefusedError if that takes it for wrong."""
        value = canonical.dumps(request).encode()
        offset = next(self._numbers)
        message = Message("run-requests", 0, offset, b"rehearsal", value, (), self._stage.now_ms)
        command, letter = admit(message, self._published, self._stage.now_ms, max_bytes=DEFAULT_MAX_BYTES, horizon_ms=1)
        if letter is not None:
            raise CommandRefusedError(letter.code, letter.reason)
        assert command is not None  # noqa: S101 - a request without a letter has become a command
        self._stage.write("run-commands", f"{command.run_id}:{command.command_id}", command)

    def _published(self, wanted: str) -> WorkflowPublished | None:
        """Return a definition by `name@version`, or the last one of a name."""
        labels = [label for label in self._definitions if wanted in (label, label.partition("@")[0])]
        if not labels:
            return None
        definition = self._definitions[labels[-1]]
        text = canonical.dumps(definition)
        return WorkflowPublished(
            name=definition["name"],
            version=definition["version"],
            definition_hash=canonical.digest(text),
            definition=text,
            by="rehearsal",
            at_ms=self._stage.now_ms,
        )

    def _played(self, run_id: str | None) -> Outcome:
        """Let the run go on, and the clock jump, until it is over, waits for somebody, or nothing is due."""
        wanted = self._named(run_id)
        self._settle()
        for _ in range(MAX_JUMPS):
            due_ms = self._stage.next_due_ms()
            if due_ms is None or not self._may_jump(wanted):
                return self.outcome(wanted)
            self._jump(due_ms)
        raise RuntimeError(f"run {wanted} is not over after {MAX_JUMPS} jumps of the clock")

    def _may_jump(self, run_id: str) -> bool:
        """Tell whether the run goes on by itself: it is not over, and neither it nor a run of its steps waits for somebody."""
        run = self._stage.run(run_id)
        if run is None or run.is_over or run.paused is not None:
            return False
        return not any(_is_asked(one) for one in self._family(run))

    def _family(self, run: RunState) -> Iterator[RunState]:
        yield run
        for step in run.steps.values():
            child = self._stage.run(step.child_run_id) if step.status == states.IN_CHILD else None
            if child is not None:
                yield from self._family(child)

    def _jump(self, to_ms: int) -> None:
        self._stage.now_ms = max(self._stage.now_ms, to_ms)
        self._settle()

    def _settle(self) -> None:
        self._stage.settle(self._perform)
        while (found := self._asked_outside()) is not None:
            self._answer(*found)
            self._stage.settle(self._perform)

    def _asked_outside(self) -> tuple[str, ev.WaitStarted] | None:
        """Return a call of an outside tool that has a stand-in, with its run."""
        started = (self._stage.run(run_id) for run_id in self._runs)
        for run in (member for one in started if one is not None for member in self._family(one)):
            for step in run.open_waits():
                wait = step.wait
                is_ours = wait is not None and wait.kind == waits.OUTSIDE and wait.function in self._stubs
                if wait is not None and is_ours and (run.run_id, step.step_id) not in self._answered:
                    return run.run_id, wait
        return None

    def _answer(self, run_id: str, wait: ev.WaitStarted) -> None:
        """Answer as the stand-in does; one that is lost or takes too long gives none."""
        self._answered.add((run_id, wait.step_id))
        arguments = canonical.loads(wait.input)
        act = self._stubs[wait.function].called(arguments)
        if act.is_lost or act.takes_s * 1000 >= (wait.timeout_ms or 0):
            return
        self._stage.now_ms += round(act.takes_s * 1000)
        try:
            value = act.call(**arguments)
        except Exception as error:  # whatever it was told to raise: whoever does the tool could not
            self._commanded("reject", run_id, step_id=wait.step_id, reason=f"{type(error).__name__}: {error}")
        else:
            self._commanded("respond", run_id, step_id=wait.step_id, value=json_form.to_json(value, "value"))

    def _perform(self, task: StepTask) -> bool:
        result, took_ms = self._stage.performer.perform(task, self._functions, self._stubs, self._stage.now_ms)
        self._stage.now_ms += took_ms
        if result is None:
            return False
        self._stage.answer(task, result)
        return True


def _is_asked(run: RunState) -> bool:
    asked = any(step.wait is not None and step.wait.kind not in waits.TIMES for step in run.open_waits())
    return asked or bool(run.open_approvals())


def _definitions(apps: Sequence[App], workflows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = [definition for app in apps for definition in app.definitions()]
    for given in workflows:
        completed = dict(given)
        for app in apps:
            completed = app.completed(completed)
        found.append(completed)
    made = {f"{one.get('name')}@{one.get('version')}": one for one in with_children(found)}
    for label, definition in made.items():
        if problems := validate_definition(definition):
            raise GraphError(label, problems)
    return made


def _offered(apps: Sequence[App]) -> dict[str, tuple[str, ...]]:
    offered: dict[str, tuple[str, ...]] = {}
    for app in apps:
        known = {function.label: function.settings.queue for function in app.functions.values()}
        for label in functions_of(app):
            offered[known[label]] = (*offered.get(known[label], ()), label)
    return offered


def _documents(given: Documents) -> list[Document]:
    if isinstance(given, Path):
        return read(given.read_text(encoding="utf-8"))
    if isinstance(given, str):
        return read(given)
    return [parse(given)] if isinstance(given, Mapping) else [parse(one) for one in given]


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "none"


def _ms(at: datetime.datetime) -> int:
    return int(at.timestamp() * 1000)
