"""The generated page `docs/states.md`: the state machines as the fold has them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tidegate.domain import run_events, states

Transitions = Mapping[tuple[str, str], tuple[str, ...]]

_INTRODUCTION: Final = """# States of runs, steps and nodes

<!-- Written by `tidegate topics docs` from services/tidegate/domain/states.py. Changes belong there. -->

A run and each of its steps and nodes are in one of these states; only an event in the log moves them. The fold raises on an event
that is not in its table: it never guesses.

That a run is *paused* is no state but stands beside it: a paused run may be running or waiting, and comes to its end as any
other. It is from `RunPaused` to `RunResumed`.
"""


def states_page() -> str:
    """Return the text of docs/states.md."""
    return "\n".join(
        [
            _INTRODUCTION,
            *_machine("Runs", states.RUN_MEANINGS, states.RUN_TRANSITIONS, states.RUN_TERMINAL),
            "",
            *_machine("Steps", states.STEP_MEANINGS, states.STEP_TRANSITIONS, states.STEP_TERMINAL),
            "",
            *_machine("Nodes, in each visit", states.NODE_MEANINGS, states.NODE_TRANSITIONS, states.NODE_SETTLED),
            "",
        ]
    )


def _machine(title: str, meanings: Mapping[str, str], transitions: Transitions, terminal: frozenset[str]) -> list[str]:
    lines = [f"## {title}", "", "| state | what it means | final |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {text} | {'yes' if name in terminal else ''} |" for name, text in meanings.items()]
    lines += ["", "| from | event | to | the event says |", "| --- | --- | --- | --- |"]
    order = list(meanings)
    for (before, event), after in sorted(transitions.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        lines.append(f"| `{before}` | `{event}` | {', '.join(f'`{name}`' for name in after)} | {_says(event)} |")
    return lines


def _says(event: str) -> str:
    """Return the first sentence of an event's docstring."""
    text = " ".join((getattr(run_events, event).__doc__ or "").split())
    return text.partition(". ")[0].removesuffix(".").replace("|", "\\|")
