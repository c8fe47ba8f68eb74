"""What the scheduler tells the gate of one entry."""

from tidegate.domain import run_events as ev
from tidegate.domain.entry import Entry, Position
from tidegate.domain.messages import Authorise, Call, CloseRun, GateRequest, Void
from tidegate.scheduler.tells import tells


def told_of(*events: ev.RunEvent) -> list[object]:
    entry = Entry(
        subject="r",
        account="acme",
        first_seq=1,
        epoch=0,
        now_ms=0,
        prev_hash=b"",
        inputs={},
        marks={},
        told=0,
        tables={},
        cause="",
        events=events,
    )
    (tell,) = tells(entry, lambda index: Position(0, 0, index), 1, 1)
    assert isinstance(tell.record, GateRequest)
    return list(tell.record.items)


def ready(step_id: str) -> ev.StepReady:
    call = Call(kind="step", function="f", queue="q", arguments="1", timeout_ms=1, reserve_micros=0, idempotent=True)
    return ev.StepReady(step_id=step_id, node_id=step_id, wave=0, call=call)


END = ev.RunFinished(status="failed", output="", code="", reason="", fingerprint="")


def test_what_one_entry_asks_for_and_cancels_is_never_asked_for() -> None:
    # One answer of the gate may end several steps: what the first lets begin, the last takes back.
    items = told_of(ready("a"), ready("b"), ev.StepCancelled(step_id="a", attempt=1), END)
    assert [type(item) for item in items] == [Authorise, CloseRun]
    assert items[0].step_id == "b"  # type: ignore[attr-defined]


def test_what_was_asked_for_before_is_taken_back() -> None:
    items = told_of(ready("b"), ev.StepCancelled(step_id="a", attempt=1), END)
    assert [type(item) for item in items] == [Authorise, Void, CloseRun]
