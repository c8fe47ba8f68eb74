"""A run's money and open attempts as bytes and back. Disposable: a format that changed only means to fold the ledger."""

from __future__ import annotations

from typing import Final

import msgspec

from tidegate.gate.ledger import Attempt, AttemptKey, Ledger, RunMoney

# Counts up with every change of the fields of RunMoney and Attempt, or of what they mean.
SNAPSHOT_FORMAT: Final = 1

_State = tuple[RunMoney, list[Attempt]]


def dump(ledger: Ledger, run_id: str) -> bytes:
    """Return the run's money and its open attempts, these in the order of their keys in `RunMoney.open`."""
    run = ledger.runs[run_id]
    attempts = [ledger.attempts[key] for key in run.open]
    money = msgspec.structs.replace(run, open={})
    return msgspec.msgpack.encode((SNAPSHOT_FORMAT, money, [key[1:] for key in run.open], attempts))


def load(ledger: Ledger, run_id: str, data: bytes) -> None:
    """Put the run into a ledger. Raises ValueError on another format, msgspec.DecodeError."""
    version, _, _, _ = msgspec.msgpack.decode(data, type=tuple[int, msgspec.Raw, msgspec.Raw, msgspec.Raw])
    if version != SNAPSHOT_FORMAT:
        raise ValueError(f"a snapshot of format {version}, not {SNAPSHOT_FORMAT}")
    _, run, names, attempts = msgspec.msgpack.decode(
        data, type=tuple[int, RunMoney, list[tuple[str, int]], list[Attempt]]
    )
    ledger.runs[run_id] = run
    for (step_id, number), attempt in zip(names, attempts, strict=True):
        key = AttemptKey(run_id, step_id, number)
        run.open[key] = None
        ledger.attempts[key] = attempt
