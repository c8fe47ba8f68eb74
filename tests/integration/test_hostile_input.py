"""Hostile records in every topic of a whole system: nobody ends, nothing is blocked, everything is accounted for.

What is not tried here, because the design leaves it to Kafka's ACLs, is named in docs/reliability/hostile-input.md. The same
strategies are tried on far more examples in tests/unit/test_hostile_owners.py and test_hostile_readers.py.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import hostile
from support.foreign_producer import ForeignProducer
from support.hostile import Known, fuzzed
from support.stack import WholeStack, eventually
from tidegate import codec
from tidegate.domain.entry import Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import Control, PolicyPublished, StepTask
from tidegate.embedded import sql
from tidegate.eventlog.interface import Record
from tidegate.sdk.client import Client

SERVICES = ("scheduler", "gate", "projection", "gateway")
MAILBOXES = ("run-commands", "gate-requests", "gate-decisions", "step-results")
BATCH = 40
EXECUTOR = "executor-default-0"
STALE = Position(0, 0, 0)  # what a log begins with is told to nobody
KNOWN = Known(
    {
        "run_id": ("victim-0", "victim-1", "nobody"),
        "account": ("default", "acme/x"),
        "step_id": ("one", "it"),
        "attempt": (1,),
        "instance_id": (EXECUTOR,),
        "incarnation": (0, 10**6),
        **dict.fromkeys(("GateRequest.source", "GateDecision.source", "StepTask.source"), (STALE,)),
        "RunCommand.source": ("run-requests:0:0",),
        "RunCommand.type": ("start", "cancel", "approve", "refuse"),
        "RunRequest.type": ("start", "cancel"),
        "RunRequest.workflow": ("chain", "checked"),
        "RunRequest.agent": (None,),
        "outcome": ("succeeded", "failed", "busy"),
        "kind": ("step",),
        "function": ("one",),
        "queue": ("default",),
        "arguments": ("1",),
        "input": ("1",),
        "definition": ("{}",),
        "timeout_ms": (100,),
        "functions": ((),),
        "service": ("executor", "gate"),
        "Instance.state": ("ready", "gone"),
    }
)

pytestmark = pytest.mark.feature("G1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    """A system of its own: what is written into it stays in it."""
    with WholeStack(tmp_path_factory.mktemp("hostile"), services=SERVICES, slots=16) as stack:
        for number in range(2):
            stack.client.start("wait_here", 30.0, run_id=f"victim-{number}")
        yield stack


def is_left_to_acls(topic: str, value: bytes | None) -> bool:
    """Tell whether a record does what only ACLs can prevent: see the page."""
    try:
        record = codec.decode(value)
    except codec.DecodeError:
        return False
    source = getattr(record, "source", None)
    if isinstance(source, Position) and source != STALE:
        return topic in ("gate-requests", "gate-decisions") or isinstance(record, StepTask)
    if topic == "controls":
        return isinstance(record, Control)
    return topic == "policies" and isinstance(record, PolicyPublished)


@st.composite
def batches(draw: st.DrawFn, topic: str) -> list[tuple[bytes | None, bytes, hostile.Headers]]:
    """Return values, keys and headers for one topic."""
    ghosts = st.sampled_from((b"ghost-0", b"", b"\xff", b"g" * 300))
    found = []
    for _ in range(BATCH):
        value = draw(hostile.values(topic, KNOWN))
        key = draw(ghosts if topic == "instances" else hostile.keys())
        if not is_left_to_acls(topic, value):
            found.append((value, key, draw(hostile.headers())))
    return found


FAIL_CLOSED = ("policies", "controls")  # what is no row there may have denied something, or held it


def feed(whole: WholeStack, topic: str, batch: list[tuple[bytes | None, bytes, hostile.Headers]]) -> list[Record]:
    """Write a batch over all partitions of a topic; returns the records with their places as keys."""
    count = whole.broker.describe([topic])[topic].partition_count
    written = []
    for number, (value, key, headers) in enumerate(batch):
        source = whole.produce(topic, value, key=key, partition=number % count, headers=list(headers))
        written.append(Record(topic, number % count, source.encode(), value))
    return written


def assert_works(whole: WholeStack) -> None:
    """A run through every partition of every topic ends well, and the same processes live."""
    counts, found = whole.counts, {}
    run_partitions, inboxes, ledgers = counts["run-events"], counts["run-requests"], counts["gate-ledger"]
    for number in itertools.count():
        run_id, root = f"probe-{uuid.uuid4().hex[:8]}", f"acme{number}"
        place = partition_of(run_id, run_partitions), partition_of(root, ledgers)
        if place[0] not in [at[0] for at in found] or place[1] not in [at[1] for at in found]:
            found[place] = run_id
            whole.request(
                {"run_id": run_id, "workflow": "chain", "input": 1, "account": root}, partition=len(found) % inboxes
            )
        if {at[0] for at in found} == set(range(run_partitions)) and {at[1] for at in found} == set(range(ledgers)):
            break
    for run_id in found.values():
        assert whole.wait(run_id).output == {"n": 4}, f"{run_id} came to nothing"
    assert whole._pids() == whole.pids, f"processes came or went:\n{whole.log_tail()}"


def assert_accounted(whole: WholeStack, written: list[Record]) -> None:
    """Every record of a mailbox that is none of its kind is a dead letter with its bytes."""
    for record in written:
        if record.value is None or hostile.is_record_of(record.topic, record.value):
            continue
        letter = whole.letter(record.key.decode())
        assert letter.original == record.value[: len(letter.original)]
        assert letter.original_size == len(record.value)


@pytest.mark.parametrize("topic", MAILBOXES)
def test_hostile_records_in_a_mailbox(whole: WholeStack, topic: str) -> None:
    @given(batches(topic))
    @fuzzed(1)
    def attack(batch: Any) -> None:
        written = feed(whole, topic, batch)
        assert_works(whole)
        assert_accounted(whole, written)

    attack()


def test_hostile_requests(whole: WholeStack) -> None:
    @given(batches("run-requests"))
    @fuzzed(2)
    def attack(batch: Any) -> None:
        written = feed(whole, "run-requests", batch)
        assert_works(whole)
        for record in written:
            if record.value is not None and not hostile.is_record_of("run-requests", record.value):
                assert whole.letter(record.key.decode()).code in ("malformed", "invalid", "too_large")

    attack()


@pytest.mark.parametrize(
    "topic", ["instances", "policies", "controls", "workflows", "schemas", "dead-letters", "step-tasks.default"]
)
def test_hostile_records_in_the_other_topics(whole: WholeStack, topic: str) -> None:
    @given(batches(topic))
    @fuzzed(1)
    def attack(batch: Any) -> None:
        feed(whole, topic, batch)
        if topic in FAIL_CLOSED:
            take_away(whole, topic, {key for _, key, _ in batch})
        assert_works(whole)

    attack()


def take_away(whole: WholeStack, topic: str, keys: set[bytes]) -> None:
    """Remove the rows of these keys, and wait until nothing is denied or held because of them any more."""
    for key in sorted(keys):
        whole.produce(topic, None, key=key, partition=0)
    eventually(lambda: whole.client.run("chain", 1, timeout_s=180).status == "succeeded", "a run that is let through")


def test_headers_that_are_no_text_do_not_stop_admission(whole: WholeStack) -> None:
    """A C program's: the Python client cannot show them, and once failed at some later place."""
    with ForeignProducer(whole.stack.settings.bootstrap) as producer:
        for _ in range(50):
            producer.produce(b"run-requests", b"\xff\xfe not text", b"value")
            producer.produce(b"run-requests", b"null", None)
    end = whole.broker.offsets("run-requests", 0).end
    assert whole.letter(f"run-requests:0:{end - 1}").original == b"payload"
    assert_works(whole)


def test_records_of_the_greatest_size(whole: WholeStack) -> None:
    big = 2**24 - 1_000
    for topic in ("run-requests", *MAILBOXES):
        source = whole.produce(topic, b"\xc3\x01" + b"x" * (big - 2), partition=0)
        assert whole.letter(source).original_size == big
    assert_works(whole)


def test_a_schema_that_would_take_for_ever_is_not_taken(whole: WholeStack) -> None:
    """Whoever meets bytes of an unknown schema reads the schemas: what lies there must not stop him."""
    inner: Any = {"type": "record", "name": "X0", "fields": [{"name": "n", "type": "long"}]}
    for level in range(1, 60):
        fields = [{"name": "a", "type": inner}, {"name": "b", "type": f"X{level - 1}"}]
        inner = {"type": "record", "name": f"X{level}", "fields": fields}
    bomb = {"type": "record", "name": "StepResult", "namespace": "tidegate", "fields": [{"name": "z", "type": inner}]}
    whole.produce("schemas", json.dumps(bomb).encode(), key=b"0123456789abcdef", partition=0)
    unknown = b"\xc3\x01" + os.urandom(8) + b"body"
    sources = [whole.produce(topic, unknown, partition=0) for topic in ("run-requests", *MAILBOXES)]
    for source in sources:
        assert "unknown schema" in whole.letter(source).reason
    assert_works(whole)


def test_the_projection_has_taken_everything_in(whole: WholeStack) -> None:
    """After all of the above: every letter is a row, and every table can be read."""
    wanted = len(whole.letters())
    rows = eventually(
        lambda: (
            (found := sql.query(whole.stack.data_dir, "SELECT count() AS n FROM dead_letters"))
            and int(found[0]["n"]) >= wanted
            and found
        ),
        f"{wanted} dead letters in ClickHouse",
    )
    assert rows
    for table in ("runs", "steps", "attempts", "events", "ledger", "instances", "freshness"):
        assert int(sql.query(whole.stack.data_dir, f"SELECT count() AS n FROM {table}")[0]["n"])
        sql.query(whole.stack.data_dir, f"SELECT * FROM {table} LIMIT 1000")


def test_foreign_records_in_the_logs_stop_no_reader(whole: WholeStack) -> None:
    """The last one: owners refuse to go on with such a log (docs/status.md); who only reads goes on."""
    run_id = whole.client.start("chain", 1, run_id=f"before-{uuid.uuid4().hex[:6]}")
    assert whole.wait(run_id).output == {"n": 4}
    readers = {name: whole.pids[name] for name in ("projection-0", "gateway-0")}
    places = []
    for topic in ("run-events", "gate-ledger"):
        for partition in range(whole.counts[topic]):
            for value, headers in (
                (b"garbage", ()),
                (codec.encode(StepTask(**_TASK)), (("epoch", b"9" * 5_000),)),
                (b"\xc3\x01", (("epoch", b"99999999999"), ("type", b"OwnerAnnounced"))),
            ):
                places.append(whole.produce(topic, value, partition=partition, headers=list(headers)))
    unread = "SELECT count() AS n FROM unreadable WHERE topic IN ('run-events', 'gate-ledger')"
    eventually(
        lambda: int(sql.query(whole.stack.data_dir, unread)[0]["n"]) >= len(places),
        "the projection to have passed them",
    )
    assert {name: whole.stack.pid(name) for name in readers} == readers
    report = json.loads(whole.cli("verify", "--json", code=1).splitlines()[0])
    assert report["problem_count"] == len(places)
    with Client(whole.stack.settings) as client:
        assert client.get(run_id).output == {"n": 4}


_TASK: dict[str, Any] = {
    "type": "run",
    "run_id": "r",
    "step_id": "s",
    "attempt": 1,
    "account": "a",
    "instance_id": "i",
    "incarnation": 0,
    "source": STALE,
    "result_partition": 0,
    "idempotency_key": "k",
    "call": None,
}
