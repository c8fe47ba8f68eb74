"""Declared topics: the files are checked, what differs is judged, schemas are published once."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidegate import codec
from tidegate.codec import avro
from tidegate.eventlog.interface import EventLogError, Record, TopicDescription
from tidegate.eventlog.memory import MemoryBroker
from tidegate.eventlog.schemas import SCHEMAS_TOPIC, load_schemas, publish_schemas
from tidegate.topics.apply import TopicsError, check_at_start, diff
from tidegate.topics.comparison import compare, group_problems
from tidegate.topics.declaration import DeclarationError, Topic, load_topics, read_topic_files
from tidegate.topics.documentation import topics_page
from tidegate.topics.settings import TopicsSettings

ROOT = Path(__file__).resolve().parents[2]

MAILBOX: dict[str, Any] = {
    "name": "letters",
    "description": "Letters.",
    "key": "id",
    "partition_by": "run",
    "partition_group": "run",
    "writers": ["gate"],
    "readers": ["scheduler"],
    "value": ["RunCommand"],
    "kind": "mailbox",
    "config": {"cleanup.policy": "compact,delete", "retention.ms": "1000", "min.compaction.lag.ms": "1000"},
}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TopicsSettings.model_fields:
        monkeypatch.delenv(f"TIDEGATE_TOPICS_{name.upper()}", raising=False)


def declare(folder: Path, **changes: Any) -> Path:
    """Write a file of a good mailbox with some changes; None removes a field."""
    fields = {name: value for name, value in {**MAILBOX, **changes}.items() if value is not None}
    path = folder / f"{str(fields.get('name', 'letters')).partition('.')[0]}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(DeclarationError) as caught:
        read_topic_files(folder)
    return caught.value.problems


# --- declarations -----------------------------------------------------------------------------------------------------


def test_shipped_declarations_are_good() -> None:
    topics = {topic.name: topic for topic in load_topics()}
    assert {topic.partition_count for topic in topics.values() if topic.file.partition_group == "table"} == {1}
    assert topics["run-events"].partition_count == topics["run-commands"].partition_count == 8
    assert topics["gate-ledger"].partition_count == topics["gate-requests"].partition_count == 4
    # What the protocol rests on: the logs are never deleted by time, and hold entries of any allowed size.
    for name in ("run-events", "gate-ledger"):
        assert topics[name].config["cleanup.policy"] == "compact"
        assert topics[name].config["max.message.bytes"] == "16777216"
        assert topics[name].config["unclean.leader.election.enable"] == "false"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "heap"}, "kind"),
        ({"description": ""}, "description"),
        ({"partition_group": "runs"}, "partition_group"),
        ({"writers": []}, "writers"),
        ({"owner": "me"}, "owner"),
        ({"key": None}, "key"),
        ({"config": {**MAILBOX["config"], "retention.ms": 1000}}, "config.retention.ms"),
        (
            {"config": {**MAILBOX["config"], "retention.sm": "1"}},
            "config: retention.sm is not one that may be declared",
        ),
        ({"config": {**MAILBOX["config"], "min.insync.replicas": "2"}}, "config: min.insync.replicas is not one"),
        ({"config": {"cleanup.policy": "compact"}}, "config: cleanup.policy of a mailbox must be compact,delete"),
        ({"config": {**MAILBOX["config"], "min.compaction.lag.ms": "999"}}, "must not vanish because of another"),
        ({"kind": "log"}, "config: cleanup.policy of a log must be compact, not 'compact,delete'"),
        (
            {"kind": "log", "config": {"cleanup.policy": "compact", "retention.ms": "1"}},
            "a log is never deleted by time",
        ),
        ({"partition_group": "table"}, "the partition group table is for global tables"),
        ({"partition_group": "tasks"}, "have {queue} in their name"),
        ({"name": "letters.{queue}"}, "have {queue} in their name"),
        ({"name": "Letters"}, "name"),
        ({"name": "letters.{tenant}"}, "name"),
        ({"value": ["Letter"]}, "there is no schema of a record named Letter"),
    ],
    ids=str,
)
def test_slips_in_a_file_are_found(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    path = declare(tmp_path, **changes)
    found = problems_of(tmp_path)
    assert len(found) >= 1
    assert all(line.startswith(f"{path.name}: ") for line in found)
    assert any(problem in line for line in found), found


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    declare(tmp_path, name="a", kind="heap", readers=[])
    declare(tmp_path, name="b", value=["Letter"], config={"cleanup.policy": "compact", "x": "y"})
    (tmp_path / "c.yaml").write_text("{")
    (tmp_path / "d.yaml").write_text("- 1\n")
    declare(tmp_path, name="e").rename(tmp_path / "f.yaml")
    found = problems_of(tmp_path)
    assert {line.partition(":")[0] for line in found} == {"a.yaml", "b.yaml", "c.yaml", "d.yaml", "f.yaml"}
    assert len(found) >= 8
    assert all("\n" not in line for line in found)


def test_an_empty_folder_is_a_problem(tmp_path: Path) -> None:
    assert "no topics are declared" in problems_of(tmp_path)[0]


def test_the_template_is_instantiated_per_queue() -> None:
    names = [topic.name for topic in load_topics(queues=["default", "gpu", "default"])]
    assert [name for name in names if name.startswith("step-tasks")] == ["step-tasks.default", "step-tasks.gpu"]
    settings = TopicsSettings(queues="a, b")
    assert "step-tasks.b" in [topic.name for topic in load_topics(settings=settings)]


@pytest.mark.feature("K4")
def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_TOPICS_PARTITIONS_RUN", "32")
    monkeypatch.setenv("TIDEGATE_TOPICS_QUEUES", "gpu")
    monkeypatch.setenv("TIDEGATE_TOPICS_PRODUCTION", "true")
    topics = {topic.name: topic for topic in load_topics()}
    assert topics["run-events"].partition_count == topics["step-results"].partition_count == 32
    assert topics["gate-ledger"].partition_count == 4
    assert "step-tasks.gpu" in topics
    assert {topic.replication_factor for topic in topics.values()} == {3}
    assert {topic.config["min.insync.replicas"] for topic in topics.values()} == {"2"}


@pytest.mark.parametrize(
    ("settings", "replicas"),
    [
        ({}, (1, 1)),
        ({"production": True}, (3, 2)),
        ({"production": True, "replication_factor": 5}, (5, 2)),
        ({"replication_factor": 3, "min_insync_replicas": 2}, (3, 2)),
    ],
)
def test_replicas(settings: dict[str, Any], replicas: tuple[int, int]) -> None:
    assert TopicsSettings(**settings).replicas() == replicas


@pytest.mark.parametrize(
    "settings",
    [
        {"min_insync_replicas": 2},
        {"production": True, "replication_factor": 1},
        {"production": True, "min_insync_replicas": 1},
    ],
)
def test_contradicting_replicas_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TIDEGATE_TOPICS_MIN_INSYNC_REPLICAS"):
        load_topics(settings=TopicsSettings(**settings))


@pytest.mark.parametrize("queues", ["", "a,", "a b", "a/b", "x" * 65])
def test_names_of_queues_are_checked(queues: str) -> None:
    with pytest.raises(ValueError, match="not names of queues"):
        TopicsSettings(queues=queues)


def test_tables_cannot_be_spread() -> None:
    with pytest.raises(ValueError, match="partitions_table"):
        TopicsSettings(partitions_table=2)


def test_docs_page_is_up_to_date() -> None:
    page = (ROOT / "docs/topics.md").read_text(encoding="utf-8")
    assert page == topics_page(read_topic_files()), "run `tidegate topics docs`"


# --- comparison -------------------------------------------------------------------------------------------------------


def topic(name: str = "run-events", *, production: bool = True) -> Topic:
    settings = TopicsSettings(production=production)
    return next(topic for topic in load_topics(settings=settings) if topic.name == name)


def description(of: Topic, **changes: Any) -> TopicDescription:
    """Return the description of a topic that is as declared, with some changes; a config value None removes the entry."""
    config = {**of.config, **changes.pop("config", {})}
    found = TopicDescription(
        name=of.name,
        topic_id="id",
        partition_count=of.partition_count,
        replication_factor=of.replication_factor,
        config={name: value for name, value in config.items() if value is not None},
    )
    return found._replace(**changes)


def test_a_topic_as_declared_has_no_differences() -> None:
    for declared in load_topics(settings=TopicsSettings(production=True)):
        assert compare(declared, description(declared), production=True) == []
        # Kafka's own default, which it tells too.
        assert compare(declared, description(declared, config={"retention.bytes": "-1"}), production=True) == []


@pytest.mark.parametrize(
    ("name", "changes", "what", "severity", "in_development"),
    [
        ("run-events", {"partition_count": 4}, "partition count", "error", "error"),
        ("run-events", {"replication_factor": 2}, "replication factor", "error", "warning"),
        ("run-events", {"config": {"min.insync.replicas": "1"}}, "min.insync.replicas", "error", "warning"),
        ("run-events", {"config": {"min.insync.replicas": "4"}}, "min.insync.replicas", "error", "error"),
        (
            "run-events",
            {"config": {"unclean.leader.election.enable": "true"}},
            "unclean.leader.election.enable",
            "error",
            "warning",
        ),
        ("run-events", {"config": {"cleanup.policy": "delete"}}, "cleanup.policy", "error", "error"),
        ("run-events", {"config": {"cleanup.policy": None}}, "cleanup.policy", "error", "error"),
        ("run-events", {"config": {"cleanup.policy": "compact,delete"}}, "cleanup.policy", "error", "error"),
        ("run-commands", {"config": {"cleanup.policy": "delete"}}, "cleanup.policy", "error", "error"),
        ("run-commands", {"config": {"cleanup.policy": "compact"}}, "cleanup.policy", "warning", "warning"),
        ("run-commands", {"config": {"retention.ms": "1000"}}, "retention.ms", "error", "warning"),
        ("run-commands", {"config": {"retention.ms": "-1"}}, "retention.ms", "warning", "warning"),
        ("run-commands", {"config": {"retention.ms": "9999999999"}}, "retention.ms", "warning", "warning"),
        ("run-commands", {"config": {"min.compaction.lag.ms": "0"}}, "min.compaction.lag.ms", "error", "warning"),
        ("run-commands", {"config": {"retention.bytes": "1000000"}}, "retention.bytes", "error", "warning"),
        ("run-events", {"config": {"max.message.bytes": "1048588"}}, "max.message.bytes", "error", "error"),
        ("run-events", {"config": {"max.message.bytes": "99999999"}}, "max.message.bytes", "warning", "warning"),
    ],
)
def test_differences_are_judged(
    name: str, changes: dict[str, Any], what: str, severity: str, in_development: str
) -> None:
    declared = topic(name)
    for production, expected in ((True, severity), (False, in_development)):
        (difference,) = compare(declared, description(declared, **dict(changes)), production=production)
        assert (difference.topic, difference.what, difference.severity) == (name, what, expected)
        assert difference.advice
        assert difference.declared in str(difference)
        assert difference.found in str(difference)


def test_order_of_policies_and_more_replicas_than_asked_for_are_no_differences() -> None:
    declared = topic("run-commands")
    found = description(declared, replication_factor=5, config={"cleanup.policy": "delete,compact"})
    assert compare(declared, found, production=True) == []


def test_a_stricter_min_isr_is_no_difference() -> None:
    declared = topic()
    assert compare(declared, description(declared, config={"min.insync.replicas": "3"}), production=True) == []


def test_a_missing_topic_is_one_error() -> None:
    (difference,) = compare(topic(), None, production=False)
    assert difference.is_missing
    assert "tidegate topics apply" in str(difference)


def test_groups_must_agree() -> None:
    events, commands, ledger = topic("run-events"), topic("run-commands"), topic("gate-ledger")
    found = {t.name: description(t, partition_count=6) for t in (events, commands, ledger)}
    assert group_problems([events, commands, ledger], found) == []
    found["run-commands"] = description(commands, partition_count=7)
    (problem,) = group_problems([events, commands, ledger], found)
    assert "group run" in problem
    assert "run-commands has 7, run-events has 6" in problem


def test_tables_must_have_one_partition() -> None:
    instances = topic("instances")
    (problem,) = group_problems([instances], {"instances": description(instances, partition_count=2)})
    assert "instances has 2" in problem


# --- on a broker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def broker() -> MemoryBroker:
    """A broker that has all declared topics."""
    made = MemoryBroker()
    for declared in load_topics():
        made.create_topic(declared.name, declared.partition_count, declared.config)
    return made


def test_diff_covers_all_topics(broker: MemoryBroker) -> None:
    assert diff(broker, load_topics()) == []
    broker.delete_topic("workflows")
    broker.delete_topic("run-events")
    broker.create_topic("run-events", 3, topic(production=False).config)
    found = {(difference.topic, difference.what) for difference in diff(broker, load_topics())}
    assert found == {("workflows", "missing"), ("run-events", "partition count")}


def test_start_check_accepts_what_is_there(broker: MemoryBroker) -> None:
    check_at_start(broker, ["run-events", "run-commands", "workflows", "step-tasks.default"], production=False)


def test_start_check_takes_partition_counts_as_they_are_but_groups_must_agree() -> None:
    broker = MemoryBroker()
    for name in ("run-events", "run-commands"):
        broker.create_topic(name, 2, topic(name, production=False).config)
    check_at_start(broker, ["run-events", "run-commands"], production=False)
    broker.create_topic("step-results", 3, topic("step-results", production=False).config)
    with pytest.raises(TopicsError, match="same number of partitions"):
        check_at_start(broker, ["run-events", "run-commands", "step-results"], production=False)


def test_start_check_tells_all_problems_at_once(broker: MemoryBroker) -> None:
    broker.delete_topic("workflows")
    broker.delete_topic("run-events")
    broker.create_topic("run-events", 8, {"cleanup.policy": "delete", "max.message.bytes": "1000"})
    with pytest.raises(TopicsError) as caught:
        check_at_start(broker, ["workflows", "run-events", "run-commands"], production=False)
    assert isinstance(caught.value, EventLogError)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["run-events", "run-events", "workflows"]


def test_start_check_in_production_refuses_what_could_lose_records(broker: MemoryBroker) -> None:
    with pytest.raises(TopicsError) as caught:
        check_at_start(broker, ["run-events"], production=True)
    told = "\n".join(caught.value.problems)
    assert "replication factor is 1, declared is 3" in told
    assert "min.insync.replicas is 1, declared is 2" in told


def test_start_check_refuses_names_that_nobody_declared(broker: MemoryBroker) -> None:
    with pytest.raises(TopicsError, match="run-event: no such topic is declared"):
        check_at_start(broker, ["run-event"], production=False)


# --- schemas ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _own_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    codec.schema_texts()
    monkeypatch.setattr(avro, "_by_header", dict(avro._by_header))


def send(broker: MemoryBroker, key: str, text: str | None) -> None:
    writer = broker.writer()
    writer.send(Record(SCHEMAS_TOPIC, 0, key.encode(), None if text is None else text.encode()))
    writer.flush(1)


def test_schemas_are_published_once(broker: MemoryBroker) -> None:
    assert publish_schemas(broker) == sorted(codec.schema_texts())
    end = broker.offsets(SCHEMAS_TOPIC, 0).end
    assert publish_schemas(broker) == []
    assert broker.offsets(SCHEMAS_TOPIC, 0).end == end
    for message in broker.read(SCHEMAS_TOPIC, 0, 0, end):
        assert message.key is not None
        assert message.value is not None
        assert codec.schema_texts()[message.key.decode()] == message.value.decode()
        assert message.headers == (("type", b"Schema"),)


def test_a_schema_that_was_removed_is_published_again(broker: MemoryBroker) -> None:
    publish_schemas(broker)
    name = min(codec.schema_texts())
    send(broker, name, None)
    assert publish_schemas(broker) == [name]


@pytest.mark.usefixtures("_own_schemas")
def test_schemas_of_other_versions_are_loaded_and_bad_ones_left_out(broker: MemoryBroker) -> None:
    publish_schemas(broker)
    other = json.dumps({"type": "record", "name": "RunRequest", "fields": [{"name": "run_id", "type": "string"}]})
    name = avro._Schema(other).header[2:].hex()
    send(broker, "0" * 16, "{")
    send(broker, name, other)
    send(broker, "1" * 16, '{"type": "record", "name": "Stranger", "fields": []}')
    data = b"\xc3\x01" + bytes.fromhex(name) + b"\x06r-1"
    with pytest.raises(codec.UnknownSchemaError):
        codec.decode(data)
    assert load_schemas(broker) == [name]
    assert codec.decode(data).run_id == "r-1"
    assert load_schemas(broker) == []
