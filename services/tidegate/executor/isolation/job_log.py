"""How an errand gets into the pod of a Job, and how the answer comes out of its log.

The errand travels in variables of the container, compressed. The answer is in the pod's log among whatever the function prints:
lines that begin with a mark and the name of the Job, in pieces short enough to stay whole.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Callable, MutableMapping
from typing import Final, NamedTuple

from tidegate.executor.endings import ErrandTooLargeError
from tidegate.executor.isolation.errand import Errand, Line, errand_in, line_in, to_line

VARIABLE: Final = "TIDEGATE_ERRAND_"
NAME_VARIABLE: Final = "TIDEGATE_ERRAND_NAME"
PIECE_CHARACTERS: Final = 100_000  # of a variable: Linux takes 128 KiB
MAX_CHARACTERS: Final = 800_000  # of all: with the rest of the Job it must be less than the 1.5 MiB that etcd takes
MARK: Final = "tidegate-answer"
LINE_CHARACTERS: Final = 8_000  # of a line of the log: runtimes cut lines at 16 KiB
MORE_LINES: Final = 400  # of the log that are read besides those of an answer of full size


class Heard(NamedTuple):
    """What a log holds: the answer so far, and what the function printed."""

    lines: tuple[Line, ...]
    printed: str


def variables_of(errand: Errand, name: str) -> dict[str, str]:
    """Return the errand as variables of the container of the Job of that name. Raises ErrandTooLargeError."""
    text = base64.b64encode(zlib.compress(to_line(errand))).decode()
    if len(text) > MAX_CHARACTERS:
        raise ErrandTooLargeError(
            f"arguments of {len(errand.arguments)} bytes make {len(text)} characters when compressed, at most {MAX_CHARACTERS} "
            "fit into a Job; keep them elsewhere and pass where"
        )
    pieces = _pieces(text, PIECE_CHARACTERS)
    return {NAME_VARIABLE: name, **{f"{VARIABLE}{number}": piece for number, piece in enumerate(pieces)}}


def errand_from(variables: MutableMapping[str, str]) -> tuple[Errand, str]:
    """Take the errand and the name of the Job out of the variables: the function does not find them there. Raises ValueError."""
    try:
        name = variables.pop(NAME_VARIABLE)
        pieces: list[str] = []
        while piece := variables.pop(f"{VARIABLE}{len(pieces)}", ""):
            pieces.append(piece)
        return errand_in(zlib.decompress(base64.b64decode("".join(pieces)))), name
    except (KeyError, zlib.error) as error:
        raise ValueError(f"there is no errand in the environment ({VARIABLE}0, ...): {error!r}") from None


class Voice:
    """Says lines into the log. `write` gets whole lines of it."""

    def __init__(self, name: str, write: Callable[[bytes], object]) -> None:
        self._name = name
        self._write = write
        self._count = 0

    def say(self, line: Line) -> None:
        """Write a line, in pieces. Blocks."""
        pieces = _pieces(base64.b64encode(to_line(line)).decode(), LINE_CHARACTERS)
        self._count += 1
        for number, piece in enumerate(pieces, 1):
            self._write(f"{MARK} {self._name} {self._count} {number}/{len(pieces)} {piece}\n".encode())


def log_lines_wanted(errand: Errand) -> int:
    """Return how many lines of the end of the log hold the answer, whatever its size, if the function was quiet after it."""
    return errand.line_max_bytes * 4 // 3 // LINE_CHARACTERS + MORE_LINES


def heard_in(log: str, name: str) -> Heard:
    """Return what a log holds. What is not whole, or of another Job, is passed over."""
    said: list[Line] = []
    printed: list[str] = []
    parts: dict[str, list[str]] = {}
    for text in log.splitlines():
        words = text.split(" ")
        if len(words) != 5 or words[:2] != [MARK, name]:
            printed.append(text)
            continue
        pieces = parts.setdefault(words[2], [])
        pieces.append(words[4])
        if words[3] == f"{len(pieces)}/{len(pieces)}":
            try:
                said.append(line_in(base64.b64decode("".join(pieces), validate=True)))
            except (ValueError, binascii.Error):
                printed.append(text)
    return Heard(tuple(said), "\n".join(printed))


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]
