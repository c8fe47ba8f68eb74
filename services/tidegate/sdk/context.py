"""What a function can ask while it runs for a run: which attempt it is, its idempotency key; and where it reports cost."""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tidegate.domain.identity import MAX_MICROS
from tidegate.sdk.errors import OutsideStepError


@dataclass(frozen=True, slots=True)
class StepContext:
    """The attempt that a function runs for. `deadline`: when the attempt is taken as timed out.

    provider, model, operation: what the function was declared to use. agent: whose turn it is, or who called the tool. rule,
    policy: what allowed the attempt (`name`, `name@version`); `default` and empty if no rule was about it. reserved_micros: what is
    set aside for it, in micro-dollars.
    """

    run_id: str
    step_id: str
    attempt: int
    account: str
    function: str
    idempotency_key: str
    deadline: datetime.datetime
    provider: str = ""
    model: str = ""
    operation: str = ""
    agent: str = ""
    rule: str = ""
    policy: str = ""
    reserved_micros: int = 0

    def remaining_s(self) -> float:
        """Return the seconds left until the deadline, by this machine's clock; negative beyond it."""
        return (self.deadline - datetime.datetime.now(datetime.UTC)).total_seconds()


class Meter:
    """What an attempt reported to have cost and used. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cost_micros: int | None = None
        self._usage: dict[str, int] = {}

    @property
    def cost_micros(self) -> int | None:
        """Return the reported cost, None if none was reported."""
        return self._cost_micros

    @property
    def usage(self) -> dict[str, int]:
        """Return a copy of the reported counts."""
        with self._lock:
            return dict(self._usage)

    def add_cost(self, micros: int) -> None:
        """Add to the cost. Raises ValueError unless it is a whole number, and the sum stays in 0..MAX_MICROS."""
        if not _is_count(micros):
            raise ValueError(f"cost must be a whole number of micro-dollars from 0 to {MAX_MICROS}, not {micros!r}")
        with self._lock:
            self._cost_micros = _sum(self._cost_micros or 0, micros, "the cost")

    def add_usage(self, counts: Mapping[str, int]) -> None:
        """Add to the counts. Raises ValueError unless all are whole numbers, and their sums stay in 0..MAX_MICROS."""
        for name, count in counts.items():
            if not isinstance(name, str):
                raise ValueError(f"usage is named by text, not {name!r}")
            if not _is_count(count):
                raise ValueError(f"usage {name!r} must be a whole number from 0 to {MAX_MICROS}, not {count!r}")
        with self._lock:
            for name, count in counts.items():
                self._usage[name] = _sum(self._usage.get(name, 0), count, f"usage {name!r}")

    def take_over(self, cost_micros: int | None, usage: Mapping[str, int]) -> None:
        """Hold what another meter holds: that of the process in which the function runs."""
        with self._lock:
            self._cost_micros, self._usage = cost_micros, dict(usage)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MICROS


def _sum(known: int, more: int, what: str) -> int:
    if known + more > MAX_MICROS:
        raise ValueError(f"{what} would be {known + more}, more than {MAX_MICROS}")
    return known + more


_current: contextvars.ContextVar[tuple[Callable[[], StepContext], Meter]] = contextvars.ContextVar("tidegate_step")


@contextlib.contextmanager
def running(context: StepContext, meter: Meter) -> Iterator[None]:
    """Make the functions of this module answer for an attempt inside the `with` block: for executors and tests."""
    token = _current.set((lambda: context, meter))
    try:
        yield
    finally:
        _current.reset(token)


def answer_for(context: Callable[[], StepContext], meter: Meter) -> None:
    """Make the functions of this module answer for an attempt from here on, in this task or copied context and what it begins.

    context: makes the answer whenever the function asks. For executors, which give every attempt a context of its own: nothing
    is there to be put back.
    """
    _current.set((context, meter))


def context() -> StepContext:
    """Return the attempt that the calling function runs for. Raises OutsideStepError elsewhere.

    Works in the function itself and in what it awaits or calls; a thread that the function starts must be given it.
    """
    return _now("context()")[0]()


def idempotency_key() -> str:
    """Return the key that is the same for all attempts of this step and differs from that of every other step.

    Pass it to the system that has the effect, so that a repeated attempt has no second one. Raises OutsideStepError.
    """
    return _now("idempotency_key()")[0]().idempotency_key


def report_cost(micros: int) -> None:
    """Say that the running attempt has cost this much, in micro-dollars; several reports add up.

    Without any report a success is taken to have cost what the function declares, a failure nothing. Report 0 for a
    success that was free. Raises ValueError, OutsideStepError.
    """
    _now("report_cost()")[1].add_cost(micros)


def report_usage(**counts: int) -> None:
    """Say what the running attempt has used: `report_usage(input_tokens=120)`; several reports add up."""
    _now("report_usage()")[1].add_usage(counts)


def _now(what: str) -> tuple[Callable[[], StepContext], Meter]:
    try:
        return _current.get()
    except LookupError:
        raise OutsideStepError(
            f"{what} works only while a function runs for a run; in a test use tidegate.sdk.testkit"
        ) from None
