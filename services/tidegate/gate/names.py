"""Names of what a ledger counts, and of what attempts wait for. Pure."""

from __future__ import annotations

from typing import Final

from tidegate.gate.windows import Window

SEPARATOR: Final = "|"  # neither run ids, accounts nor names have it
_RUN: Final = "run:"
FAMILY: Final = "family"
RULE_WAIT: Final = "rule"  # what those wait for about whom a rule asks by now, too


def bucket_key(budget: str, account: str, run_id: str, window: Window) -> str:
    """Return a bucket's name: no run is named like it."""
    part = f"{_RUN}{run_id}" if run_id else str(window.from_ms) if window.until_ms else "total"
    return SEPARATOR.join((budget, account, part))


def scope_of(bucket: str) -> str:
    """Return what all windows of a bucket have in common; of what is no bucket of windows, the name as it is."""
    scope, bar, part = bucket.rpartition(SEPARATOR)
    return scope if bar and not part.startswith(_RUN) else bucket


def learned_key(kind: str, function: str) -> str:
    """Return the name of what was learned of a function: no run and no bucket is named like it."""
    return f"{SEPARATOR}{kind}:{function}"


def family_wait(run_id: str) -> str:
    """Return what attempts of a family wait for while a run above theirs is not open: no bucket is named like it."""
    return f"{FAMILY}:{run_id}"
