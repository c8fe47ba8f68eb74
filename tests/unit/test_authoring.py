"""The examples of docs/authoring.md and docs/flows.md: they run, and give what the pages say."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from support.pure import Pair
from tidegate import App, Graph, NonRetryable, functions_of
from tidegate.domain import canonical
from tidegate.domain.messages import StepTask
from tidegate.domain.run import RunState
from tidegate.domain.workflow import validate_definition, with_children
from tidegate.sdk import json_form
from tidegate.sdk.errors import BadArgumentsError
from tidegate.sdk.plan import given_by, plan_of
from tidegate.sdk.testkit import step_context

DOCS = Path(__file__).parents[2] / "docs"
PAGE = "\n".join((DOCS / name).read_text(encoding="utf-8") for name in ("authoring.md", "flows.md"))
CLAIM = re.compile(r"^`(\w+)` with `(.+?)` (gives|fails with|is refused with) `(.+?)`[.;]", re.MULTILINE)


class Claim(NamedTuple):
    graph: str
    input: str
    kind: str
    result: str


CLAIMS = [Claim(*found) for found in CLAIM.findall(PAGE)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """Return the definitions of the page by name, and its app."""
    names: dict[str, Any] = {}
    exec("\n".join(blocks("python")), names)  # noqa: S102 - our own page
    app: App = names["app"]
    found = {name: app.definition(graph) for name, graph in names.items() if isinstance(graph, Graph)}
    flows = [name for name, function in app.functions.items() if function.kind == "flow"]
    found |= {name: app.flow_definition(name) for name in flows}
    for text in blocks("yaml"):
        definition = app.completed(yaml.safe_load(text))
        found[definition["name"]] = with_children([definition, *found.values()])[0]
    return {"app": app, **found}


def call(app: App, p: Pair, task: StepTask) -> None:
    """Do a task as an executor would."""
    assert task.call is not None
    function = app.functions[task.call.function]
    try:
        bound = function.binder.bind(task.call.arguments)
        with step_context(task.run_id, task.step_id):
            value = function.call(*bound.args, **bound.kwargs)
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
    except Exception as error:
        retryable = not isinstance(error, BadArgumentsError | NonRetryable)
        p.answer(task, "failed", error_class=type(error).__name__, error_message=str(error), retryable=retryable)
        return
    given = given_by(value)
    if task.call.kind == "agent":
        p.answer(task, value=plan_of(value).to_json(), change=given.change)
    else:
        p.answer(task, value=json_form.to_json(given.output), goto=given.goto, change=given.change)


def run(app: App, definition: dict[str, Any], value: Any) -> RunState:
    p = Pair(functions=tuple(functions_of(app)))
    p.start("r", definition, value)
    for _ in range(1000):
        if p.tasks:
            task = p.tasks.popleft()
            if task.type == "run":
                call(app, p, task)
        elif (due := p.scheduler.next_due_ms(p.runs)) is not None:
            p.pass_time_with_heartbeats(due - p.now_ms)
        else:
            break
    return p.run("r")


@pytest.mark.feature("G1")
@pytest.mark.feature("G2")
@pytest.mark.feature("G4")
@pytest.mark.feature("G5")
@pytest.mark.feature("G6")
@pytest.mark.feature("T6")
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.graph} {claim.input}")
def test_what_the_page_says_is_so(examples: dict[str, Any], claim: Claim) -> None:
    definition = examples[claim.graph]
    assert validate_definition(definition) == []
    found = run(examples["app"], definition, json.loads(claim.input))
    if claim.kind == "gives":
        assert (found.status, found.reason) == ("succeeded", "")
        assert canonical.loads(found.output) == json.loads(claim.result)
    else:
        status = "failed" if claim.kind == "fails with" else "refused"
        assert (found.status, found.code) == (status, claim.result), found.reason


def test_every_example_is_run(examples: dict[str, Any]) -> None:
    shown = {claim.graph for claim in CLAIMS} | {"greet"}  # that one runs as a child
    assert examples.keys() - {"app"} == shown
