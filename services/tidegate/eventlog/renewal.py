"""A new password without a restart: what a client does when the brokers refuse the one it has.

Connections that exist stay, so a changed password is noticed at the next one that is made. The files are then read again; if
they hold something else by now, the client tries with that. It asks again by itself, with a growing pause, for as long as it
is refused, so it does not matter whether the file or the brokers change first.

The new password is handed over before the next call of the thread that polls, and not where the refusal is told: called within
a callback the client ends the process with an assertion, and called from another thread it may wait for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, Producer

from tidegate.eventlog.settings import Credentials, KafkaSettings, SecretFileError

FLUSH_SLICE_S: Final = 1.0
_REFUSED: Final = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})

_log = logging.getLogger(__name__)


class Renewal:
    """What one client knows of the files: it is the client's `error_cb`. Belongs to the thread that polls the client."""

    def __init__(self, settings: KafkaSettings, then: Callable[[KafkaError], None]) -> None:
        """Remember what the client is about to be configured with. `then` is told of every error, too."""
        self._settings = settings
        self._then = then
        self._in_use = settings.credentials()
        self._refused = False

    def __call__(self, error: KafkaError) -> None:
        """Take note of an error that the client tells of. Does not raise."""
        self._refused |= error.code() in _REFUSED
        self._then(error)

    def hand_over(self, client: Any) -> None:
        """Give the client what the files hold now, if it was refused with something else. Does not raise."""
        if not self._refused:
            return
        self._refused = False
        try:
            now = self._settings.credentials()
        except SecretFileError as error:
            _log.warning("the brokers refuse our credentials, and there are no others: %s", error)
            return
        if now is not None and now != self._in_use:
            client.set_sasl_credentials(now.username, now.password.get_secret_value())
            self._in_use = now
            _log.warning("the brokers refused our credentials: trying those that the files hold now")

    def is_outdated(self) -> bool:
        """Tell whether the files hold something else than the client has. Reads them."""
        try:
            now: Credentials | None = self._settings.credentials()
        except SecretFileError:
            return False  # nothing better is known
        return now != self._in_use


class RenewingConsumer(Consumer):
    """A consumer that takes up a new password while it is polled."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> Any:
        """As Consumer does."""
        self.renewal.hand_over(self)
        return super().poll(timeout)

    def consume(self, num_messages: int = 1, timeout: float = -1) -> Any:
        """As Consumer does."""
        self.renewal.hand_over(self)
        return super().consume(num_messages, timeout)


class RenewingProducer(Producer):
    """A producer that takes up a new password while it is polled or flushed."""

    def __init__(self, config: dict[str, Any], renewal: Renewal, **options: Any) -> None:
        super().__init__({**config, "error_cb": renewal}, **options)
        self.renewal = renewal

    def poll(self, timeout: float = -1) -> int:
        """As Producer does."""
        self.renewal.hand_over(self)
        return super().poll(timeout)

    def flush(self, timeout: float = -1) -> int:
        """As Producer does; looks every second whether there is a new password."""
        deadline = time.monotonic() + timeout if timeout >= 0 else float("inf")
        while True:
            self.renewal.hand_over(self)
            left = super().flush(max(0.0, min(FLUSH_SLICE_S, deadline - time.monotonic())))
            if not left or time.monotonic() >= deadline:
                return left
