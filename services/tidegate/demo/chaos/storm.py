"""Carries out the blows of a plan against the processes of a stack, and only those."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from tidegate.demo.chaos.plan import FREEZE, KAFKA, KILL, STOP, Blow, service_of
from tidegate.embedded.errors import EmbeddedKafkaError
from tidegate.embedded.stack import Stack

TICK_S: Final = 0.05
LONG_FREEZE: Final = "SIGSTOP beyond lease and session"


class _Frozen(NamedTuple):
    until_s: float
    name: str
    pid: int


class Storm:
    """A storm over one stack. Not thread-safe; Kafka falls and rises in a thread of its own meanwhile."""

    def __init__(self, stack: Stack, plan: Sequence[Blow], say: Callable[[str], None]) -> None:
        self._stack = stack
        self._plan = list(plan)
        self._say = say
        self._frozen: list[_Frozen] = []
        self._kafka: threading.Thread | None = None
        self._kafka_failure = ""
        self._began_s = 0.0
        self.done: Counter[tuple[str, str]] = Counter()  # (what was done, to which service)

    def rage(self, meanwhile: Callable[[], None]) -> None:
        """Strike until the plan is through and everybody stands again; call `meanwhile` all the time. Blocks.

        Raises EmbeddedKafkaError if Kafka does not come back.
        """
        self._began_s = time.monotonic()
        try:
            while self._plan or self._frozen or self._kafka is not None:
                now_s = time.monotonic() - self._began_s
                self._thaw(now_s)
                due = [blow for blow in self._plan if blow.at_s <= now_s]
                # Whose target is down at this moment waits until it stands again.
                self._plan[: len(due)] = [blow for blow in due if not self._strike(blow, now_s)]
                self._look_at_kafka()
                meanwhile()
                time.sleep(TICK_S)
        finally:
            self.calm()

    def calm(self) -> None:
        """Wake whoever is frozen, and wait for Kafka. Idempotent."""
        self._thaw(float("inf"))
        if self._kafka is not None:
            self._kafka.join()
            self._kafka = None

    def _strike(self, blow: Blow, now_s: float) -> bool:
        """Carry out a blow if its target stands; returns whether it did."""
        if blow.target == KAFKA:
            if self._kafka is not None:
                return False
            self._tell(blow, "", now_s)
            self._kafka = threading.Thread(target=self._fell_kafka, args=(blow.hold_s,), name="kafka", daemon=True)
            self._kafka.start()
            return True
        pid = self._stack.kill(blow.target) if blow.kind == KILL else self._signal(blow)
        if pid is None:
            return False
        if blow.kind == FREEZE:
            self._frozen.append(_Frozen(now_s + blow.hold_s, blow.target, pid))
        self._tell(blow, f" (pid {pid})", now_s)
        return True

    def _tell(self, blow: Blow, who: str, now_s: float) -> None:
        self.done[LONG_FREEZE if blow.is_long else blow.kind, service_of(blow.target)] += 1
        held = f" for {blow.hold_s:.1f} s" if blow.hold_s else ""
        self._say(f"{now_s:>6.1f} s  {blow.kind} {blow.target}{who}{held}")

    def _signal(self, blow: Blow) -> int | None:
        """Stop or freeze a process; returns its pid, None if it is not there."""
        pid = self._stack.pid(blow.target)
        if pid is None:
            return None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM if blow.kind == STOP else signal.SIGSTOP)
            return pid
        return None

    def _thaw(self, now_s: float) -> None:
        """Wake those whose time has come, if they are still the ones that were frozen: a frozen process can be killed."""
        for frozen in [one for one in self._frozen if one.until_s <= now_s]:
            self._frozen.remove(frozen)
            if self._stack.pid(frozen.name) == frozen.pid:
                with suppress(ProcessLookupError):
                    os.kill(frozen.pid, signal.SIGCONT)

    def _fell_kafka(self, away_s: float) -> None:
        kafka = self._stack.kafka
        assert kafka is not None  # noqa: S101 - the demo's stack has its own
        try:
            kafka.kill()
            time.sleep(away_s)
            kafka.restart()
        except EmbeddedKafkaError as error:
            self._kafka_failure = str(error)

    def _look_at_kafka(self) -> None:
        if self._kafka is not None and not self._kafka.is_alive():
            self._kafka.join()
            self._kafka = None
        if self._kafka_failure:
            raise EmbeddedKafkaError(self._kafka_failure)
