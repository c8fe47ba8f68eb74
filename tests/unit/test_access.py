"""ACLs follow from the declared writers and readers, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from confluent_kafka import KafkaError, KafkaException
from pydantic import SecretStr, ValidationError
from typer.testing import CliRunner

from tidegate.cli.__main__ import app as cli
from tidegate.eventlog.kafka import renewal
from tidegate.eventlog.kafka.renewal import is_refusal
from tidegate.eventlog.settings import KafkaSettings, SecretFileError
from tidegate.health import Pulse
from tidegate.topics.access import GROUPS, ROLES, FoundGrant, Grant, Principals, compare, grants, used_by
from tidegate.topics.continuity import OWNED_LOGS
from tidegate.topics.declaration import SERVICES, Topic, load_topics, read_topic_files
from tidegate.topics.settings import TopicsSettings

pytestmark = pytest.mark.feature("K2")


@pytest.fixture
def topics() -> list[Topic]:
    return load_topics(["default", "gpu"], TopicsSettings())


def writers(wanted: list[Grant], topic: str) -> set[str]:
    return {g.principal for g in wanted if g.resource == "topic" and g.name == topic and g.operation == "Write"}


def found(wanted: list[Grant]) -> list[FoundGrant]:
    return [FoundGrant(*grant) for grant in wanted]


@pytest.mark.parametrize(
    ("topic", "writer"),
    [
        ("step-tasks.default", "gate"),
        ("step-tasks.gpu", "gate"),
        ("gate-ledger", "gate"),
        ("gate-decisions", "gate"),
        ("gate-snapshots", "gate"),
        ("run-events", "scheduler"),
        ("run-commands", "scheduler"),
        ("gate-requests", "scheduler"),
        ("run-snapshots", "scheduler"),
        ("step-results", "executor"),
        ("gateway-runs", "gateway"),
        ("gateway-figures", "gateway"),
    ],
)
def test_what_others_rest_on_has_one_writer(topics: list[Topic], topic: str, writer: str) -> None:
    assert writers(grants(topics, Principals()), topic) == {f"User:tidegate-{writer}"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_checks_what_it_may_use_and_may_see_the_settings_of_what_it_checks(
    service: str, topics: list[Topic]
) -> None:
    mine = [grant for grant in grants(topics, Principals()) if grant.principal == f"User:tidegate-{service}"]
    used = used_by(service, read_topic_files(), "gpu" if service == "executor" else None)
    written_or_read = {
        grant.name for grant in mine if grant.resource == "topic" and grant.operation in {"Read", "Write"}
    }
    other_queues = {"step-tasks.default", "step-tasks.gpu"} - set(used)
    assert set(used) == written_or_read - other_queues
    assert set(used) <= {grant.name for grant in mine if grant.operation == "DescribeConfigs"}
    assert ("step-tasks.gpu" in used) == (service == "executor")


def test_nobody_is_granted_everything_or_everybody(topics: list[Topic]) -> None:
    for grant in grants(topics, Principals()):
        assert grant.operation in {"Read", "Write", "DescribeConfigs", "Describe", "Create", "AlterConfigs"}
        assert grant.principal.startswith("User:tidegate-")
        assert grant.name not in {"", "*"}
        # A prefix that many groups share would let one service disturb another's.
        assert grant.pattern == "literal" or (grant.resource == "group" and grant.name.startswith("tidegate-"))


def test_groups_are_those_that_the_services_use() -> None:
    assert {log.group for log in OWNED_LOGS} == {GROUPS["scheduler"][0], GROUPS["gate"][0]}
    assert set(GROUPS) <= set(ROLES)


def test_every_name_has_the_prefix(topics: list[Topic]) -> None:
    assert all(grant.name.startswith("blue.") for grant in grants(topics, Principals(), "blue."))


def test_executors_of_a_queue_read_that_queue_alone(topics: list[Topic]) -> None:
    wanted = grants(topics, Principals(["executor@gpu=gpu-pool", "executor@default=cpu-pool"]))
    tasks = {(g.principal, g.name) for g in wanted if g.name.startswith("step-tasks.") and g.operation == "Read"}
    assert tasks == {("User:gpu-pool", "step-tasks.gpu"), ("User:cpu-pool", "step-tasks.default")}
    assert writers(wanted, "step-results") == {"User:gpu-pool", "User:cpu-pool"}


def test_a_role_may_have_several_principals_with_names_of_any_kind(topics: list[Topic]) -> None:
    wanted = grants(topics, Principals(["user=CN=orders,O=shop", "user=User:billing"]))
    assert {"User:CN=orders,O=shop", "User:billing"} <= writers(wanted, "run-requests")
    assert "User:tidegate-user" not in writers(wanted, "run-requests")


@pytest.mark.parametrize("text", ["gate", "gate=", "boss=x", "gate@default=x"])
def test_principals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition("=")[0]):
        Principals([text])


def test_what_is_missing_and_who_else_may_change_a_topic_is_found(topics: list[Topic]) -> None:
    wanted = grants(topics, Principals())
    assert compare(wanted, found(wanted)) == []
    lacking = wanted[:-1]
    assert [(p.kind, p.grant) for p in compare(wanted, found(lacking))] == [("missing", wanted[-1])]
    for extra in (
        FoundGrant("User:mallory", "topic", "step-tasks.default", "literal", "Write"),
        FoundGrant("User:mallory", "topic", "*", "literal", "All"),
        FoundGrant("User:*", "topic", "gate-", "prefixed", "Write"),
        FoundGrant("User:tidegate-executor", "topic", "run-", "prefixed", "Write"),
        FoundGrant("User:tidegate-user", "topic", "gate-ledger", "literal", "Delete"),
    ):
        assert [(p.kind, p.grant) for p in compare(wanted, [*found(wanted), extra])] == [("surplus", extra)], extra
    harmless = FoundGrant("User:auditor", "topic", "run-events", "literal", "Read")
    assert compare(wanted, [*found(wanted), harmless]) == []


def test_wider_grants_cover_narrower_ones(topics: list[Topic]) -> None:
    wanted = [g for g in grants(topics, Principals()) if g.resource == "group"]
    everything = [FoundGrant(g.principal, "group", "tidegate-", "prefixed", "All") for g in wanted]
    assert compare(wanted, everything) == []


def test_the_printed_forms_say_the_same() -> None:
    run = CliRunner()
    arguments = ["topics", "acls", "--principal", "gate=the gate's", "--queue", "default"]
    listed = json.loads(run.invoke(cli, [*arguments, "--format", "json"]).stdout)
    users = list(yaml.safe_load_all(run.invoke(cli, [*arguments, "--format", "strimzi"]).stdout))
    script = run.invoke(cli, [*arguments, "--format", "kafka"]).stdout
    of_users = {
        (f"User:{user['metadata']['name']}", acl["resource"]["name"], operation)
        for user in users
        for acl in user["spec"]["authorization"]["acls"]
        for operation in acl["operations"]
    }
    assert of_users == {(g["principal"], g["name"], g["operation"]) for g in listed}
    assert script.count("--operation") == len(listed)
    assert "'User:the gate'\\''s'" in script


# --- how a client is let in -----------------------------------------------------------------------------------------


def scram(**given: object) -> KafkaSettings:
    base = {"security_protocol": "sasl_ssl", "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "gate"}
    return KafkaSettings(**(base | given))  # type: ignore[arg-type]


def test_secrets_come_from_files_which_are_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    settings = scram(sasl_password_file=file)
    assert settings.client_config()["sasl.password"] == "hunter2"
    file.write_text("hunter3")
    assert settings.client_config()["sasl.password"] == "hunter3"
    assert "hunter" not in repr(settings)
    assert "hunter" not in repr(settings.credentials())


def test_a_replaced_certificate_or_key_is_noticed_and_never_shown(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("ca", "certificate", "key")}
    for name, file in files.items():
        file.write_text(f"{name} hunter2")
    locations = {f"ssl_{name}_location": str(file) for name, file in files.items()}
    settings = KafkaSettings(security_protocol="ssl", **locations)  # type: ignore[arg-type]
    assert settings.has_files
    seen = {settings.proofs()}
    for name, file in files.items():
        file.write_text(f"{name} hunter3")
        seen.add(settings.proofs())
    assert len(seen) == 4, "each of the three files counts"
    assert "hunter" not in repr(seen)
    folder = tmp_path / "authorities"
    folder.mkdir()
    of_folder = scram(sasl_password_file=files["ca"], ssl_ca_location=str(folder))
    before = of_folder.proofs()
    (folder / "another").write_text("ca")
    assert of_folder.proofs() != before
    files["key"].unlink()
    with pytest.raises(SecretFileError, match="key"):
        settings.proofs()
    # Who says nothing of certificates to nobody has none to be replaced.
    assert not KafkaSettings().has_files
    assert not KafkaSettings(ssl_ca_location=str(files["ca"])).has_files


@pytest.mark.parametrize(
    ("code", "said", "refused"),
    [
        (KafkaError._AUTHENTICATION, "Authentication failed: Invalid username or password", True),
        # As librdkafka 2.16 said it, when a broker's certificate, or ours, was signed by another authority, or had expired.
        (KafkaError._SSL, "SSL handshake failed: error:0A000086:SSL routines::certificate verify failed: broker", True),
        (KafkaError._TRANSPORT, "error:0A000086:SSL routines::certificate verify failed (after 2ms in state", True),
        (KafkaError._TRANSPORT, "error:0A000416:SSL routines::ssl/tls alert certificate unknown: SSL alert 46", True),
        # As it says it when a broker goes.
        (KafkaError._TRANSPORT, "Disconnected: SSL connection closed by peer (after 11210ms in state UP)", False),
        (KafkaError._TRANSPORT, "Connect to ipv4#127.0.0.1:9093 failed: Connection refused (after 0ms", False),
        (KafkaError._SSL, "SSL handshake failed: Disconnected: connecting to a PLAINTEXT broker listener?", False),
        (KafkaError._ALL_BROKERS_DOWN, "2/2 brokers are down", False),
        # As OpenSSL names what did not happen here.
        (KafkaError._TRANSPORT, "error:0A000418:SSL routines::tlsv1 alert unknown ca: SSL alert number 48", True),
        (KafkaError._SSL, "SSL handshake failed: error:0A000438:SSL routines::tlsv1 alert internal error", False),
    ],
)
def test_a_refusal_is_told_from_a_broker_that_is_away(code: int, said: str, refused: bool) -> None:
    assert is_refusal(KafkaError(code, said)) is refused


REFUSAL = KafkaError(KafkaError._AUTHENTICATION, "Authentication failed")


def test_a_refusal_counts_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a certificate that is renewed in time would end every process that was ever refused, and what executors run."""
    clock = [1000.0]
    monkeypatch.setattr(renewal.time, "monotonic", lambda: clock[0])
    password = tmp_path / "password"
    password.write_text("old")
    told: list[KafkaError] = []
    client = renewal.Renewal(scram(sasl_password_file=password), told.append)
    client(REFUSAL)  # as by brokers that have just begun and know nobody yet
    client.check()
    for _ in range(100):
        clock[0] += 10
        client.check()
    password.write_text("new")  # in time: nobody refuses the old one
    clock[0] += 10
    client(KafkaError(KafkaError._TRANSPORT, "Connection refused"))
    client.check()
    clock[0] += 10
    client(REFUSAL)
    pulse = Pulse()
    monkeypatch.setattr(renewal, "PULSE", pulse)
    with pytest.raises(KafkaException, match="the files hold others by now"):
        client.check()
    assert pulse.reasons_to_end == [renewal.REPLACED], "the other clients of the process are as outdated"
    assert len(told) == 3


def test_who_is_refused_again_and_again_sees_the_file_that_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(renewal.time, "monotonic", lambda: clock[0])
    password = tmp_path / "password"
    password.write_text("old")
    client = renewal.Renewal(scram(sasl_password_file=password), lambda _: None)
    for _ in range(1000):
        clock[0] += 5
        client(REFUSAL)
        client.check()
    password.write_text("new")
    clock[0] += 5
    with pytest.raises(KafkaException, match="the files hold others by now"):
        client.check()


def test_a_file_without_a_secret_is_named_and_its_content_is_not(tmp_path: Path) -> None:
    with pytest.raises(SecretFileError, match="nowhere"):
        scram(sasl_password_file=tmp_path / "nowhere").client_config()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SecretFileError, match="empty"):
        scram(sasl_password_file=tmp_path / "empty").client_config()
    (tmp_path / "binary").write_bytes(b"\xffhunter2")
    with pytest.raises(SecretFileError) as caught:
        scram(sasl_password_file=tmp_path / "binary").client_config()
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sasl_password": SecretStr("hunter2"), "sasl_password_file": Path("p")}, "both set"),
        ({}, "needs sasl_password"),
        ({"sasl_password": SecretStr("hunter2"), "sasl_mechanism": None}, "needs sasl_mechanism"),
        ({"sasl_password": SecretStr("hunter2"), "ssl_key_location": "k"}, "belong together"),
    ],
)
def test_settings_that_no_broker_could_accept_are_refused_without_showing_them(
    given: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_KAFKA_SASL_OAUTHBEARER_CLIENT_SECRET", "hunter4")
    with pytest.raises(ValidationError, match=said) as caught:
        scram(**given)
    assert "hunter" not in str(caught.value)
