"""Running functions apart from the executor: in processes and in Kubernetes Jobs of their own. See docs/isolation.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol

from tidegate.domain.isolation import IN_PROCESS, ISOLATIONS, strongest
from tidegate.executor.endings import UnsupportedIsolationError
from tidegate.executor.isolation.errand import Ended, Errand, Reported
from tidegate.sdk.functions import Settings


class Isolation(Protocol):
    """A place for functions outside of this process."""

    async def run(
        self,
        errand: Errand,
        settings: Settings,
        *,
        enter: Callable[[], None],
        reported: Callable[[Reported], None],
    ) -> Ended:
        """Run a function and return how it ended, its timeout included; nothing of it runs on then.

        enter: called at the last moment at which entering can be prevented, and prevents it by raising, which passes through.
        reported: called with what the function reports to have cost. Cancelling ends the function.
        """
        ...


class Apart(NamedTuple):
    """Which isolations an executor has, and the app as it was named on the command line, to be loaded there again."""

    app: str
    ways: Mapping[str, Isolation]

    def way(self, declared: str, demanded: str) -> Isolation | None:
        """Return where to run a function that declares one isolation while a policy demands another; None: in this process.

        Raises UnsupportedIsolationError.
        """
        if declared == demanded == IN_PROCESS:
            return None
        if declared not in ISOLATIONS or demanded not in ISOLATIONS:
            raise UnsupportedIsolationError(f"there is no isolation {demanded!r}: it was not run")
        wanted = strongest(declared, demanded)
        if wanted not in self.ways:
            who = "a policy demands" if demanded == wanted else "the function declares"
            raise UnsupportedIsolationError(
                f"{who} isolation {wanted!r}, which this executor does not have: it was not run"
            )
        return self.ways[wanted]


NOWHERE: Final = Apart("", {})
