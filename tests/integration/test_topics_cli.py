"""`tidegate topics` against a real Kafka."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import Result
from confluent_kafka.cimpl import NewTopic
from typer.testing import CliRunner

from tidegate import codec
from tidegate.cli.topics import app
from tidegate.eventlog.kafka import KafkaBroker
from tidegate.eventlog.schemas import load_schemas, publish_schemas
from tidegate.eventlog.settings import KafkaSettings
from tidegate.topics.access import used_by
from tidegate.topics.apply import apply as apply_topics
from tidegate.topics.apply import check_at_start
from tidegate.topics.declaration import SERVICES, load_topics, read_topic_files
from tidegate.topics.settings import TopicsSettings

Run = Callable[..., Result]


@pytest.fixture
def broker(bootstrap: str, topic_prefix: str) -> Iterator[KafkaBroker]:
    """The session's Kafka as seen with this test's prefix: empty."""
    made = KafkaBroker(KafkaSettings(bootstrap=bootstrap, topic_prefix=topic_prefix))
    yield made
    made.close()


@pytest.fixture
def run(bootstrap: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `tidegate topics ...` with that Kafka and prefix."""
    for name in TopicsSettings.model_fields:
        monkeypatch.delenv(f"TIDEGATE_TOPICS_{name.upper()}", raising=False)
    monkeypatch.setenv("TIDEGATE_KAFKA_BOOTSTRAP", bootstrap)
    monkeypatch.setenv("TIDEGATE_KAFKA_TOPIC_PREFIX", topic_prefix)
    return lambda *arguments, **env: CliRunner().invoke(app, arguments, env=env)


def make(broker: KafkaBroker, name: str, partitions: int, config: dict[str, str]) -> None:
    """Create a topic as somebody else might have."""
    new = NewTopic(broker.physical_name(name), partitions, 1, config=config)
    broker.admin_client().create_topics([new])[broker.physical_name(name)].result(30)


def existing(broker: KafkaBroker) -> set[str]:
    """Return those of the declared topics that exist."""
    return set(broker.describe([topic.name for topic in load_topics()]))


DECLARED = {topic.name: topic for topic in load_topics(settings=TopicsSettings())}


@pytest.mark.feature("K1")
def test_apply_creates_what_is_missing_and_publishes_the_schemas(run: Run, broker: KafkaBroker) -> None:
    result = run("diff")
    assert result.exit_code == 1
    assert "missing" in result.stdout

    result = run("apply", "--json", "--queue", "default", "--queue", "gpu")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)
    assert set(done["created"]) == {*DECLARED, "step-tasks.gpu"}
    assert set(done["schemas_published"]) >= set(codec.schema_texts())
    assert done["warnings"] == done["altered"] == []
    assert "created run-events (partitions: 8)" in result.stderr

    found = broker.describe(["run-events", "step-tasks.gpu"])
    assert found["run-events"].partition_count == 8
    for name, value in DECLARED["run-events"].config.items():
        assert found["run-events"].config[name] == value
    assert found["step-tasks.gpu"].partition_count == 4

    assert run("diff").exit_code == 0
    again = json.loads(run("apply", "--json").stdout)
    assert again == {"created": [], "altered": [], "acls_set": [], "schemas_published": [], "warnings": []}
    check_at_start(broker, ["run-events", "run-commands", "schemas"], production=False)
    assert load_schemas(broker) == []
    assert publish_schemas(broker) == []


def test_a_changed_partition_count_is_refused_and_nothing_happens(run: Run, broker: KafkaBroker) -> None:
    make(broker, "run-events", 3, dict(DECLARED["run-events"].config))
    result = run("apply")
    assert result.exit_code == 1
    assert "run-events: partition count is 3, declared is 8" in result.stderr
    assert "TIDEGATE_TOPICS_PARTITIONS_RUN=3" in result.stderr
    assert "no topic that exists was changed" in result.stderr
    assert existing(broker) == {"run-events"}
    assert broker.describe(["run-events"])["run-events"].partition_count == 3

    # What the advice says works.
    assert run("apply", TIDEGATE_TOPICS_PARTITIONS_RUN="3").exit_code == 0
    assert broker.describe(["run-commands"])["run-commands"].partition_count == 3


def test_missing_compaction_is_refused_until_altering_is_asked_for(run: Run, broker: KafkaBroker) -> None:
    make(broker, "gate-ledger", 4, {"max.message.bytes": "16777216", "segment.ms": "123456789"})
    result = run("apply")
    assert result.exit_code == 1
    assert "gate-ledger: cleanup.policy is delete, declared is compact" in result.stderr
    assert "--alter-config gate-ledger:cleanup.policy" in result.stderr
    assert existing(broker) == {"gate-ledger"}
    # Another entry does not help.
    assert run("apply", "--alter-config", "gate-ledger:max.message.bytes").exit_code == 1
    assert existing(broker) == {"gate-ledger"}

    result = run("apply", "--json", "--alter-config", "gate-ledger:cleanup.policy")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["altered"] == ["gate-ledger:cleanup.policy"]
    assert "altered gate-ledger: cleanup.policy from delete to compact" in result.stderr
    config = broker.describe(["gate-ledger"])["gate-ledger"].config
    assert config["cleanup.policy"] == "compact"
    assert config["segment.ms"] == "123456789", "nothing else may change"


def test_a_key_alone_alters_it_in_all_topics(run: Run, broker: KafkaBroker) -> None:
    for name in ("run-commands", "step-results"):
        make(broker, name, 8, {**DECLARED[name].config, "retention.ms": "1000"})
    result = run("apply", "--json")
    assert result.exit_code == 0, result.output
    told = [(warning["topic"], warning["what"]) for warning in json.loads(result.stdout)["warnings"]]
    assert told == [("run-commands", "retention.ms"), ("step-results", "retention.ms")]
    assert "warning: run-commands: retention.ms is 1000" in result.stderr
    assert broker.describe(["run-commands"])["run-commands"].config["retention.ms"] == "1000"

    assert run("apply", "--alter-config", "retention.ms").exit_code == 0
    assert run("diff", "--json").stdout.strip() == "[]"


@pytest.mark.feature("K2")
def test_production_refuses_what_could_lose_records(run: Run, broker: KafkaBroker) -> None:
    # One broker cannot hold three copies: Kafka refuses, and is asked before anything is created.
    result = run("apply", "--production")
    assert result.exit_code == 3
    assert "INVALID_REPLICATION_FACTOR" in result.stderr
    assert existing(broker) == set()

    assert run("apply").exit_code == 0
    assert run("diff").exit_code == 0
    result = run("diff", "--json", TIDEGATE_TOPICS_PRODUCTION="true")
    assert result.exit_code == 1
    differences = json.loads(result.stdout)
    assert {difference["severity"] for difference in differences} == {"error"}
    assert {difference["what"] for difference in differences} == {"replication factor", "min.insync.replicas"}
    assert run("apply", "--production").exit_code == 1


def test_an_unclean_election_is_warned_of_in_development(run: Run, broker: KafkaBroker) -> None:
    make(broker, "run-events", 8, {**DECLARED["run-events"].config, "unclean.leader.election.enable": "true"})
    result = run("apply", "--json")
    assert result.exit_code == 0, result.output
    (warning,) = json.loads(result.stdout)["warnings"]
    assert (warning["topic"], warning["what"]) == ("run-events", "unclean.leader.election.enable")


def test_several_may_apply_at_once(broker: KafkaBroker) -> None:
    declared = load_topics(settings=TopicsSettings())

    def apply_and_publish(_: int) -> list[str]:
        done = apply_topics(broker, declared)
        publish_schemas(broker)
        return done.created

    with ThreadPoolExecutor(4) as pool:
        created = [name for names in pool.map(apply_and_publish, range(4)) for name in names]
    assert sorted(created) == sorted(DECLARED), "every topic is created once"


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["apply", "--alter-config", "retention.sm"], {}, "not declared for any topic: retention.sm"),
        (["list"], {"TIDEGATE_TOPICS_PARTITIONS_RUN": "none"}, "TIDEGATE_TOPICS_PARTITIONS_RUN: "),
        (["list"], {"TIDEGATE_TOPICS_MIN_INSYNC_REPLICAS": "2"}, "nothing could be written"),
        (["list", "--queue", "a b"], {}, "not names of queues"),
        (["diff"], {"TIDEGATE_KAFKA_SECURITY_PROTOCOL": "tls"}, "TIDEGATE_KAFKA_SECURITY_PROTOCOL: "),
        (["destroy"], {}, "destroy"),
    ],
)
def test_wrong_usage(arguments: list[str], env: dict[str, str], words: str) -> None:
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_list_needs_no_kafka() -> None:
    result = CliRunner().invoke(
        app, ["list", "--json", "--queue", "gpu"], env={"TIDEGATE_KAFKA_BOOTSTRAP": "127.0.0.1:1"}
    )
    assert result.exit_code == 0
    listed = {topic["name"]: topic for topic in json.loads(result.stdout)}
    assert listed["run-events"]["partition_count"] == 8
    assert listed["step-tasks.gpu"]["writers"] == ["gate"]
    assert "run-events" in CliRunner().invoke(app, ["list"]).stdout


def test_generated_files_are_up_to_date() -> None:
    result = CliRunner().invoke(app, ["docs", "--check"])
    assert (result.exit_code, result.stdout) == (0, "")


# --- services at their start ------------------------------------------------------------------------------------------

# Of each service a topic that it writes, and one that it reads: some of them are nobody else's.
OF_A_SERVICE = {
    "scheduler": ("run-snapshots", "run-requests"),
    "gate": ("gate-leases", "policies"),
    "executor": ("step-results", "step-tasks.default"),
    "projection": ("dead-letters", "gate-ledger"),
    "gateway": ("gateway-runs", "run-events"),
}


def refusals(bootstrap: str, prefix: str, data_dir: Path, **env: str) -> dict[str, str]:
    """Start every service as a process; return what each says last. All of them must end, and not with success."""

    def ended(service: str) -> str:
        arguments = ["--app", "tidegate.demo.app:app"] if service == "executor" else []
        variables = {
            "TIDEGATE_KAFKA_BOOTSTRAP": bootstrap,
            "TIDEGATE_KAFKA_TOPIC_PREFIX": prefix,
            "TIDEGATE_DATA_DIR": str(data_dir / service),
            "TIDEGATE_GATEWAY_PORT": "0",
            **env,
        }
        done = subprocess.run(
            [sys.executable, "-m", f"tidegate.{service}", *arguments],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode not in {0, 2}, done.stderr
        (said, *_) = [line["error"] for line in map(json.loads, done.stderr.splitlines()) if "error" in line]
        return str(said)

    with ThreadPoolExecutor() as pool:
        return dict(zip(SERVICES, pool.map(ended, SERVICES), strict=True))


@pytest.mark.feature("K2")
def test_in_production_no_service_uses_topics_that_could_lose_records(
    run: Run, bootstrap: str, topic_prefix: str, tmp_path: Path
) -> None:
    """This broker is alone: nothing that it acknowledges is on a second one."""
    assert run("apply").exit_code == 0
    files = read_topic_files()
    for service, said in refusals(bootstrap, topic_prefix, tmp_path, TIDEGATE_TOPICS_PRODUCTION="true").items():
        lines = said.splitlines()
        for what in ("replication factor is 1, declared is 3", "min.insync.replicas is 1, declared is 2"):
            refused = {line.partition(":")[0] for line in lines if what in line}
            assert refused == set(used_by(service, files, "default" if service == "executor" else None)), said


@pytest.mark.parametrize("number", [0, 1])
def test_no_service_uses_a_topic_that_forgets_what_it_holds(
    number: int, bootstrap: str, topic_prefix: str, broker: KafkaBroker, run: Run, tmp_path: Path
) -> None:
    """Not even in development: what a service writes or reads would be deleted by time."""
    files = read_topic_files()
    wrong = {topics[number] for topics in OF_A_SERVICE.values()}
    for name in wrong:
        make(
            broker, name, DECLARED[name].partition_count, {"cleanup.policy": "delete", "max.message.bytes": "16777216"}
        )
    assert run("apply").exit_code == 1
    for name in DECLARED.keys() - wrong:
        make(broker, name, DECLARED[name].partition_count, dict(DECLARED[name].config))
    for service, said in refusals(bootstrap, topic_prefix, tmp_path).items():
        refused = {line.partition(":")[0] for line in said.splitlines()}
        assert refused == wrong & set(used_by(service, files, "default" if service == "executor" else None))
        assert OF_A_SERVICE[service][number] in refused
