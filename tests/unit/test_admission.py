"""Admission never ends because of what somebody sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tidegate.domain.messages import RunCommand, WorkflowPublished
from tidegate.domain.workflow import Workflow
from tidegate.eventlog.interface import EventLogError, Message
from tidegate.scheduler import admit as admission
from tidegate.scheduler.admit import admit

DEFINITION = json.dumps(
    {
        "name": "w",
        "version": "1",
        "nodes": {"a": {"kind": "step", "function": "f"}},
        "functions": {"f": {"kind": "step"}},
        "input_schema": {"properties": {"price": {"multipleOf": 0.01}}},
    }
)


def published(_: str) -> WorkflowPublished:
    return WorkflowPublished(name="w", version="1", definition_hash="h", definition=DEFINITION, by="t", at_ms=0)


def admitted(request: dict[str, Any]) -> admission.Admitted:
    message = Message("run-requests", 2, 17, b"k", json.dumps(request).encode(), (), 1_000)
    return admit(message, published, 1_000, max_bytes=10_000, horizon_ms=1_000)


def test_an_input_that_its_schema_cannot_judge_is_refused() -> None:
    command, letter = admitted({"workflow": "w", "run_id": "r", "input": {"price": 10**400}})
    assert letter is not None
    assert letter.code == "invalid_input"
    assert isinstance(command, RunCommand)
    assert (command.type, command.run_id) == ("refuse", "r")


@pytest.mark.parametrize(("given", "run_id"), [({"run_id": "r"}, "r"), ({}, "run-requests-2-17")])
def test_a_defect_of_ours_is_an_answer_too(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], run_id: str) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Workflow, "input_problem", fail)
    command, letter = admitted({"workflow": "w", **given})
    assert letter is not None
    assert (letter.code, letter.run_id) == ("internal_error", run_id)
    assert "ZeroDivisionError: a defect" in letter.reason
    assert command is not None
    assert (command.type, command.run_id, command.code) == ("refuse", run_id, "internal_error")


def test_nobody_takes_the_id_of_a_request_that_names_none() -> None:
    command, letter = admitted({"workflow": "w", "run_id": "run-requests-0-100"})
    assert letter is not None
    assert letter.code == "invalid"
    assert "kept for requests that name none" in letter.reason
    assert command is None or command.type == "refuse"


def test_a_log_out_of_reach_is_no_fault_of_the_request() -> None:
    """The workflow could not be looked up: the process ends and reads the request again, nobody is refused."""

    def out_of_reach(_: str) -> WorkflowPublished | None:
        raise EventLogError("the broker does not answer")

    message = Message("run-requests", 2, 17, b"k", b'{"workflow": "w"}', (), 1_000)
    with pytest.raises(EventLogError):
        admit(message, out_of_reach, 1_000, max_bytes=10_000, horizon_ms=1_000)
