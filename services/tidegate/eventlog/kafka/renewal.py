"""A new password or certificate in the files: a client that is refused with the old one ends, and its process begins again.

Connections that exist stay, so a change is noticed at the next one that is made. Refusals alone change nothing: the
client asks again, with a growing pause, because the files may change after the brokers did. Nor do files alone: a certificate
that is renewed in time is as good as the new one until it expires, and an executor that ends loses what it runs. So a refusal is
forgotten when none follows: brokers that do not know a password yet, right after their start, must not make a later change of files
the end of all.

A process that ends finds its partitions again at once, as after any other doubt. Handing the new password to the running client
(`set_sasl_credentials`) was tried: now and then that call never returns.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from tidegate.eventlog.settings import KafkaSettings, SecretFileError
from tidegate.health import PULSE

LOOK_EVERY_S: Final = 1.0
# Who is refused asks again within seconds and is told of every refusal: silence for so long means that it was let in since, or
# wants nothing of whoever refused it.
REFUSED_FOR_S: Final = 60.0
REPLACED: Final = "the brokers refuse our credentials, and the files hold others by now: beginning again takes those"
_REFUSED: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})
# Either side may refuse the other's certificate. Ours is refused by an alert on a connection that exists by then, which the
# client tells of as if the connection had broken; only the words are different.
_OF_CONNECTIONS: Final = frozenset({KafkaError._SSL, KafkaError._TRANSPORT})
_OF_CERTIFICATES: Final = re.compile(r"SSL routines:.*(certificate|unknown ca|access denied)")

_log = logging.getLogger(__name__)


class Renewal:
    """What one client knows of the files; it is the client's `error_cb`. Belongs to the thread that polls the client."""

    def __init__(self, settings: KafkaSettings, then: Callable[[KafkaError], None]) -> None:
        """Remember what the client is about to be configured with. `then` is told of every error, too."""
        self._settings = settings
        self._then = then
        self._in_use = settings.proofs()
        self._refused_s: float | None = None  # when last
        self._look_at_s = 0.0

    def __call__(self, error: KafkaError) -> None:
        """Take note of an error that the client tells of. Does not raise."""
        if is_refusal(error):
            self._refused_s = time.monotonic()
        self._then(error)

    def check(self) -> None:
        """Raise KafkaException if the client was refused and can be of no use any more."""
        if self._refused_s is None:
            return
        now_s = time.monotonic()
        if now_s - self._refused_s > REFUSED_FOR_S:
            self._refused_s = None
            return
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_EVERY_S
        if self.is_outdated():
            PULSE.end(REPLACED)  # a client beside this one may have no connection to be refused on, and wait for ever
            raise KafkaException(KafkaError(KafkaError._AUTHENTICATION, REPLACED))

    def is_outdated(self) -> bool:
        """Tell whether the files hold something else than the client has. Reads them."""
        try:
            return self._settings.proofs() != self._in_use
        except SecretFileError as error:
            _log.warning("the credentials cannot be read: %s", error)
            return False  # nothing better is known


def is_refusal(error: KafkaError) -> bool:
    """Tell whether the brokers do not let us in, or we not them, by who they or we are."""
    if error.code() in _OF_CONNECTIONS:
        return _OF_CERTIFICATES.search(error.str()) is not None
    return error.code() in _REFUSED


class RenewingConsumer(Consumer):
    """A consumer that fails once it is refused and its password or certificate was replaced."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> Any:
        """As Consumer does. Raises KafkaException, too, when the password or the certificate was replaced."""
        message = super().poll(timeout)
        self.renewal.check()
        return message

    def consume(self, num_messages: int = 1, timeout: float = -1) -> Any:
        """As Consumer does. Raises KafkaException, too, when the password or the certificate was replaced."""
        messages = super().consume(num_messages, timeout)
        self.renewal.check()
        return messages


class RenewingProducer(Producer):
    """A producer that fails once it is refused and its password or certificate was replaced."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> int:
        """As Producer does. Raises KafkaException, too, when the password or the certificate was replaced."""
        served = super().poll(timeout)
        self.renewal.check()
        return served
