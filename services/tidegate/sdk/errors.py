"""What the SDK raises, and what a function of an app may raise to say more than that it failed."""

from __future__ import annotations

from tidegate.domain.workflow import DefinitionError


class NonRetryable(Exception):  # noqa: N818 - users raise it by this name: it says what it does
    """Raised by a tool, step or agent: the attempt failed and repeating it cannot help, so the step fails at once."""


class AppError(ValueError):
    """An app or a function in it is declared wrongly. Raised while the app is put together, or when it is loaded."""


class GraphError(DefinitionError):
    """A graph cannot be published; `problems` lists everything that is wrong with it."""

    def __init__(self, label: str, problems: list[str]) -> None:
        super().__init__(problems)
        self.label = label

    def __str__(self) -> str:
        return f"workflow {self.label} cannot run:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


class BadArgumentsError(ValueError):
    """The arguments do not fit the function's signature."""


class FlowError(NonRetryable):
    """A flow does what flows cannot do: it awaits something else than calls of its steps, say."""


class FlowChangedError(FlowError):
    """The code of a flow does not make the calls that the log of its run has. The message names the call."""


class FlowFailedError(NonRetryable):
    """A flow has raised an exception, which the message names: a call failed that it does not catch, say."""


class CallFailedError(Exception):
    """Raised in a flow where it awaits a call whose step has failed for good. node_id: the call; reason: why."""

    def __init__(self, node_id: str, reason: str) -> None:
        super().__init__(f"{node_id}: {reason}")
        self.node_id = node_id
        self.reason = reason


class OutsideStepError(RuntimeError):
    """Something that exists only while a function runs for a run was asked for elsewhere."""


class NotJsonError(ValueError):
    """A value has no JSON form under the rule of `json_form`; the message says where in the value and why."""


class PublishConflictError(ValueError):
    """A workflow is already published under this name and version, with other content."""


class RunNotFoundError(LookupError):
    """The log holds no run of that id (yet)."""


class RunNotFinishedError(TimeoutError):
    """The run was neither finished nor waiting for a human when the time was up."""
