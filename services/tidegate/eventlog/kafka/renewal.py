"""A new password in the files: a client that is refused with the old one says so, and its process ends and begins again with it.

Connections that exist stay, so a changed password is noticed at the next one that is made. Refusals alone change nothing: the
client asks again, with a growing pause, because the file may change after the brokers did.

A process that ends finds its partitions again at once, as after any other doubt. Handing the new password to the running client
(`set_sasl_credentials`) was tried: now and then that call never returns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer

from tidegate.eventlog.settings import KafkaSettings, SecretFileError

LOOK_EVERY_S: Final = 1.0
REPLACED: Final = "the brokers refuse our credentials, and the files hold others by now: beginning again takes those"
_REFUSED: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})

_log = logging.getLogger(__name__)


class Renewal:
    """What one client knows of the files; it is the client's `error_cb`. Belongs to the thread that polls the client."""

    def __init__(self, settings: KafkaSettings, then: Callable[[KafkaError], None]) -> None:
        """Remember what the client is about to be configured with. `then` is told of every error, too."""
        self._settings = settings
        self._then = then
        self._in_use = settings.credentials()
        self._refused = False
        self._look_at_s = 0.0

    def __call__(self, error: KafkaError) -> None:
        """Take note of an error that the client tells of, of some of those that are alike only once. Does not raise."""
        self._refused |= error.code() in _REFUSED
        self._then(error)

    def check(self) -> None:
        """Raise KafkaException if the client was refused and can be of no use any more."""
        if not self._refused or time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + LOOK_EVERY_S
        if self.is_outdated():
            raise KafkaException(KafkaError(KafkaError._AUTHENTICATION, REPLACED))

    def is_outdated(self) -> bool:
        """Tell whether the files hold something else than the client has. Reads them."""
        try:
            return self._settings.credentials() != self._in_use
        except SecretFileError as error:
            _log.warning("the credentials cannot be read: %s", error)
            return False  # nothing better is known


class RenewingConsumer(Consumer):
    """A consumer that fails once its password was replaced."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> Any:
        """As Consumer does. Raises KafkaException, too, when the password was replaced."""
        message = super().poll(timeout)
        self.renewal.check()
        return message

    def consume(self, num_messages: int = 1, timeout: float = -1) -> Any:
        """As Consumer does. Raises KafkaException, too, when the password was replaced."""
        messages = super().consume(num_messages, timeout)
        self.renewal.check()
        return messages


class RenewingProducer(Producer):
    """A producer that fails once its password was replaced."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> int:
        """As Producer does. Raises KafkaException, too, when the password was replaced."""
        served = super().poll(timeout)
        self.renewal.check()
        return served
