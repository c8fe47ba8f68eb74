"""The state machines: their page, and that no state is there in vain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tidegate.cli.states_page import states_page
from tidegate.domain import run_events, states

ROOT = Path(__file__).resolve().parents[3]
MACHINES = [
    (states.RUN_TRANSITIONS, states.RUN_MEANINGS, states.RUN_TERMINAL),
    (states.STEP_TRANSITIONS, states.STEP_MEANINGS, states.STEP_TERMINAL),
]


@pytest.mark.feature("D5")
def test_the_page_of_states_is_up_to_date() -> None:
    assert (ROOT / "docs/states.md").read_text(encoding="utf-8") == states_page(), "run `make docs`"


@pytest.mark.feature("D5")
@pytest.mark.parametrize("machine", MACHINES, ids=["runs", "steps"])
def test_every_state_can_be_reached_and_left_unless_it_is_final(machine: tuple[dict, dict, frozenset]) -> None:  # type: ignore[type-arg]
    transitions, meanings, terminal = machine
    reached = {states.ABSENT}
    while more := {to for (before, _), after in transitions.items() if before in reached for to in after} - reached:
        reached |= more
    assert reached == set(meanings), "a state without a way to it, or without a meaning"
    assert {before for before, _ in transitions} == reached - terminal
    assert all(hasattr(run_events, event) for _, event in transitions)


@pytest.mark.feature("D5")
def test_what_is_in_no_table_cannot_happen() -> None:
    with pytest.raises(states.IllegalTransitionError, match="RunResumed may not lead from succeeded to running"):
        states.move(states.RUN_TRANSITIONS, states.SUCCEEDED, "RunResumed", states.RUNNING)
