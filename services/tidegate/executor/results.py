"""One constructor per kind of answer to a task."""

from __future__ import annotations

from typing import Final

from tidegate import codec
from tidegate.domain.messages import StepResult, StepTask
from tidegate.eventlog.interface import Record
from tidegate.eventlog.validity import TYPE_HEADER

STEP_RESULTS: Final = "step-results"
MAX_MESSAGE_CHARACTERS: Final = 4000

SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
TIMED_OUT: Final = "timed_out"
DIED: Final = "died"
CANCELLED: Final = "cancelled"
RELEASED: Final = "released"
BUSY: Final = "busy"


class Spent:
    """What an attempt cost and used, when it ran (Unix milliseconds), and what the code is called that was entered.

    `cost_micros` None: nothing was reported.
    """

    __slots__ = ("code_version", "cost_micros", "finished_ms", "started_ms", "usage")

    def __init__(
        self,
        cost_micros: int | None,
        usage: dict[str, int],
        started_ms: int,
        finished_ms: int,
        code_version: str = "",
    ) -> None:
        self.cost_micros = cost_micros
        self.usage = usage
        self.started_ms = started_ms
        self.finished_ms = finished_ms
        self.code_version = code_version


NOTHING_SPENT: Final = Spent(None, {}, 0, 0)


def succeeded(task: StepTask, output: str, spent: Spent, goto: str = "", change: str = "") -> StepResult:
    """The function returned, and perhaps chose the next node or proposed a change of the graph.

    Without a report it cost what was set aside for it.
    """
    declared = task.call.reserve_micros if task.call is not None else 0
    cost = declared if spent.cost_micros is None else spent.cost_micros
    return _result(task, SUCCEEDED, spent, output=output, actual_micros=cost, goto=goto, change=change)


def failed(
    task: StepTask,
    error_class: str,
    message: str,
    *,
    retryable: bool = True,
    spent: Spent = NOTHING_SPENT,
    retry_after_ms: int = 0,
) -> StepResult:
    """The function raised, or could not be called, or what it returned cannot be used."""
    return _error(task, FAILED, error_class, message, retryable, spent, retry_after_ms)


def timed_out(task: StepTask, timeout_s: float, spent: Spent, detail: str = "") -> StepResult:
    """The deadline passed. What the function did until then is not known: not to be repeated unless that is harmless.

    detail: what else there is to say.
    """
    idempotent = task.call is not None and task.call.idempotent
    message = f"not finished after {timeout_s:g} s"
    if not idempotent:
        message += "; it may have had its effect, and is not idempotent"
    message += f"\n{detail}" if detail else ""
    return _error(task, TIMED_OUT, "TimedOut", message, idempotent, spent)


def died(task: StepTask, message: str, *, retryable: bool, spent: Spent) -> StepResult:
    """Where the function ran ended without an answer: what it did until then is not known."""
    return _error(task, DIED, "Died", message, retryable, spent)


def cancelled(task: StepTask, spent: Spent) -> StepResult:
    """The attempt was aborted because it was not wanted any more."""
    return _error(task, CANCELLED, "Cancelled", "aborted because it was cancelled", False, spent)


def released(task: StepTask) -> StepResult:
    """The attempt was never begun here: this executor is draining."""
    return _error(task, RELEASED, "Released", "handed back by an executor that is draining", True, NOTHING_SPENT)


def busy(task: StepTask) -> StepResult:
    """The attempt was never begun here: no slot was free."""
    return _error(task, BUSY, "Busy", "no free slot", True, NOTHING_SPENT)


def _error(
    task: StepTask,
    outcome: str,
    error_class: str,
    message: str,
    retryable: bool,
    spent: Spent,
    retry_after_ms: int = 0,
) -> StepResult:
    return _result(
        task,
        outcome,
        spent,
        error_class=error_class[:200],
        error_message=bounded(message),
        retryable=retryable,
        actual_micros=spent.cost_micros or 0,
        retry_after_ms=retry_after_ms,
    )


def _result(task: StepTask, outcome: str, spent: Spent, **fields: object) -> StepResult:
    return StepResult(
        run_id=task.run_id,
        step_id=task.step_id,
        attempt=task.attempt,
        account=task.account,
        instance_id=task.instance_id,
        incarnation=task.incarnation,
        outcome=outcome,
        usage=spent.usage,
        started_ms=spent.started_ms,
        finished_ms=spent.finished_ms,
        code_version=spent.code_version,
        **fields,  # type: ignore[arg-type]  # the fields of StepResult that differ between the constructors above
    )


def bounded(message: str) -> str:
    """Return a message as a result may hold it."""
    # What somebody's exception says may hold anything, lone surrogates included.
    text = message.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 1] + "…"


def to_record(task: StepTask, result: StepResult) -> Record:
    """Return the record that answers a task: it goes where the task says.

    A result that cannot be encoded becomes a failure that says so: an attempt that is never answered keeps its run waiting.
    """
    try:
        value = codec.encode(result)
    except ValueError as error:
        result = failed(task, "BadResult", f"its result cannot be written: {error}", retryable=False)
        value = codec.encode(result)
    key = f"{result.run_id}:{result.step_id}:{result.attempt}:{result.outcome}"
    return Record(STEP_RESULTS, task.result_partition, key.encode(), value, ((TYPE_HEADER, b"StepResult"),))
