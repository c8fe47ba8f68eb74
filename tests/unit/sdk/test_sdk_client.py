"""The client on a log in memory; the test plays admission and the scheduler by writing what they would."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from support import newer
from tidegate import App, Client, Graph, GraphError, PublishConflictError, RunNotFinishedError, RunNotFoundError, codec
from tidegate.domain import canonical
from tidegate.domain import run_events as ev
from tidegate.domain.entry import Entry, OwnerAnnounced
from tidegate.domain.identity import entry_key, partition_of
from tidegate.domain.messages import Call, WorkflowPublished
from tidegate.domain.requests import StartRequest, parse_request
from tidegate.domain.workflow import validate_definition
from tidegate.eventlog.interface import Record, TopicPartition, WriteFailedError
from tidegate.eventlog.memory import MemoryBroker, MemoryInbox
from tidegate.sdk import judging
from tidegate.sdk.errors import NotJsonError
from tidegate.sdk.reading import GapError

PARTITIONS = 4


@pytest.fixture
def broker():
    broker = MemoryBroker()
    for name, count in (("run-requests", 2), ("run-events", PARTITIONS), ("workflows", 1), ("controls", 1)):
        broker.create_topic(name, count)
    return broker


@pytest.fixture
def client(broker):
    with Client(broker, by="ada") as client:
        yield client


class Log:
    """Writes a run's partition of `run-events`, as one owner after another would."""

    def __init__(self, broker: MemoryBroker, run_id: str) -> None:
        self.run_id = run_id
        self.partition = partition_of(run_id, PARTITIONS)
        self.broker = broker
        self.writer = broker.writer()
        self.seq = itertools.count(1)
        self.epoch = -1

    def end(self) -> int:
        return self.broker.offsets("run-events", self.partition).end

    def _write(self, key: str, value: bytes, kind: str, epoch: int) -> None:
        headers = (("type", kind.encode()), ("epoch", str(epoch).encode()))
        self.writer.send(Record("run-events", self.partition, key.encode(), value, headers))
        self.writer.flush(1)

    def announce(self) -> int:
        self.epoch = self.end()
        announced = OwnerAnnounced(
            log="run-events",
            partition=self.partition,
            epoch=-1,
            repeat=0,
            topic_id="t",
            partition_count=PARTITIONS,
            instance_id="s",
            at_ms=1,
        )
        self._write(f"owner:{self.epoch}", codec.encode(announced), "OwnerAnnounced", -1)
        return self.epoch

    def append(self, *events: object, epoch: int | None = None, first_seq: int | None = None, run_id: str = "") -> None:
        carried = self.epoch if epoch is None else epoch
        seqs = [next(self.seq) for _ in events] if first_seq is None else [first_seq]
        subject = run_id or self.run_id
        entry = Entry(
            subject=subject,
            account="acme/shop",
            first_seq=seqs[0],
            epoch=carried,
            now_ms=1000 + seqs[0],
            prev_hash=b"",
            inputs={},
            marks={},
            told=-1,
            tables={},
            cause="",
            events=events,
        )
        value = codec.encode_entry("RunEntry", entry)
        self._write(entry_key(subject, seqs[0], carried), value, "RunEntry", carried)


CALL = Call(
    kind="step", function="pay", queue="default", arguments='{"a":1}', timeout_ms=1, reserve_micros=5, idempotent=True
)
DEFINITION = {
    "name": "shop",
    "version": "1",
    "nodes": {"pay": {"kind": "step", "function": "pay"}},
    "edges": [],
    "functions": {"pay": {"kind": "step"}},
}


def started(run_id="run-1"):
    return (
        ev.RunStarted(
            command_id="c1",
            content_hash="h",
            source="s",
            workflow="shop@1",
            definition_hash="d",
            definition=canonical.dumps(DEFINITION),
            input="null",
            budget_micros=None,
            tags={},
        ),
        ev.StepReady(step_id="pay", node_id="pay", wave=0, call=CALL),
    )


ASKED = ev.ApprovalRequested(
    step_id="pay",
    attempt=1,
    why="policy",
    rule="big",
    policy="p",
    reason="more than 50",
    arguments_hash="h",
)


def resolved(command_id, approved=True):
    return ev.ApprovalResolved(
        command_id=command_id,
        step_id="pay",
        attempt=1,
        why="policy",
        approved=approved,
        by="ada",
        reason="",
        arguments_hash="h",
    )


DISPATCHED = ev.AttemptDispatched(
    step_id="pay", attempt=1, reserved_micros=5, rule="", policy="", instance_id="w", incarnation=3
)
DONE = (
    ev.StepSucceeded(
        step_id="pay",
        attempt=1,
        output='{"paid":true}',
        actual_micros=4,
        usage={},
        instance_id="w",
        incarnation=3,
        started_ms=1,
        finished_ms=2,
    ),
    ev.RunFinished(status="succeeded", output='{"paid":true}', code="", reason="", fingerprint="f"),
)


def requests_in(broker):
    found = []
    for partition in range(2):
        end = broker.offsets("run-requests", partition).end
        found += [(m.key, m.value) for m in broker.read("run-requests", partition, 0, end)]
    return found


# --- publishing ---


def shop(extra_step=False):
    app = App("shop")

    @app.step
    def pay(order): ...

    @app.agent
    def triage(state): ...

    if extra_step:
        app.step(name="more")(lambda x: None)
    graph = app.graph("buy").node("pay", pay)
    if extra_step:
        graph.node("more", "more")
    return app


def rows(broker):
    end = broker.offsets("workflows", 0).end
    return [codec.decode(m.value) for m in broker.read("workflows", 0, 0, end)]


@pytest.mark.feature("G1")
def test_publishing_an_app_publishes_graphs_and_agents_once(broker, client):
    labels = client.publish(shop())
    assert labels[0] == "buy@1"
    assert labels[1].startswith("agent:triage@")
    assert client.publish(shop()) == labels
    first, second = rows(broker)
    assert isinstance(first, WorkflowPublished)
    assert (first.name, first.version, first.by) == ("buy", "1", "ada")
    assert first.definition_hash == canonical.digest(first.definition)
    assert json.loads(second.definition)["nodes"] == {"triage": {"kind": "agent", "function": "triage"}}


@pytest.mark.feature("G1")
def test_a_published_version_never_changes(broker, client):
    client.publish(shop())
    with pytest.raises(PublishConflictError, match=r"buy@1\. Runs pin"):
        client.publish(shop(extra_step=True))
    assert len(rows(broker)) == 2


def test_publishing_an_older_version_again_makes_it_the_latest(broker, client):
    def version(number):
        return {**DEFINITION, "version": number}

    client.publish(version("1"))
    client.publish(version("2"))
    client.publish(version("2"))
    client.publish(version("1"))
    assert [row.version for row in rows(broker)] == ["1", "2", "1"]


def test_what_cannot_run_is_not_published(broker, client):
    with pytest.raises(GraphError, match="x@1 cannot run"):
        client.publish([DEFINITION, {**DEFINITION, "name": "x", "functions": {}}])
    with pytest.raises(GraphError, match="unknown function 'nobody'"):
        client.publish(Graph("y").node("a", "nobody"))
    with pytest.raises(GraphError, match=f"{DEFINITION['name']}@1 is there twice"):
        client.publish([DEFINITION, {**DEFINITION, "max_steps": 7}])  # either would do: no telling which was meant
    app = App("twice")
    for step in ("a", "b"):
        app.step(name=step)(lambda: None)
        app.graph("w").node(step, step)
    with pytest.raises(GraphError, match="w@1 is there twice"):
        client.publish(app)
    assert rows(broker) == []


@pytest.mark.feature("G1")
def test_what_was_judged_already_is_not_judged_again(broker, client, monkeypatch):
    asked = []

    def counting(definition, *more, **options):
        asked.append(definition["name"])
        return validate_definition(definition, *more, **options)

    monkeypatch.setattr(judging, "validate_definition", counting)
    found = judging.judged([DEFINITION])
    assert client.publish(found) == ["shop@1"]
    assert asked == ["shop"]


def test_a_graph_knows_its_app(broker, client):
    app = shop()
    assert client.publish(app.graphs[0]) == ["buy@1"]


# --- requests ---


@pytest.mark.feature("O4")
def test_start_writes_a_request_that_admission_understands(broker, client):
    run_id = client.start(
        "shop@1", {"at": (1, 2)}, run_id="run-1", account="acme/shop", budget_micros=7, tags={"team": "x"}
    )
    ((key, value),) = requests_in(broker)
    assert (run_id, key) == ("run-1", b"run-1")
    request = parse_request(value)
    assert isinstance(request, StartRequest)
    assert (request.workflow, request.agent, request.input) == ("shop@1", None, {"at": [1, 2]})
    assert (request.account, request.budget_micros, request.tags) == ("acme/shop", 7, {"team": "x"})


def test_start_of_an_agent_alone_and_of_a_graph(broker, client):
    first = client.start(agent="triage")
    second = client.start(Graph("buy", "3"))
    assert first != second
    wanted = {parse_request(value).run_id: parse_request(value) for _, value in requests_in(broker)}
    assert (wanted[first].agent, wanted[first].input) == ("triage", None)
    assert wanted[second].workflow == "buy@3"


def test_bad_starts_are_refused_before_anything_is_written(broker, client):
    for arguments, options in ((("a",), {"agent": "b"}), ((), {}), (("a",), {"run_id": "a/b"})):
        with pytest.raises(ValueError, match=r"run id|not both"):
            client.start(*arguments, **options)
    with pytest.raises(ValueError, match="input: set"):
        client.start("a", {1})
    assert requests_in(broker) == []


def test_answers_and_cancels(broker, client):
    client.approve("run-1", "pay", reason="fine")
    client.reject("run-1")
    client.cancel("run-1", reason="too late")
    requests = [parse_request(value) for _, value in requests_in(broker)]
    assert [(r.type, r.run_id, r.by, r.reason) for r in requests] == [
        ("approve", "run-1", "ada", "fine"),
        ("reject", "run-1", "ada", None),
        ("cancel", "run-1", "ada", "too late"),
    ]
    assert requests[0].step_id == "pay"
    assert len({r.command_id for r in requests}) == 3


@pytest.mark.feature("D3")
def test_answers_that_name_their_question_events_and_pauses(broker, client):
    client.approve("run-1", "pay", attempt=2, why="policy")
    client.respond("run-1", {"a": 1}, "ask", reason="so")
    client.respond("run-1", None)
    client.signal("run-1", "paid", [1], key="")
    client.signal("run-1", "paid")
    client.pause("run-1", reason="look")
    client.resume("run-1")
    requests = [parse_request(value).model_dump(exclude_none=True) for _, value in requests_in(broker)]
    assert [{k: v for k, v in r.items() if k not in {"command_id", "run_id", "by"}} for r in requests] == [
        {"type": "approve", "step_id": "pay", "attempt": 2, "why": "policy"},
        {"type": "respond", "step_id": "ask", "value": {"a": 1}, "reason": "so"},
        {"type": "respond"},
        {"type": "signal", "event": "paid", "key": "", "payload": [1]},
        {"type": "signal", "event": "paid"},
        {"type": "pause", "reason": "look"},
        {"type": "resume"},
    ]
    with pytest.raises(NotJsonError):
        client.respond("run-1", object())


@pytest.mark.feature("D4")
def test_queues_are_paused_by_rows_of_controls(broker, client):
    client.pause_queue("gpu", reason="hot")
    client.pause_queue("*")
    assert list(client.paused_queues()) == ["*", "gpu"]
    assert (client.paused_queues()["gpu"].by, client.paused_queues()["gpu"].reason) == ("ada", "hot")
    client.resume_queue("*")
    assert list(client.paused_queues()) == ["gpu"]
    with pytest.raises(ValueError, match="or \\* for everything"):
        client.pause_queue("no name")


WAIT = ev.WaitStarted(
    step_id="w", node_id="w", wave=0, kind="ask", input="null", prompt="Go?", choices=("yes",), timeout_at_ms=9
)


@pytest.mark.feature("D3")
def test_what_a_run_waits_for_is_shown_and_only_a_question_needs_a_human(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started(), msgspec.structs.replace(WAIT, step_id="e", kind="wait_event", event="paid", key="7"))
    with pytest.raises(RunNotFinishedError, match="it is waiting"):
        client.wait("run-1", 0.01)
    log.append(WAIT)
    run = client.wait("run-1", 1)
    assert run.needs_human
    assert [(w.step_id, w.kind, w.event, w.key, w.prompt, w.choices, w.timeout_at_ms) for w in run.waits] == [
        ("e", "wait_event", "paid", "7", "Go?", ("yes",), 9),
        ("w", "ask", "", "", "Go?", ("yes",), 9),
    ]
    client.respond("run-1", "yes", "w")
    with pytest.raises(RunNotFinishedError):
        client.wait("run-1", 0.01)  # answered, but nobody has read it yet
    (request,) = [parse_request(value) for _, value in requests_in(broker)]
    log.append(ev.WaitEnded(step_id="w", outcome="answered", command_id=request.command_id))
    assert client.answer("run-1", request.command_id, 1).type == "WaitEnded"
    log.append(ev.RunPaused(command_id="p", by="", reason=""))
    run = client.get("run-1")
    assert (run.needs_human, run.paused, [wait.step_id for wait in run.waits]) == (False, True, ["e"])


# --- reading ---


@pytest.mark.feature("O4")
def test_get_folds_the_run(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started())
    run = client.get("run-1")
    assert (run.status, run.workflow, run.account, run.seq) == ("running", "shop@1", "acme/shop", 2)
    log.append(ASKED)
    run = client.get("run-1")
    assert (run.status, run.needs_human, run.is_over) == ("waiting", True, False)
    (approval,) = run.approvals
    assert (approval.step_id, approval.function, approval.arguments) == ("pay", "pay", {"a": 1})
    assert (approval.why, approval.reason, approval.rule) == ("policy", "more than 50", "big")
    log.append(resolved("c2"))
    log.append(DISPATCHED)
    log.append(*DONE)
    run = client.get("run-1")
    assert (run.status, run.output, run.spent_micros, run.seq) == ("succeeded", {"paid": True}, 4, 7)
    assert (run.started_ms, run.finished_ms) == (1001, 1006)
    with pytest.raises(RunNotFoundError):
        client.get("run-2")


def test_runs_of_the_same_partition_with_similar_names_are_told_apart(broker, client):
    other = next(
        name for n in range(1000) if partition_of(name := f"run-1{n}", PARTITIONS) == partition_of("run-1", PARTITIONS)
    )
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started(), run_id=other, first_seq=1)
    with pytest.raises(RunNotFoundError):
        client.get("run-1")
    assert client.get(other).seq == 2


def test_entries_of_a_zombie_are_void(broker, client):
    log = Log(broker, "run-1")
    old = log.announce()
    log.append(*started())
    log.announce()
    log.append(ASKED, epoch=old, first_seq=3)  # the old owner had not noticed yet
    assert client.get("run-1").status == "running"
    log.append(ASKED)
    assert client.get("run-1").seq == 3
    assert [event.seq for event in client.events("run-1")] == [1, 2, 3]


def test_events(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started())
    log.append(DISPATCHED)
    assert [(e.seq, e.type) for e in client.events("run-1")] == [
        (1, "RunStarted"),
        (2, "StepReady"),
        (3, "AttemptDispatched"),
    ]
    following = client.events("run-1", follow=True)
    assert [next(following).seq for _ in range(3)] == [1, 2, 3]
    log.append(*DONE)
    assert [event.type for event in following] == ["StepSucceeded", "RunFinished"]
    with pytest.raises(RunNotFoundError):
        list(client.events("run-2"))


@pytest.mark.feature("O4")
def test_wait_returns_when_a_human_is_needed_and_not_again_for_what_was_answered(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    client.start("shop", run_id="run-1")
    with pytest.raises(RunNotFinishedError, match="the log has nothing of it"):
        client.wait("run-1", 0.01)
    log.append(*started())
    with pytest.raises(RunNotFinishedError, match="it is running"):
        client.wait("run-1", 0.01)
    log.append(ASKED)
    assert client.wait("run-1", 1).needs_human
    assert client.wait("run-1", 1).needs_human
    client.approve("run-1", "pay")
    with pytest.raises(RunNotFinishedError, match="it is waiting"):
        client.wait("run-1", 0.01)
    approvals = [r for _, v in requests_in(broker) if (r := parse_request(v)).type == "approve"]
    log.append(resolved(approvals[0].command_id))
    log.append(DISPATCHED)
    log.append(*DONE)
    assert client.wait("run-1", 1).status == "succeeded"


def test_a_refused_answer_makes_it_wait_for_another_one(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started(), ASKED)
    client.approve("run-1", "nonsense")
    (request,) = [parse_request(value) for _, value in requests_in(broker)]
    log.append(
        ev.CommandRefused(command_id=request.command_id, type="approve", source="s", code="c", reason="r", original=b"")
    )
    assert client.wait("run-1", 1).needs_human


def test_wait_tells_of_a_refused_start(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    client.start("nothing", run_id="run-1")
    log.append(
        ev.RunRefused(
            command_id="c", content_hash="h", source="s", code="unknown_workflow", reason="none", original=b""
        )
    )
    run = client.wait("run-1", 1)
    assert (run.status, run.code, run.reason, run.is_over) == ("refused", "unknown_workflow", "none", True)


@pytest.fixture
def reads(monkeypatch):
    """The positions from which inboxes of the broker in memory were told to read."""
    positions: list[int] = []
    original = MemoryInbox.add

    def add(self, partitions):
        positions.extend(partitions.values())
        original(self, partitions)

    monkeypatch.setattr(MemoryInbox, "add", add)
    return positions


REFUSED = ev.RunRefused(command_id="c", content_hash="h", source="s", code="", reason="", original=b"")


def test_runs_started_here_are_read_from_near_the_end_with_the_right_epoch(broker, client, reads):
    log = Log(broker, "run-1")
    old = log.announce()
    for number in range(3000):
        log.append(REFUSED, run_id=f"x{number}", first_seq=1)
    log.announce()
    run_id = client.start("shop", run_id="run-1")
    log.append(*started(), epoch=old, first_seq=1)  # void: its writer was replaced before the run was asked for
    with pytest.raises(RunNotFinishedError, match="nothing of it"):
        client.wait(run_id, 0.01)
    log.seq = itertools.count(1)
    log.append(*started())
    log.append(DISPATCHED, *DONE)
    assert client.wait(run_id, 1).status == "succeeded"
    assert client.get(run_id).seq == 5
    assert len(reads) == 1
    assert log.end() - 1200 < reads[0] < log.end() - 1000


def test_reading_goes_on_where_it_was(broker, client, reads):
    log = Log(broker, "run-0")
    log.announce()
    names = [name for n in range(1000) if partition_of(name := f"run-{n}", PARTITIONS) == log.partition][:20]
    for name in names:
        client.start("shop", run_id=name)
        log.append(*started(), run_id=name, first_seq=1)
        log.append(DISPATCHED, *DONE, run_id=name, first_seq=3)
        assert client.wait(name, 1).status == "succeeded"
    assert reads == [0]


def test_a_run_that_was_there_before_it_was_asked_for_is_found(broker, client, monkeypatch):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started())
    for number in range(1500):
        log.append(REFUSED, run_id=f"x{number}", first_seq=1)
    client.start("shop", run_id="run-1")  # the same once more: the scheduler says nothing
    monkeypatch.setattr("tidegate.sdk.client.GIVEN_ID_HISTORY_S", 0.05)
    log.append(DISPATCHED)
    with pytest.raises(RunNotFinishedError, match="it is running"):
        client.wait("run-1", 0.5)
    log.append(*DONE)
    assert client.wait("run-1", 1).status == "succeeded"
    with Client(broker) as other:
        other.start("shop", run_id="run-1")
        assert other.wait("run-1", 5).status == "succeeded"  # after a while without news
        assert other.wait("run-1", 1).seq == 5


def test_a_gap_in_the_log_is_not_passed_over(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started())
    log.append(DISPATCHED, first_seq=5)
    with pytest.raises(GapError, match="run run-1: event 5 follows 2"):
        client.get("run-1")
    with pytest.raises(GapError):
        client.wait("run-1", 1)


def test_threads_wait_for_each_their_own_run(broker, client):
    """One of them reads, the others get what is theirs."""
    log = Log(broker, "run-0")
    log.announce()
    names = [name for n in range(1000) if partition_of(name := f"run-{n}", PARTITIONS) == log.partition][:8]
    for name in names:
        client.start("shop", run_id=name)
    for name in reversed(names):
        log.append(*started(), run_id=name, first_seq=1)
        log.append(DISPATCHED, *DONE, run_id=name, first_seq=3)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(client.wait, name, 20) for name in names]
        assert [future.result(20).run_id for future in waiting] == names


def test_topic_partitions_are_those_of_the_log(broker, client):
    client.start("shop", run_id="run-1")
    assert broker.offsets(*TopicPartition("run-requests", partition_of("run-1", 2))).end == 1


@pytest.mark.feature("O4")
def test_a_question_that_was_answered_long_ago_is_not_put_again(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started(), ASKED)
    for number in range(1500):  # so much lies between that reading begins after the question
        log.append(REFUSED, run_id=f"x{number}", first_seq=1)
    log.append(resolved("c9"), DISPATCHED, *DONE)
    assert client.wait("run-1", 5).status == "succeeded"
    with Client(broker) as other:
        seen = list(other.follow("run-1", 5))
    assert [run.status for run, _ in seen] == ["succeeded"]
    assert [event.seq for _, events in seen for event in events] == list(range(1, 8))


@pytest.mark.feature("P4")
def test_the_answer_to_a_command_is_found_by_its_id(broker, client):
    log = Log(broker, "run-1")
    log.announce()
    log.append(*started(), ASKED)
    mine, other = client.approve("run-1"), client.cancel("run-1")
    with pytest.raises(RunNotFinishedError, match="not answered"):
        client.answer("run-1", mine, 0.01)
    log.append(resolved(mine))
    refused = ev.CommandRefused(command_id=other, type="cancel", source="s", code="no", reason="", original=b"")
    log.append(refused)
    assert client.answer("run-1", mine, 5).type == "ApprovalResolved"
    assert client.answer("run-1", other, 5).data == refused


def test_a_request_that_could_not_be_written_is_the_only_one_that_is_lost(broker, client):
    """A writer that failed is dead: a service that asks for runs would ask for none any more until it is started again."""
    with pytest.raises(WriteFailedError):
        client.start("shop", "x" * 17_000_000)
    broker.fail(client._writer, "nobody answered for 30 s")
    with pytest.raises(WriteFailedError, match="nobody answered"):
        client.start("shop", 1, run_id="first")

    assert client.start("shop", 1, run_id="first") == "first"
    nodes = {"a": {"kind": "sleep", "wait": {"seconds": 1}}}
    client.publish({"name": "g", "version": "1", "nodes": nodes, "edges": [], "functions": {}})
    client.pause_queue("default")
    assert [parse_request(value).run_id for _, value in requests_in(broker)] == ["first"]

    client.close()
    broker.fail(client._writer, "it is closed")
    for _ in range(2):
        with pytest.raises(WriteFailedError, match="it is closed"):
            client.start("shop", 1)


def test_the_log_of_a_newer_scheduler_is_read(broker, client, monkeypatch):
    """Clients are parts of others' programs: they are not upgraded with the scheduler."""
    broker.create_topic("schemas", 1)
    texts = []

    def encoded(kind, entry):
        text, value = newer.of_a_newer_version(entry, kind)
        texts.append(text)
        return value

    monkeypatch.setattr(codec, "encode_entry", encoded)
    with newer.own_schemas():
        log = Log(broker, "run-1")
        log.announce()
        log.append(*started())
        newer.publish(broker, texts[0])
        assert client.get("run-1").status == "running"
        assert [event.type for event in client.events("run-1")] == ["RunStarted", "StepReady"]
