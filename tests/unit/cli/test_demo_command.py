"""`tidegate demo` says no when something does not hold. What it shows when all does: tests/integration/test_one_command.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tidegate.cli import demo
from tidegate.demo.refund import DemoError
from tidegate.embedded.stack import StackError

PROOF = {
    "ok": False,
    "run_id": "r",
    "refund_dispatches": 2,
    "refund_effects": 2,
    "chain_verified": True,
    "reserved_micros": 1,
    "settled_micros": 1,
    "seconds": 1.0,
}


class _Stack:
    """What the command needs of a stack, started by nobody."""

    settings = None

    def __init__(self, failure: Exception | None = None) -> None:
        self._failure = failure

    def __enter__(self) -> _Stack:
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        pass


def run_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception | None, proof: Any) -> Any:
    class Demo:
        def __init__(self, *_: object) -> None:
            pass

        def run(self) -> dict[str, Any]:
            if isinstance(proof, Exception):
                raise proof
            return dict(proof)

    monkeypatch.setattr(demo, "make_stack", lambda *_: _Stack(failure))
    monkeypatch.setattr(demo, "RefundDemo", Demo)
    monkeypatch.setattr(demo, "_show_plain_producer", lambda *_: None)
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    return CliRunner().invoke(demo.app, ["--json"])


def test_a_proof_that_fails_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run_demo(monkeypatch, tmp_path, None, PROOF)
    assert result.exit_code == 1
    assert json.loads(result.stdout) == PROOF
    assert tmp_path.exists()  # for whoever wants to know why


@pytest.mark.parametrize("where", ["in the stack", "in the demo"])
def test_what_cannot_be_shown_is_a_failure_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    failure = StackError("no room") if where == "in the stack" else None
    result = run_demo(monkeypatch, tmp_path, failure, DemoError("no room"))
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"ok": False, "error": "no room"}
    assert "no room" in result.stderr
