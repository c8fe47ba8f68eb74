"""The client: publish workflows, start runs, follow them, answer their questions. It talks to Kafka alone."""

from __future__ import annotations

import getpass
import itertools
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Literal

from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.controls import is_control_key
from tidegate.domain.identity import is_run_id, partition_of
from tidegate.domain.messages import Control, WorkflowPublished
from tidegate.domain.run import RunState
from tidegate.eventlog.interface import Broker, Message, Record, UnknownTopicError, WriteFailedError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables, Unreadable, readable
from tidegate.eventlog.validity import TYPE_HEADER
from tidegate.sdk import json_form
from tidegate.sdk.errors import PublishConflictError, RunNotFinishedError, RunNotFoundError
from tidegate.sdk.following import Follower
from tidegate.sdk.graph import Graph
from tidegate.sdk.judging import Workflows, judged
from tidegate.sdk.reading import ANSWERS, RUN_EVENTS, Approval, Event, GapError, Run, RunReader, ValidEntries, Wait

RUN_REQUESTS: Final = "run-requests"
WORKFLOWS: Final = "workflows"
CONTROLS: Final = "controls"
WRITE_DEADLINE_S: Final = 30.0
FOLLOW_TURN_S: Final = 0.5
CATCH_UP_S: Final = 5.0
# A run whose id was chosen by the caller may have been asked for before: after so long without news of it we look.
GIVEN_ID_HISTORY_S: Final = 1.0

__all__ = ["Approval", "Client", "Event", "Run", "Wait"]


class Client:
    """Thread-safe. Reading a run that this client did not start reads its whole partition of the log.

    Every call blocks for the round trips that it needs. All raise EventLogError if Kafka does not answer.
    """

    def __init__(self, kafka: str | KafkaSettings | Broker | None = None, *, by: str | None = None) -> None:
        """`kafka`: addresses or settings; without them TIDEGATE_KAFKA_… variables count. `by`: who answers and cancels.

        A broker that is passed in (one in memory, say) is not closed with the client.
        """
        self._own_broker: KafkaBroker | None = None
        if kafka is None or isinstance(kafka, str | KafkaSettings):
            settings = KafkaSettings(bootstrap=kafka) if isinstance(kafka, str) else kafka or KafkaSettings()
            self._broker: Broker = (own := KafkaBroker(settings))
            self._own_broker = own
        else:
            self._broker = kafka
        self._by = by or user_name()
        self._lock = threading.Lock()
        self._writer = self._broker.writer()
        self._is_closed = False
        self._partition_counts: dict[str, int] = {}
        self._follower = Follower(self._broker)
        self._decode = looking_up(self._broker, codec.decode)
        self._commands: dict[str, set[str]] = {}  # run id -> ids of the answers and cancels sent by this client

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the connections."""
        with self._lock:
            self._is_closed = True
            self._writer.close()
        self._follower.close()
        if self._own_broker is not None:
            self._own_broker.close()

    # --- workflows ---

    def publish(self, what: Workflows) -> list[str]:
        """Publish an app's workflows, a graph or finished definitions; return them as `name@version`.

        Idempotent. Raises GraphError if one cannot run or is there twice, PublishConflictError if one is published with other
        content: then nothing is published.
        """
        found = judged(what)
        for error in found.wrong():
            raise error
        wanted = [_published(definition, self._by) for definition in found.definitions]
        table = Tables((WORKFLOWS,), self._decode)
        table.load(self._broker)
        there, offsets = readable(table.rows[WORKFLOWS]), table.offsets[WORKFLOWS]
        conflicts = [label for label, row in wanted if label in there and _differs(there[label], row)]
        if conflicts:
            raise PublishConflictError(
                f"published already, with other content: {', '.join(conflicts)}. Runs pin name and version, so what they "
                "name never changes: give it another version"
            )
        new = []
        for label, row in wanted:
            newest = max((at for key, at in offsets.items() if key.partition("@")[0] == row.name), default=-1)
            if label not in there or offsets[label] != newest:  # the one published last is what a bare name means
                new.append(Record(WORKFLOWS, 0, label.encode(), codec.encode(row), _headers("WorkflowPublished")))
        self._write(*new)
        return [label for label, _ in wanted]

    # --- runs ---

    def start(
        self,
        workflow: str | Graph | None = None,
        input: Any = None,  # noqa: A002 - the word of the request
        *,
        agent: str | None = None,
        run_id: str | None = None,
        account: str | None = None,
        budget_micros: int | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        failure_mode: Literal["fail_fast", "continue"] | None = None,
        prefer: str | None = None,
    ) -> str:
        """Ask for a run of a published workflow (`name`, `name@version`, a graph), or of an agent alone; return its id.

        The request is in the log when this returns. Asking again with the same run id and content changes nothing.
        priority (5): from 0 to 9, more goes first among the runs of the account root. failure_mode: instead of the workflow's.
        prefer: the executor that should run its steps where it can, before the one that a function prefers.
        Raises ValueError on a bad run id or if not exactly one of workflow and agent is given, NotJsonError.
        """
        if (workflow is None) == (agent is None):
            raise ValueError("give a workflow or an agent, not both")
        is_new = run_id is None
        run_id = uuid.uuid4().hex if run_id is None else run_id
        if not is_run_id(run_id):
            raise ValueError(f"run id {run_id!r}: letters, digits, dot, dash and underscore, at most 128")
        request: dict[str, Any] = {
            "type": "start",
            "run_id": run_id,
            "workflow": workflow.label if isinstance(workflow, Graph) else workflow,
            "agent": agent,
            "input": json_form.to_json(input, "input"),
            "account": account,
            "budget_micros": budget_micros,
            "tags": dict(tags or {}),
            "priority": priority,
            "failure_mode": failure_mode,
            "prefer": prefer,
        }
        history_s = float("inf") if is_new else GIVEN_ID_HISTORY_S
        self._follower.subscribe(run_id, self._partition(run_id), history_s)
        self._request(run_id, {name: value for name, value in request.items() if value is not None or name == "input"})
        return run_id

    def run(
        self,
        workflow: str | Graph | None = None,
        input: Any = None,  # noqa: A002 - the word of the request
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Run:
        """Start a run and wait for it: see `start` for the options, and `wait`."""
        return self.wait(self.start(workflow, input, **options), timeout_s)

    def get(self, run_id: str) -> Run:
        """Return the run as it stands now. Raises RunNotFoundError."""
        return self._read(run_id).run()

    def get_folded(self, run_id: str) -> tuple[Run, RunState]:
        """Return the run as it stands now, and all that its events fold to. Raises RunNotFoundError."""
        reader = self._read(run_id)
        return reader.run(), reader.state

    def graph(self, run_id: str, *, calls: bool = False) -> dict[str, Any]:
        """Return the definition that a run goes by: the one it began with, and what it has added since. Raises RunNotFoundError.

        calls: with the calls of its flows as nodes, for pictures.
        """
        return self._read(run_id).graph(calls=calls)

    def _read(self, run_id: str) -> RunReader:
        reader = RunReader(run_id, self._decode)
        reader.read(self._present(run_id))
        if not reader.exists:
            raise RunNotFoundError(f"the log has no run {run_id}")
        return reader

    def events(self, run_id: str, *, follow: bool = False) -> Iterator[Event]:
        """Yield the run's events; with `follow` also those to come, until the run is over. Blocks between them.

        Raises RunNotFoundError if there are none, unless it follows.
        """
        if not follow:
            events = RunReader(run_id, self._decode).read(self._present(run_id))
            if not events:
                raise RunNotFoundError(f"the log has no run {run_id}")
            yield from events
            return
        for _, events in self.follow(run_id):
            yield from events

    def follow(self, run_id: str, timeout_s: float | None = None) -> Iterator[tuple[Run, list[Event]]]:
        """Yield the run as it stands and the events that are new, whenever there are some, until it is over.

        Waits for a run that does not exist yet, too. Blocks in between. Ends without a word when the time is up.
        """
        seq = 0
        for reader, events in self._following(run_id, timeout_s):
            new = [event for event in events if event.seq > seq]
            if not new:
                continue
            run = reader.run()
            seq = run.seq
            yield run, new
            if run.is_over:
                return

    def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        """Return the run when it is over or needs a human who has not answered yet through this client.

        Waits for a run that does not exist yet, too. Raises RunNotFinishedError after `timeout_s`.
        """
        reader = RunReader(run_id, self._decode)
        for reader, _ in self._following(run_id, timeout_s):
            run = reader.run()
            asks = run.needs_human and self._commands.get(run_id, frozenset()) <= reader.answered
            if run.is_over or asks:
                return run
        seen = f"it is {reader.run().status}" if reader.exists else "the log has nothing of it"
        raise RunNotFinishedError(f"run {run_id} did not end within {timeout_s} s: {seen}")

    def approve(
        self,
        run_id: str,
        step_id: str | None = None,
        *,
        reason: str = "",
        attempt: int | None = None,
        why: str | None = None,
        question: str | None = None,
    ) -> str:
        """Allow the attempt that waits; `step_id` may be left out if only one does. Returns the command's id.

        attempt, why, question: those of the question that is meant (see `Approval`); if another one is open, the answer is refused.
        """
        meant = {"attempt": attempt, "why": why, "question": question}
        return self._command("approve", run_id, step_id=step_id, reason=reason, **meant)

    def reject(
        self,
        run_id: str,
        step_id: str | None = None,
        *,
        reason: str = "",
        attempt: int | None = None,
        why: str | None = None,
        question: str | None = None,
    ) -> str:
        """Refuse the attempt that waits; its step fails. As `approve`."""
        meant = {"attempt": attempt, "why": why, "question": question}
        return self._command("reject", run_id, step_id=step_id, reason=reason, **meant)

    def respond(
        self,
        run_id: str,
        value: Any,
        step_id: str | None = None,
        *,
        reason: str = "",
        attempt: int | None = None,
        why: str | None = None,
        question: str | None = None,
    ) -> str:
        """Answer what a step waits for; `step_id` may be left out if only one can be answered. Returns the command's id.

        value: the answer to a question, the payload of an event; to an attempt of unknown outcome "again", "fail" or
        {"done": its result}. A bad answer is refused with the reason (see `answer`) and the question stays open. Raises
        NotJsonError.
        """
        fields = {"step_id": step_id, "reason": reason, "attempt": attempt, "why": why, "question": question}
        return self._command("respond", run_id, value=json_form.to_json(value, "value"), **fields)

    def signal(self, run_id: str, event: str, payload: Any = None, *, key: str | None = None) -> str:
        """Send a run an event; returns the command's id. What nothing waits for yet is kept for what will.

        key: the correlation key; without one it fits every wait for the name. Raises NotJsonError.
        """
        return self._command("signal", run_id, event=event, payload=json_form.to_json(payload, "payload"), key=key)

    def pause(self, run_id: str, *, reason: str = "") -> str:
        """Let nothing further of a run start until it is resumed; what runs may end. Returns the command's id."""
        return self._command("pause", run_id, reason=reason)

    def resume(self, run_id: str, *, reason: str = "") -> str:
        """Let a paused run go on. Returns the command's id."""
        return self._command("resume", run_id, reason=reason)

    def cancel(self, run_id: str, *, reason: str = "") -> str:
        """Ask for the end of a run; what runs for it is aborted. Returns the command's id."""
        return self._command("cancel", run_id, reason=reason)

    def answer(self, run_id: str, command_id: str, timeout_s: float | None = None) -> Event:
        """Wait for what came of a command: `CommandRefused`, or the event that it caused, such as `ApprovalResolved`.

        Raises RunNotFinishedError after `timeout_s`: nobody has read the command yet, but it stays in the log.
        """
        for _, events in self._following(run_id, timeout_s):
            for event in events:
                if isinstance(event.data, ANSWERS) and event.data.command_id == command_id:
                    return event
        raise RunNotFinishedError(f"run {run_id} has not answered command {command_id} within {timeout_s} s")

    # --- queues ---

    def pause_queue(self, queue: str, *, reason: str = "") -> None:
        """Let nothing of a queue start, or of any with `*`, until it is resumed. What is asked for meanwhile is kept.

        In force when the scheduler and the gate have read it, within a turn. Raises ValueError on a bad name.
        """
        self._control(queue, paused=True, reason=reason)

    def resume_queue(self, queue: str, *, reason: str = "") -> None:
        """Take back the pause of a queue, or of everything with `*`: each is taken back by itself. As `pause_queue`."""
        self._control(queue, paused=False, reason=reason)

    def paused_queues(self) -> dict[str, Control]:
        """Return what is paused, by queue; `*` is everything."""
        table = Tables((CONTROLS,), self._decode)
        table.load(self._broker)
        rows = {queue: _control_of(row) for queue, row in table.rows[CONTROLS].items()}
        return {queue: row for queue, row in sorted(rows.items()) if row.paused}

    def _control(self, queue: str, *, paused: bool, reason: str) -> None:
        if not is_control_key(queue):
            raise ValueError(
                f"queue {queue!r}: a letter or underscore, then letters, digits, _ . or -, or * for everything"
            )
        row = Control(queue=queue, paused=paused, by=self._by, reason=reason[:4096], at_ms=time.time_ns() // 1_000_000)
        # Says at once, and why, if Kafka or the topic is not there: a writer waits for half a minute.
        self._partitions_of(CONTROLS)
        self._write(Record(CONTROLS, 0, queue.encode(), codec.encode(row), _headers("Control")))

    # --- writing ---

    def _command(self, kind: str, run_id: str, **fields: Any) -> str:
        command_id = uuid.uuid4().hex
        self._commands.setdefault(run_id, set()).add(command_id)
        left_out = {"step_id", "reason", "why"}  # where an empty text says nothing
        given = {
            name: value
            for name, value in fields.items()
            if value is not None and not (value == "" and name in left_out)
        }
        self._request(run_id, {"type": kind, "run_id": run_id, "command_id": command_id, "by": self._by, **given})
        return command_id

    def _request(self, run_id: str, request: Mapping[str, Any]) -> None:
        partition = partition_of(run_id, self._partitions_of(RUN_REQUESTS))
        value = canonical.dumps(request).encode()
        self._write(Record(RUN_REQUESTS, partition, run_id.encode(), value, _headers("RunRequest")))

    def _write(self, *records: Record) -> None:
        """Write records and wait until they are in the log. Raises WriteFailedError: whether they are is not known then.

        A writer that failed is dead: calls that have it under way fail, and later ones have another.
        """
        writer = self._writer
        try:
            with self._lock:
                writer = self._writer
                for record in records:
                    writer.send(record)
            with self._lock:  # others may have sent meanwhile: one wait for all
                writer.flush(WRITE_DEADLINE_S)
        except WriteFailedError:
            with self._lock:
                writer.close()
                if writer is self._writer and not self._is_closed:
                    self._writer = self._broker.writer()
            raise

    # --- reading ---

    def _partitions_of(self, topic: str) -> int:
        if topic not in self._partition_counts:
            found = self._broker.describe([topic]).get(topic)
            if found is None:
                raise UnknownTopicError(f"topic {topic} does not exist; create the topics with `tidegate topics apply`")
            self._partition_counts[topic] = found.partition_count
        return self._partition_counts[topic]

    def _partition(self, run_id: str) -> int:
        return partition_of(run_id, self._partitions_of(RUN_EVENTS))

    def _present(self, run_id: str) -> Iterable[Message]:
        """Return all entries of the run that are in the log now."""
        partition = self._partition(run_id)
        end = self._broker.offsets(RUN_EVENTS, partition).end
        subscription = self._follower.find(run_id)
        if (
            subscription is not None
            and subscription.history_s == float("inf")
            and self._follower.catch_up(partition, end, CATCH_UP_S)
            and not subscription.dropped
        ):
            return list(subscription.entries)
        return self._entries(run_id, end)

    def _entries(self, run_id: str, end: int) -> Iterator[Message]:
        """Yield the run's entries below offset `end`: reads the partition from its beginning."""
        partition, prefix, valid = self._partition(run_id), f"{run_id}:".encode(), ValidEntries()
        for message in self._broker.read(RUN_EVENTS, partition, self._broker.offsets(RUN_EVENTS, partition).start, end):
            if valid.admits(message) and (message.key or b"").startswith(prefix):
                yield message

    def _following(self, run_id: str, timeout_s: float | None) -> Iterator[tuple[RunReader, list[Event]]]:
        """Yield the run as it is read, with what is new, at once and then whenever something came, until the time is up.

        Events may come twice, after the follower has lost its place.
        """
        began_s = time.monotonic()
        reader, seen, has_history = RunReader(run_id, self._decode), 0, False
        subscription = self._follower.subscribe(run_id, self._partition(run_id), 0.0)
        while True:
            silent_s = time.monotonic() - began_s
            if subscription.dropped:
                subscription = self._follower.subscribe(run_id, self._partition(run_id), 0.0)
                reader, seen, has_history = RunReader(run_id, self._decode), 0, False
            if not has_history and not reader.exists and silent_s >= subscription.history_s:
                has_history = True
                # Up to the present end before anybody looks: a question may have been answered long ago.
                self._follower.catch_up(
                    subscription.partition, self._broker.offsets(RUN_EVENTS, subscription.partition).end, CATCH_UP_S
                )
                if subscription.dropped:
                    continue
                since, seen = subscription.entries[seen:], len(subscription.entries)
                yield reader, reader.read(itertools.chain(self._entries(run_id, subscription.begin), since))
            new = subscription.entries[seen:]
            try:
                events = reader.read(new)
            except GapError:
                if has_history or reader.exists:
                    raise
                subscription.history_s = 0.0  # it was there before we asked for it
                continue
            seen += len(new)
            yield reader, events
            left_s = FOLLOW_TURN_S if timeout_s is None else min(FOLLOW_TURN_S, timeout_s - silent_s)
            if left_s <= 0:
                return
            self._follower.wait(subscription, seen, left_s)


def _published(definition: Mapping[str, Any], by: str) -> tuple[str, WorkflowPublished]:
    text = canonical.dumps(definition)
    row = WorkflowPublished(
        name=definition["name"],
        version=definition["version"],
        definition_hash=canonical.digest(text),
        definition=text,
        by=by,
        at_ms=time.time_ns() // 1_000_000,
    )
    return f"{row.name}@{row.version}", row


def _differs(there: WorkflowPublished, row: WorkflowPublished) -> bool:
    return there.definition_hash != row.definition_hash


def _control_of(row: Control | Unreadable) -> Control:
    """Return a row of `controls`; services take one that cannot be read for a pause."""
    if not isinstance(row, Unreadable):
        return row
    return Control(queue=row.key, paused=is_control_key(row.key), by="", reason=f"{row}; resume it", at_ms=0)


def _headers(kind: str) -> tuple[tuple[str, bytes], ...]:
    return ((TYPE_HEADER, kind.encode()),)


def user_name() -> str:
    """Return who runs this process, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
