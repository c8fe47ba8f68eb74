"""Answers: what they cost, what they say, where they go; and that they are sent until somebody has them."""

import threading

import msgspec
import pytest

from tidegate import codec
from tidegate.domain.entry import Position
from tidegate.domain.messages import Call, StepResult, StepTask
from tidegate.eventlog.interface import Broker, Record, WriteFailedError
from tidegate.executor import results, sender
from tidegate.executor.results import Spent
from tidegate.executor.sender import ResultSender

WAIT_S = 20.0

TASK = StepTask(
    type="run",
    run_id="run-1",
    step_id="a/1",
    attempt=2,
    account="acme",
    instance_id="me",
    incarnation=7,
    source=Position(partition=0, offset=1, index=0),
    result_partition=3,
    idempotency_key="k",
    call=Call(
        kind="tool", function="f", queue="q", arguments="{}", timeout_ms=1000, reserve_micros=500, idempotent=True
    ),
)


def test_a_success_costs_what_was_reported_or_declared():
    assert results.succeeded(TASK, "1", Spent(None, {}, 1, 2)).actual_micros == 500
    assert results.succeeded(TASK, "1", Spent(0, {}, 1, 2)).actual_micros == 0
    assert results.succeeded(TASK, "1", Spent(9, {"calls": 1}, 1, 2)).usage == {"calls": 1}


def test_a_failure_costs_what_was_reported():
    assert results.failed(TASK, "X", "m").actual_micros == 0
    assert results.failed(TASK, "X", "m", spent=Spent(9, {}, 1, 2)).actual_micros == 9
    assert results.timed_out(TASK, 1.0, Spent(None, {}, 1, 2)).actual_micros == 0


def test_a_result_that_cannot_be_written_is_answered_as_a_failure():
    record = results.to_record(TASK, results.succeeded(TASK, "1", Spent(2**70, {}, 1, 2)))
    answered = codec.decode(record.value)
    assert (answered.outcome, answered.error_class, answered.retryable) == ("failed", "BadResult", False)
    assert record.key == b"run-1:a/1:2:failed"


def test_a_timeout_is_repeated_only_if_that_is_harmless():
    assert results.timed_out(TASK, 1.0, results.NOTHING_SPENT).retryable
    call = msgspec.structs.replace(TASK.call, idempotent=False)
    dangerous = results.timed_out(msgspec.structs.replace(TASK, call=call), 1.5, results.NOTHING_SPENT)
    assert not dangerous.retryable
    assert dangerous.error_message == "not finished after 1.5 s; it may have had its effect, and is not idempotent"


@pytest.mark.parametrize(
    ("result", "outcome", "retryable"),
    [
        (results.busy(TASK), "busy", True),
        (results.released(TASK), "released", True),
        (results.cancelled(TASK, results.NOTHING_SPENT), "cancelled", False),
        (results.failed(TASK, "X", "m", retryable=False), "failed", False),
    ],
)
def test_every_answer_names_its_placement(result, outcome, retryable):
    assert (result.outcome, result.retryable, result.output) == (outcome, retryable, "")
    assert (result.run_id, result.step_id, result.attempt) == ("run-1", "a/1", 2)
    assert (result.instance_id, result.incarnation, result.account) == ("me", 7, "acme")


def test_the_record_goes_where_the_task_says():
    result = results.failed(TASK, "X", "half \ud800 a pair" + "!" * 5000)
    record = results.to_record(TASK, result)
    assert (record.topic, record.partition, record.key) == ("step-results", 3, b"run-1:a/1:2:failed")
    assert record.headers == (("type", b"StepResult"),)
    back = codec.decode(record.value)
    assert isinstance(back, StepResult)
    assert back == result
    assert len(back.error_message) == results.MAX_MESSAGE_CHARACTERS


class FailingWriter:
    """A writer as the interface describes it, of which some fail: at `send`, or before the acknowledgement."""

    def __init__(self, written: list[bytes], fails_at: str) -> None:
        self._written = written
        self._fails_at = fails_at
        self._waiting = []

    def send(self, record, acked=None):
        if self._fails_at == "send":
            raise WriteFailedError("refused")
        if self._fails_at == "mistake":
            raise LookupError("of ours: but without its thread, nothing would be answered any more")
        self._waiting.append((record, acked))

    def poll(self):
        if self._fails_at == "poll" and self._waiting:
            self._written.append(self._waiting[0][0].key)  # written all the same, but never acknowledged
            raise WriteFailedError("fenced")
        for record, acked in self._waiting:
            self._written.append(record.key)
            acked(len(self._written))
        self._waiting.clear()

    def close(self):
        pass


class FailingBroker:
    def __init__(self, *fails_at: str) -> None:
        self.written: list[bytes] = []
        self.writers = 0
        self._fails_at = list(fails_at)

    def writer(self):
        self.writers += 1
        return FailingWriter(self.written, self._fails_at.pop(0) if self._fails_at else "never")


@pytest.fixture(autouse=True)
def _retry_soon(monkeypatch):
    monkeypatch.setattr(sender, "RETRY_WAIT_S", 0.01)


def send_three(broker: Broker, failures: list[str]) -> tuple[ResultSender, list[int]]:
    made = ResultSender(broker, failures.append)
    acked: list[int] = []
    for number in range(3):
        made.send(Record("step-results", 0, b"%d" % number, b"x"), lambda number=number: acked.append(number))
    made.start()
    return made, acked


@pytest.mark.parametrize("fails_at", [[], ["send"], ["poll", "send", "poll"], ["mistake"]])
def test_everything_is_sent_until_it_is_acknowledged(fails_at):
    broker, failures = FailingBroker(*fails_at), []
    made, acked = send_three(broker, failures)
    assert made.flush(WAIT_S)
    made.stop()
    assert acked == [0, 1, 2]
    assert set(broker.written) == {b"0", b"1", b"2"}
    assert broker.writers == len(fails_at) + 1
    assert failures == []


def test_a_log_that_refuses_for_good_is_reported_once():
    failures: list[str] = []
    reported = threading.Event()

    class Failures(list[str]):
        def append(self, reason: str) -> None:
            failures.append(reason)
            reported.set()

    made, acked = send_three(FailingBroker(*["send"] * 1000), Failures())
    assert reported.wait(WAIT_S)
    assert not made.flush(0.05)
    made.stop()
    assert failures == ["results cannot be written: refused"]
    assert acked == []
