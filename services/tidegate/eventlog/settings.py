"""Where Kafka is and how to be let in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, Literal, NamedTuple, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tidegate.eventlog.interface import EventLogError

HEARTBEATS_PER_SESSION = 10
# Clients that read by themselves name it, because the client library insists on a group, and ask who coordinates it. None joins.
READERS_GROUP: Final = "tidegate-readers"
SECRET_FILE_MAX_BYTES: Final = 64 * 1024


class Credentials(NamedTuple):
    """Who we are to the brokers, for PLAIN and SCRAM. Never printed: the password hides itself."""

    username: str
    password: SecretStr


class Proofs(NamedTuple):
    """What we show the brokers, and know them by: it differs when anything of that was replaced."""

    credentials: Credentials | None
    certificates: str  # digest of the authority's, of ours and of our key; empty if no file is named


class SecretFileError(EventLogError):
    """A file that is to hold a secret cannot be read or holds none; the message names the file, not what is in it."""


class KafkaSettings(BaseSettings):
    """The connection to Kafka, read from variables such as `TIDEGATE_KAFKA_BOOTSTRAP`.

    What the protocol rests on (acknowledgements, idempotence, no skipping) cannot be set: see `eventlog/kafka`.
    """

    model_config = SettingsConfigDict(
        env_prefix="TIDEGATE_KAFKA_", extra="ignore", frozen=True, hide_input_in_errors=True
    )

    bootstrap: str = Field(default="127.0.0.1:9092", description="Addresses of brokers, `host:port`, comma-separated.")
    topic_prefix: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]{0,100}$",
        description="Put before the name of every topic and group, so that several installations share one Kafka.",
    )
    client_id: str = Field(default="tidegate", description="Shown in the broker's logs, metrics and quotas.")
    security_protocol: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = Field(
        default="plaintext", description="How to talk to the brokers."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        default=None, description="How to authenticate when `security_protocol` is one of the `sasl_` ones."
    )
    sasl_username: str | None = Field(default=None, description="User name, for PLAIN and SCRAM.")
    sasl_username_file: Path | None = Field(default=None, description="File that holds the user name, instead of it.")
    sasl_password: SecretStr | None = Field(default=None, description="Password, for PLAIN and SCRAM.")
    sasl_password_file: Path | None = Field(
        default=None,
        description="File that holds the password, instead of it. Looked at again when the brokers refuse what it held: if "
        "it was replaced, the process ends, to be started with the new one.",
    )
    sasl_oauthbearer_token_endpoint_url: str | None = Field(
        default=None, description="Token endpoint, for OAUTHBEARER (OpenID Connect client credentials)."
    )
    sasl_oauthbearer_client_id: str | None = Field(default=None, description="Client id, for OAUTHBEARER.")
    sasl_oauthbearer_client_secret: SecretStr | None = Field(
        default=None, description="Client secret, for OAUTHBEARER."
    )
    sasl_oauthbearer_client_secret_file: Path | None = Field(
        default=None, description="File that holds the client secret, instead of it. Read when a client is made."
    )
    sasl_oauthbearer_scope: str | None = Field(default=None, description="Scope asked for, for OAUTHBEARER.")
    ssl_ca_location: str | None = Field(
        default=None,
        description="File or directory of the CA certificates that sign the brokers'; else the system's. Looked at again, as "
        "the next two are, when either side refuses the other's certificate: if one was replaced, the process ends, to be "
        "started with it.",
    )
    ssl_certificate_location: str | None = Field(default=None, description="File of the client's certificate (PEM).")
    ssl_key_location: str | None = Field(default=None, description="File of the client's private key (PEM).")
    ssl_key_password: SecretStr | None = Field(default=None, description="Passphrase of the private key.")
    ssl_key_password_file: Path | None = Field(
        default=None, description="File that holds the passphrase, instead of it. Read when a client is made."
    )
    ssl_endpoint_identification_algorithm: Literal["https", "none"] = Field(
        default="https", description="`none` accepts brokers whose certificate names another host."
    )
    session_timeout_ms: int = Field(
        default=10_000,
        ge=1_000,
        description="How long the partitions of an owner that died and does not come back stay without one.",
    )
    max_poll_interval_ms: int = Field(
        default=300_000,
        ge=1_000,
        description="How long an owner may be busy without polling before it loses its partitions.",
    )

    compression: Literal["none", "lz4", "snappy", "gzip", "zstd"] = Field(
        default="none",
        description="What writers do to batches of records: lz4 saves disk and network, and costs 0.1 ms per write.",
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        """Refuse what no broker could let in, before one is asked: its own answer would only say `authentication failed`."""
        for name in ("sasl_username", "sasl_password", "sasl_oauthbearer_client_secret", "ssl_key_password"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name} and {name}_file are both set: which one counts? Set one")
        if self.security_protocol.startswith("sasl_") and self.sasl_mechanism is None:
            raise ValueError(f"security_protocol {self.security_protocol} needs sasl_mechanism")
        if self.sasl_mechanism not in {None, "OAUTHBEARER"} and self.security_protocol.startswith("sasl_"):
            for name in ("sasl_username", "sasl_password"):
                if getattr(self, name) is None and getattr(self, f"{name}_file") is None:
                    raise ValueError(f"sasl_mechanism {self.sasl_mechanism} needs {name} or {name}_file")
        if (self.ssl_certificate_location is None) != (self.ssl_key_location is None):
            raise ValueError("ssl_certificate_location and ssl_key_location belong together: set both or none")
        return self

    def credentials(self) -> Credentials | None:
        """Return user name and password as they are now, files read anew; None if they are not set.

        Raises SecretFileError.
        """
        username = _from_file(self.sasl_username_file) or self.sasl_username
        password = _from_file(self.sasl_password_file) or _revealed(self.sasl_password)
        if username is None or password is None:
            return None
        return Credentials(username, SecretStr(password))

    def proofs(self) -> Proofs:
        """Return what a client made now would be let in by, files read anew. Raises SecretFileError."""
        files = [file for location in self._certificate_locations for file in _files_at(Path(location))]
        digest = hashlib.sha256(b"".join(hashlib.sha256(_bytes_of(file)).digest() for file in files))
        return Proofs(self.credentials(), digest.hexdigest() if files else "")

    @property
    def has_files(self) -> bool:
        """Whether what we are let in by may change while we run."""
        return bool(self._certificate_locations or self.sasl_username_file or self.sasl_password_file)

    @property
    def _certificate_locations(self) -> list[str]:
        if self.security_protocol not in {"ssl", "sasl_ssl"}:
            return []
        named = (self.ssl_ca_location, self.ssl_certificate_location, self.ssl_key_location)
        return [location for location in named if location is not None]

    def key_password(self) -> str | None:
        """Return the private key's passphrase in the clear. Raises SecretFileError."""
        return _from_file(self.ssl_key_password_file) or _revealed(self.ssl_key_password)

    def client_config(self) -> dict[str, str | int | float | bool]:
        """Return what every librdkafka client needs to connect. It holds the secrets in the clear: never log it.

        Reads the files of secrets. Raises SecretFileError.
        """
        config: dict[str, str | int | float | bool] = {
            "bootstrap.servers": self.bootstrap,
            "client.id": self.client_id,
            "security.protocol": self.security_protocol,
        }
        if self.security_protocol in {"ssl", "sasl_ssl"}:
            config["ssl.endpoint.identification.algorithm"] = self.ssl_endpoint_identification_algorithm
        if self.sasl_mechanism == "OAUTHBEARER":
            config["sasl.oauthbearer.method"] = "oidc"
        for name, value in self._optional().items():
            if value is not None:
                config[name] = value
        return config

    def _optional(self) -> dict[str, str | None]:
        credentials = self.credentials()
        return {
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": credentials.username if credentials else None,
            "sasl.password": credentials.password.get_secret_value() if credentials else None,
            "sasl.oauthbearer.token.endpoint.url": self.sasl_oauthbearer_token_endpoint_url,
            "sasl.oauthbearer.client.id": self.sasl_oauthbearer_client_id,
            "sasl.oauthbearer.client.secret": _from_file(self.sasl_oauthbearer_client_secret_file)
            or _revealed(self.sasl_oauthbearer_client_secret),
            "sasl.oauthbearer.scope": self.sasl_oauthbearer_scope,
            "ssl.ca.location": self.ssl_ca_location,
            "ssl.certificate.location": self.ssl_certificate_location,
            "ssl.key.location": self.ssl_key_location,
            "ssl.key.password": self.key_password(),
        }

    @property
    def heartbeat_interval_ms(self) -> int:
        """How often a member tells the group that it lives: also how soon it hears that others come and go."""
        return max(100, min(1_000, self.session_timeout_ms // HEARTBEATS_PER_SESSION))


class CheckpointSettings(BaseSettings):
    """When owners write down their state, as environment variables `TIDEGATE_CHECKPOINT_*`."""

    model_config = SettingsConfigDict(env_prefix="TIDEGATE_CHECKPOINT_", extra="ignore")

    every_entries: int = Field(
        default=8_000,
        ge=1,
        description="A partition's checkpoint begins after that many entries, but not after fewer than it has live runs; an entry "
        "of several inputs counts as several. Up to about that many of each partition are folded at a restart; after a quarter "
        "of a second without any, one in 32 of that is enough to begin one.",
    )
    every_s: float = Field(
        default=60.0, gt=0, description="It begins after that time at the latest if anything changed."
    )
    units_per_turn: int = Field(
        default=200,
        ge=1,
        description="How many runs are written in one turn: more make checkpoints shorter and pauses longer.",
    )
    rest_after_s: float = Field(
        default=60.0,
        ge=0,
        description="A run that waits for a person or a time for longer than this leaves the memory.",
    )


def _revealed(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def _files_at(location: Path) -> list[Path]:
    """Return the file, or those of a directory of certificates, in order."""
    return sorted(path for path in location.iterdir() if path.is_file()) if location.is_dir() else [location]


def _bytes_of(path: Path) -> bytes:
    """Return the beginning of a file, longer than any secret or certificate is. Raises SecretFileError."""
    try:
        with path.open("rb") as file:
            return file.read(SECRET_FILE_MAX_BYTES)
    except OSError as error:
        raise SecretFileError(f"cannot read {path}: {error.strerror}") from None


def _from_file(path: Path | None) -> str | None:
    """Return a file's text without what ends its last line, which editors and `echo` add. Raises SecretFileError."""
    if path is None:
        return None
    try:
        text = _bytes_of(path).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise SecretFileError(f"{path} does not hold text") from None
    if not text:
        raise SecretFileError(f"{path} is empty: it should hold a secret or a name")
    return text
