"""The final fingerprint: what a run came to, without when, where and how often.

Same definition, input and recorded outputs give the same fingerprint, whatever the interleaving: so no time, no executor, no
attempt number and no money enters it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def fingerprint(graph: str, run_input: str, steps: Iterable[tuple[str, str, str]], status: str, output: str) -> str:
    """Return SHA-256 (hex) over the graph, the input, (step id, status, output) in order of step id, and the end.

    graph: see `Workflow.mark`.
    """
    digest = hashlib.sha256()

    def add(text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)

    add(graph)
    add(run_input)
    for step_id, step_status, step_output in sorted(steps):
        add(step_id)
        add(step_status)
        add(step_output)
    add(status)
    add(output)
    return digest.hexdigest()
