"""A broker that lets in only whom it knows: TLS, SASL/SCRAM or client certificates, and ACLs (StandardAuthorizer).

For tests of what production rests on, and for trying ACLs before they are put in force. The certificates are made here, by a
certificate authority that is used for nothing else and whose key never leaves the broker's directory.

Who connects to the first address says who it is with SCRAM; to the second one with a certificate, whose common name it then is.
Nobody may do anything without an ACL, except the broker itself and `ADMIN`, whose certificate lies beside the broker's.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # exported, but not marked so for type checkers
    AdminClient,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.ports import LOOPBACK

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

BROKER: Final = "tidegate-broker"
ADMIN: Final = "tidegate-admin"
MECHANISM: Final = "SCRAM-SHA-512"
VALID_DAYS: Final = 365
REQUEST_TIMEOUT_S: Final = 30.0
SCRAM_ITERATIONS: Final = 4096  # the least that Kafka takes


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """Files with which a client proves its name."""

    ca: Path
    certificate: Path
    key: Path

    def config(self) -> dict[str, str]:
        """Return how a librdkafka client uses them."""
        return {
            "security.protocol": "ssl",
            "ssl.ca.location": str(self.ca),
            "ssl.certificate.location": str(self.certificate),
            "ssl.key.location": str(self.key),
        }


class Certificates:
    """A certificate authority and what it signed, as PEM files in one folder that only its owner may read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def ca(self) -> Path:
        """The certificate by which clients know the broker, and the broker its clients."""
        return self._folder / "ca.crt"

    @property
    def broker_keystore(self) -> Path:
        """The broker's private key, its certificate and the authority's, as Kafka reads them."""
        return self._folder / "broker.pem"

    def make(self, hosts: Sequence[str]) -> None:
        """Make the authority, and the certificates of the broker and of `ADMIN`, unless they are there."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.ca.exists():
            _make_authority(self.ca, self._ca_key)
        if not self.broker_keystore.exists():
            made = self._signed(BROKER, hosts)
            _write_private(self.broker_keystore, made.key + made.certificate + self.ca.read_bytes())
        self.issue(ADMIN)

    def issue(self, name: str) -> ClientCertificate:
        """Return the certificate of a client, made if there is none; its common name is `name`."""
        files = ClientCertificate(self.ca, self._folder / f"{name}.crt", self._folder / f"{name}.key")
        if not files.certificate.exists():
            made = self._signed(name, ())
            _write_private(files.key, made.key)
            files.certificate.write_bytes(made.certificate)
        return files

    @property
    def _ca_key(self) -> Path:
        return self._folder / "ca.key"

    def _signed(self, name: str, hosts: Sequence[str]) -> _Pem:
        from cryptography import x509  # noqa: PLC0415 - comes with the extra only
        from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
        from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415

        authority = x509.load_pem_x509_certificate(self.ca.read_bytes())
        ca_key: Any = serialization.load_pem_private_key(self._ca_key.read_bytes(), None)
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, authority.subject, key.public_key()).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        if hosts:
            names = [_general_name(host) for host in hosts]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return _pem(key, builder.sign(ca_key, hashes.SHA256()))


def listener_config(
    host: str, advertised: str, port: int, certificate_port: int, controller_port: int
) -> dict[str, str]:
    """Return the broker's listeners: SCRAM on `port`, certificates on `certificate_port` (also for the broker itself)."""
    return {
        "listeners": f"SASL://{host}:{port},TLS://{host}:{certificate_port},CONTROLLER://{LOOPBACK}:{controller_port}",
        "advertised.listeners": f"SASL://{advertised}:{port},TLS://{advertised}:{certificate_port}",
        "listener.security.protocol.map": "SASL:SASL_SSL,TLS:SSL,CONTROLLER:SSL",
        "inter.broker.listener.name": "TLS",
    }


def security_config(certificates: Certificates) -> dict[str, str]:
    """Return what makes the broker ask who somebody is, and what that one may do. It holds no secret."""
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(certificates.broker_keystore),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificates.ca),
        "ssl.principal.mapping.rules": "RULE:^CN=([^,]+).*$/$1/,DEFAULT",
        "listener.name.tls.ssl.client.auth": "required",
        "listener.name.controller.ssl.client.auth": "required",
        "listener.name.sasl.ssl.client.auth": "none",
        "sasl.enabled.mechanisms": MECHANISM,
        "listener.name.sasl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": f"User:{BROKER};User:{ADMIN}",
        "allow.everyone.if.no.acl.found": "false",
    }


def set_password(admin: AdminClient, user: str, password: str) -> None:
    """Make a SCRAM user, or give it another password. Blocks. Raises KafkaException.

    It goes over the wire and never through a command line, which everybody on the machine could read.
    """
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS)
    upsertion = UserScramCredentialUpsertion(user, info, password.encode())
    futures: dict[str, Future[Any]] = admin.alter_user_scram_credentials([upsertion], request_timeout=REQUEST_TIMEOUT_S)
    for future in futures.values():
        future.result()


@dataclass(frozen=True, slots=True)
class _Pem:
    key: bytes
    certificate: bytes


def _make_authority(certificate: Path, key_file: Path) -> None:
    try:
        from cryptography import x509  # noqa: PLC0415 - comes with the extra only
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    except ImportError as error:
        raise EmbeddedKafkaError(
            "A secure embedded Kafka needs certificates: pip install 'tidegate[embedded]' brings what makes them."
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("Tidegate's embedded Kafka")
    builder = _builder("", subject, key.public_key()).subject_name(subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = _pem(key, builder.sign(key, hashes.SHA256()))
    _write_private(key_file, made.key)
    certificate.write_bytes(made.certificate)


def _builder(name: str, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    from cryptography import x509  # noqa: PLC0415

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )
    return builder.subject_name(_subject(name)) if name else builder


def _subject(name: str) -> x509.Name:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    from cryptography import x509  # noqa: PLC0415

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> _Pem:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _Pem(text, certificate.public_bytes(serialization.Encoding.PEM))


def _write_private(path: Path, content: bytes) -> None:
    """Write a file that nobody else may read, at no moment."""
    path.touch(mode=0o600)
    path.write_bytes(content)
