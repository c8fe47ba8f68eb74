"""Asking the gateway's live view over HTTP."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import quote, urlencode

import typer

from tidegate.cli.addresses import AddressError, address_file, read_address

URL_VARIABLE: Final = "TIDEGATE_GATEWAY_URL"
ADDRESS_FILE: Final = "gateway.json"
ANSWER_TIMEOUT_S: Final = 15.0
# For how long a view that is away or being restored is waited for, and how often it is asked.
GATEWAY_AWAY_S: Final = 60.0
RETRY_S: Final = 0.2

Url = Annotated[
    str,
    typer.Option(
        "--url", envvar=URL_VARIABLE, help="Where the gateway answers. Default: gateway.json in TIDEGATE_DATA_DIR."
    ),
]


class LiveViewError(RuntimeError):
    """The live view gives no answer; the message says what to do."""


class NotReadyError(LiveViewError):
    """The live view is away or being restored: it may answer in a moment."""


class RestoringError(NotReadyError):
    """The live view is there and says that it, or another gateway that it asked, is being restored."""


class BadQuestionError(ValueError):
    """The live view does not answer such a question; the message says what it would."""


class UnknownRunError(LookupError):
    """The live view has no such run."""


class NothingCountedError(LookupError):
    """The live view has counted nothing of what was asked for."""


def patiently(ask: Callable[[], dict[str, Any]], say: Callable[[str], object]) -> dict[str, Any]:
    """Return what the live view answers; while it is being restored, say so once and ask again. Raises as the asking does."""
    deadline = time.monotonic() + GATEWAY_AWAY_S
    has_said = False
    while True:
        try:
            return ask()
        except RestoringError as error:
            if time.monotonic() > deadline:
                raise
            if not has_said:
                say(waiting(error))
                has_said = True
            time.sleep(RETRY_S)


def waiting(error: Exception) -> str:
    """Return what to say while the view is waited for."""
    return f"{error} Waiting for it …"


class LiveView:
    """The live view as one user sees it. Every call blocks for the answer, and finds out afresh where to ask."""

    def __init__(self, url: str = "") -> None:
        """`url`: where it answers; without it what the gateway of this machine wrote into the data folder."""
        self._url = url

    def runs(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return the newest runs that a query asks for. Raises BadQuestionError, LiveViewError."""
        return self._get("/v1/runs", query, ANSWER_TIMEOUT_S)

    def run(self, run_id: str, *, after_seq: int = 0, wait_s: float = 0.0) -> dict[str, Any]:
        """Return a run; waits until it is past `after_seq`, for `wait_s` at most. Raises UnknownRunError, LiveViewError."""
        query = {"after_seq": after_seq, "wait_ms": int(wait_s * 1000)}
        return self._get(f"/v1/runs/{quote(run_id, safe='')}", query, wait_s + ANSWER_TIMEOUT_S)

    def figures(self, what: str, name: str, query: Mapping[str, Any]) -> dict[str, Any]:
        """Return figures of `accounts` or `functions`: of one, or with an empty name of all.

        Raises NothingCountedError, BadQuestionError, LiveViewError.
        """
        return self._get(f"/v1/{what}/{quote(name)}" if name else f"/v1/{what}", query, ANSWER_TIMEOUT_S)

    def _address(self) -> tuple[str, str]:
        """Return where to ask, and who says so."""
        if self._url:
            return self._url, "as you said"
        file = address_file(ADDRESS_FILE)
        try:
            return read_address(file, "gateway")["url"], f"from {file}"
        except AddressError as error:
            raise NotReadyError(
                f"{error}. Start `tidegate dev`, or say where the gateway is with --url or {URL_VARIABLE}."
            ) from None

    def _get(self, path: str, query: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        url, source = self._address()
        target = f"{url.rstrip('/')}{path}?{urlencode(query)}"
        if not target.startswith(("http://", "https://")):
            raise LiveViewError(f"{url} ({source}) is no http:// address")
        try:
            with urllib.request.urlopen(target, timeout=timeout_s) as response:  # noqa: S310 - checked above
                return _object(response.read(), url)
        except urllib.error.HTTPError as error:
            raise _refusal(error, url) from None
        except ValueError as error:  # brackets that do not close, a name that cannot be one
            raise LiveViewError(f"{url} ({source}) is no address: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NotReadyError(
                f"nothing answers at {url} ({source}): {reason or type(error).__name__}. Is the gateway running?"
            ) from None


_BY_CODE: Final[dict[str, type[Exception]]] = {
    "unknown_run": UnknownRunError,
    "nothing_counted": NothingCountedError,
    "bad_request": BadQuestionError,
}


def _refusal(error: urllib.error.HTTPError, url: str) -> Exception:
    try:
        body = _object(error.read(), url)
        code, message = str(body["code"]), str(body["message"])
    except (OSError, LookupError, LiveViewError):
        return LiveViewError(f"{url} answers {error.code} {error.reason}: is it a gateway of Tidegate?")
    if code in _BY_CODE:
        return _BY_CODE[code](message)
    return RestoringError(message) if error.code == http.HTTPStatus.SERVICE_UNAVAILABLE else LiveViewError(message)


def _object(body: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise LiveViewError(f"{url} does not answer as a gateway does: is it one of Tidegate?")
    return value
