"""How the input of a step came about: which expression, reading what, gave which part of it. Read from a folded run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from tidegate.domain import canonical, expressions
from tidegate.domain import run_events as ev
from tidegate.domain.identity import agent_turn_step, visit_path
from tidegate.domain.run import RunState, StepState
from tidegate.domain.turns import is_tool_call
from tidegate.domain.workflow import Node, Workflow

_TOLD: Final = {"agent": ("history", "plans and tool calls"), "flow": ("turns", "calls and results")}


class BoundInput(NamedTuple):
    """A part of a step's input. part: where it stands in it, empty for all of it. expression: what gave it, empty if none did.
    sources: what that looked at, such as `input` or `nodes.look_up`. value: what it was.
    """

    part: str
    expression: str
    sources: tuple[str, ...]
    value: Any


def bound_inputs(run: RunState, step_id: str) -> list[BoundInput]:
    """Return how a step's input was bound, in the order of its template. Raises KeyError if the run has no such step."""
    step = run.steps[step_id]
    workflow = run.workflow
    assert workflow is not None  # noqa: S101 - a run that has steps has a workflow
    value = _arguments(run, step)
    if is_tool_call(step):
        return [BoundInput("", "", (f"the plan of {step_id.rpartition('/tool:')[0]}",), value)]
    node = workflow.document.nodes[step.node_id]
    told = _TOLD.get(step.call.kind)
    if told is not None and isinstance(value, dict):
        path, _, turn = step_id.rpartition("/")
        if turn != "1":
            name, what = told
            return [
                BoundInput("input", "", (f"input of {agent_turn_step(path, 1)}",), value.get("input")),
                BoundInput(name, "", (f"{what} of {path} before turn {turn}",), value.get(name)),
            ]
        value = value.get("input")
    if node.kind == "flow" and step.call.kind != "flow":
        said = value if step.wait is None or step.call.kind == "tool" else _settings(step.wait)
        return [BoundInput("", "", (f"the call in flow {node.function}",), said)]
    if step.wait is not None:
        return list(_of_wait(step.wait, node))
    return list(_of_node(run, workflow, step, node, value))


def _arguments(run: RunState, step: StepState) -> Any:
    """Return what a step was called with. Of a turn of a flow, which runs forget when another follows, that one has it."""
    value = canonical.loads(step.call.arguments)
    if step.call.kind != "flow" or isinstance(value, dict):
        return value
    path, _, turn = step.step_id.rpartition("/")
    number = int(turn)
    while not isinstance(value, dict):
        number += 1
        value = canonical.loads(run.steps[agent_turn_step(path, number)].call.arguments)
    return {**value, "turns": value["turns"][: int(turn) - 1]}


def _of_node(run: RunState, workflow: Workflow, step: StepState, node: Node, value: Any) -> Iterator[BoundInput]:
    if node.kind == "map" and node.over:
        over = expressions.source_of(node.over)
        if node.input is msgspec.UNSET:
            yield BoundInput("", over, (*_sources(over), "item"), value)
            return
        yield BoundInput("item", over, _sources(over), None)
    if node.input is not msgspec.UNSET:
        yield from _of_template(node.input, value, "")
        return
    yield BoundInput("", "", _default_sources(run, workflow, step), value)


def _default_sources(run: RunState, workflow: Workflow, step: StepState) -> tuple[str, ...]:
    """Return what a node gets that says nothing about its input."""
    state = run.nodes.get(step.node_id)
    visit = 1 if state is None else state.visit
    came_back = any(target == step.node_id for _, target in workflow.form.loops)
    if came_back and visit > 1 and step.step_id.startswith(visit_path(step.node_id, visit)):
        return tuple(f"nodes.{router}" for router, target in workflow.form.loops if target == step.node_id)
    before = workflow.predecessors[step.node_id]
    used = before if state is None or state.used is None else state.used
    return tuple(f"nodes.{name}" for name in used) or ("input",)


def _recorded(wait: ev.WaitStarted) -> dict[str, Any]:
    """Return the settings of a wait as they were bound."""
    return {
        "at": wait.due_ms if wait.after_ms is None else None,
        "seconds": None if wait.after_ms is None else wait.after_ms / 1000,
        "timeout_s": None if wait.timeout_ms is None else wait.timeout_ms / 1000,
        "timeout_value": canonical.loads(wait.timeout_value),
        "choices": list(wait.choices),
        "key": wait.key,
        "prompt": wait.prompt,
    }


def _settings(wait: ev.WaitStarted) -> dict[str, Any]:
    """Return what a wait that a flow called for was called with, as it was bound."""
    recorded = {"event": wait.event, **_recorded(wait)}
    return {name: value for name, value in recorded.items() if value not in (None, "", [])}


def _of_wait(wait: ev.WaitStarted, node: Node) -> Iterator[BoundInput]:
    """Yield what the settings of a wait were bound to; the recorded values are those of `WaitStarted`."""
    for name, value in _recorded(wait).items():
        yield from _of_template(getattr(node.wait, name), value, name)
    if node.input is not msgspec.UNSET:
        yield from _of_template(node.input, canonical.loads(wait.input), "input")


def _of_template(template: Any, value: Any, part: str) -> Iterator[BoundInput]:
    """Yield the expressions of a template with what each gave; constants are not shown, unless there is nothing else."""
    if isinstance(template, str):
        if expressions.is_expression(template):
            source = expressions.source_of(template)
            yield BoundInput(part, source, _sources(source), value)
        elif not part:
            yield BoundInput(part, "", ("the definition",), value)
    elif isinstance(template, dict):
        for name, inner in template.items():
            found = value.get(name) if isinstance(value, dict) else None
            yield from _of_template(inner, found, f"{part}.{name}" if part else name)
    elif isinstance(template, list | tuple):
        for number, inner in enumerate(template):
            found = value[number] if isinstance(value, list) and number < len(value) else None
            yield from _of_template(inner, found, f"{part}[{number}]")
    elif not part:
        yield BoundInput(part, "", ("the definition",), value)


def _sources(expression: str) -> tuple[str, ...]:
    """Return what an expression looks at, by its text."""
    nodes = expressions.nodes_read(expression)
    names = ["nodes"] if nodes is None else sorted(f"nodes.{name}" for name in nodes)
    return (
        *(name for name in ("input", "item", "index", "hop", "output") if expressions.reads(expression, name)),
        *names,
    )
