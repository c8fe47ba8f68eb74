"""What must not happen to flows, on a whole system whose scheduler and executor are killed while one is under way."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from support.fault_app import app
from support.stack import WAIT_S, WholeStack, assert_whole
from tidegate.cli import drawing


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeStack]:
    with WholeStack(tmp_path_factory.mktemp("flows")) as stack:
        stack.client.publish([app.flow_definition(name) for name in ("errands", "papers")])
        yield stack
        assert_whole(stack)


@pytest.mark.kafka
@pytest.mark.feature("T6")
def test_a_flow_goes_on_where_it_was_and_its_log_says_where_values_come_from(whole: WholeStack) -> None:
    run_id = f"errands-{uuid.uuid4().hex[:8]}"
    whole.client.start("errands", 1, run_id=run_id)
    whole.until(run_id, "GraphChangeAccepted", 2)  # the second turn has made its calls
    whole.kill("scheduler-0")
    run = whole.wait(run_id)
    assert run.status == "succeeded", run.reason
    assert run.output == {"value": 6, "parents": ["errands/one", "errands/one#2"]}
    # No call was made twice, and what a turn plays again has no effect.
    assert sorted(line.step_id for line in whole.entered(run_id)) == [
        "errands/one",
        "errands/one#2",
        "errands/one#3",
        "errands/wait_here",
    ]
    # No edge is lost: what was merged is a parent.
    edges = [event.data.change for event in whole.events(run_id) if event.type == "GraphChangeProposed"]
    assert '["errands/one#2","errands/one#3"]' in edges[-1]
    assert '["errands/one","errands/one#3"]' in edges[-1]
    # The picture of the run has its calls, the definition that it goes by has not.
    picture = drawing.dot(whole.client.graph(run_id, calls=True)).splitlines()
    assert '    "errands/wait_here" [label="errands/wait_here\\nwait_here", shape=box];' in picture
    assert '    "errands" -> "errands/one";' in picture
    assert '    "errands/one#2" -> "errands/one#3";' in picture
    assert list(whole.client.graph(run_id)["nodes"]) == ["errands"]


@pytest.mark.kafka
@pytest.mark.feature("T6")
@pytest.mark.feature("D3")
def test_calls_of_every_kind_are_made_once_whoever_is_killed(whole: WholeStack) -> None:
    run_id = f"papers-{uuid.uuid4().hex[:8]}"
    whole.client.start("papers", 3, run_id=run_id)
    whole.until(run_id, "WaitStarted", 2)  # the sleep, and the question
    whole.kill("scheduler-0")
    whole.client.respond(run_id, 5)
    whole.until(run_id, "ChildEnded")
    whole.kill("executor-default-0")
    whole.client.signal(run_id, "paid", {"amount": 7}, key="3")
    run = whole.wait(run_id)
    assert [(wait.step_id, wait.arguments) for wait in run.waits] == [("papers/order_tea", {"grams": 6})], run.reason
    for name in ("scheduler-0", "gate-0"):
        whole.kill(name)
    whole.client.respond(run_id, "ordered", step_id="papers/order_tea")
    run = next(run for run, _ in whole.client.follow(run_id, WAIT_S) if run.is_over)
    assert run.status == "succeeded", run.reason
    assert run.output["tea"] == "ordered"
    paid = [event.data for event in whole.events(run_id) if event.type == "StepSucceeded"]
    assert [step.actual_micros for step in paid if step.step_id == "papers/order_tea"] == [40]
    # The log says which code did what was done here, and of nothing else.
    code = app.functions["one"].file_version
    assert code
    assert {step.step_id for step in paid if step.code_version != code} == {
        "papers/sleep",
        "papers/ask",
        "papers/wait_event",
        "papers/order_tea",
    }
    (child,) = (event.data for event in whole.events(run_id) if event.type == "ChildStarted")
    assert run.output["more"] == whole.client.get(child.child_run_id).output
    assert run.output["paid"] == {"amount": 7}
    assert run.output["missing"] == "papers/wait_event#2"
    assert {line.step_id for line in whole.entered(run_id)} == {
        "papers/confused/1",
        "papers/confused/1/tool:look",
        "papers/confused/2",
        "papers/look",
        "papers/one",
    }
    begun = ("WaitStarted", "ChildStarted", "StepReady")
    events = [event.data for event in whole.events(run_id) if event.type in begun]
    # A call of an outside tool is ready first, and waits when the gate has let it through.
    started = [event.step_id for event in events if getattr(event, "kind", "") != "outside"]
    assert len(started) == len(set(started))
