"""The outside world of the chaos demo: who was called, and what was paid under which idempotency key. Apart from Tidegate.

Plain files, because nobody can hold a lock on them: whoever is frozen in the middle of a payment must not stop the others.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

CALLS: Final = "calls.log"
PAID: Final = "paid"


class Call(NamedTuple):
    """A function was entered: what it left before it did anything else."""

    run_id: str
    step_id: str
    attempt: int
    instance_id: str
    idempotency_key: str


class Payment(NamedTuple):
    """Money that moved, once per idempotency key."""

    run_id: str
    step_id: str
    function: str
    cents: int
    idempotency_key: str


class Provider:
    """Payments by idempotency key. What a method has done survives the death of its process the moment it returns."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if need be. Raises OSError."""
        self._folder = folder
        (folder / PAID).mkdir(parents=True, exist_ok=True)

    def note(self, call: Call) -> None:
        """Note a call, in one write, so that lines of several processes do not mix."""
        line = "\t".join(map(str, call)) + "\n"
        descriptor = os.open(self._folder / CALLS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def pay(self, payment: Payment) -> bool:
        """Move the money unless that key has moved it already; returns whether it moved now. Whole or not at all."""
        with tempfile.NamedTemporaryFile("w", dir=self._folder, prefix="draft-", encoding="utf-8") as draft:
            draft.write("\t".join(map(str, payment)))
            draft.flush()
            os.fsync(draft.fileno())
            try:
                os.link(draft.name, self._folder / PAID / payment.idempotency_key)
            except FileExistsError:
                return False
        return True

    def calls(self) -> list[Call]:
        """Return all calls, in order."""
        path = self._folder / CALLS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Call(p[0], p[1], int(p[2]), p[3], p[4]) for p in (line.split("\t") for line in lines)]

    def payments(self) -> list[Payment]:
        """Return all payments, by key."""
        texts = (path.read_text(encoding="utf-8") for path in sorted((self._folder / PAID).iterdir()))
        return [Payment(p[0], p[1], p[2], int(p[3]), p[4]) for p in (text.split("\t") for text in texts)]
