"""The dead letter about a record: what anybody may have written, cut to what fits into a record of ours. Pure."""

from __future__ import annotations

from typing import Final

from tidegate.domain.messages import DeadLetter
from tidegate.eventlog.interface import Headers, Message

MAX_ORIGINAL_BYTES: Final = 256 * 1024
MAX_KEY_BYTES: Final = 4 * 1024
MAX_HEADERS_BYTES: Final = 64 * 1024
MAX_REASON_CHARACTERS: Final = 16 * 1024
DELETED_UNREAD: Final = "deleted_unread"  # the code of a letter without an original: nobody has seen it


def dead_letter(message: Message, *, service: str, code: str, reason: str, run_id: str, at_ms: int) -> DeadLetter:
    """Return the letter. Key, headers and reason are cut too: a letter that does not fit would stop its writer for ever."""
    value = message.value or b""
    return DeadLetter(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        service=service,
        code=code,
        reason=reason[:MAX_REASON_CHARACTERS],
        run_id=run_id,
        original=value[:MAX_ORIGINAL_BYTES],
        original_size=len(value),
        original_key=(message.key or b"")[:MAX_KEY_BYTES],
        headers=_fitting(message.headers),
        at_ms=at_ms,
    )


def _fitting(headers: Headers) -> dict[str, bytes]:
    """Return the headers up to the bound; the first that does not fit is cut, what comes after it is left out."""
    found: dict[str, bytes] = {}
    left = MAX_HEADERS_BYTES
    for name, value in headers:
        left -= len(name.encode())
        if left <= 0:
            break
        found[name] = value[:left]
        left -= len(value)
    return found
