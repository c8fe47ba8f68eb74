"""A whole Tidegate on a Kafka that lets in only whom it knows: a user per service, ACLs from the declared topics.

The broker speaks SASL/SCRAM and TLS and has Kafka's own authorizer; what is denied here is denied by it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka import TopicPartition as KafkaPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from support import fault_app
from support.stack import APP, eventually
from tidegate.embedded.kafka import EmbeddedKafka
from tidegate.embedded.secure import ADMIN, set_password
from tidegate.embedded.stack import ExecutorPool, Stack
from tidegate.eventlog.settings import READERS_GROUP, KafkaSettings
from tidegate.sdk.client import Client
from tidegate.topics.access import ROLES, Grant, Principals, grants
from tidegate.topics.acls import set_grants
from tidegate.topics.declaration import load_topics
from tidegate.topics.settings import TopicsSettings

pytestmark = pytest.mark.feature("K2")

WAIT_S: Final = 180.0
RUN_S: Final = 90.0
WITH_CERTIFICATE: Final = "gate"  # the others have passwords
NOT_TRUSTED: Final = "certificate verify failed"
SERVICES: Final = ("scheduler", "gate", "projection", "gateway")
DENIED: Final = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,  # what a producer that may write nothing at all is told
}

# As docs/deploy.md tells whoever wants the job to set the ACLs.
TO_SET_ACLS: Final = [
    (
        ResourceType.BROKER,
        "kafka-cluster",
        ResourcePatternType.LITERAL,
        "User:tidegate-topics",
        "*",
        operation,
        AclPermissionType.ALLOW,
    )
    for operation in (AclOperation.ALTER, AclOperation.DESCRIBE)
]


class SecureKafka:
    """The broker, its users, and how each of them is let in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = EmbeddedKafka(folder / "kafka", profile="quick", heap_mb=256, secure=True)
        self.passwords = {role: f"{role}-hunter2-{number}" for number, role in enumerate(ROLES)}
        self.mounted = folder / "mounted"

    def start(self) -> None:
        self.broker.start()
        self.mount_certificates()
        for role in ROLES:
            self.write_password(role)
            self.tell_password(role)

    def replace_authority(self) -> None:
        """Start the broker anew with certificates that nobody has seen, and let it trust nobody who has the old ones."""
        shutil.rmtree(self.broker.certificates.ca.parent)
        self.broker.restart()

    def mount_certificates(self) -> None:
        """Put the certificates of now where processes read them, as Kubernetes does with a changed secret."""
        self.mounted.mkdir(exist_ok=True)
        issued = self.broker.certificates.issue(f"tidegate-{WITH_CERTIFICATE}")
        for file in (issued.ca, issued.certificate, issued.key):
            shutil.copy(file, self.mounted)

    def write_password(self, role: str) -> None:
        """Put a role's password where its processes read it."""
        (self.folder / f"{role}.password").write_text(f"{self.passwords[role]}\n", encoding="utf-8")

    def tell_password(self, role: str) -> None:
        """Let the broker know a role's password."""
        set_password(self.admin_client(), f"tidegate-{role}", self.passwords[role])

    def admin_client(self) -> AdminClient:
        certificate = self.broker.certificates.issue(ADMIN)
        return AdminClient({"bootstrap.servers": self.broker.certificate_bootstrap, **certificate.config()})

    def settings(self, role: str) -> KafkaSettings:
        """Return how a role is let in: with its password from a file, or with a certificate."""
        return KafkaSettings(
            **{name.removeprefix("TIDEGATE_KAFKA_").lower(): value for name, value in self.env(role).items()}  # type: ignore[arg-type]
        )

    def env(self, role: str) -> dict[str, str]:
        if role in {ADMIN, WITH_CERTIFICATE}:
            name = role if role == ADMIN else f"tidegate-{role}"
            issued = self.broker.certificates.issue(name)
            folder = issued.ca.parent if role == ADMIN else self.mounted
            return {
                "TIDEGATE_KAFKA_BOOTSTRAP": self.broker.certificate_bootstrap,
                "TIDEGATE_KAFKA_SECURITY_PROTOCOL": "ssl",
                "TIDEGATE_KAFKA_SSL_CA_LOCATION": str(folder / issued.ca.name),
                "TIDEGATE_KAFKA_SSL_CERTIFICATE_LOCATION": str(folder / issued.certificate.name),
                "TIDEGATE_KAFKA_SSL_KEY_LOCATION": str(folder / issued.key.name),
            }
        return {
            "TIDEGATE_KAFKA_BOOTSTRAP": self.broker.bootstrap,
            "TIDEGATE_KAFKA_SECURITY_PROTOCOL": "sasl_ssl",
            "TIDEGATE_KAFKA_SSL_CA_LOCATION": str(self.mounted / self.broker.certificates.ca.name),
            "TIDEGATE_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "TIDEGATE_KAFKA_SASL_USERNAME": f"tidegate-{role}",
            "TIDEGATE_KAFKA_SASL_PASSWORD_FILE": str(self.folder / f"{role}.password"),
        }

    def cli(self, role: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tidegate.cli", *arguments]
        environment = {**os.environ, **self.env(role)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureKafka]:
    """The broker with its users, topics and ACLs, made as an operator makes them."""
    kafka = SecureKafka(tmp_path_factory.mktemp("secure"))
    kafka.start()
    try:
        # The user of the chart's job has been given two rights, once; all that it needs besides it gives to itself.
        refused = kafka.cli("topics", "topics", "apply", "--acls")
        assert refused.returncode == 3, refused.stdout
        admin = kafka.admin_client()
        for made in admin.create_acls([AclBinding(*right) for right in TO_SET_ACLS]).values():
            made.result(WAIT_S)
        applied = kafka.cli("topics", "topics", "apply", "--acls")
        assert applied.returncode == 0, applied.stderr
        for gone in admin.delete_acls([AclBindingFilter(*right) for right in TO_SET_ACLS]).values():
            gone.result(WAIT_S)
        yield kafka
    finally:
        kafka.broker.stop()


@pytest.fixture(scope="module")
def stack(secure: SecureKafka) -> Iterator[Stack]:
    """Every service as a process with the credentials of its role."""
    faults = secure.folder / "faults"
    faults.mkdir()
    pool = ExecutorPool(APP, slots=8, env={"TIDEGATE_FAULT_DIR": str(faults), **secure.env("executor")})
    process_env = {f"{service}-0": secure.env(service) for service in SERVICES}
    with Stack(
        secure.folder / "data",
        pools=[pool],
        services=SERVICES,
        kafka=secure.settings(ADMIN),
        process_env=process_env,
        profile="quick",
    ) as whole:
        yield whole


def addresses(stack: Stack, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stack.data_dir / name).read_text(encoding="utf-8"))
    return found


def rows(secure: SecureKafka, stack: Stack) -> str:
    """Return what the projection says of runs; nothing while it does not answer."""
    try:
        url = addresses(stack, "sql.json")["url"]
    except (OSError, ValueError):
        return ""
    return secure.cli("cli", "sql", "--url", url, "select run_id from runs").stdout


def test_a_run_goes_from_a_users_request_to_the_rows_with_a_user_per_service(secure: SecureKafka, stack: Stack) -> None:
    with Client(secure.settings("cli"), by="operator") as operator:
        operator.publish(fault_app.app)
    with Client(secure.settings("user"), by="customer") as customer:
        run = customer.start("wait_here", 0.01, run_id="allowed")
        assert customer.wait(run, timeout_s=RUN_S).status == "succeeded"

    eventually(lambda: "allowed" in rows(secure, stack), "the projection's row of the run")
    shown = secure.cli("cli", "verify")
    assert shown.returncode == 0, shown.stderr
    # Nobody asks for what it may not have: an operator who looks for denials finds those that mean something.
    answers = secure.broker.log_path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in answers if "Denied" in line and READERS_GROUP in line]


def test_who_is_not_declared_may_not_write_or_read(secure: SecureKafka) -> None:
    topics = load_topics(["default"], TopicsSettings())
    wanted = grants(topics, Principals())
    for role in ROLES:
        mine = [grant for grant in wanted if grant.principal == f"User:tidegate-{role}" and grant.resource == "topic"]
        may = {(grant.name, grant.operation) for grant in mine}
        not_written = [topic.name for topic in topics if (topic.name, "Write") not in may]
        not_read = [topic.name for topic in topics if (topic.name, "Read") not in may]
        assert write_errors(secure.settings(role), not_written) == dict.fromkeys(not_written, "denied"), role
        assert read_errors(secure.settings(role), not_read) == dict.fromkeys(not_read, "denied"), role
    # The same once more in words, should the declarations themselves be wrong one day.
    assert {"step-tasks.default", "run-events", "gate-ledger"} <= set(
        write_errors(secure.settings("executor"), ["step-tasks.default", "run-events", "gate-ledger"])
    )
    only_gate = {grant.principal for grant in wanted if grant.operation == "Write" and is_gates(grant)}
    assert only_gate == {"User:tidegate-gate"}


def is_gates(grant: Grant) -> bool:
    return grant.name in {"gate-ledger", "gate-decisions", "gate-snapshots"} or grant.name.startswith("step-tasks.")


def write_errors(settings: KafkaSettings, topics: list[str]) -> dict[str, str]:
    """Try to write a record to each topic; return what the broker answered."""
    answers: dict[str, str] = {}
    producer = Producer({**settings.client_config(), "enable.idempotence": False, "log_level": 0})

    def note(error: KafkaError | None, message: Any) -> None:
        refused = error is not None and error.code() in DENIED
        answers[message.topic()] = "denied" if refused else f"{error}"

    for topic in topics:
        producer.produce(topic, b"x", b"x", partition=0, on_delivery=note)
    producer.flush(WAIT_S)
    return answers


def read_errors(settings: KafkaSettings, topics: list[str]) -> dict[str, str]:
    """Try to read each topic from its beginning; return what the broker answered."""
    answers: dict[str, str] = {}
    config = {**settings.client_config(), "group.id": "nobody", "auto.offset.reset": "earliest", "log_level": 0}
    consumer = Consumer(config)
    for topic in topics:
        described = consumer.list_topics(topic, timeout=RUN_S).topics[topic].error
        if described is not None:  # may not even know of it, and then the client does not try
            answers[topic] = "denied" if described.code() in DENIED else f"{described}"
            continue
        consumer.assign([KafkaPartition(topic, 0, 0)])
        deadline = time.monotonic() + RUN_S
        while topic not in answers and time.monotonic() < deadline:
            message = consumer.poll(0.05)
            error = None if message is None else message.error()
            if message is not None and (error is None or message.topic() == topic):
                answers[topic] = "denied" if error is not None and error.code() in DENIED else f"{error}"
    consumer.close()
    return answers


def test_strangers_are_not_let_in(secure: SecureKafka) -> None:
    user = secure.settings("user").client_config()
    no_certificate = {"bootstrap.servers": secure.broker.certificate_bootstrap, "security.protocol": "ssl"}
    for config in (
        user | {"sasl.password": "wrong"},
        user | {"sasl.username": "nobody"},
        user | {"security.protocol": "sasl_plaintext"},
        no_certificate | {"ssl.ca.location": str(secure.broker.certificates.ca)},
    ):
        with pytest.raises(KafkaException):
            AdminClient({**config, "log_level": 0}).list_topics(timeout=1)
    # Who has a certificate that nothing was granted to is let in, and sees nothing.
    stranger = secure.broker.certificates.issue("stranger").config()
    config = {"bootstrap.servers": secure.broker.certificate_bootstrap, **stranger}
    assert AdminClient(config).list_topics(timeout=RUN_S).topics == {}


def test_the_acls_are_compared_and_who_else_may_write_is_noticed(secure: SecureKafka) -> None:
    said = secure.cli(ADMIN, "topics", "diff", "--acls")
    assert said.returncode == 0, said.stdout + said.stderr
    assert "nobody else may change a topic" in said.stdout
    backdoor = Grant("User:mallory", "topic", "step-", "prefixed", "Write")
    set_grants(secure.admin_client(), [backdoor], [])
    said = secure.cli(ADMIN, "topics", "diff", "--acls")
    assert said.returncode == 1
    assert "User:mallory may Write topic step-*" in said.stderr
    # Who may not see ACLs is told what to ask for.
    said = secure.cli("topics", "topics", "diff", "--acls")
    assert said.returncode == 3
    assert "Describe (to see) and Alter (to set) on the cluster" in said.stderr


def test_passwords_are_replaced_without_losing_a_run(secure: SecureKafka, stack: Stack) -> None:
    names = ("scheduler-0", "projection-0", "gateway-0")
    assert [times_ready(stack, name) for name in names] == [1, 1, 1]
    with Client(secure.settings("user"), by="customer") as customer:
        before = customer.start("wait_here", 2.0, run_id="over-the-change")
        entered = secure.folder / "faults/entered.log"
        eventually(lambda: entered.exists() and "over-the-change" in entered.read_text("utf-8"), "the run's step")
        for role in ("scheduler", "executor", "projection", "gateway"):
            secure.passwords[role] += "-new"
            secure.tell_password(role)
        # Every connection ends: whoever comes back has to say who it is, and has the old password still.
        secure.broker.restart()
        eventually(lambda: refused(stack, names), "somebody who is refused with the old password")
        for role in ("scheduler", "executor", "projection", "gateway"):
            secure.write_password(role)
        assert customer.wait(before, timeout_s=WAIT_S).status == "succeeded"
        after = customer.start("wait_here", 0.01, run_id="after-the-change")
        assert customer.wait(after, timeout_s=WAIT_S).status == "succeeded"
    # Nobody restarted them: who is refused and finds another password begins again with it.
    for name in names:
        eventually(lambda name=name: times_ready(stack, name) > 1, f"{name} with its new password")
    eventually(lambda: "after-the-change" in rows(secure, stack), "the projection's row of the run")


def test_certificates_are_replaced_without_losing_a_run(secure: SecureKafka, stack: Stack) -> None:
    """The worst case: another authority, and nobody trusts both for a while."""
    names = ("scheduler-0", "gate-0", "projection-0", "gateway-0")
    before = {name: times_ready(stack, name) for name in names}
    with Client(secure.settings("user"), by="customer") as customer:
        customer.start("wait_here", 2.0, run_id="over-the-certificates")
        entered = secure.folder / "faults/entered.log"
        eventually(lambda: "over-the-certificates" in entered.read_text("utf-8"), "the run's step")
        secure.replace_authority()
        eventually(
            lambda: all(says(stack, name, NOT_TRUSTED) for name in names), "services that do not trust the broker"
        )
        assert {name: times_ready(stack, name) for name in names} == before, "a refusal alone ends nobody"
        secure.mount_certificates()
        assert customer.wait("over-the-certificates", timeout_s=WAIT_S).status == "succeeded"
    with Client(secure.settings("user"), by="customer") as customer:
        after = customer.start("wait_here", 0.01, run_id="after-the-certificates")
        assert customer.wait(after, timeout_s=WAIT_S).status == "succeeded"
    for name in names:
        eventually(lambda name=name: times_ready(stack, name) > before[name], f"{name} with its new certificate")
    eventually(lambda: "after-the-certificates" in rows(secure, stack), "the projection's row of the run")


def says(stack: Stack, name: str, text: str) -> bool:
    return text in stack.log_path(name).read_text(encoding="utf-8")


def times_ready(stack: Stack, name: str) -> int:
    return stack.log_path(name).read_text(encoding="utf-8").count('"event": "ready"')


def refused(stack: Stack, names: tuple[str, ...]) -> bool:
    return any(says(stack, name, "uthentication failed") for name in names)


def test_secrets_are_nowhere_but_in_their_files(secure: SecureKafka, stack: Stack) -> None:
    """Runs last: the logs then tell of refusals, restarts and a changed password."""
    secrets = {password.removesuffix("-new") for password in secure.passwords.values()}
    seen: Mapping[str, str] = {
        **{f"log {path.name}": path.read_text(errors="replace") for path in (stack.data_dir / "logs").iterdir()},
        **{f"command of {p.pid}": " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)},
        **{f"environment of {p.pid}": str(p.environ()) for p in psutil.Process().children(recursive=True)},
        **{
            path.name: path.read_text(errors="replace")
            for path in secure.broker.data_dir.iterdir()
            if path.is_file() and path.suffix in {".log", ".out", ".properties"}
        },
    }
    assert len(seen) > 12
    found = {name for name, text in seen.items() for secret in secrets if secret in text}
    assert not found
    keys = [path for path in (secure.broker.data_dir / "certificates").iterdir() if path.suffix in {".key", ".pem"}]
    assert keys
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys)
