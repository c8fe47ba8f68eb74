"""How Kafka is found, and that secrets stay secret."""

import pytest
from pydantic import SecretStr, ValidationError

from tidegate.eventlog.settings import KafkaSettings

HUSH = "s3cr3t-0f-k4fk4"


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BOOTSTRAP": "kafka-1:9093,kafka-2:9093",
        "TOPIC_PREFIX": "staging.",
        "SECURITY_PROTOCOL": "sasl_ssl",
        "SASL_MECHANISM": "SCRAM-SHA-512",
        "SASL_USERNAME": "scheduler",
        "SASL_PASSWORD": HUSH,
        "SSL_CA_LOCATION": "/certificates/ca.crt",
        "SESSION_TIMEOUT_MS": "20000",
    }.items():
        monkeypatch.setenv(f"TIDEGATE_KAFKA_{name}", value)

    settings = KafkaSettings()

    assert settings.topic_prefix == "staging."
    assert settings.session_timeout_ms == 20_000
    assert settings.client_config() == {
        "bootstrap.servers": "kafka-1:9093,kafka-2:9093",
        "client.id": "tidegate",
        "security.protocol": "sasl_ssl",
        "ssl.endpoint.identification.algorithm": "https",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "scheduler",
        "sasl.password": HUSH,
        "ssl.ca.location": "/certificates/ca.crt",
    }


def test_by_default_a_local_broker_is_used_and_nothing_else_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDEGATE_KAFKA_BOOTSTRAP", raising=False)

    assert KafkaSettings().client_config() == {
        "bootstrap.servers": "127.0.0.1:9092",
        "client.id": "tidegate",
        "security.protocol": "plaintext",
    }


def test_secrets_are_not_shown() -> None:
    hush = SecretStr(HUSH)
    settings = KafkaSettings(sasl_password=hush, sasl_oauthbearer_client_secret=hush, ssl_key_password=hush)

    assert HUSH not in repr(settings)
    assert HUSH not in str(settings.model_dump())
    assert HUSH not in settings.model_dump_json()


def test_a_prefix_that_is_no_topic_name_is_refused() -> None:
    with pytest.raises(ValidationError):
        KafkaSettings(topic_prefix="a/b")


@pytest.mark.parametrize(
    ("session_timeout_ms", "heartbeat_ms"), [(1_000, 100), (6_000, 600), (10_000, 1_000), (45_000, 1_000)]
)
def test_a_session_has_room_for_several_heartbeats(session_timeout_ms: int, heartbeat_ms: int) -> None:
    assert KafkaSettings(session_timeout_ms=session_timeout_ms).heartbeat_interval_ms == heartbeat_ms
