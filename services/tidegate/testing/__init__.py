"""For authors' unit tests: whole runs in this process, on a log in memory and a clock that jumps, without Kafka.

`Rehearsal` runs workflows under the real scheduler and gate; `call`, `run_agent` and `step_context` try single functions.
"""

from tidegate.sdk.testkit import Conversation, call, run_agent, step_context
from tidegate.testing.outcome import Outcome, Step
from tidegate.testing.rehearsal import CommandRefusedError, Rehearsal
from tidegate.testing.stubs import Stub

__all__ = [
    "CommandRefusedError",
    "Conversation",
    "Outcome",
    "Rehearsal",
    "Step",
    "Stub",
    "call",
    "run_agent",
    "step_context",
]
