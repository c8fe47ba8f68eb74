"""Rows of global tables that nobody can read, and of which Kafka has compacted the earlier ones away: nothing is let through that
they might have forbidden."""

from __future__ import annotations

from typing import Any

import pytest

from support.cluster import Cluster
from support.newer import of_a_newer_version, own_schemas, publish
from support.pure import Pair, chain
from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.messages import Control, PolicyPublished, WorkflowPublished
from tidegate.eventlog.interface import EventLogError, Message, Record
from tidegate.eventlog.schemas import looking_up
from tidegate.eventlog.tables import Tables, Unreadable, readable
from tidegate.scheduler.admission import PublishedWorkflows

GARBAGE = b"\x00 no record"
DENIES = {"policy": "p", "version": "1", "rules": [{"name": "no", "when": "true", "then": "deny"}]}
LETS_THROUGH = {"policy": "p", "version": "2", "rules": [{"name": "no", "when": "false", "then": "deny"}]}


def row_of(key: str, document: dict[str, Any]) -> bytes:
    row = PolicyPublished(policy_id=key, version="1", document=canonical.dumps(document), by="t", at_ms=0)
    return codec.encode(row)


def write(cluster: Cluster, topic: str, key: str, *values: bytes | None) -> None:
    for value in values:
        cluster.writer.send(Record(topic, 0, key.encode(), value))
    cluster.writer.flush(1.0)
    cluster.settle()


def restart(cluster: Cluster, topic: str) -> None:
    """Kafka compacts the topic, and both services start anew."""
    cluster.broker.compact(topic)
    for service in ("gate", "scheduler"):
        cluster.crash(service)
        cluster.start(service)
    cluster.settle()


def status(cluster: Cluster, run_id: str) -> tuple[str, str]:
    _, runs = cluster.verified()
    return runs[run_id].status, runs[run_id].reason


def start(cluster: Cluster, run_id: str) -> tuple[str, str]:
    cluster.start_run(run_id, "a")
    cluster.settle()
    return status(cluster, run_id)


@pytest.mark.feature("P1")
@pytest.mark.parametrize("key", ["p", "budget:b", "limit:l", "queue:default", "new-kind:x"])
def test_garbage_that_hides_a_document_denies_what_it_may_have_been_about(key: str) -> None:
    cluster = Cluster()
    write(cluster, "policies", key, row_of(key, DENIES), GARBAGE)
    restart(cluster, "policies")
    said, reason = start(cluster, "hidden")
    assert said == "failed"
    assert f"document {key!r} cannot be read by this gate" in reason
    offset = cluster.broker.offsets("policies", 0).end - 1
    assert f"policies-0@{offset}" in reason
    write(cluster, "policies", key, None)
    assert start(cluster, "removed")[0] == "succeeded"


@pytest.mark.feature("P1")
def test_a_document_that_is_applied_again_is_in_force_again() -> None:
    cluster = Cluster()
    write(cluster, "policies", "p", row_of("p", DENIES), GARBAGE)
    restart(cluster, "policies")
    write(cluster, "policies", "p", row_of("p", LETS_THROUGH))
    assert start(cluster, "again")[0] == "succeeded"


@pytest.mark.feature("P1")
def test_as_long_as_the_row_of_before_is_known_it_stays() -> None:
    cluster = Cluster()
    write(cluster, "policies", "p", row_of("p", LETS_THROUGH), GARBAGE)
    assert start(cluster, "known")[0] == "succeeded"


@pytest.mark.feature("P1")
@pytest.mark.parametrize(("missed", "said"), [(0, "succeeded"), (1, "failed")])
def test_a_gate_that_was_behind_does_not_take_an_older_row_for_the_one_of_before(missed: int, said: str) -> None:
    """What came between was compacted away, by the broken document, before the gate came to read it."""
    p = Pair(functions=("step:a",))
    for offset, document in ((0, LETS_THROUGH), (1 + missed, {"policy": "p", "rules": "none"})):
        p.gate.table_changed("policies", "p", codec.decode(row_of("p", document)), offset)
    p.start("r", chain("a"))
    p.work({"a": lambda value: value})
    assert p.run("r").status == said


@pytest.mark.feature("P1")
@pytest.mark.parametrize("key", ["queue:elsewhere", "topup:t", "no document's key", "p\n"])
def test_garbage_that_can_hide_no_rule_about_a_step_denies_nothing(key: str) -> None:
    cluster = Cluster()
    write(cluster, "policies", key, GARBAGE)
    restart(cluster, "policies")
    assert start(cluster, "free")[0] == "succeeded"


@pytest.mark.feature("D4")
@pytest.mark.parametrize("key", ["default", "*"])
def test_garbage_that_hides_a_pause_is_one_until_somebody_resumes(key: str) -> None:
    cluster = Cluster()
    paused = codec.encode(Control(queue=key, paused=True, by="t", reason="", at_ms=0))
    write(cluster, "controls", key, paused, GARBAGE)
    restart(cluster, "controls")
    assert start(cluster, "r")[0] == "running"
    write(cluster, "controls", key, codec.encode(Control(queue=key, paused=False, by="t", reason="", at_ms=0)))
    assert status(cluster, "r")[0] == "succeeded"


@pytest.mark.feature("G1")
def test_no_older_version_is_taken_for_a_workflow_that_garbage_hides() -> None:
    cluster = Cluster()
    rows = [
        WorkflowPublished(name="w", version=version, definition_hash="", definition="{}", by="", at_ms=0)
        for version in "12"
    ]
    for row in rows:
        write(cluster, "workflows", f"w@{row.version}", codec.encode(row))
    write(cluster, "workflows", "w@2", GARBAGE)
    cluster.broker.compact("workflows")
    published = PublishedWorkflows(cluster.broker)
    assert published.find("w@1") == rows[0]
    for wanted in ("w", "w@2"):
        found = published.find(wanted)
        assert isinstance(found, Unreadable)
        assert (found.topic, found.key, found.offset) == ("workflows", "w@2", 2)


@pytest.mark.feature("G1")
@pytest.mark.parametrize("is_known", [False, True])
def test_when_the_latest_version_is_removed_the_one_before_it_is_the_latest(is_known: bool) -> None:
    """So it is for whoever starts afterwards: two schedulers must not differ about what a name means."""
    cluster = Cluster()
    rows = [
        WorkflowPublished(name="w", version=version, definition_hash="", definition="{}", by="", at_ms=0)
        for version in "12"
    ]
    for row in rows:
        write(cluster, "workflows", f"w@{row.version}", codec.encode(row))
    published = PublishedWorkflows(cluster.broker)
    assert published.find("w") == rows[1]
    write(cluster, "workflows", "w@2", None)
    if is_known:
        published.follow(Message("run-requests", 0, 1, b"k", b"", (), 0))
    else:
        published = PublishedWorkflows(cluster.broker)
    assert published.find("w") == rows[0]
    write(cluster, "workflows", "w@1", None)
    published.follow(Message("run-requests", 0, 2, b"k", b"", (), 0))
    assert published.find("w") is None


@pytest.mark.feature("G1")
def test_a_name_means_what_was_published_before_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the consumer has not fetched it yet, which takes a few milliseconds."""
    cluster = Cluster()
    rows = [
        WorkflowPublished(name="w", version=version, definition_hash="", definition="{}", by="", at_ms=0)
        for version in "12"
    ]
    write(cluster, "workflows", "w@1", codec.encode(rows[0]))
    published = PublishedWorkflows(cluster.broker)
    monkeypatch.setattr(published._inbox, "poll", lambda *_: [])
    write(cluster, "workflows", "w@2", codec.encode(rows[1]))
    published.follow(Message("run-requests", 0, 1, b"k", b"", (), 0))
    assert published.find("w") == rows[1]


@pytest.mark.feature("K5")
def test_a_workflow_that_a_newer_version_publishes_meanwhile_is_known() -> None:
    cluster = Cluster()
    published = PublishedWorkflows(cluster.broker)
    text, value = of_a_newer_version(
        WorkflowPublished(name="w", version="1", definition_hash="", definition="{}", by="", at_ms=0)
    )
    with own_schemas():
        publish(cluster.broker, text)
        write(cluster, "workflows", "w@1", value)
        published.follow(Message("run-requests", 0, 1, b"k", b"", (), 0))
        assert isinstance(published.find("w"), WorkflowPublished)


def test_the_next_heartbeat_mends_an_instance_so_garbage_is_passed_over() -> None:
    cluster = Cluster()
    write(cluster, "instances", "ex-9", GARBAGE)
    tables = Tables(("instances",))
    tables.load(cluster.broker)
    assert "ex-9" not in tables.rows["instances"]


def test_a_row_that_cannot_be_read_says_where_it_is() -> None:
    cluster = Cluster()
    write(cluster, "policies", "p", GARBAGE)
    tables = Tables(("policies",))
    tables.load(cluster.broker)
    row = tables.rows["policies"]["p"]
    assert str(row).startswith("the record at policies-0@0, under the key 'p', cannot be read: ")
    assert readable(tables.rows["policies"]) == {}


@pytest.mark.feature("P1")
@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_row_of_before_is_none_if_a_later_one_may_have_been_compacted_away_unread(is_compacted: bool) -> None:
    cluster = Cluster()
    write(cluster, "policies", "p", row_of("p", LETS_THROUGH))
    tables = Tables(("policies",))
    tables.load(cluster.broker)
    write(cluster, "policies", "q", row_of("q", LETS_THROUGH))
    write(cluster, "policies", "p", row_of("p", DENIES), GARBAGE)
    if is_compacted:
        cluster.broker.compact("policies")
    tables.load(cluster.broker)
    row = tables.rows["policies"]["p"]
    assert isinstance(row, Unreadable) is is_compacted
    assert is_compacted or canonical.loads(row.document) == DENIES
    write(cluster, "policies", "p", row_of("p", LETS_THROUGH), GARBAGE)
    tables.load(cluster.broker)
    assert canonical.loads(tables.rows["policies"]["p"].document) == LETS_THROUGH, "nothing was missed since"


@pytest.mark.feature("K5")
def test_a_schema_that_could_not_be_looked_up_is_looked_up_again() -> None:
    cluster = Cluster()
    decode = looking_up(cluster.broker, codec.decode)
    text, value = of_a_newer_version(Control(queue="q", paused=True, by="t", reason="", at_ms=0))
    with own_schemas():
        publish(cluster.broker, text)
        cluster.broker.interrupt()
        with pytest.raises(EventLogError):
            decode(value)
        cluster.broker.restore()
        assert decode(value).queue == "q"
