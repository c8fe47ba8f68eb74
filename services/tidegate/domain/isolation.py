"""How a function is kept apart from its executor: words that apps, policies and tasks share."""

from __future__ import annotations

from typing import Final

IN_PROCESS: Final = ""  # in the executor's own process, as usual
SUBPROCESS: Final = "subprocess"
JOB: Final = "job"
ISOLATIONS: Final = (IN_PROCESS, SUBPROCESS, JOB)  # each stronger than the one before


def strongest(*isolations: str) -> str:
    """Return the strongest of several isolations. Raises ValueError for a word that is none."""
    return ISOLATIONS[max(map(ISOLATIONS.index, isolations), default=0)]
