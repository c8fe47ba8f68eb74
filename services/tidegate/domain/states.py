"""The state machines of runs and steps, as tables: (status, event) -> the statuses it may lead to.

A pair that is not in its table cannot happen; the fold raises on it instead of guessing.
"""

from __future__ import annotations

from typing import Final

ABSENT: Final = "absent"
RUNNING: Final = "running"
WAITING: Final = "waiting"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
REFUSED: Final = "refused"
RUN_TERMINAL: Final = frozenset({SUCCEEDED, FAILED, CANCELLED, REFUSED})

REQUESTED: Final = "requested"
DISPATCHED: Final = "dispatched"
AWAITING_APPROVAL: Final = "awaiting_approval"
BACKING_OFF: Final = "backing_off"
HELD: Final = "held"
ENDED: Final = "ended"
IN_CHILD: Final = "in_child"  # another run does the work
STEP_TERMINAL: Final = frozenset({SUCCEEDED, FAILED, CANCELLED})

# Of nodes. `looping`: a router has chosen to repeat what led to it, and waits until that has come to rest.
PENDING: Final = "pending"
ACTIVE: Final = "active"
LOOPING: Final = "looping"
SKIPPED: Final = "skipped"
NODE_SETTLED: Final = frozenset({SUCCEEDED, FAILED, SKIPPED})

RUN_TRANSITIONS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    (ABSENT, "RunStarted"): (RUNNING,),
    (ABSENT, "RunRefused"): (REFUSED,),
    (RUNNING, "ApprovalRequested"): (WAITING,),
    (WAITING, "ApprovalRequested"): (WAITING,),
    (WAITING, "ApprovalResolved"): (RUNNING, WAITING),
    (WAITING, "StepCancelled"): (RUNNING, WAITING),
    (WAITING, "StepSucceeded"): (RUNNING, WAITING),
    (WAITING, "ApprovalExpired"): (RUNNING, WAITING),
    (RUNNING, "WaitStarted"): (WAITING,),
    (WAITING, "WaitStarted"): (WAITING,),
    (WAITING, "WaitEnded"): (RUNNING, WAITING),
    (WAITING, "AttemptEnded"): (RUNNING, WAITING),
    (RUNNING, "RunFinished"): (SUCCEEDED, FAILED, CANCELLED),
}

STEP_TRANSITIONS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    (ABSENT, "StepReady"): (REQUESTED, HELD),
    (ABSENT, "WaitStarted"): (WAITING,),
    # An outside tool: the gate has let the call through, and it waits for whoever does it.
    (DISPATCHED, "WaitStarted"): (WAITING,),
    (REQUESTED, "AttemptDispatched"): (DISPATCHED,),
    (REQUESTED, "ApprovalRequested"): (AWAITING_APPROVAL,),
    (REQUESTED, "AttemptAwaitsBudget"): (REQUESTED,),
    # A result may overtake the decision that allowed it: it implies the allow.
    (REQUESTED, "StepSucceeded"): (SUCCEEDED,),
    (REQUESTED, "AttemptEnded"): (BACKING_OFF, ENDED),
    (DISPATCHED, "StepSucceeded"): (SUCCEEDED,),
    (DISPATCHED, "AttemptEnded"): (BACKING_OFF, ENDED),
    (BACKING_OFF, "AttemptRequested"): (REQUESTED,),
    (ENDED, "AttemptRequested"): (REQUESTED,),
    (ENDED, "ApprovalRequested"): (AWAITING_APPROVAL,),
    (ENDED, "StepFailed"): (FAILED,),
    (AWAITING_APPROVAL, "ApprovalResolved"): (REQUESTED, ENDED),
    # The lost attempt's result turned up while a human was being asked whether to repeat it: the question answers itself.
    (AWAITING_APPROVAL, "StepSucceeded"): (SUCCEEDED,),
    (BACKING_OFF, "StepSucceeded"): (SUCCEEDED,),
    # That result proposes a change, on which a human is to decide: another question takes the place of this one.
    (AWAITING_APPROVAL, "AttemptEnded"): (ENDED,),
    # Paused: the next attempt is due, but not asked for.
    (BACKING_OFF, "AttemptHeld"): (HELD,),
    (ENDED, "AttemptHeld"): (HELD,),
    (HELD, "AttemptRequested"): (REQUESTED,),
    (HELD, "StepCancelled"): (CANCELLED,),
    (AWAITING_APPROVAL, "ApprovalExpired"): (ENDED,),
    (WAITING, "WaitEnded"): (ENDED,),
    (WAITING, "StepCancelled"): (CANCELLED,),
    # Nobody did the outside tool: with its wait the attempt ends.
    (ENDED, "AttemptEnded"): (ENDED,),
    # A wait that is over, or an unknown outcome that a human knew.
    (ENDED, "StepSucceeded"): (SUCCEEDED,),
    (REQUESTED, "StepCancelled"): (CANCELLED,),
    (DISPATCHED, "StepCancelled"): (CANCELLED,),
    (AWAITING_APPROVAL, "StepCancelled"): (CANCELLED,),
    (BACKING_OFF, "StepCancelled"): (CANCELLED,),
    (ENDED, "StepCancelled"): (CANCELLED,),
    (ABSENT, "ChildStarted"): (IN_CHILD,),
    (IN_CHILD, "ChildEnded"): (SUCCEEDED, FAILED),
    (IN_CHILD, "StepCancelled"): (CANCELLED,),
}

NODE_TRANSITIONS: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    (PENDING, "StepReady"): (ACTIVE,),
    (PENDING, "MapStarted"): (ACTIVE,),
    (PENDING, "ChildStarted"): (ACTIVE,),
    (PENDING, "WaitStarted"): (ACTIVE,),
    (PENDING, "NodeSkipped"): (SKIPPED,),
    (PENDING, "NodeSucceeded"): (SUCCEEDED,),  # a router, or a map over nothing: no step ever runs for it
    (ACTIVE, "StepSucceeded"): (SUCCEEDED,),
    (ACTIVE, "ChildEnded"): (SUCCEEDED,),
    (ACTIVE, "NodeSucceeded"): (SUCCEEDED,),
    (ACTIVE, "NodeFailed"): (FAILED,),
    (SUCCEEDED, "PathsChosen"): (SUCCEEDED, LOOPING),
    (PENDING, "LoopEntered"): (PENDING,),
    (LOOPING, "LoopEntered"): (PENDING,),
    (SUCCEEDED, "LoopEntered"): (PENDING,),
    (FAILED, "LoopEntered"): (PENDING,),
    (SKIPPED, "LoopEntered"): (PENDING,),
}


RUN_MEANINGS: Final[dict[str, str]] = {
    ABSENT: "nothing is known of it, but perhaps of commands that were refused",
    RUNNING: "something of it runs, is asked of the gate, is to be tried again or is held back",
    WAITING: "at least one of its steps waits for a person, an event or a time; others may run meanwhile",
    SUCCEEDED: "it has its output",
    FAILED: "it ended badly; `code` and `reason` say why",
    CANCELLED: "somebody cancelled it",
    REFUSED: "its start was wrong, so it never began",
}

STEP_MEANINGS: Final[dict[str, str]] = {
    ABSENT: "it does not exist yet",
    REQUESTED: "an attempt is asked of the gate, which may have queued it for a free slot",
    DISPATCHED: "the attempt was placed on an executor, which runs it",
    AWAITING_APPROVAL: "a person must approve or reject the attempt or the change that it proposed, or say what became of it",
    BACKING_OFF: "an attempt ended without success; the next is asked for when its time comes",
    HELD: "the next attempt would be asked for if the run, its queue or everything were not paused",
    WAITING: "it runs nothing and waits for an event, a time or an answer",
    IN_CHILD: "another run does it, and tells this one when it is over",
    ENDED: "its attempt, approval or wait is over; what follows stands in the same entry",
    SUCCEEDED: "it has its output, for good",
    FAILED: "it will not succeed; `code` and `reason` say why",
    CANCELLED: "it is not wanted any more",
}


NODE_MEANINGS: Final[dict[str, str]] = {
    PENDING: "it waits until enough of the edges that lead to it are decided",
    ACTIVE: "a step of it is open, or items of it are to come",
    LOOPING: "its router goes back, as soon as what lies between has come to rest",
    SUCCEEDED: "it has its output; which of its edges are taken may stand beside it",
    FAILED: "it failed and the run goes on",
    SKIPPED: "nothing leads to it, or something before it failed",
}


class IllegalTransitionError(RuntimeError):
    """The log holds an event that its state does not allow: a bug or a damaged log, never to be papered over."""


def move(table: dict[tuple[str, str], tuple[str, ...]], status: str, event: str, to: str) -> str:
    """Return `to` if the table allows it. Raises IllegalTransitionError."""
    if to not in table.get((status, event), ()):
        raise IllegalTransitionError(f"{event} may not lead from {status} to {to}")
    return to
