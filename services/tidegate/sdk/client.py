"""The client: publish workflows, start runs, follow them, answer their questions. It talks to Kafka alone."""

from __future__ import annotations

import contextlib
import getpass
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.identity import is_run_id, partition_of
from tidegate.domain.messages import WorkflowPublished
from tidegate.domain.workflow import validate_definition
from tidegate.eventlog.interface import Broker, Inbox, Message, Record, TopicPartition, UnknownTopicError
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.settings import KafkaSettings
from tidegate.eventlog.tables import Tables
from tidegate.eventlog.validity import NO_EPOCH, TYPE_HEADER
from tidegate.sdk import json_form
from tidegate.sdk.app import App, default_app
from tidegate.sdk.errors import GraphError, PublishConflictError, RunNotFinishedError, RunNotFoundError
from tidegate.sdk.graph import Graph
from tidegate.sdk.reading import RUN_EVENTS, Approval, Event, Run, RunReader

RUN_REQUESTS: Final = "run-requests"
WORKFLOWS: Final = "workflows"
WRITE_DEADLINE_S: Final = 30.0
FOLLOW_POLL_S: Final = 0.5
MAX_BATCH: Final = 1000
# More than an owner of the log lets pass between two announcements of its epoch.
LOOK_BACK_RECORDS: Final = 1100
MAX_REMEMBERED_RUNS: Final = 10_000

__all__ = ["Approval", "Client", "Event", "Run"]


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
        self._by = by or _user()
        self._lock = threading.Lock()
        self._writer = self._broker.writer()
        self._partition_counts: dict[str, int] = {}
        self._inboxes: list[Inbox] = []
        self._began: dict[str, int] = {}  # run id -> end of its partition before it was asked for
        self._known_epochs: dict[int, tuple[int, int]] = {}  # partition -> (offset, epoch in force there)
        self._unanswered: dict[str, set[str]] = {}  # run id -> commands of ours that it has not answered

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the connections."""
        with self._lock:
            self._writer.close()
            for inbox in self._inboxes:
                inbox.close()
            self._inboxes.clear()
        if self._own_broker is not None:
            self._own_broker.close()

    # --- workflows ---

    def publish(self, what: App | Graph | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[str]:
        """Publish an app's workflows, a graph or finished definitions; return them as `name@version`.

        Idempotent. Raises GraphError if one cannot run, PublishConflictError if one is there with other content: then
        nothing is published.
        """
        wanted = [_published(definition, self._by) for definition in _definitions(what)]
        table = Tables((WORKFLOWS,))
        table.load(self._broker)
        there, offsets = table.rows[WORKFLOWS], table.offsets[WORKFLOWS]
        conflicts = [label for label, row in wanted if label in there and _differs(there[label], row)]
        if conflicts:
            raise PublishConflictError(
                f"published already, with other content: {', '.join(conflicts)}. Runs pin name and version, so what they "
                "name never changes: give it another version"
            )
        for label, row in wanted:
            newest = max((offsets[key] for key, other in there.items() if other.name == row.name), default=-1)
            if newest == -1 or offsets.get(label) != newest:  # the one published last is what a bare name means
                self._send(Record(WORKFLOWS, 0, label.encode(), codec.encode(row), _headers("WorkflowPublished")))
        self._flush()
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
    ) -> str:
        """Ask for a run of a published workflow (`name`, `name@version`, a graph), or of an agent alone; return its id.

        The request is in the log when this returns. Asking again with the same run id and content changes nothing.
        Raises ValueError on a bad run id or if not exactly one of workflow and agent is given, NotJsonError.
        """
        if (workflow is None) == (agent is None):
            raise ValueError("give a workflow or an agent, not both")
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
        }
        self._remember_where(run_id)
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
        reader = RunReader(run_id, self._epoch_at(run_id))
        reader.read(self._present(run_id))
        if not reader.exists:
            raise RunNotFoundError(f"the log has no run {run_id}")
        return reader.run()

    def events(self, run_id: str, *, follow: bool = False) -> Iterator[Event]:
        """Yield the run's events; with `follow` also those to come, until the run is over. Blocks between them.

        Raises RunNotFoundError if there are none yet, unless it follows.
        """
        reader = RunReader(run_id, self._epoch_at(run_id))
        batches = self._following(run_id, None) if follow else iter([list(self._present(run_id))])
        for batch in batches:
            yield from reader.read(batch)
            if reader.exists and reader.run().is_over:
                return
        if not reader.exists:
            raise RunNotFoundError(f"the log has no run {run_id}")

    def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        """Return the run when it is over or needs a human who has not answered yet through this client.

        Waits for a run that does not exist yet, too. Raises RunNotFinishedError after `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        reader = RunReader(run_id, self._epoch_at(run_id))
        for batch in self._following(run_id, deadline):
            if reader.read(batch) or reader.exists:
                run = reader.run()
                unanswered = self._unanswered.get(run_id, set()) - reader.answered
                if run.is_over or (run.needs_human and not unanswered):
                    self._remember_epoch(run_id, batch, reader.epoch)
                    return run
        seen = f"it is {reader.run().status}" if reader.exists else "the log has nothing of it"
        raise RunNotFinishedError(f"run {run_id} did not end within {timeout_s} s: {seen}")

    def approve(self, run_id: str, step_id: str | None = None, *, reason: str = "") -> None:
        """Allow the attempt that waits; `step_id` may be left out if only one does."""
        self._command("approve", run_id, step_id=step_id, reason=reason)

    def reject(self, run_id: str, step_id: str | None = None, *, reason: str = "") -> None:
        """Refuse the attempt that waits; its step fails."""
        self._command("reject", run_id, step_id=step_id, reason=reason)

    def cancel(self, run_id: str, *, reason: str = "") -> None:
        """Ask for the end of a run; what runs for it is aborted."""
        self._command("cancel", run_id, reason=reason)

    # --- writing ---

    def _command(self, kind: str, run_id: str, **fields: str | None) -> None:
        command_id = uuid.uuid4().hex
        self._unanswered.setdefault(run_id, set()).add(command_id)
        given = {name: value for name, value in fields.items() if value}
        self._request(run_id, {"type": kind, "run_id": run_id, "command_id": command_id, "by": self._by, **given})

    def _request(self, run_id: str, request: Mapping[str, Any]) -> None:
        partition = partition_of(run_id, self._partitions_of(RUN_REQUESTS))
        value = canonical.dumps(request).encode()
        self._send(Record(RUN_REQUESTS, partition, run_id.encode(), value, _headers("RunRequest")))
        self._flush()

    def _send(self, record: Record) -> None:
        with self._lock:
            self._writer.send(record)

    def _flush(self) -> None:
        with self._lock:
            self._writer.flush(WRITE_DEADLINE_S)

    # --- reading ---

    def _partitions_of(self, topic: str) -> int:
        if topic not in self._partition_counts:
            found = self._broker.describe([topic]).get(topic)
            if found is None:
                raise UnknownTopicError(f"topic {topic} does not exist; create the topics with `tidegate topics apply`")
            self._partition_counts[topic] = found.partition_count
        return self._partition_counts[topic]

    def _place(self, run_id: str) -> TopicPartition:
        return TopicPartition(RUN_EVENTS, partition_of(run_id, self._partitions_of(RUN_EVENTS)))

    def _remember_where(self, run_id: str) -> None:
        """Note where the run's events cannot lie before, unless it may exist already."""
        if len(self._began) >= MAX_REMEMBERED_RUNS:
            self._began.pop(next(iter(self._began)), None)
        self._began.setdefault(run_id, self._broker.offsets(*self._place(run_id)).end)

    def _begin_of(self, run_id: str) -> int:
        """Return where to begin to read: before the run, and so far back that the epoch in force is told, or known."""
        place = self._place(run_id)
        start = self._broker.offsets(*place).start
        began = self._began.get(run_id)
        if began is None:
            return start
        known = self._known_epochs.get(place.partition)
        if known is not None and began - LOOK_BACK_RECORDS <= known[0] <= began:
            return known[0]
        return max(start, began - LOOK_BACK_RECORDS)

    def _epoch_at(self, run_id: str) -> int:
        known = self._known_epochs.get(self._place(run_id).partition)
        return known[1] if known is not None and self._begin_of(run_id) == known[0] else NO_EPOCH

    def _remember_epoch(self, run_id: str, batch: list[Message], epoch: int) -> None:
        if batch:
            self._known_epochs[batch[-1].partition] = (batch[-1].offset + 1, epoch)

    def _present(self, run_id: str) -> Iterable[Message]:
        place = self._place(run_id)
        return self._broker.read(*place, self._begin_of(run_id), self._broker.offsets(*place).end)

    def _following(self, run_id: str, deadline: float | None) -> Iterator[list[Message]]:
        """Yield batches of the run's partition as they come, empty ones too, until the deadline (monotonic)."""
        with self._borrowed_inbox() as inbox:
            inbox.read_from({self._place(run_id): self._begin_of(run_id)})
            while True:
                left_s = FOLLOW_POLL_S if deadline is None else min(FOLLOW_POLL_S, deadline - time.monotonic())
                if left_s <= 0:
                    return
                yield inbox.poll(MAX_BATCH, left_s)

    @contextlib.contextmanager
    def _borrowed_inbox(self) -> Iterator[Inbox]:
        with self._lock:
            inbox = self._inboxes.pop() if self._inboxes else None
        inbox = inbox or self._broker.plain_inbox()
        try:
            yield inbox
            inbox.read_from({})
        except BaseException:
            inbox.close()
            raise
        with self._lock:
            self._inboxes.append(inbox)


def _definitions(what: App | Graph | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if isinstance(what, App):
        return what.definitions()
    if isinstance(what, Graph):
        return [(what.app or default_app).definition(what)]
    definitions = [what] if isinstance(what, Mapping) else what
    for definition in definitions:
        problems = validate_definition(definition)
        if problems:
            raise GraphError(f"{definition.get('name')}@{definition.get('version')}", problems)
    return definitions


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


def _headers(kind: str) -> tuple[tuple[str, bytes], ...]:
    return ((TYPE_HEADER, kind.encode()),)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
