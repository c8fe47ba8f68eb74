"""Bad input of every kind, on a whole system: what is wrong becomes a dead letter and a clear answer, and all goes on."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

from support.stack import WholeStack, eventually
from tidegate import codec
from tidegate.domain import canonical
from tidegate.domain.entry import Position
from tidegate.domain.identity import partition_of
from tidegate.domain.messages import GateRequest, RunCommand, StepResult, WorkflowPublished
from tidegate.domain.requests import RunRequest
from tidegate.sdk.client import Run

MEGABYTE = 1024 * 1024


def new_id(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:8]}"


def start(run_id: str, workflow: str = "chain", run_input: Any = 1, **fields: Any) -> dict[str, Any]:
    return {"run_id": run_id, "workflow": workflow, "input": run_input, **fields}


def avro(record: Any) -> bytes:
    return codec.encode(record)


NOT_REQUESTS = {
    "empty": (b"", "malformed"),
    "cut off": (b'{"workflow": "chain", ', "malformed"),
    "not utf-8": (b'{"workflow": "\xff\xfe"}', "malformed"),
    "binary": (bytes(range(256)), "malformed"),
    "a key twice": (b'{"workflow": "chain", "workflow": "checked"}', "malformed"),
    "NaN": (b'{"workflow": "chain", "input": NaN}', "malformed"),
    "half a surrogate": (b'{"workflow": "chain", "input": "\\ud800"}', "malformed"),
    "very deep": (b'{"workflow": "chain", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed"),
    "a huge number": (b'{"workflow": "chain", "input": ' + b"9" * 100_000 + b"}", "malformed"),
    "a list": (b"[1, 2]", "invalid"),
    "null": (b"null", "invalid"),
    "unknown type": (b'{"type": "explode", "run_id": "x"}', "invalid"),
    "unknown field": (b'{"workflow": "chain", "inputs": 1}', "invalid"),
    "no workflow": (b'{"input": 1}', "invalid"),
    "workflow and agent": (b'{"workflow": "chain", "agent": "confused"}', "invalid"),
    "bad run id": (b'{"workflow": "chain", "run_id": "a:b/c"}', "invalid"),
    "negative budget": (b'{"workflow": "chain", "budget_micros": -1}', "invalid"),
    "budget as text": (b'{"workflow": "chain", "budget_micros": "10"}', "invalid"),
    "bad account": (b'{"workflow": "chain", "account": "//"}', "invalid"),
    "cancel of nothing": (b'{"type": "cancel"}', "invalid"),
    "avro of an unknown schema": (b"\xc3\x01" + bytes(8) + b"what", "malformed"),
    "avro without a body": (b"\xc3\x01", "malformed"),
    "avro cut off": (avro(RunRequest(workflow="chain"))[:-5], "malformed"),
    "avro of another record": (
        avro(StepResult(run_id="r", step_id="s", attempt=1, account="", instance_id="", incarnation=0, outcome="busy")),
        "malformed",
    ),
    "avro with input that is not JSON": (avro(RunRequest(workflow="chain", input="{")), "invalid"),
}


@pytest.mark.feature("G1")
@pytest.mark.parametrize("case", NOT_REQUESTS)
def test_what_is_no_request_becomes_a_dead_letter(whole: WholeStack, case: str) -> None:
    value, code = NOT_REQUESTS[case]
    source = whole.produce("run-requests", value, key=b"any key \xff", headers=[("trace", b"\x00\xff")])
    letter = whole.letter(source)
    assert letter.code == code
    assert letter.reason
    assert letter.original == value[: len(letter.original)]
    assert letter.original_size == len(value)
    assert len(letter.original) == min(len(value), 256 * 1024)
    assert letter.original_key == b"any key \xff"
    assert letter.headers == {"trace": b"\x00\xff"}


@pytest.mark.feature("G1")
@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"workflow": "nothing"}, "unknown_workflow", "nothing"),
        ({"workflow": "chain@99"}, "unknown_workflow", "chain@99"),
        ({"agent": "nobody"}, "unknown_workflow", "agent:nobody"),
        ({"workflow": "checked", "input": -1}, "invalid_input", "minimum"),
        ({"workflow": "checked", "input": {"n": 1}}, "invalid_input", "integer"),
        ({"workflow": "chain", "tags": {"": "x"}}, "invalid", "tag"),
    ],
    ids=["workflow", "version", "agent", "below the minimum", "wrong type", "tag"],
)
def test_a_start_that_cannot_be_is_answered_to_whoever_waits(
    whole: WholeStack, fields: dict[str, Any], code: str, says: str
) -> None:
    run_id = new_id("wrong")
    source = whole.request({"run_id": run_id, **fields})
    run = whole.wait(run_id)
    assert (run.status, run.code) == ("refused", code)
    assert says in run.reason
    letter = whole.letter(source)
    assert (letter.code, letter.run_id) == (code, run_id)
    assert json.loads(letter.original)["run_id"] == run_id
    assert not whole.entered(run_id)


@pytest.mark.feature("G1")
def test_a_definition_with_an_unknown_function_starts_nothing(whole: WholeStack) -> None:
    """The client would not publish it; somebody's own producer does."""
    name = new_id("broken").replace("-", "_")
    definition = {
        "name": name,
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "no_such"}},
        "edges": [["a", "b"]],
        "functions": {},
    }
    text = canonical.dumps(definition)
    row = WorkflowPublished(
        name=name, version="1", definition_hash=canonical.digest(text), definition=text, by="x", at_ms=0
    )
    whole.produce("workflows", codec.encode(row), key=f"{name}@1".encode())
    run_id = new_id("unknown-function")
    whole.request(start(run_id, name))
    run = whole.wait(run_id)
    assert (run.status, run.code) == ("refused", "invalid_definition")
    assert "no_such" in run.reason
    assert "a -> b" in run.reason


@pytest.mark.feature("P6")
def test_a_function_that_nobody_offers_waits_and_can_be_cancelled(whole: WholeStack) -> None:
    run_id = whole.client.start("never", run_id=new_id("nobody"))
    whole.until(run_id, "StepReady")
    whole.client.cancel(run_id, reason="nobody will ever come")
    run = whole.wait(run_id)
    assert run.status == "cancelled"
    assert run.reason == "nobody will ever come"


@pytest.mark.feature("D6")
def test_a_request_of_ten_megabytes_is_refused_and_its_run_is_told(whole: WholeStack) -> None:
    run_id = new_id("large")
    source = whole.request(start(run_id, run_input="x" * (10 * MEGABYTE)))
    run = whole.wait(run_id)
    assert (run.status, run.code) == ("refused", "too_large")
    letter = whole.letter(source)
    assert letter.original_size > 10 * MEGABYTE
    assert len(letter.original) < MEGABYTE


def test_a_request_whose_key_fills_a_record_does_not_burst_its_dead_letter(whole: WholeStack) -> None:
    source = whole.produce("run-requests", b"{", key=b"k" * (16 * MEGABYTE - 200))
    assert whole.letter(source).code == "malformed"


def test_a_request_whose_headers_fill_a_record_does_not_burst_its_dead_letter(whole: WholeStack) -> None:
    source = whole.produce("run-requests", b"{", headers=[("h", b"h" * (16 * MEGABYTE - 200))])
    assert whole.letter(source).code == "malformed"


@pytest.mark.feature("O3")
def test_the_same_start_again_changes_nothing_and_another_under_its_id_is_refused(whole: WholeStack) -> None:
    run_id = new_id("twice")
    whole.request(start(run_id), partition=0)
    whole.request(start(run_id), partition=1)
    whole.produce("run-requests", avro(RunRequest(run_id=run_id, workflow="chain", input=" 1 ")), partition=2)
    other = whole.request(start(run_id, run_input=2), partition=0)
    assert whole.wait(run_id).output == {"n": 4}
    letter = whole.letter(other)
    assert (letter.code, letter.run_id) == ("duplicate_run_id", run_id)
    again = whole.request(start(run_id, run_input=3))
    assert whole.letter(again).code == "duplicate_run_id"
    types = whole.types(run_id)
    assert types.count("RunStarted") == types.count("RunFinished") == 1
    assert types.count("CommandRefused") == 2
    assert len(whole.entered(run_id)) == 3


@pytest.mark.feature("O3")
def test_a_refused_start_keeps_its_id_and_a_good_one_under_it_is_refused(whole: WholeStack) -> None:
    run_id = new_id("refused")
    whole.request(start(run_id, "nothing"))
    assert whole.wait(run_id).status == "refused"
    later = whole.request(start(run_id))
    assert whole.letter(later).code == "duplicate_run_id"
    assert not whole.entered(run_id)


@pytest.mark.feature("D4")
@pytest.mark.parametrize("kind", ["cancel", "approve", "reject"])
def test_commands_to_nobody_and_to_the_dead_are_answered(whole: WholeStack, kind: str) -> None:
    ghost = new_id("ghost")
    source = whole.request({"type": kind, "run_id": ghost})
    assert whole.letter(source).code == "unknown_run"
    assert whole.types(ghost) == ["CommandRefused"]
    run_id = whole.client.start("chain", 1, run_id=new_id("over"))
    assert whole.wait(run_id).status == "succeeded"
    source = whole.request({"type": kind, "run_id": run_id, "by": "ann"})
    letter = whole.letter(source)
    assert (letter.code, letter.run_id) == ("run_is_over", run_id)
    assert whole.client.get(run_id).status == "succeeded"


def test_a_run_may_begin_under_an_id_that_got_a_command_too_early(whole: WholeStack) -> None:
    run_id = new_id("early")
    whole.letter(whole.request({"type": "cancel", "run_id": run_id}))
    whole.request(start(run_id))
    assert whole.wait(run_id).status == "succeeded"


@pytest.mark.feature("D4")
def test_a_command_of_one_name_counts_once(whole: WholeStack) -> None:
    run_id = whole.client.start("wait_here", 30.0, run_id=new_id("once"))
    whole.until(run_id, "AttemptDispatched")
    for partition in range(3):
        whole.request({"type": "cancel", "run_id": run_id, "command_id": "the-same"}, partition=partition)
    assert whole.wait(run_id).status == "cancelled"
    last = whole.request({"type": "cancel", "run_id": run_id})
    assert whole.letter(last).code == "run_is_over"
    assert whole.types(run_id).count("RunCancelRequested") == 1
    eventually(lambda: "ResultIgnored" in whole.types(run_id), "the abortion's report")
    assert whole.types(run_id).count("CommandRefused") == 1


@pytest.mark.feature("O3")
def test_avro_and_json_are_the_same_request(whole: WholeStack) -> None:
    run_id = new_id("avro")
    request = RunRequest(run_id=run_id, workflow="chain", input="20", account="acme/avro", tags={"form": "avro"})
    whole.produce("run-requests", avro(request))
    run = whole.wait(run_id)
    assert (run.status, run.output, run.account) == ("succeeded", {"n": 42}, "acme/avro")


def test_the_broker_refuses_a_request_without_a_key(whole: WholeStack) -> None:
    """A plain producer that sets none hears it at once: nothing is lost silently."""
    with pytest.raises(AssertionError, match="INVALID_RECORD"):
        whole.produce("run-requests", b'{"workflow": "chain"}', key=None)


def test_requests_may_lie_in_any_partition_under_any_key(whole: WholeStack) -> None:
    runs = [new_id("anywhere") for _ in range(12)]
    for number, run_id in enumerate(runs):
        whole.request(start(run_id), key=bytes([number, 0xFF]), partition=number % whole.counts["run-requests"])
    assert {whole.wait(run_id).status for run_id in runs} == {"succeeded"}


def test_a_request_without_a_run_id_gets_one_from_its_place(whole: WholeStack) -> None:
    source = whole.request({"workflow": "chain", "input": 5})
    assert whole.wait(source.replace(":", "-")).output == {"n": 12}


def test_tombstones_are_passed_over_everywhere(whole: WholeStack) -> None:
    run_id = new_id("tombstone")
    for partition in range(whole.counts["run-requests"]):
        whole.produce("run-requests", None, partition=partition)
    for topic in ("run-commands", "gate-decisions", "step-results"):
        whole.produce(topic, None, partition=whole.partition(run_id))
    whole.produce("gate-requests", None, partition=account_partition(whole))
    whole.produce("step-tasks.default", None, partition=tasks_partition(whole))
    for table in ("workflows", "policies", "instances", "controls"):
        whole.produce(table, None, key=b"never-there", partition=0)
    whole.request(start(run_id))
    assert whole.wait(run_id).status == "succeeded"


# --- inside: what no service of ours would write ---------------------------------------------------------------


def account_partition(whole: WholeStack, root: str = "default") -> int:
    return partition_of(root, whole.counts["gate-requests"])


def tasks_partition(whole: WholeStack) -> int:
    found = whole.broker.describe(["step-tasks.default"])["step-tasks.default"]
    return partition_of("executor-default-0", found.partition_count)


def wrong_records(run_id: str) -> dict[str, bytes]:
    """What may lie in a mailbox by somebody's mistake; none of it belongs there."""
    elsewhere = "another-" + run_id
    return {
        "garbage": b"\x00garbage\xff",
        "json": b'{"run_id": "x"}',
        "cut off": avro(RunRequest(workflow="chain"))[:-3],
        "workflow": avro(WorkflowPublished(name="x", version="1", definition_hash="", definition="{}", by="", at_ms=0)),
        "command of no type": avro(
            RunCommand(run_id=run_id, command_id="c", type="dance", source="t:0:0", content_hash="", original=b"?")
        ),
        "result of a run elsewhere": avro(
            StepResult(
                run_id=elsewhere, step_id="s", attempt=1, account="", instance_id="", incarnation=0, outcome="busy"
            )
        ),
        "request of an account elsewhere": avro(
            GateRequest(run_id=run_id, account="elsewhere/far", source=Position(0, 0, 0), items=())
        ),
    }


@pytest.mark.parametrize("topic", ["run-commands", "gate-requests", "gate-decisions", "step-results"])
def test_garbage_in_a_mailbox_is_kept_for_people_and_blocks_nothing(whole: WholeStack, topic: str) -> None:
    run_id = new_id("garbage")
    partition = account_partition(whole) if topic == "gate-requests" else whole.partition(run_id)
    records = wrong_records(run_id)
    if topic == "run-commands":
        del records["command of no type"]  # not garbage there: the run answers it, see below
    sources = {name: whole.produce(topic, value, partition=partition) for name, value in records.items()}
    whole.request(start(run_id))
    assert whole.wait(run_id).status == "succeeded"
    for name in ("garbage", "json", "cut off"):
        letter = whole.letter(sources[name])
        assert (letter.code, letter.original) == ("malformed", records[name])
    assert whole.letter(sources["workflow"]).code == "malformed"


def test_a_command_of_an_unknown_type_is_refused_by_the_run(whole: WholeStack) -> None:
    run_id = new_id("dance")
    record = wrong_records(run_id)["command of no type"]
    whole.produce("run-commands", record, partition=whole.partition(run_id))
    whole.letter("t:0:0")
    assert whole.types(run_id) == ["CommandRefused"]


def test_garbage_among_the_tasks_does_not_stop_the_executor(whole: WholeStack) -> None:
    for value in wrong_records("x").values():
        whole.produce("step-tasks.default", value, partition=tasks_partition(whole))
    run = whole.client.run("chain", 1, run_id=new_id("tasks"), timeout_s=180)
    assert run.status == "succeeded"


def put_garbage(whole: WholeStack, table: str, own_key: bytes) -> list[bytes]:
    """Write what is no row under keys of rows and of nothing; returns the keys."""
    keys = [b"", b"\xff\xfe", own_key, b"confused@9"]
    for value in wrong_records("x").values():
        if table == "workflows" and codec_name(value) == "WorkflowPublished":
            continue  # an administrator's own record, not garbage
        for key in keys:
            whole.produce(table, value, key=key, partition=0)
    return keys


@pytest.mark.parametrize(("table", "key"), [("workflows", b"chain@1"), ("instances", b"executor-default-0")])
def test_garbage_in_a_table_leaves_what_is_there_in_force(whole: WholeStack, table: str, key: bytes) -> None:
    put_garbage(whole, table, key)
    run = whole.client.run("chain", 1, run_id=new_id("tables"), timeout_s=180)
    assert run.status == "succeeded"
    refused = whole.client.run("confused@9", run_id=new_id("tables"), timeout_s=180)
    assert refused.code == "unknown_workflow"


def test_garbage_where_no_policy_was_denies_until_it_is_removed(whole: WholeStack) -> None:
    keys = put_garbage(whole, "policies", b"garbage")

    def run() -> Run:
        return whole.client.run("chain", 1, run_id=new_id("tables"), timeout_s=180)

    denied = eventually(lambda: next((made for made in [run()] if made.status != "succeeded"), None), "a denial")
    assert (denied.status, denied.code) == ("failed", "denied")
    assert "cannot be read" in denied.reason
    for key in keys:
        whole.produce("policies", None, key=key, partition=0)
    eventually(lambda: run().status == "succeeded", "runs that nobody denies")


def test_garbage_under_the_key_of_a_queue_holds_it_until_it_is_removed(whole: WholeStack) -> None:
    keys = put_garbage(whole, "controls", b"default")
    started = new_id("tables")
    whole.client.start("chain", 1, run_id=started)
    for key in keys:
        whole.produce("controls", None, key=key, partition=0)
    assert whole.wait(started).status == "succeeded"


def codec_name(value: bytes) -> str:
    try:
        return type(codec.decode(value)).__name__
    except codec.DecodeError:
        return ""


def forged(run_id: str, step_id: str, attempt: int, **fields: Any) -> bytes:
    whose = {"account": "default", "instance_id": "executor-default-0", "incarnation": 10**6} | fields
    return avro(
        StepResult(
            run_id=run_id,
            step_id=step_id,
            attempt=attempt,
            outcome="succeeded",
            output='"forged"',
            actual_micros=9_999,
            **whose,
        )
    )


@pytest.mark.feature("D1")
def test_results_that_nobody_was_asked_for_change_nothing(whole: WholeStack) -> None:
    run_id = whole.client.start("wait_here", 1.5, run_id=new_id("forged"), budget_micros=100)
    whole.until(run_id, "AttemptDispatched")
    partition = whole.partition(run_id)
    for value in (
        forged(run_id, "it", 1),  # of another incarnation
        forged(run_id, "it", 1, instance_id="executor-elsewhere-0"),
        forged(run_id, "it", 2),  # of an attempt that never was
        forged(run_id, "it", 0),
        forged(run_id, "it", -1),
        forged(run_id, "no-such-step", 1),
        forged(new_id("no-such-run"), "it", 1),
    ):
        whole.produce("step-results", value, partition=partition)
    run = whole.wait(run_id)
    assert (run.status, run.output) == ("succeeded", "done")
    assert run.spent_micros == 40
    assert whole.types(run_id).count("ResultIgnored") == 0


@pytest.mark.feature("P4")
def test_a_forged_result_does_not_stand_in_for_an_approval(whole: WholeStack, ask_policy: str) -> None:
    run_id = whole.client.start("chain", 1, run_id=new_id("forged-approval"), account=f"{ask_policy}/x")
    assert whole.wait(run_id).status == "waiting"
    whole.produce("step-results", forged(run_id, "two", 1), partition=whole.partition(run_id))
    whole.client.approve(run_id, reason="it may")
    run = whole.wait(run_id)
    assert (run.status, run.output) == ("succeeded", {"n": 4})
