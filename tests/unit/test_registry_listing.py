"""What `tidegate instances` and `tidegate functions` say of the rows of `instances`."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate import App
from tidegate.domain.messages import FunctionDetail, Instance
from tidegate.registry.listing import MAX_DETAILS_BYTES, bounded, functions, instances
from tidegate.sdk.app import details_of

NOW_MS = 1_000_000


def row(name: str, **fields: Any) -> Instance:
    usual: dict[str, Any] = {
        "instance_id": name,
        "service": "executor",
        "incarnation": 7,
        "state": "ready",
        "host": "h",
        "boot_id": "b",
        "pid": 1,
        "pid_started": 0.0,
        "started_ms": 0,
        "at_ms": NOW_MS - 500,
        "queue": "default",
        "slots": 4,
        "free_slots": 3,
    }
    return Instance(**(usual | fields))


def details(version: str) -> tuple[FunctionDetail, ...]:
    return (FunctionDetail(name="step:a", version=version, description="Adds."),)


ROWS = {
    "ex-0": row("ex-0", functions=("step:a",), details=details("v1")),
    "ex-1": row("ex-1", functions=("step:a",), details=details("v1"), state="draining"),
    "ex-2": row("ex-2", functions=("step:a", "tool:b"), details=details("v2")),
    "dead": row("dead", functions=("step:c",), at_ms=NOW_MS - 60_000),
    "left": row("left", functions=("step:d",), state="gone"),
    "gate-0": row("gate-0", service="gate", queue="", incarnation=-1),
}


@pytest.mark.feature("P7")
def test_instances_have_a_lifecycle() -> None:
    lines = instances(ROWS, {"gate-0": 12}, NOW_MS)
    assert [(line["instance_id"], line["state"]) for line in lines] == [
        ("ex-0", "registered"),
        ("ex-1", "draining"),
        ("ex-2", "registered"),
        ("gate-0", "registered"),
    ]
    assert (lines[0]["heard_ms_ago"], lines[0]["free_slots"], lines[-1]["incarnation"]) == (500, 3, 12)
    everybody = {line["instance_id"]: line["state"] for line in instances(ROWS, {}, NOW_MS, everybody=True)}
    assert (everybody["dead"], everybody["left"]) == ("silent", "gone")


@pytest.mark.feature("P7")
def test_functions_are_listed_by_queue_and_version_with_who_offers_them() -> None:
    lines = functions(ROWS, NOW_MS)
    assert [(line["function"], line["version"], line["instances"], line["slots"]) for line in lines] == [
        ("a", "v1", ["ex-0", "ex-1"], 4),  # one that drains takes nothing new
        ("a", "v2", ["ex-2"], 4),
        ("b", "", ["ex-2"], 4),
    ]
    assert {line["function"]: line["state"] for line in functions(ROWS, NOW_MS, everybody=True)} == {
        "a": "registered",
        "b": "registered",
        "c": "silent",
        "d": "gone",
    }


@pytest.mark.feature("P7")
def test_an_executor_says_what_its_functions_take_and_which_version_they_are() -> None:
    def one(cost: int) -> FunctionDetail:
        app = App("x")

        @app.tool(cost_micros=cost)
        def look(order: str) -> str:
            """Look an order up."""
            return order

        (detail,) = details_of(app)
        return detail

    assert (one(1).name, one(1).description) == ("tool:look", "Look an order up.")
    assert '"order"' in one(1).schema
    assert one(1) == one(1)
    assert one(1).version != one(2).version


def test_what_heartbeats_repeat_is_bounded() -> None:
    many = tuple(
        FunctionDetail(name=f"tool:f{n}", version="v", description="d" * 1000, schema="s" * 3000) for n in range(200)
    )
    found = bounded(many)
    assert [detail.name for detail in found] == [detail.name for detail in many]
    assert found[0].schema
    assert sum(len(detail.description + detail.schema) for detail in found) <= MAX_DETAILS_BYTES
