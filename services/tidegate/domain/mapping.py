"""Maps: a function for each item of a list, a few at a time, with results in the order of the items. Pure."""

from __future__ import annotations

from tidegate.domain import run_events as ev
from tidegate.domain.calls import call_of
from tidegate.domain.identity import item_path
from tidegate.domain.node_state import MapState
from tidegate.domain.stop import check_size
from tidegate.domain.turns import first_turn
from tidegate.domain.workflow import Workflow


def item_step(workflow: Workflow, node_id: str, path: str, number: int, wave: int, value: str) -> ev.StepReady:
    """Return the first step of an item; `path` is what the step ids of this visit begin with."""
    name = workflow.document.nodes[node_id].function
    item = item_path(path, number)
    if workflow.function(name).kind == "agent":
        return first_turn(workflow, name, node_id, item, wave, value)
    return ev.StepReady(step_id=item, node_id=node_id, wave=wave, call=call_of(workflow, name, value))


def output_of(state: MapState, number: int, output: str | None, *, keep_failed: bool, node_id: str) -> str:
    """Return the node's output when its last item, this one, is done: null stands for a failed one, if it is kept at all.

    Raises Stop if it is too large.
    """
    results = [output if index == number else state.results[index] for index in range(len(state.items))]
    texts = [text or "null" for text in results if text is not None or keep_failed]
    check_size(texts, f"the output of node {node_id}")
    return f"[{','.join(texts)}]"
