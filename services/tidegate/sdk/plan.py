"""What an agent sees and what it answers: State in, Plan out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tidegate.domain import canonical
from tidegate.sdk import json_form
from tidegate.sdk.graph import Change


@dataclass(frozen=True, slots=True)
class ToolCall:
    """An agent's wish to have a tool called. `id` is for the model's book-keeping: it may be empty or repeated."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True)
class Goto:
    """What a step or agent returns to choose the next node, one of its node's `routes`. `output` is its output as usual."""

    node: str
    output: Any = None


@dataclass(frozen=True, slots=True)
class Propose:
    """What a step or agent returns to have nodes and edges added to the graph of its run.

    change: made by `App.change`, or a mapping of `nodes`, `edges` and `because` as in a definition. output: its output as usual;
    it counts whether the change is accepted or not, unless the graph requires changes to be. goto: as of `Goto`.
    """

    change: Change | Mapping[str, Any]
    output: Any = None
    goto: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """An agent's answer to a State.

    The tool calls run in parallel, and the agent is asked again with what came out of them. Without tool calls and
    without `final=False` the plan is final: the agent's output is `output`, or `content` if that is None.
    cost_micros: what making the plan cost, in micro-dollars; None if the declared cost is to count. usage: tokens by
    name. goto: the node to go on with, one of the agent's `routes`; only in a final plan.
    """

    content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    final: bool | None = None
    output: Any = None
    cost_micros: int | None = None
    usage: Mapping[str, int] = field(default_factory=dict)
    goto: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(call, ToolCall) for call in self.tool_calls):
            raise TypeError("tool_calls must be a list of ToolCall")
        if self.final not in (None, True, False):
            raise TypeError(f"final must be True, False or None, not {self.final!r:.80}; the answer goes into `output`")
        if self.goto and (self.final is False or (self.final is None and self.tool_calls)):
            raise TypeError("goto is for a final plan: this one goes on")

    def to_json(self) -> dict[str, Any]:
        """Return the plan as it is recorded. Raises NotJsonError."""
        recorded = {
            "content": json_form.to_json(self.content, "content"),
            "tool_calls": [
                {
                    "id": json_form.to_json(call.id, f"tool_calls[{index}].id"),
                    "name": json_form.to_json(call.name, f"tool_calls[{index}].name"),
                    "arguments": json_form.to_json(call.arguments, f"tool_calls[{index}].arguments"),
                }
                for index, call in enumerate(self.tool_calls)
            ],
            "final": self.final,
            "output": json_form.to_json(self.output),
        }
        return recorded | {"goto": self.goto} if self.goto else recorded


def plan_of(returned: Any) -> Plan:
    """Return what an agent function returned as a Plan: any other value is its final output."""
    if isinstance(returned, Goto):
        return Plan(final=True, output=returned.output, goto=returned.node)
    if isinstance(returned, Propose):
        return Plan(final=True, output=returned.output, goto=returned.goto)
    return returned if isinstance(returned, Plan) else Plan(final=True, output=returned)


class Given(NamedTuple):
    """What a function gave, taken apart: its output, the node to go on with, and the change that it proposes, as JSON."""

    output: Any
    goto: str = ""
    change: str = ""


def given_by(returned: Any) -> Given:
    """Take apart what a step or an agent returned.

    Raises GraphError for a change that is wrong in itself, NotJsonError for one that is no JSON.
    """
    if isinstance(returned, Goto):
        return Given(returned.output, returned.node)
    if not isinstance(returned, Propose):
        return Given(returned)
    change = returned.change.to_change() if isinstance(returned.change, Change) else returned.change
    return Given(returned.output, returned.goto, canonical.dumps(json_form.to_json(change, "change")))


@dataclass(frozen=True, slots=True)
class Observation:
    """A tool call of an earlier turn and what came of it: `output` if `ok`, else `error`."""

    id: str
    name: str
    arguments: dict[str, Any]
    ok: bool
    output: Any
    error: str | None


@dataclass(frozen=True, slots=True)
class Turn:
    """An earlier plan of this agent, with the outcome of its tool calls."""

    content: str
    calls: tuple[Observation, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What an agent is asked with. `input` is the node's input, `turn` counts from 1, `history` holds the turns before."""

    input: Any
    turn: int = 1
    history: tuple[Turn, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """Make a State of its recorded form. Raises KeyError or TypeError if it is not one."""
        return cls(
            input=value["input"],
            turn=value["turn"],
            history=tuple(
                Turn(turn["content"], tuple(Observation(**call) for call in turn["calls"])) for turn in value["history"]
            ),
        )

    def observations(self, name: str | None = None) -> list[Observation]:
        """Return what all earlier tool calls, or those of one tool, brought; oldest first."""
        return [call for turn in self.history for call in turn.calls if name is None or call.name == name]

    def last(self, name: str | None = None) -> Observation | None:
        """Return the latest observation, or the latest of one tool; None if there is none."""
        found = self.observations(name)
        return found[-1] if found else None

    def output_of(self, name: str, default: Any = None) -> Any:
        """Return the output of the latest successful call of a tool, or `default`."""
        return next((call.output for call in reversed(self.observations(name)) if call.ok), default)
